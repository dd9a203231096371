"""Pairs made before training, by BDHS or of answers that the policy draws: streamed into a prepared set that is not made twice."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
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
from mmalign_jax.pairs import scorers, selectors, sources
from mmalign_jax.pairs.answers import check_settings, plan_answers
from mmalign_jax.pairs.bdhs import BdhsSampler, check_one_process, reference_of
from mmalign_jax.pairs.bdhs_records import Statistics, make_pairs
from mmalign_jax.pairs.journal import Journal
from mmalign_jax.pairs.judge import Prompt
from mmalign_jax.pairs.judge.settings import POLICY
from mmalign_jax.pairs.sampled_records import SampleStatistics, sampled_pairs
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.report.console import Console
from mmalign_jax.types import PreferenceRecord

VERSION = 3  # raised whenever the same model, records and settings make other pairs than before
# settings of config.pairs on which no pair depends; the encoder's files do count
_NO_MATTER = ("maker", "when", "every", "batch_size", "encoder", "cache")
_NO_MATTER_OF_SAMPLES = ("batch_size", "offline_share", "offline_pairs", "reward_model", "clip", "critic")
# settings of config.data that say which records give pairs
_MATTER = ("on_long_row", "prefix_tokens", "answer_tokens", "on_bad_row", "max_image_pixels", "max_image_bytes", "max_frames")
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
            return dataclasses.replace(record, responses=(reference,), prefs=(), labels=(), groups=())
        if len(record.prefs) != 1:
            raise UserError(f"config.pairs.gamma: record {record.id} has {len(record.prefs)} rejected answers of its own, not one; leave it 0")
        own = record.prefs[0]
        pair, others = dataclasses.replace(own, win=0, lose=1), {"labels": (), "groups": ()}
        return dataclasses.replace(record, responses=(reference, record.responses[own.lose]), prefs=(pair,), **others)


@dataclasses.dataclass(frozen=True)
class OfflinePairs:
    """A finished set of pairs, or of other `rows` of scored answers, and how it came out.

    `left_out`: records that did not fit, no part of the statistics.
    """

    prepared: builder.PreparedSet
    statistics: Statistics | SampleStatistics
    left_out: tuple[LeftOut, ...]
    rows: str = "pairs"

    def in_words(self) -> str:
        counts = self.statistics
        return counts.in_words(self.rows) if isinstance(counts, SampleStatistics) else counts.in_words()


def make_offline(
    policy: Pretrained, records: builder.RecordSource, config: Config, out: Path, console: Console, title: str = "Making pairs"
) -> OfflinePairs:
    """Pairs of all records as a prepared set in `out`; a set that is there already is taken when its `identity` is the same.

    A run that was stopped or killed goes on with the record that it was at: what it had made is beside `out` until the set is finished.

    Args:
      config: `pairs`, and of `data` the limits of rows.
      title: of the slow part, for the console.

    Raises:
      UserError: several processes, a record without a whole reference answer, or not one pair came out.
      DataError: a row that does not fit (see `plan_rows`), or a damaged set.
    """
    made: dict[str, Any] = {}
    same = identity(policy, records, config)
    source = Source(config.pairs.maker, same, lambda: iter(()), statistics=made)
    prepared = builder.find(config.data, source, out)
    if prepared is None:
        check_one_process()
        with Journal(out.with_name(f".{out.name}.made.jsonl"), same) as journal:
            rows = lambda: _rows(policy, records, config, out, journal, console, title, made)  # noqa: E731
            prepared = builder.prepare(config.data, dataclasses.replace(source, rows=rows), out)
        journal.remove()
    return read_offline(prepared, config)


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


def read_offline(prepared: builder.PreparedSet, config: Config) -> OfflinePairs:
    """What `make_offline` returned when it made the set.

    Raises:
      DataError: its statistics are damaged or away.
    """
    file, mend = prepared.dir / builder.STATISTICS, f"Delete {prepared.dir} and make the pairs again."
    if not file.is_file():
        raise DataError("missing", file=str(file), mend=mend)
    plain = read_json(file, mend)
    left_out = tuple(LeftOut(**row) for row in plain.pop("left_out"))
    rows = selectors.parse(config.samples.selector).rows_in_words if config.pairs.maker == "samples" else "pairs"
    return OfflinePairs(prepared, _statistics(config, plain), left_out, rows)


def identity(policy: Pretrained, records: builder.RecordSource, config: Config) -> str:
    """A text that changes when the pairs would: with the model's files, the type that is computed in, the records, and the settings.

    Small files count by their content and weights by name, size and time of change; a model's card, licence and place do not matter.
    """
    settings: dict[str, Any] = {name: value for name, value in dataclasses.asdict(config.pairs).items() if name not in _NO_MATTER}
    if config.pairs.maker == "samples":
        settings = {name: value for name, value in dataclasses.asdict(config.samples).items() if name not in _NO_MATTER_OF_SAMPLES}
        if config.samples.synonyms:
            settings["synonyms"] = read_json(Path(config.samples.synonyms))
        settings |= _of_chat_models(config)
    limits = {name: getattr(config.data, name) for name in _MATTER}
    asked = (config.samples.reward_model, config.samples.clip, config.samples.critic) if config.pairs.maker == "samples" else ()
    asked += (config.judge.directory,) if config.judge.directory != POLICY else ()  # their files count, not their places
    others = [Path(directory) for directory in (policy.adapter, config.pairs.encoder, *asked) if directory]
    files = [file for directory in (policy.path, *others) for file in _model_files(directory)]
    parts = [VERSION, files, policy.model.dtype, records.prepared.fingerprint, settings, limits]
    return json.dumps(parts, sort_keys=True)


def _of_chat_models(config: Config) -> dict[str, Any]:
    """What replies depend on, where a chat model is asked; the address is none of it."""
    samples, judge = config.samples, config.judge
    prompts = [judge.prompt] if "judge" in scorers.read_names(samples.scorers) else []
    prompts += [judge.edit_prompt] if any(one.name == "edit" for one in sources.parse(samples.sources)) else []
    if not prompts:
        return {}
    texts = [(one.kind, one.text, one.verdict.pattern, one.scale) for one in map(Prompt.load, prompts)]
    return {"chat": [judge.model, judge.both_orders, judge.max_tokens, judge.temperature, texts]}


def plan_sampler(policy: Pretrained, records: Records, config: Config) -> tuple[BdhsSampler, RowPlan]:
    """A sampler that has room for every record's reference answer, and the records that fit the limits of `config.data`.

    Raises:
      DataError: a row that does not fit, see `plan_rows`.
      UserError: several processes.
    """
    plan = plan_rows(records, policy.processor, config.data, answers=1)
    lanes = max(len(split_sentences(reference_of(records[int(index)]).text)) for index, _ in plan.items)
    return BdhsSampler(policy.model, policy.processor, policy.mesh, config.pairs, plan.layout, lanes), plan


@dataclasses.dataclass(frozen=True)
class _Maker:
    """How records become pairs: `make(params, records, counts so far)` yields the pairs of each record and the counts with it."""

    plan: RowPlan
    record: Callable[[int], PreferenceRecord]  # by index of the set
    make: Callable[[dict, Iterable[PreferenceRecord], Any], Iterator[tuple[list[PreferenceRecord], Any]]]
    nothing: str  # what to do when there is not one pair


def _maker(policy: Pretrained, records: Records, config: Config, out: Path) -> _Maker:
    if config.pairs.maker == "bdhs":
        references = References(records, keep_rejected=config.pairs.gamma > 0)
        sampler, plan = plan_sampler(policy, references, config)
        nothing = "each rejected answer is its reference, or unusable; raise rho_th or the temperature"
        return _Maker(plan, references.__getitem__, lambda params, rows, counts: make_pairs(sampler, params, rows, config.pairs, counts), nothing)
    check_settings(config, policy.processor, of_samples=False)
    reads_reference = selectors.parse(config.samples.selector, "config.samples.selector").reads_reference
    replies = out.with_name(f"{out.name}.replies.jsonl")
    answerer, plan = plan_answers(policy, records, config, answers=int(reads_reference), rows=config.samples.batch_size, replies=replies)
    nothing = "draw more answers (config.samples.count), or look at the scorers, the selector and its filters"
    return _Maker(plan, records.__getitem__, lambda params, rows, counts: sampled_pairs(answerer, params, rows, config.samples, counts), nothing)


def _rows(
    policy: Pretrained,
    records: Records,
    config: Config,
    out: Path,
    journal: Journal,
    console: Console,
    title: str,
    made: MutableMapping[str, Any],
) -> Iterator[PreferenceRecord]:
    """The pairs, in the order of the records; `made` then holds the statistics."""
    with console.phase(title) as progress:
        maker = _maker(policy, records, config, out)
        items = [int(index) for index, _ in maker.plan.items]
        before = statistics = _statistics(config, journal.statistics)
        if len(journal):
            console.line(f"Going on: {len(journal)} of {len(items)} records are done")
        pictures = lambda number: [picture for medium in maker.record(items[number]).media for picture in medium.pictures]  # noqa: E731
        for pairs in journal.kept(pictures):
            yield from pairs
        if len(journal) < len(items):
            with console.phase("Loading the model"):
                params = policy.params(policy.model.dtype)
            left = (maker.record(index) for index in items[len(journal) :])
            for pairs, statistics in maker.make(params, left, before):
                journal.add(pairs, dataclasses.asdict(statistics))
                progress(statistics.records, len(items))
                yield from pairs
    if not statistics.pairs:
        group = "samples" if config.pairs.maker == "samples" else "pairs"
        raise UserError(f"config.{group}: no pair came out of {statistics.records} records: {maker.nothing}")
    made |= {**dataclasses.asdict(statistics), "left_out": [dataclasses.asdict(row) for row in maker.plan.left_out]}


def _statistics(config: Config, plain: Mapping[str, Any]) -> Statistics | SampleStatistics:
    """Counts from JSON; {}: of nothing yet."""
    if config.pairs.maker == "samples":
        return SampleStatistics(**plain)
    by_iteration = {int(number): count for number, count in plain.get("by_iteration", {}).items()}
    return Statistics(**{**plain, "by_iteration": by_iteration})


def _model_files(directory: Path) -> list[list]:
    out: list[list] = []
    for file in sorted(directory.iterdir()):
        if file.suffix == ".safetensors":
            out.append([file.name, *stamp(file)])
        elif file.suffix in _SMALL_FILES and file.name != EXPORT_MARKER and file.is_file():
            out.append([file.name, hashlib.sha256(file.read_bytes()).hexdigest()])
    return out
