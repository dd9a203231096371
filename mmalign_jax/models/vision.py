"""The vision transformer of every family, up to the last layer whose hidden state is used: CLIP, SigLIP, InternViT, Qwen's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import mesh
from mmalign_jax.models.block_attention import QueryBlock, Scores, attend_blocks
from mmalign_jax.models.config import MllmConfig, VisionConfig
from mmalign_jax.models.layers import LayerNorm, Linear, RMSNorm, activation, gathered
from mmalign_jax.models.patches import PatchEmbedding, rotary_tables, segment_mask, window_mask
from mmalign_jax.models.remat import remat
from mmalign_jax.types import Patches

# B M N: rows are split over the mesh. M counts tiles, or attention windows of pictures of any size; tokens are seen within one.
_ROWS = ("batch", None, None)
_QUERIES, _BLOCKS = 192, 8  # of a block, about; of a picture, at most


def norm(config: VisionConfig, name: str) -> nn.Module:
    return RMSNorm(config.norm_eps, name=name) if config.norm == "rms" else LayerNorm(config.norm_eps, name=name)


def attend(
    query: Float[Array, "B M Q H E"], key: Float[Array, "B M N H E"], value: Float[Array, "B M N H E"], mask: Bool[Array, "_B _M #Q N"] | None
) -> Float[Array, "B M Q H E"]:
    """Exact attention within tiles or windows, a block of queries at a time; softmax in float32.

    Args:
      mask: `[B M ...]`, or `[1 1 ...]` for all rows and tiles.
    """
    rows, tiles, slots, heads, width = query.shape

    def folded(x: Array) -> Array:
        return mesh.reshape(x.swapaxes(2, 3), (rows * tiles, heads, x.shape[2], width), "batch", "heads", None, None)

    if mask is not None:
        mask = mesh.reshape(mask, (mask.shape[0] * mask.shape[1], *mask.shape[2:]), "batch" if mask.shape[0] > 1 else None, None, None)
    size, keys = -(-slots // min(max(slots // _QUERIES, 1), _BLOCKS)), ((0, key.shape[2]),)
    blocks = tuple(QueryBlock(start, min(start + size, slots), keys) for start in range(0, slots, size))
    mixed = attend_blocks(blocks, Scores(width**-0.5), folded(query)[:, :, None], folded(key), folded(value), mask)
    return mesh.reshape(mixed, (rows, tiles, heads, slots, width), *_ROWS[:2], "heads", None, None).swapaxes(2, 3)


class Attention(nn.Module):
    """Attention within each of a row's M tiles or windows."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B M N Z"], full: Bool[Array, ""], patches: Patches | None) -> Float[Array, "B M N Z"]:
        c = self.config
        heads, head = c.heads, c.width // c.heads
        out_axes = (*_ROWS, "heads", None)

        def project(name: str) -> Array:
            bias, shape = (heads, head) if c.attention_bias else (), (c.width, heads, head)
            return Linear("bmnw,whe->bmnhe", shape, ("embed", "heads", None), out_axes, bias, ("heads", None), c.lora, name=name)(x)

        if c.fused_qkv:
            bias = (3, heads, head) if c.attention_bias else ()
            shape, axes = (c.width, 3, heads, head), ("embed", None, "heads", None)
            qkv = Linear("bmnw,wshe->bmnshe", shape, axes, (*_ROWS, None, "heads", None), bias, axes[1:], c.lora, name="qkv")(x)
            query, key, value = (qkv[..., index, :, :] for index in range(3))
        else:
            query, key, value = project("query"), project("key"), project("value")
        if c.qk_norm:
            query, key = RMSNorm(c.qk_norm_eps, axes=2, name="query_norm")(query), RMSNorm(c.qk_norm_eps, axes=2, name="key_norm")(key)
        if patches is None:
            slots = query.shape[2]
            mixed = attend(query, key, value, jnp.tri(slots, dtype=bool)[None, None] if c.causal else None)
        else:
            mixed = self._of_pictures(query, key, value, full, patches)
        out_args = ((heads, head, c.width), ("heads", None, "embed"), (*_ROWS, None), (c.width,), (None,), c.lora)
        return Linear("bmnhe,hew->bmnw", *out_args, name="out")(mixed)

    def _of_pictures(self, query: Array, key: Array, value: Array, full: Bool[Array, ""], patches: Patches) -> Array:
        """Attention within windows, or within whole pictures: all of a row's slots at once, each seeing its own segment."""
        c, windows = self.config, query.shape
        if c.rotary:
            cos, sin = rotary_tables(patches, windows[-1])
            cos, sin = (mesh.reshape(table, (*windows[:3], 1, windows[-1]), *_ROWS, None, None) for table in (cos, sin))
            half = windows[-1] // 2
            turn = lambda x: jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)  # noqa: E731
            rotated = lambda x: (x * cos + turn(x) * sin).astype(x.dtype)  # noqa: E731
            query, key = rotated(query), rotated(key)

        def whole(query: Array, key: Array, value: Array) -> Array:
            shape = (windows[0], 1, windows[1] * windows[2], *windows[3:])
            axes = (*_ROWS, "heads", None)
            mixed = attend(*(mesh.reshape(x, shape, *axes) for x in (query, key, value)), segment_mask(patches)[:, None])
            return mesh.reshape(mixed, windows, *axes)

        if not c.window:
            return whole(query, key, value)
        within = lambda query, key, value: attend(query, key, value, window_mask(patches, windows[2]))  # noqa: E731
        return jax.lax.cond(full, whole, within, query, key, value)


