"""The one table between our LLaVA parameter tree and Hugging Face tensor names, read in both directions.

Three layouts of the same tensors exist; a name is first reduced to `part.rest`, which is the same in all of them:

  part        hub files                      fresh transformers 5 model    transformers' module names
  decoder     language_model.model.          language_model.model.         model.language_model.
  head        language_model.lm_head.        language_model.lm_head.       lm_head.
  vision      vision_tower.vision_model.     vision_tower.                 model.vision_tower.
  projector   multi_modal_projector.         multi_modal_projector.        model.multi_modal_projector.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from mmalign_jax.errors import UserError
from mmalign_jax.models.config import LlavaConfig

Path = tuple[str, ...]

_PREFIXES = {
    "language_model.model.": "decoder.",
    "model.language_model.": "decoder.",
    "language_model.lm_head.": "head.",
    "lm_head.": "head.",
    "vision_tower.vision_model.": "vision.",
    "vision_tower.": "vision.",
    "model.vision_tower.vision_model.": "vision.",
    "model.vision_tower.": "vision.",
    "multi_modal_projector.": "projector.",
    "model.multi_modal_projector.": "projector.",
}

EMBEDDING, HEAD = "decoder.embed_tokens.weight", "head.weight"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of the tree and the tensor, or one tensor a layer, that it is made of.

    Args:
      path: of the leaf.
      name: reduced name, with `{}` for the layer in stacked leaves.
      hf_shape: of each tensor.
      shape: of our leaf, without the layer axis.
      axes: order of the tensor's dimensions before it is reshaped to `shape`; () leaves them.
      layers: tensors along the leading axis of the leaf, or None for a leaf without that axis.
    """

    path: Path
    name: str
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    layers: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.layers is None else tuple(self.name.format(layer) for layer in range(self.layers))

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        return self.shape if self.layers is None else (self.layers, *self.shape)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.transpose(self.axes) if self.axes else tensor).reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        if not self.axes:
            return array.reshape(self.hf_shape)
        return array.reshape([self.hf_shape[axis] for axis in self.axes]).transpose(np.argsort(self.axes))


def reduce_name(name: str) -> str | None:
    """`part.rest` of a tensor's name in any layout, or None when it belongs to no part of LLaVA."""
    found = max((prefix for prefix in _PREFIXES if name.startswith(prefix)), key=len, default=None)
    return None if found is None else _PREFIXES[found] + name.removeprefix(found)


def hub_name(reduced: str) -> str:
    """The name of a reduced name in the hub's layout."""
    part, rest = reduced.split(".", 1)
    return next(prefix for prefix, found in _PREFIXES.items() if found == f"{part}.") + rest


def is_unused(reduced: str, config: LlavaConfig) -> bool:
    """Whether a tensor of this name may be in a checkpoint though no feature and no logit depends on it. Exports copy it."""
    if reduced in ("vision.post_layernorm.weight", "vision.post_layernorm.bias"):
        return True
    if reduced.startswith(("vision.", "decoder.")) and reduced.endswith((".position_ids", "rotary_emb.inv_freq")):
        return True
    if reduced == HEAD and config.decoder.tied_head:
        return True
    layer = re.fullmatch(r"vision\.encoder\.layers\.(\d+)\.(.+)", reduced)
    tensors = {entry.name.removeprefix(_VISION_LAYER) for entry in _vision_layer(config)}
    return layer is not None and config.used_vision_layers <= int(layer[1]) < config.vision.layers and layer[2] in tensors


def entries(config: LlavaConfig) -> tuple[Entry, ...]:
    """Every leaf of the parameter tree of `config`."""
    return (*_vision(config), *_projector(config), *_decoder(config))


def all_entries(config: LlavaConfig) -> tuple[Entry, ...]:
    """`entries` and the tensors that a LLaVA checkpoint has besides: the tower's last layers and norm."""
    used, total = config.used_vision_layers, config.vision.layers
    behind = [
        dataclasses.replace(entry, name=entry.name.format(layer), layers=None)
        for entry in _vision_layer(config)
        for layer in range(used, total)
    ]
    norm = _norm(("vision_tower", "post_norm"), "vision.post_layernorm", config.vision.width, True, None)
    return (*entries(config), *behind, *norm)


def tree(leaves: Mapping[Path, object]) -> dict:
    """The nested dict of leaves by path."""
    root: dict = {}
    for path, leaf in leaves.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return root


def leaf_at(params: Mapping, path: Path) -> object:
    """The leaf of a nested dict.

    Raises:
      UserError: there is none; the message names the path.
    """
    node: object = params
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            raise UserError(f"the parameters have no {'/'.join(path)}, which the checkpoint's config asks for")
        node = node[key]
    return node


