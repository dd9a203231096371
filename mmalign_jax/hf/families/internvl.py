"""InternVL (arXiv 2504.10479) as transformers writes it (`-hf`): InternViT on tiles, pixel shuffle, norm and two linears, Qwen or Llama."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from mmalign_jax.errors import UserError
from mmalign_jax.hf import decoders
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.names import HEAD, Entry, NameTable, linear, norm
from mmalign_jax.hf.pictures import Expansion, Pictures, Size, as_tiles, load_image_processor, normalisation, video_values
from mmalign_jax.hf.towers import patch_entry
from mmalign_jax.models.config import ConnectorConfig, MllmConfig, VisionConfig

DECODERS = ("qwen2", "qwen3", "llama", "mistral")
_TOWER = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "attention_bias": False, "use_qk_norm": False,
    "intermediate_size": 4096, "hidden_act": "gelu", "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "image_size": (448, 448),
    "patch_size": (14, 14), "num_channels": 3, "use_absolute_position_embeddings": True, "use_mean_pooling": True,
}  # fmt: skip
# What a video processor and an image processor do alike
_STEPS = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
_LAYER = "vision.encoder.layer.{}."

PREFIXES = {
    # files on the hub; transformers' module names
    "language_model.model.": "decoder.",
    "model.language_model.": "decoder.",
    "language_model.lm_head.": "head.",
    "lm_head.": "head.",
    "vision_tower.": "vision.",
    "model.vision_tower.": "vision.",
    "multi_modal_projector.": "projector.",
    "model.multi_modal_projector.": "projector.",
}


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    """Sizes and switches of an InternVL `config.json`; raises UserError that names the key of what is not supported."""
    decoders.expect(config.get("vision_feature_select_strategy", "default"), ("default",), "vision_feature_select_strategy", where)
    decoders.expect(config.get("projector_hidden_act", "gelu"), decoders.ACTIVATIONS, "projector_hidden_act", where)
    layer, ratio = config.get("vision_feature_layer", -1), config.get("downsample_ratio", 0.5)
    if not isinstance(layer, int):
        raise UserError(f"{where}: vision_feature_layer is {layer!r}; supported: one number")
    scale = int(1 / ratio)
    if scale * ratio != 1:
        raise UserError(f"{where}: downsample_ratio is {ratio}; supported: 1, 1/2, 1/4 and so on")
    vision = _read_tower(config.get("vision_config") or {}, where, last=layer == -1)
    side = vision.image_size // vision.patch_size
    if side % scale:
        raise UserError(f"{where}: downsample_ratio is {ratio}, which does not divide the {side} patches along a tile")
    return MllmConfig(
        family=config["model_type"],
        decoder=decoders.read_decoder(config.get("text_config") or {}, where, kinds=DECODERS, tied=config.get("tie_word_embeddings", True)),
        vision=vision,
        connector=ConnectorConfig(kind="shuffle_mlp", activation=config.get("projector_hidden_act", "gelu"), scale=scale, norm_eps=1e-5),
        image_token_id=config.get("image_token_id", 151667),
        feature_layers=(layer,),
    )


def _read_tower(values: Mapping[str, Any], where: str, *, last: bool) -> VisionConfig:
    """`last`: features are the tower's output, which a norm follows where nothing is pooled."""
    v = _TOWER | dict(values)
    decoders.expect(v.get("model_type", "internvl_vision"), ("internvl_vision",), "vision_config.model_type", where)
    decoders.expect(v["hidden_act"], decoders.ACTIVATIONS, "vision_config.hidden_act", where)
    decoders.expect(v["norm_type"], ("layer_norm", "rms_norm"), "vision_config.norm_type", where)
    decoders.expect(v["num_channels"], (3,), "vision_config.num_channels", where)
    post_norm = last and not v["use_mean_pooling"]
    if post_norm:
        # the last norm would be a layer norm all the same
        decoders.expect(v["norm_type"], ("layer_norm",), "vision_config.norm_type without use_mean_pooling", where)
    return VisionConfig(
        image_size=_side(v["image_size"], "image_size", where),
        patch_size=_side(v["patch_size"], "patch_size", where),
        width=v["hidden_size"],
        mlp_width=v["intermediate_size"],
        layers=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        norm_eps=v["layer_norm_eps"],
        activation=v["hidden_act"],
        patch_bias=True,
        pre_norm=False,
        post_norm=post_norm,
        norm="rms" if v["norm_type"] == "rms_norm" else "layer",
        positions="learned" if v["use_absolute_position_embeddings"] else "none",
        attention_bias=v["attention_bias"],
        qk_norm=v["use_qk_norm"],
        layer_scale=True,
    )


