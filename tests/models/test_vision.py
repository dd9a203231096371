"""Attention of the tower, a block of queries at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.jaxprs import equations

from mmalign_jax.models.vision import attend

SLOTS = 400  # two blocks


def in_one_piece(query, key, value, mask):
    scores = np.einsum("bmqhe,bmkhe->bmhqk", query, key) / np.sqrt(query.shape[-1])
    scores = scores if mask is None else np.where(mask[:, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bmhqk,bmkhe->bmqhe", weights / weights.sum(axis=-1, keepdims=True), value)


def segments(generator):
    segment = np.sort(generator.integers(0, 3, (2, 1, SLOTS)), axis=-1)
    return segment[..., :, None] == segment[..., None, :]


MASKS = {"none": lambda _: None, "causal": lambda _: np.tri(SLOTS, dtype=bool)[None, None], "segments": segments}


@pytest.mark.parametrize("name", MASKS)
def test_blocks_give_what_one_piece_gives(name):
    generator = np.random.default_rng(0)
    query, key, value = generator.standard_normal((3, 2, 1, SLOTS, 2, 8)).astype(np.float32)
    mask = MASKS[name](generator)
    found = jax.jit(attend)(query, key, value, None if mask is None else jnp.asarray(mask))
    exact = (x.astype(np.float64) for x in (query, key, value))
    np.testing.assert_allclose(found, in_one_piece(*exact, mask), atol=2e-6)


def test_scores_are_not_kept_for_the_backward_pass():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 1, SLOTS, 2, 8))
    saved = jax.eval_shape(lambda *args: jax.vjp(lambda *args: attend(*args, None), *args)[1], query, key, value)
    assert max(leaf.size for leaf in jax.tree.leaves(saved)) <= query.size


def test_scores_of_a_whole_picture_never_exist():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 1, SLOTS, 2, 8))
    jaxpr = jax.make_jaxpr(jax.grad(lambda query: jnp.sum(attend(query, key, value, None))))(query).jaxpr
    made = [math.prod(v.aval.shape) for equation in equations(jaxpr) for v in equation.outvars]
    assert max(made) == 2 * SLOTS // 2 * SLOTS  # heads, queries of a block, keys


def test_one_query_sees_all_keys():
    generator = np.random.default_rng(1)
    query, key = generator.standard_normal((1, 1, 1, 2, 8)).astype(np.float32), generator.standard_normal((1, 1, SLOTS, 2, 8)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(attend, static_argnums=3)(query, key, key, None), in_one_piece(query, key, key, None), atol=2e-6)
