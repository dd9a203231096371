"""Online BDHS: rejected answers from the current policy, between steps; the chosen answers stay the set's own."""

import dataclasses
from typing import Any

import grain
import numpy as np

from mmalign_jax.config import TrainConfig
from mmalign_jax.data.layout import RowLayout, RowProcessor, lay_out, misfit, tokenize
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.errors import UserError
from mmalign_jax.pairs.bdhs import BdhsSampler
from mmalign_jax.types import PairBatch, Preference, PreferenceRecord, Response


class OnlineBatches:
    """Batches of pairs made by the policy that is trained. Step s takes records [s B, (s + 1) B) of an endless shuffled sequence.

    A record whose rejected answer came out as its reference, or empty, or too long for the slots, stays in the batch as a pair of equal
    answers, which gives no preference gradient; such rows are counted in the metrics.

    Args:
      plan: rows with the reference answer (K = 1).
      layout: of the pairs (K = 2).
    """

    def __init__(self, records: Records, processor: RowProcessor, sampler: BdhsSampler, plan: RowPlan, layout: RowLayout, config: TrainConfig):
        self._records, self._processor, self._sampler, self._layout, self._config = records, processor, sampler, layout, config
        shuffle_seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])
        self._rows = grain.MapDataset.source(plan.items).shuffle(shuffle_seed).repeat()
        self._step = 0

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        """The next pairs `[A, b, ...]`, and how they came out."""
        size = self._config.batch_size
        records = [self._records[int(self._rows[self._step * size + i][0])] for i in range(size)]
        outcomes = self._sampler(params, records, draw=self._step)
        changed = [outcome.changed and self._fits(outcome.record, outcome.rejected) for outcome in outcomes]
        rows = []
        for record, outcome, keep in zip(records, outcomes, changed, strict=True):
            rejected = outcome.rejected if keep else record.responses[0].text
            pair = dataclasses.replace(record, responses=(record.responses[0], Response(rejected, source="bdhs")), prefs=(Preference(0, 1),))
            rows.append(lay_out(pair, pair.prefs[0], self._processor, self._layout))
        self._step += 1
        lead = (self._config.accumulate, size // self._config.accumulate)
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch = PairBatch(
            **{name: array.reshape(*lead, *array.shape[1:]) for name, array in arrays.items()},
            prefix_slots=self._layout.prefix_slots,
            answer_slots=self._layout.answer_slots,
        )
        made = {
            "bdhs/changed": float(np.mean(changed)),
            "bdhs/iterations": float(np.mean([outcome.iteration for outcome in outcomes])),
            "bdhs/similarity": float(np.mean([outcome.similarity for outcome in outcomes])),
        }
        return batch, made

    def get_state(self) -> dict[str, Any]:
        return {"online_step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        if set(state) != {"online_step"}:
            raise UserError("the checkpoint is of a run with offline pairs; use a new --workdir")
        self._step = state["online_step"]

    def _fits(self, record: PreferenceRecord, rejected: str) -> bool:
        pair = dataclasses.replace(record, responses=(record.responses[0], Response(rejected)))
        return not misfit(tokenize(pair, Preference(0, 1), self._processor, 2).size, self._layout)
