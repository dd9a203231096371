"""LoRA adapters in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`, read and written.

PEFT calls a tensor by the module of transformers' model that it belongs to, whatever layout the base's files have. Older adapters have
the names of older modules, which are a layout of the files today: all are read, today's names are written.
"""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import mmalign_jax
from mmalign_jax.config import LINEARS, PARTS, Config
from mmalign_jax.errors import UserError
from mmalign_jax.hf import families, files
from mmalign_jax.hf.export import MARKER, check_target, on_host, planned_head, write_head
from mmalign_jax.hf.files import read_json, write_json
from mmalign_jax.hf.import_ import place
from mmalign_jax.hf.names import Entry, leaf_at, tree
from mmalign_jax.hf.safetensors_dir import PICKLES, Planned, Tensor, open_file, write_file
from mmalign_jax.models.config import LORA_A, LORA_B, Lora, MllmConfig
from mmalign_jax.models.lora import abstract_factors
from mmalign_jax.models.score_head import PART as SCORE_HEAD

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {LORA_A: ".lora_A.weight", LORA_B: ".lora_B.weight"}
_NAMES = tuple(name for group in LINEARS.values() for name in group)
# Settings of PEFT that change what the tensors mean, or add others, each at the value that does not; then those that only later versions know.
_PLAIN = {
    "bias": "none", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {},
}  # fmt: skip
_LATER = {"lora_bias": False, "layer_replication": None, "trainable_token_indices": None, "target_parameters": None}


def with_adapter(config: Config, sizes: MllmConfig) -> MllmConfig:
    """The model with the adapter that a run asks for: that of `model.adapter`, a new one of `lora.rank`, or none.

    Raises:
      UserError: the model has none of the linears that `lora.targets` names, or the adapter is not one of this model.
    """
    if config.model.adapter:
        return read_adapter(config.model.adapter, sizes)
    if not config.lora.rank:
        return sizes
    there = {part: {entry.path[-2] for entry in _linears(sizes, part)} for part in config.lora.parts}
    for target in config.lora.targets:
        if not set().union(*there.values()) & set(LINEARS.get(target, (target,))):
            known = ", ".join(name for name in _NAMES if name in set().union(*there.values()))
            raise UserError(f"config.lora.targets: {' and '.join(there)} of this model has no {target!r}; its linears are {known}")
    wanted = {name for target in config.lora.targets for name in LINEARS.get(target, (target,))}
    for part, names in there.items():
        if not names & wanted:
            raise UserError(f"config.lora.parts: {part} has none of the linears that config.lora.targets names; it has {', '.join(sorted(names))}")
    rank, alpha = config.lora.rank, config.lora.alpha
    return sizes.with_lora({part: Lora(rank, alpha, _in_order(names & wanted)) for part, names in there.items()})


def read_adapter(directory: str | pathlib.Path, sizes: MllmConfig) -> MllmConfig:
    """The model with the adapter in `directory`, whose values are not read.

    Raises:
      UserError: no such adapter, one of another kind than plain LoRA, or one that does not belong to the model.
    """
    directory = pathlib.Path(directory)
    values = read_json(directory / CONFIG)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{directory / CONFIG}: peft_type is {values.get('peft_type')!r}; supported: LORA")
    for key, plain in (_PLAIN | _LATER).items():
        if (values.get(key) or plain) != plain:
            raise UserError(f"{directory / CONFIG}: {key} is {values[key]!r}; supported: {plain!r}")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f"{directory / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; expected a whole number above 0, and a number")
    linears = {name: entry for part in PARTS for entry in _linears(sizes, part) for name in entry.names}
    found: dict[str, set[str]] = {}
    for (name, _), (file_name, _) in _tensors(directory, sizes).items():
        if name not in linears:
            raise UserError(f"{directory / WEIGHTS}: the model has no linear for {file_name}; does the adapter belong to it?")
        found.setdefault(linears[name].path[0], set()).add(linears[name].path[-2])
    return sizes.with_lora({part: Lora(rank, float(alpha), _in_order(names)) for part, names in found.items()})


def import_adapter(
    directory: str | pathlib.Path, sizes: MllmConfig, shardings: Mapping | None = None, dtype: Any = np.float32
) -> dict:
    """Reads the low-rank factors of an adapter.

    Args:
      sizes: from `read_adapter`.
      shardings: of the model's whole tree; None puts every leaf on the default device.
      dtype: of every leaf.

    Raises:
      UserError: a tensor is missing or has another shape than the adapter's config says.
    """
    directory, shapes = pathlib.Path(directory), abstract_factors(sizes)
    found, leaves = _tensors(directory, sizes), {}
    for entry in _adapted(sizes):
        for leaf, suffix in _SUFFIXES.items():
            path = (*entry.path[:-1], leaf)
            host = np.empty(leaf_at(shapes, path).shape, dtype)
            for layer, name in enumerate(entry.names):
                target = host if entry.layers is None else host[layer]
                if (name, leaf) not in found:
                    raise UserError(f"{directory / WEIGHTS}: lacks {_module(name) + suffix} (named without the layout's prefix)")
                file_name, tensor = found[name, leaf]
                if tensor.shape != (expected := _torch_shape(leaf, target.shape)):
                    raise UserError(f"{directory / WEIGHTS}: {file_name} has shape {tensor.shape}, expected {expected}")
                target[...] = tensor.read().T.reshape(target.shape)
            leaves[path] = place(host, None if shardings is None else leaf_at(shardings, path))
    return tree(leaves)


