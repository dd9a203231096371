"""The same rows for any number of processes, none lost at epoch ends, and the same batches after a restore."""

import collections
import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
from helpers.rows import LetterProcessor, record

from mmalign_jax.config import DataConfig
from mmalign_jax.data import builder
from mmalign_jax.data import plan as plan_lib
from mmalign_jax.data.device import on_device, process_slice, to_device
from mmalign_jax.data.loader import make_loader, one_pass
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.data.sources.source import Source
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.mesh import make_mesh
from mmalign_jax.types import Media, record_key

PROCESSOR = LetterProcessor()
RECORDS = [record(f"r{n}", chosen=f"yes {n}", images=n % 2 + 1) for n in range(10)]
KEYS = [record_key(row.id) for row in RECORDS]


@pytest.fixture(scope="module")
def plan():
    return plan_rows(RECORDS, PROCESSOR, DataConfig(), answers=2)


def loader(plan, **settings):
    return make_loader(RECORDS, PROCESSOR, plan, **{"batch_size": 4, "accumulate": 1, "seed": 3, "workers": 2} | settings)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def keys(batches):
    """The record keys of each step, in order, whatever parts the step is cut into."""
    return [batch.record_key.ravel().tolist() for batch in batches]


def test_shapes(plan):
    batch = next(loader(plan, accumulate=2))
    tokens = plan.layout.tokens
    assert batch.tokens.shape == batch.role.shape == batch.positions.shape == batch.image_index.shape == (2, 2, tokens)
    assert batch.images.shape == (2, 2, 2, 4, 6, 3) and batch.images.dtype == np.uint8
    assert batch.record_key.dtype == np.uint32 and batch.role.dtype == np.int8 and batch.answers == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_next_batch_will_be_is_known_before_it_is_made(plan, workers):
    extra = lambda number, layout: {"reference_logps": np.full(layout.tokens, number, np.float32)}  # noqa: E731
    settings = {"batch_size": 8, "accumulate": 2, "process_count": 2, "workers": workers, "extras": [extra]}
    expected = next(loader(plan, **settings))
    begun = loader(plan, **settings)
    shapes = begun.begin()
    form = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert form(shapes) == form(expected)
    jax.tree.map(np.testing.assert_array_equal, next(begun), expected)


def test_shapes_on_the_device_are_those_of_the_arrays(plan):
    for mesh in (make_mesh(1, 4, 2), make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        batches = loader(plan, batch_size=8, accumulate=2)
        shapes, arrays = on_device(batches.begin(), mesh), to_device(next(batches), mesh)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), shapes, arrays))


def test_all_rows_of_a_large_step_are_made_beside_the_one_before(plan):
    made, ready = [], threading.Event()

    def extra(number, layout):
        made.append(number)
        if len(made) > 40:  # one was made to know the shapes
            ready.set()
        return {}

    batches = loader(plan, batch_size=40, workers=2, extras=[extra])
    batches.begin()
    assert ready.wait(60)


def test_every_epoch_holds_every_row_once_and_batches_run_across_its_end(plan):
    rows = np.concatenate([batch.record_key.ravel() for batch in take(loader(plan), 15)])  # 60 rows, 6 epochs of 10
    epochs = rows.reshape(6, 10)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(KEYS)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 4


def test_order_depends_on_the_seed_only(plan):
    first = keys(take(loader(plan), 5))
    assert keys(take(loader(plan, workers=0), 5)) == first
    assert keys(take(loader(plan, workers=4), 5)) == first
    assert keys(take(loader(plan, seed=4), 5)) != first
    assert keys(take(loader(plan, seed=2**40), 1)) != keys(take(loader(plan, seed=0), 1))
    assert keys(take(loader(plan, accumulate=2), 5)) == first


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_see_the_single_process_rows(plan, count):
    alone = take(loader(plan, batch_size=8, accumulate=2), 6)
    parts = [take(loader(plan, batch_size=8, accumulate=2, process_index=p, process_count=count), 6) for p in range(count)]
    for step in range(6):
        for part in range(2):
            together = np.concatenate([parts[p][step].record_key[part] for p in range(count)])
            assert together.tolist() == alone[step].record_key[part].tolist()


