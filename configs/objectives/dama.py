"""DAMA (arXiv 2502.01943): beta by how hard a pair is in the data (its margin) and for the model."""

from mmalign_jax.losses.parts import ByHardness, Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, rho: float = 0.2, usual_margin: float = 0.0482, nll_weight: float = 0.0) -> Terms:
    return Pair(ByHardness(beta, rho=rho, usual_margin=usual_margin)) + nll_weight * Likelihood()
