"""CHiP (arXiv 2501.16629): preferences by response, segment and token (TDPO's divergence in the logit), and an image edge."""

from mmalign_jax.losses.parts import CHOSEN_OTHER_IMAGE, Pair, Score, SequenceKl, Terms, Weighted


def objective(
    *,
    beta: float = 0.1,
    alpha: float = 0.1,
    image_weight: float = 1.0,
    segment_weight: float = 1.0,
    changed_weight: float = 4.0,
    view: str = "diffusion(500)",
) -> Terms:
    segment = Pair(beta, score=Score(Weighted(changed_weight, mean=False)), name="segment")
    return Pair(beta, inside=(SequenceKl(alpha),)) + image_weight * Pair(beta, lose=CHOSEN_OTHER_IMAGE) + segment_weight * segment
