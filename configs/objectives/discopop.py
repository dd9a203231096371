"""DiscoPOP (arXiv 2406.08414): a logistic and an exponential loss, blended by sigmoid(h / tau)."""

from mmalign_jax.losses.parts import Likelihood, Pair, Terms, discopop


def objective(*, beta: float = 0.05, tau: float = 0.05, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, discopop(tau=tau)) + nll_weight * Likelihood()
