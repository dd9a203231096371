"""GRPO (DeepSeekMath, arXiv 2402.03300, equation 3): clipped policy gradient, rewards standardised in their group of samples."""

from mmalign_jax.losses.parts import PolicyGradient, Terms


def objective(
    *, kind: str = "grpo", level: str = "token", advantage: str = "group", clip_low: float = 0.2, clip_high: float = 0.2, kl_weight: float = 0.04
) -> Terms:
    """kind, level, advantage: see `PolicyGradient`; bnpo, luspo and vespo, for instance, are kinds."""
    return 1.0 * PolicyGradient(kind, level, advantage, clip_low, clip_high, kl_weight=kl_weight)
