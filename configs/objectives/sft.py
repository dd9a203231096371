"""Supervised fine-tuning on the first answer: the mean over its tokens, so that every answer weighs the same."""

from mmalign_jax.losses.parts import Likelihood, Terms


def objective(*, length_norm: float = 0.0) -> Terms:
    """length_norm: divides the sum over tokens in place of the answer's length; then every token weighs the same in any batch."""
    return 1.0 * Likelihood(scale=length_norm)
