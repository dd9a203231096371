"""How often held-out pairs are put in the right order: accuracy with its interval, by source and by length; mean and spread of the rewards."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmalign_jax.evaluation.interval import bootstrap, ratio
from mmalign_jax.report.records import Score, ScoreRow
from mmalign_jax.types import PreferenceRecord

TITLE = "Held-out pairs"
_SEED = 0  # of the intervals
_ORIGIN = ("origin_dataset", "ds_name")  # of a record, in its `meta`
_LENGTHS = ("chosen_longer", "chosen_shorter", "same_length")


@dataclasses.dataclass(frozen=True)
class Judged:
    """A pair with what the model gives its two answers, chosen and rejected.

    Args:
      source: the set that the record is of, or else who wrote the rejected answer.
      lengths: tokens.
    """

    record_id: str
    source: str
    rewards: tuple[float, float]
    lengths: tuple[float, float]

    @property
    def right(self) -> bool:
        """A tie is wrong."""
        return self.rewards[0] > self.rewards[1]

    @property
    def by_length(self) -> str:
        chosen, rejected = self.lengths
        return _LENGTHS[0 if chosen > rejected else 1 if chosen < rejected else 2]


def source_of(record: PreferenceRecord, pref: int) -> str:
    named = next((str(record.meta[key]) for key in _ORIGIN if record.meta.get(key)), "")
    return named or (record.responses[record.prefs[pref].lose].source if record.prefs else "") or "not named"


def summarise(pairs: Sequence[Judged]) -> dict[str, Any]:
    """What JSON can hold: `pairs`, `accuracy`, `margin`, `mean`, `std`, and `by_source` and `by_length`: name -> `pairs` and `accuracy`.

    Measures are `{"value", "low", "high"}`, with 95 % intervals over records: pairs of one record are not independent. `std` is over all
    answers.
    """
    numbers = {record_id: number for number, record_id in enumerate(dict.fromkeys(pair.record_id for pair in pairs))}

    def over(some: Sequence[Judged]) -> dict[str, Any]:
        counts = np.zeros((len(numbers), 2))
        for pair in some:
            counts[numbers[pair.record_id]] += (pair.right, 1.0)
        measures = lambda sums: {"accuracy": ratio(sums[..., 0], sums[..., 1])}  # noqa: E731
        return {"pairs": len(some)} | _plain(bootstrap(counts[counts[:, 1] > 0], measures, seed=_SEED))

    sums = np.zeros((len(numbers), 4))
    for pair in pairs:
        chosen, rejected = pair.rewards
        sums[numbers[pair.record_id]] += (1.0, chosen - rejected, (chosen + rejected) / 2, (chosen**2 + rejected**2) / 2)
    found = over(pairs) | _plain(bootstrap(sums, _moments, seed=_SEED))
    for name, key in (("by_source", lambda pair: pair.source), ("by_length", lambda pair: pair.by_length)):
        groups = sorted({key(pair) for pair in pairs})
        found[name] = {group: over([pair for pair in pairs if key(pair) == group]) for group in groups}
    return found


def rows(found: Mapping[str, Any] | None) -> list[ScoreRow]:
    """The lines of the report's table; there is no column "before"."""
    if found is None:
        return []
    after = lambda name, measure, better="", percent=True: ScoreRow(name, None, Score(**measure), better, percent, TITLE)  # noqa: E731
    out = [after(f"Accuracy ({found['pairs']} pairs)", found["accuracy"], "higher")]
    parts = [*(("", group, part) for group, part in found["by_length"].items())]
    parts += [("source ", group, part) for group, part in found["by_source"].items()] if len(found["by_source"]) > 1 else []
    for kind, group, part in parts:
        out.append(after(f"Accuracy, {kind}{group.replace('_', ' ')} ({part['pairs']} pairs)", part["accuracy"], "higher"))
    named = (("Margin", "margin"), ("Mean reward", "mean"), ("Standard deviation of rewards", "std"))
    return out + [after(name, found[key], percent=False) for name, key in named]


def metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """The measures by their names in the metrics."""
    names = {"accuracies": "accuracy", "margins": "margin", "mean": "mean", "std": "std"}
    out = {f"held_out/{name}": found[key]["value"] for name, key in names.items()}
    for group, part in found["by_length"].items():
        out[f"held_out/accuracies_{group}"] = part["accuracy"]["value"]
    return out


def _moments(sums: np.ndarray) -> dict[str, np.ndarray]:
    count = sums[..., 0]
    mean = ratio(sums[..., 2], count)
    spread = np.sqrt(np.maximum(ratio(sums[..., 3], count) - mean**2, 0.0))
    return {"margin": ratio(sums[..., 1], count), "mean": mean, "std": spread}


def _plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: dataclasses.asdict(score) for name, score in scores.items()}
