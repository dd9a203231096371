"""The step's gradient: it is that of the loss, reaches everything that trains, and nothing of the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import MIXED, Tiny, batch_of, parts, quick_jit, rows

from mmalign_jax import losses
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.step import zero_gradients
from mmalign_jax.types import TrainState

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("reference"), layout="memory", seed=1)).params


@pytest.fixture(scope="module")
def batch(tiny):
    return batch_of(MIXED, tiny.processor)


@pytest.fixture(scope="module")
def loss(tiny):
    return LossFunction(tiny.model, losses.build("mdpo", beta=0.02))


@pytest.fixture(scope="module")
def gradients(loss, tiny, reference, batch):
    """Of policy, frozen parts (there are none) and reference."""
    function = quick_jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
    return jax.device_get(function(tiny.params, {}, reference, batch, KEY)[0])


def test_no_gradient_reaches_the_reference(gradients):
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients[1]))


def test_every_tensor_gets_a_gradient(gradients):
    silent = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradients[0]) if not np.any(leaf)]
    # softmax does not see what a key bias adds to all of a query's scores: its gradient is rounding, or 0
    assert all(name.endswith("['key']['bias']") for name in silent)


def test_gradient_equals_finite_differences(loss, tiny, reference, batch, gradients):
    value = quick_jit(lambda params: loss(params, {}, reference, batch, KEY)[0])
    grads = gradients[0]
    directions = {
        "tower": {"vision_tower": grads["vision_tower"]},
        "projector": {"projector": grads["projector"]},
        "layers": {"decoder": {"layers": grads["decoder"]["layers"]}},
        "embedding and head": {"decoder": {name: grads["decoder"][name] for name in ("embed", "head", "final_norm")}},
    }
    for name, direction in directions.items():
        length = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(direction))))
        ends = []
        for sign in (1, -1):
            size = sign * 0.02 / length
            ends.append(float(value(moved(tiny.params, direction, size))))
        # along its own gradient the loss changes by the gradient's length; the step is 0.02 of a parameter's unit
        np.testing.assert_allclose((ends[0] - ends[1]) / 0.04, length, rtol=0.01, err_msg=name)


def moved(params, direction, size):
    """params + size * direction, where the direction has the leaf."""
    if not isinstance(params, dict):
        return params if direction is None else params + np.float32(size) * direction
    return {name: moved(leaf, None if direction is None else direction.get(name), size) for name, leaf in params.items()}


@pytest.mark.nightly
def test_census_of_a_text_batch_names_what_reads_images(tiny, batch):
    """That a normal batch's census is empty is in tests/training/test_step.py."""
    loss = LossFunction(tiny.model, losses.build("sft"))
    state = TrainState(jnp.int32(0), tiny.params, {}, (), KEY)
    silent = zero_gradients(loss, state, None, parts(rows(batch, 2)))
    leaves = jax.tree_util.tree_leaves_with_path({part: tiny.params[part] for part in ("projector", "vision_tower")})
    assert silent == [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert "projector/fc1/kernel" in silent


def test_unscored_tokens_get_no_weight(tiny, batch):
    """The likelihood of a row does not change with tokens of weight 0, its length neither."""
    loss = quick_jit(LossFunction(tiny.model, losses.build("sft")))
    half = batch.token_weight.at[:, batch.prefix_slots : batch.prefix_slots + 3].set(0)
    _, whole = loss(tiny.params, {}, None, batch, KEY)
    _, cut = loss(tiny.params, {}, None, dataclasses.replace(batch, token_weight=half), KEY)
    np.testing.assert_allclose(cut["lengths/chosen"], whole["lengths/chosen"] - 3)
    assert cut["logps/chosen"] > whole["logps/chosen"]
