"""DAPO (arXiv 2503.14476, equation 8): all tokens of the step weigh the same, and the upper clip is wider."""

from mmalign_jax.losses.parts import PolicyGradient, Terms


def objective(*, clip_low: float = 0.2, clip_high: float = 0.28, kl_weight: float = 0.0) -> Terms:
    return 1.0 * PolicyGradient("dapo", "token", "group", clip_low, clip_high, kl_weight=kl_weight)
