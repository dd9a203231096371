"""Remat changes what is kept, not what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import MIXED, Tiny, batch_of, quick_jit

from mmalign_jax.config import from_mapping
from mmalign_jax.models import remat
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


def test_names():
    with pytest.raises(ValueError, match="unknown remat policy 'full'"):
        remat.remat(Linear, "full")
    for policy in remat.POLICIES:
        assert from_mapping({"model": {"remat": policy}}).model.remat == policy
