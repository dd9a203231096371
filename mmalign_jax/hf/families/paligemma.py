"""PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555): SigLIP, one linear layer, Gemma 1 or 2 that reads images and prompt in both directions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign_jax.hf import decoders, towers
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.names import HEAD, LLAVA_PREFIXES, NameTable, linear
from mmalign_jax.hf.pictures import Pictures, SingleTile, load_image_processor
from mmalign_jax.models.config import ConnectorConfig, MllmConfig

# Checkpoints have none: transformers' processor writes this text itself, for one prompt and its images.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] != ('user', 'assistant')[loop.index0] -%}"
    "{{ raise_exception('PaliGemma takes one user turn and no other, and its answer') }}"
    "{%- endif -%}"
    "{%- set place = namespace(text=false) -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' and (place.text or message['role'] == 'assistant') -%}"
    "{{ raise_exception('PaliGemma takes images in front of the prompt only') }}"
    "{%- elif part['type'] == 'image' -%}{{ '<image>' }}"
    "{%- else -%}"
    "{%- if message['role'] == 'user' and not place.text -%}{{ bos_token }}{%- endif -%}"
    "{%- set place.text = true -%}{{ part['text'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if message['role'] == 'user' and not place.text -%}{{ bos_token }}{%- endif -%}"
    "{{ '\n' if message['role'] == 'user' else eos_token }}"
    "{%- endfor -%}"
)


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    text = config.get("text_config", {})
    decoder = decoders.read_decoder(text, where, kinds=("gemma", "gemma2"), tied=config.get("tie_word_embeddings", True), bidirectional="prefix")
    decoders.expect(config.get("projection_dim", 2048), (decoder.width,), "projection_dim", where)
    return MllmConfig(
        family="paligemma",
        decoder=decoder,
        vision=towers.read_tower(config.get("vision_config", {}), where, kinds=("siglip_vision_model",), post_norm=True),
        connector=ConnectorConfig(kind="linear"),
        image_token_id=config.get("image_token_index", config.get("image_token_id", 256000)),
    )


def names(config: MllmConfig) -> NameTable:
    def unused(reduced: str) -> bool:
        return (reduced == HEAD and config.decoder.tied_head) or towers.tower_unused(reduced, config)

    projector = linear(("projector", "linear"), "projector.linear", (config.vision.width,), (config.decoder.width,), True, None)
    entries = (*towers.tower_entries(config), *projector, *decoders.decoder_entries(config.decoder))
    return NameTable(LLAVA_PREFIXES, entries, towers.tower_behind(config), unused)


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    return SingleTile(load_image_processor(directory), token, config.image_tokens, (config.vision.image_size,) * 2)


def processor_values(config: MllmConfig, image_token: str) -> Mapping[str, Any]:
    return {}


FAMILY = Family(
    model_type="paligemma",
    architecture="PaliGemmaForConditionalGeneration",
    processor_class="PaliGemmaProcessor",
    read=read,
    names=names,
    pictures=pictures,
    processor_values=processor_values,
    chat_template=CHAT_TEMPLATE,
)
