"""Online BDHS: rejected answers from the current policy, between steps; the chosen answers stay the set's own."""

import dataclasses
from typing import Any

import grain
import jax
import numpy as np

from mmalign_jax.config import TrainConfig
from mmalign_jax.data.layout import RowLayout, RowProcessor, lay_out, misfit, stack_rows, tokenize
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.errors import UserError
from mmalign_jax.pairs.bdhs import BdhsSampler, Outcome
from mmalign_jax.types import PairBatch, PreferenceRecord, Response


class OnlineBatches:
    """Batches of pairs made by the policy that is trained. Step s takes records [s B, (s + 1) B) of an endless shuffled sequence.

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
        shuffle_seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])  # as the offline loader does
        self._rows = grain.MapDataset.source(plan.items).shuffle(shuffle_seed).repeat()
        self._identity = {"seed": config.seed, "items": len(plan.items)}
        self._step = 0

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        """The next pairs `[A, b, ...]`, and how they came out.

        The metrics are shares of the rows (`bdhs/changed`, `bdhs/unusable`, `bdhs/too_long`) and means over them.
        """
        size = self._config.batch_size
        records = [self._records[int(self._rows[self._step * size + i][0])] for i in range(size)]
        outcomes = list(self._sampler(params, records, draw=self._step))
        unusable = [bool(outcome.problem) for outcome in outcomes]
        too_long = [not outcome.problem and not self._fits(outcome) for outcome in outcomes]
        changed = [outcome.changed and not long for outcome, long in zip(outcomes, too_long, strict=True)]
        texts = [one.rejected if kept else one.reference.text for one, kept in zip(outcomes, changed, strict=True)]
        rows = [lay_out(_pair(one, text), one.preference, self._processor, self._layout) for one, text in zip(outcomes, texts, strict=True)]
        self._step += 1
        lead = (self._config.accumulate, size // self._config.accumulate)
        batch = jax.tree.map(lambda array: array.reshape(*lead, *array.shape[1:]), stack_rows(rows, self._layout))
        made = {
            "bdhs/changed": float(np.mean(changed)),
            "bdhs/unusable": float(np.mean(unusable)),
            "bdhs/too_long": float(np.mean(too_long)),
            "bdhs/iterations": float(np.mean([outcome.iteration for outcome in outcomes])),
            "bdhs/similarity": float(np.mean([outcome.similarity for outcome in outcomes])),
        }
        return batch, made

    def get_state(self) -> dict[str, Any]:
        """What JSON can hold: the steps that are behind us, and what the order depends on."""
        return {"online_step": self._step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called.

        Raises:
          UserError: the state belongs to offline pairs, another seed or another set of rows.
        """
        identity = {name: state.get(name) for name in self._identity}
        if identity != self._identity or not isinstance(state.get("online_step"), int):
            raise UserError(f"the checkpoint is of a run with other data or with offline pairs ({state}); use a new --workdir")
        self._step = state["online_step"]

    def _fits(self, outcome: Outcome) -> bool:
        return not misfit(tokenize(_pair(outcome, outcome.rejected), outcome.preference, self._processor, 2).size, self._layout)


def _pair(outcome: Outcome, rejected: str) -> PreferenceRecord:
    answers = (outcome.reference, Response(rejected, source="bdhs"))
    return dataclasses.replace(outcome.record, responses=answers, prefs=(outcome.preference,))
