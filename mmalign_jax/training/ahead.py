"""Programs that are compiled ahead of their first call, on a thread beside the reading of weights and the making of rows.

What is compiled is what `jax.jit` would compile at that call, so the numbers and the persistent compilation cache are the same.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh


class Compiler:
    """One thread that compiles in the order in which it is asked: all processes of a run must compile alike.

    Leaving the context drops what has not begun and does not wait for what has, since XLA cannot be interrupted: an error of the work
    beside it is told at once. The thread ends with the program that it is at.
    """

    def __init__(self, mesh: Mesh):
        self._mesh, self._left = mesh, threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mmalign-compile")

    @property
    def left(self) -> bool:
        """Whether nobody waits for programs any more. What compiles several asks between them."""
        return self._left.is_set()

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def begin(self, jitted: Callable, *shapes: Any) -> "Future[tuple[jax.stages.Compiled, float]]":
        """Compiles a jitted function for arguments given as shapes with shardings; the result is the program, and the seconds it took."""
        return self._thread.submit(self._compile, jitted, shapes)

    def _compile(self, jitted: Callable, shapes: tuple[Any, ...]) -> tuple[jax.stages.Compiled, float]:
        started = time.monotonic()
        with jax.set_mesh(self._mesh):  # it holds for one thread only
            lowered = jitted.lower(*shapes)
            if self.left:
                raise CancelledError
            return lowered.compile(), time.monotonic() - started


class Program:
    """A jitted function; for the shapes that `begin` was given it is the program that was compiled ahead, for others `jax.jit`'s own."""

    def __init__(self, jitted: Callable):
        self._jitted = jitted
        self._begun: dict[Any, Future[tuple[jax.stages.Compiled, float]]] = {}

    def begin(self, compiler: Compiler, *shapes: Any) -> None:
        self._begun[_form(shapes)] = compiler.begin(self._jitted, *shapes)

    def wait(self, *arguments: Any) -> tuple[float, float] | None:
        """Until the program for the first arguments is there: seconds that it took, and that were waited for it here. None: none was begun.

        Raises:
          ValueError: a program was begun, and it is not for these arguments.
          Exception: whatever compiling raised.
        """
        if not self._begun:
            return None
        if _form(arguments) not in self._begun:
            raise ValueError(f"a program was compiled ahead for other arguments than the first: {_differing(_form(arguments), *self._begun)}")
        started = time.monotonic()
        _, seconds = self._begun[_form(arguments)].result()
        return seconds, time.monotonic() - started

    def __call__(self, *arguments: Any) -> Any:
        begun = self._begun.get(_form(arguments))
        return self._jitted(*arguments) if begun is None else begun.result()[0](*arguments)


def _form(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What tells one program of a function from another: structure, shapes and types. Where arrays lie is the same throughout a run."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def _differing(given: tuple[Any, ...], begun: tuple[Any, ...], *_: Any) -> str:
    return next((f"{b}, not {a}" for a, b in zip(given, begun, strict=False) if a != b), "more of them")
