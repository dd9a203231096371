"""A parameter tree as a Hugging Face directory that transformers and vLLM load: the base directory with other weights."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import mmalign_jax
from mmalign_jax.errors import UserError
from mmalign_jax.hf import families, files, names
from mmalign_jax.hf.files import read_json, write_bytes, write_json
from mmalign_jax.hf.import_ import match, read_config
from mmalign_jax.hf.safetensors_dir import DTYPES, Planned, Tensor, open_weights, write_file, write_weights
from mmalign_jax.hf.score_head import BIAS, KERNEL
from mmalign_jax.hf.score_head import FILE as SCORE_HEAD_FILE
from mmalign_jax.models.config import LORA_A, LORA_B, Lora, MllmConfig
from mmalign_jax.models.lora import is_factor, merged_kernel
from mmalign_jax.models.score_head import PART as SCORE_HEAD
from mmalign_jax.models.tree import split

MARKER = "mmalign_export.json"  # tells a directory that may be overwritten
_COPIED = (".json", ".jinja", ".txt", ".model")
_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}


def export(
    params: Mapping[str, Any],
    base: str | pathlib.Path,
    out: str | pathlib.Path,
    dtype: str = "base",
    shard_bytes: int = 5_000_000_000,
    lora: Mapping[str, Lora] | None = None,
) -> pathlib.Path:
    """Writes `params` over a copy of the base directory and returns the new directory.

    Tensors keep the base's names and, with `dtype="base"`, types; tensors that are not in the tree are copied byte for byte. So are
    config, tokenizer, chat template and processor files; code and pickles are left behind. The new directory appears at once, when all
    of it is on disk. In a run of several processes all of them must call this; the first one writes.

    Args:
      params: the tree of `import_.load_params`, on any sharding and in any floating type, or of numpy arrays. Parts (vision_tower, projector,
        decoder) that are left out are copied from the base, byte for byte; so is the output kernel, which reward models do not train. A
        score head goes into a file of its own, `score_head.safetensors`, float32; transformers does not read it.
      base: the directory that the parameters came from.
      out: missing, empty, or an earlier export, which is replaced.
      dtype: "base", "float32", "bfloat16" or "float16".
      shard_bytes: largest size of one weight file.
      lora: the adapters of a tree with low-rank factors, by part (`MllmConfig.lora`). They are added to their kernels in float32; of such a
        part the tree may hold the factors alone, and the kernels are the base's.

    Raises:
      UserError: `out` holds something else, the tree does not fit the base, or a value does not fit the type.
    """
    base, out = pathlib.Path(base), pathlib.Path(out).absolute()
    if dtype not in ("base", *_DTYPES):
        raise UserError(f"export dtype {dtype!r} is not one of base, {', '.join(_DTYPES)}")
    check_target(base, out)
    config = read_config(base)
    head = planned_head(params)
    planned = _plan({part: tree for part, tree in params.items() if part != SCORE_HEAD}, config, base, dtype, lora or {})
    write = jax.process_index() == 0
    fresh = files.sibling(out)
    if write:
        _copy_files(base, files.make_sibling(out), config, dtype)
    write_weights(fresh, planned, shard_bytes, write, index=bool(head))
    write_head(fresh, head, write)
    if write:
        write_json(fresh / MARKER, {"package": "mmalign_jax", "version": mmalign_jax.__version__, "base": base.resolve().name})
        files.move_into_place(out)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("mmalign_jax.hf.export")
    return out


def planned_head(params: Mapping[str, Any]) -> list[Planned]:
    """The tensors of the tree's score head; none where it has none."""
    if SCORE_HEAD not in params:
        return []
    head, float32 = params[SCORE_HEAD], np.dtype(np.float32)
    shapes = {KERNEL: (1, head["kernel"].shape[0]), BIAS: (1,)}
    leaves = {KERNEL: head["kernel"], BIAS: head["bias"]}
    make = lambda name: np.asarray(on_host(leaves[name], None), np.float32).reshape(shapes[name])  # noqa: E731
    return [Planned(name, float32, shape, lambda name=name: make(name)) for name, shape in shapes.items()]


def write_head(directory: pathlib.Path, planned: Sequence[Planned], write: bool) -> None:
    """Writes what `planned_head` planned, if anything; all processes take part, as in `write_weights`."""
    if planned and write:
        write_file(directory / SCORE_HEAD_FILE, planned)
    elif planned:
        for tensor in planned:
            tensor.values()


def check_target(base: pathlib.Path, out: pathlib.Path) -> None:
    """Raises UserError unless `out` is missing, empty or an earlier export."""
    if out.resolve() == base.resolve():
        raise UserError(f"{out}: the export would replace the base model; give another directory")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a directory for the export")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"{out}: holds files that are not an export of mmalign_jax; give an empty or new directory")


@dataclasses.dataclass(frozen=True)
class _Changed:
    """What the tree has for one leaf of the model: the leaf, low-rank factors beside it, or both."""

    entry: names.Entry
    leaf: Any
    factors: tuple[Any, Any] | None
    scale: float

    def values(self, layer: int | None, tensor: Tensor) -> np.ndarray:
        """In the form of the base's `tensor`."""
        kernel = self.entry.to_ours(tensor.read()) if self.leaf is None else on_host(self.leaf, layer)
        if self.factors is not None:
            kernel = merged_kernel(kernel, *(on_host(factor, layer) for factor in self.factors), self.scale)
        return self.entry.to_hf(kernel)


