"""The same run with a pair a row and with several, from the command line; and what does not go with it."""

import json
import random

import pytest
from helpers.checkpoints import tiny_llava
from helpers.commands import launch
from helpers.rows import rlaif_row, write_parquet

LIVE, CACHED = (), ("--config.reference.kind=cached",)
LORA = ("--config.lora.rank=4",)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of unlike lengths, some of two questions to the same picture."""
    draw, words = random.Random(0), "there is a red cat on the table with two birds".split()
    say = lambda most: " ".join(draw.choice(words) for _ in range(draw.randint(1, most)))  # noqa: E731
    rows = [rlaif_row(number, question=say(20) + "?", chosen=say(25), rejected="No. " + say(25)) for number in range(24)]
    for row, other in zip(rows[::4], rows[1::4], strict=True):
        row["image"] = other["image"]
    return write_parquet(tmp_path_factory.mktemp("pairs") / "pairs.parquet", rows)


def train(workdir, base, rows, *words):
    return launch(
        "launch/train.py", "--config", "configs/base.py", f"--config.model.path={base}", f"--config.data.path={rows}",
        "--config.train.steps=2", "--config.train.batch_size=8", "--config.train.log_every=1", "--config.optimizer.learning_rate=1e-3",
        "--config.optimizer.schedule=constant", "--config.report.gallery=0", "--config.report.tensorboard=False", "--config.monitor.every=2",
        "--config.export.enabled=False", "--workdir", workdir, *words,
    )  # fmt: skip


def metrics(done, workdir):
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout + done.stderr
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# What the policy says by itself is drawn token by token, where a rounding may choose another; and before the first step policy and reference
# are the same, so which of two scores is larger is a matter of rounding.
DIFFERENT = (
    "_s", "padding_fraction", "monitor/length", "monitor/ended", "monitor/kl_on_policy", "_image", "rewards/accuracies", "displacement_rate",
    "length_correlation",
)  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("words", [LIVE, CACHED, LORA], ids=["live", "cached", "lora"])
def test_two_ways(tmp_path, base, pairs, words):
    found = {}
    for packed in (False, True):
        workdir = tmp_path / str(packed)
        done = train(workdir, base, pairs, f"--config.data.packed={packed}", *words)
        found[packed] = metrics(done, workdir)
        assert ("8 pairs of a device share rows" in done.stdout) == packed
    for one, other in zip(found[True], found[False], strict=True):
        for name in (name for name in other if not name.endswith(DIFFERENT)):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
        assert one["padding_fraction"] < 0.7 * other["padding_fraction"]
    assert found[True][0]["monitor/entropy"] > 1 and "monitor/image_gain" in found[True][0]
    assert found[True][0]["loss"] == pytest.approx(found[False][0]["loss"], rel=1e-6)


@pytest.mark.nightly
def test_what_gains_nothing_is_told_before_anything_is_read(tmp_path, base, pairs):
    done = train(tmp_path, base, pairs, "--config.data.packed=True", "--config.train.accumulate=8")
    assert done.returncode and "config.data.packed: a device has one pair of each part of a step" in done.stdout + done.stderr
    assert "Preparing data" not in done.stdout and not (tmp_path / "data").exists()
