"""AOT (arXiv 2406.05882), unpaired: sorts s_w and s_l over the batch. It wants large batches."""

from mmalign_jax.losses.parts import Likelihood, Terms, Transport, logistic


def objective(*, beta: float = 0.01, label_smoothing: float = 0.0, nll_weight: float = 0.0) -> Terms:
    term = Transport(beta, logistic(label_smoothing=label_smoothing), paired=False)
    return 1.0 * term + nll_weight * Likelihood()