def export_adapter(params: Mapping[str, Any], sizes: MllmConfig, base: str | pathlib.Path, out: str | pathlib.Path) -> pathlib.Path:
    """Writes low-rank factors as an adapter of the model in `base`, in float32, and returns its directory.

    In a run of several processes all of them must call this; the first one writes.

    Args:
      params: what trained. An adapter has no place for other leaves than factors; a score head goes into a file of its own beside it.
      sizes: of the model with its adapters.
      out: missing, empty, or an earlier export, which is replaced.

    Raises:
      UserError: `out` holds something else, the model has no adapter, or other weights trained besides.
    """
    base, out = pathlib.Path(base), pathlib.Path(out).absolute()
    check_target(base, out)
    if not sizes.lora:
        raise UserError(f"{out}: the run trained no low-rank factors (config.lora.rank is 0); export its weights instead")
    if more := sorted(set(params) - set(sizes.lora) - {SCORE_HEAD}):
        raise UserError(f"{out}: an adapter holds factors alone, and {' and '.join(more)} trained besides; export the merged weights instead")
    planned, head = _plan(params, sizes), planned_head(params)
    if jax.process_index():
        for tensor in (*planned, *head):
            tensor.values()  # takes part in gathering it
        return out
    fresh = files.make_sibling(out)
    write_file(fresh / WEIGHTS, planned)
    write_head(fresh, head, True)
    rank, alpha = next((one.rank, one.alpha) for one in sizes.lora.values())
    write_json(fresh / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": os.path.abspath(base), "inference_mode": True,
        "r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "lora_dropout": 0.0, "init_lora_weights": True,
        "target_modules": _expression(sizes), **_PLAIN,
    })  # fmt: skip
    write_json(fresh / MARKER, {"package": "mmalign_jax", "version": mmalign_jax.__version__, "base": base.resolve().name})
    files.move_into_place(out)
    return out


def _plan(params: Mapping[str, Any], sizes: MllmConfig) -> list[Planned]:
    table = families.of(sizes).names(sizes)
    return [
        _planned(_PREFIX + _module(table.memory_name(name)) + suffix, leaf, leaf_at(params, (*entry.path[:-1], leaf)), layer)
        for entry in _adapted(sizes)
        for layer, name in zip(_layers(entry), entry.names, strict=True)
        for leaf, suffix in _SUFFIXES.items()
    ]


def _planned(name: str, leaf: str, values: Any, layer: int | None) -> Planned:
    rows, columns = _torch_shape(leaf, values.shape if layer is None else values.shape[1:])
    make = lambda: np.asarray(on_host(values, layer), np.float32).reshape(columns, rows).T  # noqa: E731
    return Planned(name, np.dtype(np.float32), (rows, columns), make)


def _torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, in) of the torch Linear that is a factor `[*ins, R]` or `[R, *outs]`."""
    return (shape[-1], math.prod(shape[:-1])) if leaf == LORA_A else (math.prod(shape[1:]), shape[0])


def _expression(sizes: MllmConfig) -> str:
    """The regular expression that matches the names of the adapted modules, and of no others: a tower has layers that we do not build."""
    table, stacks = families.of(sizes).names(sizes), {}
    for entry in _adapted(sizes):
        before, _, after = _module(table.memory_name(entry.name)).partition("{}")
        stacks.setdefault((before, entry.layers), []).append(after)
    alternatives = lambda options: f"(?:{'|'.join(re.escape(str(option)) for option in options)})"  # noqa: E731
    found = []
    for (before, layers), behind in stacks.items():
        found.append(re.escape(before) + ("" if layers is None else alternatives(range(layers)) + alternatives(behind)))
    return "|".join(found)


def _linears(sizes: MllmConfig, part: str) -> list[Entry]:
    """The kernels of a part that low-rank factors may stand beside."""
    entries = families.of(sizes).names(sizes).entries
    return [e for e in entries if e.path[0] == part and e.path[-1] == "kernel" and e.axes == (1, 0) and e.path[-2] in _NAMES]


def _adapted(sizes: MllmConfig) -> list[Entry]:
    return [entry for part, lora in sizes.lora.items() for entry in _linears(sizes, part) if lora.adapts(entry.path[-2])]


def _in_order(names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in _NAMES if name in names)


def _layers(entry: Entry) -> tuple[int | None, ...]:
    return (None,) if entry.layers is None else tuple(range(entry.layers))


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _tensors(directory: pathlib.Path, sizes: MllmConfig) -> dict[tuple[str, str], tuple[str, Tensor]]:
    """(reduced name of the weight, which factor) -> (name in the file, tensor)."""
    file = directory / WEIGHTS
    if not file.is_file():
        pickles = sorted(some.name for some in directory.glob("adapter_model*") if some.suffix in PICKLES)
        refused = f"; {pickles[0]} is pickled, and a pickle can run code" if pickles else ""
        raise UserError(f"{directory}: no {WEIGHTS}{refused}")
    table, found = families.of(sizes).names(sizes), {}
    for name, tensor in open_file(file).items():
        leaf = next((leaf for leaf, suffix in _SUFFIXES.items() if name.endswith(suffix)), None)
        if leaf is None or not name.startswith(_PREFIX):
            raise UserError(f"{file}: {name} is not a low-rank factor; expected {_PREFIX}*{' or *'.join(_SUFFIXES.values())}")
        reduced = table.reduce(name.removeprefix(_PREFIX).removesuffix(_SUFFIXES[leaf]) + ".weight")
        if reduced is None:
            raise UserError(f"{file}: {name} belongs to no part of the model")
        if (reduced, leaf) in found:
            raise UserError(f"{file}: {found[reduced, leaf][0]} and {name} are the same tensor in two layouts; keep one")
        found[reduced, leaf] = (name, tensor)
    if not found:
        raise UserError(f"{file}: holds no tensors")
    return found
