"""DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta (s_w - s_l)), s = log pi - log pi_ref, summed over tokens."""

from mmalign_jax.losses.parts import ByEpoch, Likelihood, Pair, Terms, logistic


def objective(*, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 0.0, beta_by_epoch: tuple = ()) -> Terms:
    """label_smoothing: probability that a label is flipped (cDPO). beta_by_epoch: replaces beta, the last one stays.

    nll_weight: of the chosen answer's mean negative log-likelihood a token (iterative RPO, arXiv 2404.19733), as in other files here.
    """
    tie = ByEpoch(beta, beta_by_epoch) if beta_by_epoch else beta
    return Pair(tie, logistic(label_smoothing=label_smoothing)) + nll_weight * Likelihood()
