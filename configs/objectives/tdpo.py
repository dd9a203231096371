"""TDPO, version 2 (arXiv 2404.11999, equation 16): the rejected answer's KL from the reference, by token, enters the logit."""

from mmalign_jax.losses.parts import Likelihood, Pair, SequenceKl, Terms


def objective(*, beta: float = 0.1, alpha: float = 0.5, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, inside=(SequenceKl(alpha),)) + nll_weight * Likelihood()
