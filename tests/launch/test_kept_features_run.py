"""A run whose steps read the tower's features, from the command line: as one that computes them, and runs that share them."""

import json
import math

import pytest
from helpers.checkpoints import tiny_llava
from helpers.commands import launch
from helpers.families import all_cases
from helpers.rows import photo_bytes, rlaif_row, write_parquet

PICTURES = ("astronaut", "coffee", "chelsea", "rocket")
# the sizes of what is compared: a log-prob sum is about -60
NAMES = ("loss", "rewards/margins", "chosen_drift", "grad_norm", "monitor/image_gain", "monitor/kl", "held_out/margins")


def write_rows(file, numbers):
    """Two pairs of each picture."""
    rows = []
    for number in numbers:
        picture = PICTURES[number % len(PICTURES)]
        image = {"bytes": photo_bytes(picture, (60 + 20 * number, 90 - 5 * number)), "path": f"{number}.jpg"}
        answers = {"question": "What is in the picture?", "chosen": "There is a red cat.", "rejected": "A dog and two birds."}
        rows += [rlaif_row(2 * number + twin, image=image, **answers) for twin in range(2)]
    return write_parquet(file, rows)


def train(base, rows, workdir, *words):
    return launch(
        "launch/train.py", "--config", "configs/base.py", f"--config.model.path={base}", f"--config.data.path={rows}",
        "--config.data.format=rlaif_v", "--config.train.steps=3", "--config.train.batch_size=2", "--config.train.log_every=1",
        "--config.optimizer.learning_rate=1e-3", "--config.optimizer.schedule=constant", "--config.report.gallery=0",
        "--config.report.tensorboard=False", "--config.monitor.every=1", "--config.data.holdout=0.4", "--config.eval.holdout_every=1",
        "--workdir", workdir, *words,
    )  # fmt: skip


def metrics(done, workdir):
    assert done.returncode == 0 and "WARNING" not in done.stdout.replace("WARNING: no gradient", ""), done.stdout + done.stderr
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same(lines, others):
    assert [line.keys() for line in lines] == [line.keys() for line in others] and len(lines) == 3
    for name in NAMES:
        assert [line[name] for line in others] == pytest.approx([line[name] for line in lines], rel=1e-3, abs=2e-5), name


@pytest.mark.nightly
def test_a_run_with_features_is_one_with_pixels_and_runs_share_them(tmp_path):
    base, rows = tiny_llava(tmp_path / "base"), write_rows(tmp_path / "rows.parquet", range(6))
    pixels = metrics(train(base, rows, tmp_path / "pixels"), tmp_path / "pixels")
    kept = f"--config.features.cache={tmp_path / 'cache'}"
    done = train(base, rows, tmp_path / "features", kept)
    assert_same(pixels, metrics(done, tmp_path / "features"))
    assert done.stdout.count("Computing vision features: done") == 2  # those of the held-out pairs apart
    assert done.stdout.index("tokens of prefix") < done.stdout.index("Computing vision features ...") < done.stdout.index("Loading policy")

    # more pairs of a model that a run has trained: its tower is the same
    more = write_rows(tmp_path / "more.parquet", range(7))
    words = [kept, "--config.reference.kind=cached", "--config.objective.beta=0.3", "--config.lora.rank=2"]
    done = train(tmp_path / "features/export", more, tmp_path / "shared", *words)
    assert metrics(done, tmp_path / "shared")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert done.stdout.count("those of 1 pictures take") == 1 and done.stdout.count("Computing vision features: done") == 1
    assert done.stdout.count("are reused") == 2

    # and of another objective, with rows of another set, by the same command again
    words = [kept, "--config.objective.name=ha_dpo", f"--config.auxiliary.path={more}", "--config.auxiliary.format=rlaif_v"]
    both = [metrics(train(base, rows, tmp_path / name, *words[number:]), tmp_path / name) for number, name in enumerate(("kept", "computed"))]
    assert_same(*both)
    done = train(base, rows, tmp_path / "kept", *words)
    assert done.returncode == 0 and "holds this run already" in done.stdout and "Computing" not in done.stdout

    done = train(tiny_llava(tmp_path / "other", seed=1), rows, tmp_path / "refused", kept)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / 'cache/key.json'}: ") and done.stderr.count("\n") == 1
    assert "computed from something else: weights. Delete" in done.stderr and not (tmp_path / "refused/checkpoints").exists()
    done = train(base, rows, tmp_path / "view", kept, "--config.objective.name=mdpo")
    assert done.returncode == 2 and done.stderr.startswith("error: config.objective.name: mdpo also sees corrupted pictures")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_next"])
def test_families_whose_pictures_take_what_they_ask_for(tmp_path, name):
    base, rows = all_cases()[name].write(tmp_path / "base", 2), write_rows(tmp_path / "rows.parquet", range(6))
    words = ["--config.data.buckets=2", "--config.data.order=by_image"]
    pixels = metrics(train(base, rows, tmp_path / "pixels", *words), tmp_path / "pixels")
    done = train(base, rows, tmp_path / "features", *words, f"--config.features.cache={tmp_path / 'cache'}")
    assert_same(pixels, metrics(done, tmp_path / "features"))
    assert "those of 1 or 2 rows are read for the 2 rows of a device" in done.stdout
