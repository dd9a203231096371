"""Features of a frozen vision tower on disk, picture by picture.

A store is a directory with
  key.json      what its features are computed from (JSON values), their type and width Z
  000000.json   a part's pictures, by digest: where the features of each begin, how many they are, and their checksum
  000000.bin    these features, [n, Z], one picture behind the other, little-endian
A part is there when its JSON file is, and is not changed after that. Runs that show other pictures add parts (`FeatureWriter`).
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.files import read_json, write_json

KEY = "key.json"
PART_BYTES = 64 << 20  # computed features that are lost at most when a sweep is killed
TYPES = ("float32", "bfloat16")


class _Place(NamedTuple):
    """A picture's features are rows `start` to `start + count` of a part."""

    part: Path
    start: int
    count: int
    checksum: int  # CRC-32 of the bytes


class FeatureStore:
    """What a directory holds: `key`, and by digest (`shared_pictures.digest` of one medium) features `[n, Z]` of type `dtype`.

    Args:
      directory: with a `key.json`.

    Raises:
      DataError: a file is missing, truncated or damaged. What features hold is compared with their checksum when they are read.
    """

    def __init__(self, directory: Path):
        self.directory, file = directory, directory / KEY
        plain = read_json(file, _mend_all(directory))
        if not _is_key(plain):
            raise DataError("damaged (not its fields)", file=str(file), mend=_mend_all(directory))
        self.key, self.width, self.dtype = plain["key"], plain["width"], jnp.dtype(plain["dtype"])
        self._of, self._row = _key_hash(plain), plain["width"] * jnp.dtype(plain["dtype"]).itemsize
        self._places: dict[bytes, _Place] = {}
        for part in sorted(directory.glob("*.json")):
            if part.name != KEY:
                self._places |= self._part(part)

    @classmethod
    def open(cls, directory: Path) -> "FeatureStore | None":
        """The store of a directory, None where none was begun."""
        return cls(directory) if (directory / KEY).is_file() else None

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def read(self, digest: bytes) -> Float[np.ndarray, "n Z"]:
        """The features of a picture that is there.

        Raises:
          DataError: the file has been changed, cut or removed since it was written.
        """
        place = self._places[digest]
        wanted = place.count * self._row
        try:
            with place.part.open("rb") as opened:
                opened.seek(place.start * self._row)
                data = opened.read(wanted)
        except FileNotFoundError as error:
            raise DataError("the file is missing", file=str(place.part), mend=_mend(place.part)) from error
        if len(data) != wanted or zlib.crc32(data) != place.checksum:
            problem = "truncated" if len(data) != wanted else "corrupt: its content has changed since it was written"
            raise DataError(f"the file is {problem}", file=str(place.part), mend=_mend(place.part))
        return np.frombuffer(data, self.dtype).reshape(place.count, self.width)

    def _part(self, file: Path) -> dict[bytes, _Place]:
        held, mend = file.with_suffix(".bin"), _mend(file)
        plain = read_json(file, mend)
        if not _is_part(plain):
            raise DataError("damaged (not its fields)", file=str(file), mend=mend)
        if plain["of"] != self._of:
            raise DataError(f"the part does not belong to {KEY} beside it", file=str(file), mend=mend)
        if not held.is_file():
            raise DataError("the file is missing", file=str(held), mend=mend)
        expected = sum(count for _, count, _ in plain["pictures"].values()) * self._row
        if (size := held.stat().st_size) != expected:
            problem = f"the file is truncated: {size} bytes" if size < expected else f"the file has grown: {size} bytes"
            raise DataError(f"{problem}, {expected} were written", file=str(held), mend=mend)
        return {bytes.fromhex(digest): _Place(held, *place) for digest, place in plain["pictures"].items()}


