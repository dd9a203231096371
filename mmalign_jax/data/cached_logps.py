"""Log-probs of a plan's answers that were computed once: by token, ragged, so that no layout matters.

A finished set is a directory with
  logps.npy     float32[tokens]: one answer behind the other, in the order of the plan's items
  lengths.npy   int32[items, K]: tokens of each answer
  records.npy   uint8[records, 16]: digests of the records
  key.json      what they were computed from, and size and hash of the files
It appears as a whole (`data.logps_writer`).
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from mmalign_jax.data.layout import RowLayout
from mmalign_jax.errors import DataError
from mmalign_jax.files import read_json

KEY, LOGPS, LENGTHS, RECORDS = "key.json", "logps.npy", "lengths.npy", "records.npy"

# Name of a set -> the field of `types.PairBatch` that it fills
FIELDS = {"answers": "reference_logps", "other_image": "reference_other_logps"}


@dataclasses.dataclass(frozen=True, eq=False)
class CachedLogps:
    """A finished set, as what a loader adds to its rows (`loader.Extra`).

    Args:
      directory: where it is; the directory's name says which field it fills.
      key: what it was computed from (JSON values).
      ends: one-past-last place of each answer in `logps`.
    """

    directory: Path
    key: dict[str, Any]
    logps: Float32[np.ndarray, " tokens"]
    ends: Int64[np.ndarray, "items K"]
    records: UInt8[np.ndarray, "records 16"]

    @classmethod
    def open(cls, directory: Path) -> "CachedLogps | None":
        """The set in a directory, None when none was finished there. Every byte is checked, values stay on disk until they are used.

        Raises:
          DataError: a file is missing, truncated or changed.
        """
        if not directory.is_dir():
            return None
        file, mend = directory / KEY, _mend(directory)
        plain = read_json(file, mend)
        if not isinstance(plain, dict) or set(plain) != {"key", "files"} or set(plain["files"]) != {LOGPS, LENGTHS, RECORDS}:
            raise DataError("damaged (not its keys)", file=str(file), mend=mend)
        logps, lengths, records = (_load(directory / name, plain["files"][name], mend) for name in (LOGPS, LENGTHS, RECORDS))
        ends = np.cumsum(lengths.reshape(-1), dtype=np.int64).reshape(lengths.shape)
        return cls(directory, plain["key"], logps, ends, records)

    def __call__(self, number: int, layout: RowLayout) -> dict[str, np.ndarray]:
        """The field of item `number`: float32, 0 off the answers. `reference_logps` are `[T]`, those of other images `[K' R]`.

        Raises:
          DataError: an answer has more tokens than there is room for.
        """
        field, (answers, room) = FIELDS[self.directory.name], (self.ends.shape[1], layout.answer_slots)
        first = layout.prefix_slots if field == "reference_logps" else 0
        row = np.zeros(first + answers * room, np.float32)
        # the items before end where this one begins
        borders = [int(self.ends[number - 1, -1]) if number else 0, *map(int, self.ends[number])]
        for k, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
            if stop - start > room:
                problem = f"answer {k} of item {number} has {stop - start} tokens, its row has {room} slots"
                raise DataError(problem, file=str(self.directory / LENGTHS), mend=_mend(self.directory))
            row[first + k * room : first + k * room + stop - start] = self.logps[start:stop]
        return {field: row}


def stamp(file: Path) -> list:
    """Size and hash of a file: what `CachedLogps.open` compares."""
    with file.open("rb") as opened:
        return [file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()]


def _load(file: Path, expected: list, mend: str) -> np.ndarray:
    if not file.is_file():
        raise DataError("the file is missing", file=str(file), mend=mend)
    size = file.stat().st_size
    if size != expected[0]:
        raise DataError(f"the file is truncated: {size} bytes, {expected[0]} were written", file=str(file), mend=mend)
    if stamp(file) != expected:
        raise DataError("the file is corrupt: its content has changed since it was written", file=str(file), mend=mend)
    return np.load(file, allow_pickle=False, mmap_mode="r")


def _mend(directory: Path) -> str:
    return f"Delete {directory}; it is computed again."
