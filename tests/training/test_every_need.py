"""What objectives declare is computed rightly: token statistics, other rows' answers, other data, and statistics over all rows of a step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import FROZEN_TOWER, MIXED, Tiny, batch_of, parts, quick_jit

from mmalign_jax import losses
from mmalign_jax.data.device import to_device
from mmalign_jax.mesh import make_mesh
from mmalign_jax.training.branches import Side, branch_logps, with_mismatched
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.step import Follow, init_state, make_train_step
from mmalign_jax.types import FIRST_ANSWER, Response

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def reference(tiny):
    return jax.tree.map(lambda x: x * np.float32(1.02), tiny.params)


@pytest.fixture(scope="module")
def batch(tiny):
    rows = batch_of(MIXED, tiny.processor)
    return dataclasses.replace(rows, changed=rows.role > 1)


def statistics(tiny, reference, batch, name, **hyperparameters):
    loss = LossFunction(tiny.model, losses.build(name, **hyperparameters))
    return jax.device_get(quick_jit(lambda batch: loss.statistics(tiny.params, {}, reference, batch, KEY))(batch))


def dense(tiny, params, batch):
    """Log-softmax `[B, K, R, V]` at the answers' tokens, and which slots hold one, in float64."""
    features = tiny.model.encode_images(params, batch.images)
    hidden = quick_jit(lambda: tiny.model.hidden(params, features, batch))()
    logits = np.asarray(quick_jit(lambda: tiny.model.logits(params, hidden))(), np.float64)
    logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    p, r = batch.prefix_slots, batch.answer_slots
    last = np.max(np.where(np.asarray(batch.role) == 1, np.arange(batch.role.shape[1]), 0), axis=1)
    out = np.zeros((len(last), batch.answers, r, logps.shape[-1]))
    for row, end in enumerate(last):
        for k in range(batch.answers):
            start = p + k * r
            out[row, k] = np.concatenate([logps[row, end : end + 1], logps[row, start : start + r - 1]])
    return out, np.asarray(batch.by_answer(batch.role)) == FIRST_ANSWER + np.arange(batch.answers)[:, None]


@pytest.mark.nightly
def test_divergence_and_collision_are_those_of_the_whole_vocabulary(tiny, reference, batch):
    (ours, mask), (theirs, _) = (dense(tiny, params, batch) for params in (tiny.params, reference))
    kl = statistics(tiny, reference, batch, "tdpo").kl
    np.testing.assert_allclose(kl, np.sum((np.exp(theirs) * (theirs - ours)).sum(-1) * mask, axis=-1), rtol=1e-3, atol=1e-4)
    assert np.all(kl > 1e-3)
    collision = statistics(tiny, reference, batch, "wpo").collision
    np.testing.assert_allclose(collision, np.sum(np.log(np.exp(2 * ours).sum(-1)) * mask, axis=-1), rtol=1e-4)


def test_the_reference_says_the_same_beside_the_divergence(tiny, reference, batch):
    """Which reads it of the same logits."""
    found, expected = (statistics(tiny, reference, batch, name).answers for name in ("tdpo", "dpo"))
    assert np.abs(expected.reference - expected.policy).min() > 1e-2
    np.testing.assert_allclose(found.reference, expected.reference, rtol=1e-6)


def test_tokens_add_up_and_weights_act_on_changed_ones(tiny, reference, batch):
    stats = statistics(tiny, reference, batch, "ddpo")
    np.testing.assert_allclose((stats.answers.policy_tokens * stats.answers.token_weight).sum(-1), stats.answers.policy, rtol=1e-6)
    assert stats.answers.changed.sum() == stats.answers.lengths.sum()
    assert statistics(tiny, reference, batch, "dpo").answers.policy_tokens is None


