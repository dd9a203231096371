"""Small files: JSON that is read with its place named, and files that are found either old or new."""

import json
import os
from pathlib import Path
from typing import Any

from mmalign_jax.errors import DataError, UserError


def read_json(file: Path, mend: str = "Remove it.") -> Any:
    """The JSON value in a file.

    Args:
      mend: what the user can do when the file is damaged.

    Raises:
      UserError: there is no such file.
      DataError: it is not JSON.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
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
