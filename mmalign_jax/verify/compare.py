"""The comparison itself: which numbers, how near they must be, and what differs first when they are not."""

import contextlib
import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf import families
from mmalign_jax.types import PreferenceRecord
from mmalign_jax.verify import probe
from mmalign_jax.verify.ours import Ours, exact
from mmalign_jax.verify.probe import Row
from mmalign_jax.verify.stages import RELATIVE, first_stage, largest_difference, scale

PICTURES = ("first picture", "second picture")


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table. `largest` is the largest difference; NaN where there is nothing to subtract."""

    name: str
    largest: float
    limit: float
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.largest <= self.limit  # not for NaN

    @property
    def cells(self) -> tuple[str, str, str, str]:
        verdict = "equal" if self.holds else "DIFFERENT"
        return self.name, f"{self.largest:.3g}", f"{self.limit:.3g}", f"{verdict}; {self.note}" if self.note else verdict


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All checks, what was left out of them, and in words what differs first ("" when nothing does)."""

    checks: tuple[Check, ...]
    skipped: tuple[str, ...]
    first: str

    @property
    def equal(self) -> bool:
        return all(check.holds for check in self.checks)


def require_torch() -> None:
    """Raises UserError, with the command that mends it, where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("verifying runs transformers, which needs torch, and torch is not installed here: pip install torch")


def verify(directory: pathlib.Path, say: Callable[[str], None] = print) -> int:
    """Compares, prints the table, and returns the exit code: 0 when every number holds, else 1.

    Raises:
      UserError: torch is missing, or either side cannot load the directory.
    """
    verdict = compare(directory)
    rows = [("", "largest difference", "limit", ""), *(check.cells for check in verdict.checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, largest, limit, text in rows:
        say(f"{name:<{widths[0]}}  {largest:>{widths[1]}}  {limit:>{widths[2]}}  {text}".rstrip())
    for line in verdict.skipped:
        say(f"not compared: {line}")
    say(f"{directory}: our numbers equal those of transformers" if verdict.equal else f"{directory}: {verdict.first}")
    return 0 if verdict.equal else 1


def compare(directory: pathlib.Path, theirs_directory: pathlib.Path | None = None) -> Verdict:
    """Both sides on the same directory, or on two whose difference shall be found. Needs room for both models in float32.

    Raises:
      UserError: see `verify`.
    """
    require_torch()
    from mmalign_jax.verify.theirs import Refused, Theirs  # torch

    with exact(), _quiet():
        ours = Ours.load(directory)
        theirs = Theirs.load(theirs_directory or directory, families.of(ours.config), ours.config)
        weights, tensor = _weights(ours, theirs)
        checks = [Check("weight names", len(theirs.odd_names), 0, ", ".join(theirs.odd_names[:4])), weights]
        asked, inputs, skipped = {}, {}, []
        for name, record in _wanted(ours, skipped):
            try:
                inputs[name], asked[name] = theirs.inputs(record), record
            except Refused as error:
                skipped.append(f"{name}: transformers' processor refuses it ({error})")
        if not any(record.media for record in asked.values()):
            raise UserError(f"{directory}: no picture can be compared: {'; '.join(skipped)}")
        error, stage = 0.0, ""
        for name, mine in ours.rows(asked).items():
            answer = ours.tokenize(asked[name]).answers[0][0].tolist()
            p = ours.processor
            other = theirs.row(inputs[name], answer, stops=p.eos_ids, banned=p.banned_ids, scale=(p.mean, p.std))
            made, here = _row(name, mine, other)
            checks, error = [*checks, *made], max(error, here)
            if not stage and not all(check.holds for check in made):
                stage = f"{name}: {first_stage(ours, theirs, asked[name], inputs[name], mine, other)}"
    failed = next((f"{check.name}: {check.note or 'different'}" for check in checks if not check.holds), "")
    return Verdict(tuple(checks), tuple(skipped), "; ".join(filter(None, (tensor, stage))) or failed)


def _wanted(ours: Ours, skipped: list[str]) -> Iterator[tuple[str, PreferenceRecord]]:
    """Both pictures in one row where the model takes that, or a row each; and words alone."""
    records = probe.records()
    try:
        ours.tokenize(records["two pictures"])
    except DataError as error:
        names = [*PICTURES, "text"]
        skipped.append(f"two pictures in one row: {error.problem}")
    else:
        names = ["two pictures", "text"]
    for name in names:
        try:
            ours.tokenize(records[name])
        except DataError as error:
            skipped.append(f"{name}: {error.problem}")
        else:
            yield name, records[name]


def _weights(ours: Ours, theirs: Any) -> tuple[Check, str]:
    """Every tensor of our tree against the parameter of transformers' model; and the first that differs, in words."""
    found = {reduced: (name, values) for reduced, name, values in theirs.tensors()}
    odd, largest, count, different = "", 0.0, 0, []
    for reduced, mine in ours.tensors():
        count += 1
        if reduced not in found:
            odd = odd or f"{reduced} is no parameter of transformers' model"
            continue
        name, values = found.pop(reduced)
        here = largest_difference(mine, values)
        largest = max(largest, here)
        if here > 0:
            different.append(f"{name} (by {here:.3g})")
    left = [name for reduced, (name, _) in found.items() if not reduced or not theirs.table.unused(reduced)]
    if left:
        odd = odd or f"{left[0]} of transformers' model has no place here"
    if different:
        more = f", {len(different)} tensors in all" if len(different) > 1 else ""
        odd = odd or f"the first tensor that differs is {different[0]}{more}"
    return Check(f"weights ({count} tensors)", math.nan if odd and not different else largest, 0), odd


