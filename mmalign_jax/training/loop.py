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
from mmalign_jax.data.device import on_device, to_device
from mmalign_jax.errors import UserError
from mmalign_jax.evaluation.held_out import metrics as held_out_metrics
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.remat import AUTO
from mmalign_jax.models.tree import LeafPath, split, union
from mmalign_jax.report.console import Console, duration
from mmalign_jax.report.metrics import MetricsWriter, read_metrics
from mmalign_jax.training.ahead import Compiler, Program
from mmalign_jax.training.checkpoint import Checkpoints, abstract_policy, abstract_state
from mmalign_jax.training.flops import Work, mfu, step_flops
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.memory import FittingStep, candidates, device_limit
from mmalign_jax.training.monitors import Monitor
from mmalign_jax.training.optimizer import make_optimizer, make_schedule
from mmalign_jax.training.profile import DIRECTORY as PROFILE
from mmalign_jax.training.profile import Profile
from mmalign_jax.training.reference import Reference
from mmalign_jax.training.signals import StopRequest
from mmalign_jax.training.step import init_state, make_copy, make_train_step, zero_gradients
from mmalign_jax.training.step_zero import check_samples, in_words, largest_log_ratio
from mmalign_jax.training.stopper import reason_to_stop
from mmalign_jax.training.trainable import Trainable, describe
from mmalign_jax.types import PairBatch, TrainState


@runtime_checkable
class Batches(Protocol):
    """Where steps get their rows: `data.loader.Loader`, or a maker that uses the current policy."""

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        """The next rows `[A, b, ...]` on the host, and metrics of their making. `params`: the whole tree of the policy, as it is or as it was up to
        `config.pairs.every` steps ago."""

    def begin(self) -> PairBatch | None:
        """Begins to make the next rows where they do not depend on the policy: what they will be on this process, as shapes and types."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Trained:
    """How training ended: the policy's whole tree, the name of the signal that stopped it early ("" when it is finished), and why it was
    finished before its last step ("" when it was not). `held_out`: what it measured of the held-out pairs at the end."""

    params: dict
    step: int
    stopped_by: str
    reason: str = ""
    held_out: dict[str, Any] | None = None


def train(
    config: Config,
    workdir: Path,
    mesh: Mesh,
    sizes: MllmConfig,
    loss: LossFunction,
    load_params: Callable[[str, Callable[[LeafPath], bool]], dict],
    batches: Batches,
    console: Console,
    rows_per_epoch: int = 0,
    monitor: Monitor | None = None,
    probe: Callable[[dict], dict[str, float]] | None = None,
    held_out: Callable[[int, TrainState, dict | None], dict[str, Any]] | None = None,
) -> Trained:
    """Trains until `config.train.steps`, or goes on from the newest checkpoint of `workdir`.

    Args:
      rows_per_epoch: rows of the data set, for what changes by epoch.
      monitor: measures every `config.monitor.every` steps.
      probe: scores of the policy's whole tree, asked for every `config.eval.probe_every` steps.
      held_out: `evaluation.held_out.summarise` of the held-out pairs after a step, from the state and the reference's parameters; asked for
        every `config.eval.holdout_every` steps and at the end.
      load_params: reads leaves of the SFT model's tree, chosen by path, in the type given by name, in their shards: policy at step 0,
        and reference.

    Raises:
      UserError: a step's loss is not finite (with the step and the rows' record keys), or a checkpoint cannot be read.
    """
    steps, updates = config.train.steps, config.train.updates
    optimizer, schedule = make_optimizer(config.optimizer, steps, updates), make_schedule(config.optimizer, steps)
    objective = loss.objective
    kept = config.model.reference_dtype
    kept = loss.model.dtype if kept == "auto" else kept
    rule = Trainable.of(config, sizes)
    reference = Reference.of(config, rule, objective)
    with jax.set_mesh(mesh), Compiler(mesh) as compiler:
        shapes = _Shapes.of(sizes, mesh, rule, reference, kept)
        sampler = shapes.params if config.pairs.every > 1 else {}
        like = abstract_state(shapes.params, optimizer, mesh, objective, shapes.moving, sampler)
        options = {"follow": reference.follow, "rows_per_epoch": rows_per_epoch, "updates": updates}
        if config.model.remat == AUTO:
            make = lambda remat: make_train_step(loss.with_remat(remat), optimizer, schedule, **options)  # noqa: E731
            limit = device_limit(mesh, config.model.memory_gib)
            step = Program(FittingStep(make, candidates(AUTO), limit, console.line, stopped=lambda: compiler.left))
        else:
            step = Program(make_train_step(loss, optimizer, schedule, **options))
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
        profile = Profile(workdir / PROFILE, config.train.profile)
        writer = MetricsWriter(
            workdir, config.report.tensorboard, config.report.wandb, dataclasses.asdict(config), enabled=jax.process_index() == 0
        )
        try:
            with writer:
                start = checkpoints.latest or 0
                history = [line for line in read_metrics(workdir) if line["step"] <= start]
                measures = _Measures(config, None if monitor is None else monitor.jitted(), probe, history, held_out)
                # what can be wrong is told before anything long begins
                load_params(kept, _none)
                if checkpoints.latest is not None:
                    batches.set_state(checkpoints.position(like))
                if start < steps and not measures.reason and (rows := batches.begin()) is not None:
                    theirs = shapes.theirs if reference.kind in ("live", "adapter_off") else None
                    step.begin(compiler, dataclasses.replace(like, frozen=shapes.frozen), theirs, on_device(rows, mesh))
                    console.line("Compiling the step beside what follows")
                with console.phase("Loading reference and frozen parts"):
                    theirs, frozen = rule.split(load_params(kept, lambda path: reference.copied(path) or not rule.trains(path)))
                    # small shares of small moves are lost in bfloat16
                    moving = jax.tree.map(lambda leaf: leaf.astype("float32"), theirs) if reference.follow else {}
                    # computed in every step, though all its leaves may be the policy's frozen ones
                    theirs = theirs if reference.kind in ("live", "adapter_off") else None
                # either a new state or a saved one: both at once would take twice the memory of parameters and moments
                if checkpoints.latest is None:
                    with console.phase("Loading policy"):
                        state = init_state(load_params("float32", rule.trains), frozen, optimizer, config.train.seed, objective, moving)
                else:
                    del moving
                    with console.phase("Reading the checkpoint"):
                        state = checkpoints.restore(like, frozen)
                    console.line(f"Going on from the checkpoint of step {start}")
                writer.truncate_after(start)
                how = {"updates": updates, "older_policy": bool(sampler)}
                work = Work.of(objective, live_reference=reference.kind in ("live", "adapter_off", "ema"), **how)
                with StopRequest() as stop:
                    run = _Run(config, rule, mesh, sizes, loss, step, batches, checkpoints, writer, console, stop, work, measures, profile)
                    state = run(state, theirs, start)
                ended = int(state.step) >= config.train.steps or measures.reason
                held = held_out(int(state.step), state, theirs) if held_out is not None and ended else None
        finally:
            profile.close()
            checkpoints.close()
    name = "" if stop.signal is None or ended else stop.signal.name
    reason = measures.reason if int(state.step) < config.train.steps else ""
    return Trained(union(state.params, state.frozen), int(state.step), name, reason, held)


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """What a run holds, before it is read: parts of the policy's tree as shapes, types and shardings."""

    params: dict  # trainable
    frozen: dict
    theirs: dict  # of the reference
    moving: dict  # of one that follows the policy

    @classmethod
    def of(cls, sizes: MllmConfig, mesh: Mesh, rule: Trainable, reference: Reference, kept: str) -> "_Shapes":
        """Args: kept: type of what does not train."""
        params, frozen = rule.split(abstract_policy(sizes, mesh))
        in_kept = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.dtype(kept), sharding=leaf.sharding), tree)  # noqa: E731
        copied, _ = split(params, reference.copied)
        return cls(params, in_kept(frozen), in_kept(copied), copied if reference.follow else {})


