import numpy as np
import pytest

from mmalign_jax.evaluation.interval import bootstrap, ratio


def share(sums):
    return {"share": ratio(sums[..., 0], sums[..., 1])}


def test_value_is_of_the_sums_and_not_the_mean_of_ratios():
    score = bootstrap(np.array([[1, 1], [0, 9]]), share, seed=0)["share"]
    assert score.value == pytest.approx(0.1)
    assert score.low <= score.value <= score.high


def test_matches_the_normal_interval_of_a_proportion():
    hits = np.arange(400) < 100
    score = bootstrap(np.stack([hits, np.ones(400)], axis=-1), share, seed=1, resamples=4000)["share"]
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert (score.value, score.low, score.high) == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=0.005)


def test_resamples_images_and_not_answers():
    """Ten answers about an image that are all the same know no more than one."""
    hits = np.arange(50) < 25
    one = bootstrap(np.stack([hits, np.ones(50)], axis=-1), share, seed=0)["share"]
    ten = bootstrap(np.stack([10 * hits, np.full(50, 10)], axis=-1), share, seed=0)["share"]
    assert (ten.low, ten.high) == (one.low, one.high)


def test_the_same_seed_gives_the_same_interval():
    counts = np.random.default_rng(0).integers(0, 2, (30, 2)) + np.array([0, 1])
    assert bootstrap(counts, share, seed=3) == bootstrap(counts, share, seed=3)
    assert bootstrap(counts, share, seed=3) != bootstrap(counts, share, seed=4)


def test_no_spread_and_no_images():
    score = bootstrap(np.array([[1, 2]]), share, seed=0)["share"]
    assert (score.low, score.value, score.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError):
        bootstrap(np.zeros((0, 2)), share, seed=0)


def test_ratio_of_nothing_is_zero():
    assert ratio(np.array([3, 0]), np.array([0, 2])).tolist() == [0.0, 0.0]
    assert float(ratio(np.int64(1), np.int64(4))) == 0.25
