"""One process of several, or the only one: steps of models of every family on a mesh over all devices. Run as a script it takes a folder.

    python tests/helpers/family_worker.py FOLDER

FOLDER has a directory a case, with a checkpoint and `records.pickle`; the first process writes what it finds to FOLDER/found.json.
"""

import json
import pathlib
import pickle
import sys

import jax
import numpy as np
import optax

ROWS = STEPS = 2


def numbers(directory: pathlib.Path, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Loss and metrics of every step, and the norm of every tensor's gradients, summed over the steps, for the case of a directory."""
    from helpers.steps import Steps, copies

    records = copies(pickle.loads((directory / "records.pickle").read_bytes()), ROWS * mesh.size)
    steps = Steps(directory, records, mesh)
    loader, state, out = steps.loader(mesh.size, 1), steps.start(), {}
    for number in range(STEPS):
        state, metrics = steps(state, next(loader))
        out |= {f"{number}/{name}": value for name, value in metrics.items()}
    with jax.set_mesh(mesh):
        norms = jax.jit(lambda tree: jax.tree.map(lambda x: jax.numpy.sqrt(jax.numpy.sum(jax.numpy.square(x))), tree))
        found = jax.device_get(norms(optax.tree.get(state.opt_state, "trace")))
    named = jax.tree_util.tree_leaves_with_path(found)
    return out | {jax.tree_util.keystr(path, simple=True, separator="/"): float(np.asarray(value)) for path, value in named}


def main(folder: pathlib.Path) -> None:
    from mmalign_jax.mesh import make_mesh

    jax.distributed.initialize()
    assert jax.process_count() == 2 and jax.local_device_count() == 4
    mesh = make_mesh(2, 4, 1)
    found = {directory.name: numbers(directory, mesh) for directory in sorted(path for path in folder.iterdir() if path.is_dir())}
    if jax.process_index() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    main(pathlib.Path(sys.argv[1]))
