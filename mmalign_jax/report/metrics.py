"""One JSON object per logged step in `metrics.jsonl`; TensorBoard and W&B beside it."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.files import replace_text

FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes the metrics of a run, every step once and in order, also over crashes and resumes.

    Only one process of a job may write; the others pass `enabled=False`, which turns every method into nothing.

    Args:
      workdir: receives `metrics.jsonl`, `tensorboard/` and, with W&B, `wandb/` and `wandb_run`.
      tensorboard: whether to write event files.
      wandb_project: the W&B project, or "" for none.
      config: the resolved config, shown by W&B.
      enabled: False on all processes but the first.

    Raises:
      UserError: W&B is asked for and not installed.
      DataError: the file that is there holds a line that is no JSON object with a step.
    """

    def __init__(self, workdir: str | Path, tensorboard: bool, wandb_project: str, config: Mapping[str, Any], *, enabled: bool = True):
        self._enabled = enabled
        self._workdir = Path(workdir)
        self._path = self._workdir / FILE
        self._file = None
        self._want_tensorboard = tensorboard
        self._tensorboard = None
        self._wandb = None
        self._last_step = -1
        if not enabled:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        if wandb_project:
            self._wandb = _start_wandb(wandb_project, self._workdir, config)
        self._rewrite(_lines(self._path))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line and flushes it.

        Args:
          step: optimizer steps that are done; larger than that of the line before.
          values: scalars by name (numbers, or arrays of one element). One that is not finite becomes null, and "nonfinite" names
            it with what it was.

        Raises:
          ValueError: the step is not larger than the last one written.
        """
        if not self._enabled:
            return
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}; call truncate_after on resume")
        scalars = {name: _scalar(value) for name, value in values.items()}
        nonfinite = {name: str(value) for name, value in scalars.items() if not math.isfinite(value)}
        line: dict[str, Any] = {"step": step} | {name: None if name in nonfinite else value for name, value in scalars.items()}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step
        if self._want_tensorboard:
            self._tensorboard = self._tensorboard or _event_writer(self._workdir, step)
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def truncate_after(self, step: int) -> None:
        """Drops the lines beyond a restored step, in one atomic replacement. Those steps are then computed and written again.

        W&B cannot take lines back: it keeps the first copy of a step, which is the same one when the run resumes bit for bit.
        """
        if self._enabled:
            self._rewrite([line for line in _lines(self._path) if line["step"] <= step])
            self._close_tensorboard()  # the next event file begins by hiding what older ones hold beyond its first step

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._close_tensorboard()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        if self._file is not None:
            self._file.close()
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        if not self._path.exists() or self._path.read_text(encoding="utf-8") != text:
            replace_text(self._path, text)
        self._last_step = lines[-1]["step"] if lines else -1
        self._file = self._path.open("a", encoding="utf-8")

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def read_metrics(workdir: str | Path) -> tuple[dict[str, Any], ...]:
    """The lines of a run's `metrics.jsonl`, none when there is no file; a last line that a crash cut short is left out."""
    return tuple(_lines(Path(workdir) / FILE))


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *whole, _cut = path.read_text(encoding="utf-8").split("\n")  # a line without its newline was cut short by a crash
    out = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            line["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            mend = "Mend the line or move the file away."
            raise DataError("not a JSON object with a step", file=str(path), row=str(number), mend=mend) from error
        out.append(line)
    return out


def _scalar(value: Any) -> int | float:
    """A Python number from a number or an array of one element."""
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)


def _event_writer(workdir: Path, first_step: int) -> Any:
    from tensorboardX import SummaryWriter  # late: it imports torch where torch is installed, which takes seconds

    # its file names change once a second: without a suffix, a run that resumes at once would overwrite the file before
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step, filename_suffix=f".{time.time_ns()}")


def _start_wandb(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError('config.report.wandb: W&B is not installed: pip install "mmalign_jax[wandb]"') from error
    marker = workdir / "wandb_run"
    identity = marker.read_text().strip() if marker.exists() else None
    run = wandb.init(project=project, dir=str(workdir), config=dict(config), id=identity, resume="allow")
    if identity is None:
        replace_text(marker, run.id)
    return run
