"""Qwen2-VL (arXiv 2409.12191): pictures of any size, M-RoPE."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from mmalign_jax.hf import any_size, qwen_towers
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.names import NameTable
from mmalign_jax.hf.pictures import Pictures, load_image_processor
from mmalign_jax.models.config import MllmConfig

PREFIXES = {
    # files on the hub, and what transformers 5 saves; transformers' module names
    "visual.merger.": "projector.",
    "visual.": "vision.",
    "model.": "decoder.",
    "lm_head.": "head.",
    "model.visual.merger.": "projector.",
    "model.visual.": "vision.",
    "model.language_model.": "decoder.",
}

# Defaults of transformers' classes, for keys that a file leaves out.
_TOWER = {
    "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_VIDEO = {"size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}, "max_video_tokens": 128_000}


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    v = _TOWER | dict(config.get("vision_config") or {})
    vision = qwen_towers.read_tower(v, where, width=v["embed_dim"], mlp_width=int(v["embed_dim"] * v["mlp_ratio"]), positions="none")
    return qwen_towers.assemble(config, where, vision, qwen_towers.read_text(config, where, "qwen2_vl_text"), v["hidden_size"])


def names(config: MllmConfig) -> NameTable:
    mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"} if config.vision.gated else {"up": "fc1", "down": "fc2"}
    return qwen_towers.name_table(config, PREFIXES, mlp, ("ln_q", "mlp.0", "mlp.2"))


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    def clock(times: Sequence[float]) -> Int32[np.ndarray, " t"]:
        """Steps are numbered; when they are shown does not matter."""
        return np.arange(-(-len(times) // config.vision.frames_per_patch), dtype=np.int32)

    return timed_pictures(directory, config, tokenizer, clock)


def timed_pictures(
    directory: Path, config: MllmConfig, tokenizer: Any, clock: Callable[[Sequence[float]], Int32[np.ndarray, " t"]]
) -> Pictures:
    """Pictures, and videos that stand in the prompt as one run of tokens.

    Args:
      clock: see `any_size.Videos`.
    """
    images, v = load_image_processor(directory), config.vision
    values, (low, high) = any_size.video_limits(directory, images, _VIDEO)
    image, video = tokenizer.convert_ids_to_tokens([config.image_token_id, config.video_token_id])
    factor = v.patch_size * v.merge

    def size(frames: int, height: int, width: int) -> tuple[int, int]:
        most = high
        if values.get("cap_pixels_per_frame"):
            total = int(values["max_video_tokens"] * factor**2 * 0.9)
            most = max(min(high, total * v.frames_per_patch // frames), int(low * 1.05))
        return any_size.smart_resize(height, width, factor, low, most)

    def text(times: Sequence[float], tokens: int) -> str:
        return video * (tokens * -(-len(times) // v.frames_per_patch))

    return any_size.AnySizePictures(images, v, (image, video), any_size.Videos(size, clock, text))


def processor_values(config: MllmConfig, image_token: str) -> Mapping[str, Any]:
    return {}


FAMILY = Family(
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    processor_class="Qwen2VLProcessor",
    read=read,
    names=names,
    pictures=pictures,
    processor_values=processor_values,
)