def _none(path: LeafPath) -> bool:
    """Wants no leaf: names, shapes and files are checked all the same."""
    return False


@dataclasses.dataclass
class _Run:
    """The loop's body with what it needs around it."""

    config: Config
    rule: Trainable
    mesh: Mesh
    sizes: MllmConfig
    loss: LossFunction
    step: Program
    batches: Batches
    checkpoints: Checkpoints
    writer: MetricsWriter
    console: Console
    stop: StopRequest
    work: Work
    measures: "_Measures"
    profile: Profile

    def __call__(self, state: TrainState, reference: dict | None, start: int) -> TrainState:
        steps, measures = self.config.train.steps, self.measures
        if start >= steps or measures.reason:
            return state
        self.console.line(f"Training from step {start} to {steps}")
        began, since, waited, flops, in_flight = time.monotonic(), start, 0.0, 0.0, None
        shapes: set[tuple[tuple[int, ...], ...]] = set()
        compared = False  # what the sampler computed with what training does
        every, copy = self.config.pairs.every, make_copy()
        for number in range(start, steps):
            asked = time.monotonic()
            if every > 1 and number % every == 0:
                state = dataclasses.replace(state, sampler=copy(state.sampler, state.params))
            batch, made = self.batches.next_batch(union(state.sampler or state.params, state.frozen))
            made |= {"pairs/policy_age": float(number % every)} if every > 1 else {}
            waited += time.monotonic() - asked
            drawn, batch = batch, dataclasses.replace(batch, drawn_logps=None)
            shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            flops += self._flops(batch)
            if shapes and shape not in shapes:
                self.console.line(f"Step {number + 1} has rows of a shape that is new, {batch.tokens.shape[-1]} slots: it compiles")
            shapes.add(shape)
            device_batch = to_device(batch, self.mesh)
            extra = measures.before(number, state, reference, device_batch)
            if number == 0 and batch.reference_logps is not None and (problem := in_words(largest_log_ratio(self.loss, state, device_batch))):
                self.console.line(f"WARNING: {problem}")
            if not compared and drawn.drawn_logps is not None and not np.isnan(drawn.drawn_logps).all():
                check_samples(self.loss, dataclasses.replace(state, params=state.sampler or state.params), to_device(drawn, self.mesh))
                compared = True
            if number == start:
                self._wait_for_program(state, reference, device_batch, waited)
            self.profile.before_step()
            state, metrics = self.step(state, reference, device_batch)
            if self.profile.after_step(metrics):
                self.console.line(f"Trace of {self.config.train.profile} steps: {self.profile.directory}")
            # the step before has ended by now: looking at it does not hold the device up
            if in_flight is not None:
                self._check_finite(*in_flight)
            in_flight = (number, batch, metrics)
            done = number + 1
            if number == 0:
                self._census(state, reference, device_batch, int(metrics["zero_gradients"]))
            extra |= measures.after(done, state, reference)
            if done % self.config.train.log_every == 0 or done == steps or number == 0 or extra:
                self._check_finite(*in_flight)
                values = {name: float(value) for name, value in jax.device_get(metrics).items()} | made | extra
                seconds = (time.monotonic() - began) / (done - since)
                values |= self._speed(seconds, waited / (done - since), flops / (done - since))
                self.writer.write(done, values)
                measures.note(done, values)
                self.console.status(done, steps, values)
                began, since, waited, flops = time.monotonic(), done, 0.0, 0.0
            stopping = self._stopping() or bool(measures.reason)
            if done % self.config.checkpoint.every == 0 or done == steps or stopping:
                self._check_finite(*in_flight)
                self.checkpoints.save(state, self.batches.get_state())
            if measures.reason and done < steps:
                self.console.line(f"Stopped at step {done} of {steps}: {measures.reason}")
                break
            if stopping and done < steps:
                name = "SIGTERM" if self.stop.signal is None else self.stop.signal.name
                self.console.line(f"{name}: saving at step {done}; the same command goes on from here")
                break
        return state

    def _wait_for_program(self, state: TrainState, reference: dict | None, batch: PairBatch, for_rows: float) -> None:
        """Says what the start took that does not show above."""
        if (compiled := self.step.wait(state, reference, batch)) is None:
            self.console.line("The first step compiles")
            return
        took, waited = map(duration, compiled)
        self.console.line(f"The step was compiled in {took}; waited {waited} of it here, and {duration(for_rows)} for the first rows")

    def _stopping(self) -> bool:
        """Whether any process has been asked to stop: all must save at the same step."""
        mine = self.stop.signal is not None
        return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(mine)).any())

    def _flops(self, batch: PairBatch) -> float:
        """Of a step on these rows of this process, as if all processes had rows of this shape: they do."""
        processes = self.config.train.batch_size / batch.record_key.size
        return processes * step_flops(self.sizes, batch, work=self.work, freeze=self.rule.frozen)

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

    def _census(self, state: TrainState, reference: dict | None, batch: PairBatch, silent: int) -> None:
        """Says which trainable tensors the first batch gives no gradient at all: usually a sign of a mistake."""
        trainable = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        total = trainable + sum(leaf.size for leaf in jax.tree.leaves(state.frozen))
        self.console.line(f"Trainable: {trainable:,} of {total:,} parameters: {describe(self.rule, self.sizes)}")
        if silent:
            names = zero_gradients(self.loss, state, reference, batch)
            self.console.line(f"WARNING: no gradient on the first batch reaches {silent} tensors; after it still {', '.join(names) or 'none'}")


