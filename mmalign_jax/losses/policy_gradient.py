"""Policy gradients over sampled answers: GRPO (DeepSeekMath, arXiv 2402.03300) and its relatives, as functions of arrays.

Here B counts sampled answers, all samples of all prompts; `group_advantages` has B prompts of G samples each.
"""

import dataclasses
import math
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Kind = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
Level = Literal["token", "sequence", "sum"]
Metrics = dict[str, Float[Array, ""]]
PerToken = Float[Array, "B R"]

# Products of two such exponentials still fit into float32; further out there is no gradient
_LARGEST_EXPONENT = 40.0

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
KINDS: tuple[str, ...] = typing.get_args(Kind)
LEVELS: tuple[str, ...] = typing.get_args(Level)


def group_advantages(
    rewards: Float[Array, "B G"], scale: Literal["group", "batch", "none"] = "group", *, population: bool = False, epsilon: float = 1e-4
) -> Float[Array, "B G"]:
    """(R - mean of the group) / (std + epsilon) (GRPO, section 4.1.2). A group whose rewards are all equal has advantages 0.

    Args:
      rewards: of G samples for each of B prompts.
      scale: whose std divides: the group's, the whole batch's, or none's (Dr. GRPO, arXiv 2503.20783).
      population: divide squares by G and not by G - 1.
      epsilon: matters where the rewards hardly differ.

    Raises:
      ValueError: unknown `scale`.
    """
    rewards = jax.lax.stop_gradient(rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32)))
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    match scale:
        case "group":
            spread, count = jnp.sum(jnp.square(centred), axis=1, keepdims=True), rewards.shape[1]
        case "batch":
            spread, count = jnp.sum(jnp.square(rewards - jnp.mean(rewards))), rewards.size
        case "none":
            return centred
        case _:
            raise ValueError(f"unknown scale {scale!r}; there are group, batch, none")
    # of a single sample there is no spread, and its advantage is 0 anyway
    return centred / (jnp.sqrt(spread / max(count if population else count - 1, 1)) + epsilon)


def leave_one_out(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """R minus the mean of the group's other rewards (RLOO, arXiv 2402.14740, equation 8); 0 of a single sample."""
    rewards = jax.lax.stop_gradient(rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32)))
    group = rewards.shape[1]
    return (rewards - jnp.mean(rewards, axis=1, keepdims=True)) * (group / max(group - 1, 1))


def k3(logps: PerToken, reference: PerToken) -> PerToken:
    """exp(ref - lp) - (ref - lp) - 1: an estimate of KL(policy || reference) by token, never negative, unbiased for the policy's samples."""
    gap = reference - logps
    return jnp.expm1(jnp.minimum(gap, _LARGEST_EXPONENT)) - gap