class Mlp(nn.Module):
    """Two linears with an activation between them, and a gate where the config has one."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B M N Z"]) -> Float[Array, "B M N Z"]:
        c, width, inner = self.config, self.config.width, self.config.mlp_width
        inner_bias, outer_bias = ((inner,), (width,)) if c.mlp_bias else ((), ())
        up_args = ("bmnw,wf->bmnf", (width, inner), ("embed", "mlp"), (*_ROWS, "mlp"), inner_bias, ("mlp",), c.lora)
        up = Linear(*up_args, name="up")(x)
        act = activation(c.activation)
        up = act(Linear(*up_args, name="gate")(x)) * up if c.gated else act(up)
        down_args = ("bmnf,fw->bmnw", (inner, width), ("mlp", "embed"), (*_ROWS, None), outer_bias, (None,), c.lora)
        return Linear(*down_args, name="down")(up)


class Block(nn.Module):
    """Carries the hidden state, and the few hidden states that are kept (`kept [k B M N Z]`, None for none): not those of all layers.

    `place` is where this layer's goes, -1 for nowhere.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, carry: tuple[Array, Array | None], full: Bool[Array, ""], place: Int[Array, ""], patches: Patches | None):
        c, (x, kept) = self.config, carry

        def scaled(name: str, added: Array) -> Array:
            return added * self.param(name, nn.initializers.ones, (c.width,)).astype(added.dtype) if c.layer_scale else added

        x = x + scaled("scale1", Attention(c, name="attention")(norm(c, "norm1")(x), full, patches))
        x = x + scaled("scale2", Mlp(c, name="mlp")(norm(c, "norm2")(x)))
        if kept is not None:
            kept = jnp.where((jnp.arange(kept.shape[0]) == place)[:, None, None, None, None], x, kept)
        return (x, kept), None


class VisionTower(nn.Module):
    """Normalised pixels to features, as far as the last hidden state that is used."""

    config: MllmConfig
    remat: str

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "B M Y W 3"] | Float[Array, "B Q P 3"], patches: Patches | None = None
    ) -> Float[Array, "B F Z"]:
        """Features of tiles (F = M N) or of patches (F = Q), in order; Z = tower width times the hidden states that are concatenated.

        Args:
          pixels: tiles, or with `patches` what `take_patches` gives.
        """
        c, v = self.config, self.config.vision
        if patches is None:
            x = TileEmbedding(v, name="embedding")(pixels)
        else:
            x = PatchEmbedding(v, name="embedding")(pixels, patches)
            x = mesh.reshape(x, (x.shape[0], -1, v.window_slots if v.window else x.shape[1], v.width), *_ROWS, None)
        used, wanted = c.used_vision_layers, self._wanted()
        block = remat(Block, self.remat)
        keep = sorted({layer for layer in wanted if layer not in (0, used)})
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=used, in_axes=(0, 0, nn.broadcast))
        first, full = x, jnp.array([layer in v.full_layers for layer in range(used)])
        place = jnp.array([keep.index(layer) if layer in keep else -1 for layer in range(1, used + 1)])
        kept = mesh.constrain(jnp.zeros((len(keep), *x.shape), x.dtype), None, *_ROWS, None) if keep else None
        (x, kept), _ = stack(v, name="layers")((x, kept), full, place, patches)
        if v.post_norm:
            x = norm(v, "post_norm")(x)
        chosen = [first if layer == 0 else x if layer == used else kept[keep.index(layer)] for layer in wanted]
        features = jnp.concatenate(chosen, axis=-1)
        if v.class_token and not c.keep_class_token:
            features = features[:, :, 1:]
        rows, _, _, width = features.shape
        return mesh.reshape(features, (rows, -1, width), "batch", None, None)

    def _wanted(self) -> list[int]:
        """Numbers of the hidden states that are concatenated; 0 is the embedding."""
        v = self.config.vision
        return [layer if layer >= 0 else v.layers + 1 + layer for layer in self.config.feature_layers] + [tap + 1 for tap in v.taps]


class TileEmbedding(nn.Module):
    """Pixels of tiles to tokens: patches, behind a class token where there is one, with their positions."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "B M Y W 3"]) -> Float[Array, "B M N Z"]:
        v = self.config
        rows, images = pixels.shape[:2]
        side, patch, width = v.image_size // v.patch_size, v.patch_size, v.width
        # a convolution with stride = kernel is a product with cut-out patches, and needs no help from the sharding
        patches = pixels[:, :, : side * patch, : side * patch]
        patches = mesh.reshape(patches, (rows, images, side, patch, side, patch, 3), "batch", *(None,) * 6)
        patches = patches.transpose(0, 1, 2, 4, 3, 5, 6)
        patches = mesh.reshape(patches, (rows, images, side * side, patch * patch * 3), *_ROWS, None)
        bias = (width,) if v.patch_bias else ()
        embed = Linear("bmnp,pw->bmnw", (patch * patch * 3, width), (None, "embed"), (*_ROWS, None), bias, (None,), name="patch")
        x = embed(patches)
        if v.class_token:
            class_token = self.param("class_token", nn.initializers.normal(0.02), (width,))
            class_token = mesh.constrain(jnp.broadcast_to(class_token.astype(pixels.dtype), (rows, images, 1, width)), *_ROWS, None)
            x = jnp.concatenate([class_token, x], axis=2)
        if v.positions == "learned":
            table = self.param("positions", nn.initializers.normal(0.02), (v.patches + int(v.class_token), width))
            x = x + gathered(table, pixels.dtype, None, None)
        return norm(v, "pre_norm")(x) if v.pre_norm else x
