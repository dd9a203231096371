"""Replies on disk, so that what was paid for is not asked again: a line a reply, added and never changed."""

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mmalign_jax.errors import DataError


class Replies:
    """Texts by request. Runs may share a file. One that is killed while it writes leaves at most a broken line at the end, which is cut off.

    Args:
      file: is made when it is not there; None keeps replies in memory alone.

    Raises:
      DataError: a line is damaged that is not the last.
    """

    def __init__(self, file: Path | None = None):
        self._file, self._lock = file, threading.Lock()
        self._texts: dict[str, str] = {}
        self._seen, self._lines = 0, 0  # bytes and lines that are read
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as opened, _locked(opened):
                self._catch_up()
                opened.truncate(self._seen)  # nobody writes while the lock is held, so what is behind it is broken

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, key: str) -> str | None:
        """The reply, also one that another run has kept meanwhile."""
        with self._lock:
            if key not in self._texts and self._file is not None and self._file.stat().st_size > self._seen:
                self._catch_up()
            return self._texts.get(key)

    def put(self, key: str, text: str) -> None:
        """Keeps a reply; it is on disk when this returns."""
        with self._lock:
            self._texts[key] = text
            if self._file is None:
                return
            with self._file.open("ab") as opened, _locked(opened):
                opened.write(json.dumps({"key": key, "text": text}).encode() + b"\n")
                opened.flush()
                os.fsync(opened.fileno())

    def _catch_up(self) -> None:
        """Reads the whole lines behind those that are read."""
        with self._file.open("rb") as lines:
            lines.seek(self._seen)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._lines += 1
                self._read(line, self._lines)
                self._seen += len(line)

    def _read(self, line: bytes, number: int) -> None:
        try:
            entry = json.loads(line)
            self._texts[str(entry["key"])] = str(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            mend = "Delete the line, or the file to ask everything again."
            raise DataError(f"no reply ({error!r})", file=str(self._file), row=str(number), mend=mend) from error


@contextlib.contextmanager
def _locked(opened: IO[bytes]) -> Iterator[None]:
    """Keeps other processes that ask for the same lock from writing."""
    fcntl.flock(opened, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(opened, fcntl.LOCK_UN)


def key_of(body: Mapping[str, Any]) -> str:
    """Of a request: what a reply depends on."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
