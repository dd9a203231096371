"""The benchmark's own model: a LLaVA of 63 million parameters with random weights, 576 image tokens and LLaVA's vocabulary size."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from mmalign_jax.benchmark import words
from mmalign_jax.hf.fresh import write_fresh
from mmalign_jax.scenes import language

NAME = "random LLaVA, 63M"


def hf_config(side: int = 336, small: bool = False, large_tower: bool = False) -> dict[str, Any]:
    """`config.json`: a Llama of 8 layers, width 512, behind a CLIP tower of 6 layers, width 256, `side` pixels in patches of 14.

    Args:
      small: 2 layers of width 128 behind 2 of width 64, 9 million parameters, nearly all of them of the vocabulary; its tower comes first.
      large_tower: a tower of 12 layers, width 512, 38 million parameters.
    """
    config = _large(side)
    if large_tower:
        config["vision_config"] |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    if small:
        config["vision_config"] |= {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
        config["text_config"] |= {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2}
        config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    return config


def _large(side: int) -> dict[str, Any]:
    return {
        "image_token_index": language.SPECIAL_TOKENS.index(language.IMAGE_TOKEN),
        "vision_feature_layer": -2,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
            "num_attention_heads": 4, "image_size": side, "patch_size": 14, "projection_dim": 256,
        },
        "text_config": {
            "model_type": "llama", "vocab_size": words.VOCABULARY, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
            "bos_token_id": language.SPECIAL_TOKENS.index(language.BOS), "eos_token_id": language.SPECIAL_TOKENS.index(language.EOS),
            "pad_token_id": language.SPECIAL_TOKENS.index(language.PAD),
        },
    }  # fmt: skip


def write_model(directory: pathlib.Path, config: Mapping[str, Any] | None = None, seed: int = 0) -> pathlib.Path:
    """Writes a model with random weights and the benchmark's tokenizer, and returns its directory.

    Args:
      directory: missing or empty.
      config: as `hf_config`, which it is when None.
    """
    config = hf_config() if config is None else config
    size = config["text_config"]["vocab_size"]
    return write_fresh(directory, config, seed, functools.partial(words.write_tokenizer, size=size))
