"""What must hold of every family, whatever its attention and positions are: the tests that catch "ran, and was wrong"."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.families import all_cases, one_a_kind
from helpers.tiny import Tiny, answer_sums, batch_of, quick_jit, rows, sample, shared

from mmalign_jax import losses
from mmalign_jax.mesh import make_mesh, sharding
from mmalign_jax.sampling import DecodeOptions, kept_slots, without_hidden
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.types import FIRST_ANSWER, PAD, PREFIX

CASES = all_cases()
TOKENS = 12


@pytest.fixture(scope="module", params=one_a_kind())
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def tiny(case, tmp_path_factory):
    return Tiny.load(case.write(tmp_path_factory.mktemp("tiny"), 1))


@pytest.fixture(scope="module")
def batch(case, tiny):
    return batch_of(case.records, tiny.processor)


@pytest.fixture(scope="module")
def sums(tiny):
    function = quick_jit(lambda params, batch: answer_sums(tiny.model, params, batch))
    return lambda batch: np.asarray(function(tiny.params, batch))


@pytest.fixture(scope="module")
def expected(sums, batch):
    return sums(batch)


def negative(batch, row):
    """The batch with the colours of one row's pictures reversed."""
    return batch.with_images(batch.images.at[row].set(255 - batch.images[row]))


def test_pixels_matter_padding_mates_and_other_answers_do_not(case, sums, batch, expected):
    for row, record in enumerate(case.records):
        changed = np.abs(sums(negative(batch, row)) - expected)
        assert np.all(changed[row] > 1e-3) if record.media else np.all(changed[row] == 0), record.id
        np.testing.assert_allclose(np.delete(changed, row, axis=0), 0, atol=1e-5)
    padding = batch.role == PAD
    garbage = dataclasses.replace(
        batch, tokens=jnp.where(padding, 77, batch.tokens), positions=jnp.where(padding, 5, batch.positions),
        image_index=jnp.where(padding, 0, batch.image_index),
    )  # fmt: skip
    np.testing.assert_allclose(sums(garbage), expected, rtol=1e-6)
    order = np.arange(len(case.records))[::-1].copy()
    np.testing.assert_allclose(sums(rows(batch, *order))[order], expected, rtol=1e-5)


def test_shared_pictures_equal_separate_ones(case, sums, batch, expected):
    order = np.concatenate([np.arange(len(case.records)), [1, 0]])
    once = shared(rows(batch, *order))
    assert once.images.shape[0] < len(order)
    np.testing.assert_allclose(sums(once), expected[order], rtol=1e-5)


def test_packed_row_equals_separate_rows_and_other_padding(case, tiny, batch, expected):
    alone = [dataclasses.replace(r, responses=(response,), prefs=()) for r in case.records for response in r.responses]
    # more slots for everything, too: what is empty must not matter
    wide = batch_of(
        alone, tiny.processor, answers=1, prefix_slots=batch.prefix_slots + 9, answer_slots=batch.answer_slots + 5,
        images=batch.images.shape[1] + 1,
    )  # fmt: skip
    separate = quick_jit(lambda batch: answer_sums(tiny.model, tiny.params, batch))(wide)
    np.testing.assert_allclose(np.asarray(separate)[:, 0], expected.reshape(-1), rtol=1e-5, atol=1e-4)


def test_what_is_hidden_need_not_be_computed(case, tiny, batch):
    """Rows without their hidden image tokens give the same hidden states as whole rows under a mask."""
    random = np.random.default_rng(0).random(batch.tokens.shape)
    visible = jnp.asarray(random < 0.4) | (batch.image_index < 0)
    kept = np.asarray(kept_slots(batch, visible))
    slots = int(kept.sum(axis=1).max()) + 1  # of the longest row, one is padding
    assert slots < batch.prefix_slots

    @quick_jit
    def both(params, batch, visible):
        features = tiny.model.encode_images(params, batch.images, batch.patches)
        shown, seen, now_at = without_hidden(batch, visible, slots)
        found = tiny.model.prefill(params, features, shown, seen).hidden
        return tiny.model.prefill(params, features, batch, visible).hidden, jnp.take_along_axis(found, now_at[..., None], axis=1)

    whole, found = (np.asarray(x) for x in both(tiny.params, batch, visible))
    computed = np.concatenate([kept, np.asarray(batch.role[:, batch.prefix_slots :] != PAD)], axis=1)
    np.testing.assert_allclose(found[computed], whole[computed], rtol=1e-5, atol=1e-5 * np.abs(whole).max())


