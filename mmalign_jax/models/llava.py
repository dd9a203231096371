"""A LLaVA model as pure functions of its parameters: the boundary that the rest of the package sees (DESIGN section 4).

Policy and reference are one `Llava` and two parameter trees `{"vision_tower": ..., "projector": ..., "decoder": ...}`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from mmalign_jax import mesh
from mmalign_jax.models.attention import packed_mask
from mmalign_jax.models.config import LlavaConfig
from mmalign_jax.models.decoder import Decoder, KeyValues, Lanes, LayerCache
from mmalign_jax.models.vision import Projector, VisionTower


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """Last hidden states of a row and its keys and values, the shared cache of its decode lanes."""

    hidden: Float[Array, "B T D"]
    cache: KeyValues  # [L B T G E]


@dataclasses.dataclass(frozen=True)
class Llava:
    """One definition for policy and reference.

    Args:
      config: sizes.
      pixel_mean, pixel_std: the processor's normalisation of pixels in [0, 1], applied on the device.
      dtype: compute type, "float32" or "bfloat16".
      remat: recompute every layer in the backward pass.
    """

    config: LlavaConfig
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    dtype: str = "float32"
    remat: bool = False

    def tower(self, params: dict, images: UInt8[Array, "B M Y W 3"] | Float[Array, "B M Y W 3"]) -> Float[Array, "B F Z"]:
        """Tower features of each row's images, before the projector. Images are pixels in 0..255."""
        with jax.named_scope("vision_tower"):
            pixels = (images.astype(jnp.float32) / 255.0 - jnp.array(self.pixel_mean)) / jnp.array(self.pixel_std)
            return VisionTower(self.config, self.remat).apply({"params": params["vision_tower"]}, pixels.astype(self.dtype))

    def project(self, params: dict, features: Float[Array, "B F Z"]) -> Float[Array, "B F D"]:
        with jax.named_scope("projector"):
            return Projector(self.config).apply({"params": params["projector"]}, features)

    def encode_images(self, params: dict, images: UInt8[Array, "B M Y W 3"] | Float[Array, "B M Y W 3"]) -> Float[Array, "B F D"]:
        return self.project(params, self.tower(params, images))

    def hidden(
        self,
        params: dict,
        features: Float[Array, "B F D"],
        tokens: Int[Array, "B T"],
        role: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        image_index: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Last hidden states of packed rows (`types.PairBatch`); image features land where `image_index` says."""
        mask = packed_mask(role, positions, self.config.decoder.sliding_window)
        inputs = self._inputs(params, features, tokens, image_index)
        with jax.named_scope("decoder"):
            return Decoder(self.config.decoder, self.remat).apply({"params": params["decoder"]}, inputs, positions, mask)[0]

    def prefill(
        self,
        params: dict,
        features: Float[Array, "B F D"],
        tokens: Int[Array, "B T"],
        role: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        image_index: Int[Array, "B T"],
        image_keep: Bool[Array, "B F"] | None = None,
    ) -> Prefill:
        """`hidden` that also returns the cache. Image features that `image_keep` leaves out are hidden from every query of every layer."""
        visible = None
        if image_keep is not None:
            kept = jnp.take_along_axis(image_keep, jnp.maximum(image_index, 0), axis=1)
            visible = (image_index < 0) | kept
        mask = packed_mask(role, positions, self.config.decoder.sliding_window, visible)
        inputs = self._inputs(params, features, tokens, image_index)
        with jax.named_scope("prefill"):
            decoder = Decoder(self.config.decoder, keep_cache=True)
            return Prefill(*decoder.apply({"params": params["decoder"]}, inputs, positions, mask))

    def empty_tail(self, rows: int, lanes: int, slots: int) -> KeyValues:
        """Tails `[L B S X G E]` for `slots` new tokens a lane."""
        c = self.config.decoder
        shape = (c.layers, rows, lanes, slots, c.kv_heads, c.head_width)
        zeros = mesh.constrain(jnp.zeros(shape, self.dtype), None, "batch", None, None, "kv_heads", None)
        return KeyValues(zeros, zeros)

    def decode_step(
        self,
        params: dict,
        shared: KeyValues,
        tail: KeyValues,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        shared_mask: Bool[Array, "B S T"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B S D"], KeyValues]:
        """One new token in every lane: returns its last hidden state and the tails with slot `index` filled."""
        inputs = self._embed(params, tokens)
        with jax.named_scope("decode_step"):
            decoder = Decoder(self.config.decoder, keep_cache=True)
            caches = LayerCache(shared, tail)
            return decoder.apply({"params": params["decoder"]}, inputs, positions, Lanes(shared_mask, index), caches)

    def head(self, params: dict) -> Float[Array, "D V"]:
        """The output kernel: the decoder's own, or the transposed embedding when they are tied."""
        decoder = params["decoder"]
        return decoder["embed"]["embedding"].T if self.config.decoder.tied_head else decoder["head"]["kernel"]

    def logits(self, params: dict, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 logits. For decoding, where only a few positions are asked for."""
        kernel = mesh.constrain(self.head(params).astype(self.dtype), None, None)
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)

    def _embed(self, params: dict, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        decoder = Decoder(self.config.decoder)
        return decoder.apply({"params": params["decoder"]}, tokens, jnp.dtype(self.dtype), method=Decoder.embed_tokens)

    def _inputs(
        self, params: dict, features: Float[Array, "B F D"], tokens: Int[Array, "B T"], image_index: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        placed = jnp.take_along_axis(features, jnp.maximum(image_index, 0)[..., None], axis=1)
        return jnp.where((image_index >= 0)[..., None], placed.astype(self.dtype), self._embed(params, tokens))