class FeatureWriter:
    """Adds pictures to a directory. One process at a time (`files.claimed`); leaving the context keeps what was added.

    Args:
      directory: an empty one, or a store of the same key, type and width.
      key: what features are computed from (JSON values).
      width: Z.
    """

    def __init__(self, directory: Path, key: dict[str, Any], dtype: str, width: int):
        self._directory = directory
        plain = {"key": key, "dtype": dtype, "width": width}
        if not (directory / KEY).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / KEY, plain)
        there = FeatureStore(directory)
        if (there.key, there.dtype, there.width) != (key, jnp.dtype(dtype), width):
            raise ValueError(f"{directory} holds features of another key")
        self._there, self._of, self._dtype, self._width = there, _key_hash(plain), there.dtype, width
        self._added: set[bytes] = set()
        self._pictures: dict[str, tuple[int, int, int]] = {}
        self._rows, self._opened = 0, None

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._keep()

    def add(self, digest: bytes, features: Float[np.ndarray, "n Z"]) -> None:
        """The features of a picture; one that is there already stays as it is.

        Raises:
          UserError: the disk is full.
        """
        if digest in self._there or digest in self._added:
            return
        if features.dtype != self._dtype or features.shape[1] != self._width:
            raise ValueError(f"features {features.dtype}{features.shape} for a store of {self._dtype}[n, {self._width}]")
        data = np.ascontiguousarray(features).tobytes()
        with self._while_there_is_room():
            self._file().write(data)
        self._pictures[digest.hex()] = (self._rows, len(features), zlib.crc32(data))
        self._added.add(digest)
        self._rows += len(features)
        if self._rows * self._width * self._dtype.itemsize >= PART_BYTES:
            self._keep()

    def _file(self) -> io.BufferedWriter:
        if self._opened is None:
            self._opened = (self._directory / ".part.tmp").open("wb")
        return self._opened

    def _keep(self) -> None:
        """Puts what was added since the last time in its place: the numbers first, then the file that says that they are there."""
        if self._opened is None:
            return
        with self._while_there_is_room():
            self._opened.flush()
            self._opened.truncate(self._rows * self._width * self._dtype.itemsize)  # an interrupted write may have left more
            os.fsync(self._opened.fileno())
            numbers = [int(file.stem) for file in self._directory.glob("[0-9]*.json")]
            part = self._directory / f"{max(numbers, default=-1) + 1:06}.json"
            os.replace(self._opened.name, part.with_suffix(".bin"))
            write_json(part, {"of": self._of, "pictures": self._pictures})
        self._opened.close()
        self._pictures, self._rows, self._opened = {}, 0, None

    @contextlib.contextmanager
    def _while_there_is_room(self) -> Iterator[None]:
        """Gives up what was added since the last time where nothing can be written."""
        try:
            yield
        except OSError as error:
            if self._opened is not None:
                self._opened.raw.close()  # without the bytes that still wait
            self._pictures, self._rows, self._opened = {}, 0, None
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"config.features.cache: no space is left for {self._directory}; make room, or choose another directory") from error


def _is_key(plain: Any) -> bool:
    if not isinstance(plain, dict) or plain.keys() != {"key", "dtype", "width"}:
        return False
    return isinstance(plain["key"], dict) and plain["dtype"] in TYPES and isinstance(plain["width"], int) and plain["width"] > 0


def _is_part(plain: Any) -> bool:
    """Whether it lists pictures one behind the other."""
    if not isinstance(plain, dict) or plain.keys() != {"of", "pictures"} or not isinstance(plain["pictures"], dict):
        return False
    end = 0
    for digest, place in plain["pictures"].items():
        if len(digest) != 32 or set(digest) - set("0123456789abcdef") or not isinstance(place, list) or len(place) != 3:
            return False
        if not all(isinstance(number, int) and number >= 0 for number in place) or place[0] != end:
            return False
        end += place[1]
    return True


def _key_hash(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _mend(part: Path) -> str:
    return f"Delete {part.with_suffix('.json')} and {part.with_suffix('.bin').name} beside it; what they hold is computed again."


def _mend_all(directory: Path) -> str:
    return f"Delete {directory}; it is computed again."
