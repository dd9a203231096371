"""A table over several runs: one line a method, mean and spread over its seeds."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign_jax.errors import UserError
from mmalign_jax.files import read_json

BEFORE = "before training"


@dataclasses.dataclass(frozen=True)
class RunScores:
    """What one run measured: score by (group, name). `label` names its method, `seed` tells its repetitions apart."""

    label: str
    seed: int
    scores: Mapping[tuple[str, str], float]
    steps: int | None = None  # None: before training
    rows: int | None = None  # of one step


def read_runs(root: Path) -> tuple[RunScores, ...]:
    """The finished runs under a directory, and first what was measured of each model before training (`eval.before`).

    Raises:
      UserError: there are none.
    """
    before: list[RunScores] = []
    after: list[RunScores] = []
    for file in sorted(root.glob("*/summary.json")):
        config, summary = read_json(file.parent / "config.json"), read_json(file)
        seed, rows = config["train"]["seed"], summary["scores"]
        values = _values(rows, "before")
        # runs that start from the same model measure the same
        if values and not any(one.scores == values for one in before):
            before.append(RunScores(f"{BEFORE}, {Path(config['model']['path']).name}", seed, values))
        after.append(RunScores(label_of(config), seed, _values(rows, "after"), summary["steps"], config["train"]["batch_size"]))
    if not after:
        raise UserError(f"{root}: no finished run (no */summary.json)")
    return (*before, *after)


def _values(rows: Sequence[Mapping], when: str) -> dict[tuple[str, str], float]:
    return {(row["group"], row["name"]): row[when]["value"] for row in rows if row[when]}


def label_of(config: Mapping) -> str:
    """A method as its config says it: objective, what is not its default, how its pairs are made."""
    objective, pairs, samples = config["objective"], config["pairs"], config["samples"]
    given = {key: value for key, value in objective.items() if key != "name" and value is not None}
    others = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in given.items()]
    label = objective["name"] + (f" ({', '.join(others)})" if others else "")
    if pairs["per_sentence"]:
        label += ", per-sentence pairs"
    if pairs["maker"] == "samples":
        label += f", {samples['count']} samples"
        label += f", {samples['offline_share']:.0%} own pairs" if samples["offline_share"] else ""
    if pairs["when"] == "online":
        label += ", online"
    if (rounds := config["rounds"]["count"]) > 1:
        label += f", {rounds} rounds"
    return label


def markdown(runs: Sequence[RunScores], group: str, names: Sequence[str], percent: Sequence[str]) -> str:
    """A Markdown table: mean over the seeds, and the range in brackets.

    Args:
      group: heading of the scores in `summary.json`.
      names: the scores to show, in order; those in `percent` are fractions, shown times 100.
    """
    lines = ["| method | steps x rows | seeds | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for label in dict.fromkeys(run.label for run in runs):
        mine = [run for run in runs if run.label == label]
        cells = []
        for name in names:
            scale = 100 if name in percent else 1
            values = [scale * run.scores[group, name] for run in mine if (group, name) in run.scores]
            cells.append(_cell(values))
        work = ", ".join(dict.fromkeys(f"{run.steps} x {run.rows}" for run in mine if run.steps is not None)) or "-"
        lines.append(f"| {label} | {work} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.1f}, {max(values):.1f}]"
