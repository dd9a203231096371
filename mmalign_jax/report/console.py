"""What a run says on the terminal: one live status line there, plain lines in a log file."""

import contextlib
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

# What the status line shows, where the metrics have it: name in the metrics, label, format.
_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("samples/score", "reward", "{:+.3f}"),
    ("rewards/margins", "margin", "{:+.3f}"),
    ("rewards/accuracies", "accuracy", "{:.0%}"),
    ("pairs_per_s", "pairs/s", "{:.3g}"),
)


class Console:
    """The voice of one process. Only the first process of a job speaks: the others are made with `enabled=False`.

    Args:
      stream: where to write; standard output when None.
      enabled: False makes every method silent.
      live: whether the status is one line that is drawn anew; None: whether the stream is a terminal.
      every_s: seconds between two plain status lines.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        enabled: bool = True,
        live: bool | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._live = self._stream.isatty() if live is None else live
        self._every_s = 0.2 if self._live else every_s
        self._clock = clock
        self._drawn = False  # whether the cursor stands behind a live line
        self._shown_at = -float("inf")
        self._history: deque[tuple[float, int]] = deque(maxlen=50)

    def line(self, text: str) -> None:
        """Writes a line of its own; a live status line is wiped first and comes back with the next status."""
        if not self._enabled:
            return
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._drawn = False
        self._stream.write(text + "\n")
        self._stream.flush()

    def status(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """Shows where training stands after `step` of `steps`; called at every logged step, written as often as a reader can use."""
        now = self._clock()
        if self._history and step < self._history[-1][1]:
            self._history.clear()
        self._history.append((now, step))
        due = now - self._shown_at >= self._every_s or step >= steps
        if not self._enabled or not due:
            return
        self._shown_at = now
        parts = [f"step {step}/{steps}"]
        parts += [f"{label} {form.format(metrics[name])}" for name, label, form in _SHOWN if metrics.get(name) is not None]
        if (left := self._seconds_left(steps)) is not None:
            parts.append(f"ETA {duration(left)}")
        self._draw("  ".join(parts))
        if step >= steps:
            self._end_live()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int | None], None]]:
        """Announces a slow part of the work and, at its end, how long it took.

        Yields a function `(done, total)` that shows the part's own progress; the total is None where it is not known.
        """
        started = self._clock()
        self.line(f"{name} ...")
        try:
            yield lambda done, total: self._progress(name, done, total)
        except BaseException:
            self.line(f"{name}: stopped after {duration(self._clock() - started)}")
            raise
        self.line(f"{name}: done in {duration(self._clock() - started)}")

    def table(self, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
        """Writes a table between two empty lines."""
        self.line("\n" + format_table(rows, columns) + "\n")

    def close(self) -> None:
        """Leaves the cursor at the start of a line."""
        self._end_live()

    def _seconds_left(self, steps: int) -> float | None:
        """From the time of the last steps alone: the first step compiles, and speed changes when data is slow."""
        (then, first), (now, last) = self._history[0], self._history[-1]
        return None if last == first else (steps - last) * (now - then) / (last - first)

    def _progress(self, name: str, done: int, total: int | None) -> None:
        now = self._clock()
        if self._enabled and (total is None or done < total) and now - self._shown_at >= self._every_s:
            self._shown_at = now
            self._draw(f"{name}: {done}" if total is None else f"{name}: {done}/{total}")

    def _draw(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a full last column would wrap
            self._stream.write("\r" + text[:width] + "\x1b[K")
            self._drawn = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _end_live(self) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False


def format_table(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """A table in plain text: the first column to the left, the others to the right.

    Raises:
      ValueError: a row has not as many cells as there are columns.
    """
    if wrong := [row for row in rows if len(row) != len(columns)]:
        raise ValueError(f"row {wrong[0]} does not have the {len(columns)} cells of {list(columns)}")
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    pad = lambda row: "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()  # noqa: E731
    return "\n".join([pad(columns), "  ".join("-" * width for width in widths), *map(pad, rows)])


def duration(seconds: float) -> str:
    """Seconds in words that fit a status line: 3.2 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
