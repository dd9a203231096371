"""Pairs that share a row have the log-probs, the loss and the gradients that they have in rows of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.checkpoints import tiny_llava
from helpers.families import all_cases
from helpers.tiny import FROZEN_TOWER, MIXED, Tiny, quick_jit, record

from mmalign_jax import losses
from mmalign_jax.config import DataConfig
from mmalign_jax.data import packed_rows
from mmalign_jax.data.device import to_device
from mmalign_jax.data.loader import make_loader
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.mesh import batch_divisor, make_mesh
from mmalign_jax.models.packed_pairs import one_a_row
from mmalign_jax.training.branches import Side, branch_logps
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.step import init_state, make_train_step

LONG = "There is a red cat and there is a blue dog on the table."
RECORDS = [dataclasses.replace(r, id=f"{r.id} {turn}", responses=r.responses[:: 1 - 2 * turn]) for r in MIXED for turn in range(2)]
RECORDS += [
    record("three", "Is there a bird in the picture?", LONG, "No.", images=[2, 1, 3]),
    *(record(f"short {number}", "Describe? " * (number % 3 + 1), "Yes. " * (number % 4 + 1), "No. " * (number % 5 + 1)) for number in range(7)),
]
RECORDS = [
    dataclasses.replace(r, prefs=(dataclasses.replace(r.prefs[0], weight=0.5 + number % 3, margin=number % 4),))
    for number, r in enumerate(RECORDS)
]
BETA = 1.0  # the policy is not the reference


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(packed_rows, "TRIED_STEPS", 8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("reference"), layout="memory", seed=1))


def batches(tiny, devices=1, parts=1, records=RECORDS):
    """(packed, a row a pair): the same step of 16 pairs."""
    plan = plan_rows(records, tiny.processor, DataConfig(packed=True), answers=2)
    options = {"batch_size": 16, "accumulate": parts, "seed": 1, "workers": 0, "devices": devices}
    cost = lambda shape: shape.rows * (shape.prefix_slots + 2 * shape.answer_slots + 40)  # noqa: E731
    return [next(make_loader(records, tiny.processor, plan, **options, packed=packed)) for packed in (cost, None)]


def by_pair(batch, values):
    """Rows of values in the order of the pairs' keys."""
    return np.asarray(values)[np.argsort(np.asarray(batch.record_key).ravel())]


def first(batch):
    return jax.tree.map(lambda x: jnp.asarray(x[0]), batch)


@pytest.fixture(scope="module")
def everything(tiny):
    """Statistics, metrics and gradients; the tower trains, too."""
    loss = LossFunction(tiny.model, losses.build("dpo", beta=BETA))

    def value(params, reference, batch):
        stats = loss.statistics(params, {}, reference, batch, jax.random.key(0))
        per_pair, metrics = loss.objective(stats)
        return jnp.mean(per_pair), (stats.answers, metrics)

    return value


@pytest.fixture(scope="module")
def separately(tiny, reference, everything):
    """Pairs that have a row each, on one device: what is found of them."""
    _, alone = batches(tiny)
    return alone, jax.device_get(quick_jit(everything)(tiny.params, reference.params, first(alone)))[1]


def on_mesh(tiny, reference, function, devices):
    """The packed rows of a mesh, and what is found of them there."""
    mesh = make_mesh(2, 2, 2) if devices == 8 else make_mesh(1, 1, 1, jax.devices()[:1])
    packed, _ = batches(tiny, batch_divisor(mesh))
    own = 16 // batch_divisor(mesh)
    assert packed.tokens.shape[1] < 12 and packed.place.shape == (1, 16 // own, own) and packed.segment.max() > 0
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: x[0], to_device(packed, mesh))
        return packed, jax.device_get(quick_jit(function)(tiny.sharded(mesh), reference.sharded(mesh), placed))


def same_statistics(packed, found, separately):
    (answers, metrics), (alone, (their_answers, their_metrics)) = found, separately
    for name in ("policy", "reference", "lengths"):
        ours, theirs = by_pair(packed, getattr(answers, name)), by_pair(alone, getattr(their_answers, name))
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-5, err_msg=name)
    assert np.abs(answers.policy - answers.reference).min() > 0.01
    for name in their_metrics:
        np.testing.assert_allclose(metrics[name], their_metrics[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_packed_pairs_have_the_log_probs_of_separate_rows_on_eight_devices(tiny, reference, everything, separately):
    packed, (_, found) = on_mesh(tiny, reference, everything, 8)
    same_statistics(packed, found, separately)


@pytest.mark.nightly
@pytest.mark.parametrize("devices", [1, 8])
def test_packed_pairs_have_the_gradients_of_separate_rows(tiny, reference, everything, separately, devices):
    gradient = jax.grad(everything, has_aux=True)
    expected = jax.device_get(quick_jit(gradient)(tiny.params, reference.params, first(separately[0])))[0]
    packed, (grads, found) = on_mesh(tiny, reference, gradient, devices)
    same_statistics(packed, found, separately)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * np.abs(b).max() + 1e-7), grads, expected)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["vision_tower"]["layers"]["mlp"]))


