"""Which arrays are alive."""

import contextlib
import gc
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def none_stay() -> Iterator[None]:
    """Fails where an array that is made inside is alive behind it.

    Arrays of before are held meanwhile: which of them nobody needs any more, and when those are collected, says nothing of what is done inside.
    """
    before = jax.live_arrays()
    yield
    gc.collect()
    known = {id(some) for some in before}
    stayed = [(some.shape, str(some.dtype)) for some in jax.live_arrays() if id(some) not in known]
    assert not stayed, stayed
