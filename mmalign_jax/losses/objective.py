"""An objective: a weighted sum of terms with a name, its hyper-parameters, and what it needs to be given."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses.branches import Branch, Need
from mmalign_jax.losses.metrics import Metrics, compared, metrics_of, rewards_of
from mmalign_jax.losses.stats import AnswerLogps, BranchStats
from mmalign_jax.losses.terms import PerPair, Term, Terms

Value = float | int | bool | str | tuple

_ALONE = {
    Need.OTHER_IMAGE: "answers under a corrupted image",
    Need.NO_IMAGE: "answers without the image",
    Need.SELF_REJECTED: "what the policy says under a corrupted image",
    Need.MISMATCHED: "another row's answer behind each prompt",
    Need.AUXILIARY: "rows of another data set",
    Need.TOKENS: "log-probs by token",
    Need.CHANGED: "which tokens differ between the answers",
    Need.SAMPLED: "groups of samples",
    Need.SCORES: "scores at the answers' ends",
    Need.VALUES: "values before the answers' tokens",
}
State = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A pure function `(stats) -> (loss of each pair, metrics)`. It is static: close over it, do not pass it through jit.

    Args:
      name: its name in a config.
      terms: what it is made of.
      hyperparameters: every one of its hyper-parameters.
      reference_free: where it compares with a reference, that is one for which all answers are equally likely (log-probs of 0).
    """

    name: str
    terms: Terms
    hyperparameters: Mapping[str, Value] = dataclasses.field(hash=False)
    reference_free: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        """What it reads beside the policy's log-probs; nothing else need be computed."""
        return frozenset().union(*(term.needs for _, term in self.terms))

    @property
    def reads_logps(self) -> bool:
        """Whether it reads log-probs of answers at all; otherwise `AnswerLogps.policy` may be None."""
        return any(term.reads_logps for _, term in self.terms)

    @property
    def goes_by_batch(self) -> bool:
        """Whether a row's loss depends on the other rows of its step."""
        return Need.BATCH in self.needs

    @property
    def alone(self) -> tuple[str, ...]:
        """What it reads that rows of several pairs do not have (`PairBatch.segment`), in words; () where sums over answers' tokens do."""
        return tuple(words for need, words in _ALONE.items() if need in self.needs)

    @property
    def by_rank(self) -> bool:
        """Whether losses come sorted over the step, so that no pair's weight can be told to any of them."""
        return any(term.by_rank for _, term in self.terms)

    @property
    def of_samples(self) -> bool:
        """Whether rows are groups of samples with rewards."""
        return Need.SAMPLED in self.needs

    @property
    def reads(self) -> str:
        """The field of a record whose members are its rows, of `types.FORMS`; objectives of samples and of references read none of the others."""
        return "labels" if Need.LABELS in self.needs else "groups" if Need.REWARDS in self.needs else "prefs"

    @property
    def score_head(self) -> bool:
        """Whether it asks for a model with a score head."""
        return bool({Need.SCORES, Need.VALUES} & self.needs)

    @property
    def whole_answers(self) -> bool:
        """Whether it scores answers at their end tokens, which answers that are cut do not have."""
        return Need.SCORES in self.needs

    @property
    def compares(self) -> "Objective | None":
        """The objective of the first term that compares two answers alone, which is what `rewards` reads; None where there is no such term."""
        main = compared(self.terms)
        return None if main is None else dataclasses.replace(self, terms=1.0 * main)

    @property
    def answers(self) -> int:
        """It reads the first so many answers of a row, under whatever images."""
        return max((branch.answer + 1 for branch in self._branches), default=1)

    @property
    def other_answers(self) -> int:
        """It reads the first so many answers under the corrupted image."""
        return max((branch.answer + 1 for branch in self._branches if branch.images == "other_image"), default=0)

    @property
    def blind_reference(self) -> bool:
        """Whether it reads what the reference says under black images; guidance reads the policy's alone."""
        return Need.REFERENCE in self.needs and any(branch.images == "no_image" for branch in self._branches)

    @property
    def view(self) -> str:
        """How the corrupted image is made, as `pairs.views.parse` reads it; "" where there is none."""
        corrupted = {Need.OTHER_IMAGE, Need.SELF_REJECTED} & self.needs
        return str(self.hyperparameters["view"]) if corrupted else ""

    @property
    def other_pictures(self) -> str:
        """Which pictures it sees that are made from a row's own, in words; "" where there are none. Black ones need no pixels."""
        return f"corrupted pictures ({self.view})" if self.view else ""

    def __call__(self, stats: BranchStats) -> tuple[PerPair, Metrics]:
        """Losses `[B]` and metrics (means over the batch) in float32. No gradient reaches the reference or the metrics.

        Raises:
          ValueError: `stats` lacks what the objective needs.
        """
        stats = self._checked(stats)
        by_label: dict[str, PerPair] = {}
        loss = jnp.zeros_like(stats.answers.lengths[:, 0])
        for weight, term in self.terms:
            value = term(stats)
            counted = value if stats.weight is None or not term.of_pair else stats.weight * value
            loss = loss + weight * counted
            by_label[term.label] = by_label.get(term.label, 0.0) + value
        return loss, metrics_of(self.terms, stats, loss, by_label, reference_free=self.reference_free)

    def rewards(self, stats: BranchStats) -> Float[Array, "B 2"]:
        """The rewards of each row's two sides, chosen and rejected, whose differences the metrics count (`rewards/accuracies`).

        Raises:
          ValueError: `stats` lacks what the objective needs, or no term compares two answers.
        """
        if (main := compared(self.terms)) is None:
            raise ValueError(f"{self.name} compares no answers")
        return jax.lax.stop_gradient(jnp.stack(rewards_of(main, self._checked(stats)), axis=-1))

    def initial_state(self) -> State:
        """What the objective carries from step to step, before the first one."""
        return {name: jnp.float32(value) for _, term in self.terms for name, value in term.initial_state().items()}

    def next_state(self, stats: BranchStats) -> State:
        """The state after a step whose statistics over all its rows are `stats`, with the state before it."""
        stats = self._checked(stats)
        new = {name: value for _, term in self.terms for name, value in term.next_state(stats).items()}
        return jax.tree.map(lambda x: jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)), new)

    @property
    def _branches(self) -> list[Branch]:
        return [branch for _, term in self.terms for branch in term.branches]

    def _checked(self, stats: BranchStats) -> BranchStats:
        """The statistics in float32, with a state."""
        if stats.answers.lengths.shape[1] < self.answers:
            raise ValueError(f"{self.name} needs {self.answers} answers a row, got {stats.answers.lengths.shape[1]}")
        if self.reads_logps and stats.answers.policy is None:
            raise ValueError(f"{self.name} needs log-probs, which the statistics lack")
        if missing := sorted({what for _, term in self.terms for need in term.needs for what in _missing(need, term, stats)}):
            raise ValueError(f"{self.name} needs {', '.join(missing)}, which the statistics lack")
        stats = stats.as_float32()
        return stats if stats.state is not None else dataclasses.replace(stats, state=self.initial_state())


