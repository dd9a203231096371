"""Pairs made by a policy that is some steps old: which one it is, step by step, also in a run that was stopped in between."""

import dataclasses
import io

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import MIXED, Tiny, batch_of, parts

from mmalign_jax import losses
from mmalign_jax.config import from_mapping
from mmalign_jax.errors import UserError
from mmalign_jax.hf.import_ import load_params
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.params import param_shardings
from mmalign_jax.report.console import Console
from mmalign_jax.training.loop import train
from mmalign_jax.training.loss import LossFunction

STEPS, EVERY = 5, 2
MESH = make_mesh(devices=jax.devices()[:1])




@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


class Killed(Exception):
    """Raised in the place of a step's rows."""


class Batches:
    """Rows with weights that depend on the policy; `seen` are the parts of it that train, as they were shown to each step.

    Args:
      remember: take the policy as it was shown at the beginning of the step's window, in the place of the one that is shown.
    """

    def __init__(self, rows, stop_at: int, remember: bool):
        self._rows, self._stop_at, self._remember, self.step, self.seen = rows, stop_at, remember, 0, {}

    def next_batch(self, params):
        if self.step == self._stop_at:
            raise Killed
        self.seen[self.step] = jax.tree.map(np.array, params["projector"])
        shown = self.seen[self.step // EVERY * EVERY if self._remember else self.step]
        weight = np.abs(jax.tree.leaves(shown)[0].ravel()[:4]).astype(np.float32)
        self.step += 1
        return parts(dataclasses.replace(self._rows, weight=weight)), {}

    def begin(self):
        return None

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


@pytest.fixture(scope="module")
def run(tiny):
    rows = jax.tree.map(np.asarray, batch_of(MIXED, tiny.processor))

    def run(workdir, every, stop_at=STEPS, remember=False):
        config = from_mapping({
            "model": {"freeze": ("vision_tower", "decoder")}, "objective": {"name": "simpo"}, "report": {"tensorboard": False},
            "train": {"steps": STEPS, "batch_size": 4, "log_every": 1}, "checkpoint": {"every": 3},
            "optimizer": {"learning_rate": 0.05}, "pairs": {"maker": "bdhs", "when": "online", "every": every},
        })  # fmt: skip
        batches, loss = Batches(rows, stop_at, remember), LossFunction(tiny.model, losses.build("simpo"))
        load = lambda dtype, some: load_params(tiny.directory, tiny.config, param_shardings(tiny.config, MESH), dtype, some)  # noqa: E731
        try:
            trained = train(config, workdir, MESH, tiny.config, loss, load, batches, Console(io.StringIO()))
        except Killed:
            return batches.seen, None
        return batches.seen, jax.device_get(trained.params["projector"])

    return run


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def saved(workdir, step):
    """Parts of the saved state."""
    return ocp.StandardCheckpointHandler().metadata(workdir / "checkpoints" / str(step) / "state").tree


@pytest.mark.nightly
def test_every_step_sees_the_policy_of_the_beginning_of_its_window_also_after_a_kill(run, tmp_path):
    """The same result two ways: the loop shows an old policy, or the rows' maker remembers the one that it was shown."""
    now, expected = run(tmp_path / "now", every=1, remember=True)
    before, nothing = run(tmp_path / "killed", every=EVERY, stop_at=3)  # in the middle of a window
    later, result = run(tmp_path / "killed", every=EVERY)
    assert nothing is None and sorted(before) == [0, 1, 2] and sorted(later) == [3, 4]
    for step, seen in (before | later).items():
        assert same(seen, now[step // EVERY * EVERY]) and (step == 0 or not same(now[step], now[step - 1]))
    assert same(result, expected)
    # the copy is of what trains and of nothing else, and there is none where the policy is the one of now
    assert saved(tmp_path / "killed", 3)["sampler"].keys() == {"projector"}
    assert "sampler" not in saved(tmp_path / "now", 3)


def test_pairs_that_are_not_made_online_have_no_age():
    for pairs in ({"every": 2}, {"maker": "bdhs", "every": 2}, {"when": "online", "every": 2}):
        with pytest.raises(UserError, match="config.pairs.every: only pairs that are made online"):
            from_mapping({"pairs": pairs})
