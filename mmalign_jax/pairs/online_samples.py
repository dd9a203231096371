"""Rows of answers that the current policy draws to the prompts of a set: groups with rewards, and pairs that scores select."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmalign_jax.config import SamplesConfig, TrainConfig
from mmalign_jax.data.layout import RowLayout, RowTokens, lay_out_pictures, lay_out_tokens, tokenize
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.pairs import selectors
from mmalign_jax.pairs.answers import Answered, Answerer, summary
from mmalign_jax.pairs.online import Order, in_parts, shortest
from mmalign_jax.pairs.own_answers import Own, Prompt
from mmalign_jax.pairs.selectors import REFERENCE, Candidate, Filters
from mmalign_jax.types import PairBatch, Preference, PreferenceRecord, Sampled, record_key


class GroupBatches:
    """Every row is a prompt with all answers that were drawn to it, and their rewards: what policy gradients learn from.

    The answers' tokens are trained on as they were drawn, without a way through their texts. Without `config.unfinished` the tokens of an answer
    that ran out of them do not count; its reward is compared with the others' all the same. A
    group in which an answer has no verdict does not count: its advantages would be those of another group.

    Args:
      plan: rows without answers (K = 0).
      layout: of the groups (K = `config.count`).
    """

    def __init__(self, records: Records, plan: RowPlan, layout: RowLayout, answerer: Answerer, config: SamplesConfig, train: TrainConfig):
        self._records, self._items, self._layout, self._answerer = records, plan.items, layout, answerer
        self._config, self._train, self._order = config, train, Order(plan.items, train)

    def begin(self) -> None:
        """Nothing: the rows wait for the policy."""

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        """The next groups `[A, b, ...]`, and how they came out (see `answers.summary`)."""
        draw = self._order.step
        records = [self._records[int(self._items[number][0])] for number in self._order.take()]
        groups = self._answerer(params, records, draw)
        layout = shortest(self._layout, max(len(one.tokens) for group in groups for one in group.answers))
        rows = [self._row(group, layout) for group in groups]
        mean = np.mean([np.sum(row["token_weight"]) for row in rows])
        for row in rows:
            row["sampled"] = dataclasses.replace(row["sampled"], row_tokens=np.float32(mean))
        return in_parts(rows, layout, self._train), summary(groups) | self._answerer.counts

    def get_state(self) -> dict[str, Any]:
        return self._order.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._order.set_state(state)

    def _row(self, group: Answered, layout: RowLayout) -> dict[str, Any]:
        row = _row(group.prompt, group.answers)
        out = {**lay_out_tokens(group.prompt.record, None, self._answerer.processor, layout, row), **group.prompt.pictures}
        judged = all(scored.total is not None for scored in group.scored)
        counts = [judged and (answer.finished or self._config.unfinished) for answer in group.answers]
        out["token_weight"][layout.prefix_slots :] *= np.repeat(counts, layout.answer_slots)
        known = [scored.total for scored in group.scored if scored.total is not None]
        usual = sum(known) / len(known) if known else 0.0
        rewards = np.array([usual if scored.total is None else scored.total for scored in group.scored], np.float32)
        sampled = Sampled(rewards, row_tokens=np.float32(0), limit=np.float32(self._config.max_tokens))
        return {**out, "sampled": sampled, "drawn_logps": _drawn([one.logps for one in group.answers], layout)}


class PairBatches:
    """Every row is a pair of answers that were drawn to a prompt, chosen by their scores (online DPO, OAIF, arXiv 2402.04792); or, with the
    probability `config.offline_share`, the data set's own pair (Mixed-DPO, arXiv 2407.02477, section 2.3).

    A prompt whose answers give no pair stays in the batch with weight 0, and is counted.

    Args:
      plan: rows without answers (K = 0); with the reference (K = 1) or the set's own pair (K = 2) where rows may hold those.
      layout: of the pairs (K = 2), with room for whatever they may hold.
    """

    def __init__(self, records: Records, plan: RowPlan, layout: RowLayout, answerer: Answerer, config: SamplesConfig, train: TrainConfig):
        self._records, self._plan, self._layout, self._answerer = records, plan, layout, answerer
        self._config, self._train, self._order = config, train, Order(plan.items, train)
        self._selector = selectors.parse(config.selector, "config.samples.selector")
        self._filters = Filters(gap=config.gap, length_ratio=config.length_ratio, unfinished=config.unfinished)

    def begin(self) -> None:
        """Nothing: the rows wait for the policy."""

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        """The next pairs `[A, b, ...]`, and how they came out: see `answers.summary`; `samples/pairs` is the share of prompts that gave one,
        `samples/offline` of rows that are the set's own."""
        draw, numbers = self._order.step, self._order.take()
        items = [(self._records[int(self._plan.items[number][0])], int(self._plan.items[number][1])) for number in numbers]
        own = [self._takes_own(record, draw) for record, _ in items]
        drawn = self._answerer(params, [record for (record, _), is_own in zip(items, own, strict=True) if not is_own], draw)
        answered = iter(drawn)
        pairs = [self._own(*item) if is_own else self._selected(next(answered)) for item, is_own in zip(items, own, strict=True)]
        layout = shortest(self._layout, max(pair.row.size.longest for pair in pairs))
        more = {"samples/offline": float(np.mean(own))} if self._config.offline_share else {}
        if drawn:
            found = sum(pair.preference.weight > 0 for pair, is_own in zip(pairs, own, strict=True) if not is_own)
            more["samples/pairs"] = found / len(drawn)
        rows = [self._laid_out(pair, layout) for pair in pairs]
        return in_parts(rows, layout, self._train), summary(drawn) | self._answerer.counts | more

    def get_state(self) -> dict[str, Any]:
        return self._order.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._order.set_state(state)

    def _takes_own(self, record: PreferenceRecord, draw: int) -> bool:
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._config.seed, record_key(record.id), draw))))
        return bool(random.random() < self._config.offline_share)

    def _own(self, record: PreferenceRecord, pref: int) -> "_Pair":
        preference, processor = record.prefs[pref], self._answerer.processor
        row = tokenize(record, preference, processor, 2, max_pixels=self._layout.max_pixels, max_bytes=self._layout.max_bytes)
        pictures = lay_out_pictures(record, processor, self._layout, row)
        return _Pair(record, preference, row, pictures, [np.full(len(ids), np.nan, np.float32) for ids, _ in row.answers])

    def _selected(self, answered: Answered) -> "_Pair":
        record, prompt = answered.prompt.record, answered.prompt
        candidates, answers = answered.candidates(), list(answered.answers)
        if self._selector.reads_reference:
            reference = record.reference.text
            ids = self._answerer.processor.answer_ids(reference)[0]
            candidates.append(Candidate(reference, REFERENCE, tokens=len(ids)))
            answers.append(Own(ids, np.full(len(ids), np.nan, np.float32), reference, True))
        found = self._selector(candidates, self._filters).pairs
        pair = found[0] if found else Preference(0, 1, weight=0.0)
        chosen = [answers[pair.win], answers[pair.lose]]
        return _Pair(record, pair, _row(prompt, chosen), prompt.pictures, [one.logps for one in chosen])

    def _laid_out(self, pair: "_Pair", layout: RowLayout) -> dict[str, Any]:
        tokens = lay_out_tokens(pair.record, pair.preference, self._answerer.processor, layout, pair.row)
        return {**tokens, **pair.pictures, "drawn_logps": _drawn(pair.logps, layout)}


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """A row before it is laid out; `logps` of its answers when they were drawn, NaN where they were not."""

    record: PreferenceRecord
    preference: Preference
    row: RowTokens
    pictures: Mapping[str, Any]
    logps: Sequence[np.ndarray]


def _row(prompt: Prompt, answers: Iterable[Own]) -> RowTokens:
    """A prompt's row with answers that are tokens already."""
    return dataclasses.replace(prompt.row, answers=tuple((one.tokens, np.ones(len(one.tokens), bool)) for one in answers))


def _drawn(logps: Sequence[np.ndarray], layout: RowLayout) -> np.ndarray:
    """The log-probs of each answer in their slots of a row, NaN elsewhere."""
    out = np.full(layout.tokens, np.nan, np.float32)
    for number, known in enumerate(logps):
        start = layout.prefix_slots + number * layout.answer_slots
        out[start : start + len(known)] = known
    return out
