"""KTO (arXiv 2402.01306, equation 8) on single answers, each desirable or undesirable, as `samples.selector = "unpaired"` makes them."""

from mmalign_jax.losses.parts import BatchKl, Labelled, Terms, sigmoid


def objective(*, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Terms:
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return 1.0 * Labelled(beta, link=sigmoid(), baseline=BatchKl(), **weights)
