"""The BDHS benchmark: this package and a straightforward implementation make pairs in turn, A B A B, each in a process of its own."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmalign_jax.benchmark.child import Child
from mmalign_jax.benchmark.compare import Estimate, Spread, z_of_means, z_of_shares
from mmalign_jax.benchmark.items import Timed
from mmalign_jax.benchmark.machine import machine
from mmalign_jax.benchmark.workload import Result, Workload
from mmalign_jax.report.console import Console

OURS = "mmalign_jax"
MODULES = {OURS: "mmalign_jax.benchmark.bdhs_ours", "transformers": "mmalign_jax.benchmark.bdhs_transformers"}
RECORDS = (
    "noise pictures of 336 x 336 pixels; descriptions of 4 to 6 sentences and about 16 words each, made from a list of words; one prompt. "
    "Items come again in every round, with draws of their own"
)
RANDOM_MODEL = (
    "random weights, a tokenizer of whole words: each word is about as likely as any other, and one in 12 ends a sentence, so a sentence takes about "
    "12 tokens behind its split. No answer ends by itself: an unguided one takes all of max_answer_tokens. With eps = 0.65 about "
    "three of four first attempts pass, the rate that the paper reports"
)
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
      rounds: of each side, in turn.
      records: of a round of ours, and of the warm-up before, in which it compiles.
      against_records: of a round of the other side; its warm-up is one record.
    """

    rounds: int
    records: int
    against_records: int


@dataclasses.dataclass
class _Side:
    name: str
    child: Child
    records: int
    warm_up: Timed
    rounds: list[Timed] = dataclasses.field(default_factory=list)

    def measure(self) -> Timed:
        start = len(self.warm_up.results) + self.records * len(self.rounds)
        self.rounds.append(Timed.ask(self.child, start, self.records))
        return self.rounds[-1]

    @property
    def results(self) -> list[Result]:
        return [one for timed in self.rounds for one in timed.results]

    @property
    def peak(self) -> int:
        return max(timed.peak_bytes for timed in (self.warm_up, *self.rounds))


def measure(workload: Workload, directory: Path, plan: Plan, against: Sequence[str], console: Console) -> dict[str, Any]:
    """Runs the sides and returns everything about it, for JSON.

    Args:
      directory: receives the workload; holds its pictures.
      against: names of `MODULES` beside ours.

    Raises:
      UserError: a side ends early.
    """
    workload.write(directory)
    names, sides = (OURS, *against), []
    load = [os.getloadavg()]
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        for name in names:
            records = plan.records if name == OURS else plan.against_records
            with console.phase(f"Starting {name}, and its first records"):
                child = Child([MODULES[name], str(directory)])
                sides.append(_Side(name, child, records, Timed.ask(child, 0, records if name == OURS else 1)))
        with console.phase("Measuring") as progress:
            for number in range(plan.rounds):
                for side in sides:
                    timed = side.measure()
                    console.line(f"round {number + 1}, {side.name}: {side.records} records in {timed.seconds:.1f} s")
                progress(number + 1, plan.rounds)
    finally:
        for side in sides:
            side.child.close()
    load.append(os.getloadavg())
    return {
        "workload": "bdhs",
        "command": sys.argv,
        "date": started,
        "machine": machine(),
        "load_before_and_after": load,
        "model": workload.model,
        "records": RECORDS,
        "batch_size": workload.batch_size,
        "plan": dataclasses.asdict(plan),
        "sides": {side.name: _side(side) for side in sides},
        "against": {side.name: _compared(sides[0], side) for side in sides[1:]},
    }


def _side(side: _Side) -> dict[str, Any]:
    results = side.results
    ended = {number: sum(one.iteration == number for one in results) for number in sorted({one.iteration for one in results})}
    return {
        **side.child.ready,
        "warm_up": {"records": len(side.warm_up.results), "seconds": side.warm_up.seconds},
        "rounds": [
            {"records": side.records, "seconds": one.seconds, "cpu_seconds": one.cpu_seconds, "peak_bytes": one.peak_bytes} for one in side.rounds
        ],
        "pairs_per_s": dataclasses.asdict(_speed(side)),
        "pairs_per_cpu_s": dataclasses.asdict(_thrift(side)),
        "peak_bytes": side.peak,
        "pairs": len(results),
        "ended_in_iteration": ended,
        "statistics": {name: dataclasses.asdict(Estimate.of(values)) for name, values in _statistics(results).items()},
    }


def _compared(ours: _Side, other: _Side) -> dict[str, Any]:
    pairs = list(zip(ours.rounds, other.rounds, strict=True))
    speeds = [(ours.records / a.seconds) / (other.records / b.seconds) for a, b in pairs]
    mine, theirs = _statistics(ours.results), _statistics(other.results)
    z = {}
    for name, values in mine.items():
        if set(values) | set(theirs[name]) <= {0.0, 1.0}:
            z[name] = z_of_shares(int(sum(values)), len(values), int(sum(theirs[name])), len(theirs[name]))
        else:
            z[name] = z_of_means(Estimate.of(values), Estimate.of(theirs[name]))
    return {
        "speed_ratio": dataclasses.asdict(Spread.of(speeds)),
        "peak_memory_ratio": ours.peak / other.peak,
        "same_options": ours.child.ready["options"] == other.child.ready["options"],
        "z": z,
    }


def _speed(side: _Side) -> Spread:
    return Spread.of([side.records / one.seconds for one in side.rounds])


def _thrift(side: _Side) -> Spread:
    return Spread.of([side.records / one.cpu_seconds for one in side.rounds])


def _statistics(results: Sequence[Result]) -> dict[str, list[float]]:
    """Number by record; the first three are shares."""
    return {
        "ended in iteration 1": [float(one.iteration == 1) for one in results],
        "accepted": [float(one.accepted) for one in results],
        "unchanged": [float(one.unchanged) for one in results],
        "iterations": [float(one.iteration) for one in results],
        "similarity": [one.similarity for one in results],
        "words of the answer": [float(one.words) for one in results],
    }


def table(report: dict[str, Any]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Rows and columns for the console."""
    sides, names = report["sides"], list(report["sides"])
    spread = lambda value, form: Spread(**value).text(form)  # noqa: E731

    def row(title: str, cell, *ratios: str) -> tuple[str, ...]:
        return (title, *(cell(sides[name]) for name in names), *(ratios or [""] * (len(names) - 1)))

    against = list(report["against"].values())
    rows = [
        row("pairs/s, median [min, max]", lambda s: spread(s["pairs_per_s"], ".3g"), *(spread(one["speed_ratio"], ".3g") for one in against)),
        row("pairs per CPU second", lambda s: spread(s["pairs_per_cpu_s"], ".3g")),
        row("peak memory, MiB", lambda s: f"{s['peak_bytes'] / _MIB:.0f}", *(f"{one['peak_memory_ratio']:.2f}" for one in against)),
        row("of it behind the imports, MiB", lambda s: f"{s['imported_bytes'] / _MIB:.0f}"),
        row("first records, with compilation, s", lambda s: f"{s['warm_up']['seconds']:.1f} ({s['warm_up']['records']})"),
        row("pairs", lambda s: str(s["pairs"])),
    ]
    for name in next(iter(sides.values()))["statistics"]:
        cell = lambda s, name=name: Estimate(**s["statistics"][name]).text()  # noqa: E731
        rows.append(row(name, cell, *(f"z {one['z'][name]:+.1f}" for one in against)))
    return rows, ("BDHS", *names, *("" for _ in against))
