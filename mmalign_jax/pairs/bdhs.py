"""Bias-Driven Hallucination Sampling (BDHS_attn of arXiv 2407.02477, Algorithm 1): the policy, with most image tokens hidden, writes
the rejected answers.

One iteration for one record: every image token is hidden with probability `rho_th`; every sentence of the reference answer is split at
a random word; the policy goes on from the split until the first full stop, given the clean reference before it. The corrupted
sentences make the rejected answer. It is accepted when it is less similar to the reference than `eps`; otherwise there is another
iteration with a new mask and new splits. The last of `n_iter` iterations has no reference guidance and is taken as it is.

The context of a sentence is the clean reference, so one masked prefill of `[images and prompt | reference]` serves all sentences of a
record: each is a decode lane behind its split (`sampling.decode_lanes`). Hidden image tokens are hidden from that prefill on, in every
layer, and keep their positions.

What the paper leaves open, and what is done here: the split is drawn uniformly from the starts of the sentence's words; a swapped yes
or no stays, so the split of that sentence lies behind it; a sentence ends at the first token that ends with a full stop, an
exclamation or a question mark; white space around the reference is kept around the rejected answer; an attempt that the tokenizer
cannot read back as an answer (nothing at all, a special token in letters) is not accepted. Every draw is a function of (seed, record,
draw, iteration, sentence) alone.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mmalign_jax.config import PairsConfig
from mmalign_jax.data.layout import RowLayout
from mmalign_jax.errors import UserError
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.masked_decode import Job, MaskedDecoder
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.pairs.similarity import MEASURES
from mmalign_jax.pairs.splits import Reference, Split, draw_split
from mmalign_jax.sampling import DecodeOptions
from mmalign_jax.types import Preference, PreferenceRecord, Response, record_key

_SWAP_SLOTS = 8  # that "yes" in the place of "no" may need more, letter by letter at worst


def reference_of(record: PreferenceRecord) -> Response:
    """The answer that BDHS corrupts: the winner of the record's first preference, response 0 when it has none.

    Raises:
      UserError: there is none, or only a part of one.
    """
    if not record.responses or record.prefix or not record.complete:
        raise UserError(f"record {record.id}: BDHS needs a whole reference answer")
    return record.responses[record.prefs[0].win if record.prefs else 0]


def check_one_process() -> None:
    """Raises UserError in a run of several processes: pairs are made in one."""
    if jax.process_count() > 1:
        raise UserError("config.pairs.maker: making pairs runs in one process; make them first with launch/make_pairs.py")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one record.

    Args:
      reference: its answer, which the rejected one was made from.
      rejected: text of the rejected answer.
      sentences: the corrupted sentences in order, each with the white space before it; None after an unguided iteration.
      splits: characters of each sentence in front of its split; None after an unguided iteration.
      swapped: the sentences whose yes or no was exchanged.
      draw, iteration: under which it was made.
      similarity: to the reference.
      accepted: whether it is dissimilar enough; otherwise it is what the last iteration made.
      unfinished: lanes that ran out of slots before they ended.
      problem: why the tokenizer cannot read the rejected answer, "" when it can.
    """

    record: PreferenceRecord
    reference: Response
    rejected: str
    sentences: tuple[str, ...] | None
    splits: tuple[int, ...] | None
    swapped: tuple[int, ...]
    draw: int
    iteration: int
    similarity: float
    accepted: bool
    unfinished: int
    problem: str

    @property
    def changed(self) -> bool:
        """Whether the rejected answer can be trained on, and says anything else than the reference."""
        return not self.problem and self.rejected.split() != self.reference.text.split()

    @property
    def preference(self) -> Preference:
        """The reference over the rejected answer, by a margin of how unlike they are."""
        return Preference(0, 1, margin=1.0 - self.similarity)


