"""Decode lanes: what they draw from, where they start, what they may see, and on what they do not depend."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import quiet, tiny_llava
from helpers.tiny import MIXED, Tiny, answer_sums, batch_of, prefill, quick_jit, rows, sample

from mmalign_jax.models.apart import are_apart, layers_apart
from mmalign_jax.sampling import DecodeOptions, LaneStart, decode_lanes, lane_keys
from mmalign_jax.types import FIRST_ANSWER, PREFIX

X = 12
WARM = DecodeOptions(X, temperature=0.8, top_p=0.9, stop_ids=(2,), banned_ids=(0, 1, 3, 4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory", seed=5))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    text = {"model_type": "mistral", "head_dim": 6, "sliding_window": 8}
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("windowed"), layout="memory", seed=5, text=text))


@pytest.fixture(scope="module")
def batch(tiny):
    return batch_of(MIXED, tiny.processor)


@pytest.fixture(scope="module")
def warm(tiny, batch):
    """Three lanes a row at temperature 0.8."""
    return jax.device_get(quick_jit(lambda batch: sample(tiny.model, tiny.params, batch, WARM, lanes=3))(batch))


def with_answers(batch, tokens, lengths):
    """Rows whose answers are what the lanes wrote."""
    lanes = tokens.shape[1]
    prefix = {name: getattr(batch, name)[:, : batch.prefix_slots] for name in ("tokens", "role", "positions", "image_index")}
    count = jnp.sum(prefix["role"] == PREFIX, axis=1)
    there = np.arange(X) < lengths[..., None]
    answers = {
        "tokens": tokens,
        "role": jnp.where(there, FIRST_ANSWER + jnp.arange(lanes)[:, None], 0).astype(jnp.int8),
        "positions": jnp.broadcast_to(count[:, None, None] + jnp.arange(X), tokens.shape),
        "image_index": jnp.full(tokens.shape, -1),
    }
    joined = {name: jnp.concatenate([prefix[name], answers[name].reshape(len(tokens), -1)], axis=1) for name in prefix}
    return dataclasses.replace(batch, **joined, token_weight=jnp.ones(joined["tokens"].shape), answer_slots=X)


def test_log_probs_equal_teacher_forced_ones(tiny, batch, warm):
    """Of the model itself: the lanes drew at another temperature, with top-p and bans."""
    assert warm.lengths.min() > 1 and len({tuple(lane) for lane in warm.tokens.reshape(-1, X)}) == 12
    forced = quick_jit(lambda batch: answer_sums(tiny.model, tiny.params, batch))(with_answers(batch, warm.tokens, warm.lengths))
    np.testing.assert_allclose(np.sum(warm.logps, axis=-1), forced, rtol=1e-5)
    assert np.all(warm.logps[np.arange(X) >= warm.lengths[..., None]] == 0)


def test_a_lane_depends_on_its_record_alone(tiny, batch, warm):
    moved = quick_jit(lambda batch: sample(tiny.model, tiny.params, batch, WARM, lanes=2))(rows(batch, 3, 2, 0))
    np.testing.assert_array_equal(moved.tokens, warm.tokens[[3, 2, 0], :2])


@pytest.mark.parametrize("name", ["tiny", "windowed"])
def test_layers_apart_write_what_stacked_layers_write(request, name):
    tiny = request.getfixturevalue(name)
    batch, options = batch_of(MIXED, tiny.processor), dataclasses.replace(WARM, top_p=1.0)
    apart = layers_apart(tiny.params, small=0)
    assert are_apart(apart) and not are_apart(tiny.params)
    write = quick_jit(lambda params, batch: sample(tiny.model, params, batch, options, lanes=2))
    stacked, found = write(tiny.params, batch), write(apart, batch)
    np.testing.assert_array_equal(found.tokens, stacked.tokens)
    np.testing.assert_allclose(found.logps, stacked.logps, rtol=2e-5, atol=1e-6)


def test_keys_differ_by_seed_record_draw_and_lane():
    records, draws = jnp.array([7, 7, 8, 8], jnp.uint32), jnp.array([0, 1, 0, 1], jnp.int32)
    keys = [lane_keys(jax.random.key(seed), records, draws, 3) for seed in (0, 1)]
    data = np.concatenate([np.asarray(jax.random.key_data(some)).reshape(-1, 2) for some in keys])
    assert len({tuple(key) for key in data.tolist()}) == 2 * 2 * 2 * 3


@pytest.mark.parametrize("name", ["tiny", "windowed"])
def test_a_lane_behind_an_answers_token_equals_a_row_that_ends_there(request, name):
    tiny = request.getfixturevalue(name)
    batch, options = batch_of(MIXED, tiny.processor), DecodeOptions(X)
    kept = np.array([[1, 4], [3, 1], [2, 5], [4, 1]])  # tokens of each answer before its lane
    slot = batch.prefix_slots + np.arange(2) * batch.answer_slots + kept - 1

    @quick_jit
    def both(batch, cut):
        def run(batch, start):
            filled = prefill(tiny.model, tiny.params, batch)
            keys = lane_keys(jax.random.key(0), batch.record_key, jnp.zeros_like(batch.record_key, jnp.int32), start.slot.shape[1])
            return decode_lanes(tiny.model, tiny.params, filled, batch, start, keys, options)

        return run(batch, LaneStart(jnp.asarray(slot), jnp.ones(slot.shape, bool))), run(cut, LaneStart.behind_prefix(cut.role))

    # the answer's beginning as part of the prefix: nothing else is in such a row
    width = batch.prefix_slots + 8
    cut = {name: np.zeros((8, width), getattr(batch, name).dtype) for name in ("tokens", "role", "positions", "image_index")}
    for row, answer in np.ndindex(4, 2):
        start = batch.prefix_slots + answer * batch.answer_slots
        slots = [*np.flatnonzero(batch.role[row] == PREFIX), *range(start, start + kept[row, answer])]
        for column in cut:
            cut[column][2 * row + answer, : len(slots)] = np.asarray(getattr(batch, column))[row, slots]
        cut["role"][2 * row + answer, : len(slots)] = PREFIX
        np.testing.assert_array_equal(cut["positions"][2 * row + answer, : len(slots)], np.arange(len(slots)))
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)
    changed = {name: jnp.asarray(value) for name, value in cut.items()} | {"prefix_slots": width - 8, "answer_slots": 8}
    lanes, alone = both(batch, dataclasses.replace(repeated, **changed))
    np.testing.assert_array_equal(lanes.tokens.reshape(8, X), alone.tokens[:, 0])
    np.testing.assert_allclose(lanes.logps.reshape(8, X), alone.logps[:, 0], atol=1e-5)
    assert len({tuple(lane) for lane in np.asarray(alone.tokens[:, 0])}) == 8


def masked_transformers(tiny, batch, row, slots, keep):
    """Logits of transformers for one sequence whose hidden image tokens are masked as keys in every layer."""
    with quiet():
        model = transformers.LlavaForConditionalGeneration.from_pretrained(tiny.directory).eval()
    role, index = np.asarray(batch.role[row])[slots], np.asarray(batch.image_index[row])[slots]
    seen = np.tril(np.ones((len(role), len(role)), bool)) & ((index < 0) | keep[row][np.maximum(index, 0)])
    mask = torch.where(torch.from_numpy(seen), 0.0, torch.finfo(torch.float32).min)[None, None]
    pixels = (np.asarray(batch.images[row], np.float32) / 255 - np.array(tiny.processor.mean)) / np.array(tiny.processor.std)
    pixels = torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2).copy())
    ids = torch.tensor(np.asarray(batch.tokens[row])[slots][None], dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, attention_mask=mask, position_ids=torch.arange(len(role))[None]).logits[0].numpy()


def test_hidden_image_tokens_are_masked_in_every_layer(tiny):
    batch = rows(batch_of(MIXED, tiny.processor), 1, 0)  # the first has two pictures
    keep = np.random.default_rng(0).random((2, 32)) < 0.3
    keep[0, 16:] = False  # its second picture is hidden altogether

    @quick_jit
    def run(batch, keep):
        visible = (batch.image_index < 0) | jnp.take_along_axis(keep, jnp.maximum(batch.image_index, 0), axis=1)
        filled = prefill(tiny.model, tiny.params, batch, visible)
        # behind the second token of the first answer, where BDHS would start
        start = LaneStart(jnp.full((2, 1), batch.prefix_slots + 1), jnp.ones((2, 1), bool))
        keys = lane_keys(jax.random.key(0), batch.record_key, jnp.zeros(2, jnp.int32), 1)
        samples = decode_lanes(tiny.model, tiny.params, filled, batch, start, keys, DecodeOptions(X), visible)
        return tiny.model.logits(tiny.params, filled.hidden), samples

    logits, samples = run(batch, keep)
    role = np.asarray(batch.role[0])
    slots = np.flatnonzero((role == PREFIX) | (role == FIRST_ANSWER))
    expected = masked_transformers(tiny, batch, 0, slots, keep)
    shown = np.asarray(batch.image_index[0])[slots]
    used = (shown < 0) | keep[0][np.maximum(shown, 0)]  # what a hidden token itself computes is read by nobody
    np.testing.assert_allclose(np.asarray(logits[0])[slots][used], expected[used], atol=1e-4)
    # the first token that the lane writes
    behind = np.flatnonzero(slots == batch.prefix_slots + 1)[0]
    assert samples.tokens[0, 0, 0] == np.argmax(expected[behind])
    assert np.abs(np.asarray(run(batch, np.ones_like(keep))[0][0])[slots] - expected).max() > 0.01

    # pixels whose tokens are all hidden do not matter, others do
    changed = run(batch.with_images(batch.images.at[0, 1].set(255 - batch.images[0, 1])), keep)
    np.testing.assert_array_equal(changed[0][0][slots][used], logits[0][slots][used])
    jax.tree.map(np.testing.assert_array_equal, changed[1], samples)
    seen = run(batch.with_images(batch.images.at[0, 0].set(255 - batch.images[0, 0])), keep)
    assert np.abs(seen[0][0][slots[-1]] - logits[0][slots[-1]]).max() > 1e-3


ALLOWED = (50, 60, 70, 80, 90, 100)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(0.5, 1.0, 0), (2.0, 0.7, 0), (2.0, 0.7, 4)])
def test_draws_follow_the_tempered_and_cut_distribution(tiny, batch, temperature, top_p, top_k):
    lanes, one = 4000, rows(batch, 0)
    banned = tuple(sorted(set(range(tiny.config.decoder.vocab_size)) - set(ALLOWED)))
    options = DecodeOptions(1, temperature=temperature, top_p=top_p, top_k=top_k, banned_ids=banned)

    @quick_jit
    def run(batch):
        filled = prefill(tiny.model, tiny.params, batch)
        start = LaneStart.behind_prefix(batch.role, lanes)
        keys = lane_keys(jax.random.key(3), batch.record_key, jnp.zeros(1, jnp.int32), lanes)
        samples = decode_lanes(tiny.model, tiny.params, filled, batch, start, keys, options)
        return samples.tokens, tiny.model.logits(tiny.params, filled.hidden[0, start.slot[0, 0]])

    tokens, logits = run(one)
    allowed = np.asarray(logits, np.float64)[list(ALLOWED)] / temperature
    expected = np.exp(allowed - allowed.max())
    expected /= expected.sum()
    order = np.argsort(-expected)
    if top_k:
        expected[order[top_k:]] = 0.0
        expected /= expected.sum()
        order = order[:top_k]
    kept = order[np.cumsum(expected[order]) - expected[order] < top_p]
    assert top_p == 1 or 1 < len(kept) < len(order)
    cut = np.zeros(len(ALLOWED))
    cut[kept] = expected[kept] / expected[kept].sum()
    counts = np.array([np.sum(np.asarray(tokens) == token) for token in ALLOWED])
    assert counts.sum() == lanes
    assert np.all(counts[cut == 0] == 0)
    # 4.5 standard deviations of a binomial count
    assert np.all(np.abs(counts - lanes * cut) <= 4.5 * np.sqrt(lanes * cut * (1 - cut)))


def test_bans_stops_and_inactive_lanes(tiny, batch):
    """A token that greedy writes is forbidden, and then ends a lane."""
    run = quick_jit(lambda batch, options: sample(tiny.model, tiny.params, batch, options), static_argnums=1)
    free = np.asarray(run(batch, DecodeOptions(X)).tokens[:, 0])
    token = int(free[0, 3])
    banned = run(batch, DecodeOptions(X, banned_ids=(token,)))
    assert not np.any(banned.tokens == token)
    first = int(np.flatnonzero(free[0] == token)[0])
    np.testing.assert_array_equal(banned.tokens[0, 0, :first], free[0, :first])
    stopped = run(batch, DecodeOptions(X, stop_ids=(token, 2)))
    for row in range(4):
        ends = np.flatnonzero((free[row] == token) | (free[row] == 2))
        length = ends[0] + 1 if len(ends) else X
        assert int(stopped.lengths[row, 0]) == length
        assert bool(stopped.stopped[row, 0]) == bool(len(ends))
        np.testing.assert_array_equal(stopped.tokens[row, 0], np.where(np.arange(X) < length, free[row], 0))
    padding = dataclasses.replace(batch, role=batch.role.at[2].set(0))
    nothing = run(padding, DecodeOptions(X))
    assert int(nothing.lengths[2, 0]) == 0 and not np.any(nothing.tokens[2]) and not np.any(nothing.logps[2])
    np.testing.assert_array_equal(nothing.tokens[[0, 1, 3], 0], free[[0, 1, 3]])
