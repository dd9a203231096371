"""A trace of a few steps: when it begins, what it holds, and that it ends with the run."""

import json
import subprocess
import sys
from pathlib import Path

import jax

SCRIPT = Path(__file__).with_name("profiled_steps.py")


def trained(directory, steps, asked):
    command = [sys.executable, str(SCRIPT), str(directory), str(steps), str(asked)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=SCRIPT.parents[2]).stdout)


def steps_in(directory) -> int:
    """Events of calls of the step; the profiler may have several of each."""
    (trace,) = directory.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    return sum(event.name == "PjitFunction(traced_step)" for plane in planes for line in plane.lines for event in line.events)


def test_it_begins_behind_compilation_and_is_told_once(tmp_path):
    assert trained(tmp_path / "1", 7, asked=1) == [False, False, True, False, False, False, False]
    assert trained(tmp_path / "3", 7, asked=3) == [False, False, False, False, True, False, False]
    one, three = (steps_in(tmp_path / name) for name in ("1", "3"))
    assert three == 3 * one > 0


def test_a_run_that_ends_in_it_still_writes_it(tmp_path):
    assert trained(tmp_path, 3, asked=5) == [False] * 3
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_nothing_is_written_unasked(tmp_path):
    assert not any(trained(tmp_path, 5, asked=0)) and not list(tmp_path.iterdir())
