"""The loop around the step: feed, log, checkpoint, stop and go on."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mmalign_jax.config import Config
from mmalign_jax.data.device import to_device
from mmalign_jax.errors import UserError
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.tree import LeafPath, union
from mmalign_jax.report.console import Console
from mmalign_jax.report.metrics import MetricsWriter
from mmalign_jax.training.checkpoint import Checkpoints, abstract_policy, abstract_state
from mmalign_jax.training.flops import Work, mfu, step_flops
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.optimizer import make_optimizer, make_schedule
from mmalign_jax.training.reference import Reference
from mmalign_jax.training.signals import StopRequest
from mmalign_jax.training.step import init_state, make_train_step, zero_gradients
from mmalign_jax.training.step_zero import MOST, largest_log_ratio
from mmalign_jax.training.trainable import Trainable, describe
from mmalign_jax.types import PairBatch, TrainState


@runtime_checkable
class Batches(Protocol):
    """Where steps get their rows: `data.loader.Loader`, or a maker that uses the current policy."""

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        """The next rows `[A, b, ...]` on the host, and metrics of their making. `params`: the policy's whole tree."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Trained:
    """How training ended: the policy's whole tree, and the name of the signal that stopped it early ("" when it is finished)."""

    params: dict
    step: int
    stopped_by: str


def train(
    config: Config,
    workdir: Path,
    mesh: Mesh,
    sizes: MllmConfig,
    loss: LossFunction,
    reference: Reference,
    load_params: Callable[[str, Callable[[LeafPath], bool]], dict],
    batches: Batches,
    console: Console,
    rows_per_epoch: int = 0,
) -> Trained:
    """Trains until `config.train.steps`, or goes on from the newest checkpoint of `workdir`.

    Args:
      reference: of this config, objective and rule.
      rows_per_epoch: rows of the data set, for what changes by epoch.
      load_params: reads leaves of the SFT model's tree, chosen by path, in the type given by name, in their shards: policy at step 0,
        and reference.

    Raises:
      UserError: a step's loss is not finite (with the step and the rows' record keys), or a checkpoint cannot be read.
    """
    optimizer, schedule = make_optimizer(config.optimizer, config.train.steps), make_schedule(config.optimizer, config.train.steps)
    objective = loss.objective
    kept = config.model.reference_dtype
    kept = loss.model.dtype if kept == "auto" else kept
    rule = Trainable.of(config, sizes)
    with jax.set_mesh(mesh):
        like, _ = rule.split(abstract_policy(sizes, mesh))
        step = make_train_step(loss, optimizer, schedule, follow=reference.follow, rows_per_epoch=rows_per_epoch)
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
        writer = MetricsWriter(
            workdir, config.report.tensorboard, config.report.wandb, dataclasses.asdict(config), enabled=jax.process_index() == 0
        )
        try:
            with writer:
                with console.phase("Loading reference and frozen parts"):
                    theirs, frozen = rule.split(load_params(kept, lambda path: reference.copied(path) or not rule.trains(path)))
                    moving = theirs if reference.follow else {}
                    # computed in every step, though all its leaves may be the policy's frozen ones
                    theirs = theirs if reference.kind in ("live", "adapter_off") else None
                # either a new state or a saved one: both at once would take twice the memory of parameters and moments
                if checkpoints.latest is None:
                    with console.phase("Loading policy"):
                        state = init_state(load_params("float32", rule.trains), frozen, optimizer, config.train.seed, objective, moving)
                else:
                    with console.phase("Reading the checkpoint"):
                        moving = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), moving)
                        state, position = checkpoints.restore(abstract_state(like, optimizer, mesh, objective, moving), frozen)
                    batches.set_state(position)
                    console.line(f"Going on from the checkpoint of step {int(state.step)}")
                start = int(state.step)
                writer.truncate_after(start)
                work = Work.of(objective, live_reference=reference.kind in ("live", "adapter_off", "ema"))
                with StopRequest() as stop:
                    cached = reference.kind == "cached"
                    run = _Run(config, rule, mesh, sizes, loss, step, batches, checkpoints, writer, console, stop, work, cached)
                    state = run(state, theirs, start)
        finally:
            checkpoints.close()
    name = "" if stop.signal is None or int(state.step) >= config.train.steps else stop.signal.name
    return Trained(union(state.params, state.frozen), int(state.step), name)


