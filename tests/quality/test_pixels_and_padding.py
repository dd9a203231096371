"""Pixels matter; padding, batch mates, other answers and empty image slots do not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import MIXED, Tiny, answer_sums, batch_of, noise_png, quick_jit, record, rows, sample

from mmalign_jax.sampling import DecodeOptions
from mmalign_jax.types import PAD, Media


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def sums(tiny):
    function = quick_jit(lambda params, batch: answer_sums(tiny.model, params, batch))
    return lambda batch: np.asarray(function(tiny.params, batch))


@pytest.fixture(scope="module")
def batch(tiny):
    return batch_of(MIXED, tiny.processor)


@pytest.fixture(scope="module")
def expected(sums, batch):
    return sums(batch)


def other_pictures(batch, row):
    """The batch with one row's first picture changed."""
    noise = np.random.default_rng(9).integers(0, 256, batch.images.shape[2:], np.uint8)
    return batch.with_images(batch.images.at[row, 0].set(noise))


def test_pixels_change_the_log_probs(sums, batch, expected):
    for row in (0, 1, 3):
        changed = np.abs(sums(other_pictures(batch, row)) - expected)
        assert np.all(changed[row] > 0.01)
        assert np.all(np.delete(changed, row, axis=0) == 0)


def test_one_pixel_is_seen(sums, batch, expected):
    assert np.all(np.abs(sums(batch.with_images(batch.images.at[0, 0, 13, 13].add(100))) - expected)[0] > 1e-4)


def test_pixels_change_the_generation(tiny, batch):
    generate = quick_jit(lambda batch: sample(tiny.model, tiny.params, batch, DecodeOptions(16)).tokens[:, 0])
    before, after = np.asarray(generate(batch)), np.asarray(generate(other_pictures(batch, 0)))
    assert np.any(before[0] != after[0])
    np.testing.assert_array_equal(before[1:], after[1:])


def test_the_second_picture_of_a_row_matters_and_an_empty_slot_does_not(sums, batch, expected):
    noise = batch.images[:, 0][:, ::-1]
    changed = np.abs(sums(batch.with_images(batch.images.at[:, 1].set(noise))) - expected)
    assert np.all(changed[1] > 0.01)
    assert np.all(changed[[0, 2, 3]] == 0)


def test_what_stands_in_padding_does_not_matter(sums, batch, expected):
    padding = batch.role == PAD
    assert padding.sum() > 100
    garbage = dataclasses.replace(
        batch, tokens=jnp.where(padding, 77, batch.tokens), positions=jnp.where(padding, 5, batch.positions),
        image_index=jnp.where(padding, 3, batch.image_index),
    )  # fmt: skip
    np.testing.assert_array_equal(sums(garbage), expected)


def test_the_amount_of_padding_does_not_matter(tiny, sums, expected):
    wide = batch_of(MIXED, tiny.processor, prefix_slots=90, answer_slots=31, images=3)
    np.testing.assert_allclose(sums(wide), expected, rtol=1e-6)


def test_batch_mates_do_not_matter(sums, batch, expected):
    np.testing.assert_array_equal(sums(rows(batch, 3, 1, 0, 0))[[2, 1]], expected[[0, 1]])
    np.testing.assert_allclose(sums(rows(batch, 1)), expected[[1]], rtol=1e-6)


def test_other_answers_do_not_matter(tiny, sums, batch, expected):
    changed = [dataclasses.replace(r, responses=(r.responses[0], MIXED[0].responses[0])) for r in MIXED[1:]]
    got = sums(batch_of([MIXED[0], *changed], tiny.processor))
    np.testing.assert_array_equal(got[:, 0], expected[:, 0])
    assert np.all(np.abs(got - expected)[1:, 1] > 0.1)


def test_swapped_answers_swap_their_log_probs(tiny, sums, expected):
    swapped = [dataclasses.replace(r, responses=r.responses[::-1]) for r in MIXED]
    np.testing.assert_allclose(sums(batch_of(swapped, tiny.processor))[:, ::-1], expected, rtol=1e-6)


def test_a_row_of_text_may_come_without_image_slots(tiny, sums, expected):
    text = batch_of(MIXED[2:3], tiny.processor, images=0)
    assert text.images.shape[1] == 0
    np.testing.assert_allclose(sums(text), expected[[2]], rtol=1e-6)


def test_the_order_of_two_pictures_matters(tiny, sums, batch, expected):
    turned = dataclasses.replace(MIXED[1], media=tuple(Media("image", noise_png(seed)) for seed in (2, 1)))
    assert np.all(np.abs(sums(batch_of([*MIXED[:1], turned, *MIXED[2:]], tiny.processor)) - expected)[1] > 1e-3)


def test_a_prompt_word_matters(tiny, sums, batch, expected):
    asked = record("red", "What is in the book?", "There is a red cat.", "There is a blue dog on the table.", images=[1])
    assert np.all(np.abs(sums(batch_of([asked, *MIXED[1:]], tiny.processor)) - expected)[0] > 0.01)
