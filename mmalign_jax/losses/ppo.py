"""What PPO adds to `policy_gradient`: rewards by token, advantages from a value model, and the value model's loss.

After Fact-RLHF (LLaVA-RLHF, arXiv 2309.14525). PPO's policy loss is `policy_gradient(kind="bnpo")` with advantages by token. B counts
sampled answers, R their token slots; tokens of an answer stand in front, so that its last one is the last of the mask.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmalign_jax.losses.policy_gradient import k3

PerToken = Float[Array, "B R"]


def shaped_rewards(
    scores: Float[Array, " B"],
    logps: PerToken,
    reference: PerToken,
    mask: Bool[Array, "B R"],
    *,
    kl_weight: float = 0.1,
    estimate: Literal["k1", "k1_clamped", "k3"] = "k1_clamped",
) -> PerToken:
    """-kl_weight KL_t at every token, and the answer's score at its last one.

    Args:
      scores: of whole answers, all bonuses and penalties included.
      logps, reference: log-probs of the sampled tokens when they were sampled, nats.
      estimate: of the KL at a token: k1 is lp - ref; k1_clamped max(lp - ref, 0), as the release has it, which is biased and never pays for
        going below the reference; k3 see `policy_gradient.k3`.

    Raises:
      ValueError: unknown estimate.
    """
    gap = jnp.where(mask, logps - reference, 0.0)
    match estimate:
        case "k1":
            kl = gap
        case "k1_clamped":
            kl = jnp.maximum(gap, 0.0)
        case "k3":
            kl = k3(gap, jnp.zeros_like(gap))
        case _:
            raise ValueError(f"unknown estimate {estimate!r}; there are k1, k1_clamped, k3")
    last = mask & (jnp.cumsum(mask, axis=1) == jnp.sum(mask, axis=1, keepdims=True))
    return jax.lax.stop_gradient(jnp.where(last, scores[:, None], 0.0) - kl_weight * kl)


def gae(rewards: PerToken, values: PerToken, mask: Bool[Array, "B R"], *, gamma: float = 1.0, lam: float = 1.0) -> tuple[PerToken, PerToken]:
    """Generalised advantage estimates and returns (arXiv 1506.02438, equation 16), both 0 off the mask and without gradient.

    A_t = sum_k (gamma lam)^k d_(t+k), d_t = r_t + gamma V_(t+1) - V_t; the value behind the last token is 0. Returns are A + V. Fact-RLHF has
    gamma = lam = 1.
    """
    values = jnp.where(mask, values, 0.0)
    ahead = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    delta = jnp.where(mask, rewards + gamma * ahead - values, 0.0)

    def backwards(later: Float[Array, " B"], now: Float[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        advantage = now + gamma * lam * later
        return advantage, advantage

    _, advantages = jax.lax.scan(backwards, jnp.zeros_like(delta[:, 0]), delta.T, reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    return jax.lax.stop_gradient((advantages, advantages + values))


def whitened(x: PerToken, mask: Bool[Array, "B R"], *, epsilon: float = 1e-8) -> PerToken:
    """(x - mean) / std over all tokens of the mask, 0 off it. The release averages over slots of padding, too."""
    count = jnp.maximum(jnp.sum(mask), 1)
    centred = jnp.where(mask, x - jnp.sum(jnp.where(mask, x, 0.0)) / count, 0.0)
    return centred * jax.lax.rsqrt(jnp.sum(jnp.square(centred)) / count + epsilon)


def value_loss(values: PerToken, old: PerToken, returns: PerToken, mask: Bool[Array, "B R"], *, clip: float = 0.2) -> Float[Array, ""]:
    """Mean over tokens of `value_errors`."""
    return jnp.sum(jnp.where(mask, value_errors(values, old, returns, clip), 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def value_errors(values: Float[Array, "*b R"], old: Float[Array, "*b R"], returns: Float[Array, "*b R"], clip: float) -> Float[Array, "*b R"]:
    """0.5 max((V - R)^2, (V' - R)^2), V' = V kept within `clip` of the values when the answers were sampled."""
    old, returns = jax.lax.stop_gradient((old, returns))
    kept = jnp.clip(values, old - clip, old + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(kept - returns))
