"""The families of models, by the `model_type` of their `config.json`: one file each, for what is a family's own."""

from collections.abc import Mapping
from typing import Any

from mmalign_jax.errors import UserError
from mmalign_jax.hf.families import (
    gemma3,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_next_video,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
)
from mmalign_jax.hf.family import Family
from mmalign_jax.models.config import MllmConfig

_ALL = (llava, llava_next, llava_next_video, idefics3, smolvlm, internvl, gemma3, paligemma, qwen2_vl, qwen2_5_vl, qwen3_vl)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _ALL}


def read(config: Mapping[str, Any], where: str = "config.json") -> MllmConfig:
    """The sizes and switches of a model from its `config.json`.

    Raises:
      UserError: another model type, or a switch that the family's models do not have; the message names the key.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type is {kind!r}; supported: {', '.join(FAMILIES)}")
    if "text_config" not in config and "mm_vision_tower" in config:
        raise UserError(
            f"{where}: this is the config of LLaVA's own code, which does not describe its vision tower; give the config.json of the same "
            "model in transformers' form (text_config, vision_config) beside these weights, their names are read as they are"
        )
    return FAMILIES[kind].read(config, where)


def of(config: MllmConfig) -> Family:
    return FAMILIES[config.family]
