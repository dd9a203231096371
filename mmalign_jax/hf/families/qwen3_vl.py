"""Qwen3-VL (arXiv 2511.21631): learned positions resampled to the picture, DeepStack, interleaved M-RoPE, times of frames as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmalign_jax.errors import UserError
from mmalign_jax.hf import any_size, qwen_towers
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.names import NameTable
from mmalign_jax.hf.pictures import Pictures, load_image_processor
from mmalign_jax.hf.qwen_towers import VISION_END, VISION_START
from mmalign_jax.models.config import MllmConfig

PREFIXES = {
    "model.visual.merger.": "projector.",
    "model.visual.deepstack_merger_list.": "projector.deepstack_merger_list.",
    "model.visual.": "vision.",
    "model.language_model.": "decoder.",
    "lm_head.": "head.",
}

# Defaults of transformers' config class, for keys that a config.json leaves out.
_TOWER = {
    "depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24),
}  # fmt: skip
_VIDEO = {"size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}, "max_video_tokens": 768}


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    """Sizes and switches of a `config.json`; raises UserError that names the key of what is not supported."""
    v = _TOWER | dict(config.get("vision_config") or {})
    taps = tuple(v["deepstack_visual_indexes"])
    if list(taps) != sorted(set(taps)) or any(tap not in range(v["depth"]) for tap in taps):
        raise UserError(f"{where}: vision_config.deepstack_visual_indexes {list(taps)} must rise and name layers of the tower")
    vision = qwen_towers.read_tower(
        v,
        where,
        width=v["hidden_size"],
        mlp_width=v["intermediate_size"],
        patch_bias=True,
        positions="interpolated",
        position_side=int(v["num_position_embeddings"] ** 0.5),
        taps=taps,
    )
    return qwen_towers.assemble(config, where, vision, qwen_towers.read_text(config, where, "qwen3_vl_text"), v["out_hidden_size"])


def names(config: MllmConfig) -> NameTable:
    mlp = {"up": "linear_fc1", "down": "linear_fc2"}
    return qwen_towers.name_table(config, PREFIXES, mlp, ("norm", "linear_fc1", "linear_fc2"))


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    """Pictures and videos; the prompt says the time in front of each step of a video."""
    images, v = load_image_processor(directory), config.vision
    values, (low, high) = any_size.video_limits(directory, images, _VIDEO)
    image, video = tokenizer.convert_ids_to_tokens([config.image_token_id, config.video_token_id])
    factor, depth = v.patch_size * v.merge, v.frames_per_patch

    def size(frames: int, height: int, width: int) -> tuple[int, int]:
        most = high
        if values.get("cap_pixels_per_frame"):
            most = frames * max(min(values["max_video_tokens"] * factor**2, high // frames), int(low * 1.05))
        return any_size.smart_resize_video(frames, height, width, factor, depth, low, most)

    def text(times: Sequence[float], tokens: int) -> str:
        # the template writes a start and an end around all of it, as it does around pictures
        last = len(times) - 1
        steps = ((times[first] + times[min(first + depth - 1, last)]) / 2 for first in range(0, len(times), depth))
        return "".join(f"<{time:.1f} seconds>{VISION_START}{video * tokens}{VISION_END}" for time in steps)

    def clock(times: Sequence[float]) -> np.ndarray:
        """Every step is a run of its own, which starts at zero."""
        return np.zeros(-(-len(times) // depth), np.int32)

    return any_size.AnySizePictures(images, v, (image, video), any_size.Videos(size, clock, text))


def processor_values(config: MllmConfig, image_token: str) -> Mapping[str, Any]:
    return {}


FAMILY = Family(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    processor_class="Qwen3VLProcessor",
    read=read,
    names=names,
    pictures=pictures,
    processor_values=processor_values,
)
