"""Pairs made before training: BDHS over a whole set of records, streamed into a prepared set that is not made twice."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from mmalign_jax.config import Config
from mmalign_jax.data import builder
from mmalign_jax.data.plan import LeftOut, Records, RowPlan, plan_rows
from mmalign_jax.data.sources.source import Source, stamp
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.files import claimed, read_json
from mmalign_jax.hf.export import MARKER as EXPORT_MARKER
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs.bdhs import BdhsSampler, check_one_process, reference_of
from mmalign_jax.pairs.bdhs_records import Statistics, make_pairs
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.report.console import Console
from mmalign_jax.types import PreferenceRecord

VERSION = 2  # raised whenever the same model, records and settings make other pairs than before
_NO_MATTER = ("maker", "when", "batch_size", "encoder", "cache")  # settings of config.pairs on which no pair depends; the encoder's files do count
_MATTER = ("on_long_row", "prefix_tokens", "answer_tokens")  # settings of config.data that say which records give pairs
_SMALL_FILES = (".json", ".jinja", ".txt", ".model")  # of a model: sizes, tokenizer, template, processor


@dataclasses.dataclass(frozen=True)
class References:
    """The records with nothing but the answer that pairs are made from, and with `keep_rejected` that which the set rejects.

    Raises:
      UserError: on access, of a record that has none to keep.
    """

    records: Records
    keep_rejected: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> PreferenceRecord:
        record = self.records[index]
        reference = reference_of(record)
        if not self.keep_rejected:
            return dataclasses.replace(record, responses=(reference,), prefs=())
        if len(record.prefs) != 1:
            raise UserError(f"config.pairs.gamma: record {record.id} has {len(record.prefs)} rejected answers of its own, not one; leave it 0")
        own = record.prefs[0]
        return dataclasses.replace(record, responses=(reference, record.responses[own.lose]), prefs=(dataclasses.replace(own, win=0, lose=1),))


@dataclasses.dataclass(frozen=True)
class OfflinePairs:
    """A finished set of pairs, and how it came out. `left_out`: records that did not fit, no part of the statistics."""

    prepared: builder.PreparedSet
    statistics: Statistics
    left_out: tuple[LeftOut, ...]


def make_offline(
    policy: Pretrained, records: builder.RecordSource, config: Config, out: Path, console: Console, title: str = "Making pairs"
) -> OfflinePairs:
    """BDHS pairs of all records as a prepared set in `out`; a set that is there already is taken when its `identity` is the same.

    What is held in memory does not grow with the set. An interrupted run leaves nothing.

    Args:
      config: `pairs`, and of `data` the limits of rows.
      title: of the slow part, for the console.

    Raises:
      UserError: several processes, a record without a whole reference answer, or not one pair came out.
      DataError: a row that does not fit (see `plan_rows`), or a damaged set.
    """
    made: dict[str, Any] = {}
    source = Source("BDHS", identity(policy, records, config), lambda: _rows(policy, records, config, console, title, made), statistics=made)
    prepared = builder.find(config.data, source, out)
    if prepared is None:
        check_one_process()
        prepared = builder.prepare(config.data, source, out)
    return read_offline(prepared)


def make_cached(policy: Pretrained, records: builder.RecordSource, config: Config, console: Console, title: str = "Making pairs") -> OfflinePairs:
    """`make_offline` in a directory of `config.pairs.cache` that is named by the `identity`: runs with the same pairs share it.

    A run that finds another one at it waits for its end.

    Raises:
      UserError, DataError: see `make_offline`.
    """
    name = hashlib.sha256(identity(policy, records, config).encode()).hexdigest()[:16]
    directory = Path(config.pairs.cache) / name
    with claimed(directory, lambda: console.line(f"Another run makes {directory}; waiting for it")):
        return make_offline(policy, records, config, directory, console, title)


def read_offline(prepared: builder.PreparedSet) -> OfflinePairs:
    """What `make_offline` returned when it made the set.

    Raises:
      DataError: its statistics are damaged or away.
    """
    file, mend = prepared.dir / builder.STATISTICS, f"Delete {prepared.dir} and make the pairs again."
    if not file.is_file():
        raise DataError("missing", file=str(file), mend=mend)
    plain = read_json(file, mend)
    left_out = tuple(LeftOut(**row) for row in plain.pop("left_out"))
    by_iteration = {int(number): count for number, count in plain.pop("by_iteration").items()}
    return OfflinePairs(prepared, Statistics(**plain, by_iteration=by_iteration), left_out)


def identity(policy: Pretrained, records: builder.RecordSource, config: Config) -> str:
    """A text that changes when the pairs would: with the model's files, the type that is computed in, the records, and the settings.

    Small files count by their content and weights by name, size and time of change; a model's card, licence and place do not matter.
    """
    settings = {name: value for name, value in dataclasses.asdict(config.pairs).items() if name not in _NO_MATTER}
    limits = {name: getattr(config.data, name) for name in _MATTER}
    others = [Path(directory) for directory in (policy.adapter, config.pairs.encoder) if directory]
    files = [file for directory in (policy.path, *others) for file in _model_files(directory)]
    parts = [VERSION, files, policy.model.dtype, records.prepared.fingerprint, settings, limits]
    return json.dumps(parts, sort_keys=True)


def plan_sampler(policy: Pretrained, records: Records, config: Config) -> tuple[BdhsSampler, RowPlan]:
    """A sampler that has room for every record's reference answer, and the records that fit the limits of `config.data`.

    Raises:
      DataError: a row that does not fit, see `plan_rows`.
      UserError: several processes.
    """
    plan = plan_rows(records, policy.processor, config.data, answers=1)
    lanes = max(len(split_sentences(reference_of(records[int(index)]).text)) for index, _ in plan.items)
    return BdhsSampler(policy.model, policy.processor, policy.mesh, config.pairs, plan.layout, lanes), plan


def _rows(
    policy: Pretrained, records: Records, config: Config, console: Console, title: str, made: MutableMapping[str, Any]
) -> Iterator[PreferenceRecord]:
    """The pairs, in the order of the records; `made` then holds the statistics."""
    references, statistics = References(records, keep_rejected=config.pairs.gamma > 0), Statistics()
    with console.phase(title) as progress:
        sampler, plan = plan_sampler(policy, references, config)
        with console.phase("Loading the model"):
            params = policy.params(policy.model.dtype)
        fitting = (references[int(index)] for index, _ in plan.items)
        for pairs, statistics in make_pairs(sampler, params, fitting, config.pairs):
            progress(statistics.records, len(plan.items))
            yield from pairs
    if not statistics.pairs:
        raise UserError(
            f"config.pairs: no pair came out of {statistics.records} records: each rejected answer is its reference, or unusable; "
            "raise rho_th or the temperature"
        )
    made |= {**dataclasses.asdict(statistics), "left_out": [dataclasses.asdict(row) for row in plan.left_out]}


def _model_files(directory: Path) -> list[list]:
    out: list[list] = []
    for file in sorted(directory.iterdir()):
        if file.suffix == ".safetensors":
            out.append([file.name, *stamp(file)])
        elif file.suffix in _SMALL_FILES and file.name != EXPORT_MARKER and file.is_file():
            out.append([file.name, hashlib.sha256(file.read_bytes()).hexdigest()])
    return out