def test_a_mismatched_answer_is_the_next_rows_behind_the_own_prompt(tiny, reference, batch):
    """Against rows that were tokenised that way, pictures and all."""
    stats = statistics(tiny, reference, batch, "kto")
    assert stats.answers.policy.shape == (4, 2) and stats.mismatched.policy.shape == (4, 1)
    moved = [dataclasses.replace(r, responses=(MIXED[(i + 1) % 4].responses[0], Response("?"))) for i, r in enumerate(MIXED)]
    expected = quick_jit(lambda rows: branch_logps(Side(tiny.model, tiny.params), tiny.model.tower(tiny.params, rows.images), rows)[0])
    np.testing.assert_allclose(stats.mismatched.policy[:, 0], expected(batch_of(moved, tiny.processor))[:, 0], rtol=1e-5)
    plain = statistics(tiny, reference, batch, "dpo")
    np.testing.assert_allclose(stats.answers.policy, plain.answers.policy, rtol=1e-6)
    # the partner is that of the step, whatever parts it is computed in
    whole, in_parts = with_mismatched(parts(batch, 1)), with_mismatched(parts(batch, 2))
    np.testing.assert_array_equal(whole.tokens.reshape(4, -1), in_parts.tokens.reshape(4, -1))


@pytest.mark.nightly
def test_the_blind_branch_is_the_row_with_black_pictures(tiny, reference, batch):
    stats = statistics(tiny, reference, batch, "v_dpo")
    black = statistics(tiny, reference, batch.with_images(jnp.zeros_like(batch.images)), "dpo")
    np.testing.assert_allclose(stats.no_image.policy, black.answers.policy, rtol=1e-5)
    np.testing.assert_allclose(stats.no_image.reference, black.answers.reference, rtol=1e-5)
    assert np.all(np.abs(stats.no_image.policy - stats.answers.policy)[[0, 1, 3]] > 1e-3)


def test_what_the_policy_says_under_a_corrupted_picture_is_scored_under_its_own(tiny, reference, batch):
    stats = statistics(tiny, reference, batch, "povid", view="black")
    blind, mask = dense(tiny, tiny.params, batch.with_images(jnp.zeros_like(batch.images)))
    for name, params in (("policy", tiny.params), ("reference", reference)):
        clean, _ = dense(tiny, params, batch)
        said = np.take_along_axis(clean[:, 0], blind[:, 0].argmax(-1)[..., None], -1)[..., 0]
        np.testing.assert_allclose(getattr(stats.self_rejected, name)[:, 0], (said * mask[:, 0]).sum(-1), rtol=1e-4, err_msg=name)


def test_auxiliary_rows_have_their_own_likelihood(tiny, reference, batch):
    other = batch_of(MIXED[::-1], tiny.processor, answers=1)
    stats = statistics(tiny, reference, dataclasses.replace(batch, auxiliary=other), "ha_dpo")
    alone = statistics(tiny, reference, other, "sft").answers
    np.testing.assert_allclose(stats.auxiliary_nll, (-alone.policy / alone.lengths)[:, 0], rtol=1e-5)
    with pytest.raises(TypeError, match="config.auxiliary"):
        statistics(tiny, reference, batch, "ha_dpo")


def test_reference_free_is_a_reference_that_says_nothing(tiny, batch):
    loss = LossFunction(tiny.model, dataclasses.replace(losses.build("dpo"), reference_free=True))
    stats = quick_jit(lambda batch: loss.statistics(tiny.params, {}, None, batch, KEY))(batch)
    assert np.all(np.asarray(stats.answers.reference) == 0) and not loss.reads_reference
    # there is no distance from such a reference, and no rule must see one
    assert not {"chosen_drift", "displacement_rate"} & loss.objective(stats)[1].keys()