class _Measures:
    """What is measured now and then beside the step, and whether that is a reason to stop."""

    def __init__(
        self,
        config: Config,
        monitor: Callable | None,
        probe: Callable[[dict], dict[str, float]] | None,
        history: list[dict[str, float]],
        held_out: Callable[[int, TrainState, dict | None], dict[str, Any]] | None,
    ):
        self._config, self._monitor, self._probe, self._history, self._held_out = config, monitor, probe, history, held_out
        self.reason = reason_to_stop(history, config.stop)

    def before(self, number: int, state: TrainState, reference: dict | None, batch: PairBatch) -> dict[str, float]:
        """What the monitor says of the rows of step `number`, counted from 0, before they are trained on."""
        every = self._config.monitor.every
        if self._monitor is None or not 0 < every <= self._config.train.steps or number % every:
            return {}
        theirs = state.reference or None if reference is None else reference
        found = self._monitor(state.params, state.frozen, theirs, batch, jax.random.fold_in(state.key, number))
        return {name: float(value) for name, value in jax.device_get(found).items()}

    def after(self, done: int, state: TrainState, reference: dict | None) -> dict[str, float]:
        """What the probe, and the held-out pairs, say after `done` steps."""
        found: dict[str, float] = {}
        if self._probe is not None and _due(done, self._config.eval.probe_every):
            found |= {f"probe/{name}": value for name, value in self._probe(union(state.params, state.frozen)).items()}
        if self._held_out is not None and (done == self._config.train.steps or _due(done, self._config.eval.holdout_every)):
            found |= held_out_metrics(self._held_out(done, state, reference))
        return found

    def note(self, done: int, values: dict[str, float]) -> None:
        self._history.append({"step": done, **values})
        self.reason = reason_to_stop(self._history, self._config.stop)


def _due(done: int, every: int) -> bool:
    return bool(every) and done % every == 0
