"""mDPO (arXiv 2406.11839, section 3): DPO, the same answer under a corrupted image as a rejected one, and an anchor."""

from mmalign_jax.losses.parts import CHOSEN_OTHER_IMAGE, Constant, Likelihood, Pair, Point, Terms


def objective(
    *,
    beta: float = 0.1,
    image_weight: float = 1.0,
    anchor_weight: float = 1.0,
    delta: float = 0.0,
    nll_weight: float = 0.0,
    view: str = "random_crop",
) -> Terms:
    edge, anchor = Pair(beta, lose=CHOSEN_OTHER_IMAGE), Point(beta, baseline=Constant(delta))
    return Pair(beta) + image_weight * edge + anchor_weight * anchor + nll_weight * Likelihood()
