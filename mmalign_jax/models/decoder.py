"""The decoder of the Llama line: one text for packed rows, prefill and decode lanes, and for Llama, Mistral, Qwen and Gemma."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax.models import cudnn
from mmalign_jax.models.attention import Regions, attend, attend_lanes, rope_tables, rotate
from mmalign_jax.models.config import DecoderConfig
from mmalign_jax.models.image_attention import image_mass
from mmalign_jax.models.layers import Embed, Linear, RMSNorm, activation
from mmalign_jax.models.remat import remat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values of one layer, or of all: `[*L B G T E]`, tails `[*L B S G X E]`, of new tokens `[*L B S G E]`.

    Heads stand before slots, so that attention reads what lies side by side. Where the parameters' layers are apart
    (`apart.layers_apart`), those of all layers are tuples of L arrays.
    """

    key: Array | tuple[Array, ...]
    value: Array | tuple[Array, ...]

    @property
    def row_axis(self) -> int:
        """The axis of the rows, B, in the arrays of all layers."""
        return 0 if isinstance(self.key, tuple) else 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    shared: KeyValues
    tail: KeyValues


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Who sees whom, in full and in windowed layers; either is None where no layer needs it. `[B T T]`, or `[B S T]` of lanes.

    `regions` are those of packed rows; lanes have none. Where these and `there`, the slots that are no padding, say all of it, and `segment` in rows
    of several pairs, a kernel may compute the attention: `implementation`, see `models.implementation`.
    """

    full: Bool[Array, "B S T"] | None
    local: Bool[Array, "B S T"] | None
    regions: Regions | None = dataclasses.field(default=None, metadata={"static": True})
    there: Bool[Array, "B T"] | None = None
    segment: Int[Array, "B T"] | None = None
    implementation: str = dataclasses.field(default="blocks", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers:
    """What the layers share beside their input.

    Args:
      rope, local_rope: cos and sin of full and of windowed layers; `local_rope` is None where they are the same.
      index: slot of the tails that this step will fill, one for all rows or one a row; None for packed rows.
      deep: what is added to the hidden states behind each of the first J layers (DeepStack, arXiv 2406.04334).
      membership: of packed rows; which slots of the prefix are tokens of which image, where the answers' attention to them is asked for.
    """

    masks: Masks
    rope: tuple[Array, Array]
    local_rope: tuple[Array, Array] | None = None
    index: Int[Array, ""] | Int[Array, " B"] | None = None
    deep: Float[Array, "J B T D"] | None = None
    membership: Float[Array, "B P M"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _This:
    """What is a layer's own: its cache, its number, and whether it has the window. Known when it is traced where layers are apart."""

    cache: LayerCache | None
    number: Int[Array, ""] | np.int32
    local: Bool[Array, ""] | np.bool_


def local_layers(config: DecoderConfig) -> np.ndarray:
    """bool[L]: which layers see only the window."""
    if config.sliding_window is None:
        return np.zeros(config.layers, bool)
    return np.array(config.local_layers or (True,) * config.layers)


def _choose(local: Bool[Array, ""] | np.bool_, here: Array | None, elsewhere: Array | None) -> Array | None:
    """`here` in windowed layers. Where only one of the two is given, all layers are of one kind; none, where a kernel needs none."""
    if here is None or elsewhere is None:
        return elsewhere if here is None else here
    return jnp.where(local, here, elsewhere)


