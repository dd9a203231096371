"""Training steps of a tiny model on a family's rows, with everything that a run puts around them: plan, loader, mesh, state."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from mmalign_jax import losses
from mmalign_jax.config import DataConfig
from mmalign_jax.data.device import process_slice, to_device
from mmalign_jax.data.loader import Loader, make_loader
from mmalign_jax.data.plan import RowPlan, plan_rows
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.training.checkpoint import abstract_policy, abstract_state
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.step import init_state, make_train_step
from mmalign_jax.training.trainable import Trainable
from mmalign_jax.types import PairBatch, Part, PreferenceRecord, TrainState

RULE = Trainable(frozenset({"vision_tower"}))

# a row of text has no other picture: its margin is 0, and the sign of it a matter of rounding
SIGNS_OF_ROUNDING = {"rewards/accuracies_image"}


def copies(records: Sequence[PreferenceRecord], count: int) -> list[PreferenceRecord]:
    """So many rows, each with a name of its own, which views and order are drawn from, and with its number in the prompt."""

    def numbered(record: PreferenceRecord, number: int) -> PreferenceRecord:
        last = record.turns[-1]
        turn = dataclasses.replace(last, parts=(*last.parts, Part(text=f" {number}")))
        return dataclasses.replace(record, id=f"{record.id} {number}", turns=(*record.turns[:-1], turn))

    return [numbered(records[number % len(records)], number) for number in range(count)]


class Steps:
    """Of all but the tower, against a reference that is not the policy.

    Momentum, because its state is a plain sum of gradients: what differs in a rounding stays so, where Adam's first steps would make a
    whole step of it. Everything is a function of the arguments; compiled steps are kept, states are not.

    Args:
      objective: views, where it has some, are drawn anew in every epoch.
      buckets: most shapes of rows, where pictures have any size; elsewhere there is one.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        records: Sequence[PreferenceRecord],
        mesh: jax.sharding.Mesh,
        *,
        objective: str = "mdpo",
        buckets: int = 2,
        rate: float = 0.01,
    ):
        self.mesh, self.records, self.rate = mesh, records, rate
        self.policy = Pretrained.read(directory, mesh, "float32")
        self.buckets = buckets if self.policy.processor.pictures.needs_size else 1
        self._schedule = optax.linear_schedule(rate, 0.0, 100)
        self._optimizer = optax.sgd(self._schedule, momentum=0.9)
        self._loss = LossFunction(self.policy.model, losses.build(objective, beta=0.1), redraw_views=True)
        self._compiled: dict[Any, Callable] = {}

    @functools.cached_property
    def plan(self) -> RowPlan:
        return plan_rows(self.records, self.policy.processor, DataConfig(buckets=self.buckets, workers=0), answers=2)

    def loader(self, batch_size: int, accumulate: int) -> Loader:
        index, count = process_slice(self.mesh)
        options = {"batch_size": batch_size, "accumulate": accumulate, "seed": 1, "process_index": index, "process_count": count, "workers": 0}
        return make_loader(self.records, self.policy.processor, self.plan, **options)

    def start(self) -> TrainState:
        """The state before the first step, in arrays of its own: a step takes them away."""
        with jax.set_mesh(self.mesh):
            return init_state(self.policy.params(wanted=RULE.trains), self.frozen(), self._optimizer, 3, self._loss.objective)

    def abstract(self) -> TrainState:
        with jax.set_mesh(self.mesh):
            like, _ = RULE.split(abstract_policy(self.policy.sizes, self.mesh))
            return abstract_state(like, self._optimizer, self.mesh, self._loss.objective)

    def frozen(self) -> dict:
        return self.policy.params(wanted=lambda path: not RULE.trains(path))

    @functools.cached_property
    def reference(self) -> dict:
        with jax.set_mesh(self.mesh):
            return jax.tree.map(lambda x: x * np.float32(1.01), self.policy.params(wanted=RULE.trains))

    def __call__(self, state: TrainState, batch: PairBatch) -> tuple[TrainState, dict[str, float]]:
        """One step on rows `[A, b, ...]` of this process."""
        shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        with jax.set_mesh(self.mesh):
            placed = to_device(batch, self.mesh)
            if shape not in self._compiled:
                step = make_train_step(self._loss, self._optimizer, self._schedule, rows_per_epoch=len(self.records))
                # most of the time would be XLA's, whose optimisations are of no use to models this small
                options = {"xla_backend_optimization_level": 0}
                self._compiled[shape] = step.lower(state, self.reference, placed).compile(compiler_options=options)
            state, metrics = self._compiled[shape](state, self.reference, placed)
        return state, {name: float(value) for name, value in jax.device_get(metrics).items()}


def whole(batch: PairBatch) -> PairBatch:
    """`[A, b, ...]` -> `[1, A b, ...]`."""
    return jax.tree.map(lambda x: x.reshape(1, math.prod(x.shape[:2]), *x.shape[2:]), batch)
