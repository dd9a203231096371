"""A run whose reference is computed once, from the command line: as one with a live reference, and runs that share the cache."""

import json
import math

import pytest
from helpers.checkpoints import tiny_llava
from helpers.commands import launch
from helpers.rows import photo_bytes, rlaif_row, write_parquet

ANSWERS = (("There is a red cat.", "A dog and two birds."), ("A cup.", "There are three people in the picture."), ("Yes.", "No, a chair."))


def train(base, rows, workdir, *words):
    return launch(
        "launch/train.py", "--config", "configs/base.py", f"--config.model.path={base}", f"--config.data.path={rows}",
        "--config.train.steps=2", "--config.train.batch_size=2", "--config.train.log_every=1", "--config.optimizer.learning_rate=1e-2",
        "--config.optimizer.schedule=constant", "--config.report.gallery=0", "--config.report.tensorboard=False",
        "--config.export.enabled=False", "--workdir", workdir, *words,
    )  # fmt: skip


def metrics(done, workdir):
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout + done.stderr
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_a_cached_run_is_a_live_one_and_its_cache_is_shared(tmp_path):
    base = tiny_llava(tmp_path / "base")
    pictures = ({"bytes": photo_bytes(name, (60, 90)), "path": f"{name}.jpg"} for name in ("astronaut", "coffee", "rocket"))
    rows = write_parquet(tmp_path / "rows.parquet", [
        rlaif_row(number, image=image, question="What is in the picture?", chosen=chosen, rejected=rejected)
        for number, (image, (chosen, rejected)) in enumerate(zip(pictures, ANSWERS, strict=True))
    ])  # fmt: skip
    mdpo = ["--config.objective.name=mdpo", "--config.lora.rank=2"]
    live = metrics(train(base, rows, tmp_path / "live", *mdpo), tmp_path / "live")
    cached = [*mdpo, "--config.reference.kind=cached"]
    done = train(base, rows, tmp_path / "cached", *cached)
    once = metrics(done, tmp_path / "cached")
    assert once[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-5)
    for name in ("loss", "rewards/margins", "chosen_drift", "grad_norm"):
        assert [line[name] for line in once] == pytest.approx([line[name] for line in live], rel=1e-4, abs=1e-5), name
    said = done.stdout
    assert said.index("tokens of prefix") < said.index("Computing the reference's log-probs ...") < said.index("Loading policy")
    assert said.count("Computing the reference's log-probs: done") == 1 and "log-probs under corrupted images: done" in said
    cache = tmp_path / "cached/reference"
    assert sorted(path.name for path in cache.iterdir() if not path.name.startswith(".")) == ["answers", "other_image"]

    # another objective, everything training: the answers' log-probs are the same
    shared = [f"--config.reference.cache={cache}", "--config.reference.kind=cached"]
    done = train(base, rows, tmp_path / "shared", "--config.objective.beta=0.3", *shared)
    assert metrics(done, tmp_path / "shared")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert f"those in {cache / 'answers'} are reused" in done.stdout and "Computing" not in done.stdout

    done = train(base, rows, tmp_path / "refused", *mdpo, *shared, "--config.train.seed=1")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {cache / 'other_image' / 'key.json'}: ") and done.stderr.count("\n") == 1
    assert "seed (0 there, 1 now). Delete" in done.stderr and not (tmp_path / "refused/checkpoints").exists()