class _Attention(nn.Module):
    config: DecoderConfig
    fill_tail: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], this: _This, layers: Layers):
        c = self.config

        def project(name: str, heads: int, axis: str) -> Array:
            bias = (heads, c.head_width) if c.attention_bias else ()
            shape, kernel_axes, out_axes = (c.width, heads, c.head_width), ("embed", axis, None), ("batch", None, axis, None)
            return Linear("btd,dhe->bthe", shape, kernel_axes, out_axes, bias, (axis, None), c.lora, name=name)(x)

        query, key, value = project("query", c.heads, "heads"), project("key", c.kv_heads, "kv_heads"), project("value", c.kv_heads, "kv_heads")
        if c.qk_norm:
            query = RMSNorm(c.norm_eps, c.norm_offset, name="query_norm")(query)
            key = RMSNorm(c.norm_eps, c.norm_offset, name="key_norm")(key)
        local_rope = layers.local_rope or (None, None)
        cos, sin = (_choose(this.local, here, elsewhere) for here, elsewhere in zip(local_rope, layers.rope, strict=True))
        query, new = rotate(query, cos, sin), KeyValues(rotate(key, cos, sin), value)
        mask = _choose(this.local, layers.masks.local, layers.masks.full)
        if layers.index is not None:
            shared, tail = this.cache.shared, this.cache.tail
            slots, index = jnp.arange(tail.key.shape[3]), layers.index[..., None]
            filled = slots <= index if self.fill_tail else slots < index
            if c.sliding_window is not None:
                filled &= ~this.local | (index - slots < c.sliding_window)
            if self.fill_tail:
                new, own = jax.tree.map(lambda old, one: put(old, one, layers.index), tail, new), None
                tail = new
            else:
                own = (new.key, new.value)
            mixed = attend_lanes(c, query, (shared.key, shared.value), mask, (tail.key, tail.value), filled, own)
        else:
            mixed = _attend_rows(c, query, new, mask, layers.masks)
            if layers.membership is None:
                new = KeyValues(new.key.swapaxes(1, 2), new.value.swapaxes(1, 2))
            else:
                new = image_mass(c, query, new.key, mask, layers.masks.regions, layers.membership)
        bias = (c.width,) if c.out_bias else ()
        shape, kernel_axes = (c.heads, c.head_width, c.width), ("heads", None, "embed")
        return Linear("bthe,hed->btd", shape, kernel_axes, ("batch", None, None), bias, (None,), c.lora, name="out")(mixed), new


def _attend_rows(config: DecoderConfig, query: Float[Array, "B T H E"], own: KeyValues, mask: Array | None, masks: Masks) -> Array:
    if masks.implementation == "blocks":
        return attend(config, query, own.key, own.value, mask, masks.regions)
    if masks.implementation == "cudnn":
        return cudnn.attend(config, query, own.key, own.value, masks.there, masks.regions)
    from mmalign_jax.models import splash  # Pallas takes a while to import, and is wanted on TPUs only

    return splash.attend(config, query, own.key, own.value, masks.there, masks.regions, masks.segment)


def put(tails: Float[Array, "*L B S G X E"], new: Float[Array, "*L B S G E"], index: Int[Array, ""] | Int[Array, " B"]) -> Array:
    """Fills slot `index` of every tail, one for all rows or one a row."""
    if index.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(tails, new[..., None, :], index, axis=tails.ndim - 2)
    rows = tails.ndim - 5
    fill = lambda tail, one, at: jax.lax.dynamic_update_slice_in_dim(tail, one[..., None, :], at, axis=tail.ndim - 2)  # noqa: E731
    return jax.vmap(fill, in_axes=(rows, rows, 0), out_axes=rows)(tails, new, index)


class _Mlp(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        inner_bias, outer_bias = ((c.mlp_width,), (c.width,)) if c.mlp_bias else ((), ())
        up_args = ("btd,df->btf", (c.width, c.mlp_width), ("embed", "mlp"), ("batch", None, "mlp"), inner_bias, ("mlp",), c.lora)
        gate = activation(c.activation)(Linear(*up_args, name="gate")(x))
        x = gate * Linear(*up_args, name="up")(x)
        down_args = ("btf,fd->btd", (c.mlp_width, c.width), ("mlp", "embed"), ("batch", None, None), outer_bias, (None,), c.lora)
        return Linear(*down_args, name="down")(x)


class _Block(nn.Module):
    """Gives also keys and values where `keep_cache` asks for them: of decode lanes those of the new tokens, or with `fill_tail` the tails
    with these in their slots; or in their place the answers' attention to images where `Layers.membership` asks for it.
    """

    config: DecoderConfig
    keep_cache: bool
    fill_tail: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], this: _This, layers: Layers):
        c = self.config

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x)

        mixed, kept = _Attention(c, self.fill_tail, name="attention")(norm("input_norm", x), this, layers)
        x = x + (norm("attention_out_norm", mixed) if c.sandwich else mixed)
        inner = _Mlp(c, name="mlp")(norm("post_norm", x))
        x = x + (norm("mlp_out_norm", inner) if c.sandwich else inner)
        if layers.deep is not None:
            count = layers.deep.shape[0]
            x = x + jnp.where(this.number < count, layers.deep[jnp.minimum(this.number, count - 1)], 0).astype(x.dtype)
        return x, (kept if self.keep_cache or layers.membership is not None else None)


