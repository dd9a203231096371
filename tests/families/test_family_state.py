"""What a training state must keep of every family: parts of a batch add up to the whole, and a saved run goes on as if it had not stopped."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from helpers.families import KINDS, all_cases, one_a_kind
from helpers.steps import SIGNS_OF_ROUNDING, Steps, copies, whole

from mmalign_jax.config import CheckpointConfig
from mmalign_jax.mesh import make_mesh
from mmalign_jax.training.checkpoint import Checkpoints
from mmalign_jax.types import TrainState

CASES = all_cases()
ROWS, BATCH, HALF = 8, 4, 4


# of the two kinds the one whose rows hold more
@pytest.fixture(scope="module", params=one_a_kind(KINDS[:1]))
def steps(request, tmp_path_factory):
    case = CASES[request.param]
    directory = case.write(tmp_path_factory.mktemp("tiny"), 1)
    return Steps(directory, copies(case.records, ROWS), make_mesh(1, 1, 1, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def batches(steps):
    """What the loader gives for two halves of a run."""
    loader = steps.loader(BATCH, 2)
    return [next(loader) for _ in range(2 * HALF)]


@pytest.mark.nightly
def test_accumulated_equals_whole(steps, batches):
    (after, got), (expected, metrics) = (steps(steps.start(), batch) for batch in (batches[0], whole(batches[0])))
    assert abs(metrics["rewards/margins"]) > 1e-4  # above what is allowed below
    assert got.keys() == metrics.keys()
    for name in metrics.keys() - SIGNS_OF_ROUNDING:
        np.testing.assert_allclose(got[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)

    def same(gradient, gradient_of_whole, new, new_of_whole):
        # a family's gradients may be a hundred times those of another one; key biases have none beside rounding
        most = 2e-5 + 1e-4 * np.abs(gradient_of_whole).max()
        np.testing.assert_allclose(gradient, gradient_of_whole, rtol=0, atol=most)
        np.testing.assert_allclose(new, new_of_whole, rtol=1e-6, atol=steps.rate * most)

    # momentum behind one step is that step's gradient
    trees = [tree for state in (after, expected) for tree in (optax.tree.get(state.opt_state, "trace"), state.params)]
    jax.tree.map(same, *jax.device_get((trees[0], trees[2], trees[1], trees[3])))


def values(state: TrainState) -> dict:
    """Everything that a step changes or depends on, on the host."""
    return jax.device_get(dataclasses.asdict(dataclasses.replace(state, key=jax.random.key_data(state.key))))


@pytest.mark.nightly
def test_saved_and_restored_equals_uninterrupted(steps, batches, tmp_path):
    shapes = [{tuple(leaf.shape for leaf in jax.tree.leaves(batch)) for batch in half} for half in (batches[:HALF], batches[HALF:])]
    # rows of both shapes on both sides, so that the position among the shapes matters, too
    assert shapes[0] == shapes[1] and len(shapes[0]) == len(steps.plan.buckets) == steps.buckets

    loader, state, expected = steps.loader(BATCH, 2), steps.start(), []
    for _ in range(2 * HALF):
        state, metrics = steps(state, next(loader))
        expected.append(metrics)
    uninterrupted = values(state)

    loader, state = steps.loader(BATCH, 2), steps.start()
    for number in range(HALF):
        state, metrics = steps(state, next(loader))
        assert metrics == expected[number]
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(state, loader.get_state())
    checkpoints.close()
    del loader, state

    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with jax.set_mesh(steps.mesh):
        position = checkpoints.position(steps.abstract())
        state = checkpoints.restore(steps.abstract(), steps.frozen())
    checkpoints.close()
    loader = steps.loader(BATCH, 2)
    loader.set_state(position)
    for number in range(HALF, 2 * HALF):
        state, metrics = steps(state, next(loader))
        assert metrics == expected[number]
    jax.tree.map(np.testing.assert_array_equal, values(state), uninterrupted)
    assert len({metrics["loss"] for metrics in expected}) == 2 * HALF, "steps that do not differ would not show a lost position"
