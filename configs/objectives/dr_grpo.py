"""Dr. GRPO (arXiv 2503.20783): no std and no length in the denominators, which favour easy prompts and long wrong answers."""

from mmalign_jax.losses.parts import PolicyGradient, Terms


def objective(*, clip_low: float = 0.2, clip_high: float = 0.2, kl_weight: float = 0.0) -> Terms:
    return 1.0 * PolicyGradient("dr_grpo", "token", "none", clip_low, clip_high, kl_weight=kl_weight)
