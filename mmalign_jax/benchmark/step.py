"""The step benchmark: sides train on the same pairs in turn, A B A B, each in a process of its own."""

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmalign_jax.benchmark.child import Child
from mmalign_jax.benchmark.compare import Spread
from mmalign_jax.benchmark.machine import machine
from mmalign_jax.benchmark.pairs import PairWorkload
from mmalign_jax.errors import UserError
from mmalign_jax.report.console import Console

OURS, NAIVE, UNSHARED, FEATURES, TRL = "mmalign_jax", "self:naive", "self:unshared", "self:features", "trl"
MODULES = {
    OURS: ("mmalign_jax.benchmark.step_ours", ()),
    NAIVE: ("mmalign_jax.benchmark.step_ours", ("naive",)),
    UNSHARED: ("mmalign_jax.benchmark.step_ours", ("unshared",)),
    FEATURES: ("mmalign_jax.benchmark.step_ours", ("features",)),
    TRL: ("mmalign_jax.benchmark.step_trl", ()),
}
_MIB = 1 << 20
_BATCHES = 16
_AGREEMENT = 2e-4  # of log-probs in float32; in bfloat16 a hundred times that


@dataclasses.dataclass
class _Side:
    name: str
    child: Child
    first: dict[str, Any]
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> Spread:
        """Of a step."""
        return Spread.of([one for timed in self.rounds for one in timed["seconds"]])

    @property
    def peak(self) -> int:
        return max(timed["device_peak_bytes"] or timed["peak_bytes"] for timed in (self.first, *self.rounds))


def measure(
    workload: PairWorkload, directory: Path, against: Sequence[str], console: Console, *, rounds: int, steps: int, platform: str = "cpu"
) -> dict[str, Any]:
    """Runs the sides and returns everything about it, for JSON.

    Args:
      directory: receives the workload; holds its pictures.
      against: names of `MODULES` beside ours.
      steps: of a side in a round.
      platform: see `Child`.

    Raises:
      UserError: a side ends early, or does not compute what ours does.
    """
    if TRL in against and (workload.objective != "dpo" or workload.reference != "live"):
        raise UserError("--against trl: the other side trains by dpo with a live reference; leave --objective and --reference as they are")
    workload.write(directory)
    sides: list[_Side] = []
    load, started = [os.getloadavg()], datetime.now(UTC).isoformat(timespec="seconds")
    try:
        for name in (OURS, *against):
            with console.phase(f"Starting {name}, and its first step"):
                module, arguments = MODULES[name]
                child = Child([module, str(directory), *arguments], platform)
                sides.append(_Side(name, child, child({"steps": 1})))
            _check(sides[0], sides[-1])
        with console.phase("Measuring") as progress:
            for number in range(rounds):
                for side in sides:
                    side.rounds.append(side.child({"steps": steps}))
                progress(number + 1, rounds)
        with console.phase("Measuring the loader alone"):
            sides[0].child({"batches": _BATCHES})  # what lies ready was made before
            images_per_s = sides[0].child({"batches": _BATCHES})["images_per_s"]
    finally:
        for side in sides:
            side.child.close()
    load.append(os.getloadavg())
    ours = sides[0]
    return {
        "workload": "step",
        "command": sys.argv,
        "date": started,
        "machine": machine(),
        "load_before_and_after": load,
        "setting": {name: value for name, value in dataclasses.asdict(workload).items() if name != "pairs"},
        "rounds": rounds,
        "steps": steps,
        "loader_images_per_s": images_per_s,
        "sides": {side.name: _side(side, workload) for side in sides},
        "against": {side.name: _compared(ours, side) for side in sides[1:]},
    }


def _check(ours: _Side, other: _Side) -> None:
    """Whether both sides have the same weights, tokens and pictures: what they say of the chosen answers before they have learnt anything."""
    here, there = ours.first["logps_chosen"], other.first["logps_chosen"]
    if here is None or there is None:
        return
    allowed = _AGREEMENT if ours.child.ready["dtype"] == "float32" else 100 * _AGREEMENT
    if not math.isclose(here, there, rel_tol=allowed):
        raise UserError(
            f"{other.name} does not compute what {ours.name} computes: the log-probs of the chosen answers are {there:.4f} and {here:.4f}"
        )


