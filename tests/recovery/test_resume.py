"""A run that is killed or stopped and started again ends with the same parameters, bit for bit."""

import random
import signal
import time
from pathlib import Path

import pytest
from helpers import runs
from helpers.runs import finish, same_result, steps_done, wait_for

STEPS = 12

# A pair run end to end on a small world: BDHS pairs from a model with random weights, then mDPO, which also draws views
SETTINGS = {
    "train.steps": STEPS, "train.batch_size": 4, "train.accumulate": 2, "train.log_every": 1, "checkpoint.every": 3, "scenes.align": 12,
    "pairs.n_iter": 2, "pairs.batch_size": 8, "pairs.max_sentence_tokens": 8, "pairs.max_answer_tokens": 16,
    "objective.name": "mdpo", "report.gallery": 0,
    "report.tensorboard": False, "model.init": "scenes", "model.path": "", "eval.before": False,
    "eval.benchmarks": "()",
}  # fmt: skip


def start(workdir: Path, **settings):
    return runs.start(workdir, "configs/quickstart.py", SETTINGS | settings)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(workdir))
    return workdir


@pytest.mark.slow
def test_kill_9_at_a_random_moment(uninterrupted, tmp_path):
    seed = time.time_ns()
    print(f"random moment from seed {seed}")  # shown when the test fails
    process = start(tmp_path)
    at = random.Random(seed).randrange(1, STEPS)
    wait_for(lambda: steps_done(tmp_path) >= at, process)
    time.sleep(random.Random(seed + 1).random() * 0.3)
    process.kill()
    process.communicate()
    finish(start(tmp_path))
    same_result(tmp_path, uninterrupted, STEPS)


@pytest.mark.nightly
def test_sigterm_saves_first(uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: steps_done(tmp_path) >= 4, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 128 + signal.SIGTERM)
    saved = steps_done(tmp_path)
    assert f"SIGTERM: saving at step {saved}; the same command goes on from here" in output
    assert f"Going on from the checkpoint of step {saved}" in finish(start(tmp_path))
    same_result(tmp_path, uninterrupted, STEPS)


@pytest.mark.slow
def test_another_config_is_refused(uninterrupted):
    output = finish(start(uninterrupted, **{"train.seed": 7}), 2)
    assert "config.train.seed: 0 there, 7 now" in output and len(output.strip().splitlines()) == 1
