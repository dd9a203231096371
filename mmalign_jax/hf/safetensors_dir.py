"""Safetensors files of a directory: found and checked on opening, read one tensor at a time, written as a stream of tensors."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf.files import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# https://github.com/huggingface/safetensors#format
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MEND = "Download or write the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `start` is the offset of its first byte in the file."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor's values, mapped from the file: bytes are read when they are used."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.start, self.shape or (1,)).reshape(self.shape)


def open_weights(directory: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of `model.safetensors`, or else of the shards that `model.safetensors.index.json` lists, by name.

    Raises:
      UserError: the directory has no such file; pickled weights are named and refused.
      DataError: a file is missing, truncated or corrupt, or index and shards disagree.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected a Hugging Face model directory")
    if (directory / SINGLE).is_file():
        return open_file(directory / SINGLE)
    if not (directory / INDEX).is_file():
        wanted = f"expected {SINGLE}, or {INDEX} and its shards"
        pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise UserError(f"{directory / pickles[0]}: pickled weights are never loaded, because a pickle can run code; {wanted}")
        raise UserError(f"{directory}: no weights; {wanted}")
    listed = _read_index(directory / INDEX)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(listed.values())):
        file = directory / shard
        found = open_file(file)
        expected = {name for name, name_shard in listed.items() if name_shard == shard}
        if odd := sorted(found.keys() ^ expected):
            where = "is listed for this file but not in it" if odd[0] in expected else "is in this file but not listed for it"
            raise DataError(f"tensor {odd[0]} {where} in {INDEX}", file=str(file), mend=_MEND)
        tensors |= found
    return tensors


def _read_index(file: pathlib.Path) -> dict[str, str]:
    try:
        listed = json.loads(file.read_text("utf-8"))["weight_map"]
        names_only = all(isinstance(shard, str) for shard in listed.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not an index of safetensors shards ({error!r})", file=str(file), mend=_MEND) from error
    if not names_only:
        raise DataError("weight_map holds something that is not a file name", file=str(file), mend=_MEND)
    for name, shard in listed.items():
        # a link inside the directory is fine (the hub cache is made of them), a path out of it is not
        if pathlib.PurePath(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise DataError(f"shard {shard!r} of tensor {name} is not a file of this directory", file=str(file), mend=_MEND)
        if not shard.endswith(".safetensors"):
            raise DataError(f"shard {shard!r} of tensor {name} is not a safetensors file", file=str(file), mend=_MEND)
    return listed


def open_file(file: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of one file, by name.

    Raises:
      DataError: the file is missing, truncated or corrupt, or holds a type of numbers that is not known here.
    """
    if not file.is_file():
        raise DataError("the file is missing", file=str(file), mend=_MEND)
    try:
        # the library checks the whole header: its size, offsets without gap or overlap, sizes equal to shapes, and the file's end
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise DataError(f"truncated or corrupt safetensors file ({error})", file=str(file), mend=_MEND) from error
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in DTYPES:
            raise DataError(f"tensor {name} has type {info['dtype']}", file=str(file), mend="Use weights in float32, bfloat16 or float16")
        tensors[name] = Tensor(file, DTYPES[info["dtype"]], tuple(info["shape"]), 8 + size + info["data_offsets"][0])
    return tensors


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its name, type and shape, and a function that makes its values when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    directory: pathlib.Path, planned: Sequence[Planned], shard_bytes: int, write: bool = True, *, index: bool = False
) -> None:
    """Writes tensors in their order, into one file or into shards of at most `shard_bytes` (a larger tensor gets a shard of its own).

    One tensor is in memory at a time. With `write=False` the values are made but not written: all processes of a multi-process run
    must take part in making them, and one writes.

    Args:
      index: write an index of a single file, too, so that readers which take all safetensors files of a directory take no other.
    """
    shards: list[list[Planned]] = [[]]
    for tensor in planned:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    one = len(shards) == 1
    files = [SINGLE] if one else [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
    for file, tensors in zip(files, shards, strict=True):
        if write:
            write_file(directory / file, tensors)
        else:
            for tensor in tensors:
                tensor.values()
    if write and (index or not one):
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in planned)},
            "weight_map": {tensor.name: file for file, tensors in zip(files, shards, strict=True) for tensor in tensors},
        }
        write_json(directory / INDEX, index)


def write_file(file: pathlib.Path, tensors: Sequence[Planned]) -> None:
    """Writes tensors in their order, one in memory at a time."""
    header: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            values = tensor.values()
            if values.dtype != tensor.dtype or values.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: planned {tensor.dtype}{tensor.shape}, made {values.dtype}{values.shape}")
            opened.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        opened.flush()
        os.fsync(opened.fileno())
