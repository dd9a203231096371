"""Training runs that tests start, look into, and stop at a moment."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers.commands import ROOT, users_environment


def start(workdir: Path, config: str, settings: dict[str, object]) -> subprocess.Popen:
    """Starts `launch/train.py` with settings by name, "train.steps" for `--config.train.steps`."""
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "launch/train.py"), "--config", str(ROOT / config), "--workdir", str(workdir), *flags]
    return subprocess.Popen(command, env=users_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What the command printed; it must end with this code."""
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def steps_done(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return len(lines)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.02)


def same_result(workdir: Path, other: Path, steps: int) -> None:
    """Both runs logged every step once, with the same loss, and exported the same bytes."""
    assert (workdir / "export/model.safetensors").read_bytes() == (other / "export/model.safetensors").read_bytes()
    lines = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (workdir, other)]
    assert [line["step"] for line in lines[0]] == list(range(1, steps + 1))
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