def _changes(params: Mapping[str, Any], config: MllmConfig, lora: Mapping[str, Lora]) -> list[_Changed]:
    """Every leaf of the model that is in the tree, or has factors there."""
    factors, own = split(params, is_factor)
    found = []
    for entry in families.of(config).names(config).entries:
        part, node = entry.path[0], factors
        for key in entry.path[:-1] if entry.path[-1] == "kernel" else (None,):
            node = node.get(key, {})
        left_out = part not in own or (entry.name == names.HEAD and "head" not in own[part])
        leaf = None if left_out else names.leaf_at(own, entry.path)
        if leaf is not None and tuple(leaf.shape) != entry.leaf_shape:
            raise UserError(f"parameter {'/'.join(entry.path)} has shape {tuple(leaf.shape)}, the base model asks for {entry.leaf_shape}")
        if node:
            found.append(_Changed(entry, leaf, (node[LORA_A], node[LORA_B]), lora[part].scale))
        elif leaf is not None:
            found.append(_Changed(entry, leaf, None, 0.0))
    if 2 * sum(change.factors is not None for change in found) != len(jax.tree.leaves(factors)):
        raise ValueError("the tree has low-rank factors beside something that is not a kernel of the model")
    return found


def _plan(params: Mapping[str, Any], config: MllmConfig, base: pathlib.Path, dtype: str, lora: Mapping[str, Lora]) -> list[Planned]:
    """Every tensor of the base, leaf by leaf of the tree and then the ones outside it; larger types first, which keeps them aligned."""
    found = match(open_weights(base), config, base)
    planned = []
    for change in _changes(params, config, lora):
        for layer, reduced in enumerate(change.entry.names):
            planned.append(_trained(change, None if change.entry.layers is None else layer, *found.pop(reduced), dtype))
            if reduced == names.EMBEDDING and config.decoder.tied_head and names.HEAD in found:
                planned.append(_trained(change, None, *found.pop(names.HEAD), dtype))
    # what is not in the tree did not train
    planned += [_copied(name, tensor, dtype) for name, tensor in found.values()]
    return sorted(planned, key=lambda tensor: -tensor.dtype.itemsize)


def _trained(change: _Changed, layer: int | None, name: str, tensor: Tensor, dtype: str) -> Planned:
    target = tensor.dtype if dtype == "base" else _DTYPES[dtype]
    return Planned(name, target, tensor.shape, lambda: _cast(change.values(layer, tensor), target, name))


def _copied(name: str, tensor: Tensor, dtype: str) -> Planned:
    if dtype == "base" or tensor.dtype not in _DTYPES.values():
        return Planned(name, tensor.dtype, tensor.shape, tensor.read)
    target = _DTYPES[dtype]
    return Planned(name, target, tensor.shape, lambda: _cast(tensor.read(), target, name))


def on_host(leaf: Any, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of it, gathered from wherever it lies. All processes must call it."""
    piece = leaf if layer is None else leaf[layer]
    if isinstance(piece, jax.Array) and not piece.is_fully_addressable:
        piece = multihost_utils.process_allgather(piece, tiled=True)
    return np.asarray(piece)


def _cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not np.isfinite(cast).all() and np.isfinite(values).all():
        raise UserError(f"{name}: values up to {np.abs(values).max():.3g} do not fit {dtype}; export with dtype bfloat16 or float32")
    return cast


def _copy_files(base: pathlib.Path, fresh: pathlib.Path, config: MllmConfig, dtype: str) -> None:
    for file in sorted(base.iterdir()):
        licence = file.name.upper().startswith(("LICENSE", "NOTICE")) and file.suffix in ("", ".md")
        weights = file.name.endswith(".index.json") or file.name == MARKER
        if file.is_file() and not weights and (file.suffix in _COPIED or licence):
            write_bytes(fresh / file.name, file.read_bytes())
    if (base / "chat_templates").is_dir():
        (fresh / "chat_templates").mkdir()
        for file in sorted((base / "chat_templates").glob("*.jinja")):
            write_bytes(fresh / "chat_templates" / file.name, file.read_bytes())
    if dtype != "base":
        values = read_json(base / "config.json")
        values.pop("torch_dtype", None)
        write_json(fresh / "config.json", values | {"dtype": dtype})
    _complete_processor(fresh, config)


def _complete_processor(fresh: pathlib.Path, config: MllmConfig) -> None:
    """Writes what is absent: transformers 5 writes `processor_config.json` alone, version 4 and llama.cpp read the other files."""
    old, new = fresh / "preprocessor_config.json", fresh / "processor_config.json"
    family = families.of(config)
    if new.is_file() and not old.is_file():
        values = read_json(new)
        if isinstance(values.get("image_processor"), dict):
            write_json(old, {"processor_class": family.processor_class} | values["image_processor"])
    elif old.is_file() and not new.is_file():
        values = {"processor_class": family.processor_class, **family.processor_values(config, _image_token(fresh, config))}
        write_json(new, values | {"image_processor": read_json(old)})
    videos, values = fresh / "video_preprocessor_config.json", read_json(new) if new.is_file() else {}
    if not videos.is_file() and isinstance(values.get("video_processor"), dict):
        write_json(videos, {"processor_class": family.processor_class} | values["video_processor"])


def _image_token(fresh: pathlib.Path, config: MllmConfig) -> str:
    file = fresh / "tokenizer.json"
    added = read_json(file).get("added_tokens", [])
    found = [token["content"] for token in added if token["id"] == config.image_token_id]
    if not found:
        raise UserError(f"{file}: no added token has the id {config.image_token_id}, config.json's image token")
    return found[0]
