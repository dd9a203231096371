"""Groups and pairs of answers that the current policy draws: what rows hold, on what they depend, and that training computes the same."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from helpers import checkpoints
from helpers.tiny import FROZEN_TOWER, Tiny, record

from mmalign_jax import losses
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import DataConfig, SamplesConfig, TrainConfig
from mmalign_jax.data.device import to_device
from mmalign_jax.data.layout import lay_out
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import UserError
from mmalign_jax.mentions import Mentions
from mmalign_jax.pairs.answers import Answerer
from mmalign_jax.pairs.online_samples import GroupBatches, PairBatches
from mmalign_jax.pairs.own_answers import OwnAnswers
from mmalign_jax.pairs.scorers import Truth, parse
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.step import init_state, make_copy, make_train_step
from mmalign_jax.training.step_zero import check_samples
from mmalign_jax.types import FIRST_ANSWER, PREFIX, record_key

# Two pictures, one, and none; and rewards that random letters can earn
RECORDS = [
    dataclasses.replace(record(name, prompt, "A cat.", "A dog.", images=images), meta={"objects": list("ab")})
    for name, prompt, images in (("two", "What is there?", [1, 2]), ("one", "Describe.", [3]), ("text", "Say something.", []))
]
TABLE = Mentions({letter: () for letter in "abcdefgh"})
SAMPLES = SamplesConfig(count=3, max_tokens=12, stop_strings=("e",), seed=5, batch_size=2, scorers=("objects", "missing_end(-0.125)", "length(-0.5)"))
TRAIN = TrainConfig(batch_size=4, accumulate=2, seed=3)




@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(checkpoints.tiny_llava(tmp_path_factory.mktemp("samples"), seed=3))


MESH = mesh_lib.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def make(tiny):
    samplers = {}

    def batches(kind, config=SAMPLES, train=TRAIN, own=0, mesh=MESH, rows=2):
        plan = plan_rows(RECORDS, tiny.processor, DataConfig(), answers=own)
        prompts = dataclasses.replace(plan.layout, answers=0)
        drawn = dataclasses.replace(config, offline_share=0.0, selector="best_worst", gap=0.0)
        if (drawn, own, rows, mesh) not in samplers:
            samplers[drawn, own, rows, mesh] = OwnAnswers(tiny.model, tiny.processor, mesh, config, prompts, rows)
        answerer = Answerer(tiny.processor, (samplers[drawn, own, rows, mesh],), parse(config.scorers, Truth(TABLE, config.max_tokens)), prompts)
        slots = max(config.max_tokens, plan.layout.answer_slots if own else 0)
        layout = dataclasses.replace(plan.layout, answers=config.count if kind is GroupBatches else 2, answer_slots=slots)
        return kind(RECORDS, plan, layout, answerer, config, train)

    return batches


@pytest.fixture(scope="module")
def params(tiny):
    return tiny.sharded(MESH)


def flat(batch):
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=x.dtype.kind == "f"), a, b)))


def answers_of(batch, row):
    """Tokens of each answer of a row."""
    role, tokens = by_answer(batch, "role")[row], by_answer(batch, "tokens")[row]
    return [tokens[k][role[k] == FIRST_ANSWER + k] for k in range(batch.answers)]


def by_answer(batch, name):
    """Of rows on the host, `[B, K, R]`."""
    values = getattr(batch, name)
    return values[:, batch.prefix_slots :].reshape(len(values), batch.answers, batch.answer_slots)


def test_a_group_is_a_prompt_with_its_samples_and_rewards(make, params, tiny):
    batch, metrics = make(GroupBatches).next_batch(params)
    assert batch.tokens.shape[:2] == (2, 2) and batch.answers == 3 and batch.answer_slots <= 12
    rows, by_key = flat(batch), {record_key(one.id): one for one in RECORDS}
    scorers, totals, lengths = parse(SAMPLES.scorers, Truth(TABLE, 12)), [], []
    for row in range(4):
        one = by_key[int(rows.record_key[row])]
        laid = lay_out(dataclasses.replace(one, prefs=()), None, tiny.processor, dataclasses.replace(plan_layout(tiny), answers=0))
        np.testing.assert_array_equal(rows.tokens[row][rows.role[row] == PREFIX], laid["tokens"][laid["role"] == PREFIX])
        np.testing.assert_array_equal(rows.images[row], laid["images"])
        for number, tokens in enumerate(answers_of(rows, row)):
            text = tiny.processor.decode(tokens)
            ended = tokens[-1] in tiny.processor.eos_ids or "e" in text
            assert (len(tokens) == 12 or ended) and "e" not in tiny.processor.decode(tokens[:-1])
            there = {mention.kind for mention in TABLE(text)} & {"a", "b"}
            wrong = sum(mention.kind not in "ab" for mention in TABLE(text))
            reward = (len(there) - wrong) / 2 - 0.125 * (not ended) - 0.5 * len(tokens) / 12
            assert rows.sampled.rewards[row, number] == pytest.approx(reward, abs=1e-6)
            totals.append(reward)
            lengths.append(len(tokens))
    assert len(scorers.parts) == 3 and len(set(totals)) > 1
    np.testing.assert_allclose(metrics["samples/score"], np.mean(totals), rtol=1e-5)
    np.testing.assert_allclose(metrics["samples/length"], np.mean(lengths))
    np.testing.assert_allclose(rows.sampled.row_tokens, np.sum(lengths) / 4)
    assert set(metrics) >= {"samples/score_objects", "samples/score_length", "samples/finished"}


def plan_layout(tiny):
    return plan_rows(RECORDS, tiny.processor, DataConfig(), answers=0).layout


def test_samples_depend_on_seed_record_and_step_alone(make, params):
    batches = make(GroupBatches)
    first, _ = batches.next_batch(params)
    saved = json.loads(json.dumps(batches.get_state()))
    second, _ = batches.next_batch(params)
    assert not same(first, second)
    other = make(GroupBatches, rows=4)  # device batches of another size
    other.set_state(saved)
    again, _ = other.next_batch(params)
    np.testing.assert_allclose(again.drawn_logps, second.drawn_logps, atol=1e-5)
    assert same(dataclasses.replace(again, drawn_logps=None), dataclasses.replace(second, drawn_logps=None))
    with pytest.raises(UserError, match="use a new --workdir"):
        other.set_state({**saved, "seed": 9})


@pytest.mark.nightly
def test_the_same_samples_on_eight_devices(make, params, tiny):
    one, _ = make(GroupBatches, train=TrainConfig(batch_size=8, seed=3), rows=8).next_batch(params)
    mesh = mesh_lib.make_mesh(data=2, fsdp=4)
    eight, _ = make(GroupBatches, train=TrainConfig(batch_size=8, seed=3), rows=8, mesh=mesh).next_batch(tiny.sharded(mesh))
    np.testing.assert_array_equal(one.tokens, eight.tokens)
    np.testing.assert_allclose(one.sampled.rewards, eight.sampled.rewards, atol=1e-6)


def test_a_special_token_is_no_stop_string(make):
    with pytest.raises(UserError, match="special token"):
        make(GroupBatches, dataclasses.replace(SAMPLES, stop_strings=("</s>",)))


def test_unfinished_answers_may_be_left_out(make, params):
    whole, _ = make(GroupBatches).next_batch(params)
    batch, metrics = make(GroupBatches, dataclasses.replace(SAMPLES, unfinished=False)).next_batch(params)
    lengths = np.sum(by_answer(flat(whole), "token_weight"), axis=-1)
    counted = np.sum(by_answer(flat(batch), "token_weight"), axis=-1)
    assert 0 < metrics["samples/finished"] < 1
    assert np.mean(counted > 0) == metrics["samples/finished"] and np.array_equal(counted[counted > 0], lengths[counted > 0])
    np.testing.assert_allclose(flat(batch).sampled.row_tokens, counted.sum() / 4)


class Trained:
    """Steps of an objective on rows of the tiny model."""

    def __init__(self, tiny, params, name, **options):
        self.loss = LossFunction(tiny.model, losses.build(name))
        optimizer, schedule = optax.sgd(0.05), optax.constant_schedule(0.05)
        self.split = FROZEN_TOWER.split(params)
        with jax.set_mesh(MESH):
            self.state = init_state(*FROZEN_TOWER.split(jax.tree.map(lambda x: x.copy(), params)), optimizer, 0)
            self.run = make_train_step(self.loss, optimizer, schedule, **options)

    def step(self, batch):
        with jax.set_mesh(MESH):
            self.state, metrics = self.run(self.state, self.split[0], to_device(dataclasses.replace(batch, drawn_logps=None), MESH))
        return jax.device_get(metrics)

    def check(self, batch):
        with jax.set_mesh(MESH):
            check_samples(self.loss, self.state, to_device(batch, MESH))


def test_training_computes_what_the_sampler_did(make, params, tiny):
    batch, _ = make(GroupBatches).next_batch(params)
    trained = Trained(tiny, params, "grpo")
    trained.check(batch)
    wrong = dataclasses.replace(batch, drawn_logps=batch.drawn_logps - 1e-2)
    with pytest.raises(UserError, match="the sampler does not compute the policy that is trained"):
        trained.check(wrong)
    metrics = trained.step(batch)
    assert metrics["policy/ratio"] == 1.0 and metrics["policy/clip_fraction"] == 0.0
    np.testing.assert_allclose(metrics["rewards/mean"], np.mean(batch.sampled.rewards), rtol=1e-5)
    assert metrics["grad_norm"] > 0 and abs(metrics["policy/kl"]) < 1e-6


def test_samples_of_an_older_policy_are_compared_with_that_one(make, params, tiny):
    """Without the sampler's own log-probs, which in bfloat16 are others: the older policy is part of the state."""
    batch, _ = make(GroupBatches).next_batch(params)
    trained = Trained(tiny, params, "dapo")
    moved = jax.tree.map(lambda x: x * 1.01, trained.state.params)
    with jax.set_mesh(MESH):
        on_device = to_device(dataclasses.replace(batch, drawn_logps=None), MESH)
        now = jax.jit(trained.loss.with_drawn)(moved, trained.state.frozen, on_device).sampled.logps
        old = make_copy()({}, FROZEN_TOWER.split(params)[0])
    trained.state = dataclasses.replace(trained.state, params=moved, sampler=old)
    slots = (*batch.tokens.shape[:2], batch.answers, batch.answer_slots)
    drawn = batch.drawn_logps[..., batch.prefix_slots :].reshape(slots)
    ratio = np.nanmean(np.exp(np.asarray(now) - drawn), axis=(2, 3))  # by row
    found = trained.step(batch)
    np.testing.assert_allclose(found["policy/ratio"], np.mean(ratio), rtol=1e-5)
    assert abs(found["policy/ratio"] - 1) > 1e-4  # it is exactly 1 beside the policy itself
    assert same(jax.device_get(trained.state.sampler), jax.device_get(FROZEN_TOWER.split(params)[0]))


