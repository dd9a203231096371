"""What an importer hands over: a stream of records and bad rows, with a fingerprint of the files behind it."""

import dataclasses
import glob
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from mmalign_jax.data.bad_rows import BadRow, Place
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.types import Media, PreferenceRecord

MARKER = "import.json"  # the file that makes a directory a set of prepared records

Rows = Iterator[PreferenceRecord | BadRow]


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that can be imported. Whoever makes records in another way (a renderer, a pair maker) builds one of these.

    `rows` may be called more than once and must give the same rows in the same order. `fingerprint` is any text that changes when
    the rows would change. Two mappings are filled while rows are read: `side_files` with the image files outside the set, their size
    and mtime, and `statistics` with what the maker has to say of its rows (JSON values), which is kept beside them.
    """

    name: str
    fingerprint: str
    rows: Callable[[], Rows]
    side_files: MutableMapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    statistics: MutableMapping[str, Any] = dataclasses.field(default_factory=dict)


def stamp(file: Path) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds: what tells that a file changed."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def fingerprint(kind: str, files: Iterable[Path]) -> str:
    """A hash over the format's name and every file's path, size and modification time."""
    listing = [kind, *([str(file.resolve()), *stamp(file)] for file in files)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files behind `path` in sorted order: a file, a glob pattern, or a directory (searched to any depth).

    Raises:
      UserError: nothing is there, or a directory holds more than one split (which would mix test rows into training).
    """
    if not path:
        raise UserError("config.data.path: not set. Give a parquet or jsonl file, a directory of them, or prepared records")
    root = Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        found = (file for suffix in suffixes for file in root.rglob(f"*{suffix}") if file.is_file())
        files = sorted(file for file in found if not (file.parent / MARKER).exists())  # the lists of prepared sets are no data
    else:
        files = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not files:
        raise UserError(f"config.data.path: no {' or '.join(suffixes)} file at {path}")
    splits = {file.name.split("-")[0].split(".")[0] for file in files} & {"train", "test", "validation", "val", "dev"}
    if root.is_dir() and len(splits) > 1:
        raise UserError(
            f"config.data.path: {path} holds the splits {', '.join(sorted(splits))}; name one, for example {path}/**/train*{suffixes[0]}"
        )
    return files


def root_of(path: str) -> Path:
    """The directory that `path` means: itself, a file's, or the one in which a glob pattern starts. Record ids are relative to it."""
    root = Path(path)
    if root.is_dir():
        return root
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), root.parent.parts)
    return root.parent if root.is_file() else Path(*plain)


def rows_of_parquet(file: Path, columns: Iterable[str], required: Iterable[str]) -> Iterator[tuple[int, dict]]:
    """Yields (row number, row) with the columns that exist, a small batch at a time.

    Raises:
      DataError: the file is damaged, or a required column is missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if missing := [name for name in required if name not in names]:
                raise DataError(
                    f"no column {', '.join(missing)}; there are {', '.join(names)}",
                    file=str(file),
                    mend="Check config.data.format, or rename the columns.",
                )
            number = 0
            for batch in table.iter_batches(batch_size=32, columns=[name for name in columns if name in names]):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the parquet file cannot be read ({error})", file=str(file), mend="Download the file again.") from error


def columns_of(file: Path) -> dict[str, str]:
    """Column name -> Arrow type of a parquet file.

    Raises:
      DataError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the parquet file cannot be read ({error})", file=str(file), mend="Download the file again.") from error
    return {field.name: str(field.type) for field in schema}


@dataclasses.dataclass(frozen=True)
class MediaReader:
    """Image cells of a table -> bytes. Paths are relative to `root` and stay under it, symbolic links included."""

    root: Path
    max_bytes: int
    side_files: MutableMapping[str, tuple[int, int]]

    def read(self, cell: object, place: Place) -> Media:
        """The image of one cell; see `picture`."""
        data, origin = self.picture(cell, place)
        return Media("image", data, origin)

    def picture(self, cell: object, place: Place, name: str = "") -> tuple[bytes, str]:
        """Reads one cell: bytes, a path, or a struct of the two (bytes win).

        Args:
          name: of the picture in errors, where the row has several.

        Returns:
          The encoded bytes, not looked at, and the path ("" without one).

        Raises:
          BadRow: nothing there, no such file, outside the root, or too large.
        """
        path = cell
        if isinstance(cell, dict):
            path = cell.get("path")
            cell = cell.get("bytes") or path
        path = path if isinstance(path, str) else ""
        if isinstance(cell, bytes) and cell:
            self._check_size(len(cell), name or "the image", place)
            return cell, path
        if isinstance(cell, str) and cell:
            return self._file(cell, place, f"{name}: " if name else ""), cell
        problem = f"there is no {name}" if name else "the row has no image"
        raise place.bad("missing_image", problem, "Give the row its image or remove the row.")

    def _check_size(self, size: int, name: str, place: Place) -> None:
        if size > self.max_bytes:
            mend = "Shrink the image or raise config.data.max_image_bytes."
            raise place.bad("image_too_large", f"{name} has {size} bytes, over the limit of {self.max_bytes}", mend)

    def _file(self, path: str, place: Place, lead: str) -> bytes:
        mend = f"Put the image under {self.root}, or remove the row."
        try:
            root = self.root.resolve()
            file = (root / path).resolve()
            if not file.is_relative_to(root):
                raise place.bad("missing_image", f"{lead}the image path {path!r} leaves the directory of the data set", mend)
            if not file.is_file():
                raise place.bad("missing_image", f"{lead}there is no image file {path!r}", mend)
            size, changed = stamp(file)
            self._check_size(size, f"{lead}the image file {path!r}", place)
            self.side_files[str(file)] = (size, changed)
            return file.read_bytes()
        except (OSError, ValueError) as error:  # a name that is too long, a zero byte, no permission
            raise place.bad("missing_image", f"{lead}the image file {path!r} cannot be read ({error})", mend) from error
