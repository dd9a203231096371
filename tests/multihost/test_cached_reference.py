"""Two processes sweep the reference's log-probs together: each its rows, one of them writes, both train on what is there."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.rows import photo_bytes, rlaif_row, write_parquet

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = (("There is a red cat.", "A dog and two birds."), ("A cup.", "There are three people."), ("Yes.", "No, a chair."))
SETTINGS = {
    "train.steps": 2, "train.batch_size": 4, "train.log_every": 1, "objective.name": "mdpo", "reference.kind": "cached", "mesh.data": 2,
    "mesh.fsdp": 2, "report.tensorboard": False, "report.gallery": 0, "export.enabled": False,
}  # fmt: skip


def start(workdir, base, rows, devices, *words, **cluster):
    environment = os.environ | cluster | {
        "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
    }  # fmt: skip
    settings = SETTINGS | {"model.path": base, "data.path": rows}
    command = [sys.executable, "launch/train.py", "--config", "configs/base.py", "--workdir", workdir, *words]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.nightly
def test_two_processes_sweep_as_one(tmp_path):
    base = tiny_llava(tmp_path / "base")
    pictures = ({"bytes": photo_bytes(name, (60, 90)), "path": f"{name}.jpg"} for name in ("astronaut", "coffee", "rocket"))
    rows = write_parquet(tmp_path / "rows.parquet", [
        rlaif_row(number, image=image, question="What is in the picture?", chosen=chosen, rejected=rejected)
        for number, (image, (chosen, rejected)) in enumerate(zip(pictures, ANSWERS, strict=True))
    ])  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    runs = [start(tmp_path / "two", base, rows, 2, "--config.mesh.distributed=True", JAX_PROCESS_ID=str(n), **cluster) for n in range(2)]
    runs.append(start(tmp_path / "one", base, rows, 4))
    outputs = [run.communicate(timeout=400)[0] for run in runs]
    assert not any(run.returncode for run in runs), "\n".join(outputs)
    assert "Computing the reference's log-probs: done" in outputs[0] and "log-probs" not in outputs[1]
    for name in ("answers", "other_image"):
        one, two = (np.load(tmp_path / run / "reference" / name / "logps.npy", allow_pickle=False) for run in ("one", "two"))
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)
    one, two = ([json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4)