class BdhsSampler:
    """Makes rejected answers for records with a reference answer (see `reference_of`).

    Args:
      model, processor, mesh: of the policy.
      config: options, see `config.PairsConfig`.
      layout: of rows with one answer (K = 1) that hold every record's reference. References are not shortened.
      lanes: S, most sentences of a reference.

    Raises:
      UserError: several processes; pairs are made in one.
    """

    def __init__(self, model: Mllm, processor: Processor, mesh: Mesh, config: PairsConfig, layout: RowLayout, lanes: int):
        if layout.answers != 1:
            raise ValueError("BDHS reads rows with one answer")
        check_one_process()
        self._processor, self._config, self._lanes = processor, config, lanes
        self._similarity = MEASURES[config.similarity]
        self._stop = processor.answer(".").ids[:-1]
        shared = {"temperature": config.temperature, "top_p": config.top_p, "banned_ids": processor.banned_ids}
        sentence = DecodeOptions(config.max_sentence_tokens, stop_ids=(*processor.eos_ids, *processor.sentence_end_ids), **shared)
        whole = DecodeOptions(layout.answer_slots, stop_ids=processor.eos_ids, **shared)
        context = dataclasses.replace(layout, answer_slots=layout.answer_slots + _SWAP_SLOTS, shorten_answers=False)
        prompt = dataclasses.replace(layout, answers=0)
        self._guided = MaskedDecoder(model, processor, mesh, context, lanes, sentence, config.rho_th, config.batch_size)
        self._unguided = MaskedDecoder(model, processor, mesh, prompt, 1, whole, config.rho_th, config.batch_size)

    def __call__(self, params: dict, records: Sequence[PreferenceRecord], draw: int = 0) -> list[Outcome]:
        """One outcome a record, in order.

        Args:
          params: the policy's whole tree.
          draw: tells apart several rounds over the same records (online: the step).

        Raises:
          UserError: a record without a reference answer, one with more sentences than there are lanes, or one that does not fit.
        """
        references = [self._read(record) for record in records]
        outcomes: dict[int, Outcome] = {}
        last = self._config.n_iter
        for iteration in range(1, last + 1):
            waiting = [index for index in range(len(records)) if index not in outcomes]
            attempt = self._attempt_unguided if iteration == last > 1 else self._attempt_guided
            made = attempt(params, [records[index] for index in waiting], [references[index] for index in waiting], draw, iteration)
            outcomes |= {index: one for index, one in zip(waiting, made, strict=True) if one.accepted or iteration == last}
        return [outcomes[index] for index in range(len(records))]

    def _read(self, record: PreferenceRecord) -> Reference:
        reference = Reference.read(reference_of(record).text, self._processor)
        if len(reference.spans) > self._lanes:
            raise UserError(f"record {record.id}: the reference has {len(reference.spans)} sentences, there are {self._lanes} lanes")
        return reference

    def _attempt_guided(
        self, params: dict, records: list[PreferenceRecord], references: list[Reference], draw: int, iteration: int
    ) -> Iterator[Outcome]:
        """Completes every sentence from a split of its own. A swapped yes or no needs a row with that context."""
        config, jobs, owners, plans = self._config, [], [], []
        for owner, (record, reference) in enumerate(zip(records, references, strict=True)):
            randoms = (_generator(config.seed, record, draw, iteration, number) for number in range(len(reference.spans)))
            plan = [draw_split(reference, number, config.yes_no_swap, random, self._processor) for number, random in enumerate(randoms)]
            plans.append(plan)
            contexts = dict.fromkeys(split.context for split in plan if split.tokens is not None)
            for context in contexts:
                lanes = {split.sentence: len(split.tokens) for split in plan if split.context == context and split.tokens is not None}
                jobs.append(Job(dataclasses.replace(record, responses=(Response(context),), prefs=()), lanes))
                owners.append(owner)
        written: list[dict] = [{} for _ in records]
        for owner, lanes in zip(owners, self._guided(params, jobs, config.seed, self._number(draw, iteration)), strict=True):
            written[owner] |= lanes
        for record, reference, plan, lanes in zip(records, references, plans, written, strict=True):
            texts = [split.join(self._text_behind(lanes[split.sentence].tokens) if split.sentence in lanes else "") for split in plan]
            unfinished = sum(not lane.stopped for lane in lanes.values())
            yield self._judge(record, reference, "".join(texts), unfinished, draw, iteration, tuple(texts), plan)

    def _attempt_unguided(
        self, params: dict, records: list[PreferenceRecord], references: list[Reference], draw: int, iteration: int
    ) -> Iterator[Outcome]:
        """Answers the prompt from its beginning."""
        jobs = [Job(record, {0: 0}) for record in records]
        written = self._unguided(params, jobs, self._config.seed, self._number(draw, iteration))
        for record, reference, lanes in zip(records, references, written, strict=True):
            yield self._judge(record, reference, self._processor.decode(lanes[0].tokens), int(not lanes[0].stopped), draw, iteration)

    def _judge(
        self,
        record: PreferenceRecord,
        reference: Reference,
        text: str,
        unfinished: int,
        draw: int,
        iteration: int,
        sentences: tuple[str, ...] | None = None,
        plan: Sequence[Split] = (),
    ) -> Outcome:
        clean = reference.text
        before, behind = clean[: len(clean) - len(clean.lstrip())], clean[len(clean.rstrip()) :]
        rejected, problem = before + text.strip() + behind, ""
        try:
            self._processor.answer(rejected)
        except UserError as error:
            problem = str(error)
        similarity = self._similarity(rejected, clean)
        return Outcome(
            record=record,
            reference=reference_of(record),
            rejected=rejected,
            sentences=sentences,
            splits=None if sentences is None else tuple(len(split.kept) for split in plan),
            swapped=tuple(split.sentence for split in plan if split.swapped),
            draw=draw,
            iteration=iteration,
            similarity=similarity,
            accepted=similarity < self._config.eps and not problem,
            unfinished=unfinished,
            problem=problem,
        )

    def _text_behind(self, tokens: np.ndarray) -> str:
        """The text of tokens that follow others: a tokenizer drops the space of a first token, so a full stop stands in front."""
        return self._processor.decode(np.concatenate([self._stop, tokens]))[1:]

    def _number(self, draw: int, iteration: int) -> int:
        """One number for each attempt at a record."""
        return draw * self._config.n_iter + iteration


