"""Answer log-probs, and objectives as pure functions of their sums."""

from mmalign_jax.losses.logps import answer_logps, sums
from mmalign_jax.losses.objective import Objective, build, hyperparameters, names
from mmalign_jax.types import BranchStats

__all__ = ["BranchStats", "Objective", "answer_logps", "build", "hyperparameters", "names", "sums"]
