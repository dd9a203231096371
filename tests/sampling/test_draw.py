"""What is drawn of a distribution: how often, under which options, and never what has no weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax.sampling import lane_keys
from mmalign_jax.sampling.draw import draw

LANES = 20_000


def keys_of(count, seed=0):
    return lane_keys(jax.random.key(seed), jnp.arange(count, dtype=jnp.uint32), jnp.zeros(count, jnp.int32), 1)


def frequencies(logits, **options):
    """How often each token is drawn of one distribution, over `LANES` lanes."""
    many = jnp.broadcast_to(logits, (LANES, 1, len(logits)))
    drawn = jax.jit(lambda many, keys: draw(many, keys, jnp.int32(5), **options))(many, keys_of(LANES))
    assert drawn.shape == (LANES, 1) and drawn.dtype == jnp.int32
    return np.bincount(np.asarray(drawn)[:, 0], minlength=len(logits)) / LANES


@pytest.mark.parametrize("vocabulary", [7, 128, 300])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_come_as_often_as_their_probability_says(vocabulary, temperature):
    logits = 2 * np.random.default_rng(vocabulary).standard_normal(vocabulary).astype(np.float32)
    logits[::3] = -np.inf
    wanted = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32) / temperature), np.float64)
    found = frequencies(jnp.asarray(logits), temperature=temperature)
    assert np.all(found[::3] == 0)
    likely = wanted > 5 / LANES
    z = (found - wanted)[likely] / np.sqrt(wanted * (1 - wanted) / LANES)[likely]
    assert np.abs(z).max() < 4.5 and np.mean(z**2) < 1 + 4 * np.sqrt(2 / len(z)), z


def test_top_k_and_top_p_leave_what_they_say():
    logits = jnp.log(jnp.array([0.05, 0.4, 0.3, 0.2, 0.05]))
    np.testing.assert_allclose(frequencies(logits, temperature=1.0, top_k=2), [0, 4 / 7, 3 / 7, 0, 0], atol=0.02)
    np.testing.assert_allclose(frequencies(logits, temperature=1.0, top_p=0.75), [0, 4 / 9, 3 / 9, 2 / 9, 0], atol=0.02)


def test_what_has_no_weight_is_never_drawn_whatever_the_uniform_number(monkeypatch):
    """At both ends of the unit interval, where rounding could point in front of or behind everything that has a weight."""
    logits = np.full((6, 1, 1000), -np.inf, np.float32)
    generator = np.random.default_rng(0)
    for row, has in enumerate(([999], [0], [500], [130, 131, 400], range(129, 900, 7), generator.permutation(1000)[:40])):
        logits[row, 0, list(has)] = 3 * generator.standard_normal(len(list(has)))
    for uniform in (0.0, 2.0**-23, 0.5, 1 - 2.0**-23, 1.0):
        monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype, value=uniform: jnp.full(shape, value, dtype))
        drawn = np.asarray(draw(jnp.asarray(logits), keys_of(6), jnp.int32(0), temperature=1.0))
        assert np.all(np.isfinite(np.take_along_axis(logits[:, 0], drawn, axis=1))), uniform


def test_a_draw_is_a_function_of_its_key_and_number():
    logits = jax.random.normal(jax.random.key(1), (64, 1, 50))
    first, again, later = (draw(logits, keys_of(64), jnp.int32(step), temperature=1.0) for step in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first) == np.asarray(later)) < 0.2
    of_lane = draw(logits, keys_of(64), jnp.where(jnp.arange(64) % 2 == 0, 5, 6)[:, None], temperature=1.0)
    np.testing.assert_array_equal(of_lane[::2], first[::2])
    np.testing.assert_array_equal(of_lane[1::2], later[1::2])


def test_temperature_zero_takes_the_likeliest():
    logits = jax.random.normal(jax.random.key(1), (8, 2, 50))
    keys = lane_keys(jax.random.key(0), jnp.arange(8, dtype=jnp.uint32), jnp.zeros(8, jnp.int32), 2)
    np.testing.assert_array_equal(draw(logits, keys, jnp.int32(0), temperature=0.0), jnp.argmax(logits, axis=-1))