def _row(name: str, mine: Row, other: Row) -> tuple[list[Check], float]:
    """The checks of one row, and how far its logits are apart at most."""
    ids = Check(f"{name}: prompt tokens", _unequal(mine.ids, other.ids), 0, f"{len(mine.ids)} tokens")
    checks = [ids]
    if len(mine.levels) or len(other.levels):
        levels = [row.grey_levels for row in (mine, other)]
        checks.append(Check(f"{name}: pixels (grey levels)", largest_difference(*levels), 0, f"{len(levels[0])} tiles or patches"))
    if not ids.holds:
        return checks, math.inf  # other words have other numbers
    limit, error = RELATIVE * scale(other.logits), largest_difference(mine.logits, other.logits)
    checks.append(Check(f"{name}: logits", error, limit, f"{len(mine.logits)} positions"))
    # a log-prob is the difference of two numbers that may both be off
    checks.append(Check(f"{name}: answer log-probs", largest_difference(mine.logps, other.logps), 2 * limit, f"sum {other.logps.sum():.4f}"))
    return [*checks, _greedy(name, mine, other, error)], error


def _greedy(name: str, mine: Row, other: Row, error: float) -> Check:
    """Greedy text, as far as rounding does not decide it."""
    for at, (ours, theirs, gap) in enumerate(zip(mine.greedy, other.greedy, other.gaps, strict=False)):
        if ours != theirs and gap <= 2 * error:
            return Check(f"{name}: greedy tokens", 0, 0, f"the first {at}; then the runner-up is {gap:.2g} behind, which rounding decides")
        if ours != theirs:
            return Check(f"{name}: greedy tokens", 1, 0, f"token {at} is {ours} here, {theirs} there, where the runner-up is {gap:.2g} behind")
    return Check(f"{name}: greedy tokens", abs(len(mine.greedy) - len(other.greedy)), 0, f"{len(mine.greedy)} tokens")


def _unequal(mine: np.ndarray, other: np.ndarray) -> float:
    return float((mine != other).sum()) if mine.shape == other.shape else math.nan


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' progress bars."""
    import transformers  # late: it takes seconds, and a mistake on the command line should be told at once

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