def test_a_pair_in_a_row_of_its_own_is_what_it_was(tiny):
    packed, alone = map(first, batches(tiny))
    back = quick_jit(one_a_row)(packed)
    assert (back.prefix_slots, back.answer_slots) == (alone.prefix_slots, alone.answer_slots)
    assert back.segment is None and back.place is None and back.tokens.shape == alone.tokens.shape
    for name in ("tokens", "role", "positions", "token_weight"):
        np.testing.assert_array_equal(by_pair(back, getattr(back, name)), by_pair(alone, getattr(alone, name)), err_msg=name)
    # each shows its own pictures, wherever these are
    n = tiny.config.image_tokens
    for number, row in enumerate(np.argsort(np.asarray(back.record_key))):
        other = np.argsort(np.asarray(alone.record_key))[number]
        index, theirs = back.image_index[row], alone.image_index[other]
        np.testing.assert_array_equal(np.where(index >= 0, index % n, -1), np.where(theirs >= 0, theirs % n, -1))
        for slot in np.flatnonzero(np.asarray(index) >= 0)[::n]:
            shown = alone.images[alone.picture[0, other], theirs[slot] // n]
            np.testing.assert_array_equal(back.images[0, index[slot] // n], shown)


def steps(tiny, reference, name, parts):
    """One step by plain gradient descent of the rows of two devices, packed and not, whose order differs: for each, what moved and the metrics."""
    loss, optimizer = LossFunction(tiny.model, losses.build(name)), optax.sgd(1.0)
    theirs = FROZEN_TOWER.split(reference.params)[0] if loss.reads_reference else None
    params, frozen = FROZEN_TOWER.split(tiny.params)
    step = make_train_step(loss, optimizer, optax.constant_schedule(1.0))
    rows = batches(tiny, 2, parts)
    assert not np.array_equal(*(batch.record_key for batch in rows)) and rows[0].tokens.shape[1] < 12 // parts
    for batch in rows:
        state = init_state(*jax.tree.map(jnp.copy, (params, frozen)), optimizer, seed=0, objective=loss.objective)
        batch = jax.tree.map(jnp.asarray, batch)
        run = step.lower(state, theirs, batch).compile(compiler_options={"xla_backend_optimization_level": 0})
        after, metrics = run(state, theirs, batch)
        metrics.pop("padding_fraction")
        yield jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after.params, params), jax.device_get((metrics, after.objective))


# Of sums and lengths, and of the whole vocabulary; of all rows of a step, some with a draw or a weight by a row's place
NAMES = ["simpo", "orpo", "ipo", "bco", "tdpo", "aot", "aot_unpaired", "beta_dpo", "dama"]


@pytest.mark.parametrize(
    ("name", "parts"), [("beta_dpo", 1), *(pytest.param(name, 2, marks=pytest.mark.nightly) for name in NAMES)]
)
def test_objectives_read_the_same(tiny, reference, name, parts):
    (moved, metrics), (expected, expected_metrics) = steps(tiny, reference, name, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), metrics, expected_metrics)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-6 * scale), moved, expected)


def test_what_rows_of_several_pairs_do_not_have_is_not_read(tiny):
    packed, _ = map(first, batches(tiny))
    for name, reads in (("kto", "another row's answer"), ("mdpo", "answers under a corrupted image"), ("ddpo", "log-probs by token")):
        with pytest.raises(ValueError, match=f"{name} reads {reads}.*, which rows of several pairs do not have"):
            LossFunction(tiny.model, losses.build(name)).statistics({}, tiny.params, None, packed, jax.random.key(0))


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in all_cases() if name.split()[0] in ("llava_next", "internvl", "idefics3", "smolvlm")])
def test_pictures_of_many_tiles(tmp_path, name):
    """Tiles of one size stand behind those of other pairs, with a newline's feature before them all where there is one."""
    case = all_cases()[name]
    tiny = Tiny.load(case.write(tmp_path, 1))
    records = [dataclasses.replace(r, id=f"{r.id} {turn}", responses=r.responses[:: 1 - 2 * (turn % 2)]) for r in case.records for turn in range(4)]
    packed, alone = map(first, batches(tiny, 2, records=records))
    assert packed.tokens.shape[0] < 12 and packed.segment.max() > 0
    side = Side(tiny.model, tiny.params)
    run = quick_jit(lambda batch: branch_logps(side, side.tower(batch), batch)[0])
    np.testing.assert_allclose(by_pair(packed, run(packed)), by_pair(alone, run(alone)), rtol=2e-5, atol=1e-4)
