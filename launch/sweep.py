"""Expands a sweep into runs: prints one command per run, or runs them one after another.

    python launch/sweep.py --config configs/sweeps/beta.py                # prints
    python launch/sweep.py --config configs/sweeps/beta.py --run          # runs

A sweep file holds `base`, the path of a config file relative to the sweep file, and `sweep()`, which yields mappings of dotted config
keys to values. A run's directory is named after its overrides alone, so that a sweep can grow and be run again: finished runs stay.
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mmalign_jax import cli, config_files
from mmalign_jax import config as settings
from mmalign_jax.errors import UserError

TRAIN = Path(__file__).resolve().with_name("train.py")
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


def execute(names: Sequence[str], commands: Sequence[Sequence[str]], keep_going: bool) -> int:
    """Runs the commands one after another and prints a summary. Returns 0 when all ended with 0, else 1."""
    outcome = {name: "not run" for name in names}
    for number, (name, command) in enumerate(zip(names, commands, strict=True), 1):
        print(f"[{number}/{len(names)}] {shlex.join(command)}", flush=True)
        code, interrupted = _run(command)
        outcome[name] = "interrupted" if interrupted else "ok" if code == 0 else f"failed with exit code {code}"
        if interrupted or (code and not keep_going):
            break
    print("\nSweep:")
    for name, state in outcome.items():
        print(f"  {name}: {state}")
    return int(any(state != "ok" for state in outcome.values()))


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """The command's exit code, and whether Ctrl-C was pressed: the command gets the signal too, and is given the time to save."""
    interrupted = False
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait(), interrupted or process.returncode == cli.INTERRUPTED
        except KeyboardInterrupt:
            interrupted = True


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
        return execute([run.name for run in runs], [run.argv(sys.executable) for run in runs], options.keep_going)
    for run in runs:
        print(shlex.join(run.argv("python")))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "sweep file")
    flags.DEFINE_string("workdir", None, "directory that receives one directory a run; runs/sweeps/NAME when not given")
    flags.DEFINE_bool("run", False, "run the commands one after another; stop at the first that fails")
    flags.DEFINE_bool("keep_going", False, "with --run: go on after a run that fails")
    cli.run_plain(main)
