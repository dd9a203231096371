"""95 % intervals by the percentile bootstrap over images (Efron and Tibshirani 1993, section 13.3)."""

from collections.abc import Callable, Mapping

import numpy as np

from mmalign_jax.report.records import Score

RESAMPLES = 1000
_CHUNK = 100  # resamples at a time, so that memory does not grow with their number

Values = np.ndarray | np.generic  # an array, or one number of it
Measures = Callable[[np.ndarray], Mapping[str, Values]]


def bootstrap(counts: np.ndarray, measures: Measures, *, seed: int, resamples: int = RESAMPLES) -> dict[str, Score]:
    """The value of every measure, with its interval over resampled images.

    Answers about one image are not independent, so whole images are drawn.

    Args:
      counts: `[n, ...]`, what each of n images adds to the sums that the measures are made of.
      measures: sums `[*b, ...]` -> name -> value `[*b]`.
      seed: of the resampling; the same one gives the same interval.
      resamples: how many data sets of n images are drawn.

    Raises:
      ValueError: there is no image.
    """
    images = len(counts)
    if not images:
        raise ValueError("an interval needs at least one image")
    flat = np.asarray(counts, np.float64).reshape(images, -1)
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, _CHUNK):
        times = rng.multinomial(images, np.full(images, 1.0 / images), size=min(_CHUNK, resamples - start))
        parts.append(times @ flat)
    drawn = measures(np.concatenate(parts).reshape(-1, *counts.shape[1:]))
    value = measures(np.asarray(counts).sum(axis=0))
    bounds = {name: np.percentile(values, (2.5, 97.5)) for name, values in drawn.items()}
    return {name: Score(float(value[name]), float(low), float(high)) for name, (low, high) in bounds.items()}


def ratio(numerator: Values, denominator: Values) -> np.ndarray:
    """Elementwise quotient, 0 where there is nothing to divide by."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape)), where=denominator != 0)
