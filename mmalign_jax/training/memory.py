"""The cheapest remat whose training step fits into the devices' memory: compiled one after another, and the one that fits is used."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from mmalign_jax.errors import UserError
from mmalign_jax.models.remat import AUTO
from mmalign_jax.types import PairBatch, TrainState

GIB = 2**30
ROOM = 0.95  # of a device's memory; the rest is for batches that wait, and for what lies scattered
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of one device that a compiled step takes. `aliased` of the outputs take the place of donated arguments."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int

    @classmethod
    def of(cls, compiled: Compiled) -> "Needs":
        memory = compiled.memory_analysis()
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes)
        return cls(*sizes)

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class Fitting:
    """A compiled step, its remat, and what was found on the way.

    Args:
      tried: bytes a device by remat, in the order in which they were compiled; None where the compiler itself gave up for want of memory.
      fits: whether `compiled` needs no more than the limit. Otherwise it is the one that needs least.
    """

    remat: str
    compiled: Compiled
    needs: Needs
    tried: dict[str, int | None]
    limit: int
    fits: bool

    def in_words(self) -> str:
        gib = lambda size: "too much" if size is None else f"{size / GIB:.2f}"  # noqa: E731
        others = ", ".join(f"{name}: {gib(size)}" for name, size in self.tried.items() if name != self.remat)
        verdict = "" if self.fits else "; NONE FITS, this needs least"
        return f"Remat {self.remat}: a step needs {gib(self.needs.total)} of {gib(self.limit)} GiB" + (f" ({others})" if others else "") + verdict


def candidates(remat: str) -> tuple[str, ...]:
    """What `config.model.remat` lets the choice be between, cheapest first.

    Not `none`: on a CPU reading what it keeps takes longer than computing it again, and on accelerators neither was timed. Not `offload`,
    which takes minutes to compile, and was not run yet.
    """
    return ("dots", "block") if remat == AUTO else (remat,)


def fitting(lower: Callable[[str], Lowered], names: Sequence[str], limit: int, stopped: Callable[[], bool] = lambda: False) -> Fitting:
    """Compiles the step with one remat after another until it fits into `limit` bytes.

    Args:
      lower: the step with a remat of this name.
      stopped: whether nobody waits for the result any more.

    Raises:
      UserError: the compiler itself finds no room for any of them.
      CancelledError: `stopped`.
    """
    tried: dict[str, int | None] = {}
    best: tuple[str, Compiled, Needs] | None = None
    for name in names:
        if stopped():
            raise CancelledError
        try:
            compiled = lower(name).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            tried[name], refusal = None, " ".join(str(error).split())[:300]
            continue
        needs = Needs.of(compiled)
        tried[name] = needs.total
        if best is None or needs.total < best[2].total:
            best = (name, compiled, needs)
        if needs.total <= limit:
            break
    if best is None:
        raise UserError(
            f"config.model.remat: the compiler finds no room for a step with {' or '.join(names)}: fewer rows at a time "
            f"(config.train.batch_size, accumulate), more devices or another remat. It says: {refusal}"
        )
    return Fitting(*best, tried, limit, best[2].total <= limit)


def device_limit(mesh: Mesh, setting: float) -> int:
    """Bytes that a step may take of each device: what the setting says in GiB, or where that is 0, most of the least that a device of the
    mesh has.

    A CPU's devices share the machine's memory, or their container's.
    """
    if setting:
        return int(setting * GIB)
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    of_devices = [(device.memory_stats() or {}).get("bytes_limit") for device in local]
    limit = int(ROOM * (min(of_devices) if all(of_devices) else _machine() // len(local)))
    # all processes must choose the same
    return limit if jax.process_count() == 1 else int(np.min(multihost_utils.process_allgather(np.float32(limit / GIB))) * GIB)


def _machine() -> int:
    """Bytes of memory that this process' machine or container has."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    return min(installed, int(allowed)) if allowed.isdigit() else installed


class JittedStep(Protocol):
    def lower(self, state: TrainState, reference: dict | None, batch: PairBatch) -> Lowered: ...


class FittingStep:
    """The training step with the cheapest remat that fits, chosen for each shape of rows when the first of them come.

    The program that was compiled for the choice is the one that runs.

    Args:
      make: the jitted step with a remat of this name.
      say: is told every choice.
      stopped: see `fitting`.
    """

    def __init__(
        self,
        make: Callable[[str], JittedStep],
        names: Sequence[str],
        limit: int,
        say: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ):
        self._make, self._names, self._limit, self._say, self._stopped = make, names, limit, say, stopped
        self._chosen: dict[tuple, Fitting] = {}

    def __call__(self, state: TrainState, reference: dict | None, batch: PairBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        return self.lower(state, reference, batch).compile()(state, reference, batch)

    def lower(self, state: TrainState, reference: dict | None, batch: PairBatch) -> "_Choice":
        """As of a jitted function: compiling what it returns is making the choice."""
        return _Choice(self, (state, reference, batch))

    def _choose(self, state: TrainState, reference: dict | None, batch: PairBatch) -> Compiled:
        leaves, structure = jax.tree.flatten(batch)
        shape = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if shape not in self._chosen:
            found = fitting(lambda name: self._make(name).lower(state, reference, batch), self._names, self._limit, self._stopped)
            self._say(f"{found.in_words()}, for rows of {batch.tokens.shape[-1]} slots")
            self._chosen[shape] = found
        return self._chosen[shape].compiled


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    step: FittingStep
    arguments: tuple[TrainState, dict | None, PairBatch]

    def compile(self) -> Compiled:
        return self.step._choose(*self.arguments)
