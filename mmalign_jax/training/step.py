"""One optimizer step: image and prompt once, both answers behind them, policy and reference, gradient, update."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mmalign_jax import losses
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs import views
from mmalign_jax.types import BranchStats, PairBatch, TrainState

Metrics = dict[str, Float[Array, ""]]


def split_params(params: dict, freeze: tuple[str, ...]) -> tuple[dict, dict]:
    """(trainable, frozen): the parts of the tree, apart."""
    return {k: v for k, v in params.items() if k not in freeze}, {k: v for k, v in params.items() if k in freeze}


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

    Where the vision tower is frozen, its features are computed once and shared by policy and reference.
    """

    model: Mllm
    objective: losses.Objective

    def __call__(
        self, params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean loss over the rows, and metrics.

        Args:
          params: the policy's trainable parts. frozen: its other parts, the reference's too.
          reference: the reference's own copies of the trainable parts; None when the objective needs none.
          key: of the step; random views are drawn from it and the rows' record keys, once for policy and reference.
        """
        policy = {**params, **frozen}
        with jax.named_scope("policy"):
            tower = self._tower(policy, batch, frozen)
            sums, lengths = branch_logps(self.model, policy, tower, batch)
        stats = BranchStats(policy=sums, lengths=lengths, margin=batch.margin)
        if self.objective.needs_other_image:
            other = self._other_image(batch, key)
            with jax.named_scope("policy_other_image"):
                other_tower = self._tower(policy, other, frozen)
                stats = dataclasses.replace(stats, policy_other_image=branch_logps(self.model, policy, other_tower, other)[0][:, 0])
        if self.objective.needs_reference:
            theirs = jax.lax.stop_gradient({**reference, **frozen})
            with jax.named_scope("reference"):
                tower = tower if "vision_tower" in frozen else self._tower(theirs, batch, frozen)
                stats = dataclasses.replace(stats, reference=branch_logps(self.model, theirs, tower, batch)[0])
                if self.objective.needs_other_image:
                    other_tower = other_tower if "vision_tower" in frozen else self._tower(theirs, other, frozen)
                    sums = branch_logps(self.model, theirs, other_tower, other)[0][:, 0]
                    stats = dataclasses.replace(stats, reference_other_image=sums)
        per_pair, metrics = self.objective(stats)
        return jnp.mean(per_pair), metrics

    def _tower(self, params: dict, batch: PairBatch, frozen: dict) -> Float[Array, "B F Z"]:
        features = self.model.tower(params, batch.images, batch.patches)
        return jax.lax.stop_gradient(features) if "vision_tower" in frozen else features

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
            "zero_gradients": sum(jnp.all(g == 0).astype(jnp.int32) for g in jax.tree.leaves(grads)),
            "learning_rate": schedule(state.step),
            "padding_fraction": jnp.mean(batch.role == 0, dtype=jnp.float32),
        }
        new = TrainState(state.step + 1, params, state.frozen, opt_state, state.key)
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def zero_gradients(loss: LossFunction, state: TrainState, reference: dict | None, batch: PairBatch) -> list[str]:
    """Names of trainable tensors whose gradient on this batch is exactly zero: parts that the loss cannot see."""

    @jax.jit
    def largest(params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array) -> dict:
        grads = jax.grad(lambda p: loss(p, frozen, reference, jax.tree.map(lambda x: x[0], batch), key)[0])(params)
        return jax.tree.map(lambda g: jnp.max(jnp.abs(g)), grads)

    sizes = jax.tree_util.tree_leaves_with_path(jax.device_get(largest(state.params, state.frozen, reference, batch, state.key)))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, size in sizes if size == 0.0]
