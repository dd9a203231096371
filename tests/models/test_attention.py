"""Attention by blocks against attention in one piece, and what of it is computed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.jaxprs import equations
from helpers.tiny import quick_jit

from mmalign_jax.models import splash
from mmalign_jax.models.attention import Regions, attend, packed_mask
from mmalign_jax.models.image_attention import image_mass
from mmalign_jax.models.presets import preset
from mmalign_jax.types import FIRST_ANSWER, PAD, PREFIX

# several blocks of a prefix and of an answer, neither of them even; padding behind each
PREFIX_SLOTS, ANSWER_SLOTS, LENGTHS, IN_PREFIX = 300, 140, (140, 90), 280
HEADS, GROUPS, WIDTH = 4, 2, 8


def config(**changes):
    c = preset("llava-1.5-7b").decoder
    return dataclasses.replace(c, heads=HEADS, kv_heads=GROUPS, head_width=WIDTH, **changes)


def arrays(window=None, bidirectional="none"):
    slots = PREFIX_SLOTS + len(LENGTHS) * ANSWER_SLOTS
    role, positions, image = np.full((1, slots), PAD), np.zeros((1, slots), np.int32), np.full((1, slots), -1)
    role[:, :IN_PREFIX], positions[:, :IN_PREFIX], image[:, 10:250] = PREFIX, np.arange(IN_PREFIX), np.repeat([0, 1], 120)
    for number, length in enumerate(LENGTHS):
        here = PREFIX_SLOTS + number * ANSWER_SLOTS + np.arange(length)
        role[:, here], positions[:, here] = FIRST_ANSWER + number, IN_PREFIX + np.arange(length)
    mask = packed_mask(*(jnp.array(x) for x in (role, positions, image)), window=window, bidirectional=bidirectional)
    random = np.random.default_rng(0)
    query, key, value = (jnp.array(random.normal(size=(1, slots, heads, WIDTH)), jnp.float32) for heads in (HEADS, GROUPS, GROUPS))
    return query, key, value, mask, jnp.array(role != PAD)[0]


def in_one_piece(config, query, key, value, mask):
    key, value = (jnp.repeat(x, HEADS // GROUPS, axis=2).astype(jnp.float64) for x in (key, value))
    scores = jnp.einsum("bqhe,bkhe->bhqk", query.astype(jnp.float64), key) / WIDTH**0.5
    if config.attention_softcap is not None:
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    return jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1), value)


@pytest.mark.parametrize(
    ("window", "bidirectional", "softcap"),
    [
        (50, "none", 3.0), (None, "image", None),
        pytest.param(None, "none", None, marks=pytest.mark.nightly), pytest.param(None, "prefix", None, marks=pytest.mark.nightly),
    ],  # fmt: skip
)
def test_blocks_give_what_one_piece_gives(window, bidirectional, softcap):
    c = config(attention_softcap=softcap)
    query, key, value, mask, there = arrays(window, bidirectional)
    regions = Regions(PREFIX_SLOTS, ANSWER_SLOTS, causal=bidirectional == "none")
    read = lambda mixed: jnp.sum(jnp.sin(mixed) * there[:, None, None])  # noqa: E731
    ours = lambda *qkv: attend(c, *qkv, mask, regions)  # noqa: E731
    with jax.enable_x64(True):
        theirs = lambda *qkv: in_one_piece(c, *qkv, mask)  # noqa: E731
        expected, wanted = theirs(query, key, value), jax.grad(lambda qkv: read(theirs(*qkv)))((query, key, value))
    found, grads = quick_jit(lambda qkv: (ours(*qkv), jax.grad(lambda qkv: read(ours(*qkv)))(qkv)))((query, key, value))
    np.testing.assert_allclose(found[0, there], expected[0, there], rtol=2e-6, atol=5e-6)
    for one, other in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=5e-6, atol=1e-5)


@pytest.mark.parametrize("bidirectional", ["none", "prefix"])
def test_what_is_too_far_apart_to_be_of_one_pair_is_left_out(bidirectional):
    """Rows of pairs of at most 40 + 30 slots, eight and a half of them behind one another, in several blocks."""
    slots = np.arange(PREFIX_SLOTS + len(LENGTHS) * ANSWER_SLOTS)
    part = np.where(slots < PREFIX_SLOTS, 0, 1 + (slots - PREFIX_SLOTS) // ANSWER_SLOTS)
    inside = np.where(part == 0, slots, (slots - PREFIX_SLOTS) % ANSWER_SLOTS)
    longest = (40, 30)
    segment = inside // np.array([40, 30, 30])[part]
    positions = np.where(part == 0, inside % 40, 40 + inside % 30)
    given = [jnp.array(values[None]) for values in (np.where(part == 0, PREFIX, FIRST_ANSWER + part - 1), positions, np.full_like(part, -1))]
    mask = packed_mask(*given, bidirectional=bidirectional, segment=jnp.array(segment[None]))
    far, near = (Regions(PREFIX_SLOTS, ANSWER_SLOTS, bidirectional == "none", reach) for reach in (None, longest))
    query, key, value, _, _ = arrays()
    read = lambda regions: lambda qkv: jnp.sum(jnp.sin(attend(config(), *qkv, mask, regions)))  # noqa: E731
    one, other = (quick_jit(jax.value_and_grad(read(regions)))((query, key, value)) for regions in (near, far))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other)
    assert near.products(2) < 0.9 * far.products(2) and near.reach == longest
    static = splash.static_mask(near, len(slots), len(slots))
    assert (static | ~np.asarray(mask[0])).all() and static.sum() < 0.9 * splash.static_mask(far, len(slots), len(slots)).sum()


def sizes(jaxpr) -> set[int]:
    """Elements of all arrays of floats that a computation makes."""
    made = [v.aval for equation in equations(jaxpr) for v in equation.outvars if hasattr(v.aval, "shape")]
    return {math.prod(one.shape) for one in made if jnp.issubdtype(one.dtype, jnp.floating)}


def test_scores_of_a_whole_row_never_exist():
    query, key, value, mask, _ = arrays()
    slots, regions = query.shape[1], Regions(PREFIX_SLOTS, ANSWER_SLOTS, causal=True)
    made = sizes(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attend(config(), q, key, value, mask, regions))))(query).jaxpr)
    assert max(made) <= HEADS * 128 * (PREFIX_SLOTS + ANSWER_SLOTS) < HEADS * slots * slots


def test_products_are_counted_as_they_are_computed():
    query, key, value, mask, _ = arrays()
    regions = Regions(PREFIX_SLOTS, ANSWER_SLOTS, causal=True)
    counted = regions.products(len(LENGTHS))
    assert 0.4 < counted / query.shape[1] ** 2 < 0.6
    cost = jax.jit(lambda *qkv: attend(config(), *qkv, mask, regions)).lower(query, key, value).compile().cost_analysis()
    np.testing.assert_allclose(cost["flops"], 4 * HEADS * WIDTH * counted, rtol=0.2)  # the softmax is the rest
    assert Regions(PREFIX_SLOTS, ANSWER_SLOTS, causal=False).products(0) == PREFIX_SLOTS**2


def test_a_row_is_a_prefix_and_whole_answers():
    query, key, value, mask, _ = arrays()
    with pytest.raises(ValueError, match="580 slots are not 300 for the prefix and a multiple of 141 for the answers"):
        attend(config(), query, key, value, mask, Regions(PREFIX_SLOTS, ANSWER_SLOTS + 1, causal=True))


def membership():
    out = np.zeros((1, PREFIX_SLOTS, 2), np.float32)
    out[0, 10:130, 0] = out[0, 130:250, 1] = 1
    return jnp.array(out)


@pytest.mark.parametrize(("window", "softcap"), [(50, 3.0), pytest.param(None, None, marks=pytest.mark.nightly)])
def test_attention_to_images_by_blocks(window, softcap):
    """It is what comes out where the values say which image a key is of."""
    c, regions = config(attention_softcap=softcap), Regions(PREFIX_SLOTS, ANSWER_SLOTS, causal=True)
    query, key, _, mask, there = arrays(window)
    marks = jnp.pad(membership(), ((0, 0), (0, mask.shape[1] - PREFIX_SLOTS), (0, 0)))
    with jax.enable_x64(True):
        value = jnp.broadcast_to(marks[:, :, None], (*marks.shape[:2], GROUPS, 2))
        expected = in_one_piece(c, query, key, value, mask).mean(axis=2)[:, PREFIX_SLOTS:]
    found = image_mass(c, query, key, mask, regions, membership())
    there = there[PREFIX_SLOTS:]
    assert found.dtype == jnp.float32 and found.shape == (1, len(LENGTHS) * ANSWER_SLOTS, 2)
    np.testing.assert_allclose(found[0, there], expected[0, there], rtol=1e-5, atol=1e-7)
    made = sizes(jax.make_jaxpr(lambda q: image_mass(c, q, key, mask, regions, membership()))(query).jaxpr)
    assert max(made) <= HEADS * 128 * (PREFIX_SLOTS + ANSWER_SLOTS)
