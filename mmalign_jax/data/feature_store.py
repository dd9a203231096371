"""Features of a frozen vision tower on disk, picture by picture.

A store is a directory with
  key.json              the store's format, what its features are computed from (JSON values), their type and width Z
  part-<random>.json    a part's pictures, by digest: where the features of each begin, how many they are, and their checksum
  part-<random>.bin     these features, [n, Z], one picture behind the other, little-endian
A part is there when its JSON file is, and is not changed after that. Runs that show other pictures add parts (`FeatureWriter`). No two
writers use the same names, so where a file system has no locks, they compute some pictures twice and harm nothing.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import time
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
FORMAT_NAME = "mmalign_jax vision features"
FORMAT = f"{FORMAT_NAME} 1"
# computed features that are lost at most when a sweep is killed, and what bounds the list of a part
PART_BYTES, PART_PICTURES = 64 << 20, 1 << 16
TYPES = ("float32", "bfloat16")
STALE_S = 24 * 3600.0  # a writer adds to its files more often

_MAX_JSON = 64 << 20  # a list of PART_PICTURES pictures takes a tenth of it
_STORED = {2: "<u2", 4: "<u4"}  # numpy's bfloat16 has no byte order of its own
_LIST = re.compile(r"part-[0-9a-f]{16}\.json")
_NUMBERS = re.compile(r"part-[0-9a-f]{16}\.bin")
_TEMPORARY = re.compile(r"\.part-[0-9a-f]{16}\.json\.tmp|\.{1,2}key-[0-9a-f]{16}\.json(\.tmp)?")
_LOCK = re.compile(r"\.[a-z_]+\.lock|\.nfs[0-9a-f]+")


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
      DataError: `key.json` is of something else, or a file is missing, truncated or damaged. What features hold is compared with their checksum
        when they are read.
    """

    def __init__(self, directory: Path):
        self.directory, file = directory, directory / KEY
        plain = read_json(file, _ELSEWHERE, _MAX_JSON)
        if not isinstance(plain, dict) or not str(plain.get("format")).startswith(FORMAT_NAME):
            raise DataError(f"not the key of vision features (its field format is not {FORMAT!r})", file=str(file), mend=_ELSEWHERE)
        if plain["format"] != FORMAT:
            raise DataError(f"of another version ({plain['format']!r}, this one writes {FORMAT!r})", file=str(file), mend=_mend_all(directory))
        if not _is_key(plain):
            raise DataError("damaged (not its fields)", file=str(file), mend=_mend_all(directory))
        self.key, self.width, self.dtype = plain["key"], plain["width"], jnp.dtype(plain["dtype"])
        self._of, self._row = _key_hash(plain), plain["width"] * jnp.dtype(plain["dtype"]).itemsize
        self._places: dict[bytes, _Place] = {}
        for part in sorted(directory.iterdir()):
            if _LIST.fullmatch(part.name):
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
        """The features of a picture.

        Raises:
          DataError: they are not there, or the file has been changed, cut or removed since it was written, or cannot be read.
        """
        place = self._places.get(digest)
        if place is None:
            raise DataError("the features of a picture that a row shows are not there", file=str(self.directory), mend=START_AGAIN)
        wanted = place.count * self._row
        try:
            with place.part.open("rb") as opened:
                opened.seek(place.start * self._row)
                data = opened.read(wanted)
        except FileNotFoundError as error:
            raise DataError("the file is missing", file=str(place.part), mend=_mend(place.part)) from error
        except OSError as error:
            problem = f"the file cannot be read ({error.strerror or error})"
            raise DataError(problem, file=str(place.part), mend=f"Make it readable. {_mend(place.part)}") from error
        if len(data) != wanted or zlib.crc32(data) != place.checksum:
            problem = "truncated" if len(data) != wanted else "corrupt: its content has changed since it was written"
            raise DataError(f"the file is {problem}", file=str(place.part), mend=_mend(place.part))
        stored = np.dtype(_STORED[self.dtype.itemsize])
        values = np.frombuffer(data, stored).astype(stored.newbyteorder("="), copy=False)
        return values.view(self.dtype).reshape(place.count, self.width)

    def _part(self, file: Path) -> dict[bytes, _Place]:
        held, mend = file.with_suffix(".bin"), _mend(file)
        plain = read_json(file, mend, _MAX_JSON)
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
    """Adds pictures to a directory; leaving the context keeps what was added.

    Args:
      directory: an empty one, or a store of the same key, type and width.
      key: what features are computed from (JSON values).
      width: Z.
      alone: no other writer is at work as far as locks tell (`files.claimed`): files that a killed one left long ago are removed.

    Raises:
      UserError: the disk is full.
      OSError: the directory cannot be written.
    """

    def __init__(self, directory: Path, key: dict[str, Any], dtype: str, width: int, *, alone: bool = False):
        self._directory, self._part = directory, None
        plain = {"format": FORMAT, "key": key, "dtype": dtype, "width": width}
        if not (directory / KEY).is_file():
            with self._while_there_is_room():
                directory.mkdir(parents=True, exist_ok=True)
                fresh = directory / f".key-{secrets.token_hex(8)}.json"
                write_json(fresh, plain)
                os.replace(fresh, directory / KEY)
        there = FeatureStore(directory)
        if (there.key, there.dtype, there.width) != (key, jnp.dtype(dtype), width):
            raise ValueError(f"{directory} holds features of another key")
        self._there, self._of, self._dtype, self._width = there, _key_hash(plain), there.dtype, width
        self._row, self._kept = width * there.dtype.itemsize, set()
        if alone:
            _clear(directory)

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._keep()

    def add(self, digest: bytes, features: Float[np.ndarray, "n Z"]) -> None:
        """The features of a picture; one that is there already stays as it is.

        Raises:
          UserError: the disk is full.
        """
        name = digest.hex()
        if digest in self._there or name in self._kept or (self._part is not None and name in self._part.pictures):
            return
        if features.dtype != self._dtype or features.shape[1] != self._width:
            raise ValueError(f"features {features.dtype}{features.shape} for a store of {self._dtype}[n, {self._width}]")
        data = np.ascontiguousarray(features).view(f"=u{self._dtype.itemsize}").astype(_STORED[self._dtype.itemsize], copy=False).tobytes()
        with self._while_there_is_room():
            if self._part is None:
                self._part = _Part(self._directory)
            part = self._part
            part.file.seek(part.rows * self._row)  # an interrupted write may have left more
            part.file.write(data)
        # in one step: whatever interrupts this, the list is that of whole pictures
        part.pictures[name] = (part.rows, len(features), zlib.crc32(data))
        if part.rows * self._row >= PART_BYTES or len(part.pictures) >= PART_PICTURES:
            self._keep()

    def _keep(self) -> None:
        """Says that what was added since the last time is there, once it is. May be interrupted and called again."""
        part = self._part
        if part is None:
            return
        with self._while_there_is_room():
            part.file.flush()
            part.file.truncate(part.rows * self._row)
            os.fsync(part.file.fileno())
            write_json(part.list, {"of": self._of, "pictures": part.pictures})
        self._kept |= part.pictures.keys()
        self._part = None
        part.file.close()

    @contextlib.contextmanager
    def _while_there_is_room(self) -> Iterator[None]:
        """Gives up what was added since the last time where nothing can be written."""
        try:
            yield
        except OSError as error:
            part, self._part = self._part, None
            if part is not None:
                part.file.raw.close()  # without the bytes that still wait
                Path(part.file.name).unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"config.features.cache: no space is left for {self._directory}; make room, or choose another directory") from error