def test_tokens_kept_or_made_again_are_the_same(plan, monkeypatch):
    monkeypatch.setattr(plan_lib, "KEEP_TOKEN_BYTES", 200)
    again = plan_rows(RECORDS, PROCESSOR, DataConfig(), answers=2)
    assert again.tokens is None and len(plan.tokens) == 10
    for a, b in zip(take(loader(again), 5), take(loader(plan), 5), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_restore_gives_the_same_batches(plan):
    running = loader(plan)
    take(running, 4)
    state = json.loads(json.dumps(running.get_state()))
    expected = take(running, 5)
    fresh = loader(plan)
    fresh.set_state(state)
    for a, b in zip(take(fresh, 5), expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert fresh.get_state() == running.get_state()


def test_restore_with_another_number_of_processes(plan):
    alone = loader(plan)
    take(alone, 3)
    state = alone.get_state()
    expected = take(alone, 2)
    parts = []
    for p in range(2):
        part = loader(plan, process_index=p, process_count=2)
        part.set_state(state)
        parts.append(take(part, 2))
    for step in range(2):
        together = np.concatenate([part[step].record_key.ravel() for part in parts])
        assert together.tolist() == expected[step].record_key.ravel().tolist()


def test_a_state_of_another_run_is_refused(plan):
    state = loader(plan).get_state()
    for wrong in (state | {"seed": 9}, state | {"items": 3}, {}):
        with pytest.raises(UserError, match="of another run"):
            loader(plan).set_state(wrong)
    with pytest.raises(UserError, match="config.train.batch_size"):
        loader(plan, batch_size=6, accumulate=4)


def test_errors_in_threads_arrive_as_they_are(plan):
    broken = [dataclasses.replace(row, media=(Media("image", b"\xff\xd8\xff"),) * len(row.media)) for row in RECORDS]
    for workers in (0, 2):
        with pytest.raises(DataError, match="truncated or corrupt"):
            next(make_loader(broken, PROCESSOR, plan, batch_size=4, workers=workers))
        with pytest.raises(DataError, match="truncated or corrupt"):
            next(one_pass(broken, PROCESSOR, plan, batch_size=4, workers=workers))


def test_from_disk(plan, tmp_path):
    done = builder.prepare(DataConfig(), Source("s", "1", lambda: iter(RECORDS)), tmp_path / "set")
    found = builder.open_records(done.dir)
    again = make_loader(found, PROCESSOR, plan_rows(found, PROCESSOR, DataConfig(), answers=2), batch_size=4, seed=3)
    for a, b in zip(take(again, 5), take(loader(plan), 5), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("count", [1, 2])
def test_one_pass_is_ordered_and_complete(plan, count):
    parts = [list(one_pass(RECORDS, PROCESSOR, plan, batch_size=4, process_index=p, process_count=count)) for p in range(count)]
    assert [len(part) for part in parts] == [3] * count
    rows = {}
    for p, part in enumerate(parts):
        for step, found in enumerate(part):
            assert found.batch.tokens.shape == (4 // count, plan.layout.tokens)
            for slot, (key, valid, item) in enumerate(zip(found.batch.record_key, found.valid, found.items, strict=True)):
                if valid:
                    rows[step * 4 + slot * count + p] = int(key)
                    assert KEYS[item[0]] == key
    assert [rows[n] for n in range(10)] == KEYS and len(rows) == 10
    assert collections.Counter(bool(valid) for part in parts for found in part for valid in found.valid) == {True: 10, False: 2}


def test_to_device_splits_the_rows(plan):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    host = next(loader(plan, batch_size=8, accumulate=2))
    device = to_device(host, mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(device), host)
    for leaf in jax.tree.leaves(device):
        assert leaf.sharding.spec[:2] == (None, ("data", "fsdp"))
        assert leaf.addressable_shards[0].data.shape[:2] == (2, 1)
    assert device.prefix_slots == host.prefix_slots
    flat = next(one_pass(RECORDS, PROCESSOR, plan, batch_size=4)).batch
    assert to_device(flat, mesh, batch_axis=0).tokens.sharding.spec[0] == ("data", "fsdp")
    assert process_slice(mesh) == (0, 1)
