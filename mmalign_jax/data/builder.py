"""Records on disk: a TFDS builder that writes ArrayRecord, the import that fills it, and the reader.

A prepared set is a directory with
  preference_records/1.0.0/   ArrayRecord shards and TFDS metadata (tfds.builder_from_directory reads it)
  skipped.jsonl               the bad rows, one JSON object a line, when they were skipped
  statistics.json             what the maker of the rows has to say of them, when it has
  import.json                 fingerprint, counts, shard sizes; written last, so a directory without it is no prepared set
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError

from mmalign_jax.config import DataConfig
from mmalign_jax.data import sources
from mmalign_jax.data.bad_rows import BadRow, place_of
from mmalign_jax.data.records import SCHEMA, from_example, to_example
from mmalign_jax.data.sources.source import MARKER, Source, stamp
from mmalign_jax.data.validate import check_record
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.files import claimed, read_json, write_json
from mmalign_jax.types import PreferenceRecord

STATISTICS = "statistics.json"
_SPLIT = "train"
_SHARD_RECORDS = 2048
_CHUNK_RECORDS, _CHUNK_BYTES = 64, 64 << 20  # held in memory at a time; TFDS rewrites its metadata after each chunk


class PreferenceRecords(tfds.core.GeneratorBasedBuilder):
    """TFDS builder over ready-made examples (`records.to_example`), in the order in which they come."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. Left alone, TFDS looks for a list of URLs, with a package that it does not declare on Python 3.9 and up.
    url_infos = None

    def __init__(self, examples: Iterable[Mapping[str, Any]] = (), **settings):
        self._examples = examples
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        medium = tfds.features.Tensor(shape=(), dtype=np.object_)  # bytes as they are; an Image feature would decode
        features = tfds.features.FeaturesDict({"record": tfds.features.Text(), "media": tfds.features.Sequence(medium)})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._examples)

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        """Streams the examples to shards.

        The inherited method sorts them first, in memory up to 1 GB and beyond that in files which need TensorFlow.
        """
        info = self._info()  # one of its own, because self.info keeps the final directory and this is still a temporary one
        writer = tfds.core.SequentialWriter(info, _SHARD_RECORDS, file_format=tfds.core.FileFormat.ARRAY_RECORD.value)
        for split, examples in self._split_generators(dl_manager).items():
            writer.initialize_splits([split])
            chunk, size = [], 0
            for _, example in examples:
                chunk.append(example)
                size += sum(map(len, example["media"]))
                if len(chunk) == _CHUNK_RECORDS or size >= _CHUNK_BYTES:
                    writer.add_examples({split: chunk})
                    chunk, size = [], 0
            if chunk:
                writer.add_examples({split: chunk})
        writer.close_all()
        self.info.set_splits(info.splits)

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Nothing is downloaded."""


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A finished import. `read == count + sum(skipped.values())`; `skipped` counts rows by reason (`bad_rows.REASONS`).

    `fingerprint` changes when the records would: with source, settings, and the image files that the rows referred to.
    """

    dir: Path
    count: int
    read: int
    skipped: Mapping[str, int]
    fingerprint: str
    reused: bool = False


def prepare(config: DataConfig, source: Source, out_dir: str | Path, *, progress: Callable[[int, int], None] | None = None) -> PreparedSet:
    """Checks every row of `source` and writes the good ones to `out_dir`, or finds that this has been done before.

    An interrupted import leaves `out_dir` as it was. A set whose source or settings changed is imported again. One process may
    prepare a directory at a time.

    Args:
      progress: called after every row with the numbers of rows read and skipped.

    Raises:
      BadRow (a DataError): the first bad row, with `config.on_bad_row == "error"`.
      DataError: no row is usable, or a source file is damaged.
      UserError: `out_dir` holds something that is not a prepared set.
    """
    if found := find(config, source, out_dir):
        return found
    out = Path(out_dir)
    if _finished(out) is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds other files; name a new or empty directory for the prepared records")

    work, old = (out.with_name(f".{out.name}.{state}") for state in ("importing", "replaced"))
    for leftover in (work, old):
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        summary = _import(config, source, work, progress)
        if source.statistics:
            write_json(work / STATISTICS, dict(source.statistics))
        write_json(work / MARKER, {"fingerprint": _fingerprint(config, source), **summary, "side_files": dict(source.side_files)})
        if out.exists():
            out.rename(old)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return _prepared(out, _finished(out))


