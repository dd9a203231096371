"""The training step as others compute it: a row for each answer, with the prompt once more, and its images encoded once more."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array

from mmalign_jax import mesh
from mmalign_jax.losses import BranchStats, Need
from mmalign_jax.training.loss import LossFunction, Moment
from mmalign_jax.types import BY_SLOT, FIRST_ANSWER, PairBatch

_ALIKE = {Need.REFERENCE, Need.TOKENS, Need.MARGIN}  # what of a row's statistics can be put together from those of its answers


def apart(batch: PairBatch) -> PairBatch:
    """Rows `[A, B]` with K answers, of the host, as rows `[A, B K]` with one: the answers of a row follow one another.

    Raises:
      ValueError: the rows hold what this is not made for.
    """
    odd = [name for name in ("auxiliary", "sampled", "other_images", "reference_logps", "mrope", "picture") if getattr(batch, name) is not None]
    if odd:
        raise ValueError(f"rows with {', '.join(odd)} are not taken apart")
    count, prefix, answer = batch.answers, batch.prefix_slots, batch.answer_slots

    def of_slots(values: np.ndarray) -> np.ndarray:
        """[A, B, T] -> [A, B K, P + R]"""
        parts = [np.concatenate([values[..., :prefix], values[..., start : start + answer]], axis=-1) for start in _starts(batch)]
        return np.stack(parts, axis=2).reshape(values.shape[0], -1, prefix + answer)

    def of_rows(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, count, axis=1)

    changed = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if value is not None and field.name not in ("prefix_slots", "answer_slots"):
            changed[field.name] = of_slots(value) if field.name in BY_SLOT else jax.tree.map(of_rows, value)
    # every answer is its row's first
    changed["role"] = np.minimum(changed["role"], FIRST_ANSWER)
    return dataclasses.replace(batch, **changed)


def _starts(batch: PairBatch) -> range:
    return range(batch.prefix_slots, batch.tokens.shape[-1], batch.answer_slots)


@dataclasses.dataclass(frozen=True)
class SeparateRows(LossFunction):
    """The loss over rows that `apart` makes: statistics by row, put together by pair.

    Raises:
      ValueError: the objective reads more of a row than its answers' log-probs.
    """

    def __post_init__(self):
        if more := sorted(need.value for need in self.objective.needs - _ALIKE):
            raise ValueError(f"{self.objective.name} reads {', '.join(more)}, which is not put together from separate rows")

    def statistics(
        self, params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array, moment: Moment | None = None
    ) -> BranchStats:
        stats, count = super().statistics(params, frozen, reference, batch, key, moment), self.objective.answers

        def together(x: Array) -> Array:
            shape = (x.shape[0] // count, count, *x.shape[2:])
            return mesh.reshape(x, shape, "batch", *(None,) * (len(shape) - 1))

        of_pairs = {name: None if (value := getattr(stats, name)) is None else together(value[:, None])[:, 0] for name in ("margin", "weight")}
        return dataclasses.replace(stats, answers=jax.tree.map(together, stats.answers), **of_pairs)
