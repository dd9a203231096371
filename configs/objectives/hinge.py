"""Hinge on the DPO logit (SLiC's link with a reference; RSO, arXiv 2309.06657): max(0, 1 - beta (s_w - s_l))."""

from mmalign_jax.losses.parts import Likelihood, Pair, Terms, hinge


def objective(*, beta: float = 0.1, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, hinge()) + nll_weight * Likelihood()
