"""CLIP and SigLIP towers: `vision_config` to `VisionConfig`, and the names of their tensors. Several families have one of the two."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mmalign_jax.hf.decoders import ACTIVATIONS, expect
from mmalign_jax.hf.names import Entry, linear, norm
from mmalign_jax.models.config import MllmConfig, VisionConfig

# Defaults of transformers' config classes, for keys that a config.json leaves out.
_CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
DEFAULTS = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_LAYER = "vision.encoder.layers.{}."


def read_tower(values: Mapping[str, Any], where: str, *, kinds: tuple[str, ...], post_norm: bool = False) -> VisionConfig:
    """Reads the `vision_config` of a CLIP or SigLIP tower.

    Args:
      kinds: the `model_type`s that this family may have; the first is that of a config without one.
      post_norm: features are taken behind the tower's last norm.

    Raises:
      UserError: a kind or an activation that is not supported; the message names the key.
    """
    kind = values.get("model_type", kinds[0])
    expect(kind, kinds, "vision_config.model_type", where)
    clip = kind == "clip_vision_model"
    v = DEFAULTS["clip_vision_model" if clip else "siglip_vision_model"] | dict(values)
    expect(v["hidden_act"], ACTIVATIONS, "vision_config.hidden_act", where)
    return VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        width=v["hidden_size"],
        mlp_width=v["intermediate_size"],
        layers=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        norm_eps=v["layer_norm_eps"],
        activation=v["hidden_act"],
        patch_bias=not clip,
        class_token=clip,
        pre_norm=clip,
        post_norm=post_norm,
    )


def patch_entry(v: VisionConfig, name: str) -> tuple[Entry, ...]:
    """A convolution (out, channel, row, column) as a product with flattened patches (row, column, channel)."""
    side, path = v.patch_size, ("vision_tower", "embedding", "patch")
    shapes = ((v.width, 3, side, side), (side * side * 3, v.width))
    kernel = Entry((*path, "kernel"), f"{name}.weight", *shapes, (2, 3, 1, 0))
    return (kernel, Entry((*path, "bias"), f"{name}.bias", (v.width,), (v.width,))) if v.patch_bias else (kernel,)


def layer_entries(v: VisionConfig, count: int, part: str = "vision_tower", name: str = _LAYER) -> tuple[Entry, ...]:
    """The first `count` layers of a tower, by reduced name with `{}` for the layer."""
    split, path = (v.heads, v.width // v.heads), (part, "layers")
    return (
        *norm((*path, "norm1"), name + "layer_norm1", v.width, True, count),
        *linear((*path, "attention", "query"), name + "self_attn.q_proj", (v.width,), split, True, count),
        *linear((*path, "attention", "key"), name + "self_attn.k_proj", (v.width,), split, True, count),
        *linear((*path, "attention", "value"), name + "self_attn.v_proj", (v.width,), split, True, count),
        *linear((*path, "attention", "out"), name + "self_attn.out_proj", split, (v.width,), True, count),
        *norm((*path, "norm2"), name + "layer_norm2", v.width, True, count),
        *linear((*path, "mlp", "up"), name + "mlp.fc1", (v.width,), (v.mlp_width,), True, count),
        *linear((*path, "mlp", "down"), name + "mlp.fc2", (v.mlp_width,), (v.width,), True, count),
    )


def tower_entries(config: MllmConfig) -> tuple[Entry, ...]:
    """Every tensor of the tower that the tree holds, by reduced name."""
    return entries_of(config.vision, config.used_vision_layers)


def entries_of(v: VisionConfig, count: int) -> tuple[Entry, ...]:
    """`tower_entries` of a tower whose first `count` layers are used."""
    embedding = ("vision_tower", "embedding")
    positions = (v.patches + int(v.class_token), v.width)
    entries = [
        *patch_entry(v, "vision.embeddings.patch_embedding"),
        Entry((*embedding, "positions"), "vision.embeddings.position_embedding.weight", positions, positions),
        *layer_entries(v, count),
    ]
    if v.class_token:
        entries.append(Entry((*embedding, "class_token"), "vision.embeddings.class_embedding", (v.width,), (v.width,)))
    if v.pre_norm:
        entries += norm((*embedding, "pre_norm"), "vision.pre_layrnorm", v.width, True, None)  # misspelt in CLIP itself
    if v.post_norm:
        entries += norm(("vision_tower", "post_norm"), "vision.post_layernorm", v.width, True, None)
    return tuple(entries)


def tower_behind(config: MllmConfig) -> tuple[Entry, ...]:
    """What a complete checkpoint has besides: the layers behind the last that is used, and the last norm."""
    used, total = config.used_vision_layers, config.vision.layers
    entries = layer_entries(config.vision, used)
    layers = [dataclasses.replace(entry, name=entry.name.format(n), layers=None) for entry in entries for n in range(used, total)]
    last = () if config.vision.post_norm else norm(("vision_tower", "post_norm"), "vision.post_layernorm", config.vision.width, True, None)
    return (*layers, *last)


def tower_unused(reduced: str, config: MllmConfig) -> bool:
    """Whether a tensor of the tower, or an old buffer, may be there though nothing depends on it."""
    if reduced in ("vision.post_layernorm.weight", "vision.post_layernorm.bias"):
        return not config.vision.post_norm
    # SigLIP's pooling head, which no family uses
    if reduced.startswith("vision.head."):
        return not config.vision.class_token
    if reduced.startswith(("vision.", "decoder.")) and reduced.endswith((".position_ids", "rotary_emb.inv_freq")):
        return True
    layer = re.fullmatch(r"vision\.encoder\.layers\.(\d+)\.(.+)", reduced)
    tensors = {entry.name.removeprefix(_LAYER) for entry in layer_entries(config.vision, config.used_vision_layers)}
    return layer is not None and config.used_vision_layers <= int(layer[1]) < config.vision.layers and layer[2] in tensors
