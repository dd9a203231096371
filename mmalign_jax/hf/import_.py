"""A Hugging Face directory as a config and a parameter tree, every tensor read straight into its sharding."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmalign_jax.errors import UserError
from mmalign_jax.hf import names
from mmalign_jax.hf.files import read_json
from mmalign_jax.hf.safetensors_dir import Tensor, open_weights
from mmalign_jax.models import config as model_config
from mmalign_jax.models.config import LlavaConfig

_FLOATS = ("float64", "float32", "float16", "bfloat16")


def read_config(directory: str | pathlib.Path) -> LlavaConfig:
    """The sizes of a model directory. `tie_word_embeddings` is only a request there: a head that differs from the embedding is untied.

    Raises:
      UserError: no directory, no readable `config.json` or weights, or a model that is not a supported LLaVA.
    """
    directory = pathlib.Path(directory)
    if (directory / "adapter_config.json").exists():
        raise UserError(f"{directory / 'adapter_config.json'}: the directory holds an adapter; merge it into the weights first")
    config = model_config.from_hf(read_json(directory / "config.json"), where=str(directory / "config.json"))
    if not config.decoder.tied_head:
        return config
    found = by_reduced_name(open_weights(directory), directory)
    if names.HEAD not in found or names.EMBEDDING not in found:
        return config
    head, embedding = found[names.HEAD][1], found[names.EMBEDDING][1]
    same = head.shape == embedding.shape and np.array_equal(head.read(), embedding.read())
    return config if same else dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tied_head=False))


def load_params(directory: str | pathlib.Path, config: LlavaConfig, shardings: Mapping | None = None, dtype: Any = np.float32) -> dict:
    """Reads the parameter tree of a model directory. One leaf at a time is whole on the host.

    Args:
      directory: with `model.safetensors` or an index and its shards, in any layout of LLaVA's names.
      config: from `read_config`.
      shardings: the tree's shardings (`models.params.param_shardings`); None puts every leaf on the default device.
      dtype: of every leaf.

    Raises:
      UserError: a tensor is unknown, missing, there twice, or has another shape or type than the config says.
      DataError: a file is corrupt.
    """
    directory = pathlib.Path(directory)
    found = match(open_weights(directory), config, directory)
    dtype = np.dtype(dtype)
    leaves = {}
    for entry in names.entries(config):
        host = np.empty(entry.leaf_shape, dtype)
        for layer, name in enumerate(entry.names):
            target = host if entry.layers is None else host[layer]
            target[...] = entry.to_ours(found[name][1].read())
        leaves[entry.path] = _place(host, None if shardings is None else names.leaf_at(shardings, entry.path))
    return names.tree(leaves)


def match(weights: Mapping[str, Tensor], config: LlavaConfig, directory: pathlib.Path) -> dict[str, tuple[str, Tensor]]:
    """Reduced name -> (name in the files, tensor), after checking that the tree of `config` uses every tensor exactly once.

    Raises:
      UserError: see `load_params`.
    """
    found = by_reduced_name(weights, directory)
    wanted = {name: entry for entry in names.entries(config) for name in entry.names}
    extra = [found[name][0] for name in found if name not in wanted and not names.is_unused(name, config)]
    if extra:
        raise UserError(f"{directory}: the model has no place for {_some(extra)}; does config.json belong to these weights?")
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{directory}: the weights lack {_some(missing)} (named without the layout's prefix)")
    for name, entry in wanted.items():
        file_name, tensor = found[name]
        if tensor.shape != entry.hf_shape:
            raise UserError(f"{tensor.file}: {file_name} has shape {tensor.shape}, config.json asks for {entry.hf_shape}")
        if tensor.dtype.name not in _FLOATS:
            raise UserError(f"{tensor.file}: {file_name} has type {tensor.dtype}; quantised weights are not supported")
    return found


def by_reduced_name(weights: Mapping[str, Tensor], directory: pathlib.Path) -> dict[str, tuple[str, Tensor]]:
    """Reduced name -> (name in the files, tensor).

    Raises:
      UserError: a name belongs to no part of LLaVA, or two names mean the same tensor.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    unknown = [name for name in weights if names.reduce_name(name) is None]
    if unknown:
        raise UserError(f"{directory}: {_some(unknown)} belong to no part of a LLaVA model; expected names such as {_EXAMPLES}")
    for name, tensor in weights.items():
        reduced = names.reduce_name(name)
        if reduced in found:
            raise UserError(f"{directory}: {found[reduced][0]} and {name} are the same tensor in two layouts; keep one")
        found[reduced] = (name, tensor)
    return found


_EXAMPLES = "language_model.model.norm.weight or model.language_model.norm.weight"


def _some(listed: list[str], most: int = 4) -> str:
    listed = sorted(listed)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def _place(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
