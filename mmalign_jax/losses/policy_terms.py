"""Terms of answers that are samples: every row is a group of samples of one prompt, each with a reward."""

import dataclasses
import typing
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmalign_jax.losses.branches import CHOSEN, Branch, Need
from mmalign_jax.losses.policy_gradient import Kind, Level, check, group_advantages, leave_one_out, reduced_losses, token_losses
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.terms import PerPair, Term
from mmalign_jax.losses.whole_batch import gathered

Advantage = Literal["group", "batch", "none", "leave_one_out"]
ADVANTAGES: tuple[str, ...] = typing.get_args(Advantage)


def drawn_logps(stats: BranchStats) -> Float[Array, "B K R"]:
    """Log-probs by the policy that drew the answers, nats, 0 off them: of the policy as it is, unless they are given. No gradient."""
    logps = stats.answers.policy_tokens if stats.sampled.logps is None else stats.sampled.logps
    return jax.lax.stop_gradient(logps)


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Term):
    """`policy_gradient` of a row's K samples, of which the mean over the rows of a step is the loss of them all.

    Args:
      kind, level, clip_low, clip_high, ratio_cap, kl_weight: see `policy_gradient`.
      advantage: from rewards: their difference to the group's mean over the std of the group, of the batch or of none (`group_advantages`), or
        to the mean of the others (`leave_one_out`).
      kl_in_reward: the weight of the sum over an answer's tokens of log pi - log pi_ref when it was sampled, taken off its reward.
    """

    kind: Kind = "grpo"
    level: Level = "token"
    advantage: Advantage = "group"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    kl_weight: float = 0.0
    kl_in_reward: float = 0.0
    label: ClassVar[str] = "policy"
    of_pair: ClassVar[bool] = False
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN,)  # and all others of the row, whose number the samples decide

    def __post_init__(self):
        check(self.kind, self.level, max_length=1)  # that of the samples

    @property
    def needs(self) -> frozenset[Need]:
        reference = {Need.REFERENCE} if self.kl_weight or self.kl_in_reward else set()
        return frozenset({Need.SAMPLED, Need.TOKENS} | reference | ({Need.BATCH} if self.advantage == "batch" else set()))

    def advantages(self, stats: BranchStats) -> Float[Array, "B K"]:
        rewards = stats.sampled.rewards
        if self.kl_in_reward:
            mask = stats.answers.token_weight > 0
            gap = jnp.where(mask, drawn_logps(stats) - stats.answers.reference_tokens, 0.0)
            rewards = rewards - self.kl_in_reward * jnp.sum(gap, axis=-1)
        if self.advantage == "leave_one_out":
            return leave_one_out(rewards)
        if self.advantage == "batch":
            return gathered(lambda all_rows: group_advantages(all_rows, "batch"), rewards)
        return group_advantages(rewards, self.advantage)

    def __call__(self, stats: BranchStats) -> PerPair:
        loss = self._token_losses(stats)[0]
        counts = jnp.sum(stats.answers.token_weight > 0, axis=-1).astype(loss.dtype)
        of_row = lambda loss, counts, limit, tokens: reduced_losses(loss, counts, self.kind, limit, tokens)  # noqa: E731
        return jax.vmap(of_row)(loss, counts, stats.sampled.limit, stats.sampled.row_tokens)

    def metrics(self, stats: BranchStats) -> dict[str, PerPair]:
        return {f"policy/{name}": value for name, value in self._token_losses(stats)[1].items()}

    def _token_losses(self, stats: BranchStats) -> tuple[Float[Array, "B K R"], dict[str, PerPair]]:
        answers = stats.answers
        settings = {"kind": self.kind, "level": self.level, "ratio_cap": self.ratio_cap}
        settings |= {"clip_low": self.clip_low, "clip_high": self.clip_high, "kl_weight": self.kl_weight}

        def of_row(
            logps: Float[Array, "K R"],
            old: Float[Array, "K R"],
            advantages: Float[Array, " K"],
            mask: Bool[Array, "K R"],
            reference: Float[Array, "K R"] | None,
        ) -> tuple[Array, dict[str, Array]]:
            found = token_losses(logps, old, advantages, mask, reference=reference, **settings)
            return found.loss, found.metrics

        reference = answers.reference_tokens if Need.REFERENCE in self.needs else None
        args = (answers.policy_tokens, drawn_logps(stats), self.advantages(stats), answers.token_weight > 0, reference)
        return jax.vmap(of_row, in_axes=(0, 0, 0, 0, None if reference is None else 0))(*args)
