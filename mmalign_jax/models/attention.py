"""Attention behind two functions: packed rows, and decode lanes that share their row's cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import mesh
from mmalign_jax.models.block_attention import NEVER, QueryBlock, Scores, attend_blocks
from mmalign_jax.models.config import DecoderConfig, RopeConfig
from mmalign_jax.models.remat import ATTENTION
from mmalign_jax.types import PAD, PREFIX


def packed_mask(
    role: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    image: Int[Array, "B T"],
    *,
    window: int | None = None,
    bidirectional: str = "none",
    visible: Bool[Array, "B T"] | None = None,
    images_see_all: bool = False,
    segment: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T T"]:
    """Who sees whom in a packed row: causal by position, and an answer sees the prefix and itself but no other answer.

    Args:
      segment: `PairBatch.segment`, of rows with several pairs, none of which sees another.
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
    if segment is not None:
        allowed &= segment[:, :, None] == segment[:, None, :]
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


def _scores(config: DecoderConfig) -> Scores:
    return Scores(config.head_width**-0.5 if config.query_scale is None else config.query_scale, config.attention_softcap)


def _softmax(products: Float[Array, "*b K"], mask: Bool[Array, "*#b K"], config: DecoderConfig) -> Float[Array, "*b K"]:
    return jax.nn.softmax(jnp.where(mask, _scores(config)(products.astype(jnp.float32)), NEVER), axis=-1)


@dataclasses.dataclass(frozen=True)
class Regions:
    """Where a packed row's parts lie: which blocks of queries and keys can see each other at all.

    Args:
      prefix, answer: P and R, slots of the prefix and of one answer.
      causal: no slot of the prefix sees a later one.
      longest: in rows of several pairs, most slots of a pair's prefix and of one of its answers: what is further apart is of two pairs.
    """

    prefix: int
    answer: int
    causal: bool
    longest: tuple[int, int] | None = None

    @property
    def reach(self) -> tuple[int, int]:
        """Most slots of the prefix and of an answer of one pair."""
        return self.longest or (self.prefix, self.answer)

    @property
    def prefix_blocks(self) -> list[tuple[int, int, int, int]]:
        """(first query, end of queries, first key, end of keys) of each block of the prefix."""
        return _blocks(self.prefix, self.reach[0], self.causal)

    @property
    def answer_blocks(self) -> list[tuple[int, int, int, int]]:
        """The same of an answer, counted from its beginning. It also sees the prefix."""
        return _blocks(self.answer, self.reach[1], True)

    def products(self, answers: int) -> int:
        """Products of a query with a key that `attend` computes for a row and a head."""
        of_prefix = sum((end - start) * (seen - first) for start, end, first, seen in self.prefix_blocks)
        return of_prefix + answers * sum((end - start) * (self.prefix + seen - first) for start, end, first, seen in self.answer_blocks)


def _blocks(slots: int, reach: int, causal: bool) -> list[tuple[int, int, int, int]]:
    """Many queries a block, so that products are large, and few, so that what a block need not see is left out."""
    size = max(128, -(-slots // 8))
    spans = [(start, min(start + size, slots)) for start in range(0, slots, size)]
    return [(start, end, max(0, start - reach + 1), end if causal else min(slots, end + reach - 1)) for start, end in spans]


def attend(
    config: DecoderConfig,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    mask: Bool[Array, "B T T"],
    regions: Regions,
) -> Float[Array, "B T H E"]:
    """Exact grouped-query attention of packed rows, a block of queries at a time; softmax in float32.

    A block of the prefix reads the keys up to its own end, an answer the prefix and itself: half of the prefix' products and those between
    answers are not computed. In rows of several pairs, nor are those of slots of a region that are too far apart to be of one pair. Scores of one
    block exist at a time; the backward pass computes them again, so none are kept.

    Args:
      mask: allows nothing outside of what `regions` says.

    Raises:
      ValueError: the row is not a prefix and whole answers.
    """
    prefix, answer = regions.prefix, regions.answer
    if query.shape[1] < prefix or (query.shape[1] - prefix) % max(answer, 1):
        raise ValueError(f"{query.shape[1]} slots are not {prefix} for the prefix and a multiple of {answer} for the answers")
    query = mesh.reshape(query, (*query.shape[:2], key.shape[2], -1, query.shape[3]), "batch", None, "kv_heads", None, None)
    # heads before slots, once: blocks are then cut out of what lies side by side
    query, key, value = query.transpose(0, 2, 3, 1, 4), key.swapaxes(1, 2), value.swapaxes(1, 2)
    if not config.qk_norm:  # of which the backward pass needs what it read, and that is kept
        query, key, value = (checkpoint_name(x, ATTENTION) for x in (query, key, value))
    blocks = [QueryBlock(start, stop, ((first, seen),)) for start, stop, first, seen in regions.prefix_blocks]
    for begin in range(prefix, query.shape[3], max(answer, 1)):
        for start, stop, first, seen in regions.answer_blocks:
            blocks.append(QueryBlock(begin + start, begin + stop, ((0, prefix), (begin + first, begin + seen))))
    mixed = attend_blocks(tuple(blocks), _scores(config), query, key, value, mask).transpose(0, 3, 1, 2, 4)
    return mesh.reshape(mixed, (*mixed.shape[:2], -1, mixed.shape[-1]), "batch", None, "heads", None)


def attention_weights(
    config: DecoderConfig, query: Float[Array, "B G r Q E"], key: Float[Array, "B G K E"], mask: Bool[Array, "B Q K"]
) -> Float[Array, "B G r Q K"]:
    """The weights, float32, of a block of queries; they sum to 1 where a query sees anything."""
    scores = jnp.einsum("bgrqe,bgke->bgrqk", query, key, preferred_element_type=jnp.float32)
    return _softmax(scores, mask[:, None, None], config)


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