def find(config: DataConfig, source: Source, out_dir: str | Path) -> PreparedSet | None:
    """What `prepare` made of this source before, None when it would have to be made.

    Raises:
      DataError: the set is damaged.
    """
    done = _finished(Path(out_dir))
    if done is None or done["fingerprint"] != _fingerprint(config, source) or not _unchanged(done["side_files"]):
        return None
    return _prepared(Path(out_dir), done, reused=True)


def obtain(
    config: DataConfig, out_dir: str | Path, source: Source | None = None, *, progress: Callable[[int, int], None] | None = None
) -> PreparedSet:
    """The prepared set that `config` names: opened when `config.path` is one already, else imported.

    It is imported to `out_dir`, or, where `config.cache` is set, to a directory there that is named by the fingerprint: sets, and
    settings that make other records of the same set, share a cache without replacing each other.

    Args:
      source: where the rows come from; None: from `config.path`.

    Raises:
      UserError, DataError: see `prepare` and `sources.read`.
    """
    if source is None:
        if config.format == "records" or (config.format == "auto" and sources.detect(config.path) == "records"):
            return describe(config.path)
        source = sources.read(config)
    if not config.cache:
        return prepare(config, source, out_dir, progress=progress)
    out = Path(config.cache) / _fingerprint(config, source)[:16]
    with claimed(out):
        return prepare(config, source, out, progress=progress)


def _fingerprint(config: DataConfig, source: Source) -> str:
    """Of the records that an import of `source` writes, side files apart."""
    limits = [config.max_image_pixels, config.max_image_bytes, config.max_frames]
    return _hash([SCHEMA, source.fingerprint, config.on_bad_row, *limits])


