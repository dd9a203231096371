"""Low-rank factors beside the linears: what they add, what they begin with, and the model without them."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.lora import adapted, random_factors
from helpers.tiny import MIXED, Tiny, batch_of, parts, quick_jit
from jax.sharding import PartitionSpec as P

from mmalign_jax.data.device import to_device
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.config import LORA_A, LORA_B, Lora
from mmalign_jax.models.lora import initial_factors, is_factor, merge_factors
from mmalign_jax.models.params import param_shardings
from mmalign_jax.models.tree import split, union

EVERYTHING = {
    "decoder": Lora(4, 8.0, ("query", "key", "value", "out", "gate", "up", "down")),
    "vision_tower": Lora(4, 8.0, ("query", "key", "value", "out", "up", "down")),
    "projector": Lora(4, 8.0, ("fc1", "fc2")),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def sizes(tiny):
    return tiny.config.with_lora(EVERYTHING)


@pytest.fixture(scope="module")
def new(sizes):
    return initial_factors(sizes, 5)


@pytest.fixture(scope="module")
def logits(tiny):
    batch = batch_of(MIXED, tiny.processor)

    @quick_jit
    def run(params):
        model = adapted(tiny, EVERYTHING).model
        return model.logits(params, model.hidden(params, model.encode_images(params, batch.images), batch))

    return run


@pytest.fixture(scope="module")
def base_logits(tiny):
    """Of a model without adapter, from a tree that may have factors."""
    batch = batch_of(MIXED, tiny.processor)
    model = adapted(tiny, EVERYTHING).model.without_adapter()
    assert model == tiny.model
    return quick_jit(lambda params: model.logits(params, model.hidden(params, model.encode_images(params, batch.images), batch)))


def test_new_factors_add_nothing_and_the_model_without_adapter_reads_none(tiny, sizes, new, logits, base_logits):
    expected = base_logits(tiny.params)
    np.testing.assert_array_equal(logits(union(tiny.params, new)), expected)
    params = union(tiny.params, random_factors(sizes))
    np.testing.assert_array_equal(base_logits(params), expected)
    assert np.abs(logits(params) - expected).max() > 0.1


def test_merged_equals_unmerged(tiny, sizes, logits, base_logits):
    params = union(tiny.params, random_factors(sizes, size=0.1))
    merged = merge_factors(params, EVERYTHING)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny.params)
    np.testing.assert_allclose(base_logits(merged), logits(params), atol=1e-5)


def test_every_linear_has_factors_that_are_used(tiny, sizes, logits):
    """Each pair of factors alone changes the logits."""
    zero = jax.tree.map(np.zeros_like, factors := random_factors(sizes))
    expected = logits(union(tiny.params, zero))
    modules = {path[:-1] for path in _paths(factors)}
    assert len(modules) == 7 + 6 + 2
    for module in modules:
        one, _ = split(factors, lambda path, module=module: path[:-1] == module)
        _, others = split(zero, lambda path, module=module: path[:-1] == module)
        assert np.abs(logits(union(tiny.params, union(one, others))) - expected).max() > 1e-3, module


def _paths(tree):
    return [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_beginning_depends_on_seed_and_place_alone(tiny, sizes, new):
    some = initial_factors(tiny.config.with_lora({"decoder": Lora(4, 1.0, ("down", "query"))}), 5)
    assert {path[-2] for path in _paths(some)} == {"query", "down"}
    for module in ("attention", "mlp"):
        for name, factors in some["decoder"]["layers"][module].items():
            jax.tree.map(np.testing.assert_array_equal, factors, new["decoder"]["layers"][module][name])
    query, key = (np.asarray(new["decoder"]["layers"]["attention"][name][LORA_A]) for name in ("query", "key"))
    assert query.shape == key.shape and not np.any(query == key) and not np.any(query[0] == query[1])
    assert not np.any(query == np.asarray(initial_factors(sizes, 6)["decoder"]["layers"]["attention"]["query"][LORA_A]))


def test_beginning_is_peft_s(tiny):
    """PEFT draws A by Kaiming's rule with a = sqrt(5): evenly within 1 / sqrt(fan in). B is zero."""
    factors = initial_factors(tiny.config.with_lora({"decoder": Lora(64, 1.0, ("out", "down"))}), 0)["decoder"]["layers"]
    for leaf, fan_in in ((factors["attention"]["out"], 4 * 6), (factors["mlp"]["down"], 40)):
        first = np.asarray(leaf[LORA_A]) * fan_in**0.5
        assert 0.99 < np.abs(first).max() <= 1 and abs(first.mean()) < 0.03
        np.testing.assert_allclose(first.std(), 3**-0.5, rtol=0.03)
        assert not np.any(leaf[LORA_B])


@pytest.mark.nightly
def test_on_a_mesh(tiny, sizes, new, logits):
    """Factors are sharded as their kernels' inputs and outputs, and the logits are the same."""
    mesh = make_mesh(2, 2, 2)
    shardings = param_shardings(sizes, mesh)
    attention = shardings["decoder"]["layers"]["attention"]
    specs = {(name, leaf): attention[name][leaf].spec for name in ("query", "out") for leaf in (LORA_A, LORA_B)}
    assert specs == {
        ("query", LORA_A): P(None, "fsdp", None), ("query", LORA_B): P(None, "fsdp", "tensor", None),
        ("out", LORA_A): P(None, "tensor", None, "fsdp"), ("out", LORA_B): P(None, None, "fsdp"),
    }  # fmt: skip
    factors = random_factors(sizes)
    placed = jax.tree.map(jax.device_put, factors, split(shardings, is_factor)[0])
    batch = to_device(jax.device_get(parts(batch_of(MIXED, tiny.processor))), mesh)
    model = adapted(tiny, EVERYTHING).model
    with jax.set_mesh(mesh):

        @quick_jit
        def run(params, batch):
            batch = jax.tree.map(lambda x: x[0], batch)
            return model.logits(params, model.hidden(params, model.encode_images(params, batch.images), batch))

        got = run(union(tiny.sharded(mesh), placed), batch)
    np.testing.assert_allclose(got, logits(union(tiny.params, factors)), atol=1e-4)
    there = initial_factors(sizes, 5, shardings)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, there, split(shardings, is_factor)[0]))
    jax.tree.map(np.testing.assert_array_equal, there, new)


def test_factors_are_float32_and_are_computed_in_the_compute_type(tiny, new):
    model = dataclasses.replace(adapted(tiny, EVERYTHING).model, dtype="bfloat16")
    batch = batch_of(MIXED[:1], tiny.processor)
    params = union(tiny.params, new)

    def total(params):
        hidden = model.hidden(params, model.encode_images(params, batch.images), batch)
        assert hidden.dtype == "bfloat16"
        return hidden.astype("float32").sum()

    gradient = jax.eval_shape(jax.grad(total), params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}
