"""What pictures become: pixels for the tower, and tokens in the prompt. Known from a picture's size alone, so that rows can be planned.

Each family has its `Pictures`; this file holds the records, and the simplest of them, one tile of one size for every picture.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL.Image
from jaxtyping import Int32, UInt8

from mmalign_jax.errors import UserError
from mmalign_jax.hf.files import read_json
from mmalign_jax.hf.patch_order import PatchGrid
from mmalign_jax.models.config import MllmConfig

Size = tuple[int, int]  # height and width in pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Expansion:
    """What a picture or a video takes in a row.

    Args:
      text: stands in the prompt in the place of its placeholder.
      features: for each image token of `text`, which of the medium's features lands there; -1 for the newline.
      tiles: how many of the row's M images it takes.
      canvas: their size in pixels.
      turns: for models with M-RoPE, the time, row and column of each image token, counted from where its run of image tokens starts.
      grid: its patches, for towers that take pictures of any size.
    """

    text: str
    features: Int32[np.ndarray, " n"]
    tiles: int
    canvas: Size
    turns: Int32[np.ndarray, "3 n"] | None = None
    grid: PatchGrid | None = None
    video: bool = False

    @property
    def nbytes(self) -> int:
        return len(self.text) + self.features.nbytes + (0 if self.turns is None else self.turns.nbytes)

    @property
    def slots(self) -> int:
        """Patch slots of the tower that it takes; 0 for tiles."""
        return 0 if self.grid is None else self.grid.slots


@dataclasses.dataclass(frozen=True)
class RowTraits:
    """What a row's arrays depend on beside its tokens.

    Args:
      tile_features: features of one tile; 0 where pictures have any size.
      first_feature: features that stand before those of the row's pictures (the newline).
      merge: patches that make one feature, where pictures have any size.
      patch_size, patch_depth: side of a patch, and frames that it spans, where pictures have any size.
      mrope: tokens turn by time, row and column.
      max_positions: longest row, prefix and one answer, that the decoder was made for.
      prefix_attends: the row's prefix sees itself in both directions, so no part of an answer may stand in it.
    """

    tile_features: int
    first_feature: int = 0
    merge: int = 1
    patch_size: int = 1
    patch_depth: int = 1
    mrope: bool = False
    max_positions: int = 1 << 30
    prefix_attends: bool = False

    @classmethod
    def of(cls, config: MllmConfig) -> "RowTraits":
        v = config.vision
        return cls(
            tile_features=config.tile_features if v.image_size else 0,
            first_feature=int(config.connector.newline),
            merge=v.merge**2,
            patch_size=v.patch_size,
            patch_depth=v.frames_per_patch,
            mrope=bool(config.decoder.rope.sections),
            max_positions=config.decoder.max_positions,
            prefix_attends=config.decoder.bidirectional == "prefix",
        )


@runtime_checkable
class Pictures(Protocol):
    """A family's pictures.

    Attributes:
      placeholder, video_placeholder: what the chat template writes for a picture and for a video ("" when the family takes none).
      mean, std: the tower sees `(pixels / 255 - mean) / std`.
      processors: transformers' image processors that make the pixels: that of pictures, and that of frames where it is another.
      needs_size: whether `expand` reads the sizes.
      blank: the least that a picture takes; rows of text hold so much of nothing.
    """

    placeholder: str
    video_placeholder: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    processors: tuple[Any, ...]
    needs_size: bool
    blank: Expansion

    def expand(self, sizes: Sequence[Size], times: Sequence[float] | None = None) -> Expansion:
        """What a picture takes, or a video with frames of these sizes at these times (seconds).

        Raises:
          UserError: a size that the processor refuses, or a video for a family that takes none.
        """

    def pixels(self, frames: Sequence[PIL.Image.Image], times: Sequence[float] | None = None) -> UInt8[np.ndarray, "m Y W 3"]:
        """The tiles of a picture (one frame) or of a video, RGB, resized as the checkpoint's processor does."""


def load_image_processor(directory: Path) -> Any:
    """transformers' image processor of a directory, on PIL.

    Raises:
      UserError: there is none, or it cannot be loaded.
    """
    import transformers  # late: it takes seconds, and a mistake in a config should be told at once

    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise UserError(f"{directory}: no image processor; expected preprocessor_config.json or processor_config.json")
    try:
        return transformers.AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: the image processor cannot be loaded ({error})") from error


def video_values(directory: Path) -> dict[str, Any] | None:
    """The values of a directory's video processor; None where there are none.

    transformers' own classes need torchvision. They read the first of these that is there: `video_processor` in processor_config.json,
    video_preprocessor_config.json, preprocessor_config.json (which is the image processor's, and older directories have nothing else).
    """
    nested = directory / "processor_config.json"
    values = read_json(nested).get("video_processor") if nested.is_file() else None
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if values is None and (directory / name).is_file():
            values = read_json(directory / name)
    return values


def normalisation(images: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """mean and std for pixels in [0, 1], of an image processor's own rescaling and normalisation."""
    scale = 255 * images.rescale_factor if images.do_rescale else 255
    mean = images.image_mean if images.do_normalize else (0.0, 0.0, 0.0)
    std = images.image_std if images.do_normalize else (1.0, 1.0, 1.0)
    return tuple(float(value / scale) for value in mean), tuple(float(value / scale) for value in std)


def no_video(times: Sequence[float] | None) -> None:
    """Raises UserError for a video."""
    if times is not None:
        raise UserError("this model takes no video; give pictures")


class SingleTile:
    """Every picture is one tile of one size and takes the same tokens: LLaVA-1.5, PaliGemma, Gemma 3.

    Args:
      images: transformers' image processor.
      image_token: stands `tokens` times for a picture, between `before` and `after`.
      size: of the tile, in pixels.
      placeholder: what the chat template writes; the image token itself when empty.
    """

    video_placeholder = ""
    needs_size = False

    def __init__(self, images: Any, image_token: str, tokens: int, size: Size, *, before: str = "", after: str = "", placeholder: str = ""):
        self.placeholder = placeholder or image_token
        self.mean, self.std = normalisation(images)
        self._images, self._size, self.processors = images, size, (images,)
        self.blank = Expansion(before + image_token * tokens + after, np.arange(tokens, dtype=np.int32), 1, size)
        self.pixels([PIL.Image.new("RGB", (3, 2))])  # sizes that do not fit the model show here and not in the first row

    def expand(self, sizes: Sequence[Size], times: Sequence[float] | None = None) -> Expansion:
        no_video(times)
        return self.blank

    def pixels(self, frames: Sequence[PIL.Image.Image], times: Sequence[float] | None = None) -> UInt8[np.ndarray, "m Y W 3"]:
        no_video(times)
        return as_tiles(self._images.preprocess(frames[0], do_convert_rgb=True, do_rescale=False, do_normalize=False), self._size)


def as_tiles(preprocessed: Any, size: Size) -> UInt8[np.ndarray, "m Y W 3"]:
    """Tiles of one picture from what an image processor returns without rescaling, `[1, (m,) 3, Y, W]`.

    Raises:
      UserError: they are not of the size that the model takes.
    """
    values = np.asarray(preprocessed["pixel_values"][0])
    tiles = np.ascontiguousarray(values.reshape(-1, *values.shape[-3:]).transpose(0, 2, 3, 1))
    if tiles.shape[1:] != (*size, 3) or tiles.dtype != np.uint8:
        raise UserError(f"the image processor made {tiles.dtype}{tiles.shape[1:]} of an image, the model takes uint8{(*size, 3)}")
    return tiles
