"""One optimizer step: image and prompt once, both answers behind them, policy and reference, gradient, update."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mmalign_jax import losses
from mmalign_jax.models.lora import is_factor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.tree import split, union
from mmalign_jax.pairs import views
from mmalign_jax.training.trainable import unreached
from mmalign_jax.types import BranchStats, PairBatch, TrainState

Metrics = dict[str, Float[Array, ""]]


def init_state(params: dict, frozen: dict, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. The optimizer's moments take the sharding of their parameters. Call it under the mesh."""
    return TrainState(jnp.int32(0), params, frozen, jax.jit(optimizer.init)(params), jax.random.key(seed))


def branch_logps(
    model: Mllm, params: dict, tower: Float[Array, "B F Z"], batch: PairBatch
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Sums of the log-probs of every answer of packed rows, and the answers' lengths.

    Args:
      tower: features of the rows' images before the projector.
    """
    features = model.project(params, tower)
    hidden = model.hidden(params, features, batch)
    head = model.head(params).astype(model.dtype)
    slots = {"prefix_slots": batch.prefix_slots, "answer_slots": batch.answer_slots, "softcap": model.config.decoder.final_softcap}
    logps, mask = losses.answer_logps(hidden, head, batch.tokens, batch.role, **slots)
    weight = batch.token_weight[:, batch.prefix_slots :].reshape(logps.shape)
    return losses.sums(logps, mask, weight)


@dataclasses.dataclass(frozen=True)
class LossFunction:
    """Policy parameters and a batch -> loss. Only what the objective declares is computed.

    Where nothing of the vision tower trains, its features are computed once and shared by policy and reference. A reference whose tree
    has no low-rank factors is the model with its adapter off.
    """

    model: Mllm
    objective: losses.Objective

    def __call__(
        self, params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean loss over the rows, and metrics.

        Args:
          params: the policy's trainable leaves. frozen: its other leaves, the reference's too.
          reference: the reference's own copies of trainable leaves (`trainable.Trainable`); None when the objective needs none.
          key: of the step; random views are drawn from it and the rows' record keys, once for policy and reference.
        """
        policy, fixed = union(params, frozen), "vision_tower" not in params
        with jax.named_scope("policy"):
            tower = self._tower(self.model, policy, batch, fixed)
            sums, lengths = branch_logps(self.model, policy, tower, batch)
        stats = BranchStats(policy=sums, lengths=lengths, margin=batch.margin)
        if self.objective.needs_other_image:
            other = self._other_image(batch, key)
            with jax.named_scope("policy_other_image"):
                other_tower = self._tower(self.model, policy, other, fixed)
                stats = dataclasses.replace(stats, policy_other_image=branch_logps(self.model, policy, other_tower, other)[0][:, 0])
        if self.objective.needs_reference:
            theirs = jax.lax.stop_gradient(union(reference, frozen))
            model = self.model if split(reference, is_factor)[0] else self.model.without_adapter()
            with jax.named_scope("reference"):
                tower = tower if fixed else self._tower(model, theirs, batch, fixed)
                stats = dataclasses.replace(stats, reference=branch_logps(model, theirs, tower, batch)[0])
                if self.objective.needs_other_image:
                    other_tower = other_tower if fixed else self._tower(model, theirs, other, fixed)
                    sums = branch_logps(model, theirs, other_tower, other)[0][:, 0]
                    stats = dataclasses.replace(stats, reference_other_image=sums)
        per_pair, metrics = self.objective(stats)
        return jnp.mean(per_pair), metrics

    @staticmethod
    def _tower(model: Mllm, params: dict, batch: PairBatch, fixed: bool) -> Float[Array, "B F Z"]:
        features = model.tower(params, batch.images, batch.patches)
        return jax.lax.stop_gradient(features) if fixed else features

    def _other_image(self, batch: PairBatch, key: Array) -> PairBatch:
        """The chosen answer under a small random crop of its image (mDPO's conditional term)."""
        keys = views.row_keys(key, batch.record_key, 0)
        extent = None if batch.patches is None else batch.patches.extent
        return batch.first_answers(1).with_images(views.random_resized_crop(batch.images, keys, extent=extent))


def make_train_step(
    loss: LossFunction, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, dict | None, PairBatch], tuple[TrainState, Metrics]]:
    """The step `(state, reference, batch [A, B, ...]) -> (state, metrics)`, jitted, its state donated.

    The A parts of the batch are computed one after another; gradients and metrics are their means: those of the whole batch.
    """

    def step(state: TrainState, reference: dict | None, batch: PairBatch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradient = jax.value_and_grad(loss, has_aux=True)

        def part(some: PairBatch):
            (value, metrics), grads = gradient(state.params, state.frozen, reference, some, key)
            return grads, {"loss": value, **metrics}

        parts = batch.tokens.shape[0]
        first = jax.tree.map(lambda x: x[0], batch)
        if parts == 1:
            grads, metrics = part(first)
        else:
            metric_shapes = jax.eval_shape(part, first)[1]
            total = (jax.tree.map(jnp.zeros_like, state.params), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metric_shapes))
            add = lambda total, some: (jax.tree.map(jnp.add, total, part(some)), None)  # noqa: E731
            total, _ = jax.lax.scan(add, total, batch)
            grads, metrics = jax.tree.map(lambda x: x / parts, total)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "zero_gradients": sum(silent.astype(jnp.int32) for silent in unreached(grads, state.params).values()),
            "learning_rate": schedule(state.step),
            "padding_fraction": jnp.mean(batch.role == 0, dtype=jnp.float32),
        }
        new = TrainState(state.step + 1, params, state.frozen, opt_state, state.key)
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def zero_gradients(loss: LossFunction, state: TrainState, reference: dict | None, batch: PairBatch) -> list[str]:
    """Names of trainable tensors whose gradient on this batch is exactly zero: parts that the loss cannot see."""

    @jax.jit
    def silent(params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array) -> dict:
        grads = jax.grad(lambda p: loss(p, frozen, reference, jax.tree.map(lambda x: x[0], batch), key)[0])(params)
        return unreached(grads, params)

    found = jax.device_get(silent(state.params, state.frozen, reference, batch, state.key))
    return [name for name, is_silent in found.items() if is_silent]
