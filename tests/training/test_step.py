"""One optimizer step: what changes, what does not, where the state goes, and step 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.checkpoints import tiny_llava
from helpers.steps import SIGNS_OF_ROUNDING
from helpers.tiny import FROZEN_TOWER, MIXED, Tiny, batch_of, parts, quick_jit

from mmalign_jax import losses
from mmalign_jax.config import OptimizerConfig
from mmalign_jax.data.device import to_device
from mmalign_jax.mesh import make_mesh
from mmalign_jax.training.loss import LossFunction, Moment
from mmalign_jax.training.optimizer import make_optimizer, make_schedule
from mmalign_jax.training.step import init_state, make_train_step
from mmalign_jax.types import PAD

RATE = 0.05
LOG2 = np.float32(np.log(2))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def batch(tiny):
    return batch_of(MIXED, tiny.processor)


class Step:
    """A step of mDPO by plain gradient descent, compiled once, with a tower that is frozen."""

    def __init__(self, tiny, batch):
        self.tiny, self.batch = tiny, batch
        schedule = optax.linear_schedule(RATE, 0.0, 10)
        optimizer = optax.sgd(schedule)
        self._init = lambda params, frozen: init_state(params, frozen, optimizer, seed=3)
        step = make_train_step(LossFunction(tiny.model, losses.build("mdpo", beta=0.1)), optimizer, schedule)
        # a second call with arrays of another type or sharding than the first would be refused
        self._run = step.lower(self.state(), self.reference(), batch).compile(compiler_options={"xla_backend_optimization_level": 0})

    def state(self):
        """The policy at step 0, in arrays of its own: they are given away."""
        return self._init(*FROZEN_TOWER.split(jax.tree.map(jnp.copy, self.tiny.params)))

    def reference(self):
        return FROZEN_TOWER.split(self.tiny.params)[0]

    def __call__(self, state, reference=None):
        return self._run(state, self.reference() if reference is None else reference, self.batch)


@pytest.fixture(scope="module")
def step(tiny, batch):
    return Step(tiny, parts(batch))


@pytest.fixture(scope="module")
def first(step):
    """The first step: state before (copied), state after, metrics."""
    state = step.state()
    before = jax.tree.map(np.array, (state.params, state.frozen))
    after, metrics = step(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.step, state.key)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(step.reference()))
    return before, jax.device_get((after.params, after.frozen)), jax.device_get(metrics), int(after.step)


def test_step_0_is_log_2_and_rewards_are_0(first):
    _, _, metrics, _ = first
    for term in ("text", "image", "anchor"):
        np.testing.assert_allclose(metrics[f"loss/{term}"], LOG2, rtol=1e-6, err_msg=term)
    for name in ("chosen", "rejected", "margins", "chosen_other_image"):
        # log-probs of about -60 from two programs: the policy's also keeps what its gradient needs
        np.testing.assert_allclose(metrics[f"rewards/{name}"], 0.0, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(metrics["loss"], 3 * LOG2, rtol=1e-6)
    # the crop is another picture, and one that policy and reference share
    assert abs(metrics["logps/chosen"] - metrics["logps/chosen_other_image"]) > 0.01


def test_frozen_parts_stay_and_every_trained_tensor_moves(first):
    (params, frozen), (new_params, new_frozen), _, _ = first
    assert set(params) == {"projector", "decoder"} and set(frozen) == {"vision_tower"}
    jax.tree.map(np.testing.assert_array_equal, frozen, new_frozen)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, new_params)
    assert [path for path, has in jax.tree_util.tree_leaves_with_path(moved) if not has] == []


def test_metrics_of_the_step(first, batch):
    (params, _), (new_params, _), metrics, number = first
    assert number == 1
    assert metrics["zero_gradients"] == 0
    np.testing.assert_allclose(metrics["learning_rate"], RATE)
    np.testing.assert_allclose(metrics["padding_fraction"], np.mean(np.asarray(batch.role) == PAD), rtol=1e-6)
    moved = np.sqrt(sum(np.sum(np.square(a - b)) for a, b in zip(jax.tree.leaves(new_params), jax.tree.leaves(params), strict=True)))
    np.testing.assert_allclose(metrics["grad_norm"], moved / RATE, rtol=1e-4)


def test_steps_lower_the_loss_and_keep_the_crops(step):
    state, seen = step.state(), []
    for _ in range(6):
        state, metrics = step(state)
        seen.append(jax.device_get(metrics))
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.1
    assert seen[-1]["rewards/margins"] > 0
    np.testing.assert_allclose([m["learning_rate"] for m in seen], RATE * (1 - np.arange(6) / 10), rtol=1e-5)


@pytest.mark.nightly
def test_crops_depend_on_the_seed_and_by_choice_on_the_epoch(step, first):
    """With a policy that stays, the corrupted picture's log-probs differ by the crop alone."""
    rows = jax.tree.map(lambda x: x[0], step.batch)
    objective, params = losses.build("mdpo"), step.tiny.params

    def drawn(seed: int, number: int, epoch: int, redraw: bool) -> float:
        loss = runs[redraw]
        moment = Moment(jnp.int32(number), jnp.int32(epoch), {})
        return float(loss(params, {}, params, rows, jax.random.key(seed), moment)[1]["logps/chosen_other_image"])

    runs = {redraw: quick_jit(LossFunction(step.tiny.model, objective, redraw_views=redraw)) for redraw in (False, True)}
    one = drawn(3, 0, 0, False)
    np.testing.assert_allclose(one, first[2]["logps/chosen_other_image"], rtol=1e-5)
    assert drawn(3, 7, 2, False) == one and abs(drawn(4, 0, 0, False) - one) > 1e-3
    assert abs(drawn(3, 9, 1, True) - drawn(3, 0, 0, True)) > 1e-3 and drawn(3, 9, 1, True) == drawn(3, 8, 1, True)


