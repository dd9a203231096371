"""The backward pass of attention by blocks, against automatic differentiation in float64, and what it is left to work with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.jaxprs import equations
from helpers.tiny import quick_jit

from mmalign_jax.models.block_attention import QueryBlock, Scores, attend_blocks
from mmalign_jax.models.remat import ATTENTION

ROWS, GROUPS, REPEATS, QUERIES, KEYS, WIDTH = 2, 2, 3, 7, 9, 4
# what one block reads in two pieces, another reads a part of, and one key nobody
BLOCKS = (QueryBlock(0, 3, ((0, 4),)), QueryBlock(3, 5, ((0, 2), (5, 8))), QueryBlock(5, 7, ((1, 8),)))


def arrays(dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = ((ROWS, GROUPS, REPEATS, QUERIES, WIDTH), (ROWS, GROUPS, KEYS, WIDTH), (ROWS, GROUPS, KEYS, WIDTH))
    return [jnp.array(random.normal(size=shape), dtype) for shape in shapes], random.random((ROWS, QUERIES, KEYS)) < 0.7


def in_one_piece(scores, query, key, value, mask):
    read = np.zeros((QUERIES, KEYS), bool)
    for block in BLOCKS:
        for first, end in block.keys:
            read[block.start : block.stop, first:end] = True
    found = scores(jnp.einsum("bgrqe,bgxe->bgrqx", query, key))
    found = jnp.where(jnp.asarray(read), found if mask is None else jnp.where(mask[:, None, None], found, -1e30), -jnp.inf)
    return jnp.einsum("bgrqx,bgxe->bgrqe", jax.nn.softmax(found, axis=-1), value)


def measured(attend, given):
    """What it gives, and the gradients of something of it."""
    read = lambda mixed: jnp.sum(jnp.sin(mixed.astype(jnp.promote_types(mixed.dtype, jnp.float32))))  # noqa: E731
    return attend(*given), jax.grad(lambda given: read(attend(*given)))(given)


MASKS = {
    "none": lambda mask: None,
    "by row": lambda mask: mask,
    "one for all rows": lambda mask: mask[:1],
    "one for all queries": lambda mask: mask[:, :1],
    "a query sees nothing": lambda mask: mask & (np.arange(QUERIES) != 4)[:, None],
}


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_those_of_one_piece(name, cap):
    given, mask = arrays()
    mask, scores = MASKS[name](mask), Scores(0.6, cap)
    with jax.enable_x64(True):
        theirs = lambda *given: in_one_piece(scores, *given, None if mask is None else jnp.asarray(mask))  # noqa: E731
        expected = measured(theirs, [jnp.asarray(np.asarray(x, np.float64)) for x in given])
    ours = lambda *given: attend_blocks(BLOCKS, scores, *given, None if mask is None else jnp.asarray(mask))  # noqa: E731
    found = quick_jit(lambda *given: measured(ours, list(given)))(*given)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6), found, expected)


def test_gradients_in_bfloat16_have_its_type_and_its_rounding():
    given, mask = arrays(jnp.bfloat16)
    ours = lambda *given: attend_blocks(BLOCKS, Scores(0.5), *given, jnp.asarray(mask))  # noqa: E731
    found, exact = measured(ours, given), measured(ours, [x.astype(jnp.float32) for x in given])
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0.05, atol=0.05), found, exact)


def test_what_is_kept_by_name_spares_the_forward_pass():
    given, mask = arrays()

    def passes(policy):
        """How often the weights are computed, in a layer that is computed again in the backward pass."""
        layer = jax.checkpoint(lambda *given: jnp.sin(attend_blocks(BLOCKS, Scores(0.5), *given, jnp.asarray(mask))), policy=policy)
        jaxpr = jax.make_jaxpr(jax.jit(jax.grad(lambda given: jnp.sum(layer(*given)))))(given)
        return sum(equation.primitive.name == "exp" for equation in equations(jaxpr.jaxpr)) / len(BLOCKS)

    assert passes(None) == 3
    assert passes(jax.checkpoint_policies.save_only_these_names(ATTENTION)) == 2


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ((QueryBlock(0, 3, ((0, 9),)), QueryBlock(4, 7, ((0, 9),))), r"QueryBlock\(start=4, .* behind query 3 of 7, with 9 keys"),
        ((QueryBlock(0, 5, ((0, 9),)),), "the blocks end at query 5 of 7"),
        ((QueryBlock(0, 7, ((0, 10),)),), "with 9 keys"),
        ((QueryBlock(0, 7, ((0, 5), (4, 9))),), "QueryBlock"),
        ((QueryBlock(0, 7, ()),), "QueryBlock"),
        ((QueryBlock(0, 9, ((0, 9),)), QueryBlock(9, 7, ((0, 9),))), r"QueryBlock\(start=9, stop=7"),
    ],
)  # fmt: skip
def test_blocks_with_gaps_and_slots_that_are_not_there_are_refused(blocks, words):
    with pytest.raises(ValueError, match=words):
        attend_blocks(blocks, Scores(0.5), *arrays()[0], None)
