"""GSPO (arXiv 2507.18071, equation 5): the ratio is the answer's, a geometric mean over its tokens."""

from mmalign_jax.losses.parts import PolicyGradient, Terms


def objective(*, clip_low: float = 3e-4, clip_high: float = 4e-4, kl_weight: float = 0.0) -> Terms:
    return 1.0 * PolicyGradient("grpo", "sequence", "group", clip_low, clip_high, kl_weight=kl_weight)
