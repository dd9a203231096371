"""A run that is killed or stopped and started again ends with the same parameters, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12

# A pair run end to end on a small world: BDHS pairs from a model with random weights, then mDPO, which also draws views
SETTINGS = {
    "train.steps": STEPS, "train.batch_size": 4, "train.accumulate": 2, "train.log_every": 1, "checkpoint.every": 3, "scenes.align": 12,
    "pairs.n_iter": 2, "pairs.batch_size": 8, "pairs.max_sentence_tokens": 8, "objective.name": "mdpo", "report.gallery": 0,
    "report.tensorboard": False, "model.init": "scenes", "model.path": "", "eval.before": False,
}  # fmt: skip


def start(workdir: Path, **settings) -> subprocess.Popen:
    flags = [f"--config.{key}={value}" for key, value in (SETTINGS | settings).items()]
    command = [sys.executable, str(ROOT / "launch/train.py"), "--config", str(ROOT / "configs/quickstart.py"), "--workdir", str(workdir)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command += [*flags, "--config.eval.benchmarks=()"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def steps_done(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return len(lines)


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(workdir))
    return workdir


def same_result(workdir: Path, other: Path) -> None:
    assert (workdir / "export/model.safetensors").read_bytes() == (other / "export/model.safetensors").read_bytes()
    lines = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (workdir, other)]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


@pytest.mark.slow
def test_kill_9_at_a_random_moment(uninterrupted, tmp_path):
    seed = time.time_ns()
    print(f"random moment from seed {seed}")  # shown when the test fails
    process = start(tmp_path)
    at = random.Random(seed).randrange(1, STEPS)
    wait_for(lambda: steps_done(tmp_path) >= at, process)
    time.sleep(random.Random(seed + 1).random() * 0.3)
    process.kill()
    process.communicate()
    finish(start(tmp_path))
    same_result(tmp_path, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_first(uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: steps_done(tmp_path) >= 4, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 128 + signal.SIGTERM)
    saved = steps_done(tmp_path)
    assert f"SIGTERM: saving at step {saved}; the same command goes on from here" in output
    assert f"Going on from the checkpoint of step {saved}" in finish(start(tmp_path))
    same_result(tmp_path, uninterrupted)


@pytest.mark.slow
def test_another_config_is_refused(uninterrupted):
    output = finish(start(uninterrupted, **{"train.seed": 7}), 2)
    assert "config.train.seed: 0 there, 7 now" in output and len(output.strip().splitlines()) == 1
