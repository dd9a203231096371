"""Pictures and videos of any size (Qwen2-VL, arXiv 2409.12191): resized near their own size, cut into patches, squares of which are tokens."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Int32, UInt8

from mmalign_jax.errors import UserError
from mmalign_jax.hf.patch_order import PatchGrid
from mmalign_jax.hf.pictures import Expansion, Size, normalisation, video_values
from mmalign_jax.models.config import VisionConfig

MAX_ASPECT = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Multiples of `factor` near a picture's size whose product lies within the limits (transformers' function of this name).

    Raises:
      UserError: the picture is longer than 200:1.
    """
    return _resize(height, width, factor, min_pixels, max_pixels, 1, 1)


def smart_resize_video(frames: int, height: int, width: int, factor: int, depth: int, min_pixels: int, max_pixels: int) -> Size:
    """The same for limits on the pixels of all frames together (Qwen3-VL). `depth` frames make one patch.

    Raises:
      UserError: fewer frames than one patch spans, or frames longer than 200:1.
    """
    if frames < depth:
        raise UserError(f"a video of {frames} frame(s); this model takes no fewer than {depth}")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    return _resize(height, width, factor, min_pixels, max_pixels, frames, round(frames / depth) * depth)


def _resize(height: int, width: int, factor: int, low: int, high: int, frames: int, counted: int) -> Size:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(f"a picture of {width} x {height} pixels is longer than {MAX_ASPECT}:1")
    rows, columns = round(height / factor), round(width / factor)
    pixels = counted * rows * columns * factor**2
    if pixels > high:
        shrink = math.sqrt(frames * height * width / high)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif pixels < low:
        grow = math.sqrt(low / (frames * height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


@dataclasses.dataclass(frozen=True)
class Videos:
    """What a family does with videos.

    Args:
      size: (frames, height, width) -> size of each frame.
      clock: times of the frames in seconds -> the time, in M-RoPE's units, of each step of `depth` frames.
      text: (times of the frames, image tokens of one step) -> what stands in the prompt.
    """

    size: Callable[[int, int, int], Size]
    clock: Callable[[Sequence[float]], Int32[np.ndarray, " t"]]
    text: Callable[[Sequence[float], int], str]


class AnySizePictures:
    """`pictures.Pictures` of a tower that takes patches.

    Args:
      images: transformers' image processor of Qwen2-VL, on PIL.
      vision: sizes of the tower.
      tokens: the texts of the image token and of the video token.
      videos: what the family does with videos.

    Raises:
      UserError: the processor does not fit the tower, or does not resize.
    """

    needs_size = True

    def __init__(self, images: Any, vision: VisionConfig, tokens: tuple[str, str], videos: Videos):
        self.placeholder, self.video_placeholder = tokens
        self.mean, self.std = normalisation(images)
        self._images, self._vision, self._videos, self.processors = images, vision, videos, (images,)
        expected = {"patch_size": vision.patch_size, "merge_size": vision.merge, "temporal_patch_size": vision.frames_per_patch}
        for key, value in {**expected, "do_resize": True}.items():
            if getattr(images, key) != value:
                raise UserError(f"the image processor has {key} {getattr(images, key)}, the model takes {value}")
        self._low, self._high = limits(dict(images.size), "the image processor")
        self._factor = vision.patch_size * vision.merge
        self.blank = self._expansion((self._factor, self._factor), 1, np.zeros(1, np.int32), self.placeholder)

    def expand(self, sizes: Sequence[Size], times: Sequence[float] | None = None) -> Expansion:
        size = self._resized(sizes, times)
        per_step = size[0] * size[1] // self._factor**2
        if times is None:
            return self._expansion(size, 1, np.zeros(1, np.int32), self.placeholder * per_step)
        text, clock = self._videos.text(times, per_step), self._videos.clock(times)
        return dataclasses.replace(self._expansion(size, len(sizes), clock, text), video=True)

    def pixels(self, frames: Sequence[PIL.Image.Image], times: Sequence[float] | None = None) -> UInt8[np.ndarray, "m Y W 3"]:
        height, width = self._resized([frame.size[::-1] for frame in frames], times)
        return np.stack([np.asarray(frame.resize((width, height), self._images.resample)) for frame in frames])

    def _resized(self, sizes: Sequence[Size], times: Sequence[float] | None) -> Size:
        if times is None:
            return smart_resize(*sizes[0], self._factor, self._low, self._high)
        if len(set(sizes)) > 1:
            raise UserError(f"the frames of a video have different sizes: {', '.join(map(str, dict.fromkeys(sizes)))}")
        return self._videos.size(len(sizes), *sizes[0])

    def _expansion(self, size: Size, tiles: int, clock: Int32[np.ndarray, " t"], text: str) -> Expansion:
        v = self._vision
        rows, columns = (side // v.patch_size for side in size)
        grid = PatchGrid(rows, columns, tiles, v.frames_per_patch, v.merge, v.window)
        return Expansion(text, grid.feature_order(), tiles, size, grid.turns(clock), grid)


def limits(size: Mapping[str, int], what: str) -> tuple[int, int]:
    """Least and most pixels of a processor's `size`.

    Raises:
      UserError: it does not say them.
    """
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    if not low or not high:
        raise UserError(f"{what} has size {dict(size)}, which lacks shortest_edge or longest_edge (its least and most pixels)")
    return low, high


def video_limits(directory: Path, images: Any, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, int]]:
    """The values of a directory's video processor, and its least and most pixels.

    Args:
      images: transformers' image processor of the directory.
      defaults: of transformers' class, for keys that are left out.

    Raises:
      UserError: frames would be normalised or cut differently from pictures, or are not resized.
    """
    values = {**defaults, **(video_values(directory) or {})}
    size = dict(values["size"])
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if values.get(old) is not None:
            size[new] = values[old]
    what = f"{directory}: the video processor"
    if not values.get("do_resize", True):
        raise UserError(f"{what} has do_resize False, the model takes True")
    for key in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "resample"):
        if key in values and _plain(values[key]) != _plain(getattr(images, key)):
            raise UserError(f"{what} has {key} {values[key]}, the image processor {getattr(images, key)}; videos are taken as pictures are")
    return values, limits(size, what)


def _plain(value: Any) -> Any:
    return [float(x) for x in value] if isinstance(value, (list, tuple)) else value
