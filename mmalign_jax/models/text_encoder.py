"""Sentence encoders of the MiniLM and MPNet kind: text to one vector of length 1 (Sentence-BERT, arXiv 1908.10084).

BERT's post-norm encoder (arXiv 1810.04805), with token types, or MPNet's (arXiv 2004.09297), whose positions are also a bias of attention
that all layers share. The vector is the mean of the last hidden states, normalised.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax.models.layers import Embed, LayerNorm, Linear, activation

_NEVER = -1e30
_FARTHEST = 128  # the distance from which on all share a bucket


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a text encoder.

    Args:
      positions: rows of the table of positions, `first_position` of which are not used.
      token_types: rows of the table of token types, 0 for none.
      position_buckets: of the attention bias, 0 for none.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    positions: int
    norm_eps: float
    activation: str = "gelu"
    first_position: int = 0
    token_types: int = 0
    position_buckets: int = 0

    @property
    def max_tokens(self) -> int:
        return self.positions - self.first_position


class _Block(nn.Module):
    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 1 T"], bias: Float[Array, "H T T"]):
        c = self.config
        head = c.width // c.heads

        def linear(name: str, equation: str, shape: tuple[int, ...], out: tuple[int, ...], x: Array) -> Array:
            axes = (None,) * len(shape)
            return Linear(equation, shape, axes, (None,) * (2 + len(out)), out, (None,) * len(out), name=name)(x)

        query, key, value = (
            linear(name, "btd,dhe->bthe", (c.width, c.heads, head), (c.heads, head), x) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhe,bkhe->bhqk", query, key) * head**-0.5 + bias
        weights = jax.nn.softmax(jnp.where(mask, scores, _NEVER), axis=-1)
        mixed = jnp.einsum("bhqk,bkhe->bqhe", weights, value)
        x = LayerNorm(c.norm_eps, name="attention_norm")(x + linear("out", "bthe,hed->btd", (c.heads, head, c.width), (c.width,), mixed))
        inner = activation(c.activation)(linear("up", "btd,df->btf", (c.width, c.mlp_width), (c.mlp_width,), x))
        return LayerNorm(c.norm_eps, name="mlp_norm")(x + linear("down", "btf,fd->btd", (c.mlp_width, c.width), (c.width,), inner)), None


class TextEncoder(nn.Module):
    """Token ids to last hidden states, in float32."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"], inside: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        c, count = self.config, ids.shape[1]
        embed = lambda name, rows, ids: Embed(rows, c.width, name=name)(ids, jnp.dtype("float32"))  # noqa: E731
        x = embed("words", c.vocab_size, ids) + embed("positions", c.positions, c.first_position + jnp.arange(count)[None])
        if c.token_types:
            x = x + embed("token_types", c.token_types, jnp.zeros_like(ids))
        x = LayerNorm(c.norm_eps, name="norm")(x)
        bias = jnp.zeros((c.heads, count, count))
        if c.position_buckets:
            table = self.param("position_bias", nn.initializers.zeros, (c.position_buckets, c.heads))
            bias = table[_buckets(count, c.position_buckets)].transpose(2, 0, 1)
        stack = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers, in_axes=nn.broadcast)
        return stack(c, name="layers")(x, inside[:, None, None], bias)[0]


def sentence_vectors(config: TextEncoderConfig, params: dict, ids: Int[Array, "B T"], inside: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Vectors of length 1, whose products are cosines. `inside` is false on padding."""
    hidden = TextEncoder(config).apply({"params": params}, ids, inside)
    weight = inside[..., None].astype(hidden.dtype)
    mean = jnp.sum(hidden * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _buckets(count: int, buckets: int) -> Int[np.ndarray, "T T"]:
    """Bucket of each pair of positions (T5's, arXiv 1910.10683, both directions): near distances one each, far ones by their logarithm."""
    behind = np.arange(count)[:, None] - np.arange(count)[None]
    half = buckets // 2
    exact, distance = half // 2, np.abs(behind)
    with np.errstate(divide="ignore"):
        far = exact + (np.log(distance.astype(np.float32) / exact) / math.log(_FARTHEST / exact) * (half - exact)).clip(0).astype(np.int64)
    return half * (behind < 0) + np.where(distance < exact, distance, np.minimum(far, half - 1))
