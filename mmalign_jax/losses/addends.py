"""What some methods add to the argument of a pair's link."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses.branches import CHOSEN, CHOSEN_OTHER_IMAGE, REJECTED, Branch, Need
from mmalign_jax.losses.scores import Score
from mmalign_jax.losses.stats import BranchStats

PerPair = Float[Array, " B"]


@dataclasses.dataclass(frozen=True)
class LengthGap:
    """alpha (|y_w| - |y_l|): the fit absorbs length, so that the policy need not (R-DPO, arXiv 2403.19159, equation 9)."""

    alpha: float
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN, REJECTED)
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __call__(self, stats: BranchStats, score: Score) -> PerPair:
        return self.alpha * (stats.answers.lengths[:, 0] - stats.answers.lengths[:, 1])


@dataclasses.dataclass(frozen=True)
class ChosenPenalty:
    """-lambda max(0, -s_w): the chosen answer must not get less likely than under the reference (DPOP, arXiv 2402.13228, equation 3)."""

    weight: float
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN,)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE})

    def __call__(self, stats: BranchStats, score: Score) -> PerPair:
        return -self.weight * jnp.maximum(0.0, -score(stats, CHOSEN))


@dataclasses.dataclass(frozen=True)
class SequenceKl:
    """-alpha (KL(rejected) - sg(KL(chosen))), KL from reference to policy summed over tokens (TDPO, version 2, arXiv 2404.11999, equation 16)."""

    alpha: float
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN, REJECTED)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.KL, Need.REFERENCE})

    def __call__(self, stats: BranchStats, score: Score) -> PerPair:
        return -self.alpha * (stats.kl[:, 1] - jax.lax.stop_gradient(stats.kl[:, 0]))


@dataclasses.dataclass(frozen=True)
class ImageGap:
    """s(y_w | m) - s(y_w | m'): the image edge inside of another pair's logit (the release of CHiP)."""

    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN, CHOSEN_OTHER_IMAGE)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.OTHER_IMAGE})

    def __call__(self, stats: BranchStats, score: Score) -> PerPair:
        return score(stats, CHOSEN) - score(stats, CHOSEN_OTHER_IMAGE)


Addend = LengthGap | ChosenPenalty | SequenceKl | ImageGap
