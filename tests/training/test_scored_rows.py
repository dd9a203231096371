"""Labelled answers and ranked groups, from records to a step of training: beside the same answers as pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import FROZEN_TOWER, MIXED, Tiny, parts, quick_jit

from mmalign_jax import losses
from mmalign_jax.config import DataConfig
from mmalign_jax.data.loader import one_pass
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.training.branches import Side, branch_logps
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.step import init_state, make_train_step
from mmalign_jax.types import Group, Label, Response

KEY = jax.random.key(5)
SCORED = [
    dataclasses.replace(one, responses=tuple(map(Response, (*(answer.text for answer in one.responses), "Two."), [""] * 3, (0.5, 0.1, 0.3))))
    for one in MIXED
]
LABELLED = [dataclasses.replace(one, prefs=(), labels=(Label(1, False), Label(0, True))) for one in SCORED]
GROUPED = [dataclasses.replace(one, prefs=(), groups=(Group((1, 0)),)) for one in SCORED]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def reference(tiny):
    return jax.tree.map(lambda x: x * np.float32(1.02), tiny.params)


def rows_of(tiny, records, name):
    """All rows of the records as one batch, in order."""
    objective = losses.build(name)
    plan = plan_rows(records, tiny.processor, DataConfig(workers=0), answers=objective.answers, reads=objective.reads)
    (found,) = one_pass(records, tiny.processor, plan, batch_size=len(plan.items), workers=0)
    return jax.tree.map(jnp.asarray, found.batch)


def statistics(tiny, reference, batch, name):
    loss = LossFunction(tiny.model, losses.build(name))
    return jax.device_get(quick_jit(lambda batch: loss.statistics(tiny.params, {}, reference, batch, KEY))(batch))


@pytest.fixture(scope="module")
def pairs(tiny, reference):
    """Log-prob sums `[4, 2]` of policy and reference, of pairs."""
    answers = statistics(tiny, reference, rows_of(tiny, MIXED, "dpo"), "dpo").answers
    return answers.policy, answers.reference


def test_labelled_rows_have_the_log_probs_of_their_answers_and_the_next_row_is_their_partner(tiny, reference, pairs):
    batch = rows_of(tiny, LABELLED, "kto_unpaired")
    stats = statistics(tiny, reference, batch, "kto_unpaired")
    assert stats.answers.policy.shape == (8, 1) and stats.desirable.tolist() == [False, True] * 4
    for found, expected in zip((stats.answers.policy, stats.answers.reference), pairs, strict=True):
        np.testing.assert_allclose(found[:, 0], np.asarray(expected)[:, ::-1].ravel(), rtol=1e-5)
    # the row behind is of the same record in every other case, and that is no other prompt's answer
    assert (stats.mismatched.lengths[:, 0] > 0).tolist() == [False, True] * 4
    moved = [dataclasses.replace(one, responses=SCORED[(n + 1) % 4].responses[1:2], labels=(Label(0, True),)) for n, one in enumerate(LABELLED)]
    expected = quick_jit(lambda rows: branch_logps(Side(tiny.model, tiny.params), tiny.model.tower(tiny.params, rows.images), rows)[0])
    np.testing.assert_allclose(stats.mismatched.policy[1::2, 0], expected(rows_of(tiny, moved, "kto_unpaired"))[:, 0], rtol=1e-5)


def test_a_group_of_two_is_a_pair_and_a_third_answer_changes_no_other(tiny, reference, pairs):
    two, batch = LossFunction(tiny.model, losses.build("pl_dpo")), rows_of(tiny, GROUPED, "pl_dpo")
    loss, metrics = quick_jit(lambda batch: two(tiny.params, {}, reference, batch, KEY))(batch)
    (policy, theirs) = map(np.asarray, pairs)
    h = 0.1 * ((policy - theirs)[:, 0] - (policy - theirs)[:, 1])
    np.testing.assert_allclose(loss, np.mean(np.logaddexp(0, -h)), rtol=1e-5)
    np.testing.assert_allclose(metrics["ranking/accuracies"], np.mean(h > 0), rtol=1e-6)
    three = [dataclasses.replace(one, groups=(Group((2, 1, 0)),)) for one in GROUPED]
    stats = statistics(tiny, reference, rows_of(tiny, three, "pl_dpo"), "pl_dpo")
    assert stats.rewards.shape == (4, 3)
    np.testing.assert_allclose(stats.rewards[0], [0.3, 0.1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(stats.answers.policy[:, 1:], policy[:, ::-1], rtol=1e-5)


@pytest.mark.nightly
def test_a_step_in_parts_has_the_loss_of_all_labelled_rows(tiny, reference):
    """The baseline is over all rows of the step, and labels go where their rows go."""
    loss, batch = LossFunction(tiny.model, losses.build("kto_unpaired", beta=0.5)), rows_of(tiny, LABELLED, "kto_unpaired")
    params, frozen = FROZEN_TOWER.split(jax.tree.map(jnp.copy, tiny.params))
    theirs, optimizer = FROZEN_TOWER.split(reference)[0], optax.sgd(0.01)
    expected, _ = quick_jit(lambda batch: loss(params, frozen, theirs, batch, KEY))(batch)
    state, given = init_state(params, frozen, optimizer, 3, loss.objective), parts(batch, 2)
    step = make_train_step(loss, optimizer, optax.constant_schedule(0.01)).lower(state, theirs, given)
    state, metrics = step.compile(compiler_options={"xla_backend_optimization_level": 0})(state, theirs, given)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert metrics["grad_norm"] > 0 and metrics["labels/desirable"] == 0.5 and metrics["zero_gradients"] == 0
