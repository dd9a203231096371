"""Reward model (Bradley-Terry; centering as in arXiv 2312.09244): a head on the end token scores whole answers, chosen above rejected."""

from mmalign_jax.losses.parts import RewardHead, Terms


def objective(*, margin_weight: float = 0.0, centering: float = 0.01, square_weight: float = 0.0) -> Terms:
    """centering: 0.01 is TRL's advice. square_weight: of the mean square of scores, 0.001 in align-anything. margin_weight: of the pairs' margins."""
    return 1.0 * RewardHead(margin_weight, centering, square_weight)
