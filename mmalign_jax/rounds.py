"""Iterative alignment: rounds of pairs, training and export, each from the model that the round before has exported.

So every round has a new reference, and with low-rank factors it merges those of the round before, in float32, and starts with new ones
(MrDPO, arXiv 2506.15220). A round is a whole run in a directory of its own; the same command goes on with the one that was stopped.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign_jax import pipeline, run_files
from mmalign_jax.config import Config
from mmalign_jax.files import read_json, write_json
from mmalign_jax.report.console import Console


def run(config: Config, workdir: Path) -> int:
    """`pipeline.run`, in `config.rounds.count` rounds under `workdir` where there are several.

    Returns:
      0, or 128 + the signal's number when a signal stopped it.

    Raises:
      UserError: see `pipeline.run`.
    """
    if config.rounds.count == 1:
        return pipeline.run(config, workdir)
    first = pipeline.first_process(config)
    pipeline.first_process_first("claim_rounds", lambda: run_files.claim(config, workdir))
    console = Console(enabled=first)
    directories = [workdir / f"round_{number}" for number in range(1, config.rounds.count + 1)]
    for number, directory in enumerate(directories):
        if (directory / pipeline.SUMMARY).exists():
            console.line(f"Round {number + 1} of {len(directories)} is done")
            continue
        console.line(f"Round {number + 1} of {len(directories)}, in {directory}")
        if code := pipeline.run(of_round(config, directories, number), directory):
            return code
    summaries = [read_json(directory / pipeline.SUMMARY) for directory in directories]
    if first:
        write_json(workdir / pipeline.SUMMARY, _over_all(summaries))
    _print([summary["scores"] for summary in summaries], console)
    console.line(f"Exported to {directories[-1] / 'export'}")
    return 0


def of_round(config: Config, directories: list[Path], number: int) -> Config:
    """The settings of round `number`, counted from 0: it draws anew, and starts from the export of the one before."""
    seeds = {name: dataclasses.replace(getattr(config, name), seed=getattr(config, name).seed + number) for name in ("pairs", "samples", "train")}
    out = dataclasses.replace(config, **seeds, rounds=dataclasses.replace(config.rounds, count=1))
    if number:
        model = dataclasses.replace(config.model, path=str(directories[number - 1] / "export"))
        # what comes before has been measured as the round before's end
        out = dataclasses.replace(out, model=model, eval=dataclasses.replace(config.eval, before=False))
    if number + 1 < len(directories):
        # small moves of many rounds would be lost in bfloat16
        out = dataclasses.replace(out, export=dataclasses.replace(config.export, dtype="float32"))
    return out


def _over_all(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Before the first round, after the last, and the steps of all."""
    before = {(row["group"], row["name"]): row["before"] for row in summaries[0]["scores"]}
    scores = [{**row, "before": before[row["group"], row["name"]]} for row in summaries[-1]["scores"]]
    return {**summaries[-1], "rounds": len(summaries), "steps": sum(summary["steps"] for summary in summaries), "scores": scores}


def _print(summaries: Sequence[Sequence[Mapping[str, Any]]], console: Console) -> None:
    """The scores, round by round."""
    keys = [(row["group"], row["name"]) for row in summaries[0]]
    for group in dict.fromkeys(group for group, _ in keys):
        rows = []
        for name in (name for of_group, name in keys if of_group == group):
            found = [next(row for row in rows_ if (row["group"], row["name"]) == (group, name)) for rows_ in summaries]
            values = [found[0]["before"], *(row["after"] for row in found)]
            rows.append([name, *("" if value is None else f"{value['value']:.3f}" for value in values)])
        console.line(f"\n{group}")
        console.table(rows, ("", "before", *(f"round {number + 1}" for number in range(len(summaries)))))
