"""What a run's directory remembers, so that the same command goes on and another one is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmalign_jax.config import Config, to_mapping
from mmalign_jax.errors import UserError
from mmalign_jax.files import read_json, write_json

PAIRS = "pairs"  # prepared pairs of a run that makes its own
PAIR_COUNTS = "pairs.json"  # how they came out, wherever they are kept
REFERENCE = "reference"  # its log-probs, where they are computed once
DATA = "data.json"  # counts of the records that it reads, wherever they are kept

# Settings that may change between a run and its continuation: they do not change what is computed
_MAY_CHANGE = (
    "mesh", "report", "checkpoint", "export", "data.workers", "data.cache", "data.packed", "train.log_every", "eval.batch_size",
    "eval.holdout_every", "pairs.batch_size", "pairs.cache", "samples.batch_size", "reference.cache", "reference.batch_size",
    "features",
)  # fmt: skip
# What a run computes. Prepared data and cached log-probs are not among it: they know by themselves what they were made from
_COMPUTED = ("round_1", "initial_model", PAIRS, PAIR_COUNTS, "eval", "metrics.jsonl", "checkpoints", "export")


def claim(config: Config, workdir: Path) -> bool:
    """Writes `config.json`, or compares it with the one of the run that is there. Returns whether there was one.

    A run that has computed nothing yet, because a mistake in its settings or data stopped it, gives way: the mistake can be mended in
    the same directory.

    Raises:
      UserError: the directory holds a run with other settings; the message names them.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    file, now = workdir / "config.json", json.loads(json.dumps(to_mapping(config)))
    found = file.exists() and any((workdir / name).exists() for name in _COMPUTED)
    if found:
        before = read_json(file)
        differing = [
            f"config.{key}: {_get(before, key)!r} there, {_get(now, key)!r} now"
            for key in sorted(set(_keys(before)) | set(_keys(now)))
            if _get(before, key) != _get(now, key) and not key.startswith(_MAY_CHANGE)
        ]
        if differing:
            raise UserError(f"--workdir: {workdir} holds a run with other settings ({'; '.join(differing[:5])}); use a new directory")
    if not file.exists() or read_json(file) != now:
        write_json(file, now)
    return found


def base_model(config: Config, workdir: Path) -> Path:
    """The model that the run starts from: the one that the config names, or the one that the run itself made."""
    return workdir / "initial_model" if config.model.init else Path(config.model.path)


def held_out(workdir: Path, step: int) -> Path:
    """What the run measured of its held-out pairs after a step."""
    return workdir / "eval" / f"held_out_{step}.json"


def once(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON value in `file`; made and written first when there is none. A part of a run that is done is not done again."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, make())
    return read_json(file)


def _keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    out = []
    for key, value in values.items():
        out += _keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return out


def _get(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
