"""Going on from a checkpoint: nothing is held twice, nothing is read that is thrown away, and the mesh may be another one."""

import dataclasses
import gc
import io
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import FROZEN_TOWER, MIXED, Tiny, batch_of, parts

from mmalign_jax import losses
from mmalign_jax.config import CheckpointConfig, from_mapping
from mmalign_jax.errors import UserError
from mmalign_jax.hf.import_ import load_params
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.params import param_shardings
from mmalign_jax.report.console import Console
from mmalign_jax.training import loop
from mmalign_jax.training.checkpoint import Checkpoints, abstract_policy, abstract_state, restore_params
from mmalign_jax.training.loop import train
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.optimizer import make_optimizer
from mmalign_jax.training.step import init_state

SAVED_STEP = 3
FROZEN = ("vision_tower",)
CHECKED = ("bfloat16", set())  # names and shapes alone, before anything long begins


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


def settings(objective, steps=SAVED_STEP):
    return from_mapping({
        "model": {"freeze": FROZEN, "reference_dtype": "bfloat16"}, "objective": {"name": objective}, "report": {"tensorboard": False},
        "train": {"steps": steps, "batch_size": 8}, "optimizer": {"moment_dtype": "bfloat16", "learning_rate": 0.01},
    })  # fmt: skip


