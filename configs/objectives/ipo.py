"""IPO (arXiv 2310.12036, equation 17), by token as its authors use it: (s_w / |y_w| - s_l / |y_l| - 1 / (2 beta))^2."""

from mmalign_jax.losses.parts import Likelihood, Mean, Pair, Score, Terms, square


def objective(*, beta: float = 0.1, length_normalized: bool = True, nll_weight: float = 0.0) -> Terms:
    score = Score(Mean()) if length_normalized else Score()
    return Pair(beta, square(target=0.5, scale=beta), score=score) + nll_weight * Likelihood()
