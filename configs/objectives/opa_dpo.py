"""OPA-DPO (arXiv 2501.09695), after its SFT stage: DPO, an image edge with masked patches, and an anchor, by sequence."""

from mmalign_jax.losses.parts import CHOSEN_OTHER_IMAGE, Constant, Pair, Point, Terms


def objective(
    *, beta: float = 0.1, image_weight: float = 0.2, anchor_weight: float = 1.0, delta: float = 0.0, view: str = "patch_mask(0.3)"
) -> Terms:
    edge, anchor = Pair(beta, lose=CHOSEN_OTHER_IMAGE), Point(beta, baseline=Constant(delta))
    return Pair(beta) + image_weight * edge + anchor_weight * anchor
