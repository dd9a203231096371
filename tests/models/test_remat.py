"""Remat changes what is kept, not what is computed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import MIXED, Tiny, batch_of, quick_jit

from mmalign_jax.config import from_mapping
from mmalign_jax.models import remat
from mmalign_jax.models.attention import Regions
from mmalign_jax.models.decoder import Decoder, Masks
from mmalign_jax.models.layers import Linear

pytestmark = pytest.mark.optimised


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def rows(tiny):
    return batch_of(MIXED, tiny.processor)


def residuals(tiny, policy, batch) -> tuple[dict, int]:
    """Gradients, and the bytes that are held besides at one time."""
    model = Tiny.load(tiny.directory, remat=policy).model

    def loss(params):
        features = model.encode_images(params, batch.images)
        return jnp.sum(jnp.sin(model.hidden(params, features, batch)))

    compiled = quick_jit(jax.grad(loss)).lower(tiny.params).compile()
    return compiled(tiny.params), compiled.memory_analysis().temp_size_in_bytes


def test_less_is_kept_and_gradients_are_the_same(tiny, rows):
    (plain, all_of_it), (dots, some), (block, least) = (residuals(tiny, policy, rows) for policy in ("none", "dots", "block"))
    assert all_of_it > some > least, (all_of_it, some, least)
    for other in (dots, block):
        # each is 3e-3 off what float64 gives, so this is rounding
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-4), plain, other)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_dots_keeps_results_of_linears_and_attention_once(tiny, qk_norm):
    """Widths of the model, and of the MLP, that are kept of a token in each layer."""
    sizes = dataclasses.replace(tiny.model.config.decoder, heads=2, kv_heads=2, qk_norm=qk_norm)
    rows, slots, layers = 3, 5, sizes.layers
    model = Decoder(sizes, remat="dots")
    inputs, positions = jnp.zeros((rows, slots, sizes.width)), jnp.zeros((rows, slots), jnp.int32)
    masks = Masks(jnp.ones((rows, slots, slots), bool), None, Regions(slots, 1, True))
    params = jax.eval_shape(model.init, jax.random.key(0), inputs, positions, masks)

    def kept(params, inputs):
        return jax.vjp(lambda params, inputs: model.apply(params, inputs, positions, masks)[0], params, inputs)[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(kept, params, inputs)) if leaf.shape[:2] == (layers, rows)]
    of_token = [math.prod(shape) // (layers * rows * slots) for shape in shapes]
    heads = sizes.heads * sizes.head_width
    expected = [sizes.width] * 2 + [heads] * 4 + [sizes.mlp_width] * 2 + [sizes.heads] * 2
    assert sorted(of_token) == sorted(expected), (of_token, shapes)
    # query, key and value as attention reads them, and not as linears gave them: they would be rotated and turned again. Norms need the latter
    keys = (slots, sizes.head_width)
    as_read = [shapes.count((layers, rows, sizes.kv_heads, *more, *keys)) for more in ((1,), ())]
    assert as_read == ([1, 0] if qk_norm else [2, 2])


def test_a_model_is_made_as_runs_have_it(tiny):
    assert tiny.model.remat == from_mapping({}).model.remat == "dots"


def test_names():
    with pytest.raises(ValueError, match="unknown remat policy 'full'"):
        remat.remat(Linear, "full")
    for policy in remat.POLICIES:
        assert from_mapping({"model": {"remat": policy}}).model.remat == policy