class Decoder(nn.Module):
    """Inputs to last hidden states (after the final norm). The vocabulary is touched elsewhere, at answer positions only.

    Args:
      apart: the parameters' layers are apart (`apart.layers_apart`), not stacked.
    """

    config: DecoderConfig
    remat: str = "none"
    keep_cache: bool = False
    apart: bool = False

    def setup(self):
        c = self.config
        block = remat(_Block, self.remat)
        self.embed = Embed(c.vocab_size, c.width)
        if self.apart:
            # a layer fills its own tail before it reads it, which needs no copy of it; a scan would move whole tails in and out
            self.layers = [block(c, self.keep_cache, fill_tail=True) for _ in range(c.layers)]
        else:
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers, in_axes=(0, nn.broadcast))
            self.layers = stack(c, self.keep_cache)
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset)
        if not c.tied_head:
            self.head = _Head(c)

    def __call__(
        self,
        inputs: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | Int[Array, "B 3 T"],
        masks: Masks,
        *,
        deep: Float[Array, "J B T D"] | None = None,
        cache: LayerCache | None = None,
        index: Int[Array, ""] | Int[Array, " B"] | None = None,
        membership: Float[Array, "B P M"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | Float[Array, "L B KR M"] | None]:
        """Last hidden states, and the keys and values where `keep_cache` asks for them: of decode lanes those of the new tokens, or the
        filled tails where layers are apart. With `membership`, what `image_attention.image_mass` says of every layer in their place.

        Args:
          positions: rotary positions.
          deep, membership: see `Layers`.
          cache, index: of decode lanes, whose T is S: their caches, and how many slots of the tails are filled.
        """
        c = self.config
        rope = rope_tables(c.rope, c.head_width, positions)
        local_rope = None if c.local_rope is None else rope_tables(c.local_rope, c.head_width, positions)
        shared = Layers(masks, rope, local_rope, index, deep, membership)
        if self.apart:
            x, kept = self._one_by_one(inputs, cache, shared)
        else:
            x, kept = self.layers(inputs, _This(cache, jnp.arange(c.layers), jnp.array(local_layers(c))), shared)
        if not c.tied_head:
            self.head()
        return self.final_norm(x), kept

    def _one_by_one(self, x: Float[Array, "B T D"], cache: LayerCache | None, shared: Layers) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        """What a scan over the layers gives."""
        kept, local = [], local_layers(self.config)
        for number, layer in enumerate(self.layers):
            own = jax.tree.map(lambda layers, number=number: layers[number], cache, is_leaf=lambda x: isinstance(x, tuple))
            x, new = layer(x, _This(own, np.int32(number), local[number]), shared)
            kept.append(new)
        return x, KeyValues(tuple(one.key for one in kept), tuple(one.value for one in kept)) if self.keep_cache else None

    def embed_tokens(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        # the factor is rounded to the compute type first, as in Gemma's own code
        scale = self.config.embedding_scale
        return self.embed(tokens, dtype) if scale == 1.0 else self.embed(tokens, dtype) * jnp.asarray(scale, dtype)


class _Head(nn.Module):
    """Declares the output kernel `[D, V]`; `losses.answer_logps` and the sampler multiply by it."""

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        return self.param("kernel", nn.initializers.normal(0.02), (self.config.width, self.config.vocab_size))
