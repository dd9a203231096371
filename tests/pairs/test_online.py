"""Batches whose rejected answers the current policy writes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import checkpoints
from helpers.tiny import Tiny, record

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import DataConfig, PairsConfig, TrainConfig
from mmalign_jax.data.layout import lay_out
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import UserError
from mmalign_jax.pairs.bdhs import BdhsSampler
from mmalign_jax.pairs.online import BdhsBatches
from mmalign_jax.types import PairBatch, Preference, Response, record_key

RECORDS = [record(color, "What is there?", f"A {color} cat. Yes.", images=[len(color)]) for color in ("red", "blue", "green")]
TRAIN = TrainConfig(batch_size=4, accumulate=2, seed=3)
PAIRS = PairsConfig(maker="bdhs", when="online", rho_th=0.5, n_iter=2, max_sentence_tokens=4, max_answer_tokens=16, batch_size=4)




@pytest.fixture(scope="module")
def make(tmp_path_factory):
    tiny = Tiny.load(checkpoints.tiny_llava(tmp_path_factory.mktemp("online"), seed=3))
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    plan = plan_rows(RECORDS, tiny.processor, DataConfig(), answers=1)
    sampler = BdhsSampler(tiny.model, tiny.processor, mesh, PAIRS, plan.layout, 2)

    def online(config=TRAIN, slots=64):
        layout = dataclasses.replace(plan.layout, answers=2, answer_slots=slots)
        return BdhsBatches(RECORDS, tiny.processor, sampler, plan, layout, config), layout

    online.params, online.processor, online.sampler = tiny.sharded(mesh), tiny.processor, sampler
    return online


def same(a: PairBatch, b: PairBatch) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_rows_of_a_batch(make):
    batches, layout = make()
    batch, metrics = batches.next_batch(make.params)
    assert batch.tokens.shape == (2, 2, layout.tokens) and batch.images.shape[:3] == (2, 2, 1) and batch.answers == 2
    by_key = {record_key(one.id): one for one in RECORDS}
    keys = np.reshape(batch.record_key, -1)
    chosen = [by_key[int(key)] for key in keys]
    assert len(set(keys[:3].tolist())) == 3  # one epoch
    for number, (one, outcome) in enumerate(zip(chosen, make.sampler(make.params, chosen, draw=0), strict=True)):
        preference = Preference(0, 1, margin=1 - outcome.similarity)
        pair = dataclasses.replace(one, responses=(one.responses[0], Response(outcome.rejected)), prefs=(preference,))
        for name, value in lay_out(pair, pair.prefs[0], make.processor, layout).items():
            np.testing.assert_array_equal(getattr(batch, name)[number // 2, number % 2], value)
    assert metrics["bdhs/changed"] == 1.0 and metrics["bdhs/too_long"] == metrics["bdhs/unusable"] == 0.0
    assert 1 <= metrics["bdhs/iterations"] <= 2 and 0 <= metrics["bdhs/similarity"] < 1


def test_steps_differ_and_a_state_goes_on(make):
    batches, _ = make()
    first, _ = batches.next_batch(make.params)
    saved = json.loads(json.dumps(batches.get_state()))
    second, _ = batches.next_batch(make.params)
    third, _ = batches.next_batch(make.params)
    assert not same(first, second)
    other, _ = make()
    other.set_state(saved)
    assert same(other.next_batch(make.params)[0], second) and same(other.next_batch(make.params)[0], third)
    # another policy, other answers
    other.set_state(saved)
    weak = jax.tree.map(lambda leaf: leaf * 0.5, make.params)
    assert not same(other.next_batch(weak)[0], second)


def test_the_state_of_another_run_is_refused(make):
    batches, _ = make()
    for state in ({"rows": 8, "seed": 3, "items": 3}, {"online_step": 1, "seed": 4, "items": 3}, {"online_step": 1, "seed": 3, "items": 9}):
        with pytest.raises(UserError, match="use a new --workdir"):
            batches.set_state(state)


def test_a_rejected_answer_that_is_too_long_becomes_a_pair_of_equal_answers(make):
    longest = max(len(make.processor.answer_ids(one.responses[0].text)[0]) for one in RECORDS)
    batches, layout = make(slots=longest)
    seen = []
    for _ in range(3):
        batch, metrics = batches.next_batch(make.params)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        answers = flat.tokens[:, layout.prefix_slots :].reshape(4, 2, -1)
        equal = np.all(answers[:, 0] == answers[:, 1], axis=-1)
        assert np.mean(equal) == metrics["bdhs/too_long"] and metrics["bdhs/changed"] == 1 - np.mean(equal)
        seen += equal.tolist()
    assert {True} <= set(seen)
