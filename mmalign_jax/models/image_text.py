"""Image-text encoders: pictures and texts to vectors of one space, of length 1. CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343).

Both towers are made of the blocks of `models.vision`. CLIP takes a picture's class token and a text's end token; SigLIP takes what a learned
query finds among a picture's patches (attention pooling, arXiv 2106.04560), and a text's last slot, padding or not.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from mmalign_jax import mesh
from mmalign_jax.models.config import VisionConfig
from mmalign_jax.models.layers import Embed, LayerNorm, Linear
from mmalign_jax.models.vision import Block, Mlp, TileEmbedding, attend, norm


@dataclasses.dataclass(frozen=True)
class ImageTextConfig:
    """Sizes of an image-text encoder.

    Args:
      vision: the tower of pictures, to its last layer and norm. With a class token, that is taken and projected to `width`; without one
        the tower is pooled by attention and has the width of the vectors already.
      text: the blocks of the tower of texts; `causal` in CLIP.
      vocab_size, positions: rows of the text tower's tables.
      width: of the vectors.
      text_bias: the projection of texts has a bias.
      pixel_mean, pixel_std: normalisation of pixels in [0, 1].
    """

    vision: VisionConfig
    text: VisionConfig
    vocab_size: int
    positions: int
    width: int
    text_bias: bool
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]


def _blocks(config: VisionConfig, x: Float[Array, "B M N Z"]) -> Float[Array, "B M N Z"]:
    """All blocks of a tower, one after the other, as `layers` of the module that calls this."""
    count = config.layers
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=count, in_axes=(0, 0, nn.broadcast))
    return stack(config, name="layers")((x, None), jnp.zeros(count, bool), jnp.zeros(count, jnp.int32), None)[0][0]


class AttentionPool(nn.Module):
    """What one learned query finds among the tokens, and an MLP behind it."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B M N Z"]) -> Float[Array, "B M Z"]:
        c = self.config
        heads, head, none = c.heads, c.width // c.heads, (None,) * 4
        probe = self.param("probe", nn.initializers.normal(0.02), (c.width,)).astype(x.dtype)
        probe = mesh.constrain(jnp.broadcast_to(probe, (*x.shape[:2], 1, c.width)), "batch", None, None, None)
        # one product for the three, as checkpoints have them; a query of each token but the probe's is not used
        shape, out_axes = (3, heads, head), ("batch", *none, None)
        qkv = Linear("bmnw,wshe->bmnshe", (c.width, *shape), none, out_axes, shape, none[:3], name="qkv")(jnp.concatenate([probe, x], axis=2))
        mixed = attend(qkv[:, :, :1, 0], qkv[:, :, 1:, 1], qkv[:, :, 1:, 2], None)
        pooled = Linear("bmnhe,hew->bmnw", (heads, head, c.width), none[:3], ("batch", *none[:3]), (c.width,), (None,), name="out")(mixed)
        return (pooled + Mlp(c, name="mlp")(norm(c, "norm")(pooled)))[:, :, 0]


class PictureTower(nn.Module):
    """Normalised pixels to one vector a picture, not yet of length 1."""

    config: ImageTextConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "B M Y W 3"]) -> Float[Array, "B M D"]:
        c, v = self.config, self.config.vision
        x = norm(v, "post_norm")(_blocks(v, TileEmbedding(v, name="embedding")(pixels)))
        if not v.class_token:
            return AttentionPool(v, name="pool")(x)
        return Linear("bmw,wd->bmd", (v.width, c.width), (None, None), ("batch", None, None), name="projection")(x[:, :, 0])


class TextTower(nn.Module):
    """Token ids to one vector a text, not yet of length 1: that of slot `last`."""

    config: ImageTextConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"], last: Int[Array, " B"]) -> Float[Array, "B D"]:
        c, t = self.config, self.config.text
        x = Embed(c.vocab_size, t.width, name="words")(ids, jnp.dtype("float32"))
        x = x + Embed(c.positions, t.width, name="positions")(jnp.arange(ids.shape[1])[None], x.dtype)
        x = _blocks(t, x[:, None])[:, 0]
        # the norm is one of each token, and only one token of a text goes on
        x = jnp.sum(jnp.where((jnp.arange(ids.shape[1]) == last[:, None])[..., None], x, 0.0), axis=1)
        x = LayerNorm(t.norm_eps, name="post_norm")(x)
        bias = ((c.width,), (None,)) if c.text_bias else ()
        return Linear("bw,wd->bd", (t.width, c.width), (None, None), ("batch", None), *bias, name="projection")(x)


def picture_vectors(config: ImageTextConfig, params: dict, pictures: UInt8[Array, "B Y W 3"]) -> Float[Array, "B D"]:
    """Vectors of length 1, in float32, whose products with those of texts are cosines."""
    pixels = (pictures.astype(jnp.float32) / 255.0 - jnp.array(config.pixel_mean)) / jnp.array(config.pixel_std)
    return _unit(PictureTower(config).apply({"params": params["vision_tower"]}, pixels[:, None])[:, 0])


def text_vectors(config: ImageTextConfig, params: dict, ids: Int[Array, "B T"], last: Int[Array, " B"]) -> Float[Array, "B D"]:
    """Vectors of length 1, in float32.

    Args:
      last: the slot whose state is taken. What stands behind it is seen by towers that are not causal, and by no other.
    """
    return _unit(TextTower(config).apply({"params": params["text_tower"]}, ids, last))


def _unit(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
