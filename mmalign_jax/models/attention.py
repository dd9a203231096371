"""Attention behind two functions: packed rows, and decode lanes that share their row's cache."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import mesh
from mmalign_jax.models.config import DecoderConfig, RopeConfig
from mmalign_jax.types import PAD, PREFIX

_NEVER = -1e30  # finite, so that a row of padding, which sees nothing, is not NaN


def packed_mask(
    role: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    image: Int[Array, "B T"],
    *,
    window: int | None = None,
    bidirectional: str = "none",
    visible: Bool[Array, "B T"] | None = None,
    images_see_all: bool = False,
) -> Bool[Array, "B T T"]:
    """Who sees whom in a packed row: causal by position, and an answer sees the prefix and itself but no other answer.

    Args:
      image: number of the image that a token is part of, -1 for text.
      window: counts positions back, not slots, so that every answer sees as far back as it would alone.
      bidirectional: `DecoderConfig.bidirectional`. The window bounds what an image sees of itself (Gemma 3), not what the prefix sees
        of itself (PaliGemma 2), as in transformers.
      visible: hides keys from every query (BDHS: image tokens that the policy may not use), or, with `images_see_all`, from text alone.
    """
    query, key = role[:, :, None], role[:, None, :]
    branch = (key != PAD) & ((key == PREFIX) | (key == query))
    allowed = positions[:, None, :] <= positions[:, :, None]
    if bidirectional == "image":
        allowed |= (image[:, :, None] == image[:, None, :]) & (image >= 0)[:, :, None]
    if window is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    if bidirectional == "prefix":
        allowed |= (query == PREFIX) & (key == PREFIX)
    allowed &= branch
    if visible is not None:
        seen = visible[:, None, :]
        allowed &= seen | (image >= 0)[:, :, None] if images_see_all else seen
    return allowed


def rope_tables(
    config: RopeConfig, width: int, positions: Int[Array, "*b"] | Int[Array, "B 3 T"]
) -> tuple[Float[Array, "*c E"], Float[Array, "*c E"]]:
    """cos and sin of the rotary angles in float32 (arXiv 2104.09864; llama3 scaling as in transformers' `modeling_rope_utils`).

    With `config.sections` and positions `[B, 3, T]` each frequency turns with time, row or column; the result is `[B, T, E]`.
    """
    inverse = config.theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if config.kind == "linear":
        inverse = inverse / config.factor
    elif config.kind == "llama3":
        wavelength = 2 * jnp.pi / inverse
        low = config.original_max_positions / config.low_freq_factor
        high = config.original_max_positions / config.high_freq_factor
        blend = (config.original_max_positions / wavelength - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        smooth = (1 - blend) * inverse / config.factor + blend * inverse
        inverse = jnp.where(wavelength > low, inverse / config.factor, jnp.where(wavelength < high, inverse, smooth))
    if config.sections and positions.ndim == 3:
        turning = positions.astype(jnp.float32)[:, _axis_of_frequency(config)]
        angles = turning.transpose(0, 2, 1) * inverse
    else:
        angles = positions.astype(jnp.float32)[..., None] * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def _axis_of_frequency(config: RopeConfig) -> np.ndarray:
    """0, 1 or 2 for each of the E / 2 frequencies: whether it turns with time, row or column."""
    if not config.interleaved:
        return np.repeat(np.arange(3), config.sections)
    axes = np.zeros(sum(config.sections), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * config.sections[axis] : 3] = axis
    return axes


def rotate(x: Float[Array, "*b H E"], cos: Float[Array, "*b E"], sin: Float[Array, "*b E"]) -> Float[Array, "*b H E"]:
    """Rotates the two halves of every head against each other, Llama's convention."""
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[..., None, :].astype(x.dtype) + turned * sin[..., None, :].astype(x.dtype)


def _softmax(scores: Float[Array, "*b K"], mask: Bool[Array, "*#b K"], config: DecoderConfig) -> Float[Array, "*b K"]:
    scores = scores.astype(jnp.float32) * (config.head_width**-0.5 if config.query_scale is None else config.query_scale)
    return jax.nn.softmax(jnp.where(mask, softcap(scores, config.attention_softcap), _NEVER), axis=-1)


def softcap(x: Float[Array, "*b"], cap: float | None) -> Float[Array, "*b"]:
    """cap * tanh(x / cap), or `x` without a cap (arXiv 2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    config: DecoderConfig,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B T H E"]:
    """Dense grouped-query attention; softmax in float32."""
    grouped = _group(query, key.shape[-2])
    scores = jnp.einsum("btgre,bsge->bgrts", grouped, key, preferred_element_type=jnp.float32)
    weights = _softmax(scores, mask[:, None, None], config).astype(value.dtype)
    mixed = jnp.einsum("bgrts,bsge->btgre", weights, value)
    return mesh.reshape(mixed, query.shape, "batch", None, "heads", None)


def attend_lanes(
    config: DecoderConfig,
    query: Float[Array, "B S H E"],
    shared: tuple[Float[Array, "B G T E"], Float[Array, "B G T E"]],
    mask: Bool[Array, "B S T"],
    tail: tuple[Float[Array, "B S G X E"], Float[Array, "B S G X E"]],
    filled: Bool[Array, " X"] | Bool[Array, "B X"],
    own: tuple[Float[Array, "B S G E"], Float[Array, "B S G E"]] | None,
) -> Float[Array, "B S H E"]:
    """One new token a lane: attends to the row's shared cache where `mask` allows, to the lane's tail where it is filled, and to itself.

    The shared keys are read once for all lanes of a row; nothing is copied into the lanes. Pairs are keys and values.

    Args:
      own: of the new tokens; None where the tails hold them already.
    """
    groups, split = shared[0].shape[1], shared[0].shape[2]
    grouped = _group(query, groups)
    f32 = {"preferred_element_type": jnp.float32}
    # the axes of tails stay in their order: a product that asks for another makes a CPU copy the tails
    of_tail = jnp.einsum("bsgre,bsgxe->bsgrx", grouped, tail[0], **f32).swapaxes(1, 2)
    scores = [jnp.einsum("bsgre,bgte->bgsrt", grouped, shared[0], **f32), of_tail]
    behind = jnp.broadcast_to(jnp.atleast_2d(filled)[:, None], (*mask.shape[:2], filled.shape[-1]))
    if own is not None:
        scores.append(jnp.einsum("bsgre,bsge->bgsr", grouped, own[0], **f32)[..., None])
        behind = jnp.pad(behind, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    behind = mesh.constrain(behind, "batch", None, None)
    allowed = jnp.concatenate([mask, behind], axis=-1)[:, None, :, None]
    weights = _softmax(jnp.concatenate(scores, axis=-1), allowed, config).astype(query.dtype)
    mixed = jnp.einsum("bgsrt,bgte->bsgre", weights[..., :split], shared[1])
    mixed = mixed + jnp.einsum("bsgrx,bsgxe->bsgre", weights[..., split : split + filled.shape[-1]].swapaxes(1, 2), tail[1])
    if own is not None:
        mixed = mixed + jnp.einsum("bgsr,bsge->bsgre", weights[..., -1], own[1])
    return mesh.reshape(mixed, query.shape, "batch", None, "heads", None)


def _group(query: Float[Array, "B T H E"], groups: int) -> Float[Array, "B T G r E"]:
    batch, time, heads, width = query.shape
    return mesh.reshape(query, (batch, time, groups, heads // groups, width), "batch", None, "kv_heads", None, None)
