"""A Hugging Face directory as a config and a parameter tree, every tensor read straight into its sharding."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmalign_jax.errors import UserError
from mmalign_jax.hf import families, names
from mmalign_jax.hf.files import read_json
from mmalign_jax.hf.safetensors_dir import Tensor, open_weights
from mmalign_jax.models.config import MllmConfig

# Layers of a leaf are put together on the host up to this size; larger leaves are put together on the devices.
STACK_BYTES = 256 << 20

_FLOATS = ("float64", "float32", "float16", "bfloat16")


def read_config(directory: str | pathlib.Path) -> MllmConfig:
    """The sizes of a model directory. `tie_word_embeddings` is only a request there: a head that differs from the embedding is untied.

    Raises:
      UserError: no directory, no readable `config.json` or weights, or a model that is not supported.
    """
    directory = pathlib.Path(directory)
    if (directory / "adapter_config.json").exists():
        raise UserError(
            f"{directory / 'adapter_config.json'}: the directory holds an adapter; give its base model as "
            "config.model.path and the adapter as config.model.adapter, or merge it into the weights first"
        )
    config = families.read(read_json(directory / "config.json"), where=str(directory / "config.json"))
    if not config.decoder.tied_head:
        return config
    found = by_reduced_name(open_weights(directory), families.of(config).names(config), directory)
    if names.HEAD not in found or names.EMBEDDING not in found:
        return config
    head, embedding = found[names.HEAD][1], found[names.EMBEDDING][1]
    same = head.shape == embedding.shape and np.array_equal(head.read(), embedding.read())
    return config if same else dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tied_head=False))


def load_params(
    directory: str | pathlib.Path,
    config: MllmConfig,
    shardings: Mapping | None = None,
    dtype: Any = np.float32,
    wanted: Callable[[names.Path], bool] | None = None,
) -> dict:
    """Reads the parameter tree of a model directory.

    The host holds one tensor at a time, or the layers of one leaf together while they take less than `STACK_BYTES`.

    Args:
      directory: with `model.safetensors` or an index and its shards, in any layout of the family's names.
      config: from `read_config`.
      shardings: the tree's shardings (`models.params.param_shardings`); None puts every leaf on the default device.
      dtype: of every leaf.
      wanted: whether a leaf is read, by its path. None: all.

    Raises:
      UserError: a tensor is unknown, missing, there twice, or has another shape or type than the config says.
      DataError: a file is corrupt.
    """
    return load_tree(directory, families.of(config).names(config), shardings, dtype, wanted)


def load_tree(
    directory: str | pathlib.Path,
    table: names.NameTable,
    shardings: Mapping | None = None,
    dtype: Any = np.float32,
    wanted: Callable[[names.Path], bool] | None = None,
) -> dict:
    """`load_params` of the model whose tensors a table names."""
    directory = pathlib.Path(directory)
    found = match_table(open_weights(directory), table, directory)
    dtype = np.dtype(dtype)
    leaves = {}
    for entry in table.entries:
        if wanted is not None and not wanted(entry.path):
            continue
        sharding = None if shardings is None else names.leaf_at(shardings, entry.path)
        # copies: a device array on the CPU must not live in a file's pages
        tensors = (entry.to_ours(found[name][1].read()).astype(dtype) for name in entry.names)
        if entry.layers is None:
            leaves[entry.path] = place(next(tensors), sharding)
        elif math.prod(entry.leaf_shape) * dtype.itemsize <= STACK_BYTES:
            leaves[entry.path] = place(np.stack(list(tensors)), sharding)
        else:
            leaves[entry.path] = _streamed(tensors, entry.layers, sharding)
    return names.tree(leaves)


def _streamed(tensors: Iterator[np.ndarray], layers: int, sharding: jax.sharding.NamedSharding | None) -> jax.Array:
    """The stack of all layers on the devices, one layer after the other."""
    of_layer = None if sharding is None else jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    put = jax.jit(lambda stack, one, layer: stack.at[layer].set(one), donate_argnums=0)
    stack = None
    for number, tensor in enumerate(tensors):
        one = place(tensor, of_layer)
        if stack is None:
            stack = jnp.zeros((layers, *one.shape), one.dtype, device=sharding)
        stack = put(stack, one, number)
    return stack


def part_hash(directory: str | pathlib.Path, config: MllmConfig, part: str) -> str:
    """SHA-256 of the values of one part of the tree, whatever type, and layout of names and files, they are stored in.

    A checkpoint and its copy in a wider type are the same: a frozen part has the same values in both. Values are compared as float32, which
    holds all of float16 and bfloat16.

    Raises:
      UserError, DataError: see `load_params`.
    """
    table, directory = families.of(config).names(config), pathlib.Path(directory)
    found, digest = match_table(open_weights(directory), table, directory), hashlib.sha256()
    for name in (name for entry in table.entries if entry.path[0] == part for name in entry.names):
        tensor = found[name][1]
        digest.update(f"{name} {tensor.shape}|".encode())
        digest.update(np.ascontiguousarray(tensor.read().astype("<f4")).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def match(weights: Mapping[str, Tensor], config: MllmConfig, directory: pathlib.Path) -> dict[str, tuple[str, Tensor]]:
    """Reduced name -> (name in the files, tensor), after checking that the tree of `config` uses every tensor exactly once.

    Raises:
      UserError: see `load_params`.
    """
    return match_table(weights, families.of(config).names(config), directory)


def match_table(weights: Mapping[str, Tensor], table: names.NameTable, directory: pathlib.Path) -> dict[str, tuple[str, Tensor]]:
    """`match` of the model whose tensors a table names."""
    found = by_reduced_name(weights, table, directory)
    wanted = {name: entry for entry in table.entries for name in entry.names}
    extra = [found[name][0] for name in found if name not in wanted and not table.unused(name)]
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


def by_reduced_name(weights: Mapping[str, Tensor], table: names.NameTable, directory: pathlib.Path) -> dict[str, tuple[str, Tensor]]:
    """Reduced name -> (name in the files, tensor).

    Raises:
      UserError: a name belongs to no part of the model, or two names mean the same tensor.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    unknown = [name for name in weights if table.reduce(name) is None]
    if unknown:
        begin = ", ".join(prefix + "*" for prefix in table.prefixes)
        raise UserError(f"{directory}: {_some(unknown)} belong to no part of the model; expected names that begin as one of {begin}")
    for name, tensor in weights.items():
        reduced = table.reduce(name)
        if reduced in found:
            raise UserError(f"{directory}: {found[reduced][0]} and {name} are the same tensor in two layouts; keep one")
        found[reduced] = (name, tensor)
    return found


def _some(listed: list[str], most: int = 4) -> str:
    listed = sorted(listed)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def place(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array of the host in its shards, or on the default device."""
    if sharding is None:
        return jax.device_put(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
