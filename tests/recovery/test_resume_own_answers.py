"""Runs on answers that the policy draws, killed and started again: the same draws, the same parameters, bit for bit; and rounds."""

import json
import random
import time

import pytest
from helpers.runs import finish, same_result, start, steps_done, wait_for

STEPS = 6
CONFIG = "configs/recipes/world_rewards.py"
SETTINGS = {
    "train.steps": STEPS, "train.batch_size": 4, "train.log_every": 1, "checkpoint.every": 2, "scenes.align": 8, "samples.count": 3,
    "samples.max_tokens": 16, "report.gallery": 0, "report.tensorboard": False, "eval.benchmarks": "()", "monitor.every": 3,
    "pairs.n_iter": 2, "pairs.max_sentence_tokens": 8, "pairs.max_answer_tokens": 16,
}  # fmt: skip
KINDS = {
    "grpo": {},
    "grpo of an older policy": {"pairs.every": 4},  # checkpoints are in the middle of a window, too
    "ppo": {"objective.name": "ppo", "train.updates": 2},
    "mixed": {"objective.name": "dpo", "samples.offline_share": 0.5, "samples.offline_pairs": "bdhs"},
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_at_a_random_moment(kind, tmp_path):
    settings, seed = SETTINGS | KINDS[kind], time.time_ns()
    print(f"random moment from seed {seed}")  # shown when the test fails
    finish(start(tmp_path / "whole", CONFIG, settings))
    process = start(tmp_path / "killed", CONFIG, settings)
    at = random.Random(seed).randrange(1, STEPS)
    wait_for(lambda: steps_done(tmp_path / "killed") >= at, process)
    process.kill()
    process.communicate()
    finish(start(tmp_path / "killed", CONFIG, settings))
    same_result(tmp_path / "killed", tmp_path / "whole", STEPS)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all({"samples/score", "samples/score_objects"} & line.keys() for line in lines)


@pytest.mark.nightly
def test_rounds_go_on_from_each_other(tmp_path):
    settings = SETTINGS | {
        "objective.name": "dpo", "pairs.when": "offline", "rounds.count": 2, "lora.rank": 2, "train.steps": 2, "samples.count": 4,
        "eval.benchmarks": "('chair',)", "scenes.test": 4,
    }  # fmt: skip
    output = finish(start(tmp_path, CONFIG, settings))
    assert "Round 1 of 2" in output and "Round 2 of 2" in output and "pairs from" in output
    config = json.loads((tmp_path / "round_2" / "config.json").read_text())
    assert config["model"]["path"] == str(tmp_path / "round_1" / "export") and config["samples"]["seed"] == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 4 and all(row["before"] and row["after"] for row in summary["scores"])
    # the base stays the model that the first round started from
    card = (tmp_path / "round_2" / "export" / "README.md").read_text()
    assert "base_model: scenes_sft" in card
    assert "Round 2 of 2 is done" in finish(start(tmp_path, CONFIG, settings))
