"""What trains under LoRA and freeze rules: the division of the tree, the reference, the census, learning rates, going on."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.checkpoints import tiny_llava
from helpers.lora import adapted, random_factors
from helpers.tiny import MIXED, Tiny, batch_of, parts, quick_jit

from mmalign_jax import losses
from mmalign_jax.config import Config, OptimizerConfig, from_mapping
from mmalign_jax.errors import UserError
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.config import LORA_A, Lora
from mmalign_jax.models.lora import initial_factors, is_factor
from mmalign_jax.models.tree import split, union
from mmalign_jax.report.console import Console
from mmalign_jax.training.loop import train
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.optimizer import make_optimizer
from mmalign_jax.training.step import init_state, make_train_step, zero_gradients
from mmalign_jax.training.trainable import Trainable, unreached

LOG2 = np.float32(np.log(2))
LORA = {"decoder": Lora(3, 6.0, ("query", "key", "value", "out", "gate", "up", "down"))}
RATE = 0.01


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def tiny(base):
    """With factors in the decoder, as a run begins."""
    there = adapted(base, LORA)
    return dataclasses.replace(there, params=union(base.params, initial_factors(there.config, 0)))


@pytest.fixture(scope="module")
def batch(base):
    return parts(batch_of(MIXED, base.processor))


def paths(tree):
    return {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("values", "lora", "own", "factors"),
    [
        ({}, {}, {"projector", "decoder"}, False),
        ({"freeze": ["decoder"]}, {}, {"projector", "vision_tower"}, False),
        ({}, LORA, set(), True),
        ({"freeze": ["vision_tower"]}, LORA, {"projector"}, True),
        ({"freeze": []}, LORA, {"projector", "vision_tower"}, True),
        ({"freeze": ["vision_tower", "projector", "decoder"]}, LORA, set(), True),
    ],
)
def test_the_rule(base, values, lora, own, factors):
    """A part with factors keeps its own weights; the others follow `freeze`, which by default leaves nothing but the factors."""
    sizes = base.config.with_lora(lora)
    config = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, **values))
    rule = Trainable.of(from_mapping({"model": values}) if not lora else config, sizes)
    for part in ("vision_tower", "projector", "decoder"):
        assert rule.trains((part, "layers", "kernel")) == rule.in_reference((part, "layers", "kernel")) == (part in own)
    assert rule.trains(("decoder", "query", LORA_A)) and not rule.in_reference(("decoder", "query", LORA_A))
    whole = union(base.params, random_factors(sizes)) if factors else base.params
    trained, frozen = rule.split(whole)
    assert {path for path in paths(trained) if is_factor(path)} == {path for path in paths(whole) if is_factor(path)}
    assert {path[0] for path in paths(trained) if not is_factor(path)} == own
    assert not any(is_factor(path) for path in paths(frozen))
    assert paths(union(trained, frozen)) == paths(whole)


def test_the_copy_of_an_adapter_that_goes_on_is_the_reference_s(base):
    config = from_mapping({"model": {"adapter": "somewhere"}})
    assert Trainable.of(config, base.config.with_lora(LORA)).in_reference(("decoder", "query", LORA_A))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"vision_tower_learning_rate": 1e-5}}, "config.optimizer.vision_tower_learning_rate: the vision_tower does not train"),
        ({"model": {"freeze": ["decoder"]}, "optimizer": {"decoder_learning_rate": 1e-5}}, "config.optimizer.decoder_learning_rate"),
        ({"model": {"adapter": "a", "freeze": ["vision_tower", "projector", "decoder"]}}, "config.model.freeze: all parts are frozen"),
    ],
)
def test_a_rule_that_cannot_be(base, values, message):
    with pytest.raises(UserError, match=message):
        Trainable.of(from_mapping(values), base.config)


class Run:
    """Steps of DPO by Adam under a rule, compiled once."""

    def __init__(self, tiny, batch, rule, objective="dpo"):
        self.tiny, self.batch, self.rule = tiny, batch, rule
        self.loss = LossFunction(tiny.model, losses.build(objective))
        self._optimizer = optax.adam(RATE)
        step = make_train_step(self.loss, self._optimizer, optax.constant_schedule(RATE))
        self._step = step.lower(self.state(), self.reference(), batch).compile(compiler_options={"xla_backend_optimization_level": 0})

    def state(self):
        return init_state(*self.rule.split(jax.tree.map(jnp.copy, self.tiny.params)), self._optimizer, seed=3)

    def reference(self):
        return split(self.tiny.params, self.rule.in_reference)[0]

    def __call__(self, count):
        state, seen = self.state(), []
        for _ in range(count):
            state, metrics = self._step(state, self.reference(), self.batch)
            seen.append(jax.device_get(metrics))
        return state, seen


@pytest.fixture(scope="module")
def run(tiny, batch):
    return Run(tiny, batch, Trainable(frozenset({"vision_tower", "projector", "decoder"})))


@pytest.fixture(scope="module")
def trained(run):
    return run(4)


def test_step_0_is_log_2_with_no_copy_of_anything(run, trained):
    assert run.reference() == {}
    _, seen = trained
    np.testing.assert_allclose(seen[0]["loss"], LOG2, rtol=1e-6)
    np.testing.assert_allclose(seen[0]["rewards/margins"], 0.0, atol=2e-6)
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.05 and seen[-1]["rewards/margins"] > 0


def test_only_factors_move(run, trained):
    state, _ = trained
    before, frozen = run.rule.split(run.tiny.params)
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, before)))


def test_the_reference_stays_the_base_while_the_policy_moves(run, trained, base, batch):
    """The loss against the adapter-off reference is that against a copy of the base model."""
    state, _ = trained
    rows, key = jax.tree.map(lambda x: x[0], batch), jax.random.key(0)
    off = quick_jit(run.loss)(state.params, state.frozen, {}, rows, key)
    moved = union(state.params, state.frozen)
    # a whole tree of its own whose factors, still new, add nothing
    on = quick_jit(run.loss)(moved, {}, run.tiny.params, rows, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), off, on)
    assert abs(off[0] - LOG2) > 0.05


def test_census(run, trained):
    """A's gradient is zero while B is, which is no warning; a step later no gradient is zero."""
    state, seen = trained
    assert [metrics["zero_gradients"] for metrics in seen] == [0, 0, 0, 0]
    assert zero_gradients(run.loss, state, run.reference(), run.batch) == []


