"""Supervised fine-tuning on the first answer."""

from mmalign_jax.losses import terms
from mmalign_jax.types import BranchStats


def sft(stats: BranchStats) -> tuple[terms.PerPair, terms.Metrics]:
    """L = -(1 / |y|) sum_t log pi(y_t | x, m, y_<t): the mean over the tokens of answer 0, then over rows."""
    stats = terms.as_float32(stats)
    loss = -terms.mean_logps(stats)[:, 0]
    return loss, terms.averaged(terms.likelihood_metrics(stats, loss))
