"""Expands a sweep into runs: prints one command per run, or runs them.

    python launch/sweep.py --config configs/sweeps/beta.py                # prints
    python launch/sweep.py --config configs/sweeps/beta.py --run          # runs, one after another; --jobs 2: two at a time

A sweep file holds `base`, the path of a config file relative to the sweep file, and `sweep()`, which yields mappings of dotted config
keys to values. A run's directory is named after its overrides alone, so that a sweep can grow and be run again: finished runs stay.
"""

import collections
import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mmalign_jax import cli, config_files
from mmalign_jax import config as settings
from mmalign_jax.errors import UserError

TRAIN = Path(__file__).resolve().with_name("train.py")
_POLL_S = 0.2
_SLUG_LENGTH = 80  # with the hash below the 255 bytes that file systems allow


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    arguments: tuple[str, ...]  # for launch/train.py

    def argv(self, python: str) -> list[str]:
        return [python, _short(TRAIN), *self.arguments]


def expand(path: str | Path, root: str | Path) -> tuple[Run, ...]:
    """The runs of a sweep file, each with its directory under `root`. Every run's whole config is checked first.

    Raises:
      UserError: the file has no `base` or `sweep`, two runs are the same, or a run's config is wrong (the message names run and key).
    """
    module = config_files.load_module(path)
    base, sweep = getattr(module, "base", None), getattr(module, "sweep", None)
    if not isinstance(base, str) or not callable(sweep):
        raise UserError(f"{path}: a sweep file defines base, the path of a config file, and sweep(), which yields overrides")
    base = (Path(path).resolve().parent / base).resolve()
    runs: dict[str, Run] = {}
    for number, overrides in enumerate(sweep()):
        where = f"{path}, run {number}"
        if not isinstance(overrides, Mapping):
            raise UserError(f"{where}: sweep() yields mappings of keys to values, got {overrides!r}")
        try:
            settings.from_mapping(config_files.load(base, overrides))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if none := [key for key, value in overrides.items() if value is None]:
            raise UserError(f"{where}: config.{none[0]}: a command line cannot say None; leave the key out")
        name = run_name(overrides)
        if name in runs:
            raise UserError(f"{where}: {dict(overrides)} repeats run {list(runs).index(name)}")
        chosen = [f"--config.{key}={value}" for key, value in overrides.items()]
        runs[name] = Run(name, ("--config", _short(base), *chosen, "--workdir", _short(Path(root).resolve() / name)))
    if not runs:
        raise UserError(f"{path}: sweep() yields no run")
    return tuple(runs.values())


def run_name(overrides: Mapping[str, Any]) -> str:
    """A directory name that depends on the overrides alone, not on their order: readable, then a hash that keeps names apart."""
    canonical = json.dumps(dict(overrides), sort_keys=True)
    readable = "-".join(f"{key.split('.')[-1]}_{overrides[key]}" for key in sorted(overrides))
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", readable)[:_SLUG_LENGTH].strip("._-") or "base"
    return f"{slug}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"


def execute(runs: Sequence[tuple[str, Sequence[str]]], root: Path, keep_going: bool, jobs: int = 1) -> int:
    """Runs (name, command), at most `jobs` at a time, and prints a summary. Returns 0 when all ended with 0, else 1.

    One at a time they write to this terminal; several would write over each other, so each writes to `output.txt` in its own directory.
    After Ctrl-C, and without `keep_going` after a failure, nothing new starts; what runs is waited for: it gets the signal too, and saves.
    """
    waiting, running = collections.deque(runs), {}
    outcome, interrupted, stopping = {name: "not run" for name, _ in runs}, set(), False
    while running or (waiting and not stopping):
        try:
            while waiting and len(running) < jobs and not stopping:
                name, command = waiting.popleft()
                running[name] = _start(command, root / name / "output.txt" if jobs > 1 else None)
                print(f"[{len(runs) - len(waiting)}/{len(runs)}] {shlex.join(command)}", flush=True)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                stopped = code == cli.INTERRUPTED or name in interrupted
                failed = f"failed with exit code {code}" + (f"; see {root / name / 'output.txt'}" if jobs > 1 else "")
                outcome[name] = "interrupted" if stopped else "ok" if code == 0 else failed
                stopping |= stopped or (code != 0 and not keep_going)
            time.sleep(_POLL_S)
        except KeyboardInterrupt:
            stopping = True
            interrupted |= running.keys()
            print("waiting for what runs to save", file=sys.stderr, flush=True)
    print("\nSweep:")
    for name, state in outcome.items():
        print(f"  {name}: {state}")
    return int(any(state != "ok" for state in outcome.values()))


def _start(command: Sequence[str], log: Path | None) -> subprocess.Popen:
    if log is None:
        return subprocess.Popen(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:  # a run that goes on adds to what it said before
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def _short(path: Path) -> str:
    """Relative to the working directory for what lies in it, absolute otherwise: right to paste, and short to read."""
    here = Path.cwd().resolve()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)


def main() -> int:
    options = flags.FLAGS
    if not options.config:
        raise UserError("--config: give a sweep file, such as --config configs/sweeps/beta.py")
    root = options.workdir or Path("runs") / "sweeps" / Path(options.config).stem
    runs = expand(options.config, root)
    if options.run:
        return execute([(run.name, run.argv(sys.executable)) for run in runs], Path(root), options.keep_going, options.jobs)
    for run in runs:
        print(shlex.join(run.argv("python")))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "sweep file")
    flags.DEFINE_string("workdir", None, "directory that receives one directory a run; runs/sweeps/NAME when not given")
    flags.DEFINE_bool("run", False, "run the commands; stop at the first that fails")
    flags.DEFINE_bool("keep_going", False, "with --run: go on after a run that fails")
    flags.DEFINE_integer("jobs", 1, "with --run: so many at a time, where a machine holds several", lower_bound=1)
    cli.run_plain(main)
