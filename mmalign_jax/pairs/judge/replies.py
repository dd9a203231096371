"""Replies on disk, so that what was paid for is not asked again: a line a reply, added and never changed."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign_jax.errors import DataError


class Replies:
    """Texts by request. A process that is killed while it writes leaves at most one broken line at the end, which is cut off.

    Args:
      file: is made when it is not there; None keeps replies in memory alone.

    Raises:
      DataError: a line is damaged that is not the last.
    """

    def __init__(self, file: Path | None = None):
        self._file, self._lock = file, threading.Lock()
        self._texts: dict[str, str] = {}
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if file.exists():
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.endswith(b"\n"):
                        break
                    self._read(line, number)
                    whole += len(line)
            os.truncate(file, whole)

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, key: str) -> str | None:
        return self._texts.get(key)

    def put(self, key: str, text: str) -> None:
        """Keeps a reply; it is on disk when this returns."""
        with self._lock:
            self._texts[key] = text
            if self._file is None:
                return
            with self._file.open("ab") as opened:
                opened.write(json.dumps({"key": key, "text": text}).encode() + b"\n")
                opened.flush()
                os.fsync(opened.fileno())

    def _read(self, line: bytes, number: int) -> None:
        try:
            entry = json.loads(line)
            self._texts[str(entry["key"])] = str(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            mend = "Delete the line, or the file to ask everything again."
            raise DataError(f"no reply ({error!r})", file=str(self._file), row=str(number), mend=mend) from error


def key_of(body: Mapping[str, Any]) -> str:
    """Of a request: what a reply depends on."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
