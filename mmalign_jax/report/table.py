"""A table over several runs: one line a method, mean and spread over its seeds."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign_jax.errors import UserError
from mmalign_jax.files import read_json


@dataclasses.dataclass(frozen=True)
class RunScores:
    """What one run measured after training: score by (group, name). `label` names its method, `seed` tells its repetitions apart."""

    label: str
    seed: int
    scores: Mapping[tuple[str, str], float]


def read_runs(root: Path) -> tuple[RunScores, ...]:
    """The finished runs under a directory.

    Raises:
      UserError: there are none.
    """
    runs = []
    for file in sorted(root.glob("*/summary.json")):
        config = read_json(file.parent / "config.json")
        rows = read_json(file)["scores"]
        scores = {(row["group"], row["name"]): row["after"]["value"] for row in rows if row["after"]}
        runs.append(RunScores(label_of(config), config["train"]["seed"], scores))
    if not runs:
        raise UserError(f"{root}: no finished run (no */summary.json)")
    return tuple(runs)


def label_of(config: Mapping) -> str:
    """A method in words: objective, likelihood term, how its pairs are made."""
    objective, pairs = config["objective"], config["pairs"]
    label = objective["name"].upper() if objective["name"] != "simpo" else "SimPO"
    label = {"MDPO": "mDPO", "SFT": "SFT on the chosen answers"}.get(label, label)
    if objective.get("nll_weight"):
        label += f" + {objective['nll_weight']:g} NLL"
    given = {key: value for key, value in objective.items() if key not in ("name", "nll_weight") and value is not None}
    others = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in given.items()]
    label += f" ({', '.join(others)})" if others else ""
    if pairs["per_sentence"]:
        label += ", per-sentence pairs"
    if pairs["when"] == "online":
        label += ", online"
    return label


def markdown(runs: Sequence[RunScores], group: str, names: Sequence[str], percent: Sequence[str]) -> str:
    """A Markdown table: mean over the seeds, and the range in brackets.

    Args:
      group: heading of the scores in `summary.json`.
      names: the scores to show, in order; those in `percent` are fractions, shown times 100.
    """
    lines = ["| method | seeds | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for label in dict.fromkeys(run.label for run in runs):
        mine = [run for run in runs if run.label == label]
        cells = []
        for name in names:
            scale = 100 if name in percent else 1
            values = [scale * run.scores[group, name] for run in mine if (group, name) in run.scores]
            cells.append(f"{statistics.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]" if values else "-")
        lines.append(f"| {label} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
