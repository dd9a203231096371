"""The same result by two ways of computing it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import MIXED, Tiny, answer_sums, batch_of, prefill, quick_jit, sample

from mmalign_jax import losses
from mmalign_jax.mesh import make_mesh, sharding
from mmalign_jax.sampling import DecodeOptions
from mmalign_jax.training.step import LossFunction, split_params
from mmalign_jax.types import FIRST_ANSWER, PREFIX

EIGHT = [dataclasses.replace(r, id=f"{r.id} {half}") for half in range(2) for r in MIXED]
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


def test_chunked_equals_dense_with_its_gradient(tiny):
    batch = batch_of(MIXED, tiny.processor)
    slots = {"prefix_slots": batch.prefix_slots, "answer_slots": batch.answer_slots}
    hidden = quick_jit(lambda: prefill(tiny.model, tiny.params, batch).hidden)()
    role, tokens = np.asarray(batch.role), np.asarray(batch.tokens)
    places = []  # row, predicting slot, predicted token
    for row, answer in np.ndindex(len(MIXED), 2):
        slot = [int(np.sum(role[row] == PREFIX)) - 1, *np.flatnonzero(role[row] == FIRST_ANSWER + answer)]
        places += [(row, before, tokens[row, at]) for before, at in itertools.pairwise(slot)]
    row, before, predicted = np.array(places).T

    def chunked(hidden, head):
        return jnp.sum(losses.answer_logps(hidden, head, batch.tokens, batch.role, **slots, chunk=5)[0])

    def dense(hidden, head):
        return jnp.sum(jax.nn.log_softmax(hidden @ head)[row, before, predicted])

    head = tiny.model.head(tiny.params)
    got, expected = (quick_jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head) for f in (chunked, dense))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], expected[1])


def test_a_shared_frozen_tower_equals_one_that_is_computed_for_each(tiny, reference):
    batch = batch_of(MIXED, tiny.processor)
    # the tower is the same in both trees, and frozen in one of two ways
    theirs = {**reference.params, "vision_tower": tiny.params["vision_tower"]}
    for name in ("dpo", "mdpo"):
        loss = LossFunction(tiny.model, losses.build(name, beta=BETA))
        values = []
        for freeze in ((), ("vision_tower",)):
            params, frozen = split_params(tiny.params, freeze)
            value, metrics = quick_jit(loss)(params, frozen, split_params(theirs, freeze)[0], batch, jax.random.key(0))
            values.append({"value": value, **metrics})
        assert abs(values[0]["value"] - np.log(2)) > 0.05
        assert values[0].keys() == values[1].keys()
        for key in values[0]:
            np.testing.assert_allclose(values[0][key], values[1][key], rtol=1e-6, err_msg=key)


@pytest.fixture(scope="module")
def loss_and_sample(tiny):
    """DPO loss, its gradient, and tokens drawn at temperature 1."""
    loss = LossFunction(tiny.model, losses.build("dpo", beta=BETA))

    def run(params, reference, batch):
        params, frozen = split_params(params, ("vision_tower",))
        reference, _ = split_params(reference, ("vision_tower",))
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, reference, batch, jax.random.key(0))
        samples = sample(tiny.model, {**params, **frozen}, batch, DecodeOptions(8, temperature=1.0), lanes=2)
        return value, jax.tree.map(lambda g: jnp.sqrt(jnp.mean(jnp.square(g))), grads), samples.tokens

    return run


@pytest.fixture(scope="module")
def on_one_device(tiny, reference, loss_and_sample):
    return jax.device_get(quick_jit(loss_and_sample)(tiny.params, reference.params, batch_of(EIGHT, tiny.processor)))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (8, 1, 1)], ids=str)
def test_eight_devices_equal_one(tiny, reference, loss_and_sample, on_one_device, shape):
    mesh = make_mesh(*shape)
    place = lambda x: jax.device_put(x, sharding(mesh, "batch", *(None,) * (x.ndim - 1)))  # noqa: E731
    batch = jax.tree.map(place, batch_of(EIGHT, tiny.processor))
    with jax.set_mesh(mesh):
        value, grads, tokens = jax.device_get(quick_jit(loss_and_sample)(tiny.sharded(mesh), reference.sharded(mesh), batch))
    expected_value, expected_grads, expected_tokens = on_one_device
    assert abs(expected_value - np.log(2)) > 0.05
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), grads, expected_grads)
    np.testing.assert_array_equal(tokens, expected_tokens)
