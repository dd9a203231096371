"""PPO (arXiv 1707.06347) with a value head, per-token KL in the reward and advantages by GAE, after Fact-RLHF (LLaVA-RLHF, arXiv 2309.14525)."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses.branches import CHOSEN, Branch, Need
from mmalign_jax.losses.policy_gradient import token_losses
from mmalign_jax.losses.policy_terms import drawn_logps
from mmalign_jax.losses.ppo import gae, shaped_rewards, value_errors, whitened
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.terms import PerPair, Term

PerToken = Float[Array, "B K R"]


@dataclasses.dataclass(frozen=True)
class Returns:
    """How rewards become advantages and returns, by token.

    Args:
      kl_weight, estimate: see `ppo.shaped_rewards`.
      gamma, lam: see `ppo.gae`.
    """

    kl_weight: float = 0.1
    estimate: Literal["k1", "k1_clamped", "k3"] = "k1_clamped"
    gamma: float = 1.0
    lam: float = 1.0

    def __call__(self, stats: BranchStats) -> tuple[PerToken, PerToken, PerToken]:
        """Advantages, returns, and the values when the answers were sampled; no gradient reaches them."""
        sampled, answers = stats.sampled, stats.answers
        mask = answers.token_weight > 0
        old = jax.lax.stop_gradient(stats.values if sampled.values is None else sampled.values)

        def of_row(rewards, logps, reference, values, mask):
            shaped = shaped_rewards(rewards, logps, reference, mask, kl_weight=self.kl_weight, estimate=self.estimate)
            return gae(shaped, values, mask, gamma=self.gamma, lam=self.lam)

        return *jax.vmap(of_row)(sampled.rewards, drawn_logps(stats), answers.reference_tokens, old, mask), old


@dataclasses.dataclass(frozen=True)
class ProximalPolicy(Term):
    """-min(rho A, clip(rho) A) at every token, A whitened over all tokens of the step; the mean over these tokens is the loss of the step."""

    returns: Returns = Returns()
    clip: float = 0.2
    label: ClassVar[str] = "policy"
    of_pair: ClassVar[bool] = False
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN,)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SAMPLED, Need.TOKENS, Need.REFERENCE, Need.VALUES, Need.BATCH})

    def __call__(self, stats: BranchStats) -> PerPair:
        return _over_step(self._losses(stats)[0], stats)

    def metrics(self, stats: BranchStats) -> dict[str, Float[Array, "*b"]]:
        mask = stats.answers.token_weight > 0
        gap = jnp.where(mask, drawn_logps(stats) - stats.answers.reference_tokens, 0.0)
        out = {f"policy/{name}": value for name, value in self._losses(stats)[1].items()}
        return out | {"policy/kl_of_answers": jnp.mean(jnp.sum(gap, axis=-1), axis=-1)}

    def _losses(self, stats: BranchStats) -> tuple[PerToken, dict[str, PerPair]]:
        mask = stats.answers.token_weight > 0
        advantages = self.returns(stats)[0]
        flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        advantages = whitened(flat(advantages), flat(mask)).reshape(advantages.shape)

        def of_row(logps, old, advantages, mask):
            found = token_losses(logps, old, advantages, mask, kind="bnpo", clip_low=self.clip, clip_high=self.clip)
            return found.loss, found.metrics

        return jax.vmap(of_row)(stats.answers.policy_tokens, drawn_logps(stats), advantages, mask)


@dataclasses.dataclass(frozen=True)
class Value(Term):
    """`ppo.value_errors` at every token; the mean over all tokens of the step is the loss of the step."""

    returns: Returns = Returns()
    clip: float = 0.2
    label: ClassVar[str] = "value"
    of_pair: ClassVar[bool] = False
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN,)
    needs: ClassVar[frozenset[Need]] = ProximalPolicy.needs

    def __call__(self, stats: BranchStats) -> PerPair:
        _, returns, old = self.returns(stats)
        errors = value_errors(stats.values, old, returns, self.clip)
        return _over_step(jnp.where(stats.answers.token_weight > 0, errors, 0.0), stats)

    def metrics(self, stats: BranchStats) -> dict[str, Float[Array, "*b"]]:
        _, returns, _ = self.returns(stats)
        mask = stats.answers.token_weight > 0
        mean = lambda x: jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)  # noqa: E731
        left, spread = mean(jnp.square(returns - stats.values)), mean(jnp.square(returns - mean(returns)))
        explained = jnp.where(spread > 0, 1 - left / jnp.where(spread > 0, spread, 1.0), 0.0)
        return {"value/mean": mean(stats.values), "value/returns": mean(returns), "value/explained_variance": explained}


def _over_step(loss: PerToken, stats: BranchStats) -> PerPair:
    """Of each row, so that the mean over the step's rows is the mean over all its tokens."""
    return jnp.sum(loss, axis=(-2, -1)) / jnp.maximum(stats.sampled.row_tokens, 1.0)
