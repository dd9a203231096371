"""The mask of a packed row says of every answer what a mask of that answer alone would say."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax.models.attention import packed_mask
from mmalign_jax.types import FIRST_ANSWER, PAD, PREFIX

# a prefix of text, two images of four tokens side by side, and text; two answers; padding behind each region
IMAGES = (-1, -1, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1)
PREFIX_SLOTS, ANSWER_SLOTS, LENGTHS = 15, 6, (6, 4)


def row():
    """Role, position and image of every slot, and the slots of each answer with its prefix."""
    slots, n = PREFIX_SLOTS + len(LENGTHS) * ANSWER_SLOTS, len(IMAGES)
    role, positions, image = np.full(slots, PAD), np.zeros(slots, int), np.full(slots, -1)
    role[:n], positions[:n], image[:n] = PREFIX, np.arange(n), IMAGES
    sequences = []
    for answer, length in enumerate(LENGTHS):
        here = PREFIX_SLOTS + answer * ANSWER_SLOTS + np.arange(length)
        role[here], positions[here] = FIRST_ANSWER + answer, n + np.arange(length)
        sequences.append(np.concatenate([np.arange(n), here]))
    return *(jnp.array(values[None], jnp.int32) for values in (role, positions, image)), sequences


def sees(query: int, key: int, window: int | None, bidirectional: str) -> bool:
    """Whether a token of one unpacked sequence sees another, by their indices in it.

    As transformers' `create_causal_mask`, `create_sliding_window_causal_mask` and Gemma 3's `create_masks_for_vision_model` compose it.
    """
    near = window is None or key > query - window
    n = len(IMAGES)
    if bidirectional == "image":
        same_image = query < n and key < n and IMAGES[query] == IMAGES[key] >= 0
        return near and (key <= query or same_image)
    if bidirectional == "prefix":
        return (near and key <= query) or (query < n and key < n)
    return near and key <= query


@pytest.mark.parametrize("bidirectional", ["none", "image", "prefix"])
@pytest.mark.parametrize("window", [None, 3, 9])
def test_every_answer_sees_what_it_would_see_alone(window, bidirectional):
    role, positions, image, sequences = row()
    found = np.asarray(packed_mask(role, positions, image, window=window, bidirectional=bidirectional))[0]
    for sequence in sequences:
        count = range(len(sequence))
        expected = np.array([[sees(query, key, window, bidirectional) for key in count] for query in count])
        np.testing.assert_array_equal(found[np.ix_(sequence, sequence)], expected)
    first, second = (sequence[len(IMAGES) :] for sequence in sequences)
    assert not found[np.ix_(first, second)].any() and not found[np.ix_(second, first)].any()
    # the prefix sees no answer, and nothing sees padding
    assert not found[: len(IMAGES), PREFIX_SLOTS:].any()
    assert not found[:, np.asarray(role[0]) == PAD].any()


def test_the_compositions_differ():
    role, positions, image, _ = row()
    kinds = ("none", "image", "prefix")
    masks = [np.asarray(packed_mask(role, positions, image, window=w, bidirectional=kind)) for w in (None, 3) for kind in kinds]
    assert len({mask.tobytes() for mask in masks}) == len(masks)


@pytest.mark.parametrize("bidirectional", ["none", "image", "prefix"])
def test_hidden_slots_are_seen_by_nobody(bidirectional):
    role, positions, image, _ = row()
    visible = jnp.ones(role.shape, bool).at[0, jnp.array([3, 7])].set(False)
    whole = np.asarray(packed_mask(role, positions, image, window=5, bidirectional=bidirectional))
    found = np.asarray(packed_mask(role, positions, image, window=5, bidirectional=bidirectional, visible=visible))
    np.testing.assert_array_equal(found, whole & np.asarray(visible)[:, None])
    assert whole[0, :, [3, 7]].any()


@pytest.mark.parametrize("bidirectional", ["none", "image", "prefix"])
def test_a_pair_sees_itself_and_no_other_pair_of_its_row(bidirectional):
    """Two pairs one behind the other in each region have the masks that they have alone."""
    *alone, _ = row()
    used = [np.flatnonzero(np.asarray(alone[0][0])[start:stop] != PAD) + start for start, stop in ((0, 15), (15, 21), (21, 27))]
    slots = [np.concatenate([here, here]) for here in used]
    order, segment = np.concatenate(slots), np.concatenate([np.repeat([0, 1], len(here)) for here in used])
    # images of the second pair are numbered behind those of the first
    role, positions, image = (np.asarray(values)[0, order] for values in alone)
    image = np.where(image < 0, -1, image + 2 * segment)
    packed = (jnp.array(values[None]) for values in (role, positions, image))
    found = np.asarray(packed_mask(*packed, window=9, bidirectional=bidirectional, segment=jnp.array(segment[None])))[0]
    expected = np.asarray(packed_mask(*alone, window=9, bidirectional=bidirectional))[0]
    for pair in (0, 1):
        own = segment == pair
        np.testing.assert_array_equal(found[np.ix_(own, own)], expected[np.ix_(order[own], order[own])])
        assert not found[np.ix_(own, ~own)].any()
