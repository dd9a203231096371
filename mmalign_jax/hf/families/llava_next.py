"""LLaVA-NeXT, which is LLaVA-1.6: a small copy of the picture, and the picture itself in a grid of tiles (AnyRes).

Source: LLaVA's own code (github.com/haotian-liu/LLaVA, `llava/mm_utils.py` and `llava_arch.py`, merge type `spatial_unpad`), as
transformers' LlavaNext has it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Int32, UInt8

from mmalign_jax.errors import UserError
from mmalign_jax.hf import decoders
from mmalign_jax.hf.families import llava
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.files import read_json
from mmalign_jax.hf.names import Entry, NameTable
from mmalign_jax.hf.pictures import Expansion, Pictures, Size, as_tiles, load_image_processor, no_video, normalisation
from mmalign_jax.models.config import MllmConfig

# before LLaVA's, whose projector's prefix would fit the newline, too
PREFIXES = {"image_newline": "projector.image_newline", "model.image_newline": "projector.image_newline"} | llava.PREFIXES
# of transformers' config class, for a config.json without the key
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    """Sizes and switches of a LLaVA-NeXT `config.json`; raises UserError that names the key of what is not supported."""
    base = llava.read(config, where)
    # the features of a tile must form a square, so there is no place for a class token
    if base.keep_class_token:
        decoders.expect("full", ("default",), "vision_feature_select_strategy of a tower with a class token", where)
    decoders.expect(config.get("use_image_newline_parameter", True), (True,), "use_image_newline_parameter", where)
    _pinpoints(config, base.vision.image_size, where)
    return dataclasses.replace(base, connector=dataclasses.replace(base.connector, newline=True))


def _pinpoints(config: Mapping[str, Any], side: int, where: str) -> tuple[Size, ...]:
    """The sizes, height and width, of which a picture gets the one that suits it best."""
    found = config.get("image_grid_pinpoints")
    found = PINPOINTS if found is None else tuple(map(tuple, found))
    if not found or any(len(size) != 2 or min(size) < 1 or size[0] % side or size[1] % side for size in found):
        raise UserError(f"{where}: image_grid_pinpoints is {found}; supported: heights and widths that are multiples of a tile's {side} pixels")
    return found


def names(config: MllmConfig) -> NameTable:
    width = (config.decoder.width,)
    newline = Entry(("projector", "newline"), "projector.image_newline", width, width)
    table = llava.names(config)
    return dataclasses.replace(table, prefixes=PREFIXES, entries=(*table.entries, newline))


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a picture's size makes of it.

    Args:
      tiles: rows and columns of tiles.
      crop: how many rows and columns of features are cut from the upper and lower, and the left and right edge: what only shows padding.
    """

    tiles: tuple[int, int]
    crop: tuple[int, int]

    @classmethod
    def of(cls, size: Size, pinpoints: Sequence[Size], side: int, cells: int) -> "Grid":
        """
        Args:
          size: of the picture.
          side: of a tile in pixels.
          cells: of a tile's side, in features.
        """
        # where torch is installed this import takes seconds, which a command about another model need not wait for
        from transformers.image_processing_utils import select_best_resolution

        height, width = size
        best = select_best_resolution(size, pinpoints)
        tiles = (best[0] // side, best[1] // side)
        down, across = tiles[0] * cells, tiles[1] * cells
        # the order of these operations decides where a size falls between two features; it is transformers' own
        if width / height > across / down:
            return cls(tiles, ((down - int(round(height * (across / width), 7))) // 2, 0))
        return cls(tiles, (0, (across - int(round(width * (down / height), 7))) // 2))

    def features(self, cells: int, stride: int) -> Int32[np.ndarray, " n"]:
        """The small copy's features, and then the grid's, row by row over all tiles, each row with the newline (-1) at its end.

        Args:
          stride: from a tile's first feature to the next tile's.
        """
        (rows, columns), (y, x) = self.tiles, self.crop
        small = np.arange(cells * cells, dtype=np.int32)
        tile = stride * (1 + np.arange(rows * columns, dtype=np.int32))
        grid = tile.reshape(rows, 1, columns, 1) + small.reshape(1, cells, 1, cells)
        grid = grid.reshape(rows * cells, columns * cells)
        grid = grid[y : grid.shape[0] - y, x : grid.shape[1] - x]
        return np.concatenate([small, np.pad(grid, ((0, 0), (0, 1)), constant_values=-1).reshape(-1)])


class AnyRes:
    """Pictures of LLaVA-NeXT.

    Args:
      images: transformers' image processor.
      token: stands once for every feature of a picture.
      pinpoints: sizes, of which a picture gets the one that suits it best.
    """

    video_placeholder = ""
    needs_size = True

    def __init__(self, images: Any, token: str, pinpoints: Sequence[Size], config: MllmConfig):
        self.placeholder, self._images, self._pinpoints = token, images, tuple(pinpoints)
        self.mean, self.std, self.processors = *normalisation(images), (images,)
        self._side, self._stride = config.vision.image_size, config.tile_features
        self._cells = self._side // config.vision.patch_size
        self.blank = Expansion(token * self._cells**2, np.arange(self._cells**2, dtype=np.int32), 1, (self._side,) * 2)
        # few grids are made of many sizes, and rows keep their expansions
        self._expansion = functools.cache(self._make)
        self.pixels([PIL.Image.new("RGB", (3, 2))])  # sizes that do not fit the model show here and not in the first row

    def _make(self, grid: Grid) -> Expansion:
        features = grid.features(self._cells, self._stride)
        return Expansion(self.placeholder * len(features), features, 1 + grid.tiles[0] * grid.tiles[1], self.blank.canvas)

    def expand(self, sizes: Sequence[Size], times: Sequence[float] | None = None) -> Expansion:
        no_video(times)
        return self._expansion(Grid.of(sizes[0], self._pinpoints, self._side, self._cells))

    def pixels(self, frames: Sequence[PIL.Image.Image], times: Sequence[float] | None = None) -> UInt8[np.ndarray, "m Y W 3"]:
        no_video(times)
        plain = {"do_convert_rgb": True, "do_rescale": False, "do_normalize": False, "do_pad": False}
        return as_tiles(self._images.preprocess(frames[0], **plain), self.blank.canvas)


def image_processor(directory: Path, config: MllmConfig) -> tuple[Any, tuple[Size, ...]]:
    """transformers' image processor, and the sizes of its grids, which must be those of `config.json`.

    Raises:
      UserError: they differ: tokens and features would not fit.
    """
    images, file = load_image_processor(directory), directory / "config.json"
    pinpoints = _pinpoints(read_json(file), config.vision.image_size, str(file))
    given = getattr(images, "image_grid_pinpoints", None)
    if given is None or tuple(map(tuple, given)) != pinpoints:
        raise UserError(f"{directory}: the image processor's image_grid_pinpoints are {given}, config.json's are {[*map(list, pinpoints)]}")
    return images, pinpoints


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    images, pinpoints = image_processor(directory, config)
    return AnyRes(images, tokenizer.convert_ids_to_tokens(config.image_token_id), pinpoints, config)


FAMILY = Family(
    model_type="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    processor_class="LlavaNextProcessor",
    read=read,
    names=names,
    pictures=pictures,
    processor_values=llava.processor_values,
)
