"""What BDHS's outcomes become: preference records, and counts."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator

from mmalign_jax.config import PairsConfig
from mmalign_jax.pairs.bdhs import BdhsSampler, Outcome
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.types import PreferenceRecord, Response


def to_records(outcome: Outcome, config: PairsConfig) -> list[PreferenceRecord]:
    """The preference records of an outcome, empty when the rejected answer is the reference (it would teach nothing) or unusable.

    With `config.gamma` the record's own rejected answer stays a pair beside the new one: the mean of their losses by weights gamma and
    1 - gamma (equation 5), as one row each; alone where nothing new was written.

    With `config.per_sentence` every changed sentence is a pair of its own, behind the clean answer before it: the context in which it was
    written (arXiv 2507.12455 trains on such pairs). An unguided answer has no such sentences and stays one pair.
    """
    record, reference = outcome.record, outcome.reference
    if not outcome.changed and not config.gamma:
        return []
    meta = {**record.meta, "bdhs": _draws(outcome, config)}
    changes = {"prefs": (outcome.preference,), "meta": meta}
    rejected = Response(outcome.rejected, source="bdhs")
    if config.gamma:
        own = record.prefs[0]
        responses = (reference, record.responses[own.lose])
        prefs = (dataclasses.replace(own, win=0, lose=1, weight=2 * config.gamma * own.weight),)
        if outcome.changed:
            responses += (rejected,)
            prefs += (dataclasses.replace(outcome.preference, lose=2, weight=2 * (1 - config.gamma) * own.weight),)
        return [dataclasses.replace(record, responses=responses, prefs=prefs, meta=meta)]
    if not config.per_sentence or outcome.sentences is None:
        return [dataclasses.replace(record, responses=(reference, rejected), **changes)]
    spans, out = split_sentences(reference.text), []
    for number, ((start, end), written) in enumerate(zip(spans, outcome.sentences, strict=True)):
        before, clean = reference.text[:start], reference.text[start:end]
        if not written.strip() or written.split() == clean.split():
            continue
        # white space at the end of the whole answer is no difference between the two
        whole = before + written + clean[len(clean.rstrip()) :]
        responses = (Response(before + clean, source=reference.source), Response(whole, source="bdhs"))
        part = {"id": f"{record.id}/s{number}", "responses": responses, "prefix": before, "complete": end == len(reference.text)}
        out.append(dataclasses.replace(record, **part, **changes))
    return out


def _draws(outcome: Outcome, config: PairsConfig) -> dict:
    """What it takes to make the outcome again with the same policy, and how it came out. JSON has all of it."""
    settings = (
        "seed", "rho_th", "noise_steps", "guided", "n_iter", "eps", "temperature", "top_p", "max_sentence_tokens", "yes_no_swap", "similarity",
        "max_answer_tokens", "mask_scope", "split_unit", "stop",
    )  # fmt: skip
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
    """Counts over records: `records == unchanged + unusable +` those that gave new pairs (one each, unless they are made per sentence).

    Args:
      pairs: preference records with a new pair; with `config.gamma` there are others that hold the set's own pair alone.
      unchanged: no new pair, because nothing was said that the reference does not say.
      unusable: no new pair, because the tokenizer cannot read the last attempt back.
      unfinished: lanes that ran out of slots before they ended.
      by_iteration: iteration -> records that ended there. All that reach the last one end there.
    """

    records: int = 0
    pairs: int = 0
    unchanged: int = 0
    unusable: int = 0
    unfinished: int = 0
    by_iteration: dict[int, int] = dataclasses.field(default_factory=dict)

    def in_words(self) -> str:
        by_iteration = ", ".join(f"{count} in iteration {number}" for number, count in self.by_iteration.items())
        return (
            f"{self.pairs} pairs from {self.records} records; {self.unchanged} came out as their reference, {self.unusable} could not be read back; "
            f"{self.unfinished} sentences ran out of slots; ended: {by_iteration}"
        )

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
    sampler: BdhsSampler, params: dict, records: Iterable[PreferenceRecord], config: PairsConfig, statistics: Statistics
) -> Iterator[tuple[list[PreferenceRecord], Statistics]]:
    """Yields, for every record, its preference records and the counts so far, those of `statistics` included."""
    for outcome in sampler(params, records):
        pairs = to_records(outcome, config)
        statistics = statistics.plus(outcome, len(pairs) if outcome.changed else 0)
        yield pairs, statistics
