"""Answer log-probs, and objectives as weighted sums of pure terms of their statistics."""

from mmalign_jax.losses.branches import (
    CHOSEN,
    CHOSEN_NO_IMAGE,
    CHOSEN_OTHER_IMAGE,
    MISMATCHED,
    REJECTED,
    REJECTED_OTHER_IMAGE,
    SELF_REJECTED,
    Branch,
    Need,
)
from mmalign_jax.losses.logps import TokenStats, answer_logps, answer_statistics, sums
from mmalign_jax.losses.objective import Objective
from mmalign_jax.losses.registry import ALIASES, build, hyperparameters, names, summary
from mmalign_jax.losses.stats import AnswerLogps, BranchStats

__all__ = [
    "ALIASES", "CHOSEN", "CHOSEN_NO_IMAGE", "CHOSEN_OTHER_IMAGE", "MISMATCHED", "REJECTED", "REJECTED_OTHER_IMAGE", "SELF_REJECTED",
    "AnswerLogps", "Branch", "BranchStats", "Need", "Objective", "TokenStats",
    "answer_logps", "answer_statistics", "build", "hyperparameters", "names", "summary", "sums",
]  # fmt: skip
