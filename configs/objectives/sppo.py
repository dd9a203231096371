"""SPPO with hard labels (arXiv 2405.00675): (s_w - 1 / (2 beta))^2 + (s_l + 1 / (2 beta))^2. Large by design: clip gradients."""

from mmalign_jax.losses.parts import REJECTED, Likelihood, Point, Terms, square


def objective(*, beta: float = 0.001, nll_weight: float = 0.0) -> Terms:
    link = square(target=0.5, scale=beta)
    rejected = Point(beta, REJECTED, sign=-1, link=link, label="rejected")
    return Point(beta, link=link, label="chosen") + 1.0 * rejected + nll_weight * Likelihood()