@pytest.fixture(scope="module")
def whole(step):
    """A step against a reference that is not the policy, so that the rewards are not rounding."""
    reference = jax.tree.map(lambda x: x * np.float32(1.01), jax.device_get(step.reference()))
    after, metrics = step(step.state(), reference)
    return reference, jax.device_get(after.params), jax.device_get(metrics)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.nightly), 4])
def test_accumulated_equals_whole(tiny, batch, whole, count):
    reference, expected, metrics = whole
    assert abs(metrics["rewards/margins"]) > 1e-3
    accumulating = Step(tiny, parts(batch, count))
    after, got = accumulating(accumulating.state(), reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), jax.device_get(after.params), expected)
    assert got.keys() == metrics.keys()
    for name in metrics.keys() - SIGNS_OF_ROUNDING:
        np.testing.assert_allclose(got[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["sft", "simpo"])
def test_objectives_without_a_reference_take_none(tiny, batch, name):
    loss = quick_jit(LossFunction(tiny.model, losses.build(name)))
    rows = batch.first_answers(1) if name == "sft" else batch
    value, metrics = loss(tiny.params, {}, None, rows, jax.random.key(0))
    assert np.isfinite(value) and np.isfinite(metrics["nll/chosen"])


def test_an_objective_that_needs_a_reference_does_not_run_without(tiny, batch):
    loss = LossFunction(tiny.model, losses.build("dpo"))
    with pytest.raises(TypeError):
        jax.eval_shape(loss, tiny.params, {}, None, batch, jax.random.key(0))


def test_margin_reaches_the_objective(tiny, batch):
    loss = LossFunction(tiny.model, losses.build("mm_dpo"))
    reference = jax.tree.map(lambda x: x * np.float32(1.01), tiny.params)
    run = quick_jit(lambda margin: loss(tiny.params, {}, reference, dataclasses.replace(batch, margin=margin), jax.random.key(0))[1]["beta"])
    np.testing.assert_allclose(run(jnp.zeros(4)), 0.1, rtol=1e-6)
    np.testing.assert_allclose(run(jnp.array([0.0, 1.0, 4.0, 4.0])), np.mean([0.1, 0.119673, 0.143233, 0.143233]), rtol=1e-5)


def test_weight_of_a_pair_multiplies_its_loss(tiny, batch):
    loss = LossFunction(tiny.model, losses.build("simpo"))
    run = quick_jit(lambda weight: loss(tiny.params, {}, None, dataclasses.replace(batch, weight=weight), jax.random.key(0))[0])
    alone = [float(run(jnp.eye(4)[row])) for row in range(4)]
    np.testing.assert_allclose(run(jnp.array([2.0, 0.0, 1.0, 0.5])), 2 * alone[0] + alone[2] + 0.5 * alone[3], rtol=1e-5)


@pytest.mark.nightly
def test_steps_on_a_mesh_keep_their_shardings(tiny):
    """Two parts of four rows over data x fsdp = 4, heads and key/value heads over tensor = 2; AdamW, as in a run."""
    mesh = make_mesh(2, 2, 2)
    eight = batch_of([dataclasses.replace(r, id=f"{r.id} {half}") for half in range(2) for r in MIXED], tiny.processor)
    config = OptimizerConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.1)
    loss = LossFunction(tiny.model, losses.build("dpo"))
    jitted = make_train_step(loss, make_optimizer(config, 10), make_schedule(config, 10))
    placed = to_device(jax.device_get(parts(eight, 2)), mesh)
    reference, _ = FROZEN_TOWER.split(tiny.sharded(mesh))
    with jax.set_mesh(mesh):
        state = init_state(*FROZEN_TOWER.split(tiny.sharded(mesh)), make_optimizer(config, 10), seed=0)
        shardings = jax.tree.map(lambda x: x.sharding, (state.params, state.frozen))
        moments = state.opt_state[1][0].mu["decoder"]["layers"]["attention"]["query"]["kernel"]
        assert moments.sharding.spec == shardings[0]["decoder"]["layers"]["attention"]["query"]["kernel"].spec
        seen = []
        # compiled for the first call: later ones whose state came back in another type or sharding would be refused
        step = jitted.lower(state, reference, placed).compile(compiler_options={"xla_backend_optimization_level": 0})
        for _ in range(3):
            state, metrics = step(state, reference, placed)
            seen.append(float(metrics["loss"]))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, (state.params, state.frozen), shardings))
    np.testing.assert_allclose(seen[0], LOG2, rtol=1e-6)
    assert seen[2] < seen[1] < seen[0]


def test_a_batch_that_does_not_split_over_the_mesh_is_refused(tiny, batch):
    with pytest.raises(ValueError, match="divide"):
        to_device(jax.device_get(parts(batch)), make_mesh(8, 1, 1))
