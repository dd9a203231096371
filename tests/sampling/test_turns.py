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
from mmalign_jax.sampling import DecodeOptions, LaneStart, decode_in_turn, decode_lanes, lane_keys
from mmalign_jax.sampling.turns import _sizes

X = 10
OPTIONS = DecodeOptions(X, temperature=1.0, stop_ids=tuple(range(5, 400, 6)), banned_ids=(0, 1, 3, 4))
LANES, ROWS = 3, 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    text = {"model_type": "mistral", "head_dim": 6, "sliding_window": 8}
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("turns"), layout="memory", seed=5, text=text))


def run(decode, tiny, options, batch, start):
    def work(batch, start):
        draws = jnp.broadcast_to(jnp.zeros_like(batch.record_key, jnp.int32), batch.record_key.shape)
        keys = lane_keys(jax.random.key(3), batch.record_key, draws, LANES)
        out = decode(tiny.model, tiny.params, prefill(tiny.model, tiny.params, batch), batch, start, keys, options)
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
    expected, found = (run(decode, tiny, options, *started) for decode in (decode_lanes, decode_in_turn))
    for name, a, b in zip(("tokens", "lengths", "stopped"), expected, found, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert _sizes(ROWS) == (16, 8, 4) and (expected[1][5] == 0).all()
    if not changes:  # lanes that stop at once, later, and never
        assert {1, X} < set(expected[1].ravel().tolist()) and len({*expected[1].sum(axis=1).tolist()}) > 8


@pytest.mark.parametrize("apart", [False, True])
def test_under_a_mesh_of_one_device(tiny, started, apart):
    expected = run(decode_in_turn, tiny, OPTIONS, *started)
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = layers_apart(tiny.sharded(mesh), small=0) if apart else tiny.sharded(mesh)
        assert are_apart(params) == apart
        placed = jax.tree.map(lambda x: jax.device_put(x, mesh_lib.sharding(mesh, "batch")), started)
        assert _sizes(ROWS) == (16, 8, 4)
        found = run(decode_in_turn, dataclasses.replace(tiny, params=params), OPTIONS, *placed)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
