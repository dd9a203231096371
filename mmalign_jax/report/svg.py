"""Line charts as inline SVG. Colours are classes, so that the page's theme decides them."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 400, 220  # units of the drawing; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 30
_MOST_POINTS = 400  # more than a chart of this width can show


@dataclasses.dataclass(frozen=True)
class Series:
    """Values over steps, in order of steps; None (or not finite) leaves a gap in the line."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]


def line_chart(series: Sequence[Series]) -> str:
    """One `<svg>` with all the series over common axes, coloured by the classes s0, s1, ...

    More points than the chart can show are averaged in equal groups of neighbours; the tooltip says so.

    Raises:
      ValueError: no series holds a finite value.
    """
    series = [_thin(one) for one in series]
    points = [(x, y) for one in series for x, y in zip(one.steps, one.values, strict=True) if _finite(y)]
    if not points:
        raise ValueError("a chart needs at least one finite value")
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    ticks = nice_ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = ticks[0], ticks[-1]
    px = lambda x: _LEFT + (WIDTH - _LEFT - _RIGHT) * ((x - left) / (right - left) if right > left else 0.5)  # noqa: E731
    py = lambda y: HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (y - low) / (high - low)  # noqa: E731

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(one.name for one in series))} over steps">']
    step = ticks[1] - ticks[0]
    for tick in ticks:
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{py(tick) + 3.5:.1f}" text-anchor="end">{_tick_text(tick, step)}</text>')
    for tick in _step_ticks(left, right):
        anchor = "end" if tick == right != left else "middle"  # the last number would reach over the edge
        out.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{tick}</text>')
    for number, one in enumerate(series):
        out.append(f'<g class="s{number}"><title>{escape(one.name)}</title>')
        for run in _runs(one):
            if len(run) == 1:
                out.append(f'<circle cx="{px(run[0][0]):.1f}" cy="{py(run[0][1]):.1f}" r="2.5"/>')
            else:
                out.append(f'<polyline points="{" ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in run)}"/>')
        out.append("</g>")
    return "".join([*out, "</svg>"])


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that enclose `[low, high]`: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # flat: room around the one value
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _step_ticks(left: int, right: int) -> list[int]:
    """Steps with a number under the axis: both ends, and round ones between that leave room for them."""
    if left == right:
        return [left]
    span = right - left
    inner = [round(tick) for tick in nice_ticks(left, right, most=4) if tick == round(tick)]
    return [left, *(tick for tick in inner if left + 0.12 * span < tick < right - 0.16 * span), right]


def _tick_text(value: float, step: float) -> str:
    """A number with as many digits as tell it from its neighbour, a step away."""
    if abs(value) < step / 2:
        return "0"
    last = math.floor(math.log10(step) + 1e-9)  # decimal place of the step's first digit
    last -= abs(step / 10**last - 2.5) < 1e-6  # 2.5 has two
    if step >= 1e-5 and abs(value) < 1e6:
        return f"{value:.{max(0, -last)}f}"
    return f"{value:.{math.floor(math.log10(abs(value)) + 1e-9) - last + 1}g}"


def _thin(one: Series) -> Series:
    group = math.ceil(len(one.steps) / _MOST_POINTS)
    if group <= 1:
        return one
    starts = range(0, len(one.steps), group)
    values = []
    for start in starts:
        finite = [value for value in one.values[start : start + group] if _finite(value)]
        values.append(sum(finite) / len(finite) if finite else None)
    steps = tuple(one.steps[min(start + group, len(one.steps)) - 1] for start in starts)
    return Series(f"{one.name} (means of {group} logged steps)", steps, tuple(values))


def _runs(one: Series) -> list[list[tuple[int, float]]]:
    """The points of a series, parted where a value is missing."""
    runs: list[list[tuple[int, float]]] = [[]]
    for x, y in zip(one.steps, one.values, strict=True):
        if _finite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
