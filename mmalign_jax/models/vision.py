"""The CLIP vision tower (arXiv 2103.00020), up to the last layer whose hidden state is used."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax import mesh
from mmalign_jax.models.config import LlavaConfig, VisionConfig
from mmalign_jax.models.layers import LayerNorm, Linear, activation, gathered

_ROWS = ("batch", None, None)  # B M N: rows are split over the mesh, images and tokens are not


class _Attention(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B M N Z"]) -> Float[Array, "B M N Z"]:
        width, heads = self.config.width, self.config.heads
        head = width // heads

        def project(name: str) -> Array:
            shape, kernel_axes, out_axes = (width, heads, head), ("embed", "heads", None), (*_ROWS, "heads", None)
            return Linear("bmnw,whe->bmnhe", shape, kernel_axes, out_axes, (heads, head), ("heads", None), name=name)(x)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bmqhe,bmkhe->bmhqk", query, key, preferred_element_type=jnp.float32) * head**-0.5
        mixed = jnp.einsum("bmhqk,bmkhe->bmqhe", jax.nn.softmax(scores, axis=-1).astype(x.dtype), value)
        out = Linear("bmnhe,hew->bmnw", (heads, head, width), ("heads", None, "embed"), (*_ROWS, None), (width,), (None,), name="out")
        return out(mixed)


class _Mlp(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B M N Z"]) -> Float[Array, "B M N Z"]:
        width, inner = self.config.width, self.config.mlp_width
        up = Linear("bmnw,wf->bmnf", (width, inner), ("embed", "mlp"), (*_ROWS, "mlp"), (inner,), ("mlp",), name="up")(x)
        down = Linear("bmnf,fw->bmnw", (inner, width), ("mlp", "embed"), (*_ROWS, None), (width,), (None,), name="down")
        return down(activation(self.config.activation)(up))


class _Block(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B M N Z"], _: None) -> tuple[Float[Array, "B M N Z"], Float[Array, "B M N Z"]]:
        eps = self.config.norm_eps
        x = x + _Attention(self.config, name="attention")(LayerNorm(eps, name="norm1")(x))
        x = x + _Mlp(self.config, name="mlp")(LayerNorm(eps, name="norm2")(x))
        return x, x


class VisionTower(nn.Module):
    """CLIP's vision transformer without its last norm, as far as the last hidden state that is used."""

    config: LlavaConfig
    remat: bool

    @nn.compact
    def __call__(self, pixels: Float[Array, "B M Y W 3"]) -> Float[Array, "B F Z"]:
        """Normalised pixels to patch features, Z = tower width times number of feature layers, F = M N."""
        vision = self.config.vision
        x = self._embed(pixels)
        block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.config.used_vision_layers)
        first = x
        x, states = stack(vision, name="layers")(x, None)
        wanted = [layer if layer >= 0 else vision.layers + 1 + layer for layer in self.config.feature_layers]
        chosen = [first if layer == 0 else x if layer == self.config.used_vision_layers else states[layer - 1] for layer in wanted]
        features = jnp.concatenate(chosen, axis=-1)
        if not self.config.keep_class_token:
            features = features[:, :, 1:]
        rows, images, tokens, width = features.shape
        return mesh.reshape(features, (rows, images * tokens, width), "batch", None, None)

    def _embed(self, pixels: Float[Array, "B M Y W 3"]) -> Float[Array, "B M N Z"]:
        vision = self.config.vision
        rows, images = pixels.shape[:2]
        side, patch, width = vision.image_size // vision.patch_size, vision.patch_size, vision.width
        # a convolution with stride = kernel is a product with cut-out patches, and needs no help from the sharding
        patches = pixels[:, :, : side * patch, : side * patch]
        patches = mesh.reshape(patches, (rows, images, side, patch, side, patch, 3), "batch", *(None,) * 6)
        patches = patches.transpose(0, 1, 2, 4, 3, 5, 6)
        patches = mesh.reshape(patches, (rows, images, side * side, patch * patch * 3), *_ROWS, None)
        embed = Linear("bmnp,pw->bmnw", (patch * patch * 3, width), (None, "embed"), (*_ROWS, None), name="patch_embedding")
        class_token = self.param("class_embedding", nn.initializers.normal(0.02), (width,))
        class_token = mesh.constrain(jnp.broadcast_to(class_token.astype(pixels.dtype), (rows, images, 1, width)), *_ROWS, None)
        x = jnp.concatenate([class_token, embed(patches)], axis=2)
        table = self.param("position_embedding", nn.initializers.normal(0.02), (vision.patches + 1, width))
        return LayerNorm(vision.norm_eps, name="pre_norm")(x + gathered(table, pixels.dtype, None, None))


class Projector(nn.Module):
    """LLaVA-1.5's two-layer MLP from tower features to decoder inputs (arXiv 2310.03744)."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F Z"]) -> Float[Array, "B F D"]:
        width = self.config.decoder.width
        bias = (width,) if self.config.projector_bias else ()
        rows = ("batch", None)
        x = Linear("bfz,zd->bfd", (x.shape[-1], width), ("embed", "mlp"), (*rows, "mlp"), bias, ("mlp",), name="fc1")(x)
        x = activation(self.config.projector_activation)(x)
        return Linear("bfd,de->bfe", (width, width), ("mlp", "embed"), (*rows, None), bias, (None,), name="fc2")(x)
