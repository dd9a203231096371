"""What a maker of pairs has made so far, a line a record: one that is killed goes on where it was, without repeating or losing a record."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign_jax.data.records import from_example, to_example
from mmalign_jax.types import PreferenceRecord

_KEPT_EVERY = 64  # lines that a crash of the machine may take; one of the process takes none


class Journal:
    """Lines of JSON: the maker's identity, then of each record, in order, its pairs (without the bytes of their media) and the counts so far.

    What a maker of another identity left is removed. A line that was not written to its end is taken off.

    Args:
      file: where it is, until the set is finished.
      identity: changes when the pairs would.
    """

    def __init__(self, file: Path, identity: str):
        self._file, self._identity = file, identity
        self._done = 0
        self.statistics: Mapping[str, Any] = {}
        length = self._read()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._opened = file.open("r+b" if length else "wb")
        self._opened.truncate(length)
        self._opened.seek(length)
        if not length:
            self._write(identity)

    def __len__(self) -> int:
        """Records that are done."""
        return self._done

    def kept(self, media_of: Callable[[int], Sequence[bytes]]) -> Iterator[list[PreferenceRecord]]:
        """The pairs of each record that is done, one record at a time in memory.

        Args:
          media_of: number of a record -> its pictures, which its pairs have, too.
        """
        with self._file.open("rb") as lines:
            next(lines)
            for number, line in zip(range(self._done), lines, strict=False):
                texts = json.loads(line)["pairs"]
                media = media_of(number) if texts else ()
                yield [from_example({"record": text, "media": media}, file=str(self._file), row=str(number)) for text in texts]

    def add(self, pairs: Sequence[PreferenceRecord], statistics: Mapping[str, Any]) -> None:
        """The pairs of the next record, and the counts with it."""
        texts = [to_example(pair)["record"] for pair in pairs]
        self._done += 1
        self._write({"pairs": texts, "statistics": dict(statistics)})

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file; one without a record is of no use to anyone."""
        self._opened.close()
        if not self._done:
            self.remove()

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)

    def _read(self) -> int:
        """Takes what is there; the length of it in bytes."""
        if not self._file.is_file():
            return 0
        length = 0
        with self._file.open("rb") as lines:
            for number, line in enumerate(lines):
                if not line.endswith(b"\n"):
                    break
                try:
                    value = json.loads(line)
                except ValueError:
                    break
                if number == 0 and value != self._identity:
                    break
                if number:
                    if not isinstance(value, dict) or value.keys() != {"pairs", "statistics"}:
                        break
                    self.statistics = value["statistics"]
                    self._done = number
                length += len(line)
        return length

    def _write(self, value: Any) -> None:
        self._opened.write(json.dumps(value).encode() + b"\n")
        self._opened.flush()
        if self._done % _KEPT_EVERY == 0:
            os.fsync(self._opened.fileno())