def _side(side: _Side, workload: PairWorkload) -> dict[str, Any]:
    pairs, seconds = workload.shape.batch, side.seconds
    out = {
        **side.child.ready,
        "first_step_s": side.first["seconds"][0],
        "first_step": {"loss": side.first["loss"], "logps_chosen": side.first["logps_chosen"]},
        "step_s": dataclasses.asdict(seconds),
        "pairs_per_s": dataclasses.asdict(Spread(pairs / seconds.median, pairs / seconds.most, pairs / seconds.least)),
        "answer_tokens_per_s": 2 * pairs * (workload.shape.answer_words + 1) / seconds.median,
        "peak_bytes": side.peak,
        "rounds": side.rounds,
    }
    if "flops" in side.child.ready:
        rates = Spread.of([timed["matrix_flops_per_s"] for timed in side.rounds])
        waits = [one for timed in side.rounds for one in timed["input_wait"]]
        out |= {
            "matrix_flops_per_s": dataclasses.asdict(rates),
            "share_of_matrix_rate": side.child.ready["flops"] / seconds.median / rates.median,
            "input_wait_share": Spread.of(waits).median / seconds.median,
        }
    return out


def _compared(ours: _Side, other: _Side) -> dict[str, Any]:
    """Ratios of a round each, since rounds stand beside each other in time."""
    ratios = []
    for mine, theirs in zip(ours.rounds, other.rounds, strict=True):
        ratios.append(Spread.of(theirs["seconds"]).median / Spread.of(mine["seconds"]).median)
    out = {"speed_ratio": dataclasses.asdict(Spread.of(ratios)), "peak_memory_ratio": ours.peak / other.peak}
    if "flops" in other.child.ready:
        out["predicted_speed_ratio"] = other.child.ready["flops"] / ours.child.ready["flops"]
    return out


def table(report: dict[str, Any]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Rows and columns for the console."""
    sides, against = report["sides"], report["against"].values()
    spread = lambda value, form: Spread(**value).text(form)  # noqa: E731

    def row(title: str, cell, *ratios: str) -> tuple[str, ...]:
        return (title, *map(cell, sides.values()), *(ratios or [""] * len(against)))

    own = lambda name, form: lambda s: format(s[name], form) if name in s else ""  # noqa: E731
    rows = [
        row("pairs/s, median [min, max]", lambda s: spread(s["pairs_per_s"], ".3g"), *(spread(one["speed_ratio"], ".3g") for one in against)),
        row(
            "by the FLOP formula", lambda s: f"{s['flops'] / 1e9:.0f} GFLOP" if "flops" in s else "",
            *(f"{one['predicted_speed_ratio']:.3g}" if "predicted_speed_ratio" in one else "" for one in against),
        ),
        row("step, s", lambda s: spread(s["step_s"], ".3g")),
        row("answer tokens/s", lambda s: f"{s['answer_tokens_per_s']:.1f}"),
        row("slots of a step (tokens of the longest row)", lambda s: f"{s['slots']} ({s['tokens_of_a_row']})"),
        row("peak memory, MiB", lambda s: f"{s['peak_bytes'] / _MIB:.0f}", *(f"{one['peak_memory_ratio']:.2f}" for one in against)),
        row("of it behind the imports, MiB", lambda s: f"{s['imported_bytes'] / _MIB:.0f}"),
        row("first step, with compilation, s", lambda s: f"{s['first_step_s']:.1f}"),
        row("log-probs of the chosen answers, first step", lambda s: f"{s['first_step']['logps_chosen'] or math.nan:.3f}"),
        row("share of the measured matrix rate", own("share_of_matrix_rate", ".1%")),
        row("input wait, share of the step", own("input_wait_share", ".2%")),
        row("images/s of the loader alone", lambda s: f"{report['loader_images_per_s']:.0f}" if s is sides[OURS] else ""),
    ]  # fmt: skip
    return rows, ("step", *sides, *("" for _ in against))
