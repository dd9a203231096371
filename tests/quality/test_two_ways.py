"""The same result by two ways of computing it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.steps import SIGNS_OF_ROUNDING
from helpers.tiny import FROZEN_TOWER, MIXED, Tiny, answer_sums, batch_of, quick_jit, sample, shared

from mmalign_jax import losses
from mmalign_jax.mesh import make_mesh, sharding
from mmalign_jax.sampling import DecodeOptions
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.trainable import Trainable

EIGHT = [dataclasses.replace(r, id=f"{r.id} {half}") for half in range(2) for r in MIXED]
# two rows of each picture, side by side, so that pairs of rows can share them on each of four devices
TWICE = [dataclasses.replace(r, id=f"{r.id} {half}", responses=r.responses[:: 1 - 2 * half]) for r in MIXED for half in range(2)]
# a policy that is not the reference, so that the loss is not log 2 whatever the numbers are
BETA = 1.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("reference"), layout="memory", seed=1))


def test_packed_row_equals_separate_rows(tiny):
    sums = quick_jit(lambda batch: answer_sums(tiny.model, tiny.params, batch))
    packed = sums(batch_of(MIXED, tiny.processor))
    # the image is encoded once a pair there, and once an answer here
    alone = [dataclasses.replace(r, responses=(response,), prefs=()) for r in MIXED for response in r.responses]
    separate = sums(batch_of(alone, tiny.processor, answers=1))
    np.testing.assert_allclose(packed.reshape(-1), separate[:, 0], rtol=1e-5)


def test_a_shared_frozen_tower_equals_one_that_is_computed_for_each(tiny, reference):
    batch = batch_of(MIXED, tiny.processor)
    # the tower is the same in both trees, and frozen in one of two ways
    theirs = {**reference.params, "vision_tower": tiny.params["vision_tower"]}
    loss = LossFunction(tiny.model, losses.build("mdpo", beta=BETA))
    values = []
    for freeze in ((), ("vision_tower",)):
        params, frozen = Trainable(frozenset(freeze)).split(tiny.params)
        value, metrics = quick_jit(loss)(params, frozen, Trainable(frozenset(freeze)).split(theirs)[0], batch, jax.random.key(0))
        values.append({"value": value, **metrics})
    assert abs(values[0]["value"] - 3 * np.log(2)) > 0.05
    assert values[0].keys() == values[1].keys()
    for key in values[0]:
        # two programs: differences of log-prob sums of about 60 are rounded differently
        atol = 1e-4 if key == "loss/image" else 2e-5
        np.testing.assert_allclose(values[0][key], values[1][key], rtol=1e-4, atol=atol, err_msg=key)


@pytest.fixture(scope="module")
def loss_and_sample(tiny):
    """DPO loss, and tokens drawn at temperature 1."""
    loss = LossFunction(tiny.model, losses.build("dpo", beta=BETA))

    def run(params, reference, batch):
        value, _ = loss(*FROZEN_TOWER.split(params), FROZEN_TOWER.split(reference)[0], batch, jax.random.key(0))
        return value, sample(tiny.model, params, batch, DecodeOptions(8, temperature=1.0), lanes=2).tokens

    return run


@pytest.fixture(scope="module")
def gradient_sizes(tiny):
    """Root mean square of every tensor's gradient; the tower trains, too."""
    loss = LossFunction(tiny.model, losses.build("dpo", beta=BETA))

    def run(params, reference, batch):
        grads = jax.grad(loss, has_aux=True)(params, {}, reference, batch, jax.random.key(0))[0]
        return jax.tree.map(lambda g: jnp.sqrt(jnp.mean(jnp.square(g))), grads)

    return run


@pytest.fixture(scope="module")
def on_one_device(tiny, reference, loss_and_sample):
    return jax.device_get(quick_jit(loss_and_sample)(tiny.params, reference.params, batch_of(EIGHT, tiny.processor)))