@pytest.mark.nightly
def test_two_updates_of_a_step_are_two_steps(make, params, tiny):
    batch, _ = make(GroupBatches).next_batch(params)
    once, twice = Trained(tiny, params, "dapo"), Trained(tiny, params, "dapo", updates=2)
    slots = (*batch.tokens.shape[:2], batch.answers, batch.answer_slots)
    drawn = np.nan_to_num(batch.drawn_logps)[..., batch.prefix_slots :].reshape(slots)
    given = dataclasses.replace(batch, sampled=dataclasses.replace(batch.sampled, logps=drawn))  # by the sampler, the same in float32
    metrics = [once.step(given), once.step(given)]
    found = twice.step(batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), once.state.params, twice.state.params)
    np.testing.assert_allclose(found["loss"], np.mean([one["loss"] for one in metrics]), rtol=1e-3, atol=1e-5)
    assert int(twice.state.step) == 1 and found["policy/ratio"] != 1.0


def test_pairs_are_the_best_and_the_worst_answer(make, params, tiny):
    groups, _ = make(GroupBatches).next_batch(params)
    batch, metrics = make(PairBatches).next_batch(params)
    groups, pairs, found = flat(groups), flat(batch), []
    for row in range(4):
        answers, rewards = answers_of(groups, row), groups.sampled.rewards[row]
        pair = answers_of(pairs, row)
        if pairs.weight[row]:
            np.testing.assert_array_equal(pair[0], answers[int(np.argmax(rewards))])
            np.testing.assert_array_equal(pair[1], answers[2 - int(np.argmax(rewards[::-1] == rewards.min()))])
            assert pairs.margin[row] == pytest.approx(rewards.max() - rewards.min(), abs=1e-6)
        found.append(bool(pairs.weight[row]))
    assert metrics["samples/pairs"] == np.mean(found) > 0
    Trained(tiny, params, "dpo").check(batch)
    strict, metrics = make(PairBatches, dataclasses.replace(SAMPLES, gap=100.0)).next_batch(params)
    assert metrics["samples/pairs"] == 0 and not strict.weight.any()


