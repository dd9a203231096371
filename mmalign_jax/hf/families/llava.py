"""LLaVA-1.5 (arXiv 2310.03744): CLIP, two-layer projector, Llama or another decoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign_jax.hf import decoders, towers
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.names import HEAD, LLAVA_PREFIXES, Entry, NameTable, linear
from mmalign_jax.hf.pictures import Pictures, SingleTile, load_image_processor
from mmalign_jax.models.config import ConnectorConfig, MllmConfig

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
TOWERS = ("clip_vision_model", "siglip_vision_model")

PREFIXES = LLAVA_PREFIXES | {
    # files of LLaVA's own code
    "model.layers.": "decoder.layers.",
    "model.embed_tokens.": "decoder.embed_tokens.",
    "model.norm.": "decoder.norm.",
    "model.mm_projector.0.": "projector.linear_1.",
    "model.mm_projector.2.": "projector.linear_2.",
    "model.vision_tower.vision_tower.vision_model.": "vision.",
}


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    """Sizes and switches of a LLaVA `config.json`; raises UserError that names the key of what is not supported."""
    decoders.expect(config.get("vision_feature_select_strategy", "default"), ("default", "full"), "vision_feature_select_strategy", where)
    decoders.expect(config.get("projector_hidden_act", "gelu"), decoders.ACTIVATIONS, "projector_hidden_act", where)
    layers = config.get("vision_feature_layer", -2)
    vision = towers.read_tower(config.get("vision_config", {}), where, kinds=TOWERS)
    full = config.get("vision_feature_select_strategy", "default") == "full"
    if not full and not vision.class_token:
        # transformers would cut off the first patch; no checkpoint means that
        decoders.expect("default", ("full",), "vision_feature_select_strategy of a tower without a class token", where)
    tied = config.get("tie_word_embeddings")
    return MllmConfig(
        family=config["model_type"],
        decoder=decoders.read_decoder(config.get("text_config", {}), where, kinds=DECODERS, tied=tied),
        vision=vision,
        connector=ConnectorConfig(
            kind="mlp",
            activation=config.get("projector_hidden_act", "gelu"),
            bias=config.get("multimodal_projector_bias", True),
        ),
        image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
        feature_layers=(layers,) if isinstance(layers, int) else tuple(layers),
        keep_class_token=full and vision.class_token,
    )


def projector_entries(config: MllmConfig) -> tuple[Entry, ...]:
    features, width, bias = config.vision.width * len(config.feature_layers), config.decoder.width, config.connector.bias
    return (
        *linear(("projector", "fc1"), "projector.linear_1", (features,), (width,), bias, None),
        *linear(("projector", "fc2"), "projector.linear_2", (width,), (width,), bias, None),
    )


def names(config: MllmConfig) -> NameTable:
    def unused(reduced: str) -> bool:
        return (reduced == HEAD and config.decoder.tied_head) or towers.tower_unused(reduced, config)

    entries = (*towers.tower_entries(config), *projector_entries(config), *decoders.decoder_entries(config.decoder))
    return NameTable(PREFIXES, entries, towers.tower_behind(config), unused)


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    return SingleTile(load_image_processor(directory), token, config.image_tokens, (config.vision.image_size,) * 2)


def processor_values(config: MllmConfig, image_token: str) -> Mapping[str, Any]:
    return {
        "image_token": image_token,
        "num_additional_image_tokens": int(config.vision.class_token),  # the strategy "default" then takes it away
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "full" if config.keep_class_token or not config.vision.class_token else "default",
    }


FAMILY = Family(
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    processor_class="LlavaProcessor",
    read=read,
    names=names,
    pictures=pictures,
    processor_values=processor_values,
)
