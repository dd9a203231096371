"""Host batches -> global arrays on the mesh."""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from mmalign_jax import mesh as mesh_lib

Batch = TypeVar("Batch")


def to_device(batch: Batch, mesh: Mesh, *, batch_axis: int = 1) -> Batch:
    """Global arrays whose rows are split over the mesh's batch axes, from the rows that this process holds.

    Args:
      batch: a `PairBatch`, or another tree of numpy arrays; rows of this process along `batch_axis`.
      batch_axis: 1 for `[A, b, ...]` (training), 0 for `[b, ...]` (one pass).
    """

    def place(array: np.ndarray) -> jax.Array:
        axes = [None] * array.ndim
        axes[batch_axis] = "batch"
        return jax.make_array_from_process_local_data(mesh_lib.sharding(mesh, *axes), array)

    return jax.tree.map(place, batch)


def on_device(batch: Batch, mesh: Mesh, *, batch_axis: int = 1) -> Batch:
    """What `to_device` gives, as shapes, types and shardings. Arguments as there; only the shapes and types of the arrays are used."""
    _, processes = process_slice(mesh)

    def place(array: np.ndarray | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes, shape = [None] * len(array.shape), list(array.shape)
        axes[batch_axis] = "batch"
        shape[batch_axis] *= processes
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(array.dtype), sharding=mesh_lib.sharding(mesh, *axes))

    return jax.tree.map(place, batch)


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """(index, count) for the loader: which of how many disjoint sets of rows this process feeds.

    Processes that differ only in their place along `tensor` hold the same rows, so they share an index.
    """
    rows: dict[int, set[int]] = {}
    grid = mesh.devices.reshape(mesh_lib.batch_divisor(mesh), -1)  # the batch axes are the mesh's leading ones
    for row, devices in enumerate(grid):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    groups = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, groups)) != len(grid) or len({len(group) for group in groups}) != 1:
        raise ValueError(f"processes hold overlapping or uneven parts of the batch: {groups}")
    return groups.index(tuple(sorted(rows[jax.process_index()]))), len(groups)