class _Part:
    """A part that is being written, under names that no other writer has."""

    def __init__(self, directory: Path):
        self.list = directory / f"part-{secrets.token_hex(8)}.json"
        self.file = self.list.with_suffix(".bin").open("xb")
        self.pictures: dict[str, tuple[int, int, int]] = {}

    @property
    def rows(self) -> int:
        """What the pictures of the list take."""
        start, count, _ = next(reversed(self.pictures.values()), (0, 0, 0))
        return start + count


def strangers(directory: Path) -> list[str]:
    """Names of files in a directory that no writer of features makes."""
    own = (_LIST, _NUMBERS, _TEMPORARY, _LOCK)
    return sorted(path.name for path in directory.iterdir() if path.name != KEY and not any(kind.fullmatch(path.name) for kind in own))


def _clear(directory: Path) -> None:
    """Removes what writers that were killed left long ago."""
    for file in directory.iterdir():
        unlisted = _NUMBERS.fullmatch(file.name) and not file.with_suffix(".json").exists()
        if (unlisted or _TEMPORARY.fullmatch(file.name)) and time.time() - file.stat().st_mtime > STALE_S:
            file.unlink(missing_ok=True)


def _is_key(plain: dict[str, Any]) -> bool:
    if plain.keys() != {"format", "key", "dtype", "width"}:
        return False
    return isinstance(plain["key"], dict) and plain["dtype"] in TYPES and type(plain["width"]) is int and plain["width"] > 0


def _is_part(plain: Any) -> bool:
    """Whether it lists pictures one behind the other."""
    if not isinstance(plain, dict) or plain.keys() != {"of", "pictures"} or not isinstance(plain["pictures"], dict):
        return False
    end = 0
    for digest, place in plain["pictures"].items():
        if len(digest) != 32 or set(digest) - set("0123456789abcdef") or not isinstance(place, list) or len(place) != 3:
            return False
        # a bool is an int, too
        if not all(type(number) is int and number >= 0 for number in place) or place[0] != end:
            return False
        end += place[1]
    return True


def _key_hash(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


START_AGAIN = "Start the run again: what is missing is computed before training."
_ELSEWHERE = "Choose another directory for config.features.cache."


def _mend(part: Path) -> str:
    return f"Delete {part.with_suffix('.json')} and {part.with_suffix('.bin').name} beside it; what they hold is computed again."


def _mend_all(directory: Path) -> str:
    return f"Delete {directory}; it is computed again."