def test_rows_may_be_the_sets_own_pairs(make, params, tiny):
    config = dataclasses.replace(SAMPLES, offline_share=0.5)
    batches, shares, seen = make(PairBatches, config, own=2), [], 0
    layout = dataclasses.replace(plan_rows(RECORDS, tiny.processor, DataConfig(), answers=2).layout)
    by_key = {record_key(one.id): one for one in RECORDS}
    for _ in range(4):
        batch, metrics = batches.next_batch(params)
        rows = flat(batch)
        own = np.isnan(rows.drawn_logps).all(axis=1)
        assert metrics["samples/offline"] == np.mean(own)
        shares += own.tolist()
        for row in np.flatnonzero(own):
            one = by_key[int(rows.record_key[row])]
            laid = lay_out(one, one.prefs[0], tiny.processor, dataclasses.replace(layout, answer_slots=batch.answer_slots))
            for name in ("tokens", "role", "token_weight", "weight"):
                np.testing.assert_array_equal(getattr(rows, name)[row], laid[name])
            seen += 1
    assert 0 < np.mean(shares) < 1 and seen


@pytest.mark.nightly
def test_the_reference_may_be_one_side(make, params, tiny):
    config = dataclasses.replace(SAMPLES, selector="reference_against_own")
    batch, _ = make(PairBatches, config, own=1).next_batch(params)
    rows, reference = flat(batch), tiny.processor.answer_ids("A cat.")[0]
    assert rows.weight.all()
    for row in range(4):
        np.testing.assert_array_equal(answers_of(rows, row)[0], reference)
        assert not np.array_equal(answers_of(rows, row)[1], reference)
