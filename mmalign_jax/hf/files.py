"""Small files of a model directory, and directories that appear at once."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from mmalign_jax.errors import DataError, UserError


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: there is no such file.
      DataError: it holds something else.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a Hugging Face model directory")
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"not JSON ({error})", file=str(file), mend="Download or write the file again") from error
    if not isinstance(values, dict):
        raise DataError("not a JSON object", file=str(file), mend="Download or write the file again")
    return values


def write_json(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    write_bytes(file, json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")


def write_bytes(file: pathlib.Path, content: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def sibling(directory: pathlib.Path) -> pathlib.Path:
    """Where the new content of `directory` is written before `move_into_place`."""
    return directory.parent / f".{directory.name}.writing"


def make_sibling(directory: pathlib.Path) -> pathlib.Path:
    """`sibling`, made empty: what an interrupted write left there is removed."""
    fresh = sibling(directory)
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir(parents=True)
    return fresh


def move_into_place(directory: pathlib.Path) -> None:
    """Puts the content of `sibling(directory)` where `directory` is, replacing what is there."""
    _sync(sibling(directory))
    replaced = directory.parent / f".{directory.name}.replaced"
    if replaced.exists():
        shutil.rmtree(replaced)
    if directory.exists():
        os.rename(directory, replaced)
    os.rename(sibling(directory), directory)
    _sync(directory.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _sync(directory: pathlib.Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
