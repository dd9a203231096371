"""The reference's log-probs, computed once: one sweep over the rows before training, which then has no reference parameters."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config
from mmalign_jax.data.cached_logps import KEY, CachedLogps
from mmalign_jax.data.device import process_slice, to_device
from mmalign_jax.data.features import RowFeatures
from mmalign_jax.data.loader import Extra, bucket_pass
from mmalign_jax.data.logps_writer import LogpsWriter
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.errors import UserError
from mmalign_jax.files import claimed
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.models.lora import is_factor
from mmalign_jax.report.console import Console
from mmalign_jax.training.branches import Side
from mmalign_jax.training.cache_key import data_key, differences, model_key, record_digests
from mmalign_jax.training.corrupted import corrupted
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.trainable import Trainable
from mmalign_jax.types import FIRST_ANSWER, PairBatch

Found = tuple[Int[Array, " B"], Int[Array, "B K"], Float[Array, "B K R"]]  # numbers of items, lengths of answers, log-probs


@dataclasses.dataclass(frozen=True)
class CachedReference:
    """Makes or finds the cache of a run. All processes call it; they share a file system.

    Args:
      directory: of the cache; runs with the same key may share it.
      policy: the model that training starts from.
      loss: says which answers, under which images.
      features: rows hold these in the place of pixels.
    """

    config: Config
    directory: Path
    policy: Pretrained
    loss: LossFunction
    console: Console
    features: RowFeatures | None = None

    def __call__(self, records: Records, plan: RowPlan, extras: Sequence[Extra] = ()) -> list[Extra]:
        """What the training loader adds to its rows. No parameter stays in memory.

        Args:
          extras: what else rows hold, for views that read it.

        Raises:
          UserError: the directory holds the log-probs of another reference, or of other rows; the message names each field.
          DataError: a file of the cache is damaged.
        """
        c = self.config
        with self.console.phase("Checking what the reference's log-probs depend on") as progress:
            digests = record_digests(records, c.data.workers, progress)
            key = model_key(self.policy, self._kept) | {"data": data_key(digests, plan, c.data)}
        found: list[Extra] = []
        sides: list[Side] = []
        for part in self._parts(key, plan.layout.answers):
            there = self._open(part, digests, records)
            if there is None or jax.process_count() > 1:
                self._sweep(part, digests, records, plan, extras, sides)
                there = self._open(part, digests, records)
            else:
                self.console.line(f"Reference log-probs{part.words}: those in {there.directory} are reused")
            found.append(there)
        return found

    def _parts(self, key: dict[str, Any], answers: int) -> "Iterator[_Part]":
        objective, view = self.loss.objective, self.loss.view
        yield _Part("answers", "", answers, lambda batch: batch, key | {"answers": answers})
        if objective.other_answers:
            count = objective.other_answers
            drawn = {"view": str(view)} | ({"seed": self.config.train.seed} if view.random else {})

            def under_view(batch: PairBatch) -> PairBatch:
                return corrupted(view, self.loss.model, batch.first_answers(count), jax.random.key(self.config.train.seed))

            yield _Part("other_image", " under corrupted images", count, under_view, key | {"answers": count} | drawn)

    @property
    def _kept(self) -> str:
        """The type of the reference's parameters: that in which a live reference is kept."""
        kept = self.config.model.reference_dtype
        return self.policy.model.dtype if kept == "auto" else kept

    def _open(self, part: "_Part", digests: np.ndarray, records: Records) -> CachedLogps | None:
        there = CachedLogps.open(self.directory / part.name)
        if there is not None and (differing := differences(there.key, part.key)):
            if there.key["data"]["content"] != part.key["data"]["content"]:
                differing.append(_first_record(there.records, digests, records))
            raise UserError(
                f"{there.directory / KEY}: the reference's log-probs that are kept there were computed from something else: "
                f"{'; '.join(differing)}. Delete {there.directory}, or choose another config.reference.cache"
            )
        return there

    def _sweep(
        self, part: "_Part", digests: np.ndarray, records: Records, plan: RowPlan, extras: Sequence[Extra], sides: list[Side]
    ) -> None:
        """Computes what is missing and puts the set in its place. The first process writes.

        Args:
          sides: the reference, once it has been read.
        """
        directory, first = self.directory / part.name, jax.process_index() == 0
        if not first:
            done = from_first(np.zeros(len(plan.items), bool))
            self._compute(part, done, records, plan, extras, sides, lambda *_: None)
            multihost_utils.sync_global_devices(f"mmalign_jax.cached_reference.{part.name}")
            return
        waiting = lambda: self.console.line(f"Another run computes {directory}; waiting for it")  # noqa: E731
        with claimed(directory, waiting):
            if self._open(part, digests, records) is None:
                writer = LogpsWriter(directory, part.key, (len(plan.items), part.answers))
                done = from_first(writer.done)
                if done.any():
                    self.console.line(f"Going on: the log-probs of {int(done.sum())} of {len(done)} rows are there")
                self._compute(part, done.copy(), records, plan, extras, sides, writer.add)
                writer.finish(digests)
            else:  # another run, or an earlier one of several processes, has made it
                self.console.line(f"Reference log-probs{part.words}: those in {directory} are reused")
                from_first(np.ones(len(plan.items), bool))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"mmalign_jax.cached_reference.{part.name}")

    def _compute(
        self,
        part: "_Part",
        done: Bool[np.ndarray, " items"],
        records: Records,
        plan: RowPlan,
        extras: Sequence[Extra],
        sides: list[Side],
        add: Callable[[int, np.ndarray, np.ndarray], None],
    ) -> None:
        """Gives the log-probs of every item that is not done, in the layouts of training."""
        if done.all():
            return
        c, mesh = self.config, self.policy.mesh
        if not sides:
            sides.append(self._side())
        rows = c.reference.batch_size or c.train.batch_size // c.train.accumulate
        rows = mesh_lib.batch_rows(mesh, rows)
        index, count = process_slice(mesh)
        options = {"batch_size": rows, "process_index": index, "process_count": count, "workers": c.data.workers, "extras": extras}
        options["features"] = self.features
        options["devices"] = mesh_lib.batch_divisor(mesh) // count
        run = jax.jit(part.program(sides[0].model))
        with self.console.phase(f"Computing the reference's log-probs{part.words}") as progress, jax.set_mesh(mesh):
            for bucket in plan.buckets:
                numbers = bucket.members[~done[bucket.members]]
                if not len(numbers):
                    continue
                for batch, own in bucket_pass(records, self.policy.processor, plan, numbers, **options):
                    found = run(sides[0].params, *to_device((batch, own), mesh, batch_axis=0))
                    for number, lengths, logps in zip(*jax.device_get(found), strict=True):
                        if number >= 0:
                            _check_finite(logps, lambda n=number: records[int(plan.items[n][0])].id)
                            done[number] = True
                            add(int(number), lengths, logps)
                    progress(int(done.sum()), len(done))

    def _side(self) -> Side:
        """The reference: the model that training starts from, without factors that are new."""
        rule = Trainable.of(self.config, self.policy.sizes)
        model = self.policy.model.without_adapter() if rule.adapter_off else self.policy.model
        with self.console.phase("Loading the reference"), jax.set_mesh(self.policy.mesh):
            return Side(model, self.policy.params(self._kept, lambda path: not (rule.adapter_off and is_factor(path))))


