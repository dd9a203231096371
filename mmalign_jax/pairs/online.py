"""Rows that the policy makes as it is then, between steps. Online BDHS: it writes the rejected answers, the chosen ones stay the set's own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

from mmalign_jax.config import TrainConfig
from mmalign_jax.data.buckets import ladder
from mmalign_jax.data.layout import RowLayout, RowProcessor, lay_out, misfit, stack_rows, tokenize
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.errors import UserError
from mmalign_jax.pairs.bdhs import BdhsSampler, Outcome
from mmalign_jax.types import PairBatch, PreferenceRecord, Response


class Order:
    """Which items a step takes: step s those of [s B, (s + 1) B) of an endless sequence in which every epoch is its own shuffle."""

    def __init__(self, items: np.ndarray, config: TrainConfig):
        shuffle_seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])  # as the offline loader does
        self._rows = grain.MapDataset.range(len(items)).shuffle(shuffle_seed).repeat()
        self._size = config.batch_size
        self._identity = {"seed": config.seed, "items": len(items)}
        self.step = 0

    def take(self) -> list[int]:
        """Numbers of the items of the next step."""
        numbers = [int(self._rows[self.step * self._size + place]) for place in range(self._size)]
        self.step += 1
        return numbers

    def get_state(self) -> dict[str, Any]:
        """What JSON can hold: the steps that are behind us, and what the order depends on."""
        return {"online_step": self.step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called.

        Raises:
          UserError: the state belongs to offline pairs, another seed or another set of rows.
        """
        identity = {name: state.get(name) for name in self._identity}
        if identity != self._identity or not isinstance(state.get("online_step"), int):
            raise UserError(f"the checkpoint is of a run with other data or with offline pairs ({state}); use a new --workdir")
        self.step = state["online_step"]


def shortest(layout: RowLayout, longest: int) -> RowLayout:
    """The layout with as few answer slots of the ladder to its own as hold answers of `longest` tokens."""
    slots = next((slots for slots in ladder(layout.answer_slots) if slots >= longest), layout.answer_slots)
    return dataclasses.replace(layout, answer_slots=slots)


def in_parts(rows: Sequence[dict[str, Any]], layout: RowLayout, config: TrainConfig) -> PairBatch:
    """The rows of a step as a batch `[A, b, ...]`."""
    lead = (config.accumulate, len(rows) // config.accumulate)
    return jax.tree.map(lambda array: array.reshape(*lead, *array.shape[1:]), stack_rows(rows, layout))


class BdhsBatches:
    """Batches of pairs whose rejected answers the policy that is trained writes, in the order of `Order`.

    A record whose rejected answer came out as its reference, unusable, or too long for the slots, stays in the batch as a pair of equal
    answers, which gives no preference gradient; such rows are counted in the metrics.

    Args:
      plan: rows with the reference answer (K = 1).
      layout: of the pairs (K = 2).
    """

    def __init__(
        self, records: Records, processor: RowProcessor, sampler: BdhsSampler, plan: RowPlan, layout: RowLayout, config: TrainConfig
    ):
        if layout.answers != 2 or plan.layout.answers != 1:
            raise ValueError("the plan is of rows with one answer, the layout of rows with two")
        self._records, self._processor, self._sampler, self._layout, self._config = records, processor, sampler, layout, config
        self._items, self._order = plan.items, Order(plan.items, config)

    def begin(self) -> None:
        """Nothing: the rows wait for the policy."""

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        """The next pairs `[A, b, ...]`, and how they came out.

        The metrics are shares of the rows (`bdhs/changed`, `bdhs/unusable`, `bdhs/too_long`) and means over them.
        """
        draw, numbers = self._order.step, self._order.take()
        records = [self._records[int(self._items[number][0])] for number in numbers]
        outcomes = list(self._sampler(params, records, draw=draw))
        unusable = [bool(outcome.problem) for outcome in outcomes]
        too_long = [not outcome.problem and not self._fits(outcome) for outcome in outcomes]
        changed = [outcome.changed and not long for outcome, long in zip(outcomes, too_long, strict=True)]
        texts = [one.rejected if kept else one.reference.text for one, kept in zip(outcomes, changed, strict=True)]
        rows = [lay_out(_pair(one, text), one.preference, self._processor, self._layout) for one, text in zip(outcomes, texts, strict=True)]
        batch = in_parts(rows, self._layout, self._config)
        made = {
            "bdhs/changed": float(np.mean(changed)),
            "bdhs/unusable": float(np.mean(unusable)),
            "bdhs/too_long": float(np.mean(too_long)),
            "bdhs/iterations": float(np.mean([outcome.iteration for outcome in outcomes])),
            "bdhs/similarity": float(np.mean([outcome.similarity for outcome in outcomes])),
        }
        return batch, made

    def get_state(self) -> dict[str, Any]:
        return self._order.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._order.set_state(state)

    def _fits(self, outcome: Outcome) -> bool:
        return not misfit(tokenize(_pair(outcome, outcome.rejected), outcome.preference, self._processor, 2).size, self._layout)


def _pair(outcome: Outcome, rejected: str) -> PreferenceRecord:
    answers = (outcome.reference, Response(rejected, source="bdhs"))
    return dataclasses.replace(outcome.record, responses=answers, prefs=(outcome.preference,))
