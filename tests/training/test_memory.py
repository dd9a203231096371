"""The cheapest remat that fits is chosen, told, and the program that was compiled for it is the one that runs."""

import dataclasses
from concurrent.futures import CancelledError

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import FROZEN_TOWER, MIXED, Tiny, batch_of

from mmalign_jax import losses
from mmalign_jax.errors import UserError
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.remat import POLICIES
from mmalign_jax.training import memory
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.memory import GIB, FittingStep, candidates, device_limit, fitting
from mmalign_jax.training.step import init_state, make_train_step

pytestmark = pytest.mark.optimised

SIZES = {"dots": 2000, "block": 1000}  # floats that a program returns


def program(name, refused=()):
    if name in refused:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
    return jax.jit(lambda x: jnp.full(SIZES[name], x)).lower(1.0)


def needs(name):
    return 4 * SIZES[name] + 4


@pytest.mark.parametrize(("limit", "chosen", "tried"), [(1 << 20, "dots", 1), (needs("dots") - 1, "block", 2), (needs("block"), "block", 2)])
def test_the_first_that_fits_is_the_last_that_is_compiled(limit, chosen, tried):
    found = fitting(program, candidates("auto"), limit)
    assert found.remat == chosen and found.fits and found.needs.total == needs(chosen)
    assert found.tried == {name: needs(name) for name in list(SIZES)[:tried]}
    assert found.compiled(2.0).shape == (SIZES[chosen],)


def test_where_none_fits_the_least_is_taken_and_it_is_told():
    found = fitting(program, candidates("auto"), 100)
    assert found.remat == "block" and not found.fits and found.in_words().endswith("; NONE FITS, this needs least")


def test_what_the_compiler_refuses_does_not_fit():
    found = fitting(lambda name: program(name, refused=("block",)), candidates("auto"), 100)
    assert found.remat == "dots" and found.tried == {"dots": needs("dots"), "block": None}
    assert "(block: too much)" in found.in_words()
    with pytest.raises(UserError, match="config.model.remat: .* no room for a step with dots or block: .* RESOURCE_EXHAUSTED: Ran out"):
        fitting(lambda name: program(name, refused=("dots", "block")), candidates("auto"), 100)

    def broken(name):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fitting(broken, candidates("auto"), 100)


def test_nothing_more_is_compiled_when_nobody_waits():
    begun = []
    with pytest.raises(CancelledError):
        fitting(lambda name: begun.append(name) or program(name), candidates("auto"), 100, stopped=lambda: bool(begun))
    assert begun == ["dots"]


def test_a_named_remat_is_no_choice():
    assert candidates("auto") == ("dots", "block")
    assert all(candidates(name) == (name,) for name in POLICIES)


def test_the_limit_is_the_setting_or_the_share_of_the_machine(monkeypatch):
    one, four = make_mesh(devices=jax.devices()[:1]), make_mesh(devices=jax.devices()[:4])
    assert device_limit(one, 1.5) == device_limit(four, 1.5) == 1.5 * GIB
    monkeypatch.setattr(memory, "_machine", lambda: 8 * GIB)
    assert device_limit(one, 0.0) == int(0.95 * 8 * GIB) and device_limit(four, 0.0) == int(0.95 * 2 * GIB)


def test_a_container_has_what_it_is_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "memory.max")
    installed = memory._machine()
    assert installed > GIB // 2
    for allowed, expected in (("max\n", installed), ("1000\n", 1000), (f"{installed * 2}\n", installed)):
        (tmp_path / "memory.max").write_text(allowed)
        assert memory._machine() == expected


@pytest.mark.nightly
def test_a_step_chooses_once_for_each_shape_and_computes_what_a_plain_one_does(tmp_path):
    tiny = Tiny.load(tiny_llava(tmp_path, layout="memory"))
    batch, optimizer, rate = batch_of(MIXED, tiny.processor), optax.sgd(0.05), optax.constant_schedule(0.05)
    batch = jax.tree.map(lambda x: x[None], batch) if batch.tokens.ndim == 2 else batch
    loss, reference = LossFunction(tiny.model, losses.build("dpo")), FROZEN_TOWER.split(tiny.params)[0]
    state = lambda: init_state(*FROZEN_TOWER.split(jax.tree.map(jnp.copy, tiny.params)), optimizer, seed=3)  # noqa: E731
    made, said = [], []

    def make(name):
        made.append(name)
        return make_train_step(loss.with_remat(name), optimizer, rate)

    sizes = {name: fitting(lambda name: make(name).lower(state(), reference, batch), (name,), 0).needs.total for name in SIZES}
    assert sizes["dots"] > sizes["block"]
    made.clear()
    step = FittingStep(make, candidates("auto"), sizes["dots"] - 1, said.append)
    plain = make_train_step(loss, optimizer, rate)
    ours, theirs = state(), state()
    for _ in range(2):
        (ours, found), (theirs, expected) = step(ours, reference, batch), plain(theirs, reference, batch)
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-4)
    assert made == ["dots", "block"] and len(said) == 1 and said[0].startswith("Remat block: a step needs ")
    fewer = jax.tree.map(lambda x: x[:, :1], batch)
    step(ours, reference, dataclasses.replace(fewer))
    assert len(said) == 2 and made[2:] == ["dots"]
