"""Gemma 3 (arXiv 2503.19786): SigLIP, averaged to a fixed number of image tokens, Gemma 3 decoder with windowed layers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign_jax.errors import UserError
from mmalign_jax.hf import decoders, towers
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.names import HEAD, LLAVA_PREFIXES, Entry, NameTable, norm
from mmalign_jax.hf.pictures import Pictures, SingleTile, load_image_processor
from mmalign_jax.models.config import ConnectorConfig, MllmConfig


def read(config: Mapping[str, Any], where: str) -> MllmConfig:
    """`Family.read`. A tile's patches are averaged in equal squares, so only some numbers of image tokens are possible."""
    vision = towers.read_tower(config.get("vision_config", {}), where, kinds=("siglip_vision_model",), post_norm=True)
    side, tokens = vision.image_size // vision.patch_size, config.get("mm_tokens_per_image", 256)
    squares = tuple(count * count for count in range(1, side + 1) if side % count == 0)
    decoders.expect(tokens, squares, f"mm_tokens_per_image for {side} x {side} patches", where)
    return MllmConfig(
        family="gemma3",
        decoder=decoders.read_decoder(
            config.get("text_config", {}),
            where,
            kinds=("gemma3_text",),
            tied=config.get("tie_word_embeddings", True),
            bidirectional="image",
        ),
        vision=vision,
        connector=ConnectorConfig(kind="pool", bias=False, scale=side // math.isqrt(tokens), norm_eps=vision.norm_eps),
        image_token_id=config.get("image_token_index", config.get("image_token_id", 262144)),
    )


def names(config: MllmConfig) -> NameTable:
    def unused(reduced: str) -> bool:
        return (reduced == HEAD and config.decoder.tied_head) or towers.tower_unused(reduced, config)

    matrix = (config.vision.width, config.decoder.width)
    projector = (
        *norm(("projector", "norm"), "projector.mm_soft_emb_norm", config.vision.width, False, None),
        # a bare parameter (in, out), not a Linear
        Entry(("projector", "linear", "kernel"), "projector.mm_input_projection_weight", matrix, matrix),
    )
    entries = (*towers.tower_entries(config), *projector, *decoders.decoder_entries(config.decoder))
    return NameTable(LLAVA_PREFIXES, entries, towers.tower_behind(config), unused)


def pictures(directory: Path, config: MllmConfig, tokenizer: Any) -> Pictures:
    images = load_image_processor(directory)
    if images.do_pan_and_scan:
        raise UserError(f"{directory}: do_pan_and_scan is set in the image processor's file, where transformers' processor ignores it; unset it")
    image, start, end = (_special(directory, tokenizer, name) for name in ("image_token", "boi_token", "eoi_token"))
    if tokenizer.convert_tokens_to_ids(image) != config.image_token_id:
        raise UserError(f"{directory}: the tokenizer's image_token {image} is not config.json's token {config.image_token_id}")
    around = {"before": f"\n\n{start}", "after": f"{end}\n\n"}
    return SingleTile(images, image, config.image_tokens, (config.vision.image_size,) * 2, placeholder=start, **around)


def _special(directory: Path, tokenizer: Any, name: str) -> str:
    token = getattr(tokenizer, name, None)
    if not isinstance(token, str):
        raise UserError(f"{directory / 'tokenizer_config.json'}: the tokenizer has no {name}")
    return token


def processor_values(config: MllmConfig, image_token: str) -> Mapping[str, Any]:
    return {"image_seq_length": config.image_tokens}


FAMILY = Family(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    processor_class="Gemma3Processor",
    read=read,
    names=names,
    pictures=pictures,
    processor_values=processor_values,
)
