"""A table over several runs: one line a method, mean and spread over its seeds."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign_jax.config import PairsConfig
from mmalign_jax.errors import UserError
from mmalign_jax.files import read_json

BEFORE = "before training"
_PAIR_COUNTS = "pairs.json"
_BDHS = ("rho_th", "mask_scope", "noise_steps", "guided", "n_iter", "eps", "temperature", "similarity", "gamma")  # they tell methods apart


@dataclasses.dataclass(frozen=True)
class RunScores:
    """What one run measured: score by (group, name). `label` names its method, `seed` tells its repetitions apart."""

    label: str
    seed: int
    scores: Mapping[tuple[str, str], float]
    steps: int | None = None  # None: before training
    rows: int | None = None  # of one step
    pairs: Mapping = dataclasses.field(default_factory=dict)  # how they came out, where they were made before training


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
        counts = file.with_name(_PAIR_COUNTS)
        pairs = read_json(counts) if counts.is_file() else {}
        after.append(RunScores(label_of(config), seed, _values(rows, "after"), summary["steps"], config["train"]["batch_size"], pairs))
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
    if pairs["maker"] == "bdhs":
        usual = PairsConfig()
        for name in _BDHS:
            if (value := pairs.get(name, getattr(usual, name))) != getattr(usual, name):  # not there: a setting that came later
                label += f", {name} {value:g}" if isinstance(value, float) else f", {name} {value}"
    if pairs["per_sentence"]:
        label += ", per-sentence pairs"
    if pairs["maker"] == "samples":
        label += f", {samples['count']} samples"
        sources = samples.get("sources", ["policy"])  # a setting that came later
        label += f" of {', '.join(sources)}" if sources != ["policy"] else ""
        label += f" by {', '.join(samples['scorers'])}" if samples["scorers"] else ""
        label += f", {samples['selector']}" if samples["selector"] != "best_worst" else ""
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


def pair_markdown(runs: Sequence[RunScores]) -> str:
    """A Markdown table of the pairs that runs with BDHS made before training: records, pairs, and the share of records that ended in each
    iteration (percent; all that reach the last one end there). Empty where there are none."""
    runs = [run for run in runs if run.pairs.get("by_iteration")]
    if not runs:
        return ""
    most = max(int(number) for run in runs for number in run.pairs["by_iteration"])
    lines = ["| method | seeds | records | pairs | unchanged | " + " | ".join(f"iteration {n}" for n in range(1, most + 1)) + " |"]
    lines.append("|---" * (5 + most) + "|")
    for label in dict.fromkeys(run.label for run in runs):
        mine = [run.pairs for run in runs if run.label == label]
        shares = [[100 * one["by_iteration"].get(str(n), 0) / one["records"] for one in mine] for n in range(1, most + 1)]
        counts = [f"{statistics.mean(one[name] for one in mine):.0f}" for name in ("records", "pairs", "unchanged")]
        lines.append(f"| {label} | {len(mine)} | {' | '.join(counts)} | {' | '.join(map(_cell, shares))} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.1f}, {max(values):.1f}]"
