"""LoRA from the command line: train, export the adapter, go on from it."""

import json
import math

import pytest
from helpers.checkpoints import tensors, tiny_llava
from helpers.commands import launch
from helpers.peft_models import with_adapter
from helpers.rows import photo_bytes, rlaif_row, write_parquet
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration


def train(workdir, base, rows, *words):
    done = launch(
        "launch/train.py", "--config", "configs/base.py", f"--config.model.path={base}", f"--config.data.path={rows}",
        "--config.train.steps=2", "--config.train.batch_size=2", "--config.train.log_every=1", "--config.optimizer.learning_rate=1e-2",
        "--config.optimizer.schedule=constant", "--config.report.gallery=0", "--config.report.tensorboard=False", "--workdir", workdir, *words,
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout + done.stderr
    return done, [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def export(workdir, out, *words):
    return launch("launch/export.py", "--workdir", workdir, "--out", out, *words)


@pytest.mark.nightly
def test_train_export_and_go_on(tmp_path):
    base = tiny_llava(tmp_path / "base")
    answers = {"question": "What is in the picture?", "chosen": "There is a red cat.", "rejected": "A dog and two birds."}
    pictures = ({"bytes": photo_bytes(name, (60, 90)), "path": f"{name}.jpg"} for name in ("astronaut", "coffee"))
    rows = write_parquet(tmp_path / "rows.parquet", [rlaif_row(number, image=image, **answers) for number, image in enumerate(pictures)])
    first = tmp_path / "first"
    done, lines = train(first, base, rows, "--config.lora.rank=4", "--config.lora.targets=('attention',)")
    assert "decoder (low-rank factors of rank 4 beside query, key, value, out)" in done.stdout
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and lines[1]["loss"] < lines[0]["loss"] - 1e-3
    before, after = tensors(base), tensors(first / "export")
    assert {name.split(".")[-2] for name in before if not before[name].equal(after[name])} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "low-rank factors of rank 4" in (first / "export/README.md").read_text()

    done = export(first, tmp_path / "adapter", "--adapter")
    assert done.returncode == 0, done.stdout + done.stderr
    model = LlavaForConditionalGeneration.from_pretrained(base)
    with_adapter(model, tmp_path / "adapter")

    # where the adapter stood is the reference of the run that goes on from it
    again = tmp_path / "again"
    _, lines = train(again, base, rows, f"--config.model.adapter={tmp_path / 'adapter'}")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and lines[1]["loss"] < lines[0]["loss"]
    assert export(again, tmp_path / "second", "--adapter").returncode == 0
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "second"))
    assert old.keys() == new.keys() and not any(old[name].equal(new[name]) for name in old)

    full = tmp_path / "full"
    train(full, base, rows)
    done = export(full, tmp_path / "third", "--adapter")
    assert done.returncode == 2 and "trained no low-rank factors" in done.stderr and len(done.stderr.strip().splitlines()) == 1