def policy_gradient(
    logps: PerToken,
    old: PerToken | None,
    advantages: Float[Array, " B"] | PerToken,
    mask: Bool[Array, "B R"],
    *,
    kind: Kind = "dapo",
    level: Level = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float | None = None,
    reference: PerToken | None = None,
    kl_weight: float = 0.0,
    kl_by_ratio: bool = False,
    max_length: int | None = None,
    total_tokens: Float[Array, ""] | None = None,
    temperatures: tuple[float, float] = (1.0, 1.05),
    shapes: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0)),
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch of sampled answers, and metrics. rho = exp(lp - old), A the advantage, eps the clips; by token

        grpo, bnpo, dr_grpo, dapo, luspo:  -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)      (DeepSeekMath, equation 3)
        cispo:  -sg(min(rho, eps_high)) A lp                                                        (MiniMax-M1, arXiv 2506.13585, equation 4)
        sapo:   -4 / tau sigmoid(tau (rho - 1)) A, tau by the sign of A
        vespo:  -sg(e^lam W^k e^(-lam W)) A lp, W = exp(sum of lp - old), (k, lam) by the sign of A

    The reduction is a mean over tokens and then over answers (grpo, sapo), over all tokens (bnpo, dapo, cispo, vespo), a sum over
    B `max_length` (dr_grpo), or the answer's loss times its length, averaged (luspo, whose ratio is the sequence's).

    Args:
      logps: log-probs of the sampled tokens, nats, of logits over the sampling temperature. Values off the mask are not read.
      old: the same when they were sampled; None: just now, so that all ratios are 1.
      advantages: of each answer, or of each token; no gradient.
      mask: tokens that count. An answer without any has loss 0: so answers without an end-of-turn token are filtered out.
      level: of the ratio; "sequence" takes exp of the mean over the answer's tokens (GSPO, arXiv 2507.18071), "sum" of their sum (RLOO).
      clip_high: for cispo the cap itself, 5 say.
      ratio_cap: further bound of rho where A is negative (the other side of the clip).
      reference: the reference's log-probs, for `kl_weight` times `k3`, added by token.
      kl_by_ratio: multiplies `k3` by rho, for samples that are not the policy's any more.
      max_length: of an answer, in tokens, for dr_grpo.
      total_tokens: divides in place of this batch's token count (bnpo, dapo, cispo, vespo), where a step has several batches.
      temperatures: tau of sapo for positive and for other advantages.
      shapes: (k, lam) of vespo for advantages that are not negative, and for negative ones.

    Raises:
      ValueError: unknown kind or level, or a kind without what it needs.
    """
    check(kind, level, max_length)
    if kl_weight and reference is None:
        raise ValueError("kl_weight needs the reference's log-probs")
    by_token = token_losses(
        logps, old, advantages, mask, kind=kind, level=level, clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap,
        reference=reference, kl_weight=kl_weight, kl_by_ratio=kl_by_ratio, temperatures=temperatures, shapes=shapes,
    )  # fmt: skip
    counts = jnp.sum(mask, axis=1, keepdims=True).astype(by_token.loss.dtype)
    metrics = by_token.metrics | {"lengths": jnp.mean(counts)}
    total = jnp.sum(counts) if total_tokens is None else total_tokens
    reduced = reduced_losses(by_token.loss, counts[:, 0], kind, max_length, total)
    return reduced, {name: jax.lax.stop_gradient(value.astype(jnp.float32)) for name, value in (metrics | {"loss": reduced}).items()}


@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """The loss at each token, 0 off the mask, and means over tokens and answers (`policy_gradient`'s metrics)."""

    loss: PerToken
    metrics: Metrics


def token_losses(
    logps: PerToken,
    old: PerToken | None,
    advantages: Float[Array, " B"] | PerToken,
    mask: Bool[Array, "B R"],
    *,
    kind: Kind,
    level: Level = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float | None = None,
    reference: PerToken | None = None,
    kl_weight: float = 0.0,
    kl_by_ratio: bool = False,
    temperatures: tuple[float, float] = (1.0, 1.05),
    shapes: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0)),
) -> TokenLosses:
    """`policy_gradient` before its reduction; the arguments are the same."""
    logps = jnp.where(mask, logps.astype(jnp.promote_types(logps.dtype, jnp.float32)), 0.0)
    old = jax.lax.stop_gradient(logps if old is None else jnp.where(mask, old, 0.0))
    advantages = jax.lax.stop_gradient(advantages if advantages.ndim == 2 else advantages[:, None])
    counts = jnp.sum(mask, axis=1, keepdims=True).astype(logps.dtype)
    gap = logps - old
    log_ratio = gap
    if level != "token":
        log_ratio = jnp.sum(gap, axis=1, keepdims=True) / (jnp.maximum(counts, 1.0) if level == "sequence" else 1.0)
    ratio = jnp.exp(jnp.minimum(log_ratio, _LARGEST_EXPONENT))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    if kind in _CLIPPED:
        plain = ratio if ratio_cap is None else jnp.minimum(ratio, ratio_cap)
        loss = -jnp.minimum(plain * advantages, clipped * advantages)
    elif kind == "cispo":
        loss = -jax.lax.stop_gradient(jnp.minimum(ratio, clip_high)) * advantages * logps
    elif kind == "sapo":
        tau = jnp.where(advantages > 0, *temperatures)
        loss = -4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantages
    else:
        loss = -jax.lax.stop_gradient(_gamma_weight(gap, advantages, shapes)) * advantages * logps
    loss = jnp.broadcast_to(loss, logps.shape)
    metrics = {
        "ratio": _mean(ratio, mask),
        "clip_fraction": _mean(((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0)), mask),
        "advantages": _mean(jnp.abs(advantages), mask) if advantages.shape == mask.shape else jnp.mean(jnp.abs(advantages)),
    }
    if reference is not None:
        divergence = k3(logps, jax.lax.stop_gradient(jnp.where(mask, reference, 0.0)))
        metrics["kl"] = _mean(divergence, mask)
        if kl_weight:
            loss = loss + kl_weight * (divergence * ratio if kl_by_ratio else divergence)
    if kind == "cispo":
        metrics["clip_fraction"] = _mean((ratio > clip_high) & (advantages > 0), mask)
    metrics = {name: jax.lax.stop_gradient(value.astype(jnp.float32)) for name, value in metrics.items()}
    return TokenLosses(jnp.where(mask, loss, 0.0), metrics)


def check(kind: str, level: str, max_length: int | None) -> None:
    """Raises ValueError where kind, level and length do not go together (`policy_gradient`)."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(KINDS)}")
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; there are {', '.join(LEVELS)}")
    if kind == "luspo" and level != "sequence":
        raise ValueError("luspo wants the sequence's ratio: level='sequence'")
    if kind == "dr_grpo" and max_length is None:
        raise ValueError("dr_grpo divides by max_length, the most tokens that an answer may have")


def reduced_losses(
    loss: PerToken,
    counts: Float[Array, " B"],
    kind: str,
    max_length: int | Float[Array, ""] | None,
    total_tokens: Float[Array, ""],
) -> Float[Array, ""]:
    """The loss of some answers from those of their tokens, see `policy_gradient`.

    Args:
      loss: 0 off the answers.
      counts: tokens of each answer.
      total_tokens: divides where all tokens weigh the same.
    """
    match kind:
        case "grpo" | "sapo":
            return jnp.mean(jnp.sum(loss, axis=1) / jnp.maximum(counts, 1.0))
        case "dr_grpo":
            return jnp.sum(loss) / (loss.shape[0] * max_length)
        case "luspo":
            # the answer's loss stands at each of its tokens, so that their sum is that loss times the length
            return jnp.mean(jnp.sum(loss, axis=1))
    return jnp.sum(loss) / jnp.maximum(total_tokens, 1.0)


def _gamma_weight(gap: PerToken, advantages: Float[Array, "B _R"], shapes: tuple[tuple[float, float], tuple[float, float]]) -> Float[Array, "B _R"]:
    """e^lam W^k e^(-lam W), 1 at W = 1; the logarithm of W is bounded so that the weight stays finite."""
    log_w = jnp.clip(jnp.sum(jnp.clip(gap, -20.0, 20.0), axis=1, keepdims=True), math.log(1e-8), 20.0)
    (k_pos, lam_pos), (k_neg, lam_neg) = shapes
    k, lam = jnp.where(advantages >= 0, k_pos, k_neg), jnp.where(advantages >= 0, lam_pos, lam_neg)
    return jnp.exp(lam + k * log_w - lam * jnp.exp(log_w))


def _mean(x: Array, mask: Bool[Array, "B R"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0).astype(jnp.float32)) / jnp.maximum(jnp.sum(mask), 1)