def _generator(seed: int, record: PreferenceRecord, draw: int, iteration: int, sentence: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, record_key(record.id), draw, iteration, sentence))))


def to_records(outcome: Outcome, config: PairsConfig) -> list[PreferenceRecord]:
    """The preference records of an outcome, empty when the rejected answer is the reference (it would teach nothing) or unusable.

    With `config.per_sentence` every changed sentence is a pair of its own, behind the clean answer before it: the context in which it was
    written (arXiv 2507.12455 trains on such pairs). An unguided answer has no such sentences and stays one pair.
    """
    if not outcome.changed:
        return []
    record, reference = outcome.record, outcome.reference
    meta = {**record.meta, "bdhs": _draws(outcome, config)}
    changes = {"prefs": (outcome.preference,), "meta": meta}
    if not config.per_sentence or outcome.sentences is None:
        return [dataclasses.replace(record, responses=(reference, Response(outcome.rejected, source="bdhs")), **changes)]
    spans, out = split_sentences(reference.text), []
    for number, ((start, end), written) in enumerate(zip(spans, outcome.sentences, strict=True)):
        before, clean = reference.text[:start], reference.text[start:end]
        if not written.strip() or written.split() == clean.split():
            continue
        # white space at the end of the whole answer is no difference between the two
        rejected = before + written + clean[len(clean.rstrip()) :]
        responses = (Response(before + clean, source=reference.source), Response(rejected, source="bdhs"))
        part = {"id": f"{record.id}/s{number}", "responses": responses, "prefix": before, "complete": end == len(reference.text)}
        out.append(dataclasses.replace(record, **part, **changes))
    return out


def _draws(outcome: Outcome, config: PairsConfig) -> dict:
    """What it takes to make the outcome again with the same policy, and how it came out. JSON has all of it."""
    settings = ("seed", "rho_th", "n_iter", "eps", "temperature", "top_p", "max_sentence_tokens", "yes_no_swap", "similarity")
    found = ("draw", "iteration", "similarity", "accepted", "unfinished")
    return {
        "record": outcome.record.id,  # its draws are made under this name, whatever the pair is called
        **{name: getattr(outcome, name) for name in found},
        "guided": outcome.sentences is not None,
        "splits": None if outcome.splits is None else list(outcome.splits),
        "swapped": list(outcome.swapped),
        "settings": {name: getattr(config, name) for name in settings},
    }


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts over records: `records == unchanged + unusable +` those that gave `pairs` (one each, unless pairs are made per sentence).

    Args:
      unchanged: no pair, because nothing was said that the reference does not say.
      unusable: no pair, because the tokenizer cannot read the last attempt back.
      unfinished: lanes that ran out of slots before they ended.
      by_iteration: iteration -> records that ended there. All that reach the last one end there.
    """

    records: int = 0
    pairs: int = 0
    unchanged: int = 0
    unusable: int = 0
    unfinished: int = 0
    by_iteration: dict[int, int] = dataclasses.field(default_factory=dict)

    def plus(self, outcome: Outcome, pairs: int) -> "Statistics":
        """With one more record, which gave `pairs` pairs."""
        iterations = collections.Counter(self.by_iteration) + collections.Counter([outcome.iteration])
        return Statistics(
            records=self.records + 1,
            pairs=self.pairs + pairs,
            unchanged=self.unchanged + (not pairs and not outcome.problem),
            unusable=self.unusable + bool(outcome.problem),
            unfinished=self.unfinished + outcome.unfinished,
            by_iteration=dict(sorted(iterations.items())),
        )


def make_pairs(
    sampler: BdhsSampler, params: dict, records: Iterable[PreferenceRecord], config: PairsConfig, chunk: int = 256
) -> Iterator[tuple[list[PreferenceRecord], Statistics]]:
    """Yields, after every chunk of records, its preference records and the counts so far.

    Args:
      chunk: records that are held in memory and whose retries share device batches; no result depends on it.
    """
    statistics, records = Statistics(), iter(records)
    while waiting := list(itertools.islice(records, chunk)):
        made: list[PreferenceRecord] = []
        for outcome in sampler(params, waiting):
            pairs = to_records(outcome, config)
            statistics = statistics.plus(outcome, len(pairs))
            made += pairs
        yield made, statistics
