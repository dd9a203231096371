"""A multimodal LLM as pure functions of its parameters: the boundary that the rest of the package sees (DESIGN section 4).

Policy and reference are one `Mllm` and two parameter trees `{"vision_tower": ..., "projector": ..., "decoder": ...}`; a model that scores
answers has a fourth part, `score_head`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from mmalign_jax import mesh
from mmalign_jax.models.apart import are_apart
from mmalign_jax.models.attention import Regions, packed_mask
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.connector import Connector
from mmalign_jax.models.decoder import Decoder, KeyValues, LayerCache, Masks, local_layers, put
from mmalign_jax.models.implementation import Attention
from mmalign_jax.models.layers import softcap
from mmalign_jax.models.patches import take_patches
from mmalign_jax.models.score_head import scores
from mmalign_jax.models.shared_pictures import at_tokens
from mmalign_jax.models.vision import VisionTower
from mmalign_jax.types import PAD, PREFIX, PairBatch, Patches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """Last hidden states of a row and its keys and values, the shared cache of its decode lanes."""

    hidden: Float[Array, "B T D"]
    cache: KeyValues  # of all layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneView:
    """What decode lanes see of their rows, wherever they are: which slots at all, and what a window depends on."""

    allowed: Bool[Array, "B S T"]
    positions: Int[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class Mllm:
    """One definition for policy and reference.

    Args:
      config: sizes.
      pixel_mean, pixel_std: the processor's normalisation of pixels in [0, 1], applied on the device.
      dtype: compute type, "float32" or "bfloat16".
      remat: what of a layer is not kept for the backward pass, see `models.remat`.
      attention: what computes `hidden`'s attention. A prefill, whose slots may be hidden, is computed by blocks.
    """

    config: MllmConfig
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    dtype: str = "float32"
    remat: str = "dots"
    attention: Attention = Attention()

    def without_adapter(self) -> "Mllm":
        """The model that reads no low-rank factors, whether there are some in a tree or not."""
        return dataclasses.replace(self, config=self.config.with_lora({}))

    def tower(
        self, params: dict, images: UInt8[Array, "I M Y W 3"] | Float[Array, "I M Y W 3"], patches: Patches | None = None
    ) -> Float[Array, "I G Z"]:
        """Tower features of each row's images, before the projector, once where rows share them. Images are pixels in 0..255."""
        with jax.named_scope("vision"):
            if patches is not None:
                # canvases are far larger than what is seen of them, and uint8 so far
                images = take_patches(images, patches, self.config.vision.patch_size)
            return self._see(params, images, patches)

    def tower_of_black(self, params: dict, features: Float[Array, "I G Z"], patches: Patches | None = None) -> Float[Array, "I G Z"]:
        """`tower` of black pictures in the place of those with these features. Tiles are alike, so each row's first is computed for all."""
        v, sets = self.config.vision, features.shape[0]
        with jax.named_scope("vision_of_black"):
            if patches is not None:
                taken = (sets, patches.index.shape[1], v.frames_per_patch * v.patch_size**2, 3)
                return self._see(params, mesh.constrain(jnp.zeros(taken, jnp.uint8), "batch", None, None, None), patches)
            tile = jnp.zeros((sets, 1, v.image_size, v.image_size, 3), jnp.uint8)
            one = self._see(params, mesh.constrain(tile, "batch", None, None, None, None), None)
            tiled = jnp.broadcast_to(one[:, None], (sets, features.shape[1] // one.shape[1], *one.shape[1:]))
            return mesh.reshape(tiled, features.shape, "batch", None, None)

    def project(self, params: dict, features: Float[Array, "I G Z"]) -> Float[Array, "I F U"]:
        with jax.named_scope("projector"):
            return Connector(self.config).apply({"params": params["projector"]}, features)

    def encode_images(
        self, params: dict, images: UInt8[Array, "I M Y W 3"] | Float[Array, "I M Y W 3"], patches: Patches | None = None
    ) -> Float[Array, "I F U"]:
        return self.project(params, self.tower(params, images, patches))

    def hidden(self, params: dict, features: Float[Array, "I F U"], batch: PairBatch) -> Float[Array, "B T D"]:
        """Last hidden states of packed rows; image features land where `image_index` and `picture` say."""
        how = self.attention_of(batch.prefix_slots, batch.answer_slots, batch.longest)
        with jax.named_scope("decoder"):
            return self._decode_rows(params, features, batch, Decoder(self.config.decoder, self.remat), how)[0]

    def attention_of(self, prefix_slots: int, answer_slots: int, longest: tuple[int, int] | None = None) -> str:
        """The implementation that computes `hidden` of rows with so many slots, and in rows of several pairs with so many of a pair at most; see
        `models.implementation`.

        Raises:
          UserError: the one that `attention` asks for cannot.
        """
        return self.attention.of(self.config.decoder, self.dtype, self._regions(prefix_slots, answer_slots, longest))

    def attention_to_images(
        self, params: dict, features: Float[Array, "B F U"], batch: PairBatch, image: Int[Array, "B P"], count: int
    ) -> Float[Array, "L B K R M"]:
        """How much of the attention of each answer slot goes to the tokens of each of `count` images, layer by layer; see
        `image_attention.image_mass`. Slots without an answer's token say nothing.

        Args:
          image: number of the image that a slot of the prefix is a token of, -1 for none.
        """
        membership = (image[..., None] == jnp.arange(count)).astype(jnp.float32)
        with jax.named_scope("image_attention"):
            _, mass = self._decode_rows(params, features, batch, Decoder(self.config.decoder), "blocks", membership=membership)
            shape = (*mass.shape[:2], batch.answers, batch.answer_slots, count)
            return mesh.reshape(mass, shape, None, "batch", None, None, None)

    def prefill(
        self,
        params: dict,
        features: Float[Array, "I F U"],
        batch: PairBatch,
        visible: Bool[Array, "B T"] | None = None,
        images_see_all: bool = False,
    ) -> Prefill:
        """`hidden` that also returns the cache. Slots that are not `visible` are hidden from every query of every layer, or, with
        `images_see_all`, from those of text.
        """
        decoder = Decoder(self.config.decoder, keep_cache=True)
        with jax.named_scope("prefill"):
            hidden, cache = self._decode_rows(params, features, batch, decoder, "blocks", visible, images_see_all)
            return Prefill(hidden, jax.tree.map(tuple, cache) if are_apart(params) else cache)

    def empty_tail(self, cache: KeyValues, lanes: int, slots: int) -> KeyValues:
        """Tails `[*L B S G X E]` beside the cache of all layers, for `slots` new tokens a lane."""

        def blank(shared: Float[Array, "*L B G T E"]) -> Float[Array, "*L B S G X E"]:
            *above, groups, _, width = shared.shape
            axes = (*(None,) * (len(above) - 1), "batch", None, "kv_heads", None, None)
            return mesh.constrain(jnp.zeros((*above, lanes, groups, slots, width), shared.dtype), *axes)

        return jax.tree.map(blank, cache)

    def lane_view(
        self, batch: PairBatch, slot: Int[Array, "B S"], visible: Bool[Array, "B T"] | None = None
    ) -> tuple[LaneView, Int[Array, "B S"], Int[Array, "B S"]]:
        """What lanes that begin behind `slot` see, and the position and the rotary position of their first new token."""
        # not take_along_axis, which cannot tell the sharding of one lane of one row
        take = jax.vmap(lambda values, slot: values[slot])
        first, own_role = take(batch.positions, slot) + 1, take(batch.role, slot)
        # a lane goes on behind text, whose three rotary positions are the same
        turning = first if batch.mrope is None else take(batch.mrope[:, 0], slot) + 1
        allowed = (batch.role != PAD)[:, None] & ((batch.role == PREFIX)[:, None] | (batch.role[:, None] == own_role[..., None]))
        allowed &= batch.positions[:, None] < first[..., None]
        if visible is not None:
            allowed &= visible[:, None]
        return LaneView(allowed, batch.positions), first, turning

    def decode_step(
        self,
        params: dict,
        shared: KeyValues,
        tail: KeyValues,
        tokens: Int[Array, "B S"],
        position: Int[Array, "B S"],
        turning: Int[Array, "B S"],
        view: LaneView,
        index: Int[Array, ""] | Int[Array, " B"],
    ) -> tuple[Float[Array, "B S D"], KeyValues]:
        """One new token in every lane: returns its last hidden state and the tails with slot `index` filled.

        Args:
          index: of all rows, or one a row.
          position, turning: position and rotary position of the new tokens.
        """
        local = local_layers(self.config.decoder)
        near = None
        if local.any():
            near = view.allowed & (position[..., None] - view.positions[:, None] < self.config.decoder.sliding_window)
        inputs = self._embed(params, tokens)
        with jax.named_scope("decode_step"):
            decoder = Decoder(self.config.decoder, keep_cache=True, apart=are_apart(params))
            masks = Masks(None if local.all() else view.allowed, near)
            cache = LayerCache(shared, tail)
            hidden, new = decoder.apply({"params": params["decoder"]}, inputs, turning, masks, cache=cache, index=index)
            return hidden, new if are_apart(params) else jax.tree.map(lambda old, one: put(old, one, index), tail, new)

    def head(self, params: dict) -> Float[Array, "D V"]:
        """The output kernel: the decoder's own, or the transposed embedding when they are tied."""
        decoder = params["decoder"]
        return decoder["embed"]["embedding"].T if self.config.decoder.tied_head else decoder["head"]["kernel"]

    def logits(self, params: dict, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 logits. For decoding, where only a few positions are asked for."""
        kernel = mesh.constrain(self.head(params).astype(self.dtype), None, None)
        logits = jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)
        return softcap(logits, self.config.decoder.final_softcap)

    def scores(self, params: dict, hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
        """A float32 number for every hidden state, of a model with a score head; see `models.score_head`."""
        with jax.named_scope("score_head"):
            return scores(params["score_head"], hidden)

    def _see(self, params: dict, images: Array, patches: Patches | None) -> Float[Array, "I G Z"]:
        """Tower features of tiles or of cut-out patches, whose pixels are in 0..255."""
        pixels = (images.astype(jnp.float32) / 255.0 - jnp.array(self.pixel_mean)) / jnp.array(self.pixel_std)
        return VisionTower(self.config, self.remat).apply({"params": params["vision_tower"]}, pixels.astype(self.dtype), patches)

    def _regions(self, prefix_slots: int, answer_slots: int, longest: tuple[int, int] | None) -> Regions:
        return Regions(prefix_slots, answer_slots, self.config.decoder.bidirectional == "none", longest)

    def _decode_rows(
        self, params: dict, features: Array, batch: PairBatch, decoder: Decoder, implementation: str,
        visible: Array | None = None, images_see_all: bool = False, membership: Array | None = None,
    ):  # fmt: skip
        c, width = self.config.decoder, self.config.decoder.width
        local = local_layers(c)
        image = self._image_of(batch) if c.bidirectional == "image" else batch.image_index

        def mask(window: int | None) -> Bool[Array, "B T T"]:
            hidden = {"visible": visible, "images_see_all": images_see_all, "segment": batch.segment}
            return packed_mask(batch.role, batch.positions, image, window=window, bidirectional=c.bidirectional, **hidden)

        regions = self._regions(batch.prefix_slots, batch.answer_slots, batch.longest)
        if implementation == "blocks":
            masks = Masks(None if local.all() else mask(None), mask(c.sliding_window) if local.any() else None, regions)
        else:
            masks = Masks(None, None, regions, batch.role != PAD, batch.segment, implementation)
        placed = at_tokens(features, batch.image_index, batch.picture).astype(self.dtype)
        here, deep = (batch.image_index >= 0)[..., None], None
        inputs = jnp.where(here, placed[..., :width], self._embed(params, batch.tokens))
        if self.config.feature_parts > 1:
            deep = jnp.stack(jnp.split(jnp.where(here, placed[..., width:], 0), self.config.feature_parts - 1, axis=-1))
        turning = batch.positions if batch.mrope is None else batch.mrope
        return decoder.apply({"params": params["decoder"]}, inputs, turning, masks, deep=deep, membership=membership)

    def _image_of(self, batch: PairBatch) -> Int[Array, "B T"]:
        """Number of the tile that a token is a feature of, -1 for text."""
        return jnp.where(batch.image_index >= 0, batch.image_index // self.config.image_tokens, -1)

    def _embed(self, params: dict, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        decoder = Decoder(self.config.decoder)
        return decoder.apply({"params": params["decoder"]}, tokens, jnp.dtype(self.dtype), method=Decoder.embed_tokens)
