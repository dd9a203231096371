"""Bias-Driven Hallucination Sampling (BDHS_attn of arXiv 2407.02477, Algorithm 1): the policy, with most image tokens hidden, writes
the rejected answers.

One iteration for one record: every image token is hidden with probability `rho_th`; every sentence of the reference answer is split at
a random word; the policy goes on from the split until the first full stop, given the clean reference before it. The corrupted
sentences make the rejected answer. It is accepted when it is less similar to the reference than `eps`; otherwise there is another
iteration with a new mask and new splits. The last of `n_iter` iterations has no reference guidance and is accepted as it is.

The context of a sentence is the clean reference, so one masked prefill of `[images and prompt | reference]` serves all sentences of a
record: each is a decode lane behind its split (`sampling.decode_lanes`). Hidden image tokens are hidden from that prefill on, in every
layer, and keep their positions.

What the paper leaves open, and what is done here: the split is drawn uniformly from the starts of the sentence's words; a swapped yes
or no stays, so the split of that sentence lies behind it; a sentence ends at the first token that ends with a full stop, an
exclamation or a question mark; every draw is a function of (seed, record, draw, iteration) alone.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import PairsConfig
from mmalign_jax.data.device import to_device
from mmalign_jax.data.layout import RowLayout, lay_out
from mmalign_jax.errors import UserError
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.llava import Llava
from mmalign_jax.pairs.sentences import split_sentences, swap_yes_no
from mmalign_jax.pairs.similarity import ngram_cosine
from mmalign_jax.sampling import DecodeOptions, LaneStart, Samples, decode_lanes, lane_keys
from mmalign_jax.types import PairBatch, Preference, PreferenceRecord, Response, record_key


@dataclasses.dataclass(frozen=True)
class Lane:
    """One sentence to complete: its number, its span in the reference, and the tokens of the reference that are kept before it goes on."""

    sentence: int
    span: tuple[int, int]
    first_token: int  # first token of the sentence in the row's answer
    kept_tokens: int  # tokens of the row's answer in front of the split
    swapped: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the device batch: the record whose answer is the context, and the lanes that read it."""

    owner: int  # index of the record it belongs to
    record: PreferenceRecord
    lanes: tuple[Lane, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one record.

    `sentences` are the corrupted sentences in order, None after an unguided iteration; `unfinished` counts lanes that ran out of slots
    before a full stop.
    """

    record: PreferenceRecord
    rejected: str
    sentences: tuple[str, ...] | None
    iteration: int
    similarity: float
    accepted: bool
    unfinished: int

    @property
    def changed(self) -> bool:
        """Whether the rejected answer says anything, and anything else than the reference."""
        return bool(self.rejected) and self.rejected.split() != self.record.responses[0].text.split()


class BdhsSampler:
    """Makes rejected answers for records with a reference answer (response 0).

    Args:
      model, processor, mesh: of the policy.
      config: options, see `config.PairsConfig`.
      layout: of rows with one answer (K = 1) that hold every record's reference; a yes/no swap must fit too, so leave a slot.
      lanes: S, most sentences of a reference.
    """

    def __init__(self, model: Llava, processor: Processor, mesh: Mesh, config: PairsConfig, layout: RowLayout, lanes: int):
        if layout.answers != 1:
            raise ValueError("BDHS reads rows with one answer")
        self._processor, self._mesh, self._config, self._layout, self._lanes = processor, mesh, config, layout, lanes
        self._rows = -(-config.batch_size // mesh_lib.batch_divisor(mesh)) * mesh_lib.batch_divisor(mesh)
        shared = {"temperature": config.temperature, "top_p": config.top_p, "banned_ids": processor.banned_ids}
        ends = (*processor.eos_ids, *processor.sentence_end_ids)
        guided = DecodeOptions(config.max_sentence_tokens, stop_ids=ends, **shared)
        unguided = DecodeOptions(layout.answer_slots, stop_ids=processor.eos_ids, **shared)
        self._guided = jax.jit(functools.partial(_complete, model, config.rho_th, guided))
        self._unguided = jax.jit(functools.partial(_complete, model, config.rho_th, unguided))

    def __call__(self, params: dict, records: Sequence[PreferenceRecord], draw: int = 0) -> list[Outcome]:
        """One outcome a record, in order.

        Args:
          params: the policy's whole tree.
          draw: tells apart several rounds over the same records (online: the step).

        Raises:
          UserError: a record without a reference answer, or one with more sentences than there are lanes.
        """
        answers = {index: self._reference(record) for index, record in enumerate(records)}
        outcomes: dict[int, Outcome] = {}
        for iteration in range(1, self._config.n_iter + 1):
            waiting = [index for index in range(len(records)) if index not in outcomes]
            guided = iteration < self._config.n_iter or self._config.n_iter == 1
            make = self._guided_rows if guided else self._unguided_rows
            rows = [row for index in waiting for row in make(index, records[index], answers[index], draw, iteration)]
            written = self._write(params, rows, draw, iteration, guided)
            last = iteration == self._config.n_iter
            for index in waiting:
                outcome = self._judge(records[index], written[index], iteration, guided)
                if outcome.accepted or last:
                    outcomes[index] = dataclasses.replace(outcome, accepted=True)
        return [outcomes[index] for index in range(len(records))]

    def _reference(self, record: PreferenceRecord) -> str:
        if not record.responses or record.prefix:
            raise UserError(f"record {record.id}: BDHS needs a whole reference answer")
        return record.responses[0].text

    def _guided_rows(self, owner: int, record: PreferenceRecord, answer: str, draw: int, iteration: int) -> Iterator[Row]:
        """The record's own row with a lane a sentence; a sentence whose yes or no is swapped gets a row with that context."""
        spans = split_sentences(answer)
        if len(spans) > self._lanes:
            raise UserError(f"record {record.id}: the reference has {len(spans)} sentences, there are {self._lanes} lanes")
        lanes = []
        for number, span in enumerate(spans):
            random = _generator(self._config.seed, record, draw, iteration, number)
            swap = swap_yes_no(answer[slice(*span)])
            if swap is not None and random.random() < self._config.yes_no_swap:
                sentence, end = swap
                text = answer[: span[0]] + sentence
                other = dataclasses.replace(record, responses=(Response(text),))
                lane = self._lane(text, (span[0], len(text)), number, random, behind=span[0] + end)
                yield Row(owner, other, (dataclasses.replace(lane, span=span, swapped=True),))
            else:
                lanes.append(self._lane(answer, span, number, random))
        if lanes:
            yield Row(owner, dataclasses.replace(record, responses=(Response(answer),)), tuple(lanes))

    def _lane(self, answer: str, span: tuple[int, int], number: int, random: np.random.Generator, behind: int | None = None) -> Lane:
        tokens = self._processor.answer(answer)
        ends = tokens.spans[:-1, 1]  # without the end token
        inside = np.flatnonzero((ends > span[0]) & (ends <= span[1]))
        splits = inside[tokens.word_start[inside]]
        if behind is not None:
            after = inside[ends[inside] > behind]
            # right behind the swapped word there may be no word start, only its full stop
            splits = np.union1d(splits[ends[splits] > behind], after[:1])
        if not len(splits):
            splits = inside[:1]
        return Lane(number, span, int(inside[0]), int(random.choice(splits)), swapped=behind is not None)

    def _unguided_rows(self, owner: int, record: PreferenceRecord, answer: str, draw: int, iteration: int) -> Iterator[Row]:
        yield Row(owner, dataclasses.replace(record, responses=(Response(answer),)), ())

    def _write(self, params: dict, rows: list[Row], draw: int, iteration: int, guided: bool) -> dict[int, list[tuple[Lane | None, str, bool]]]:
        """Runs all rows, a device batch at a time: owner -> (lane, text it wrote including what it kept of its sentence, finished)."""
        written: dict[int, list] = collections.defaultdict(list)
        for start in range(0, len(rows), self._rows):
            some = rows[start : start + self._rows]
            samples = self._run(params, some, draw, iteration, guided)
            for row, tokens, lengths, stopped in zip(some, samples.tokens, samples.lengths, samples.stopped, strict=False):
                if not guided:
                    text = self._processor.decode(tokens[0, : lengths[0]])
                    written[row.owner].append((None, text, bool(stopped[0])))
                    continue
                context = self._processor.answer(row.record.responses[0].text).ids
                for number, lane in enumerate(row.lanes):
                    new = tokens[number, : lengths[number]]
                    before = self._processor.decode(context[: lane.first_token])
                    whole = self._processor.decode(np.concatenate([context[: lane.kept_tokens], new]))
                    written[row.owner].append((lane, whole[len(before) :], bool(stopped[number])))
        return written

    def _run(self, params: dict, rows: list[Row], draw: int, iteration: int, guided: bool) -> Samples:
        """One device batch of generation; rows that only fill it have no active lanes."""
        count = self._lanes if guided else 1
        slot, active = np.zeros((self._rows, count), np.int32), np.zeros((self._rows, count), bool)
        arrays = [lay_out(row.record, None, self._processor, self._layout) for row in rows]
        for index, (row, array) in enumerate(zip(rows, arrays, strict=True)):
            prefix = int((array["role"] == 1).sum())
            lanes = [lane.kept_tokens for lane in row.lanes] if guided else [0]
            slot[index, : len(lanes)] = [self._layout.prefix_slots + kept - 1 if kept else prefix - 1 for kept in lanes]
            active[index, : len(lanes)] = True
        arrays += [arrays[-1]] * (self._rows - len(arrays))
        batch = PairBatch(
            **{name: np.stack([array[name] for array in arrays]) for name in arrays[0]},
            prefix_slots=self._layout.prefix_slots,
            answer_slots=self._layout.answer_slots,
        )
        numbers = np.full(self._rows, draw * self._config.n_iter + iteration, np.int32)
        with jax.set_mesh(self._mesh):
            batch, start, numbers = to_device((batch, LaneStart(slot, active), numbers), self._mesh, batch_axis=0)
            samples = (self._guided if guided else self._unguided)(params, batch, start, numbers, jax.random.key(self._config.seed))
            return _on_host(samples, self._mesh)

    def _judge(self, record: PreferenceRecord, written: list[tuple[Lane | None, str, bool]], iteration: int, guided: bool) -> Outcome:
        reference = record.responses[0].text
        sentences = None
        if guided:
            ordered = sorted(written, key=lambda one: one[0].sentence)
            sentences = tuple(text for _, text, _ in ordered)
            rejected = "".join(sentences).strip()
        else:
            rejected = written[0][1]
        similarity = ngram_cosine(rejected, reference)
        unfinished = sum(not stopped for _, _, stopped in written)
        return Outcome(record, rejected, sentences, iteration, similarity, similarity < self._config.eps, unfinished)


def _complete(
    model: Llava, rho_th: float, options: DecodeOptions, params: dict, batch: PairBatch, start: LaneStart, draw: jax.Array, key: jax.Array
) -> Samples:
    """Masked prefill and decode of one device batch: one mask a row, shared by its lanes and steps (paper, eq. 6)."""
    mask_key, sample_key = jax.random.split(key)
    features = model.encode_images(params, batch.images)
    row_keys = lane_keys(mask_key, batch.record_key, draw, 1)[:, 0]
    keep = jax.vmap(lambda one: jax.random.uniform(one, features.shape[1:2]) >= rho_th)(row_keys)
    prefill = model.prefill(params, features, batch.tokens, batch.role, batch.positions, batch.image_index, keep)
    visible = (batch.image_index < 0) | jnp.take_along_axis(keep, jnp.maximum(batch.image_index, 0), axis=1)
    keys = lane_keys(sample_key, batch.record_key, draw, start.slot.shape[1])
    return decode_lanes(model, params, prefill, batch.role, batch.positions, start, keys, options, visible)


def _on_host(samples: Samples, mesh: Mesh) -> Samples:
    if jax.process_count() > 1:
        raise UserError("config.pairs.maker: making pairs runs in one process; make them first with launch/make_pairs.py")
    return jax.device_get(samples)


def _generator(seed: int, record: PreferenceRecord, draw: int, iteration: int, sentence: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, record_key(record.id), draw, iteration, sentence))))


