"""PPO (arXiv 1707.06347) as in Fact-RLHF (arXiv 2309.14525): a value head on the policy, per-token KL in the reward, advantages by GAE."""

from mmalign_jax.losses.parts import ProximalPolicy, Returns, Terms, Value


def objective(
    *, kl_weight: float = 0.1, estimate: str = "k1_clamped", gamma: float = 1.0, lam: float = 1.0, clip: float = 0.2, value_weight: float = 0.1
) -> Terms:
    """Several updates on the same answers: `train.updates`, 4 is usual."""
    returns = Returns(kl_weight, estimate, gamma, lam)
    return ProximalPolicy(returns, clip) + value_weight * Value(returns, clip)
