"""Supervised fine-tuning on the first answer."""

from mmalign_jax.losses import terms
from mmalign_jax.types import BranchStats


def sft(stats: BranchStats, *, length_norm: float = 0.0) -> tuple[terms.PerPair, terms.Metrics]:
    """L = -(1 / n) sum_t log pi(y_t | x, m, y_<t) over the tokens of answer 0, then the mean over rows.

    Args:
      length_norm: n; 0 stands for the answer's own length, so that every answer weighs the same. With a constant (about the mean length)
        every token weighs the same, whatever batch it is in.
    """
    stats = terms.as_float32(stats)
    loss = -stats.policy[:, 0] / length_norm if length_norm else -terms.mean_logps(stats)[:, 0]
    return loss, terms.averaged(terms.likelihood_metrics(stats, loss))