def to_records(outcome: Outcome, config: PairsConfig) -> list[PreferenceRecord]:
    """The preference records of an outcome, empty when the rejected answer equals the reference (it would teach nothing).

    With `config.per_sentence` every changed sentence is a pair of its own, behind the clean answer before it: the context in which it was
    written (arXiv 2507.12455 trains on such pairs). An unguided answer has no such sentences and stays one pair.
    """
    if not outcome.changed:
        return []
    record = outcome.record
    reference = record.responses[0]
    draws = {"iteration": outcome.iteration, "similarity": round(outcome.similarity, 4), "rho_th": config.rho_th, "seed": config.seed}
    meta = {**record.meta, "bdhs": {**draws, "guided": outcome.sentences is not None, "unfinished": outcome.unfinished}}
    pair = (Preference(0, 1),)
    if not config.per_sentence or outcome.sentences is None:
        return [dataclasses.replace(record, responses=(reference, Response(outcome.rejected, source="bdhs")), prefs=pair, meta=meta)]
    out = []
    for number, (span, written) in enumerate(zip(split_sentences(reference.text), outcome.sentences, strict=True)):
        start, end = span
        before, clean = reference.text[:start], reference.text[start:end]
        if written.split() == clean.split() or not written.strip():
            continue
        if before and not written.startswith(clean[: len(clean) - len(clean.lstrip())]):
            written = " " + written.lstrip()
        responses = (Response(before + clean, source=reference.source), Response(before + written, source="bdhs"))
        part = {"id": f"{record.id}/s{number}", "responses": responses, "prefs": pair, "prefix": before.rstrip(), "meta": meta}
        out.append(dataclasses.replace(record, **part, complete=end == len(reference.text)))
    return out


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts over outcomes: records, pairs written, records without a change, lanes that ran out of slots, acceptances by iteration."""

    records: int
    pairs: int
    unchanged: int
    unfinished: int
    by_iteration: dict[int, int]


def sample_pairs(
    sampler: BdhsSampler,
    params: dict,
    records: Iterable[PreferenceRecord],
    config: PairsConfig,
    progress: Callable[[int], None] = lambda done: None,
    chunk: int = 256,
) -> tuple[list[PreferenceRecord], Statistics]:
    """Preference records for all `records`, and what happened to them.

    Args:
      progress: called with the number of records done.
      chunk: records whose retries share device batches.
    """
    made: list[PreferenceRecord] = []
    counts: collections.Counter[str] = collections.Counter()
    iterations: collections.Counter[int] = collections.Counter()
    waiting: list[PreferenceRecord] = []

    def flush() -> None:
        for outcome in sampler(params, waiting):
            pairs = to_records(outcome, config)
            made.extend(pairs)
            counts.update(records=1, pairs=len(pairs), unchanged=int(not outcome.changed), unfinished=outcome.unfinished)
            iterations[outcome.iteration] += 1
        waiting.clear()
        progress(counts["records"])

    for record in records:
        waiting.append(record)
        if len(waiting) == chunk:
            flush()
    if waiting:
        flush()
    totals = {name: counts[name] for name in ("records", "pairs", "unchanged", "unfinished")}
    return made, Statistics(**totals, by_iteration=dict(sorted(iterations.items())))
