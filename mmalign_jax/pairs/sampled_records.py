"""Preference records of answers to prompts: which of them are pairs, why others are not, and counts."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

from mmalign_jax.config import SamplesConfig
from mmalign_jax.data.validate import TAGS
from mmalign_jax.hf.processor import Processor
from mmalign_jax.pairs import selectors, sources
from mmalign_jax.pairs.answers import Answered, Answerer
from mmalign_jax.pairs.selectors import REFERENCE, Candidate, Filters
from mmalign_jax.types import PreferenceRecord, Response


@dataclasses.dataclass(frozen=True)
class SampleStatistics:
    """Counts over records: `records == paired + unchanged`.

    Args:
      pairs: of all records; labelled answers or groups where the selector makes those.
      paired: records that gave pairs.
      unchanged: records that gave none.
      unfinished: answers that ran out of tokens.
      answers: of all sources.
      judged: answers with a verdict of all scorers.
      score: sum of what these are worth.
      refused: reason -> answers, or pairs of them, that were refused, and answers that a source did not have.
      asked: how those who were asked answered, by the names of metrics.
    """

    records: int = 0
    pairs: int = 0
    paired: int = 0
    unchanged: int = 0
    unfinished: int = 0
    answers: int = 0
    judged: int = 0
    score: float = 0.0
    refused: Mapping[str, int] = dataclasses.field(default_factory=dict)
    asked: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def mean_score(self) -> float:
        return self.score / max(self.judged, 1)

    def in_words(self, rows: str = "pairs") -> str:
        """
        Args:
          rows: what `pairs` counts.
        """
        refused = ", ".join(f"{count} {reason}" for reason, count in self.refused.items())
        return (
            f"{self.pairs} {rows} from {self.paired} of {self.records} records; {self.answers} answers, {self.unfinished} of them out of tokens, of "
            f"score {self.mean_score:.3f} on average; refused: {refused or 'none'}"
        )

    def plus(self, answered: Answered, pairs: int, refused: Mapping[str, int]) -> "SampleStatistics":
        """With one more record, which gave `pairs` pairs."""
        totals = [one.total for one in answered.scored if one.total is not None]
        return SampleStatistics(
            records=self.records + 1,
            pairs=self.pairs + pairs,
            paired=self.paired + (pairs > 0),
            unchanged=self.unchanged + (pairs == 0),
            unfinished=self.unfinished + sum(not one.finished for one in answered.answers),
            answers=self.answers + len(answered.answers),
            judged=self.judged + len(totals),
            score=self.score + sum(totals),
            refused=dict(sorted((collections.Counter(self.refused) + collections.Counter(refused)).items())),
        )


def sampled_pairs(
    answerer: Answerer, params: dict, records: Iterable[PreferenceRecord], config: SamplesConfig, statistics: SampleStatistics
) -> Iterator[tuple[list[PreferenceRecord], SampleStatistics]]:
    """Yields, for every record, its preference record, if it gave rows, and the counts so far.

    A record's responses are then the answers to it (with their sources and scores), but for those that no record can hold: they
    ran out of tokens, so that an end token behind them would be a lie, or their text cannot be read back. The reference stands behind them
    where the selector reads it. A record's answers depend on it and the seed alone.
    """
    selector = selectors.parse(config.selector, "config.samples.selector")
    asked_before = collections.Counter(statistics.asked)
    most = sum(one.most(config.count) for one in sources.parse(config.sources))
    filters = Filters(gap=config.gap, length_ratio=config.length_ratio, unfinished=config.unfinished)
    for chunk in _batched(records, config.batch_size):
        for answered in answerer(params, chunk, draw=0):
            record, drawn, left_out = answered.prompt.record, answered.candidates(), collections.Counter()
            left_out.update(f"no {name}" for name in answered.without)
            candidates = []
            for one in drawn:
                if reason := _unusable(one, answerer.processor):
                    left_out[reason] += 1
                else:
                    candidates.append(one)
            if selector.reads_reference:
                candidates.append(Candidate(record.reference.text, REFERENCE))
            selection = selector(candidates, filters, most)
            statistics = statistics.plus(answered, selection.rows, collections.Counter(selection.refused) + left_out)
            statistics = dataclasses.replace(statistics, asked=dict(asked_before + collections.Counter(answerer.counts)))
            judged = bool(config.scorers)
            responses = tuple(Response(one.text, source=one.source, score=one.score if judged else None) for one in candidates)
            made = {name: getattr(config, name) for name in ("seed", "temperature", "top_p", "top_k", "selector")}
            meta = {**record.meta, "samples": {**made, "sources": list(config.sources), "scorers": list(config.scorers)}}
            rows = {"prefs": selection.pairs, "labels": selection.labels, "groups": selection.groups}
            changed = dataclasses.replace(record, responses=responses, **rows, prefix="", complete=True, meta=meta)
            yield [changed] if selection.rows else [], statistics


def _unusable(answer: Candidate, processor: Processor) -> str:
    """Why an answer cannot stand in a record, "" when it can."""
    if not answer.finished:
        return "out of tokens"
    spells_a_picture = any(tag in answer.text for tag in TAGS.values())
    return "unreadable" if spells_a_picture or not processor.readable(answer.text) else ""


def _batched(records: Iterable[PreferenceRecord], size: int) -> Iterator[tuple[PreferenceRecord, ...]]:
    left = iter(records)
    while chunk := tuple(itertools.islice(left, size)):
        yield chunk
