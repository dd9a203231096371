"""The world's model before training: a small LLaVA that `configs/scenes_sft.py` teaches to describe the pictures."""

import json
import pathlib

from mmalign_jax.hf.fresh import Init, write_fresh
from mmalign_jax.scenes import language, world

_BOS, _EOS, _PAD, _IMAGE = (language.SPECIAL_TOKENS.index(token) for token in (language.BOS, language.EOS, language.PAD, language.IMAGE_TOKEN))


def write_initial(directory: str | pathlib.Path, seed: int) -> pathlib.Path:
    """Writes the model with random weights as a Hugging Face directory, with tokenizer and processor.

    The tower's patches are the world's cells. Pixels are centred on the pictures' light ground, so that empty cells are near zero.
    """
    return write_fresh(
        directory,
        hf_config(),
        seed,
        _write_tokenizer,
        init=Init(embedding_std=0.5, position_std=0.5),
        mean=(0.9, 0.9, 0.9),
        std=(0.25, 0.25, 0.25),
    )


def hf_config() -> dict:
    """`config.json` of the world's model."""
    vocabulary = len(language.vocabulary())
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": _IMAGE,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": world.SIZE, "patch_size": world.CELL, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5, "projection_dim": 96,
        },
        "text_config": {
            "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
            "bos_token_id": _BOS, "eos_token_id": _EOS, "pad_token_id": _PAD,
        },
    }  # fmt: skip


def _write_tokenizer(directory: pathlib.Path) -> None:
    language.build_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(language.CHAT_TEMPLATE, encoding="utf-8")
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template")  # it stands in its own file
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