def read(tiny, mesh, dtype="float32", some=None):
    return load_params(tiny.directory, tiny.config, param_shardings(tiny.config, mesh), dtype, some)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A run's directory with the checkpoint of step 3, written on eight shards, whose values are nobody's initial ones."""
    workdir, mesh = tmp_path_factory.mktemp("run"), make_mesh(1, 8, 1)
    config = settings("simpo")
    with jax.set_mesh(mesh):
        params, frozen = FROZEN_TOWER.split(read(tiny, mesh))
        state = init_state(params, frozen, make_optimizer(config.optimizer, config.train.steps), seed=5)
        change = lambda leaf: leaf + leaf.size if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf + 3  # noqa: E731
        trained = {"params": jax.tree.map(change, state.params), "opt_state": jax.tree.map(change, state.opt_state)}
        state = dataclasses.replace(state, step=state.step + SAVED_STEP, **trained)
        checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig())
        checkpoints.save(state, {"rows": 24})
        checkpoints.close()
    return workdir, jax.tree.map(values, dataclasses.replace(state, frozen={}))


def values(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(values, found), expected)


class Enough(Exception):
    """Raised where the first step would begin."""


class Batches:
    """The same rows at every step, or none."""

    def __init__(self, tiny=None):
        self.position, self._tiny = None, tiny

    def begin(self):
        return None if self._tiny is None else self.next_batch({})[0]

    def next_batch(self, params):
        if self._tiny is None:
            raise Enough
        batch = batch_of(MIXED * 2, self._tiny.processor)
        return parts(jax.tree.map(np.asarray, batch)), {}

    def get_state(self):
        return {"rows": 0}

    def set_state(self, state):
        self.position = state


def go_on(tiny, workdir, mesh, objective, batches, load, steps=SAVED_STEP, said=None):
    loss = LossFunction(tiny.model, losses.build(objective))
    return train(settings(objective, steps), workdir, mesh, tiny.config, loss, load, batches, Console(said or io.StringIO()))


@pytest.mark.parametrize("objective", [pytest.param("simpo", marks=pytest.mark.nightly), "dpo"])
def test_resume_reads_no_weights_of_the_policy_and_holds_the_state_once(tiny, saved, objective, monkeypatch):
    workdir, expected = saved
    mesh, batches, asked, held = make_mesh(1, 8, 1), Batches(), [], []
    shape = expected.params["decoder"]["embed"]["embedding"].shape

    def count():
        gc.collect()
        return sum(some.shape == shape and some.dtype == np.float32 for some in jax.live_arrays())

    def load(dtype, some):
        asked.append((dtype, {part for part in tiny.params if some((part, "leaf"))}))
        return read(tiny, mesh, dtype, some)

    restore = Checkpoints.restore

    def spy(*arguments):
        held.append(count())
        return restore(*arguments)

    monkeypatch.setattr(Checkpoints, "restore", spy)
    before = count()
    trained = go_on(tiny, workdir, mesh, objective, batches, load)
    # the reference and what is frozen, in their own type; never the policy, which the checkpoint holds
    assert asked == [CHECKED, ("bfloat16", {*expected.params, *FROZEN} if objective == "dpo" else {*FROZEN})]
    assert held == [before]
    assert trained.step == SAVED_STEP and batches.position == {"rows": 24}
    same({name: trained.params[name] for name in expected.params}, expected.params)
    assert trained.params["vision_tower"].keys() == tiny.params["vision_tower"].keys()


def test_a_new_run_reads_each_part_once(tiny, tmp_path):
    mesh, asked = make_mesh(1, 8, 1), []

    def load(dtype, some):
        asked.append((dtype, {part for part in tiny.params if some((part, "leaf"))}))
        return read(tiny, mesh, dtype, some)

    with pytest.raises(Enough):
        go_on(tiny, tmp_path, mesh, "simpo", Batches(), load, steps=1)
    assert asked == [CHECKED, ("bfloat16", {*FROZEN}), ("float32", {*tiny.params} - {*FROZEN})]


def test_weights_that_cannot_be_read_end_a_run_that_compiles_with_their_own_message(tiny, tmp_path, monkeypatch):
    mesh, begun, go = make_mesh(1, 8, 1), threading.Event(), threading.Event()

    class Slow:
        def __call__(self, *arguments):
            raise AssertionError("no step was to be made")

        def lower(self, *shapes):
            begun.set()
            assert go.wait(60)

    def load(dtype, some):
        if not some(("decoder", "leaf")):
            return read(tiny, mesh, dtype, some)
        assert begun.wait(60)
        raise OSError("the disk is gone")

    monkeypatch.setattr(loop, "make_train_step", lambda *arguments, **options: Slow())
    with pytest.raises(OSError, match="the disk is gone"):
        go_on(tiny, tmp_path, mesh, "simpo", Batches(tiny), load, steps=1)
    go.set()


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 1)])
def test_restore_on_another_mesh(tiny, saved, sizes):
    workdir, expected = saved
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    optimizer = make_optimizer(settings("simpo").optimizer, SAVED_STEP)
    with jax.set_mesh(mesh):
        like, _ = FROZEN_TOWER.split(abstract_policy(tiny.config, mesh))
        checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig())
        like_state = abstract_state(like, optimizer, mesh)
        with pytest.raises(UserError, match="config.pairs.every is 1 in one of them; set it as it was"):
            checkpoints.position(dataclasses.replace(like_state, sampler=like))
        position, state = checkpoints.position(like_state), checkpoints.restore(like_state, {"vision_tower": {}})
        checkpoints.close()
        fresh = init_state(FROZEN_TOWER.split(read(tiny, mesh))[0], {}, optimizer, 0)
    assert position == {"rows": 24} and state.frozen == {"vision_tower": {}}
    state = dataclasses.replace(state, frozen={})
    same(state, expected)
    # as a run that begins on this mesh has them
    alike = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim), state, fresh)
    assert all(jax.tree.leaves(alike))
    same(restore_params(workdir / "checkpoints", SAVED_STEP, like), expected.params)


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(tiny, saved, tmp_path):
    workdir, expected = tmp_path / "run", saved[1]
    shutil.copytree(saved[0], workdir)
    mesh, said = make_mesh(2, 4, 1), io.StringIO()
    load = lambda dtype, some: read(tiny, mesh, dtype, some)  # noqa: E731
    trained = go_on(tiny, workdir, mesh, "simpo", Batches(tiny), load, steps=SAVED_STEP + 1, said=said)
    assert trained.step == SAVED_STEP + 1 and "The step was compiled in" in said.getvalue()
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), {name: trained.params[name] for name in expected.params}, expected.params)
    assert any(jax.tree.leaves(moved))


def test_a_checkpoint_of_another_model_is_refused(tiny, saved):
    workdir, _ = saved
    mesh = make_mesh(1, 8, 1)
    with jax.set_mesh(mesh):
        like, _ = FROZEN_TOWER.split(abstract_policy(tiny.config, mesh))
        wider = jax.tree.map(lambda leaf: leaf.update(shape=(*leaf.shape[:-1], leaf.shape[-1] * 8)), like)
        fewer = {"decoder": like["decoder"]}
        checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig())
        for params, problem in ((wider, r"has shape \(\d+.*\) there, \(\d+.*\) in"), (fewer, "there, None in")):
            with pytest.raises(UserError, match=f"checkpoints/3: the checkpoint is of another model .*{problem} this run.*new --workdir"):
                checkpoints.position(abstract_state(params, make_optimizer(settings("simpo").optimizer, 3), mesh))
        checkpoints.close()
