"""A side of the benchmark as a process of its own: what it says about itself, and how it is asked.

One line of JSON each way. The child says first `{"ready": ...}`; a request `{"start": i, "count": n}` is answered with seconds and results.
Attempts are numbered on, so that a record that comes again has draws of its own.
Anything else that the child writes goes to standard error. Nothing here imports jax or torch.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign_jax.benchmark.workload import Numbered, Result, Workload
from mmalign_jax.errors import UserError


def peak_bytes() -> int:
    """The most memory that this process has had so far (resident set).

    On Linux the kernel's high-water mark of the process's own memory: `ru_maxrss` counts what the process had that started it, too.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(workload: Workload, imported_bytes: int, versions: Mapping[str, str], run: Callable[[Sequence[Numbered]], list[Result]]) -> None:
    """Answers requests until standard input ends.

    Args:
      imported_bytes: peak memory behind the imports, before anything was loaded.
      run: makes the results of some items.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    ready = {"imported_bytes": imported_bytes, "versions": dict(versions), "options": dataclasses.asdict(workload.options)}
    print(json.dumps({"ready": ready}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        items = workload.pick(request["start"], request["count"])
        started, cpu = time.perf_counter(), time.process_time()
        results = run(items)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        answer = {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes(), "results": [dataclasses.asdict(one) for one in results]}
        print(json.dumps(answer), file=out, flush=True)


@dataclasses.dataclass(frozen=True)
class Timed:
    """An answer: seconds of work, those of all its threads, peak memory of the child up to then, and the results."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    results: tuple[Result, ...]


class Child:
    """A running side, on the CPU. `close` it when nothing more is asked.

    `ready` holds what it says of itself: `imported_bytes`, `versions` and `options`.

    Args:
      module: started with `python -m`, its one argument the workload's directory.

    Raises:
      UserError: the process ends before it answers; what it wrote stands on standard error.
    """

    def __init__(self, module: str, directory: Path):
        self._module = module
        words = [sys.executable, "-m", module, str(directory)]
        on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}  # as torch is; and what jax loads for other devices weighs on no memory
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=on_cpu)
        self.ready: dict[str, Any] = self._answer()["ready"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(self, start: int, count: int) -> Timed:
        print(json.dumps({"start": start, "count": count}), file=self._process.stdin, flush=True)
        answer = self._answer()
        return Timed(answer["seconds"], answer["cpu_seconds"], answer["peak_bytes"], tuple(Result(**one) for one in answer["results"]))

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self._module}: the process ended with code {self._process.wait()}; see its messages above")
        return json.loads(line)
