"""Reward-model training on a tiny model: what moves, what has a gradient, what accumulation and a mesh change (nothing)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import MIXED, Tiny, batch_of, parts, quick_jit

from mmalign_jax import losses
from mmalign_jax.config import DataConfig, OptimizerConfig, from_mapping
from mmalign_jax.data.device import to_device
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import UserError
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.config import LORA_A
from mmalign_jax.models.params import abstract_params, param_shardings
from mmalign_jax.models.score_head import initial_head
from mmalign_jax.training.flops import Work, step_flops
from mmalign_jax.training.held_out import HeldOut
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.optimizer import make_optimizer
from mmalign_jax.training.step import init_state, make_train_step, zero_gradients
from mmalign_jax.training.trainable import Trainable

CONFIG = from_mapping({"objective": {"name": "reward_model"}})
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """With a new score head, whose values are those of a run with seed 0."""
    base = Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))
    sizes = dataclasses.replace(base.config, score_head=True)
    head = jax.tree.map(jnp.asarray, initial_head(sizes, 0))
    return dataclasses.replace(base, config=sizes, model=dataclasses.replace(base.model, config=sizes), params=base.params | {"score_head": head})


@pytest.fixture(scope="module")
def batch(tiny):
    return batch_of(MIXED, tiny.processor)


@pytest.fixture(scope="module")
def trained(tiny, batch):
    """(rule, loss, state, metrics by step) of two steps, in one part and in two."""
    rule, optimizer = Trainable.of(CONFIG, tiny.config), optax.sgd(0.05)
    loss = LossFunction(tiny.model, losses.build("reward_model"))
    out = []
    for count in (1, 2):
        step = make_train_step(loss, optimizer, optax.constant_schedule(0.05))
        state = init_state(*rule.split(jax.tree.map(jnp.copy, tiny.params)), optimizer, 3, loss.objective)
        run = step.lower(state, None, parts(batch, count)).compile(compiler_options={"xla_backend_optimization_level": 0})
        seen = []
        for _ in range(2):
            state, metrics = run(state, None, parts(batch, count))
            seen.append(jax.device_get(metrics))
        out.append((state, seen))
    return rule, loss, out


def test_the_tree_is_the_old_one_with_a_part_more(tiny):
    plain, more = (abstract_params(dataclasses.replace(tiny.config, score_head=there), "bfloat16") for there in (False, True))
    head = more.pop("score_head")
    assert more == plain and {name: (leaf.shape, leaf.dtype) for name, leaf in head.items()} == {
        "kernel": ((24,), jnp.float32), "bias": ((), jnp.float32),
    }  # fmt: skip
    mesh = make_mesh(2, 2, 2)
    assert all(sharding.is_fully_replicated for sharding in param_shardings(tiny.config, mesh)["score_head"].values())
    again, other = initial_head(tiny.config, 0), initial_head(tiny.config, 1)
    np.testing.assert_array_equal(again["kernel"], tiny.params["score_head"]["kernel"])
    assert not np.array_equal(again["kernel"], other["kernel"]) and again["bias"] == 0


def test_the_rule(tiny):
    rule = Trainable.of(CONFIG, tiny.config)
    assert rule.trains(("score_head", "kernel")) and not rule.in_reference(("score_head", "kernel"))
    assert rule.trains(("decoder", "final_norm", "scale")) and not rule.trains(("decoder", "head", "kernel")) and rule.output is False
    alone = from_mapping({"objective": {"name": "reward_model"}, "model": {"freeze": ("vision_tower", "projector", "decoder")}})
    assert {path[0] for path in paths(Trainable.of(alone, tiny.config).split(tiny.params)[0])} == {"score_head"}
    plain = dataclasses.replace(tiny.config, score_head=False)
    with pytest.raises(UserError, match="score_head_learning_rate: dpo gives the model no score head"):
        Trainable.of(from_mapping({"optimizer": {"score_head_learning_rate": 1e-3}}), plain)


def paths(tree):
    return {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_it_learns_and_no_gradient_is_silent(tiny, batch, trained):
    rule, loss, ((state, seen), _) = trained
    assert seen[1]["loss"] < seen[0]["loss"] and seen[1]["rewards/margins"] > seen[0]["rewards/margins"]
    assert [metrics["zero_gradients"] for metrics in seen] == [0, 0]
    assert zero_gradients(loss, state, None, parts(batch)) == []
    before = rule.split(tiny.params)[0]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, before)))
    # nothing that only a vocabulary gives
    assert not any("logps" in name or "nll" in name or "drift" in name for name in seen[0])


def test_the_metrics_are_those_of_the_scores(tiny, batch, trained):
    _, loss, ((_, seen), _) = trained
    stats = jax.device_get(quick_jit(lambda: loss.statistics(tiny.params, {}, None, batch, KEY))())
    chosen, rejected = stats.scores.T
    expected = {
        "loss": np.mean(np.log1p(np.exp(rejected - chosen)) + 0.01 * (chosen + rejected) ** 2),
        "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(), "rewards/accuracies": np.mean(chosen > rejected),
        "rewards/mean": stats.scores.mean(), "rewards/std": stats.scores.std(), "grad_weight": np.mean(1 / (1 + np.exp(chosen - rejected))),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(seen[0][name], value, rtol=1e-4, err_msg=name)


def test_two_parts_are_the_whole(trained):
    _, _, ((whole, one), (in_parts, two)) = trained
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, in_parts.params)
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"rewards/std"}:  # over the rows that are computed together
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.nightly
def test_eight_devices_have_the_loss_of_one(tiny, trained):
    eight = batch_of([dataclasses.replace(r, id=f"{r.id} {half}") for half in range(2) for r in MIXED], tiny.processor)
    _, loss, _ = trained
    run = lambda params, batch: loss(params, {}, None, batch, KEY)[0]  # noqa: E731
    one = quick_jit(jax.value_and_grad(run))(tiny.params, eight)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        spread = jax.tree.map(jax.device_put, tiny.params, param_shardings(tiny.config, mesh))
        many = quick_jit(jax.value_and_grad(run))(spread, to_device(jax.device_get(eight), mesh, batch_axis=0))
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), many[1]["score_head"], one[1]["score_head"])


@pytest.mark.parametrize("name", ["reward_model", pytest.param("ha_dpo", marks=pytest.mark.nightly)])
def test_held_out_pairs_are_judged_as_in_training(tiny, name):
    """Buckets, filler rows and all; of an objective with more terms, only what compares is computed."""
    objective = losses.build(name).compares
    loss = LossFunction(tiny.model, objective)
    records = [*MIXED, dataclasses.replace(MIXED[0], id="again")]
    plan = plan_rows(records, tiny.processor, DataConfig(buckets=2), answers=2)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    measure = HeldOut(records, tiny.processor, plan, loss, mesh, batch_size=2, workers=0)
    reference = jax.tree.map(lambda x: x * np.float32(1.02), tiny.params) if loss.reads_reference else None
    with jax.set_mesh(mesh):
        found = measure(tiny.params, {}, reference, KEY)
    stats = quick_jit(lambda rows: loss.statistics(tiny.params, {}, reference, rows, KEY))(batch_of(records, tiny.processor))
    expected = objective(stats)[1]
    assert found["pairs"] == 5
    for ours, theirs in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        np.testing.assert_allclose(found[ours]["value"], expected[theirs], rtol=1e-3, atol=1e-5)


def test_learning_rate_of_its_own_and_decay(tiny):
    config = OptimizerConfig(learning_rate=0.1, score_head_learning_rate=0.5, schedule="constant")
    optimizer = make_optimizer(config, 4)
    grads = jax.tree.map(jnp.ones_like, tiny.params)
    updates, _ = quick_jit(optimizer.update)(grads, optimizer.init(tiny.params), tiny.params)
    np.testing.assert_allclose(updates["score_head"]["kernel"], -0.5, rtol=1e-3)
    np.testing.assert_allclose(updates["projector"]["fc1"]["kernel"], -0.1, rtol=1e-3)


def test_the_vocabulary_costs_nothing(tiny, batch):
    with_it, without = (Work.of(losses.build(name), live_reference=False) for name in ("simpo", "reward_model"))
    flops = lambda work: step_flops(tiny.config, parts(batch), work=work, freeze={"vision_tower"})  # noqa: E731
    c = tiny.config.decoder
    assert flops(with_it) - flops(without) == 6 * 4 * 2 * batch.answer_slots * c.width * c.vocab_size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval": {"benchmarks": ("pope",)}}, "config.eval.benchmarks: reward_model trains scores"),
        ({"eval": {"probe_every": 5}}, "config.eval.probe_every: reward_model trains scores"),
        ({"stop": {"length_ratio": 1.5}}, "config.stop.length_ratio: reward_model trains scores"),
        ({"objective": {"name": "sft"}, "data": {"holdout": 0.1}}, "config.data.holdout: sft compares no answers"),
        ({"data": {"holdout": 0.1}, "pairs": {"maker": "bdhs", "when": "online"}}, "config.data.holdout: pairs that are made online"),
        ({"eval": {"holdout_every": 5}}, "config.eval.holdout_every: no pairs are held out"),
        ({"auxiliary": {"holdout": 0.1}}, "config.auxiliary.holdout"),
        ({"model": {"freeze": ("score_head",)}}, "config.model.freeze: unknown part"),
    ],
)
def test_settings_that_do_not_go_together(values, message):
    with pytest.raises(UserError, match=message):
        from_mapping({"objective": {"name": "reward_model"}} | values)


def test_factors_keep_adding_nothing_at_first_and_the_head_trains_beside_them(tiny):
    config = from_mapping({"objective": {"name": "reward_model"}, "lora": {"rank": 2}})
    from mmalign_jax.hf.adapters import with_adapter

    sizes = with_adapter(config, tiny.config)
    assert sizes.score_head
    rule = Trainable.of(config, sizes)
    assert rule.only_new_factors and rule.trains(("score_head", "bias")) and rule.trains(("decoder", "query", LORA_A))
    assert not rule.trains(("decoder", "query", "kernel"))
