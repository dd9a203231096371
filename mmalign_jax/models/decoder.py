"""The Llama/Mistral decoder: one text for packed rows, prefill and decode lanes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax.models.attention import attend, attend_lanes, rope_tables, rotate
from mmalign_jax.models.config import DecoderConfig
from mmalign_jax.models.layers import Embed, Linear, RMSNorm, activation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values of one layer, or of all with a leading L: `[*L B T G E]`, tails `[*L B S X G E]`."""

    key: Array
    value: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lanes:
    """What one decode step needs beside the layer's caches: who sees which shared slot, and how long the tails are."""

    shared_mask: Bool[Array, "B S T"]
    index: Int[Array, ""]  # slot of the tails that this step fills


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    shared: KeyValues
    tail: KeyValues


class _Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], cache: LayerCache | None, cos: Array, sin: Array, how: Array | Lanes):
        c = self.config

        def project(name: str, heads: int, axis: str) -> Array:
            bias = (heads, c.head_width) if c.attention_bias else ()
            shape, kernel_axes, out_axes = (c.width, heads, c.head_width), ("embed", axis, None), ("batch", None, axis, None)
            return Linear("btd,dhe->bthe", shape, kernel_axes, out_axes, bias, (axis, None), name=name)(x)

        query = rotate(project("query", c.heads, "heads"), cos, sin)
        new = KeyValues(rotate(project("key", c.kv_heads, "kv_heads"), cos, sin), project("value", c.kv_heads, "kv_heads"))
        if isinstance(how, Lanes):
            new = KeyValues(_put(cache.tail.key, new.key, how.index), _put(cache.tail.value, new.value, how.index))
            slots = jnp.arange(new.key.shape[2])
            tail_mask = slots <= how.index
            if c.sliding_window is not None:
                tail_mask &= how.index - slots < c.sliding_window
            mixed = attend_lanes(query, cache.shared.key, cache.shared.value, how.shared_mask, new.key, new.value, tail_mask)
        else:
            mixed = attend(query, new.key, new.value, how)
        bias = (c.width,) if c.attention_bias else ()
        shape, kernel_axes = (c.heads, c.head_width, c.width), ("heads", None, "embed")
        return Linear("bthe,hed->btd", shape, kernel_axes, ("batch", None, None), bias, (None,), name="out")(mixed), new


def _put(tail: Float[Array, "B S X G E"], new: Float[Array, "B S G E"], index: Int[Array, ""]) -> Float[Array, "B S X G E"]:
    """Fills slot `index` of every tail. A select, because a scatter into sharded rows would need its sharding spelt out."""
    here = (jnp.arange(tail.shape[2]) == index)[None, None, :, None, None]
    return jnp.where(here, new[:, :, None], tail)


class _Mlp(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        inner_bias, outer_bias = ((c.mlp_width,), (c.width,)) if c.mlp_bias else ((), ())
        up_args = ("btd,df->btf", (c.width, c.mlp_width), ("embed", "mlp"), ("batch", None, "mlp"), inner_bias, ("mlp",))
        gate = activation(c.activation)(Linear(*up_args, name="gate")(x))
        x = gate * Linear(*up_args, name="up")(x)
        return Linear("btf,fd->btd", (c.mlp_width, c.width), ("mlp", "embed"), ("batch", None, None), outer_bias, (None,), name="down")(x)


class _Block(nn.Module):
    config: DecoderConfig
    keep_cache: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], cache: LayerCache | None, cos: Array, sin: Array, how: Array | Lanes):
        eps = self.config.norm_eps
        mixed, keys_values = _Attention(self.config, name="attention")(RMSNorm(eps, name="input_norm")(x), cache, cos, sin, how)
        x = x + mixed
        x = x + _Mlp(self.config, name="mlp")(RMSNorm(eps, name="post_norm")(x))
        return x, (keys_values if self.keep_cache else None)


class Decoder(nn.Module):
    """Inputs to last hidden states (after the final norm). The vocabulary is touched elsewhere, at answer positions only."""

    config: DecoderConfig
    remat: bool = False
    keep_cache: bool = False

    def setup(self):
        block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.layers,
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        )
        self.embed = Embed(self.config.vocab_size, self.config.width)
        self.layers = stack(self.config, self.keep_cache)
        self.final_norm = RMSNorm(self.config.norm_eps)
        if not self.config.tied_head:
            self.head = _Head(self.config)

    def __call__(
        self,
        inputs: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        how: Bool[Array, "B T T"] | Lanes,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        cos, sin = rope_tables(self.config.rope, self.config.head_width, positions)
        x, keys_values = self.layers(inputs, cache, cos, sin, how)
        if not self.config.tied_head:
            self.head()
        return self.final_norm(x), keys_values

    def embed_tokens(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        return self.embed(tokens, dtype)


class _Head(nn.Module):
    """Declares the output kernel `[D, V]`; `losses.answer_logps` and the sampler multiply by it."""

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        return self.param("kernel", nn.initializers.normal(0.02), (self.config.width, self.config.vocab_size))
