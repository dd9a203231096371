"""Writing of `data.cached_logps`: rows come in any order, parts of them are kept, and the set appears at once when all are there."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from mmalign_jax.data.cached_logps import KEY, LENGTHS, LOGPS, RECORDS, stamp
from mmalign_jax.errors import DataError
from mmalign_jax.files import read_json, write_json
from mmalign_jax.hf.files import make_sibling, move_into_place

PART_ROWS = 512  # rows that are lost at most when a sweep is killed


class LogpsWriter:
    """The rows of a set so far. What a killed sweep of the same key has kept is taken over; of another key, it is removed.

    Args:
      directory: of the finished set. Parts lie beside it until then.
      key: what the rows are computed from (JSON values).
      shape: (items, answers of each).
    """

    def __init__(self, directory: Path, key: dict[str, Any], shape: tuple[int, int]):
        self._directory, self._key, self._shape = directory, key, shape
        self._parts = directory.parent / f".{directory.name}.parts"
        self._waiting: list[tuple[Int32[np.ndarray, " _"], Float32[np.ndarray, " _"]]] = []
        if not self._of_the_same_key():
            shutil.rmtree(self._parts, ignore_errors=True)
            self._parts.mkdir(parents=True)
            write_json(self._parts / KEY, key)
        self.done: Bool[np.ndarray, " items"] = np.zeros(shape[0], bool)
        for rows, _ in self._kept():
            self.done[rows[:, 0]] = True

    def add(self, number: int, lengths: Int32[np.ndarray, " K"], logps: Float32[np.ndarray, "K R"]) -> None:
        """The log-probs of item `number`: of answer k the first `lengths[k]` of `logps[k]`."""
        tokens = np.concatenate([logps[k, :length] for k, length in enumerate(lengths)])
        self._waiting.append((np.array([number, *lengths], np.int32), tokens.astype(np.float32)))
        self.done[number] = True
        if len(self._waiting) >= PART_ROWS:
            self._keep()

    def finish(self, records: UInt8[np.ndarray, "records 16"]) -> None:
        """Puts the finished set in its place.

        Raises:
          ValueError: an item is missing.
        """
        self._keep()
        if not self.done.all():
            raise ValueError(f"{int((~self.done).sum())} items have no log-probs")
        lengths = np.zeros(self._shape, np.int32)
        for rows, _ in self._kept():
            lengths[rows[:, 0]] = rows[:, 1:]
        starts = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
        fresh = make_sibling(self._directory)
        logps = np.lib.format.open_memmap(fresh / LOGPS, mode="w+", dtype=np.float32, shape=(int(starts[-1]),))
        for rows, values in self._kept():
            at = 0
            for number, *own in rows.tolist():
                logps[starts[number] : starts[number + 1]] = values[at : at + sum(own)]
                at += sum(own)
        logps.flush()
        del logps
        _save(fresh / LENGTHS, lengths)
        _save(fresh / RECORDS, records)
        write_json(fresh / KEY, {"key": self._key, "files": {name: stamp(fresh / name) for name in (LOGPS, LENGTHS, RECORDS)}})
        move_into_place(self._directory)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _of_the_same_key(self) -> bool:
        try:
            return (self._parts / KEY).is_file() and read_json(self._parts / KEY) == self._key
        except DataError:
            return False

    def _kept(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Parts as (item and lengths of each row, their log-probs). The file of the rows is written last: without it there is no part."""
        for file in sorted(self._parts.glob("*.rows.npy")):
            values = file.with_name(file.name.replace(".rows.", ".logps."))
            yield np.load(file, allow_pickle=False), np.load(values, allow_pickle=False, mmap_mode="r")

    def _keep(self) -> None:
        if not self._waiting:
            return
        name = f"{len(list(self._parts.glob('*.rows.npy'))):06}"
        _save(self._parts / f"{name}.logps.npy", np.concatenate([tokens for _, tokens in self._waiting]))
        _save(self._parts / f"{name}.rows.npy", np.stack([row for row, _ in self._waiting]))
        self._waiting = []


def _save(file: Path, values: np.ndarray) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as opened:
        np.save(opened, values, allow_pickle=False)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)
