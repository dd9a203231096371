"""SAPO: a sigmoid in the place of the clip, softer where the advantage is positive."""

from mmalign_jax.losses.parts import PolicyGradient, Terms


def objective(*, kl_weight: float = 0.0) -> Terms:
    return 1.0 * PolicyGradient("sapo", kl_weight=kl_weight)