@dataclasses.dataclass(frozen=True)
class _Part:
    """A set of log-probs: its name among `cached_logps.FIELDS`, its words for a reader, answers a row, and how rows are seen."""

    name: str
    words: str
    answers: int
    seen: Callable[[PairBatch], PairBatch]
    key: dict[str, Any]

    def program(self, model: Any) -> Callable[[dict, PairBatch, Int[Array, " B"]], Found]:
        """(parameters, rows, their numbers) -> numbers, lengths and log-probs, whole in every process."""

        def run(params: dict, batch: PairBatch, numbers: Int[Array, " B"]) -> Found:
            rows, side = self.seen(batch), Side(model, params)
            logps = side.tokens(side.hidden(side.tower(rows), rows), rows).logps
            answer = FIRST_ANSWER + jnp.arange(rows.answers)
            lengths = jnp.sum(rows.by_answer(rows.role) == answer[:, None], axis=-1, dtype=jnp.int32)
            return jax.tree.map(lambda x: mesh_lib.constrain(x, *(None,) * x.ndim), (numbers, lengths, logps))

        return run


def from_first(done: Bool[np.ndarray, " items"]) -> Bool[np.ndarray, " items"]:
    """What the first process has."""
    if jax.process_count() == 1:
        return done
    return np.array(multihost_utils.broadcast_one_to_all(done))


def _check_finite(logps: np.ndarray, record_id: Callable[[], str]) -> None:
    if not np.isfinite(logps).all():
        raise UserError(f"record {record_id()}: the reference's log-probs are not finite; look at the row, or compute in float32")


def _first_record(kept: np.ndarray, now: np.ndarray, records: Records) -> str:
    """Names the first record that is not what it was."""
    count = min(len(kept), len(now))
    (differing,) = np.nonzero((kept[:count] != now[:count]).any(axis=1))
    if not len(differing):
        return f"the set had {len(kept)} records and has {len(now)}"
    return f"the first record that differs is number {int(differing[0])}, {records[int(differing[0])].id}"