@dataclasses.dataclass
class _Run:
    """The loop's body with what it needs around it."""

    config: Config
    rule: Trainable
    mesh: Mesh
    sizes: MllmConfig
    loss: LossFunction
    step: Callable
    batches: Batches
    checkpoints: Checkpoints
    writer: MetricsWriter
    console: Console
    stop: StopRequest
    work: Work
    cached: bool

    def __call__(self, state: TrainState, reference: dict | None, start: int) -> TrainState:
        steps = self.config.train.steps
        if start >= steps:
            return state
        self.console.line(f"Training from step {start} to {steps}; the first step compiles")
        began, since, waited, flops, in_flight = time.monotonic(), start, 0.0, 0.0, None
        shapes: set[tuple[tuple[int, ...], ...]] = set()
        for number in range(start, steps):
            asked = time.monotonic()
            batch, made = self.batches.next_batch(union(state.params, state.frozen))
            waited += time.monotonic() - asked
            shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            flops += self._flops(batch)
            if shapes and shape not in shapes:
                self.console.line(f"Step {number + 1} has rows of a shape that is new, {batch.tokens.shape[-1]} slots: it compiles")
            shapes.add(shape)
            device_batch = to_device(batch, self.mesh)
            if number == 0 and self.cached:
                self._compare(state, device_batch)
            state, metrics = self.step(state, reference, device_batch)
            # the step before has ended by now: looking at it does not hold the device up
            if in_flight is not None:
                self._check_finite(*in_flight)
            in_flight = (number, batch, metrics)
            done = number + 1
            if number == 0:
                self._census(state, reference, device_batch, int(metrics["zero_gradients"]))
            if done % self.config.train.log_every == 0 or done == steps or number == 0:
                self._check_finite(*in_flight)
                values = {name: float(value) for name, value in jax.device_get(metrics).items()} | made
                seconds = (time.monotonic() - began) / (done - since)
                values |= self._speed(seconds, waited / (done - since), flops / (done - since))
                self.writer.write(done, values)
                self.console.status(done, steps, values)
                began, since, waited, flops = time.monotonic(), done, 0.0, 0.0
            stopping = self._stopping()
            if done % self.config.checkpoint.every == 0 or done == steps or stopping:
                self._check_finite(*in_flight)
                self.checkpoints.save(state, self.batches.get_state())
            if stopping and done < steps:
                name = "SIGTERM" if self.stop.signal is None else self.stop.signal.name
                self.console.line(f"{name}: saving at step {done}; the same command goes on from here")
                break
        return state

    def _stopping(self) -> bool:
        """Whether any process has been asked to stop: all must save at the same step."""
        mine = self.stop.signal is not None
        return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(mine)).any())

    def _flops(self, batch: PairBatch) -> float:
        """Of a step on these rows of this process, as if all processes had rows of this shape: they do."""
        rows = self.config.train.batch_size / (batch.tokens.shape[0] * batch.tokens.shape[1])
        return rows * step_flops(self.sizes, batch, work=self.work, freeze=self.rule.frozen)

    def _speed(self, seconds: float, waiting: float, flops: float) -> dict[str, float]:
        """Means over the steps since the last log, compilation of new shapes included."""
        rows = self.config.train.batch_size
        values = {"step_s": seconds, "pairs_per_s": rows / seconds, "input_wait_s": waiting}
        used = mfu(flops, seconds)
        return values if used is None else {**values, "mfu": used}

    def _check_finite(self, number: int, batch: PairBatch, metrics: dict) -> None:
        value = float(metrics["loss"])
        if not np.isfinite(value) or not np.isfinite(float(metrics["grad_norm"])):
            keys = ", ".join(f"{key:08x}" for key in np.asarray(batch.record_key).reshape(-1)[:16])
            raise UserError(
                f"step {number + 1}: loss {value}, gradient norm {float(metrics['grad_norm'])}. The state is not saved; the newest checkpoint "
                f"is from before. Lower config.optimizer.learning_rate, or look at the rows with record keys {keys}"
            )

    def _compare(self, state: TrainState, batch: PairBatch) -> None:
        """Warns when the policy, before its first step, is not what the reference's log-probs were computed from."""
        apart = largest_log_ratio(self.loss, state, batch)
        if not apart < MOST:
            self.console.line(
                f"WARNING: before the first step, policy and cached reference are up to {apart:.2g} nats an answer apart, more than {MOST:g}: they "
                "are computed differently. Use float32 (config.model.compute_dtype) or a live reference (config.reference.kind)"
            )

    def _census(self, state: TrainState, reference: dict | None, batch: PairBatch, silent: int) -> None:
        """Says which trainable tensors the first batch gives no gradient at all: usually a sign of a mistake."""
        trainable = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        total = trainable + sum(leaf.size for leaf in jax.tree.leaves(state.frozen))
        self.console.line(f"Trainable: {trainable:,} of {total:,} parameters: {describe(self.rule, self.sizes)}")
        if silent:
            names = zero_gradients(self.loss, state, reference, batch)
            self.console.line(f"WARNING: no gradient on the first batch reaches {silent} tensors; after it still {', '.join(names) or 'none'}")