def _side(value: int | Sequence[int], key: str, where: str) -> int:
    sides = (value,) * 2 if isinstance(value, int) else tuple(value)
    if len(set(sides)) != 1:
        raise UserError(f"{where}: vision_config.{key} is {value!r}; supported: squares")
    return sides[0]


def _layers(config: MllmConfig) -> tuple[Entry, ...]:
    v, count = config.vision, config.used_vision_layers
    split, bias, affine = (v.heads, v.width // v.heads), v.attention_bias, v.norm == "layer"
    path, name = ("vision_tower", "layers"), _LAYER
    scales = [Entry((*path, f"scale{n}"), f"{name}lambda_{n}", (v.width,), (v.width,), (), count) for n in (1, 2)]
    normed = []
    if v.qk_norm:
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            normed.append(Entry((*path, "attention", ours, "scale"), f"{name}attention.{theirs}.weight", (v.width,), split, (), count))
    return (
        *norm((*path, "norm1"), name + "layernorm_before", v.width, affine, count),
        *linear((*path, "attention", "query"), name + "attention.q_proj", (v.width,), split, bias, count),
        *linear((*path, "attention", "key"), name + "attention.k_proj", (v.width,), split, bias, count),
        *linear((*path, "attention", "value"), name + "attention.v_proj", (v.width,), split, bias, count),
        *linear((*path, "attention", "out"), name + "attention.projection_layer", split, (v.width,), True, count),
        *normed,
        *norm((*path, "norm2"), name + "layernorm_after", v.width, affine, count),
        *linear((*path, "mlp", "up"), name + "mlp.fc1", (v.width,), (v.mlp_width,), True, count),
        *linear((*path, "mlp", "down"), name + "mlp.fc2", (v.mlp_width,), (v.width,), True, count),
        *scales,
    )


def _tower_entries(config: MllmConfig) -> tuple[Entry, ...]:
    v, embedding = config.vision, ("vision_tower", "embedding")
    table = (v.patches + 1, v.width)
    entries = [
        Entry((*embedding, "class_token"), "vision.embeddings.cls_token", (1, 1, v.width), (v.width,)),
        *patch_entry(v, "vision.embeddings.patch_embeddings.projection"),
        *_layers(config),
    ]
    if v.positions == "learned":
        entries.append(Entry((*embedding, "positions"), "vision.embeddings.position_embeddings", (1, *table), table))
    if v.post_norm:
        entries += norm(("vision_tower", "post_norm"), "vision.layernorm", v.width, True, None)
    return tuple(entries)


def _projector_entries(config: MllmConfig) -> tuple[Entry, ...]:
    features, width = config.vision.width * config.connector.scale**2, config.decoder.width
    return (
        *norm(("projector", "norm"), "projector.layer_norm", features, True, None),
        *linear(("projector", "fc1"), "projector.linear_1", (features,), (width,), True, None),
        *linear(("projector", "fc2"), "projector.linear_2", (width,), (width,), True, None),
    )


def names(config: MllmConfig) -> NameTable:
    """The model's table of names."""
    used, total = config.used_vision_layers, config.vision.layers
    behind = tuple(dataclasses.replace(entry, name=entry.name.format(n), layers=None) for entry in _layers(config) for n in range(used, total))
    copied = {entry.name for entry in behind}

    def unused(reduced: str) -> bool:
        if reduced in ("vision.layernorm.weight", "vision.layernorm.bias"):
            return not config.vision.post_norm
        return reduced in copied or reduced == "vision.embeddings.mask_token" or (reduced == HEAD and config.decoder.tied_head)

    entries = (*_tower_entries(config), *_projector_entries(config), *decoders.decoder_entries(config.decoder))
    return NameTable(PREFIXES, entries, behind, unused)


class CroppedTiles:
    """A picture is resized to the grid of tiles that is nearest to its shape, and a last tile shows all of it; or it is one tile.

    A frame of a video is one tile. The image processor of a checkpoint says that it does not crop; transformers' processor
    overrules it, and so do we.

    Args:
      images, frames: transformers' image processors (GotOcr2's) of pictures and of the frames of videos.
      image_token: stands `tokens` times for a tile.
      side: of a tile, in pixels.
      start, end: stand around a picture's tokens.
      video_placeholder: what the chat template writes for a video.
    """

    needs_size = True

    def __init__(self, images: Any, frames: Any, image_token: str, tokens: int, side: int, *, start: str, end: str, video_placeholder: str):
        self.placeholder, self.video_placeholder = image_token, video_placeholder
        self.mean, self.std = normalisation(images)
        if normalisation(frames) != (self.mean, self.std):
            raise UserError(f"frames of videos are normalised by {normalisation(frames)}, pictures by {(self.mean, self.std)}")
        self._images, self._frames, self.processors = images, frames, (images, frames)
        self._tokens, self._side, self._around = tokens, side, (start, end)
        self.blank = self._expansion(1, self._tile_text(1), video=False)
        for times in (None, (0.0,)):
            self.pixels([PIL.Image.new("RGB", (8, 8))], times)  # sizes that do not fit the model show here and not in the first row

    def expand(self, sizes: Sequence[Size], times: Sequence[float] | None = None) -> Expansion:
        if times is not None:
            text = "\n".join(f"Frame{number + 1}: {self._tile_text(1)}" for number in range(len(sizes)))
            return self._expansion(len(sizes), text, video=True)
        tiles = self._images.get_number_of_image_patches(*sizes[0], {"crop_to_patches": True})
        return self._expansion(tiles, self._tile_text(tiles), video=False)

    def pixels(self, frames: Sequence[PIL.Image.Image], times: Sequence[float] | None = None) -> UInt8[np.ndarray, "m Y W 3"]:
        images = self._images if times is None else self._frames
        kwargs = {"do_convert_rgb": True, "do_rescale": False, "do_normalize": False, "crop_to_patches": times is None}
        made = images.preprocess(list(frames), **kwargs)
        return as_tiles({"pixel_values": [np.stack(made["pixel_values"])]}, (self._side, self._side))

    def _tile_text(self, tiles: int) -> str:
        start, end = self._around
        return start + self.placeholder * (self._tokens * tiles) + end

    def _expansion(self, tiles: int, text: str, *, video: bool) -> Expansion:
        return Expansion(text, np.arange(tiles * self._tokens, dtype=np.int32), tiles, (self._side, self._side), video=video)


def _frame_processor(directory: Path, images: Any) -> Any:
    """The directory's video processor as an image processor with the same values on PIL; that of pictures where there is none."""
    values = video_values(directory)
    if values is None:
        return images
    if values.get("do_center_crop"):
        raise UserError(f"{directory}: the video processor's do_center_crop is True; supported: False")
    return type(images)(**{name: values[name] for name in _STEPS if values.get(name) is not None})


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    """The family's pictures."""
    images = load_image_processor(directory)
    return CroppedTiles(
        images,
        _frame_processor(directory, images),
        tokenizer.convert_ids_to_tokens(config.image_token_id),
        config.image_tokens,
        config.vision.image_size,
        start=getattr(tokenizer, "start_image_token", "<img>"),
        end=getattr(tokenizer, "end_image_token", "</img>"),
        video_placeholder=getattr(tokenizer, "video_token", "<video>"),
    )


def processor_values(config: MllmConfig, image_token: str) -> Mapping[str, Any]:
    """What `processor_config.json` holds beside the image processor."""
    return {"image_seq_length": config.image_tokens}


FAMILY = Family(
    model_type="internvl",
    architecture="InternVLForConditionalGeneration",
    processor_class="InternVLProcessor",
    read=read,
    names=names,
    pictures=pictures,
    processor_values=processor_values,
)
