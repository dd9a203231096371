"""Commands of launch/ as a user starts them: a process of its own, one CPU device, the repository as the working directory."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def launch(*words: object, timeout: float = 280, quick: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python WORDS...` and returns its exit code, standard output and standard error.

    Args:
      quick: leaves most of XLA's optimisations out, which are of no use to models this small.
      environment: variables set on top of the caller's.
    """
    settings = os.environ | {"JAX_PLATFORMS": "cpu"} | ({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if quick else {}) | environment
    argv = [sys.executable, *map(str, words)]
    return subprocess.run(argv, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=timeout)
