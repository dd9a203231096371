"""Tables between our parameter tree and Hugging Face tensor names, read in both directions.

Several layouts of the same tensors exist for most families (files on the hub, what a model built by transformers 5 saves, transformers'
module names). A name is first reduced to `part.rest`, with part one of vision, projector, decoder and head, which is the same in all of
them; a family's table then says which leaf of the tree it is.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from mmalign_jax.errors import UserError

Path = tuple[str, ...]

EMBEDDING, HEAD = "decoder.embed_tokens.weight", "head.weight"

# The layouts of families that transformers built like LLaVA: files on the hub; what transformers 5 saves of a model that it built (no
# level `vision_model`); transformers' module names.
LLAVA_PREFIXES = {
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


# Beginning of a reduced name -> beginning of the name of transformers' module, in most families.
MEMORY = {
    "vision.": "model.vision_tower.",
    "projector.": "model.multi_modal_projector.",
    "decoder.": "model.language_model.",
    "head.": "lm_head.",
}


@dataclasses.dataclass(frozen=True)
class NameTable:
    """The names of one model's tensors.

    Args:
      prefixes: beginning of a name in any layout -> beginning of its reduced name; the hub's spelling of each stands first.
      entries: every leaf of the parameter tree.
      behind: tensors of complete checkpoints that no feature and no logit depends on, with their shapes: written to new models.
      unused: whether a reduced name may be in a checkpoint though it is no leaf; exports copy these tensors.
      memory: beginning of a reduced name -> beginning of its name in transformers' modules, by which adapters call it.
    """

    prefixes: Mapping[str, str]
    entries: tuple[Entry, ...]
    behind: tuple[Entry, ...]
    unused: Callable[[str], bool]
    memory: Mapping[str, str] = dataclasses.field(default_factory=lambda: MEMORY)

    def reduce(self, name: str) -> str | None:
        """`part.rest` of a tensor's name in any layout, or None when it belongs to no part of the model."""
        found = max((prefix for prefix in self.prefixes if name.startswith(prefix)), key=len, default=None)
        return None if found is None else self.prefixes[found] + name.removeprefix(found)

    def hub_name(self, reduced: str) -> str:
        """The name of a reduced name in the hub's layout."""
        prefix, found = next((prefix, found) for prefix, found in self.prefixes.items() if reduced.startswith(found))
        return prefix + reduced.removeprefix(found)

    def memory_name(self, reduced: str) -> str:
        """The name of a reduced name in transformers' modules."""
        found = max((part for part in self.memory if reduced.startswith(part)), key=len)
        return self.memory[found] + reduced.removeprefix(found)


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


def linear(path: Path, name: str, ins: tuple[int, ...], outs: tuple[int, ...], bias: bool, layers: int | None) -> tuple[Entry, ...]:
    """A torch Linear (out, in) as our kernel (in, out), either side of it split into several dimensions."""
    fan_in, fan_out = math.prod(ins), math.prod(outs)
    kernel = Entry((*path, "kernel"), f"{name}.weight", (fan_out, fan_in), (*ins, *outs), (1, 0), layers)
    return (kernel, Entry((*path, "bias"), f"{name}.bias", (fan_out,), outs, (), layers)) if bias else (kernel,)


def norm(path: Path, name: str, width: int, bias: bool, layers: int | None) -> tuple[Entry, ...]:
    scale = Entry((*path, "scale"), f"{name}.weight", (width,), (width,), (), layers)
    return (scale, Entry((*path, "bias"), f"{name}.bias", (width,), (width,), (), layers)) if bias else (scale,)
