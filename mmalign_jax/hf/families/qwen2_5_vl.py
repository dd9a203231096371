"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with windows in its tower, and with the times of frames in M-RoPE."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from mmalign_jax.hf import qwen_towers
from mmalign_jax.hf.families import qwen2_vl
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.files import read_json
from mmalign_jax.hf.pictures import Pictures
from mmalign_jax.models.config import MllmConfig

# Defaults of transformers' config class, for keys that a config.json leaves out.
_TOWER = {
    "depth": 32, "hidden_size": 3584, "hidden_act": "silu", "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31), "tokens_per_second": 4,
}  # fmt: skip


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    """Sizes and switches of a `config.json`; raises UserError that names the key of what is not supported."""
    v = _TOWER | dict(config.get("vision_config") or {})
    vision = qwen_towers.read_tower(
        v,
        where,
        width=v["hidden_size"],
        mlp_width=v["intermediate_size"],
        norm="rms",
        positions="none",
        gated=True,
        window=v["window_size"] // v["spatial_merge_size"] // v["patch_size"],
        full_layers=tuple(v["fullatt_block_indexes"]),
    )
    return qwen_towers.assemble(config, where, vision, qwen_towers.read_text(config, where, "qwen2_5_vl_text"), v["out_hidden_size"])


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    v = _TOWER | dict(read_json(directory / "config.json").get("vision_config") or {})

    def clock(times: Sequence[float]) -> Int32[np.ndarray, " t"]:
        """Time itself, in units of `tokens_per_second`; what is short of a unit by no more than rounding counts as whole."""
        seconds = np.array(times[:: config.vision.frames_per_patch]) - times[0]
        return np.floor(seconds * v["tokens_per_second"] + 1e-6).astype(np.int32)

    return qwen2_vl.timed_pictures(directory, config, tokenizer, clock)


FAMILY = Family(
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    processor_class="Qwen2_5_VLProcessor",
    read=read,
    names=qwen2_vl.names,
    pictures=pictures,
    processor_values=qwen2_vl.processor_values,
)
