"""R-DPO (arXiv 2403.19159, equation 9): alpha (|y_w| - |y_l|) in the logit absorbs what length explains."""

from mmalign_jax.losses.parts import LengthGap, Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, alpha: float = 0.01, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, outside=(LengthGap(alpha),)) + nll_weight * Likelihood()
