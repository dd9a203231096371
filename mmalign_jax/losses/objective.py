"""An objective: a weighted sum of terms with a name, its hyper-parameters, and what it needs to be given."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses.branches import Branch, Need
from mmalign_jax.losses.metrics import Metrics, metrics_of
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.terms import PerPair, Terms

Value = float | int | bool | str | tuple
State = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A pure function `(stats) -> (loss of each pair, metrics)`. It is static: close over it, do not pass it through jit.

    Args:
      name: its name in a config.
      terms: what it is made of.
      hyperparameters: every one of its hyper-parameters.
    """

    name: str
    terms: Terms
    hyperparameters: Mapping[str, Value] = dataclasses.field(hash=False)

    @property
    def needs(self) -> frozenset[Need]:
        """What it reads beside the policy's log-probs; nothing else need be computed."""
        return frozenset().union(*(term.needs for _, term in self.terms))

    @property
    def answers(self) -> int:
        """It reads the first so many answers of a row, under whatever images."""
        return max((branch.answer + 1 for branch in self._branches), default=1)

    @property
    def other_answers(self) -> int:
        """It reads the first so many answers under the corrupted image."""
        return max((branch.answer + 1 for branch in self._branches if branch.images == "other_image"), default=0)

    @property
    def view(self) -> str:
        """How the corrupted image is made, as `pairs.views.parse` reads it; "" where there is none."""
        corrupted = {Need.OTHER_IMAGE, Need.SELF_REJECTED} & self.needs
        return str(self.hyperparameters["view"]) if corrupted else ""

    def __call__(self, stats: BranchStats) -> tuple[PerPair, Metrics]:
        """Losses `[B]` and metrics (means over the batch) in float32. No gradient reaches the reference or the metrics.

        Raises:
          ValueError: `stats` lacks what the objective needs.
        """
        stats = self._checked(stats)
        by_label: dict[str, PerPair] = {}
        loss = jnp.zeros_like(stats.answers.policy[:, 0])
        for weight, term in self.terms:
            value = term(stats)
            loss = loss + weight * value
            by_label[term.label] = by_label.get(term.label, 0.0) + value
        if stats.weight is not None:
            loss = loss * stats.weight
        return loss, metrics_of(self.terms, stats, loss, by_label)

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
        if stats.answers.policy.shape[1] < self.answers:
            raise ValueError(f"{self.name} needs {self.answers} answers a row, got {stats.answers.policy.shape[1]}")
        if missing := sorted(what for need in self.needs if (what := self._missing(need, stats))):
            raise ValueError(f"{self.name} needs {', '.join(missing)}, which the statistics lack")
        stats = stats.as_float32()
        return stats if stats.state is not None else dataclasses.replace(stats, state=self.initial_state())

    def _missing(self, need: Need, stats: BranchStats) -> str:
        """What the statistics lack of a need, "" when nothing."""
        fields = {branch.images for _, term in self.terms if need in term.needs for branch in term.branches}
        logps = [getattr(stats, name) for name in sorted(fields)]
        match need:
            case Need.BATCH:
                return ""
            case Need.REFERENCE:
                lacking = stats.answers.reference is None
            case Need.TOKENS:
                lacking = any(some is not None and some.policy_tokens is None for some in logps)
            case Need.CHANGED:
                lacking = any(some is not None and some.changed is None for some in logps)
            case Need.OTHER_IMAGE:
                lacking = stats.other_image is None or stats.other_image.policy.shape[1] < self.other_answers
            case _:
                lacking = getattr(stats, need.value) is None
        return need.value if lacking else ""
