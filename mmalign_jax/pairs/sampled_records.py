"""Preference records of answers that the policy drew: which of them are pairs, why others are not, and counts."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

from mmalign_jax.config import SamplesConfig
from mmalign_jax.pairs import selectors
from mmalign_jax.pairs.answers import Answered, Answerer
from mmalign_jax.pairs.selectors import REFERENCE, Candidate, Filters
from mmalign_jax.types import PreferenceRecord, Response


@dataclasses.dataclass(frozen=True)
class SampleStatistics:
    """Counts over records: `records == paired + unchanged`.

    Args:
      pairs: of all records.
      paired: records that gave pairs.
      unchanged: records that gave none.
      unfinished: answers that ran out of tokens.
      answers: that were drawn.
      score: sum of what the answers are worth, where there was a verdict.
      refused: reason -> pairs (or answers, without a verdict) that were refused.
    """

    records: int = 0
    pairs: int = 0
    paired: int = 0
    unchanged: int = 0
    unfinished: int = 0
    answers: int = 0
    score: float = 0.0
    refused: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def in_words(self) -> str:
        refused = ", ".join(f"{count} {reason}" for reason, count in self.refused.items())
        return (
            f"{self.pairs} pairs from {self.paired} of {self.records} records; {self.answers} answers, {self.unfinished} of them out of tokens, of "
            f"score {self.score / max(self.answers, 1):.3f} on average; refused: {refused or 'none'}"
        )

    def plus(self, answered: Answered, pairs: int, refused: Mapping[str, int]) -> "SampleStatistics":
        """With one more record, which gave `pairs` pairs."""
        return SampleStatistics(
            records=self.records + 1,
            pairs=self.pairs + pairs,
            paired=self.paired + (pairs > 0),
            unchanged=self.unchanged + (pairs == 0),
            unfinished=self.unfinished + sum(not one.finished for one in answered.answers),
            answers=self.answers + len(answered.answers),
            score=self.score + sum(one.total for one in answered.scored if one.total is not None),
            refused=dict(sorted((collections.Counter(self.refused) + collections.Counter(refused)).items())),
        )


def sampled_pairs(
    answerer: Answerer, params: dict, records: Iterable[PreferenceRecord], config: SamplesConfig, statistics: SampleStatistics
) -> Iterator[tuple[list[PreferenceRecord], SampleStatistics]]:
    """Yields, for every record, its preference record, if it gave pairs, and the counts so far.

    A record's responses are then the answers that were drawn (source "policy", with their scores), and behind them the reference where the
    selector reads it. A record's answers depend on it and the seed alone.
    """
    selector = selectors.parse(config.selector, "config.samples.selector")
    filters = Filters(gap=config.gap, length_ratio=config.length_ratio, unfinished=config.unfinished)
    for chunk in _batched(records, config.batch_size):
        for answered in answerer(params, chunk, draw=0):
            record, candidates = answered.prompt.record, answered.candidates()
            if selector.reads_reference:
                reference = record.responses[record.prefs[0].win if record.prefs else 0]
                candidates.append(Candidate(reference.text, REFERENCE))
            selection = selector(candidates, filters)
            statistics = statistics.plus(answered, len(selection.pairs), selection.refused)
            responses = tuple(Response(one.text, source=one.source, score=one.score) for one in candidates)
            drawn = {"seed": config.seed, "temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
            scores = [dict(one.parts) for one in answered.scored]
            meta = {**record.meta, "samples": {**drawn, "scorers": list(config.scorers), "selector": config.selector, "scores": scores}}
            changed = dataclasses.replace(record, responses=responses, prefs=selection.pairs, prefix="", complete=True, meta=meta)
            yield [changed] if selection.pairs else [], statistics


def _batched(records: Iterable[PreferenceRecord], size: int) -> Iterator[tuple[PreferenceRecord, ...]]:
    left = iter(records)
    while chunk := tuple(itertools.islice(left, size)):
        yield chunk