def on_mesh(shape, function, tiny, reference, batch):
    mesh = make_mesh(*shape)
    place = lambda x: jax.device_put(x, sharding(mesh, "batch", *(None,) * (x.ndim - 1)))  # noqa: E731
    batch = jax.tree.map(place, batch)
    with jax.set_mesh(mesh):
        return jax.device_get(quick_jit(function)(tiny.sharded(mesh), reference.sharded(mesh), batch))


@pytest.mark.parametrize("shape", [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.nightly) for shape in ((1, 8, 1), (8, 1, 1)))], ids=str)
def test_eight_devices_have_the_loss_and_the_samples_of_one(tiny, reference, loss_and_sample, on_one_device, shape):
    value, tokens = on_mesh(shape, loss_and_sample, tiny, reference, batch_of(EIGHT, tiny.processor))
    expected, expected_tokens = on_one_device
    assert abs(expected - np.log(2)) > 0.05
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(tokens, expected_tokens)


def test_eight_devices_with_shared_pictures_have_the_gradient_of_one_with_separate_ones(tiny, reference, gradient_sizes):
    batch = batch_of(TWICE, tiny.processor)
    expected = jax.device_get(quick_jit(gradient_sizes)(tiny.params, reference.params, batch))
    once = shared(batch, 4)
    assert once.images.shape[0] == 4 and once.picture.shape == (4, 2)
    grads = on_mesh((2, 2, 2), gradient_sizes, tiny, reference, once)
    # a key's bias has no gradient but rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grads, expected)


@pytest.fixture(scope="module")
def gradients_of_everything(tiny):
    """Loss, metrics (among them log-probs) and gradients of mDPO, whose views are drawn for each row; the tower trains, too.

    No view that resamples: where a pixel of it lies between two levels, programs that compile differently round it to either.
    """
    loss = LossFunction(tiny.model, losses.build("mdpo", beta=BETA, view="patch_mask(patch=7)"))

    def run(params, reference, batch):
        return jax.value_and_grad(loss, has_aux=True)(params, {}, reference, batch, jax.random.key(0))

    return run


@pytest.fixture(scope="module")
def with_separate_pictures(tiny, reference, gradients_of_everything):
    return jax.device_get(quick_jit(gradients_of_everything)(tiny.params, reference.params, batch_of(TWICE, tiny.processor)))


@pytest.mark.nightly
@pytest.mark.parametrize("devices", [1, 8])
def test_shared_pictures_give_the_log_probs_and_gradients_of_separate_ones(tiny, reference, gradients_of_everything, with_separate_pictures, devices):
    mesh = make_mesh(2, 2, 2) if devices == 8 else make_mesh(1, 1, 1, jax.devices()[:1])
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = shared(batch_of(TWICE, tiny.processor), groups)
    assert batch.picture.shape == (groups, 8 // groups) and batch.images.shape[0] == 4
    place = lambda x: jax.device_put(x, sharding(mesh, "batch", *(None,) * (x.ndim - 1)))  # noqa: E731
    with jax.set_mesh(mesh):
        found = quick_jit(gradients_of_everything)(tiny.sharded(mesh), reference.sharded(mesh), jax.tree.map(place, batch))
    (value, metrics), grads = jax.device_get(found)
    (expected, expected_metrics), expected_grads = with_separate_pictures
    assert abs(expected - 3 * np.log(2)) > 0.05
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name in expected_metrics.keys() - SIGNS_OF_ROUNDING:
        # differences of log-prob sums of about 60
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * np.abs(b).max() + 1e-7), grads, expected_grads)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["vision_tower"]["layers"]["mlp"]))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["v_dpo", "adpo", "povid"])
def test_objectives_with_other_pictures_read_the_same_of_shared_ones(tiny, reference, name):
    """Black pictures, which rows share; adversarial ones, which start from the row's own features; and what is said under noise."""
    loss = LossFunction(tiny.model, losses.build(name))
    batch = batch_of(TWICE, tiny.processor)
    run = quick_jit(lambda batch: loss.statistics(tiny.params, {}, reference.params, batch, jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *map(run, (shared(batch), batch)))
