"""CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): the ratio is cut off as a weight, so that every token keeps its gradient."""

from mmalign_jax.losses.parts import PolicyGradient, Terms


def objective(*, cap: float = 5.0, advantage: str = "batch", kl_weight: float = 0.0) -> Terms:
    return 1.0 * PolicyGradient("cispo", "token", advantage, clip_high=cap, kl_weight=kl_weight)
