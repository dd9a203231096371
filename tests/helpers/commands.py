"""Commands of launch/ as a user starts them: a process of its own, one CPU device, the repository as the working directory."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def users_environment(*, quick: bool = True, torch: bool = False) -> dict[str, str]:
    """Variables for a command.

    Args:
      quick: leaves most of XLA's optimisations out, which are of no use to models this small.
      torch: lets it find torch, which users need not have.
    """
    settings = os.environ | {"JAX_PLATFORMS": "cpu"}
    if quick:
        settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if not torch:
        paths = [str(ROOT / "tests/helpers/without_torch"), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings["PYTHONPATH"] = os.pathsep.join(paths)
    return settings


def launch(
    *words: object, timeout: float = 280, quick: bool = True, torch: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python WORDS...` and returns its exit code, standard output and standard error.

    Args:
      quick, torch: see `users_environment`.
      environment: variables set on top of those.
    """
    settings = users_environment(quick=quick, torch=torch) | environment
    argv = [sys.executable, *map(str, words)]
    return subprocess.run(argv, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=timeout)
