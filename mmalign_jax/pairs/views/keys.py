"""Random draws of views: from the seed, the record, the draw's number and the view's name alone, not from the batch, its order or the mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Key, UInt

from mmalign_jax import types


def row_keys(seed_key: Key[Array, ""], record_key: UInt[Array, " B"], epoch: int | Int[Array, ""]) -> Key[Array, " B"]:
    """A key for each row that depends on the seed, the row's record and the epoch (or step) alone, not on the batch or the mesh."""
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(seed_key, key), epoch))(record_key)


def view_keys(keys: Key[Array, " B"], name: str) -> Key[Array, " B"]:
    """Keys of the view `name` from the rows' keys, so that two views of a record share no draws.

    Two strengths of one view do share them: their results differ by the strength alone.
    """
    number = types.record_key(name)  # a hash; Python's own differs between processes
    return jax.vmap(lambda key: jax.random.fold_in(key, jnp.uint32(number)))(keys)


def image_keys(keys: Key[Array, " B"], count: int) -> Key[Array, "B {count}"]:
    """A key for each of the `count` images of every row."""
    return _fold_numbers(keys, count)


def _fold_numbers(keys: Key[Array, "*b"], count: int) -> Key[Array, "*b {count}"]:
    """Keys folded with 0, 1, ... Broadcast by hand: a vmap over numbers alone mixes shardings when there is one row."""
    zeros = jax.random.key_data(keys)[..., :1] * 0
    numbers = zeros + jnp.arange(count, dtype=zeros.dtype)
    fold = jax.random.fold_in
    for _ in numbers.shape:
        fold = jax.vmap(fold)
    return fold(jnp.broadcast_to(keys[..., None], numbers.shape), numbers)


def draw_grid(
    draw: Callable[[Key[Array, ""], tuple[int, ...]], Float32[Array, "..."]], keys: Key[Array, "B M"], height: int, *rest: int
) -> Float32[Array, "B M {height} ..."]:
    """Draws `[height, *rest]` numbers for every image, line by line.

    A picture gets the same numbers on canvases of any size: every line has a key of its own, and the first numbers of a line do not depend
    on its length (jax's partitionable threefry, the default, counts along an array).
    """
    return jax.vmap(jax.vmap(jax.vmap(lambda key: draw(key, rest))))(_fold_numbers(keys, height))
