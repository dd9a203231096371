"""One optimizer step: image and prompt once, all answers behind them, policy and reference, gradient, update."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mmalign_jax.losses import BranchStats, Need, Objective
from mmalign_jax.training.loss import LossFunction, Metrics, Moment
from mmalign_jax.training.trainable import unreached
from mmalign_jax.types import PairBatch, TrainState


@dataclasses.dataclass(frozen=True)
class Follow:
    """A reference that follows the policy (TR-DPO, arXiv 2404.09656): every `every` steps it becomes `share` of the policy and the rest of itself."""

    share: float
    every: int

    def __call__(self, reference: dict, params: dict, step: Int[Array, ""]) -> dict:
        """The reference after step number `step`, counted from 1. It keeps its type."""

        def moved(theirs: Array, ours: Array) -> Array:
            new = self.share * ours.astype(jnp.float32) + (1 - self.share) * theirs.astype(jnp.float32)
            return new.astype(theirs.dtype)

        return jax.lax.cond(step % self.every == 0, lambda: jax.tree.map(moved, reference, params), lambda: reference)


def init_state(
    params: dict,
    frozen: dict,
    optimizer: optax.GradientTransformation,
    seed: int,
    objective: Objective | None = None,
    reference: dict | None = None,
) -> TrainState:
    """The state before the first step. The optimizer's moments take the sharding of their parameters. Call it under the mesh.

    Args:
      objective: whose own state is part of it.
      reference: where it follows the policy.
    """
    carried = {} if objective is None else objective.initial_state()
    return TrainState(jnp.int32(0), params, frozen, jax.jit(optimizer.init)(params), jax.random.key(seed), carried, reference or {})


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    follow: Follow | None = None,
    rows_per_epoch: int = 0,
    updates: int = 1,
) -> Callable[[TrainState, dict | None, PairBatch], tuple[TrainState, Metrics]]:
    """The step `(state, reference, batch [A, B, ...]) -> (state, metrics)`, jitted, its state donated.

    The A parts of the batch are computed one after another; gradients and metrics are their means: those of the whole batch. Where the
    objective needs statistics over all rows, the parts are computed once more without gradient, before.

    Args:
      follow: the reference is in the state, and moves; the argument is None then.
      rows_per_epoch: rows of the data set, for what changes by epoch; 0: everything is one epoch.
      updates: the optimizer moves the policy so many times on the same rows; metrics are means over the updates.
    """

    def step(state: TrainState, reference: dict | None, batch: PairBatch) -> tuple[TrainState, Metrics]:
        epoch = state.step * batch.record_key.size // rows_per_epoch if rows_per_epoch else jnp.int32(0)
        reference = state.reference if follow is not None else reference
        prepared = loss.prepared(batch)
        if Need.SAMPLED in loss.objective.needs and (updates > 1 or state.sampler):
            prepared = loss.with_drawn(state.sampler or state.params, state.frozen, prepared)

        def update(carry: tuple[dict, optax.OptState, dict], _: None) -> tuple[tuple[dict, optax.OptState, dict], Metrics]:
            params, opt_state, carried = carry
            moment = Moment(state.step, epoch, carried)
            of = lambda params, some: loss.statistics(params, state.frozen, reference, some, state.key, moment)  # noqa: E731
            grads, metrics, carried = _gradient(loss.objective, of, params, prepared, moment)
            with jax.named_scope("optimizer"):
                moves, opt_state = optimizer.update(grads, opt_state, params)
                moved = optax.apply_updates(params, moves)
            silent = sum(silent.astype(jnp.int32) for silent in unreached(grads, params).values())
            return (moved, opt_state, carried), {**metrics, "grad_norm": optax.tree.norm(grads), "zero_gradients": silent}

        carry = (state.params, state.opt_state, state.objective)
        if updates == 1:
            (params, opt_state, carried), metrics = update(carry, None)
        else:
            (params, opt_state, carried), by_update = jax.lax.scan(update, carry, None, length=updates)
            metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), by_update) | {"zero_gradients": by_update["zero_gradients"][0]}
        metrics |= {"learning_rate": schedule(state.step), "padding_fraction": jnp.mean(batch.role == 0, dtype=jnp.float32)}
        moved = state.reference if follow is None else follow(state.reference, params, state.step + 1)
        return TrainState(state.step + 1, params, state.frozen, opt_state, state.key, carried, moved, state.sampler), metrics

    return jax.jit(step, donate_argnums=0)


def make_copy() -> Callable[[dict, dict], dict]:
    """`(old, params) -> copy of params`, jitted. The copy takes the place of `old`, a copy made before, or {}: the step, which gives the buffers of
    its state away, may then have `params`."""
    return jax.jit(lambda old, params: jax.tree.map(jnp.copy, params), donate_argnums=0, keep_unused=True)


Of = Callable[[dict, PairBatch], BranchStats]


def _gradient(objective: Objective, of: Of, params: dict, batch: PairBatch, moment: Moment) -> tuple[dict, Metrics, dict]:
    """(gradient, metrics, the objective's state after the step), over all parts of the batch."""

    def mean(params: dict, some: PairBatch) -> tuple[Float[Array, ""], tuple[Metrics, dict]]:
        stats = of(params, some)
        with jax.named_scope("loss"):
            per_pair, metrics = objective(stats)
            value = jnp.mean(per_pair)
            return value, ({"loss": value, **metrics}, objective.next_state(stats))

    def part(some: PairBatch) -> tuple[dict, Metrics, dict]:
        (_, (metrics, carried)), grads = jax.value_and_grad(mean, has_aux=True)(params, some)
        return grads, metrics, carried

    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        return part(first)
    if Need.BATCH in objective.needs:
        return _over_all_rows(objective, of, params, batch)
    grads, metrics = _mean_over_parts(lambda some: part(some)[:2], params, batch, first)
    return grads, metrics, moment.objective


def _over_all_rows(objective: Objective, of: Of, params: dict, batch: PairBatch) -> tuple[dict, Metrics, dict]:
    """The gradient where a row's loss depends on all rows: first their statistics, and what the loss asks of each, then its gradient by part."""
    _, by_part = jax.lax.scan(lambda _, some: (None, of(params, some)), None, batch)
    shared = ("state", "epoch", "key")  # the same for all rows
    alike = {name: jax.tree.map(lambda x: x[0], getattr(by_part, name)) for name in shared}
    rows = dataclasses.replace(by_part, **dict.fromkeys(shared))
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

    def mean(rows: BranchStats) -> tuple[Float[Array, ""], Metrics]:
        per_pair, metrics = objective(dataclasses.replace(rows, **alike))
        value = jnp.mean(per_pair)
        return value, {"loss": value, **metrics}

    asked, metrics = jax.grad(mean, has_aux=True, allow_int=True)(whole)
    asked = jax.tree.map(lambda g, x: g.reshape(x.shape) if g.dtype == x.dtype else jnp.zeros(x.shape, jnp.float32), asked, rows)

    def surrogate(params: dict, some: PairBatch, asked: BranchStats) -> Float[Array, ""]:
        """A number whose gradient is that of the loss."""
        rows = dataclasses.replace(of(params, some), **dict.fromkeys(shared))
        terms = jax.tree.map(lambda g, x: jnp.sum(g * x) if jnp.issubdtype(x.dtype, jnp.floating) else 0.0, asked, rows)
        return sum(jax.tree.leaves(terms))

    def add(total: dict, some: tuple[PairBatch, BranchStats]) -> tuple[dict, None]:
        return jax.tree.map(jnp.add, total, jax.grad(surrogate)(params, *some)), None

    grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (batch, asked))
    return grads, metrics, objective.next_state(dataclasses.replace(whole, **alike))


def _mean_over_parts(part: Callable, params: dict, batch: PairBatch, first: PairBatch) -> tuple[dict, Metrics]:
    shapes = jax.eval_shape(part, first)[1]
    total = (jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    total, _ = jax.lax.scan(lambda total, some: (jax.tree.map(jnp.add, total, part(some)), None), total, batch)
    return jax.tree.map(lambda x: x / batch.tokens.shape[0], total)


def zero_gradients(loss: LossFunction, state: TrainState, reference: dict | None, batch: PairBatch) -> list[str]:
    """Names of trainable tensors whose gradient on this batch is exactly zero: parts that the loss cannot see."""

    @jax.jit
    def silent(params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array) -> dict:
        first = jax.tree.map(lambda x: x[0], loss.prepared(batch))
        grads = jax.grad(lambda p: loss(p, frozen, reference, first, key)[0])(params)
        return unreached(grads, params)

    found = jax.device_get(silent(state.params, state.frozen, state.reference or None if reference is None else reference, batch, state.key))
    return [name for name, is_silent in found.items() if is_silent]
