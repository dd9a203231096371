"""Programs compiled beside other work are those of `jax.jit`, their errors are the run's, and nothing waits for one that nobody wants."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import launch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmalign_jax.mesh import make_mesh
from mmalign_jax.training.ahead import Compiler, Program


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 2, 1, devices=jax.devices()[:2])


def rows(mesh, length, array=True):
    place = NamedSharding(mesh, P("fsdp"))
    return jax.device_put(jnp.arange(2.0 * length), place) if array else jax.ShapeDtypeStruct((2 * length,), jnp.float32, sharding=place)


def traced(seen):
    """A program that notes the shapes it is traced for."""

    def double(x):
        seen.append((x.shape, threading.current_thread().name))
        return 2 * x

    return jax.jit(double, donate_argnums=0)


def test_what_was_begun_is_used_and_other_shapes_compile_when_they_come(mesh):
    seen = []
    with jax.set_mesh(mesh), Compiler(mesh) as compiler:
        program = Program(traced(seen))
        program.begin(compiler, rows(mesh, 4, array=False))
        took, waited = program.wait(rows(mesh, 4))
        assert took > 0 and waited >= 0 and Program(traced(seen)).wait(rows(mesh, 4)) is None
        with pytest.raises(ValueError, match=r"other arguments than the first: \(\(8,\), .*, not \(\(10,\)"):
            program.wait(rows(mesh, 5))
        for length in (4, 5, 4, 5):
            given = rows(mesh, length)
            np.testing.assert_array_equal(program(given), 2 * np.arange(2.0 * length))
            assert given.is_deleted()
    assert [shape for shape, _ in seen] == [(8,), (10,)]
    assert seen[0][1].startswith("mmalign-compile") and seen[1][1] == threading.current_thread().name


def test_an_error_in_compiling_is_raised_where_the_program_is_wanted(mesh):
    def wrong(x):
        raise ValueError("no such product")

    with jax.set_mesh(mesh), Compiler(mesh) as compiler:
        program = Program(jax.jit(wrong))
        program.begin(compiler, rows(mesh, 4, array=False))
        for ask in (program, program.wait):
            with pytest.raises(ValueError, match="no such product"):
                ask(rows(mesh, 4))


# what jax reads of the cache: once with jit alone, then with a program that is begun ahead
CACHED = """
import sys
import jax
import jax.numpy as jnp
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.training.ahead import Compiler, Program

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
mesh = mesh_lib.make_mesh(1, 1, 1)
place = mesh_lib.sharding(mesh, "batch")
with jax.set_mesh(mesh), Compiler(mesh) as compiler:
    x = jax.device_put(jnp.ones(8), place)
    events.clear()
    step = Program(jax.jit(lambda x: jnp.sin(x) * jnp.cos(x), donate_argnums=0))
    if sys.argv[1] == "ahead":
        step.begin(compiler, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place))
        step.wait(x)
    step(x)
print(events.count("cache_hits"), events.count("cache_misses"))
"""


def test_the_persistent_cache_holds_one_program_for_both_ways(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for way, expected in (("jit", ["0", "1"]), ("ahead", ["1", "0"])):
        done = launch("-c", CACHED, way, **cache)
        assert done.returncode == 0 and done.stdout.split() == expected, done.stdout + done.stderr


class Slow:
    """A jitted function that is lowered when it is told to."""

    def __init__(self):
        self.begun, self.go, self.calls = threading.Event(), threading.Event(), []

    def __call__(self, *arguments):
        raise AssertionError("it is compiled ahead")

    def lower(self, *shapes):
        self.calls.append("lower")
        self.begun.set()
        assert self.go.wait(60)
        return self

    def compile(self):
        self.calls.append("compile")
        return self


def test_an_error_beside_it_does_not_wait_and_the_thread_ends(mesh):
    slow, second = Slow(), Slow()
    with pytest.raises(OSError, match="weights"):
        with Compiler(mesh) as compiler:
            compiler.begin(slow)
            later = compiler.begin(second)
            assert slow.begun.wait(60)
            raise OSError("weights")
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("mmalign-compile")]
    slow.go.set()
    deadline = time.monotonic() + 60
    while any(thread.is_alive() for thread in threads):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert slow.calls == ["lower"] and later.cancelled() and not second.calls
