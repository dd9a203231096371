"""A side of a benchmark as a process of its own: what it says about itself, and how it is asked.

One line of JSON each way. The child says first `{"ready": ...}`; every request is answered. Anything else that the child writes goes to
standard error. Nothing here imports jax or torch.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign_jax.errors import UserError


def peak_bytes() -> int:
    """The most memory that this process has had so far (resident set).

    On Linux the kernel's high-water mark of the process's own memory: `ru_maxrss` counts what the process had that started it, too.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Requests:
    """The child's end. What libraries print is no answer: it goes to standard error from here on.

    Args:
      ready: what the side says of itself.
    """

    def __init__(self, ready: Mapping[str, Any]):
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.answer({"ready": dict(ready)})

    def next(self) -> dict[str, Any] | None:
        """The next request; None when there are no more."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=self._out, flush=True)


def serve(ready: Mapping[str, Any], answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Answers requests until standard input ends."""
    requests = Requests(ready)
    while (request := requests.next()) is not None:
        requests.answer(answer(request))


class Child:
    """A running side. `close` it when nothing more is asked.

    `ready` holds what it says of itself.

    Args:
      words: a module, started with `python -m`, and its arguments.
      platform: of jax, "cpu" or another; "": the best there is.

    Raises:
      UserError: the process ends before it answers; what it wrote stands on standard error.
    """

    def __init__(self, words: Sequence[str], platform: str = "cpu"):
        self._module = words[0]
        # what jax loads for other devices would weigh on the memory of a side on the CPU
        environment = os.environ | ({"JAX_PLATFORMS": platform} if platform else {})
        command = [sys.executable, "-m", *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.ready: dict[str, Any] = self._answer()["ready"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self._module}: the process ended with code {self._process.wait()}; see its messages above")
        return json.loads(line)
