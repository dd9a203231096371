"""Sizes and switches of a model, read from a Hugging Face `config.json` (old and new spelling)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmalign_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. `kind` is default, linear or llama3; factors as in transformers' rope_parameters."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Llama or Mistral decoder; `sliding_window` counts positions, None is full attention."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    norm_eps: float
    rope: RopeConfig
    max_positions: int
    activation: str = "silu"
    tied_head: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower."""

    image_size: int
    patch_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    norm_eps: float
    activation: str = "quick_gelu"

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA model: vision tower, two-layer projector, decoder (arXiv 2304.08485, 2310.03744)."""

    decoder: DecoderConfig
    vision: VisionConfig
    image_token_id: int
    feature_layers: tuple[int, ...] = (-2,)  # hidden states that are concatenated; 0 is the embedding, -1 the last layer's output
    keep_class_token: bool = False  # feature strategy "full" instead of "default"
    projector_activation: str = "gelu"
    projector_bias: bool = True

    @property
    def image_tokens(self) -> int:
        """N, image tokens of one image."""
        return self.vision.patches + int(self.keep_class_token)

    @property
    def used_vision_layers(self) -> int:
        """Layers of the tower that reach the features; those behind them are neither built nor trained, only copied on export."""
        return max(layer if layer >= 0 else self.vision.layers + 1 + layer for layer in self.feature_layers)


# Defaults of transformers' CLIPVisionConfig, LlamaConfig and MistralConfig, for keys that a config.json leaves out.
_VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "rope_theta": 10000.0, "sliding_window": None, "num_key_value_heads": None,
}  # fmt: skip
_MISTRAL_DEFAULTS = _LLAMA_DEFAULTS | {
    "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
}  # fmt: skip


# Names of `models.layers.activation`.
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> LlavaConfig:
    """Reads a LLaVA `config.json`.

    Raises:
      UserError: another model type, or a switch that this model does not have; the message names the key.
    """
    _expect(config.get("model_type"), ("llava",), "model_type", where)
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    _expect(vision.get("model_type", "clip_vision_model"), ("clip_vision_model",), "vision_config.model_type", where)
    _expect(config.get("vision_feature_select_strategy", "default"), ("default", "full"), "vision_feature_select_strategy", where)
    _expect(config.get("projector_hidden_act", "gelu"), _ACTIVATIONS, "projector_hidden_act", where)
    _expect(text.get("hidden_act", "silu"), _ACTIVATIONS, "text_config.hidden_act", where)
    _expect(vision.get("hidden_act", "quick_gelu"), _ACTIVATIONS, "vision_config.hidden_act", where)
    layers = config.get("vision_feature_layer", -2)
    image_token_id = config.get("image_token_index", config.get("image_token_id", 32000))
    return LlavaConfig(
        # transformers lets either place ask for tying
        decoder=_decoder(text, where, tied=bool(config.get("tie_word_embeddings", False))),
        vision=_vision(vision),
        image_token_id=image_token_id,
        feature_layers=(layers,) if isinstance(layers, int) else tuple(layers),
        keep_class_token=config.get("vision_feature_select_strategy", "default") == "full",
        projector_activation=config.get("projector_hidden_act", "gelu"),
        projector_bias=config.get("multimodal_projector_bias", True),
    )


def _expect(value: Any, allowed: tuple, key: str, where: str) -> None:
    if value not in allowed:
        raise UserError(f"{where}: {key} is {value!r}; supported: {', '.join(map(str, allowed))}")


def _vision(values: Mapping[str, Any]) -> VisionConfig:
    v = _VISION_DEFAULTS | dict(values)
    return VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        width=v["hidden_size"],
        mlp_width=v["intermediate_size"],
        layers=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        norm_eps=v["layer_norm_eps"],
        activation=v["hidden_act"],
    )


def _decoder(values: Mapping[str, Any], where: str, tied: bool) -> DecoderConfig:
    kind = values.get("model_type", "llama")
    _expect(kind, ("llama", "mistral"), "text_config.model_type", where)
    t = (_MISTRAL_DEFAULTS if kind == "mistral" else _LLAMA_DEFAULTS) | dict(values)
    heads = t["num_attention_heads"]
    return DecoderConfig(
        vocab_size=t["vocab_size"],
        width=t["hidden_size"],
        mlp_width=t["intermediate_size"],
        layers=t["num_hidden_layers"],
        heads=heads,
        kv_heads=t["num_key_value_heads"] or heads,
        head_width=t.get("head_dim") or t["hidden_size"] // heads,
        norm_eps=t["rms_norm_eps"],
        rope=_rope(t, where),
        max_positions=t["max_position_embeddings"],
        activation=t["hidden_act"],
        tied_head=tied or bool(t["tie_word_embeddings"]),
        attention_bias=t["attention_bias"],
        mlp_bias=t["mlp_bias"],
        sliding_window=t["sliding_window"] if kind == "mistral" else None,
    )


def _rope(t: Mapping[str, Any], where: str) -> RopeConfig:
    # transformers 5 writes rope_parameters; 4 wrote rope_theta beside rope_scaling
    scaling = dict(t.get("rope_parameters") or t.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    _expect(kind, ("default", "linear", "llama3"), "text_config.rope_parameters.rope_type", where)
    return RopeConfig(
        theta=float(scaling.get("rope_theta", t["rope_theta"])),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_positions=int(scaling.get("original_max_position_embeddings", t["max_position_embeddings"])),
    )
