"""Lanes that take turns write what lanes side by side write, whatever rows are done when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import MIXED, Tiny, batch_of, prefill, rows

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.models.apart import are_apart, layers_apart
from mmalign_jax.sampling import DecodeOptions, LaneStart, decode_lanes, lane_keys, turns

X = 10
OPTIONS = DecodeOptions(X, temperature=1.0, stop_ids=tuple(range(5, 400, 6)), banned_ids=(0, 1, 3, 4))
LANES, ROWS = 3, 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    text = {"model_type": "mistral", "head_dim": 6, "sliding_window": 8}
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("turns"), layout="memory", seed=5, text=text))


def keys_of(batch):
    return lane_keys(jax.random.key(3), batch.record_key, jnp.zeros_like(batch.record_key, jnp.int32), LANES)


def begun(model, params, options, batch, start):
    return turns.begin(model, params, prefill(model, params, batch), batch, start, keys_of(batch), options)


def in_turn(model, params, filled, batch, start, keys, options):
    return turns.advance(model, params, options, turns.begin(model, params, filled, batch, start, keys, options), 0).written


def run(decode, tiny, options, batch, start):
    def work(batch, start):
        out = decode(tiny.model, tiny.params, prefill(tiny.model, tiny.params, batch), batch, start, keys_of(batch), options)
        return out.tokens, out.lengths, out.stopped

    return jax.device_get(jax.jit(work, compiler_options={"xla_backend_optimization_level": 0})(batch, start))


@pytest.fixture(scope="module")
def started(tiny):
    """Sixteen records, each behind tokens of its answers; some lanes are not asked for, and one row has none."""
    batch = rows(batch_of(MIXED, tiny.processor), *(np.arange(ROWS) % len(MIXED)))
    batch = dataclasses.replace(batch, record_key=jnp.arange(ROWS, dtype=jnp.uint32))
    random = np.random.default_rng(0)
    slot = batch.prefix_slots + (np.arange(LANES) % 2) * batch.answer_slots + random.integers(0, 2, (ROWS, LANES))
    active = random.random((ROWS, LANES)) < 0.8
    active[5] = False
    return batch, LaneStart(jnp.asarray(slot), jnp.asarray(active))


@pytest.mark.parametrize("changes", [{}, {"max_new_tokens": 1}])
def test_turns_and_lanes_side_by_side_write_the_same(tiny, started, changes):
    options = dataclasses.replace(OPTIONS, **changes)
    expected, found = run(decode_lanes, tiny, options, *started), run(in_turn, tiny, options, *started)
    for name, a, b in zip(("tokens", "lengths", "stopped"), expected, found, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert (expected[1][5] == 0).all()
    if not changes:  # lanes that stop at once, later, and never
        assert {1, X} < set(expected[1].ravel().tolist()) and len({*expected[1].sum(axis=1).tolist()}) > 8


@pytest.mark.parametrize("apart", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_places_are_taken_over_and_left_out(tiny, started, apart):
    """Six rows at a time, two begun together, under a mesh of one device; then what is left of them in three places."""
    expected = run(decode_lanes, tiny, OPTIONS, *started)
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = layers_apart(tiny.sharded(mesh), small=0) if apart else tiny.sharded(mesh)
        assert are_apart(params) == apart
        batch, start = jax.tree.map(lambda x: jax.device_put(x, mesh_lib.sharding(mesh, "batch")), started)
        begin = jax.jit(lambda *some: begun(tiny.model, params, OPTIONS, *some))
        advance = jax.jit(lambda pool, busy: turns.advance(tiny.model, params, OPTIONS, pool, busy))
        put = jax.jit(turns.put)
        new = begin(*jax.tree.map(lambda x: x[:2], (batch, start)))
        # a cache with more slots than those of the rows
        pool, places, waiting = turns.wider(turns.idle(turns.pick(new, jnp.arange(6) % 2)), new.slots + 3), [None] * 6, list(range(0, ROWS, 2))
        found, met = {}, set()
        while waiting or any(place is not None for place in places):
            while waiting and places.count(None) >= 2:
                row = waiting.pop(0)
                new, source = begin(*jax.tree.map(lambda x, row=row: x[row : row + 2], (batch, start))), np.full(len(places), -1, np.int32)
                free = [place for place, at in enumerate(places) if at is None]
                for number, place in enumerate(free[:2]):
                    source[place], places[place] = number, row + number
                pool = put(pool, new, jax.device_put(source, mesh_lib.sharding(mesh, "batch")))
            pool = advance(pool, 4 if waiting else len(places) // 2 if len(places) > 3 else 0)
            met.add(len(places))
            for place, row in enumerate(places):
                if row is not None and not pool.busy[place]:
                    found[row] = jax.tree.map(lambda x, place=place: np.asarray(x[place]), pool.written)
                    places[place] = None
            left = [place for place, row in enumerate(places) if row is not None]
            if not waiting and len(places) == 6 and len(left) <= 3:
                order = (left + [place for place in range(6) if place not in left])[:3]
                pool, places = jax.jit(turns.pick)(pool, np.array(order)), [places[place] for place in order]
    assert met == {6, 3} and set(found) == set(range(ROWS))
    for row, one in found.items():
        for a, b in zip(expected, (one.tokens, one.lengths, one.stopped), strict=True):
            np.testing.assert_array_equal(a[row], b, err_msg=str(row))
