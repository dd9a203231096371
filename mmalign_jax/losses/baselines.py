"""What a single answer's reward is compared with. All are in units of the reward and carry no gradient."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses.branches import CHOSEN, MISMATCHED, REJECTED, Branch, Need
from mmalign_jax.losses.scores import Score
from mmalign_jax.losses.stats import BranchStats

State = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same for all."""

    value: float = 0.0
    branches: ClassVar[tuple[Branch, ...]] = ()
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __call__(self, stats: BranchStats, beta: float, score: Score) -> Float[Array, ""]:
        return jnp.asarray(self.value, stats.answers.policy.dtype)

    def initial_state(self) -> dict[str, float]:
        return {}

    def next_state(self, stats: BranchStats, beta: float, score: Score) -> State:
        return {}


@dataclasses.dataclass(frozen=True)
class RunningMean(Constant):
    """Mean over all steps so far of the mean reward of chosen and rejected answers, this step included (BCO, arXiv 2404.04656, equation 9)."""

    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN, REJECTED)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BATCH})

    def __call__(self, stats: BranchStats, beta: float, score: Score) -> Float[Array, ""]:
        return self.next_state(stats, beta, score)["reward_mean"]

    def initial_state(self) -> dict[str, float]:
        return {"reward_mean": 0.0, "reward_steps": 0.0}

    def next_state(self, stats: BranchStats, beta: float, score: Score) -> State:
        here = beta * jnp.mean(jnp.concatenate([score(stats, CHOSEN), score(stats, REJECTED)]))
        steps = stats.state["reward_steps"] + 1
        mean = stats.state["reward_mean"]
        return {"reward_mean": mean + (jax.lax.stop_gradient(here) - mean) / steps, "reward_steps": steps}


@dataclasses.dataclass(frozen=True)
class BatchKl(Constant):
    """max(0, beta times the batch's mean log-ratio of answers that belong to other prompts) (KTO, arXiv 2402.01306, equation 8)."""

    branches: ClassVar[tuple[Branch, ...]] = (MISMATCHED,)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MISMATCHED, Need.BATCH, Need.REFERENCE})

    def __call__(self, stats: BranchStats, beta: float, score: Score) -> Float[Array, ""]:
        there = stats.mismatched.lengths[:, 0] > 0  # a row may have no partner
        mean = jnp.sum(jnp.where(there, score(stats, MISMATCHED), 0.0)) / jnp.maximum(jnp.sum(there), 1)
        return jax.lax.stop_gradient(jnp.maximum(beta * mean, 0.0))


Baseline = Constant  # the protocol of all of them