def _linear(path: Path, name: str, ins: tuple[int, ...], outs: tuple[int, ...], bias: bool, layers: int | None) -> tuple[Entry, ...]:
    """A torch Linear (out, in) as our kernel (in, out), either side of it split into several dimensions."""
    fan_in, fan_out = math.prod(ins), math.prod(outs)
    kernel = Entry((*path, "kernel"), f"{name}.weight", (fan_out, fan_in), (*ins, *outs), (1, 0), layers)
    return (kernel, Entry((*path, "bias"), f"{name}.bias", (fan_out,), outs, (), layers)) if bias else (kernel,)


def _norm(path: Path, name: str, width: int, bias: bool, layers: int | None) -> tuple[Entry, ...]:
    scale = Entry((*path, "scale"), f"{name}.weight", (width,), (width,), (), layers)
    return (scale, Entry((*path, "bias"), f"{name}.bias", (width,), (width,), (), layers)) if bias else (scale,)


_VISION_LAYER = "vision.encoder.layers.{}."


def _vision_layer(config: LlavaConfig) -> tuple[Entry, ...]:
    v, count = config.vision, config.used_vision_layers
    split = (v.heads, v.width // v.heads)
    path, name = ("vision_tower", "layers"), _VISION_LAYER
    return (
        *_norm((*path, "norm1"), name + "layer_norm1", v.width, True, count),
        *_linear((*path, "attention", "query"), name + "self_attn.q_proj", (v.width,), split, True, count),
        *_linear((*path, "attention", "key"), name + "self_attn.k_proj", (v.width,), split, True, count),
        *_linear((*path, "attention", "value"), name + "self_attn.v_proj", (v.width,), split, True, count),
        *_linear((*path, "attention", "out"), name + "self_attn.out_proj", split, (v.width,), True, count),
        *_norm((*path, "norm2"), name + "layer_norm2", v.width, True, count),
        *_linear((*path, "mlp", "up"), name + "mlp.fc1", (v.width,), (v.mlp_width,), True, count),
        *_linear((*path, "mlp", "down"), name + "mlp.fc2", (v.mlp_width,), (v.width,), True, count),
    )


def _vision(config: LlavaConfig) -> tuple[Entry, ...]:
    v, top = config.vision, ("vision_tower",)
    side, positions = v.patch_size, (1 + v.patches, v.width)
    convolution, patches = (v.width, 3, side, side), (side * side * 3, v.width)
    return (
        Entry((*top, "class_embedding"), "vision.embeddings.class_embedding", (v.width,), (v.width,)),
        # a convolution (out, channel, row, column) as a product with flattened patches (row, column, channel)
        Entry((*top, "patch_embedding", "kernel"), "vision.embeddings.patch_embedding.weight", convolution, patches, (2, 3, 1, 0)),
        Entry((*top, "position_embedding"), "vision.embeddings.position_embedding.weight", positions, positions),
        *_norm((*top, "pre_norm"), "vision.pre_layrnorm", v.width, True, None),  # the name is misspelt in CLIP itself
        *_vision_layer(config),
    )


def _projector(config: LlavaConfig) -> tuple[Entry, ...]:
    features, width, bias = config.vision.width * len(config.feature_layers), config.decoder.width, config.projector_bias
    return (
        *_linear(("projector", "fc1"), "projector.linear_1", (features,), (width,), bias, None),
        *_linear(("projector", "fc2"), "projector.linear_2", (width,), (width,), bias, None),
    )


def _decoder(config: LlavaConfig) -> tuple[Entry, ...]:
    d, count = config.decoder, config.decoder.layers
    path, name = ("decoder", "layers"), "decoder.layers.{}."
    query, key = (d.heads, d.head_width), (d.kv_heads, d.head_width)
    vocabulary = (d.vocab_size, d.width)
    head = () if d.tied_head else _linear(("decoder", "head"), "head", (d.width,), (d.vocab_size,), False, None)
    return (
        Entry(("decoder", "embed", "embedding"), EMBEDDING, vocabulary, vocabulary),
        *_norm((*path, "input_norm"), name + "input_layernorm", d.width, False, count),
        *_linear((*path, "attention", "query"), name + "self_attn.q_proj", (d.width,), query, d.attention_bias, count),
        *_linear((*path, "attention", "key"), name + "self_attn.k_proj", (d.width,), key, d.attention_bias, count),
        *_linear((*path, "attention", "value"), name + "self_attn.v_proj", (d.width,), key, d.attention_bias, count),
        *_linear((*path, "attention", "out"), name + "self_attn.o_proj", query, (d.width,), d.attention_bias, count),
        *_norm((*path, "post_norm"), name + "post_attention_layernorm", d.width, False, count),
        *_linear((*path, "mlp", "gate"), name + "mlp.gate_proj", (d.width,), (d.mlp_width,), d.mlp_bias, count),
        *_linear((*path, "mlp", "up"), name + "mlp.up_proj", (d.width,), (d.mlp_width,), d.mlp_bias, count),
        *_linear((*path, "mlp", "down"), name + "mlp.down_proj", (d.mlp_width,), (d.width,), d.mlp_bias, count),
        *_norm(("decoder", "final_norm"), "decoder.norm", d.width, False, None),
        *head,
    )
