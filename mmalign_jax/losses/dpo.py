"""Direct preference optimization (Rafailov et al., arXiv 2305.18290, equation 7)."""

from mmalign_jax.losses import terms
from mmalign_jax.types import BranchStats


def dpo(
    stats: BranchStats, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 0.0
) -> tuple[terms.PerPair, terms.Metrics]:
    """L = -log sigmoid(h), h = beta (s_w - s_l), s = log pi(y | x, m) - log pi_ref(y | x, m), summed over tokens.

    Args:
      beta: strength of the tie to the reference, per nat of the summed log-ratio.
      label_smoothing: probability that a preference label is flipped (cDPO).
      nll_weight: weight of the chosen answer's mean negative log-likelihood a token (iterative RPO, arXiv 2404.19733).
    """
    stats = terms.as_float32(stats)
    rewards = beta * terms.log_ratios(stats)
    h = rewards[:, 0] - rewards[:, 1]
    loss = terms.logistic(h, label_smoothing) - nll_weight * terms.mean_logps(stats)[:, 0]
    return loss, terms.averaged(terms.pair_metrics(stats, loss, rewards, h) | terms.drift_metrics(stats, h))
