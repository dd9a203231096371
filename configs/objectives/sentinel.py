"""SENTINEL (arXiv 2507.12455): DPO on one sentence behind a shared clean context, which is conditioned on and not scored."""

from mmalign_jax.losses.parts import Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, nll_weight: float = 0.0) -> Terms:
    """Its pairs are records with a `prefix`, such as config.pairs.per_sentence makes."""
    return Pair(beta) + nll_weight * Likelihood()
