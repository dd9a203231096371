"""Two processes with four devices each compute what one with eight does, for every family. One pair of processes goes through them all."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT
from helpers.families import all_cases, one_a_family
from helpers.family_worker import STEPS, numbers

CASES = all_cases()
ONE_A_FAMILY = [param.values[0] for param in one_a_family() if not param.marks]
# mDPO and two shapes of rows take four times as long to compile
SHARES = [
    pytest.param(ONE_A_FAMILY, "dpo", 1, id="one a family"),
    pytest.param(list(CASES), "mdpo", 2, id="all"),
]


def two_processes(folder: Path, objective: str, buckets: int) -> dict[str, dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    settings = os.environ | {"XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    argv = [sys.executable, str(ROOT / "tests/helpers/family_worker.py"), str(folder), objective, str(buckets)]
    pair = [
        subprocess.Popen(argv, cwd=ROOT, env=settings | {"JAX_PROCESS_ID": str(index)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=3000)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert not any(process.returncode for process in pair), "\n".join(outputs)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.nightly
@pytest.mark.parametrize(("names", "objective", "buckets"), SHARES)
def test_two_processes_equal_one(tmp_path, names, objective, buckets):
    places = {}
    for number, name in enumerate(names):
        places[name] = CASES[name].write(tmp_path / str(number), 1)
        (places[name] / "records.pickle").write_bytes(pickle.dumps(CASES[name].records))
    found = two_processes(tmp_path, objective, buckets)
    for name, directory in places.items():
        expected = numbers(directory, objective, buckets)
        # the rows of a step are the same; their order in the batch, and so the order of sums, is not
        assert found[directory.name] == pytest.approx(expected, rel=1e-3, abs=2e-5), name
        assert max(abs(expected[f"{step}/rewards/margins"]) for step in range(STEPS)) > 1e-3 and expected["0/loss"] != expected["1/loss"], name
