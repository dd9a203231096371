"""Bias-Driven Hallucination Sampling (arXiv 2407.02477, Algorithm 1): the policy, with most image tokens hidden, writes
the rejected answers.

One iteration for one record: every image token is hidden with probability `rho_th`; every sentence of the reference answer is split at
a random word; the policy goes on from the split until the first full stop, given the clean reference before it. The corrupted
sentences make the rejected answer. It is accepted when it is less similar to the reference than `eps`; otherwise there is another
iteration with a new mask and new splits. The last of `n_iter` iterations has no reference guidance and is taken as it is.

The context of a sentence is the clean reference, so one masked prefill of `[images and prompt | reference]` serves all sentences of a
record: each is a decode lane behind its split (`sampling.turns`). Hidden image tokens are hidden from that prefill on, in every
layer, and keep their positions.

What the paper leaves open, and what is done here: the split is drawn uniformly from the starts of the sentence's words; a swapped yes
or no stays, so the split of that sentence lies behind it; a sentence ends at the first token that ends with a full stop, an
exclamation or a question mark; white space around the reference is kept around the rejected answer; an attempt that the tokenizer
cannot read back as an answer (nothing at all, a special token in letters) is not accepted. Every draw is a function of (seed, record,
draw, iteration, sentence) alone.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import PairsConfig
from mmalign_jax.data.layout import RowLayout, tokenize
from mmalign_jax.errors import UserError
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.apart import layers_apart
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs import views
from mmalign_jax.pairs.feature_pool import FeaturePool
from mmalign_jax.pairs.masked_decode import Decoding, Job, MaskedDecoder, Written
from mmalign_jax.pairs.schedule import Schedule, Work
from mmalign_jax.pairs.sentences import CLOSING
from mmalign_jax.pairs.similarity import measure_of
from mmalign_jax.pairs.splits import Reference, draw_split
from mmalign_jax.sampling import DecodeOptions
from mmalign_jax.types import Preference, PreferenceRecord, Response, record_key

_SWAP_SLOTS = 8  # that "yes" in the place of "no" may need more, letter by letter at worst


def reference_of(record: PreferenceRecord) -> Response:
    """The answer that BDHS corrupts: the winner of the record's first preference, response 0 when it has none.

    Raises:
      UserError: there is none, or only a part of one.
    """
    if record.reference is None or record.prefix or not record.complete:
        raise UserError(f"record {record.id}: BDHS needs a whole reference answer")
    return record.reference


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


@dataclasses.dataclass(frozen=True, eq=False)
class _Attempt:
    """What was written in one iteration for one record."""

    work: Work
    text: str
    unfinished: int
    sentences: tuple[str, ...] | None = None


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
        self._processor, self._config, self._lanes, self._layout = processor, config, lanes, layout
        self._similarities = measure_of(config)
        self._stop = processor.answer(".").ids[:-1]
        shared = {"temperature": config.temperature, "top_p": config.top_p, "banned_ids": processor.banned_ids}
        sentence = DecodeOptions(config.max_sentence_tokens, stop_ids=(*processor.eos_ids, *_ends(processor, config.stop)), **shared)
        whole = DecodeOptions(config.max_answer_tokens, stop_ids=processor.eos_ids, **shared)
        context = dataclasses.replace(layout, answer_slots=layout.answer_slots + _SWAP_SLOTS, shorten_answers=False)
        prompt = dataclasses.replace(layout, answers=0)
        self._rows, few = mesh_lib.batch_rows(mesh, config.batch_size), mesh_lib.batch_rows(mesh, -(-config.batch_size // 4))
        self._few, self._places = few, self._rows + 4 * few
        shared = (model, processor, mesh)
        self._unguided = MaskedDecoder(*shared, prompt, 1, whole, config, few if config.guided else self._rows, few)
        self._main = MaskedDecoder(*shared, context, lanes, sentence, config, self._rows, few) if config.guided else self._unguided
        noise = views.parse(f"diffusion({config.noise_steps},pixel)") if config.noise_steps else None
        self._new_pool = functools.partial(FeaturePool, model, processor, mesh, layout, self._places, few, noise)

    def __call__(self, params: dict, records: Iterable[PreferenceRecord], draw: int = 0) -> Iterator[Outcome]:
        """One outcome a record, in order. A few batches of records are held at a time, and an outcome depends on its record alone.

        To rounding, that is: batches of other sizes add in another order, which may turn a draw between two tokens that are as likely.

        Args:
          params: the policy's whole tree.
          draw: tells apart several rounds over the same records (online: the step).

        Raises:
          UserError: a record without a reference answer, one with more sentences than there are lanes, or one that does not fit.
        """
        params = layers_apart(params)
        config, pool = self._config, self._new_pool()
        schedule = Schedule(self._works(records, draw), self._rows, self._few, self._few, self._places)
        main, unguided = (Decoding(decoder, params, config.seed) for decoder in (self._main, self._unguided))
        outcomes: dict[int, Outcome] = {}
        parts: dict[int, list[dict[int, Written]]] = {}  # what was written for a record's attempt so far, by place
        again: list[Work] = []
        given = 0
        while schedule.going:
            admitted = schedule.admit(main.room - sum(len(work.contexts) for work in again))
            # noise is drawn anew for every attempt
            unseen = admitted + (again if config.noise_steps else [])
            entries = {work.place: (work.record, work.prompt, self._number(draw, work.iteration)) for work in unseen}
            pool.put(params, entries, config.seed)
            main.add([job for work in again + admitted if work.contexts for job in self._jobs(work, draw)])
            done = main.advance(pool.features, schedule.more)
            unguided.add([job for work in schedule.waiting() for job in self._jobs(work, draw)])
            while unguided.busy or unguided.queued:
                done += unguided.advance(pool.features, more=False)
            attempts, again = [], []
            for job, lanes in done:
                work = schedule.at(job.place)
                parts.setdefault(job.place, []).append(lanes)
                if len(parts[job.place]) == max(len(work.contexts), 1):
                    attempts.append(self._attempt(work, functools.reduce(operator.or_, parts.pop(job.place))))
            for attempt, outcome in zip(attempts, self._judge(attempts, draw), strict=True):
                work = attempt.work
                if outcome.accepted or work.iteration == config.n_iter:
                    outcomes[work.order] = outcome
                    schedule.done(work)
                else:
                    work.iteration += 1
                    self._plan(work, draw)
                    again.append(work)
            while given in outcomes:
                yield outcomes.pop(given)
                given += 1

    def _works(self, records: Iterable[PreferenceRecord], draw: int) -> Iterator[Work]:
        limits = {"max_pixels": self._layout.max_pixels, "max_bytes": self._layout.max_bytes}
        for order, record in enumerate(records):
            reference = Reference.read(reference_of(record).text, self._processor)
            if len(reference.spans) > self._lanes:
                raise UserError(f"record {record.id}: the reference has {len(reference.spans)} sentences, there are {self._lanes} lanes")
            work = Work(order, record, reference, tokenize(record, None, self._processor, 0, **limits))
            self._plan(work, draw)
            yield work

    def _plan(self, work: Work, draw: int) -> None:
        """Splits every sentence for the work's iteration. Unguided attempts start from the prompt; after guided ones they wait for each other."""
        config, work.plan, work.contexts = self._config, None, ()
        if not config.guided:
            work.contexts = [""]
            return
        if work.iteration == config.n_iter > 1:
            return
        randoms = (_generator(config.seed, work.record, draw, work.iteration, number) for number in range(len(work.reference.spans)))
        options = {"swap_probability": config.yes_no_swap, "processor": self._processor, "unit": config.split_unit}
        work.plan = [draw_split(work.reference, number, random=one, **options) for number, one in enumerate(randoms)]
        # a swapped yes or no needs a row with that context; a reference of which nothing is left to write still is a row
        work.contexts = list(dict.fromkeys(split.context for split in work.plan if split.tokens is not None)) or [work.reference.text]

    def _jobs(self, work: Work, draw: int) -> list[Job]:
        """The rows of the work's next attempt: every sentence from its split, or an answer to the prompt from its beginning."""
        number, jobs = self._number(draw, work.iteration), []
        if work.plan is None:
            return [Job(work.record, work.prompt, work.place, number, {0: 0})]
        for context in work.contexts:
            written = (split for split in work.plan if split.context == context and split.tokens is not None)
            lanes = {split.sentence: len(split.tokens) for split in written}
            row = dataclasses.replace(work.prompt, answers=(self._processor.answer_ids(context),))
            jobs.append(Job(work.record, row, work.place, number, lanes))
        return jobs

    def _attempt(self, work: Work, lanes: dict[int, Written]) -> _Attempt:
        """What the lanes of all its rows make together."""
        unfinished = sum(not lane.stopped for lane in lanes.values())
        if work.plan is None:
            return _Attempt(work, self._processor.decode(lanes[0].tokens), unfinished)
        texts = [split.join(self._text_behind(lanes[split.sentence].tokens) if split.sentence in lanes else "") for split in work.plan]
        return _Attempt(work, "".join(texts), unfinished, tuple(texts))

    def _judge(self, attempts: Sequence[_Attempt], draw: int) -> list[Outcome]:
        """An outcome each, were it to end here. All are measured together, for the encoder's sake."""
        texts = []
        for attempt in attempts:
            clean = attempt.work.reference.text
            before, behind = clean[: len(clean) - len(clean.lstrip())], clean[len(clean.rstrip()) :]
            texts.append((before + attempt.text.strip() + behind, clean))
        out = []
        for attempt, (rejected, _), similarity in zip(attempts, texts, self._similarities(texts), strict=True):
            work, problem = attempt.work, ""
            try:
                self._processor.answer(rejected)
            except UserError as error:
                problem = str(error)
            outcome = Outcome(
                record=work.record,
                reference=reference_of(work.record),
                rejected=rejected,
                sentences=attempt.sentences,
                splits=None if attempt.sentences is None else tuple(len(split.kept) for split in work.plan),
                swapped=tuple(split.sentence for split in work.plan or () if split.swapped),
                draw=draw,
                iteration=work.iteration,
                similarity=similarity,
                accepted=similarity < self._config.eps and not problem,
                unfinished=attempt.unfinished,
                problem=problem,
            )
            out.append(outcome)
        return out

    def _text_behind(self, tokens: np.ndarray) -> str:
        """The text of tokens that follow others: a tokenizer drops the space of a first token, so a full stop stands in front."""
        return self._processor.decode(np.concatenate([self._stop, tokens]))[1:]

    def _number(self, draw: int, iteration: int) -> int:
        """One number for each attempt at a record."""
        return draw * self._config.n_iter + iteration


def _ends(processor: Processor, stop: str) -> tuple[int, ...]:
    """The tokens that end a sentence."""
    ids = processor.sentence_end_ids
    return ids if stop == "sentence" else tuple(one for one in ids if processor.decode([one]).rstrip(CLOSING).endswith("."))


def _generator(seed: int, record: PreferenceRecord, draw: int, iteration: int, sentence: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, record_key(record.id), draw, iteration, sentence))))
