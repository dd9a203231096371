"""Scored answers from the command that makes them to the one that trains on them, and combinations that are refused by name."""

import json

import pytest
from helpers.checkpoints import tiny_llava
from helpers.commands import ROOT, launch
from helpers.rows import rlaif_row, write_parquet

from mmalign_jax.data.builder import open_records

MAKE = {
    "count": 3, "max_tokens": 6, "batch_size": 4, "scorers": "('exact','length(-0.5)')", "stop_strings": "('e','a','o')", "unfinished": True,
}  # fmt: skip


def make(base, data, out, selector):
    given = [f"--config.samples.{name}={value}" for name, value in (MAKE | {"selector": selector}).items()]
    config = str(ROOT / "configs" / "pairs" / "samples.py")
    return launch("launch/make_pairs.py", "--config", config, "--model", base, "--data", data, "--out", out, *given)


def train(base, rows, workdir, name, *words):
    return launch(
        "launch/train.py", "--config", "configs/base.py", f"--config.model.path={base}", f"--config.data.path={rows}",
        f"--config.objective.name={name}", "--config.train.steps=2", "--config.train.batch_size=4", "--config.train.log_every=1",
        "--config.optimizer.learning_rate=1e-2", "--config.report.gallery=2", "--config.report.tensorboard=False", "--workdir", workdir, *words,
    )  # fmt: skip


def metrics(done, workdir):
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_from_answers_to_training(tmp_path):
    base = tiny_llava(tmp_path / "base", seed=3)
    data = write_parquet(tmp_path / "set.parquet", [rlaif_row(number) for number in range(8)])

    done = make(base, data, tmp_path / "labelled", "unpaired(by=mean)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "records with labelled answers in" in done.stdout
    labelled = open_records(tmp_path / "labelled")
    counts = json.loads((tmp_path / "labelled" / "statistics.json").read_text())
    assert sum(len(labelled[index].labels) for index in range(len(labelled))) == counts["pairs"] > 4
    lines = metrics(train(base, tmp_path / "labelled", tmp_path / "kto", "kto_unpaired"), tmp_path / "kto")
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["loss"] == pytest.approx(0.5, abs=1e-3)  # policy and reference are one
    assert 0 < lines[0]["labels/desirable"] < 1 and lines[0]["grad_norm"] > 0
    assert (tmp_path / "kto" / "export" / "model.safetensors").is_file()

    done = make(base, data, tmp_path / "groups", "group(2)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "records with groups in" in done.stdout
    live = metrics(train(base, tmp_path / "groups", tmp_path / "live", "pl_dpo"), tmp_path / "live")
    cached = metrics(train(base, tmp_path / "groups", tmp_path / "cached", "pl_dpo", "--config.reference.kind=cached"), tmp_path / "cached")
    for name in ("loss", "rewards/mean", "grad_norm"):
        assert [line[name] for line in cached] == pytest.approx([line[name] for line in live], rel=1e-4, abs=1e-5), name
    assert live[0]["rewards/all_equal"] == 0

    for made, name, message in (
        ("labelled", "kto", "holds labelled answers, and pairs or references are asked for; labelled answers train kto_unpaired"),
        ("groups", "kto_unpaired", "holds groups, and labelled answers are asked for; groups train pl_dpo"),
    ):
        done = train(base, tmp_path / made, tmp_path / f"refused_{made}", name)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and "config.objective.name" in done.stderr
        assert not (tmp_path / f"refused_{made}" / "checkpoints").exists()
    words = ["--config.pairs.maker=samples", "--config.samples.scorers=('exact',)", "--config.samples.selector=unpaired"]
    done = train(base, data, tmp_path / "inside", "dpo", *words)
    assert done.returncode == 2 and "config.samples.selector: makes labelled answers, and dpo reads pairs" in done.stderr
    done = train(base, data, tmp_path / "bdhs", "pl_dpo", "--config.pairs.maker=bdhs")
    assert done.returncode == 2 and "config.pairs.maker: makes pairs, and pl_dpo reads groups" in done.stderr