def _missing(need: Need, term: Term, stats: BranchStats) -> list[str]:
    """What the statistics lack of a need of a term, in words."""
    if need is Need.BATCH:
        return []
    if need in (Need.REFERENCE, Need.TOKENS, Need.CHANGED):
        read = {branch.images: getattr(stats, branch.images) for branch in term.branches}
        lacking = [images for images, logps in read.items() if logps is not None and not _holds(logps, need, Need.REFERENCE in term.needs)]
        return [need.value if images == "answers" else f"{need.value} of {images}" for images in lacking]
    found = getattr(stats, need.value)
    if isinstance(found, AnswerLogps):
        # a guided score takes the answers without image from its own
        branches = [branch for branch in term.branches if need is Need.NO_IMAGE or branch.images == need.value]
        return [need.value] if found.policy.shape[1] < max(branch.answer + 1 for branch in branches) else []
    return [need.value] if found is None else []


def _holds(logps: AnswerLogps, need: Need, reference: bool) -> bool:
    match need:
        case Need.REFERENCE:
            wanted = (logps.reference,)
        case Need.TOKENS:
            wanted = (logps.policy_tokens, logps.token_weight, *((logps.reference_tokens,) if reference else ()))
        case _:
            wanted = (logps.changed,)
    return all(x is not None for x in wanted)
