"""Idefics3 (arXiv 2408.12637) and the first SmolVLM: SigLIP on tiles, pixel shuffle and one linear, Llama."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from mmalign_jax.errors import UserError
from mmalign_jax.hf import decoders, towers
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.names import HEAD, NameTable, linear
from mmalign_jax.hf.pictures import Expansion, Pictures, Size, as_tiles, load_image_processor, no_video, normalisation
from mmalign_jax.models.config import ConnectorConfig, MllmConfig

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
# "idefics3" is what the first checkpoints call their tower, too
TOWERS = ("idefics3_vision", "smolvlm_vision", "idefics3", "smolvlm")
_TOWER = {"hidden_size": 1152, "intermediate_size": 3072, "num_attention_heads": 16, "image_size": 224, "patch_size": 32}
# transformers finds the position of the i-th of n patches by sorting i * (1 / n) into 1/n, 2/n, ... in float32. For these n it gives some
# patches the position of a neighbour (torch on CPU; published checkpoints have 26, 27 and 32 patches). More than 64 were not tried.
_SHIFTED = (19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62)
_MOST_PATCHES = 64
_MAX_SIDE = 4096  # transformers: MAX_IMAGE_SIZE

# The hub, `save_pretrained` and transformers' modules agree on these names.
PREFIXES = {
    "model.text_model.": "decoder.",
    "lm_head.": "head.",
    "model.vision_model.": "vision.",
    "model.connector.modality_projection.": "projector.",
}


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    """Sizes and switches of an Idefics3 or SmolVLM `config.json`; raises UserError that names the key of what is not supported."""
    vision, scale = dict(config.get("vision_config") or {}), config.get("scale_factor", 2)
    decoders.expect(vision.get("model_type", TOWERS[0]), TOWERS, "vision_config.model_type", where)
    decoders.expect(vision.get("num_channels", 3), (3,), "vision_config.num_channels", where)
    values = _TOWER | vision | {"model_type": "siglip_vision_model"}
    for key in ("image_size", "patch_size"):
        if not isinstance(values[key], int):
            raise UserError(f"{where}: vision_config.{key} is {values[key]!r}; supported: one number, the side of a square")
    side = values["image_size"] // values["patch_size"]
    if side % scale:
        raise UserError(f"{where}: scale_factor is {scale}, which does not divide the {side} patches along a tile (image_size, patch_size)")
    if side in _SHIFTED or side > _MOST_PATCHES:
        raise UserError(f"{where}: image_size, patch_size give {side} patches along a tile; transformers places them by how it rounds")
    # transformers' own default where there is no text_config at all
    text = config.get("text_config") or {"rms_norm_eps": 1e-5}
    return MllmConfig(
        family=config["model_type"],
        decoder=decoders.read_decoder(text, where, kinds=DECODERS, tied=config.get("tie_word_embeddings")),
        vision=towers.read_tower(values, where, kinds=("siglip_vision_model",), post_norm=True),
        connector=ConnectorConfig(kind="shuffle", bias=False, scale=scale),
        image_token_id=config.get("image_token_id", 128257),
    )


def names(config: MllmConfig) -> NameTable:
    """The model's table of names."""

    def unused(reduced: str) -> bool:
        return (reduced == HEAD and config.decoder.tied_head) or towers.tower_unused(reduced, config)

    features = config.vision.width * config.connector.scale**2
    projector = linear(("projector", "linear"), "projector.proj", (features,), (config.decoder.width,), False, None)
    entries = (*towers.tower_entries(config), *projector, *decoders.decoder_entries(config.decoder))
    return NameTable(PREFIXES, entries, towers.tower_behind(config), unused, {reduced: name for name, reduced in PREFIXES.items()})


class SplitTiles:
    """A picture is cut into rows and columns of tiles, and a last tile shows all of it; or it is one tile.

    Every tile is resized to the full square, so that none of it is masked in the tower.

    Args:
      images: transformers' image processor.
      image_token: stands `tokens` times for a tile.
      side: of a tile, in pixels.
    """

    video_placeholder = ""

    def __init__(self, images: Any, image_token: str, tokens: int, side: int):
        if images.max_image_size["longest_edge"] != side:
            found = images.max_image_size["longest_edge"]
            raise UserError(f"the image processor makes tiles of {found} pixels (max_image_size), the model takes {side}")
        self.placeholder, self.mean, self.std = image_token, *normalisation(images)
        self.needs_size = bool(images.do_image_splitting)
        self._images, self._tokens, self._side, self.processors = images, tokens, side, (images,)
        self.blank = self._expansion(0, 0)
        self.pixels([PIL.Image.new("RGB", (8, 8))])  # sizes that do not fit the model show here and not in the first row

    def expand(self, sizes: Sequence[Size], times: Sequence[float] | None = None) -> Expansion:
        no_video(times)
        return self._expansion(*self._grid(*sizes[0])) if self.needs_size else self.blank

    def pixels(self, frames: Sequence[PIL.Image.Image], times: Sequence[float] | None = None) -> UInt8[np.ndarray, "m Y W 3"]:
        no_video(times)
        # rows of several pictures would be filled up with black tiles; this is one picture
        made = self._images.preprocess(frames[0], do_convert_rgb=True, do_rescale=False, do_normalize=False, do_pad=False)
        return as_tiles(made, (self._side, self._side))

    def _expansion(self, rows: int, columns: int) -> Expansion:
        around, tile = "<fake_token_around_image>", self.placeholder * self._tokens
        text = ""
        for row in range(rows):
            text += "".join(f"{around}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(columns)) + "\n"
        text += ("\n" if rows else "") + f"{around}<global-img>{tile}{around}"
        tiles = rows * columns + 1
        return Expansion(text, np.arange(tiles * self._tokens, dtype=np.int32), tiles, (self._side, self._side))

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles; (0, 0) when the picture is one tile.

        The image processor's `get_number_of_image_patches` is no help: it disagrees with its `preprocess` where tiles do not divide
        the size that it resizes to.
        """
        p, side = self._images, self._side
        if p.do_resize and p.size.get("longest_edge"):
            height, width = _longest_edge(height, width, p.size["longest_edge"])
        elif p.do_resize:
            height, width = p.size["height"], p.size["width"]
        aspect = width / height
        if width >= height:
            columns = math.ceil(width / side)
            rows = math.ceil(int(columns * side / aspect) / side)
        else:
            rows = math.ceil(height / side)
            columns = math.ceil(int(rows * side * aspect) / side)
        return (rows, columns) if rows > 1 or columns > 1 else (0, 0)


def _longest_edge(height: int, width: int, longest: int) -> Size:
    """The size of a picture whose longer side has become `longest`, the other one even, both at most 4096; rounded as in transformers."""
    aspect = width / height
    if width >= height:
        height, width = int(longest / aspect), longest
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > _MAX_SIDE:
        height, width = int(_MAX_SIDE / aspect), _MAX_SIDE
    elif height > width and height > _MAX_SIDE:
        height, width = _MAX_SIDE, int(_MAX_SIDE * aspect)
    return max(height, 1), max(width, 1)


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    """The family's pictures."""
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    return SplitTiles(load_image_processor(directory), token, config.image_tokens, config.vision.image_size)


def processor_values(config: MllmConfig, image_token: str) -> Mapping[str, Any]:
    """What `processor_config.json` holds beside the image processor."""
    return {"image_seq_len": config.image_tokens}


FAMILY = Family(
    model_type="idefics3",
    architecture="Idefics3ForConditionalGeneration",
    processor_class="Idefics3Processor",
    read=read,
    names=names,
    pictures=pictures,
    processor_values=processor_values,
)
