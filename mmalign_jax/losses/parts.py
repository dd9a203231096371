"""Everything that an objective is made of, for the files of `configs/objectives`."""

from mmalign_jax.losses.addends import ChosenPenalty, ImageGap, LengthGap, SequenceKl
from mmalign_jax.losses.baselines import BatchKl, Constant, RunningMean
from mmalign_jax.losses.beta import ByBatch, ByEpoch, ByHardness, ByMargin
from mmalign_jax.losses.branches import (
    CHOSEN,
    CHOSEN_NO_IMAGE,
    CHOSEN_OTHER_IMAGE,
    REJECTED,
    REJECTED_OTHER_IMAGE,
    SELF_REJECTED,
)
from mmalign_jax.losses.labelled import Labelled
from mmalign_jax.losses.likelihood import Auxiliary, ConfidenceLikelihood, Likelihood, Odds
from mmalign_jax.losses.links import discopop, exo, exp, hinge, logistic, robust, sigmoid, square
from mmalign_jax.losses.policy_terms import PolicyGradient
from mmalign_jax.losses.ppo_terms import ProximalPolicy, Returns, Value
from mmalign_jax.losses.ranking import Ranking
from mmalign_jax.losses.reward_head import RewardHead
from mmalign_jax.losses.scores import Divergence, LengthDesensitized, Mean, Score, Sum, Weighted
from mmalign_jax.losses.terms import Pair, Point, Terms, Transport
from mmalign_jax.losses.trust import Trust

__all__ = [
    "CHOSEN", "CHOSEN_NO_IMAGE", "CHOSEN_OTHER_IMAGE", "REJECTED", "REJECTED_OTHER_IMAGE", "SELF_REJECTED",
    "Auxiliary", "BatchKl", "ByBatch", "ByEpoch", "ByHardness", "ByMargin", "ChosenPenalty", "ConfidenceLikelihood", "Constant", "Divergence",
    "ImageGap", "Labelled", "LengthDesensitized", "LengthGap", "Likelihood", "Mean", "Odds", "Pair", "Point", "PolicyGradient", "ProximalPolicy",
    "Ranking", "Returns", "RewardHead", "RunningMean", "Score", "SequenceKl", "Sum", "Terms", "Transport", "Trust", "Value", "Weighted",
    "discopop", "exo", "exp", "hinge", "logistic", "robust", "sigmoid", "square",
]  # fmt: skip
