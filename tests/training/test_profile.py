"""A trace of a few steps: when it begins, what it holds, and that it ends with the run."""

import jax
import jax.numpy as jnp

from mmalign_jax.training.profile import Profile


def trained(directory, steps, asked):
    profile, told, row = Profile(directory, asked), [], jnp.ones(8)

    @jax.jit
    def traced_step(x):
        return x * 2

    try:
        for _ in range(steps):
            profile.before_step()
            told.append(profile.after_step(traced_step(row)))
    finally:
        profile.close()
    return told


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
