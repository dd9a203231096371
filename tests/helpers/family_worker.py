"""Steps of tiny models on a mesh over all devices, in one process or, as a script, in each of two.

    python tests/helpers/family_worker.py FOLDER OBJECTIVE BUCKETS

FOLDER has a directory a case, with a checkpoint and `records.pickle`; the first process writes what it finds to FOLDER/found.json.
"""

import json
import os
import pathlib
import pickle
import sys

import jax
import numpy as np
import optax

STEPS = 2


def numbers(directory: pathlib.Path, objective: str, buckets: int) -> dict[str, float]:
    """Loss and metrics of every step, and the norm of the sum of every tensor's gradients, for the case of a directory."""
    from helpers.steps import SIGNS_OF_ROUNDING, Steps, copies

    from mmalign_jax.mesh import make_mesh

    mesh = make_mesh(2, 4, 1)
    records = copies(pickle.loads((directory / "records.pickle").read_bytes()), STEPS * mesh.size)
    steps = Steps(directory, records, mesh, objective=objective, buckets=buckets)
    loader, state, out = steps.loader(mesh.size, 1), steps.start(), {}
    for number in range(STEPS):
        state, metrics = steps(state, next(loader))
        out |= {f"{number}/{name}": value for name, value in metrics.items() if name not in SIGNS_OF_ROUNDING}
    with jax.set_mesh(mesh):
        norms = jax.jit(lambda tree: jax.tree.map(lambda x: jax.numpy.sqrt(jax.numpy.sum(jax.numpy.square(x))), tree))
        found = jax.device_get(norms(optax.tree.get(state.opt_state, "trace")))
    named = jax.tree_util.tree_leaves_with_path(found)
    return out | {jax.tree_util.keystr(path, simple=True, separator="/"): float(np.asarray(value)) for path, value in named}


def main(folder: pathlib.Path, objective: str, buckets: int) -> None:
    where = {name: os.environ[f"JAX_{name.upper()}"] for name in ("coordinator_address", "num_processes", "process_id")}
    jax.distributed.initialize(where["coordinator_address"], int(where["num_processes"]), int(where["process_id"]))
    assert jax.process_count() == 2 and jax.local_device_count() == 4
    found = {path.name: numbers(path, objective, buckets) for path in sorted(folder.iterdir()) if path.is_dir()}
    if jax.process_index() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