class Stepping:
    """Steps of plain gradient descent."""

    def __init__(self, tiny, name, count=1, follow=None, rows_per_epoch=0, mesh=None, **hyperparameters):
        self.tiny, self.count, self.follow, self.mesh = tiny, count, follow, mesh
        self.loss = LossFunction(tiny.model, losses.build(name, **hyperparameters))
        self.optimizer = optax.sgd(0.01)
        schedule = optax.constant_schedule(0.01)
        self.step = make_train_step(self.loss, self.optimizer, schedule, follow=follow, rows_per_epoch=rows_per_epoch)

    def __call__(self, reference, batch, steps=1):
        params, frozen = FROZEN_TOWER.split(jax.tree.map(jnp.copy, self.tiny.params))
        theirs = FROZEN_TOWER.split(reference)[0]
        moving = jax.tree.map(jnp.copy, theirs) if self.follow else None
        state = init_state(params, frozen, self.optimizer, 3, self.loss.objective, moving)
        rows = parts(batch, self.count)
        given = None if self.follow else theirs
        run = self.step.lower(state, given, rows).compile(compiler_options={"xla_backend_optimization_level": 0})
        seen = []
        for _ in range(steps):
            state, metrics = run(state, given, rows)
            seen.append(jax.device_get(metrics))
        return jax.device_get(state), seen


@pytest.mark.parametrize("name", ["bco", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("aot", "kto", "beta_dpo"))])
def test_statistics_over_the_batch_are_those_of_the_whole_step(tiny, reference, batch, name):
    """Two parts of two rows give loss, metrics, parameters and the objective's state of four rows at once."""
    whole, in_parts = (Stepping(tiny, name, count, beta=0.5)(reference, batch, steps=2) for count in (1, 2))
    for a, b in zip(whole[1], in_parts[1], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-5, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole[0].params, in_parts[0].params)
    assert whole[0].objective.keys() == in_parts[0].objective.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), whole[0].objective, in_parts[0].objective)


def test_the_running_mean_is_carried_from_step_to_step(tiny, reference, batch):
    state, seen = Stepping(tiny, "bco", beta=0.5)(reference, batch, steps=3)
    means = [0.5 * (step["rewards/chosen"] + step["rewards/rejected"]) for step in seen]
    np.testing.assert_allclose(state.objective["reward_mean"], np.mean(means), rtol=1e-4)
    assert state.objective["reward_steps"] == 3


def test_beta_by_epoch(tiny, reference, batch):
    _, seen = Stepping(tiny, "dpo", rows_per_epoch=8, beta_by_epoch=(0.1, 0.3))(reference, batch, steps=5)
    np.testing.assert_allclose([step["beta"] for step in seen], [0.1, 0.1, 0.3, 0.3, 0.3])


def test_a_reference_that_follows(tiny, batch):
    """Every second step the reference becomes 60 % of the policy; in between it stays."""
    stepping = Stepping(tiny, "dpo", follow=Follow(0.6, 2))
    one, _ = stepping(tiny.params, batch, steps=1)
    start = FROZEN_TOWER.split(tiny.params)[0]
    jax.tree.map(np.testing.assert_array_equal, one.reference, start)
    two, seen = stepping(tiny.params, batch, steps=2)
    expected = jax.tree.map(lambda ours, theirs: 0.6 * ours + 0.4 * theirs, two.params, start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), two.reference, expected)
    np.testing.assert_allclose(seen[0]["rewards/margins"], 0, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["kto", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("aot", "tdpo"))])
def test_eight_devices_have_the_loss_of_one(tiny, reference, name):
    eight = [dataclasses.replace(r, id=f"{r.id} {half}") for half in range(2) for r in MIXED]
    batch = batch_of(eight, tiny.processor)
    loss = LossFunction(tiny.model, losses.build(name, beta=0.5))
    run = lambda params, theirs, batch: loss(*FROZEN_TOWER.split(params), FROZEN_TOWER.split(theirs)[0], batch, KEY)[0]  # noqa: E731
    one = quick_jit(run)(tiny.params, reference, batch)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        spread = tiny.sharded(mesh)
        theirs = jax.tree.map(lambda x: x * np.float32(1.02), spread)
        many = quick_jit(run)(spread, theirs, to_device(jax.device_get(batch), mesh, batch_axis=0))
    np.testing.assert_allclose(many, one, rtol=1e-5)
