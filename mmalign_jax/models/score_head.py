"""The score head: a linear map from a hidden state to one number, always float32. Reward models read it at the end of an answer, value models
at every token.

It is a part of its own, `{"kernel": [D], "bias": []}`, small and whole on every device.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mmalign_jax.models.config import MllmConfig
from mmalign_jax.types import FIRST_ANSWER, PREFIX, PairBatch

PART = "score_head"


def abstract_head(config: MllmConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return {"kernel": jax.ShapeDtypeStruct((config.decoder.width,), jnp.float32), "bias": jax.ShapeDtypeStruct((), jnp.float32)}


def initial_head(config: MllmConfig, seed: int) -> dict[str, np.ndarray]:
    """A new head: kernel normal with standard deviation 1 / sqrt(D + 1), bias 0 (arXiv 2403.17031, on reward heads).

    Not zero, because then no gradient would reach the decoder in the first step.
    """
    width = config.decoder.width
    generator = np.random.default_rng([seed, zlib.crc32(f"{PART}/kernel".encode())])
    return {"kernel": generator.normal(0.0, 1 / math.sqrt(width + 1), width).astype(np.float32), "bias": np.zeros((), np.float32)}


def scores(head: Mapping[str, Any], hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
    # a product in float32 on every platform: matrix units would round its inputs
    return jnp.sum(hidden.astype(jnp.float32) * head["kernel"], axis=-1) + head["bias"]


def at_ends(scores: Float[Array, "B T"], batch: PairBatch) -> Float[Array, "B K"]:
    """The score of every answer: that of its last token, which is the end token of answers that are whole. 0 for an answer without tokens."""
    there = _there(batch)
    last = there & (jnp.cumsum(there, axis=-1) == jnp.sum(there, axis=-1, keepdims=True))
    return jnp.sum(jnp.where(last, batch.by_answer(scores), 0.0), axis=-1)


def before_tokens(scores: Float[Array, "B T"], batch: PairBatch) -> Float[Array, "B K R"]:
    """V(s_t) of every answer token: the score of the state that predicts it, of the token before it. 0 off the answers."""
    slots = jnp.arange(batch.prefix_slots)
    prefix = batch.role[:, : batch.prefix_slots] == PREFIX
    last = slots == jnp.max(jnp.where(prefix, slots, -1), axis=-1, keepdims=True)
    first = jnp.sum(jnp.where(last, scores[:, : batch.prefix_slots], 0.0), axis=-1)
    inside = batch.by_answer(scores)
    before = jnp.concatenate([jnp.broadcast_to(first[:, None, None], (*inside.shape[:2], 1)), inside[..., :-1]], axis=-1)
    return jnp.where(_there(batch), before, 0.0)


def _there(batch: PairBatch) -> Bool[Array, "B K R"]:
    """Slots that hold a token of their answer."""
    return batch.by_answer(batch.role) == FIRST_ANSWER + jnp.arange(batch.answers, dtype=batch.role.dtype)[:, None]
