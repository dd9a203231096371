"""Two processes compute the tower's features together: each its rows, one of them writes, both train on what is there."""

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

from mmalign_jax.data.feature_store import FeatureStore

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ("astronaut", "coffee", "rocket")
SETTINGS = {
    "train.steps": 2, "train.batch_size": 4, "train.log_every": 1, "features.batch_size": 3, "mesh.data": 2, "mesh.fsdp": 2,
    "report.tensorboard": False, "report.gallery": 0, "export.enabled": False,
}  # fmt: skip


def start(workdir, base, rows, devices, *words, **cluster):
    environment = os.environ | cluster | {
        "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
    }  # fmt: skip
    settings = SETTINGS | {"model.path": base, "data.path": rows, "features.cache": workdir.parent / f"{workdir.name} features"}
    command = [sys.executable, "launch/train.py", "--config", "configs/base.py", "--workdir", workdir, *words]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def two(tmp_path, base, rows):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    return [start(tmp_path / "two", base, rows, 2, "--config.mesh.distributed=True", JAX_PROCESS_ID=str(n), **cluster) for n in range(2)]


def outputs_of(runs):
    outputs = [run.communicate(timeout=400)[0] for run in runs]
    assert not any(run.returncode for run in runs), "\n".join(outputs)
    return outputs


@pytest.mark.nightly
def test_two_processes_sweep_as_one_and_find_what_they_have_made(tmp_path):
    base = tiny_llava(tmp_path / "base")
    pictures = ({"bytes": photo_bytes(name, (60, 90)), "path": f"{name}.jpg"} for name in PICTURES)
    answers = {"chosen": "There is a red cat.", "rejected": "A dog and two birds."}
    rows = write_parquet(tmp_path / "rows.parquet", [rlaif_row(number, image=image, **answers) for number, image in enumerate(pictures)])
    outputs = outputs_of([*two(tmp_path, base, rows), start(tmp_path / "one", base, rows, 4)])
    assert "Computing vision features: done" in outputs[0] and "features" not in outputs[1]
    stores = [FeatureStore(tmp_path / f"{run} features") for run in ("one", "two")]
    assert stores[0].key == stores[1].key and len(stores[0]) == len(stores[1]) == 3
    (part,) = (tmp_path / "one features").glob("part-*.json")
    for digest in json.loads(part.read_text())["pictures"]:
        one, other = (store.read(bytes.fromhex(digest)) for store in stores)
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)
    one, other = ([json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("one", "two"))
    assert other == pytest.approx(one, abs=1e-4)
    again = outputs_of(two(tmp_path, base, rows))
    assert "those of 3 pictures in" in again[0] and "Computing" not in again[0]
