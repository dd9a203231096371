"""SLiC-HF (arXiv 2305.10425): max(0, 1 - beta (log pi_w - log pi_l)), beta = 1 / margin, and the chosen answer's likelihood."""

from mmalign_jax.losses.parts import Likelihood, Pair, Score, Terms, hinge


def objective(*, beta: float = 1.0, nll_weight: float = 0.1) -> Terms:
    return Pair(beta, hinge(), score=Score(reference=False)) + nll_weight * Likelihood()
