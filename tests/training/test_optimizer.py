"""Schedules, clipping and which parameters decay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax.config import OptimizerConfig
from mmalign_jax.training.optimizer import make_optimizer, make_schedule

LAYERS = {"norm": {"scale": jnp.ones(2)}, "query": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
PARAMS = {
    "decoder": {"embed": {"embedding": jnp.ones((3, 2))}, "layers": LAYERS},
    "vision_tower": {"class_embedding": jnp.ones(2)},
}


def values(steps, **settings):
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, **settings), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_then_peak_then_end(schedule):
    got = values(20, schedule=schedule, warmup_fraction=0.2, final_fraction=0.1)
    np.testing.assert_allclose(got[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    progress = np.arange(17) / 16
    after = {
        "cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2,
        "linear": 1 - 0.9 * progress,
        "constant": np.ones(17),
    }
    np.testing.assert_allclose(got[4:], after[schedule], rtol=1e-5)


def test_without_warm_up_the_first_step_has_the_peak():
    assert values(10, schedule="cosine")[0] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_warm_up_leaves_a_step_of_even_the_shortest_run(schedule, steps):
    got = values(steps, schedule=schedule, warmup_fraction=0.9)
    assert got[steps - 1] == 1.0 and np.all(got > -1e-9) and np.all(got[:-1] > 0)


def updates(config, grads):
    optimizer = make_optimizer(config, 10)
    return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]


def test_only_kernels_and_embeddings_decay():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    got = updates(OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5), zero)
    leaves = jax.tree_util.tree_leaves_with_path(got)
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if np.any(leaf)}
    assert decayed == {"decoder/embed/embedding", "decoder/layers/query/kernel"}
    np.testing.assert_allclose(got["decoder"]["layers"]["query"]["kernel"], -0.05, rtol=1e-6)


def test_the_first_step_of_adam_is_the_sign_of_the_gradient():
    grads = jax.tree.map(lambda x: -3.0 * x, PARAMS)
    got = updates(OptimizerConfig(learning_rate=0.1, schedule="constant"), grads)
    jax.tree.map(lambda x: np.testing.assert_allclose(x, 0.1, rtol=1e-4), got)


def test_clipping_is_by_the_norm_of_all_gradients():
    """Adam forgets a gradient's scale, but not its scale against the next one's."""
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", clip_norm=1.0)
    first, second = (jax.tree.map(lambda x, s=s: s * x, PARAMS) for s in (1.0, 100.0))

    def after_two(config):
        optimizer = make_optimizer(config, 10)
        _, state = optimizer.update(first, optimizer.init(PARAMS), PARAMS)
        return optimizer.update(second, state, PARAMS)[0]["decoder"]["embed"]["embedding"]

    np.testing.assert_allclose(after_two(config), -0.1, rtol=1e-4)  # both are clipped to the same gradient
    assert np.all(np.abs(after_two(dataclasses.replace(config, clip_norm=0.0)) + 0.1) > 0.01)


def test_the_first_moment_may_be_kept_in_bfloat16():
    state = make_optimizer(OptimizerConfig(moment_dtype="bfloat16"), 10).init(PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
