"""RLOO (arXiv 2402.14740, equation 8): a sample's reward against the mean of its group's other samples; the KL is part of the reward."""

from mmalign_jax.losses.parts import PolicyGradient, Terms


def objective(*, kl_in_reward: float = 0.05, clip_low: float = 0.2, clip_high: float = 0.2) -> Terms:
    return 1.0 * PolicyGradient("grpo", "sum", "leave_one_out", clip_low, clip_high, kl_in_reward=kl_in_reward)