def test_decoded_log_probs_are_teacher_forced_ones(case, tiny, batch):
    """Sampled tokens put into the rows as answers get the log-probs that the sampler said."""
    drawn = quick_jit(lambda batch: sample(tiny.model, tiny.params, batch, DecodeOptions(TOKENS, temperature=1.0), lanes=2))(batch)
    slots = batch.answer_slots
    assert slots >= TOKENS
    tokens, role = np.array(batch.tokens), np.array(batch.role)
    positions, mrope = np.array(batch.positions), None if batch.mrope is None else np.array(batch.mrope)
    for row in range(len(tokens)):
        prefix = int((role[row] == PREFIX).sum())
        for lane in range(2):
            start = batch.prefix_slots + lane * slots
            here = slice(start, start + TOKENS)
            role[row, start : start + slots] = PAD
            tokens[row, here], role[row, here] = drawn.tokens[row, lane], FIRST_ANSWER + lane
            positions[row, here] = prefix + np.arange(TOKENS)
            if mrope is not None:
                mrope[row, :, here] = mrope[row, :, :prefix].max() + 1 + np.arange(TOKENS)
    forced = dataclasses.replace(batch, tokens=jnp.array(tokens), role=jnp.array(role), positions=jnp.array(positions))
    if mrope is not None:
        forced = dataclasses.replace(forced, mrope=jnp.array(mrope))
    forced = dataclasses.replace(forced, token_weight=jnp.array(role >= FIRST_ANSWER, jnp.float32))
    got = quick_jit(lambda batch: answer_sums(tiny.model, tiny.params, batch))(forced)
    np.testing.assert_allclose(np.asarray(got), np.asarray(drawn.logps).sum(-1), atol=1e-4, rtol=1e-5)


def test_first_loss_gradients_and_eight_devices(case, tiny, batch):
    """Step 0 of DPO is log 2; every tensor that trains gets a gradient; eight devices give the loss of one."""
    count = -(-8 // len(case.records)) * len(case.records)
    eight = rows(batch, *(np.arange(count) % len(case.records))[:8])
    loss = LossFunction(tiny.model, losses.build("dpo", beta=0.5))
    params, frozen = tiny.params, {}
    gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (value, _), grads = gradient(params, frozen, params, eight, jax.random.key(0))
    np.testing.assert_allclose(value, np.log(2), atol=5e-5)
    silent = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if not np.any(leaf)]
    # softmax does not see what a key bias adds to all of a query's scores: its gradient is rounding, or 0
    assert all(name.endswith("['key']['bias']") for name in silent), silent

    other = jax.tree.map(lambda x: x * 1.1, tiny.params)
    one = gradient(params, frozen, other, eight, jax.random.key(0))[0][0]
    mesh = make_mesh(2, 4, 1)
    with jax.set_mesh(mesh):
        spread = tiny.sharded(mesh)
        placed = jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, "batch", *(None,) * (x.ndim - 1))), eight)
        theirs = jax.tree.map(lambda x: x * 1.1, spread)
        many = jax.jit(loss, compiler_options={"xla_backend_optimization_level": 0})(spread, {}, theirs, placed, jax.random.key(0))[0]
    assert abs(float(one) - np.log(2)) > 1e-3
    np.testing.assert_allclose(many, one, rtol=5e-5)
