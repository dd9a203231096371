"""Two processes with four devices each train as one process with eight."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT, users_environment

SETTINGS = {
    "train.steps": 3, "train.batch_size": 16, "train.accumulate": 2, "train.log_every": 1, "checkpoint.every": 2, "scenes.sft": 16,
    "report.tensorboard": False, "mesh.data": 2, "mesh.fsdp": 4, "eval.benchmarks": "()",
}  # fmt: skip


def start(workdir: Path, devices: int, **settings_and_environment: str) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = users_environment() | {"XLA_FLAGS": flags}
    settings = dict(SETTINGS)
    for key, value in settings_and_environment.items():
        (environment if key.startswith("JAX_") else settings)[key] = value
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "launch/train.py"), "--config", str(ROOT / "configs/scenes_sft.py"), "--workdir", str(workdir), *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> list[str]:
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return outputs


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_of_eight(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "mesh.distributed": "True"}
    two = [start(tmp_path / "two", 4, JAX_PROCESS_ID=str(index), **cluster) for index in range(2)]
    outputs = finish(*two)
    assert "Exported to" in outputs[0] and "step" not in outputs[1], "only the first process speaks"
    finish(start(tmp_path / "one", 8))
    assert len(losses(tmp_path / "two")) == SETTINGS["train.steps"]
    # the rows of a step are the same; their order in the batch, and so the order of sums, is not
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert (tmp_path / "two/export/model.safetensors").stat().st_size == (tmp_path / "one/export/model.safetensors").stat().st_size
