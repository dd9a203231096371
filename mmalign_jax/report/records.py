"""What a report is made of. Plain records, so that a report can be made without a model and tested without a run."""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Score:
    """A measured value with its 95 % interval, when there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """A line of the before/after table.

    `percent` values are fractions, shown times 100. `better` says which way is good; "" colours nothing. `group` is a heading over
    the rows that follow each other with the same one, such as the name of a split.
    """

    name: str
    before: Score | None
    after: Score | None
    better: Literal["higher", "lower", ""] = ""
    percent: bool = True
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A text, and the words in it that name what the image does not show."""

    text: str
    hallucinated: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class GalleryItem:
    """One example: images `uint8 [Y, X, 3]`, the prompt, and the answers that there are."""

    id: str
    images: tuple[np.ndarray, ...]
    prompt: str
    chosen: Answer | None = None
    rejected: Answer | None = None
    before: Answer | None = None
    after: Answer | None = None


@dataclasses.dataclass(frozen=True)
class SkippedRow:
    file: str
    row: str
    reason: str


def score_cells(row: ScoreRow) -> tuple[str, str, str, str]:
    """A row's cells in text: name, before, after, change; the change of a percentage is in percentage points (pp)."""
    return row.name, _text(row, row.before), _text(row, row.after), _change(row)


def verdict(row: ScoreRow) -> Literal["better", "worse", "same", ""]:
    """Which way the row went, by what is shown of it: a change that rounds to nothing is "same"."""
    if row.before is None or row.after is None or not row.better:
        return ""
    shown = float(_change(row).removesuffix(" pp"))
    if shown == 0:
        return "same"
    return "better" if (shown > 0) == (row.better == "higher") else "worse"


def _text(row: ScoreRow, score: Score | None) -> str:
    if score is None:
        return "-"
    text = _number(row, score.value) + ("%" if row.percent else "")
    if score.low is None or score.high is None:
        return text
    return f"{text} [{_number(row, score.low)}, {_number(row, score.high)}]"


def _change(row: ScoreRow) -> str:
    if row.before is None or row.after is None:
        return "-"
    return _number(row, row.after.value - row.before.value, sign="+") + (" pp" if row.percent else "")


def _number(row: ScoreRow, value: float, sign: str = "") -> str:
    """All numbers of a row with as many decimals: one for percentages, else about three digits."""
    if row.percent:
        return f"{100 * value:{sign}.1f}"
    largest = max(abs(score.value) for score in (row.before, row.after) if score is not None)
    return f"{value:{sign}.{3 if largest < 1 else 2 if largest < 10 else 1 if largest < 1000 else 0}f}"
