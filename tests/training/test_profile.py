"""A trace of a few steps: when it begins, what it holds, and that it ends with the run."""

import jax
import jax.numpy as jnp

from mmalign_jax.training.profile import Profile


def trained(directory, steps, asked):
    profile, double, told = Profile(directory, asked), jax.jit(lambda x: x * 2), []
    try:
        for _ in range(steps):
            profile.before_step()
            told.append(profile.after_step(double(jnp.ones(8))))
    finally:
        profile.close()
    return told


def test_it_begins_behind_compilation_and_is_told_once(tmp_path):
    assert trained(tmp_path / "a", 7, asked=2) == [False, False, False, True, False, False, False]
    (trace,) = (tmp_path / "a").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    assert sum("PjitFunction" in event.name for plane in planes for line in plane.lines for event in line.events) == 2


def test_a_run_that_ends_in_it_still_writes_it(tmp_path):
    assert trained(tmp_path, 3, asked=5) == [False] * 3
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_nothing_is_written_unasked(tmp_path):
    assert not any(trained(tmp_path, 5, asked=0)) and not list(tmp_path.iterdir())
