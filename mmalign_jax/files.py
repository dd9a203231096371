"""Small files: JSON that is read with its place named, files that are found either old or new, and directories that one run at a time writes."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmalign_jax.errors import DataError, UserError

MAX_JSON = 1 << 30  # bytes


def read_json(file: Path, mend: str = "Remove it.", most: int = MAX_JSON) -> Any:
    """The JSON value in a file.

    Args:
      mend: what the user can do when the file is damaged.
      most: bytes that are read at most.

    Raises:
      UserError: there is no such file.
      DataError: it is not JSON, or larger.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if (size := file.stat().st_size) > most:
        raise DataError(f"{size} bytes, more than the {most} that such a file may have", file=str(file), mend=mend)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"damaged, not readable as JSON ({error})", file=str(file), mend=mend) from error


def write_json(file: Path, value: Any) -> None:
    replace_text(file, json.dumps(value, indent=1) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Writes a file so that it is found either old or new, never half, whatever stops the process or the machine."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)


@contextlib.contextmanager
def claimed(directory: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Keeps other runs that share a cache from writing the same set; a process that ends, in whatever way, lets go.

    Args:
      waiting: called when another run is at it, before waiting for its end.

    Yields:
      whether others are kept out; False where the file system has no locks.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as lock:
        locked = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            locked = False  # a file system without locks: two runs at once would compute the same twice
        yield locked