def test_census_sees_what_is_dead():
    ones, zero = np.ones(2), np.zeros(2)
    params = {"new": {"lora_a": ones, "lora_b": zero}, "old": {"lora_a": ones, "lora_b": ones}, "dead": {"kernel": ones}}
    grads = {"new": {"lora_a": zero, "lora_b": ones}, "old": {"lora_a": zero, "lora_b": zero}, "dead": {"kernel": zero}}
    found = {name: bool(silent) for name, silent in unreached(grads, params).items()}
    assert found == {"new/lora_a": False, "new/lora_b": False, "old/lora_a": True, "old/lora_b": True, "dead/kernel": True}


@pytest.mark.nightly
def test_a_projector_that_trains_too_has_its_copy_in_the_reference(tiny, batch):
    run = Run(tiny, batch, Trainable(frozenset({"vision_tower", "decoder"})))
    assert run.reference().keys() == {"projector"}
    state, seen = run(3)
    assert state.params.keys() == {"projector", "decoder"} and {path[0] for path in paths(state.params) if not is_factor(path)} == {"projector"}
    np.testing.assert_allclose(seen[0]["loss"], LOG2, rtol=1e-6)
    assert seen[-1]["loss"] < seen[0]["loss"] and not any(metrics["zero_gradients"] for metrics in seen)


def test_parts_have_learning_rates_of_their_own(base):
    grads = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), base.params)
    config = OptimizerConfig(learning_rate=0.1, projector_learning_rate=0.3, vision_tower_learning_rate=0.01, schedule="linear")
    optimizer = make_optimizer(config, 4)
    state, params = optimizer.init(base.params), base.params
    update = quick_jit(optimizer.update)
    # the schedule is the same for all: half way through, half of each
    for share in (1.0, 0.75, 0.5):
        updates, state = update(grads, state, params)
        for part, rate in (("vision_tower", 0.01), ("projector", 0.3), ("decoder", 0.1)):
            jax.tree.map(lambda leaf, by=rate * share: np.testing.assert_allclose(leaf, -by, rtol=1e-4), updates[part])


class Rows:
    """The same rows at every step."""

    def __init__(self, batch):
        self.batch, self.done = jax.device_get(batch), 0

    def begin(self):
        return self.batch

    def next_batch(self, params):
        self.done += 1
        return self.batch, {}

    def get_state(self):
        return {"done": self.done}

    def set_state(self, state):
        self.done = state["done"]


def run_of(tiny, batch, workdir, **train_settings):
    """A run of DPO with LoRA, and what it asked of the loader of weights."""
    config = from_mapping({
        "train": {"batch_size": 4, "log_every": 1, **train_settings}, "lora": {"rank": 3}, "report": {"tensorboard": False},
        "optimizer": {"learning_rate": 0.01, "schedule": "constant"}, "checkpoint": {"every": 2},
    })  # fmt: skip
    asked, said = [], io.StringIO()

    def load(dtype, wanted):
        tree, _ = split(tiny.params, wanted)
        asked.append((dtype, paths(tree)))
        return jax.tree.map(lambda leaf: jnp.array(leaf, dtype), tree)

    mesh, loss = make_mesh(1, 1, 1, jax.devices()[:1]), LossFunction(tiny.model, losses.build("dpo"))
    return train(config, workdir, mesh, tiny.config, loss, load, Rows(batch), Console(said)), asked, said.getvalue()


@pytest.mark.nightly
def test_going_on_is_bit_for_bit_and_checkpoints_hold_factors_alone(tiny, batch, tmp_path):
    whole, asked, said = run_of(tiny, batch, tmp_path / "whole", steps=4)
    factors, frozen = split(tiny.params, is_factor)
    # the decoder is read once, with the frozen parts, and there is no copy of it for the reference
    assert asked == [("float32", set()), ("float32", paths(frozen)), ("float32", paths(factors))]
    count, total = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (factors, tiny.params))
    assert f"Trainable: {count:,} of {total:,} parameters: decoder (low-rank factors of rank 3 beside query, key, value, out, gate, up," in said
    assert "WARNING" not in said
    run_of(tiny, batch, tmp_path / "parts", steps=2)
    again, asked, _ = run_of(tiny, batch, tmp_path / "parts", steps=4)
    assert again.step == whole.step == 4 and asked == [("float32", set()), ("float32", paths(frozen))]
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    saved = json.loads((tmp_path / "parts/checkpoints/4/state/_METADATA").read_text())["tree_metadata"]
    names = {key for key in saved if "decoder" in key or "projector" in key or "vision_tower" in key}
    assert names and all("lora_a" in key or "lora_b" in key for key in names)