def _hash(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def describe(directory: str | Path) -> PreparedSet:
    """What is known about a prepared set.

    Raises:
      UserError: `directory` is not one.
    """
    done = _finished(Path(directory))
    if done is None:
        raise UserError(f"{directory} is not a set of prepared records: it has no {MARKER}")
    return _prepared(Path(directory), done)


def _import(config: DataConfig, source: Source, work: Path, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    read = 0

    def good_examples(skipped) -> Iterator[dict[str, Any]]:
        nonlocal read
        for outcome in _checked(source, config):
            read += 1
            if isinstance(outcome, BadRow):
                if config.on_bad_row == "error":
                    raise outcome
                counts[outcome.reason] += 1
                skipped.write(json.dumps({key: getattr(outcome, key) for key in ("file", "row", "reason", "problem", "mend")}) + "\n")
            else:
                yield outcome
            if progress:
                progress(read, counts.total())

    with (work / "skipped.jsonl").open("w", encoding="utf-8") as skipped:
        examples = good_examples(skipped)
        first = next(examples, None)
        if first is None:
            found = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "it is empty"
            raise DataError(f"no usable row ({found})", file=source.name, mend="Check config.data.path and config.data.format.")
        builder = PreferenceRecords(itertools.chain([first], examples), data_dir=str(work), file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        shutil.rmtree(work / "downloads", ignore_errors=True)  # TFDS makes it, empty
    (split,) = builder.info.splits.values()
    shards = {path.name: path.stat().st_size for path in map(Path, split.filepaths)}
    return {"read": read, "count": split.num_examples, "skipped": dict(sorted(counts.items())), "shards": shards}


def _checked(source: Source, config: DataConfig) -> Iterator[dict[str, Any] | BadRow]:
    """Checks rows on `config.workers` threads (decoding releases the interpreter lock) and gives them in order."""
    seen: set[str] = set()

    def check(row: PreferenceRecord | BadRow) -> dict[str, Any] | BadRow:
        if isinstance(row, BadRow):
            return row
        place = place_of(row, source.name)
        try:
            check_record(row, place, max_pixels=config.max_image_pixels, max_bytes=config.max_image_bytes, max_frames=config.max_frames)
            return to_example(row)
        except BadRow as error:
            return error

    def unique(row: PreferenceRecord | BadRow) -> PreferenceRecord | BadRow:
        if isinstance(row, BadRow) or row.id not in seen:
            seen.update(() if isinstance(row, BadRow) else (row.id,))
            return row
        return place_of(row, source.name).bad("duplicate_id", f"the id {row.id!r} occurs twice", "Give every record its own id.")

    rows = map(unique, source.rows())
    if config.workers == 0:
        yield from map(check, rows)
        return
    with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for row in rows:
            waiting.append(pool.submit(check, row))
            if len(waiting) > 4 * config.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class RecordSource:
    """Random access to the records of a prepared set. Safe to read from several threads."""

    def __init__(self, prepared: PreparedSet, reader: Any, shards: list[tuple[str, int]]):
        self.prepared = prepared
        self._reader = reader
        self._names = [name for name, _ in shards]
        self._ends = np.cumsum([length for _, length in shards])

    def __len__(self) -> int:
        return self.prepared.count

    def __getitem__(self, index: int) -> PreferenceRecord:
        """The record `index`, 0 <= index < len.

        Raises:
          DataError: the shard that holds it is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = self._names[int(np.searchsorted(self._ends, index, side="right"))]
        try:
            example = self._reader[int(index)]
        except (RuntimeError, ValueError, KeyError, IndexError, DecodeError, OSError) as error:
            raise DataError(f"the shard is corrupt ({error})", file=file, row=str(index), mend=_again(self.prepared.dir)) from error
        return from_example(example, file=file, row=str(index))


def open_records(directory: str | Path) -> RecordSource:
    """Opens a prepared set.

    Raises:
      UserError: `directory` is not one.
      DataError: a shard or its description is missing or damaged.
    """
    prepared = describe(directory)
    done = _finished(prepared.dir)
    data = prepared.dir / PreferenceRecords.name / str(PreferenceRecords.VERSION)
    for name, size in done["shards"].items():
        found = (data / name).stat().st_size if (data / name).is_file() else None
        if found != size:
            problem = "the shard is missing" if found is None else f"the shard is corrupt: {found} bytes, {size} were written"
            raise DataError(problem, file=str(data / name), mend=_again(prepared.dir))
    try:
        builder = tfds.builder_from_directory(data)
        reader = builder.as_data_source(split=_SPLIT)
        (split,) = builder.info.splits.values()
        shards = list(zip(map(str, split.filepaths), split.shard_lengths, strict=True))
    except (RuntimeError, ValueError, KeyError, OSError, ParseError) as error:
        raise DataError(f"the description of the set is damaged ({error})", file=str(data), mend=_again(prepared.dir)) from error
    if split.num_examples != prepared.count:
        raise DataError(f"{split.num_examples} records, {prepared.count} were written", file=str(data), mend=_again(prepared.dir))
    return RecordSource(prepared, reader, shards)


def _again(directory: Path) -> str:
    return f"Delete {directory} and import the data set again."


def _prepared(out: Path, done: Mapping[str, Any], reused: bool = False) -> PreparedSet:
    fingerprint = _hash([done["fingerprint"], done["side_files"]])
    return PreparedSet(out, done["count"], done["read"], done["skipped"], fingerprint, reused)


def _finished(out: Path) -> dict[str, Any] | None:
    """What `import.json` says, or None when there is no such file."""
    file = out / MARKER
    if not file.is_file():
        return None
    done = read_json(file, mend=_again(out))
    if not isinstance(done, dict) or set(done) != {"fingerprint", "read", "count", "skipped", "shards", "side_files"}:
        raise DataError("damaged (not its keys)", file=str(file), mend=_again(out))
    return done


def _unchanged(side_files: Mapping[str, list[int]]) -> bool:
    """Whether the image files that the rows referred to are still the ones that were imported."""
    for name, old in side_files.items():
        file = Path(name)
        if not file.is_file() or list(stamp(file)) != old:
            return False
    return True
