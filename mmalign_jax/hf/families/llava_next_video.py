"""LLaVA-NeXT-Video: LLaVA-NeXT whose videos are lists of frames, each one tile whose features are pooled by squares.

A frame of 336 pixels takes 144 tokens instead of 576. No token tells the time of a frame; the order does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from mmalign_jax.errors import UserError
from mmalign_jax.hf import decoders
from mmalign_jax.hf.families import llava, llava_next
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.pictures import Expansion, Pictures, Size, as_tiles, normalisation, video_values
from mmalign_jax.models.config import MllmConfig

POOLS = ("average", "max")
IMAGE_TOKEN, VIDEO_TOKEN = 32001, 32000  # of transformers' config class
# What a video processor's steps depend on: the same steps as those of CLIP's image processor
_STEPS = (
    "do_convert_rgb", "do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    """Sizes and switches of a LLaVA-NeXT-Video `config.json`; raises UserError that names the key of what is not supported."""
    base = llava_next.read({"image_token_index": config.get("image_token_id", IMAGE_TOKEN)} | dict(config), where)
    pool, scale = config.get("spatial_pool_mode", "average"), config.get("spatial_pool_stride", 2)
    decoders.expect(pool, POOLS, "spatial_pool_mode", where)
    # transformers' processor writes a quarter of the tokens, whatever the stride
    decoders.expect(scale, (2,), "spatial_pool_stride", where)
    side = base.vision.image_size // base.vision.patch_size
    if side % scale:
        raise UserError(f"{where}: a frame's {side} x {side} patches cannot be pooled by squares of {scale} x {scale}")
    return dataclasses.replace(
        base,
        connector=dataclasses.replace(base.connector, frame_pool=pool, frame_scale=scale),
        video_token_id=config.get("video_token_index", config.get("video_token_id", VIDEO_TOKEN)),
    )


class Frames:
    """Pictures as in LLaVA-NeXT, and videos.

    Args:
      still: of pictures.
      frames: transformers' image processor for one frame.
      token: stands once for every feature of a frame.
    """

    needs_size = True

    def __init__(self, still: Pictures, frames: Any, token: str, config: MllmConfig):
        self.placeholder, self.video_placeholder = still.placeholder, token
        self.mean, self.std, self.blank = still.mean, still.std, still.blank
        if normalisation(frames) != (self.mean, self.std):
            raise UserError(f"frames of videos are normalised by {normalisation(frames)}, pictures by {(self.mean, self.std)}")
        self._still, self._frames, self._config, self.processors = still, frames, config, (*still.processors, frames)
        self.pixels([PIL.Image.new("RGB", (3, 2))], (0.0,))

    def expand(self, sizes: Sequence[Size], times: Sequence[float] | None = None) -> Expansion:
        if times is None:
            return self._still.expand(sizes)
        c = self._config
        first = c.image_tokens + c.tile_features * np.arange(len(times), dtype=np.int32)
        features = (first[:, None] + np.arange(c.frame_tokens, dtype=np.int32)).reshape(-1)
        return Expansion(self.video_placeholder * len(features), features, len(times), self.blank.canvas, video=True)

    def pixels(self, frames: Sequence[PIL.Image.Image], times: Sequence[float] | None = None) -> UInt8[np.ndarray, "m Y W 3"]:
        if times is None:
            return self._still.pixels(frames)
        plain = {"do_convert_rgb": True, "do_rescale": False, "do_normalize": False}
        return np.concatenate([as_tiles(self._frames.preprocess(frame, **plain), self.blank.canvas) for frame in frames])


def frame_processor(directory: Path) -> Any:
    """The directory's video processor, which transformers has for torchvision only, as an image processor with the same values on PIL.

    Raises:
      UserError: there is none, or its values are not those of an image processor.
    """
    import transformers  # late: it takes seconds, and a mistake in a config should be told at once

    values = video_values(directory)
    if values is None:
        raise UserError(f"{directory}: no video processor; expected processor_config.json with a video_processor, or video_preprocessor_config.json")
    try:
        return transformers.CLIPImageProcessorPil(**{name: values[name] for name in _STEPS if name in values})
    except (TypeError, ValueError) as error:
        raise UserError(f"{directory}: the video processor cannot be loaded ({error})") from error


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    still = llava_next.pictures(directory, config, tokenizer)
    return Frames(still, frame_processor(directory), tokenizer.convert_ids_to_tokens(config.video_token_id), config)


FAMILY = Family(
    model_type="llava_next_video",
    architecture="LlavaNextVideoForConditionalGeneration",
    processor_class="LlavaNextVideoProcessor",
    read=read,
    names=llava_next.names,
    pictures=pictures,
    processor_values=llava.processor_values,
)
