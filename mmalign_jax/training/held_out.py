"""Rewards of held-out pairs by the policy as it is: one mechanism for reward models and for preference objectives."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.data.device import process_slice, to_device
from mmalign_jax.data.features import RowFeatures
from mmalign_jax.data.layout import RowProcessor
from mmalign_jax.data.loader import Extra, bucket_pass
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.evaluation.held_out import Judged, source_of, summarise
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.types import PairBatch


class HeldOut:
    """The held-out rows of a run, and how they are computed. All processes call it."""

    def __init__(
        self,
        records: Records,
        processor: RowProcessor,
        plan: RowPlan,
        loss: LossFunction,
        mesh: Mesh,
        *,
        batch_size: int,
        workers: int,
        extras: Sequence[Extra] = (),
        features: RowFeatures | None = None,
    ):
        """
        Args:
          loss: of the objective's comparing term alone (`Objective.compares`).
          batch_size: rows at a time.
          extras: what else rows hold.
          features: rows hold these in the place of pixels.
        """
        self._records, self._processor, self._plan, self._mesh = records, processor, plan, mesh
        index, count = process_slice(mesh)
        rows = {"batch_size": mesh_lib.batch_rows(mesh, batch_size), "process_index": index, "process_count": count}
        self._options = rows | {"workers": workers, "extras": extras, "features": features, "devices": mesh_lib.batch_divisor(mesh) // count}
        self._run = jax.jit(functools.partial(_rewards, loss))

    def __call__(self, params: dict, frozen: dict, reference: dict | None, key: Array) -> dict[str, Any]:
        """What `evaluation.held_out.summarise` says of all pairs. Arguments as of `LossFunction.statistics`; call it under the mesh."""
        judged: dict[int, Judged] = {}
        for bucket in self._plan.buckets:
            for batch, own in bucket_pass(self._records, self._processor, self._plan, np.asarray(bucket.members), **self._options):
                found = jax.device_get(self._run(params, frozen, reference, *to_device((batch, own), self._mesh, batch_axis=0), key))
                for number, rewards, lengths in zip(*found, strict=True):
                    if number >= 0:
                        judged[int(number)] = self._judged(int(number), rewards, lengths)
        return summarise([judged[number] for number in sorted(judged)])

    def _judged(self, number: int, rewards: np.ndarray, lengths: np.ndarray) -> Judged:
        index, pref = map(int, self._plan.items[number])
        record = self._records[index]
        pair = lambda values: (float(values[0]), float(values[-1]))  # noqa: E731
        return Judged(record.id, source_of(record, pref), pair(rewards), pair(lengths))


def _rewards(
    loss: LossFunction, params: dict, frozen: dict, reference: dict | None, batch: PairBatch, numbers: Int[Array, " B"], key: Array
) -> tuple[Int[Array, " B"], Float[Array, "B 2"], Float[Array, "B K"]]:
    """The rows' numbers, rewards and lengths of answers, whole in every process."""
    stats = loss.statistics(params, frozen, reference, batch, key)
    found = (numbers, loss.objective.rewards(stats), stats.answers.lengths)
    return jax.tree.map(lambda x: mesh_lib.constrain(x, *(None,) * x.ndim), found)
