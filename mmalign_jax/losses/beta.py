"""Schedules of beta: how strongly a pair is tied to the reference, by epoch, by pair or by batch. No gradient flows into any of them."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmalign_jax.losses.branches import Need
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.whole_batch import gathered

PerPair = Float[Array, " B"]
State = dict[str, Float[Array, ""]]

_LEAST = 1e-3


@dataclasses.dataclass(frozen=True)
class BetaSchedule:
    """A constant; the base of the others. `gap` is the pair's s_w - s_l before beta."""

    beta: float
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __call__(self, stats: BranchStats, gap: PerPair) -> PerPair:
        return jnp.full_like(gap, self.beta)

    def keep(self, stats: BranchStats, gap: PerPair) -> PerPair | None:
        """Weight of each pair in the loss; None: all the same."""
        return None

    def initial_state(self) -> dict[str, float]:
        return {}

    def next_state(self, stats: BranchStats, gap: PerPair) -> State:
        return {}


@dataclasses.dataclass(frozen=True)
class ByEpoch(BetaSchedule):
    """betas[epoch]; the last one stays."""

    betas: tuple[float, ...] = ()
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EPOCH})

    def __call__(self, stats: BranchStats, gap: PerPair) -> PerPair:
        values = jnp.array(self.betas, gap.dtype)
        return jnp.full_like(gap, 1.0) * values[jnp.minimum(stats.epoch, len(self.betas) - 1)]


@dataclasses.dataclass(frozen=True)
class ByMargin(BetaSchedule):
    """beta (1 + w (1 - exp(-k margin))), kept within [beta, (1 + w) beta] (MM-DPO, MM-RLHF, arXiv 2502.10391, section 4.2).

    Args:
      w: most by which beta grows, as a share of it.
      k: how soon it does, per unit of the pair's margin (a reward model's r_w - r_l).
    """

    w: float = 0.5
    k: float = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MARGIN})

    def __call__(self, stats: BranchStats, gap: PerPair) -> PerPair:
        return self.beta * (1 + self.w * (1 - jnp.exp(-self.k * jnp.maximum(stats.margin, 0.0))))


@dataclasses.dataclass(frozen=True)
class ByBatch(BetaSchedule):
    """beta (1 + a (mean of the kept gaps - M)), at least 1e-3; M is a running mean of the gap (beta-DPO, arXiv 2407.08639).

    A share `1 - rho` of the batch is kept, drawn without replacement with weights exp(-(gap - M)^2 / (2 sigma^2)), sigma the batch's own;
    without a key those with the largest weights are kept. The others do not count in the loss.

    Args:
      a: how much beta moves per nat.
      momentum: of M, which is 0 at the beginning.
    """

    a: float = 0.6
    rho: float = 0.2
    momentum: float = 0.9
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BATCH})

    def __call__(self, stats: BranchStats, gap: PerPair) -> PerPair:
        gap = jax.lax.stop_gradient(gap)
        shift = jnp.mean(gap * self.keep(stats, gap)) - self._mean(stats)
        return jnp.full_like(gap, 1.0) * jnp.maximum(self.beta * (1 + self.a * shift), _LEAST)

    def keep(self, stats: BranchStats, gap: PerPair) -> PerPair:
        gap = jax.lax.stop_gradient(gap)
        count = max(1, round((1 - self.rho) * gap.shape[0]))

        def chosen(weight: PerPair) -> PerPair:
            # Gumbel noise makes the largest ones a weighted draw without replacement
            noise = 0.0 if stats.key is None else jax.random.gumbel(stats.key, weight.shape, weight.dtype)
            return largest(weight + noise, count)

        weight = -0.5 * jnp.square(gap - self._mean(stats)) / jnp.maximum(jnp.var(gap), 1e-12)
        return gathered(chosen, weight) * (gap.shape[0] / count)

    def initial_state(self) -> dict[str, float]:
        return {"gap_mean": 0.0}

    def next_state(self, stats: BranchStats, gap: PerPair) -> State:
        gap = jax.lax.stop_gradient(gap)
        return {"gap_mean": self.momentum * self._mean(stats) + (1 - self.momentum) * jnp.mean(gap)}

    def _mean(self, stats: BranchStats) -> Float[Array, ""]:
        return stats.state["gap_mean"]


@dataclasses.dataclass(frozen=True)
class ByHardness(ByBatch):
    """beta q m, at least 1e-3 (DAMA, arXiv 2502.01943): q = sigmoid(margin) / sigmoid(usual margin) is how easily the data tell the answers
    apart, m = mean of sigmoid(kept gaps) / sigmoid(running mean of the gap) how well the model does.

    Args:
      usual_margin: mean margin of the data set; the release has 0.0482 for CLIP scores of its own set.
    """

    usual_margin: float = 0.0482
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BATCH, Need.MARGIN})

    def __call__(self, stats: BranchStats, gap: PerPair) -> PerPair:
        gap = jax.lax.stop_gradient(gap)
        q = jax.nn.sigmoid(stats.margin) / jax.nn.sigmoid(self.usual_margin)
        m = jnp.mean(jax.nn.sigmoid(gap) * self.keep(stats, gap)) / jax.nn.sigmoid(self._mean(stats))
        return jnp.maximum(self.beta * q * m, _LEAST)


def largest(values: PerPair, count: int) -> PerPair:
    """1.0 at the `count` largest values, else 0.0; of equal ones the first."""
    order = jnp.argsort(-values, stable=True)
    ranked: Bool[Array, " B"] = jnp.arange(values.shape[0]) < count
    return jnp.zeros_like(values).at[order].set(ranked.astype(values.dtype))
