"""A reward model from the command line: trained, measured on held-out pairs, exported, scored with, gone on from."""

import json

import jax
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.commands import launch
from helpers.rows import encoded, rlaif_row, write_parquet
from helpers.runs import finish, same_result, start, steps_done, wait_for
from safetensors.numpy import load_file

from mmalign_jax.mesh import make_mesh
from mmalign_jax.pairs.reward_model import RewardModel
from mmalign_jax.types import Media, Part, PreferenceRecord, Turn

SETTINGS = {
    "objective.name": "reward_model", "data.holdout": 0.4, "train.batch_size": 4, "train.log_every": 1, "optimizer.learning_rate": 1e-2,
    "optimizer.schedule": "constant", "report.tensorboard": False, "report.gallery": 2, "eval.batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    answers = {"chosen": "There is a red cat.", "rejected": "A dog and two birds on the table."}
    pictures = ({"bytes": encoded((30 * n, 90, 200 - 20 * n), kind="PNG"), "path": f"{n}.png"} for n in range(8))
    listed = [rlaif_row(n, image=image, origin_dataset="ab"[n % 2], **answers) for n, image in enumerate(pictures)]
    return write_parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", listed)


def train(workdir, base, rows, **more):
    finish(start(workdir, "configs/base.py", {"model.path": base, "data.path": rows} | SETTINGS | more))
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_train_measure_export_score(tmp_path, base, rows):
    workdir = tmp_path / "run"
    lines = train(workdir, base, rows, **{"train.steps": 8, "eval.holdout_every": 4})
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["rewards/accuracies"] == 1.0
    assert [line["step"] for line in lines if "held_out/accuracies" in line] == [4, 8]
    assert not any("logps" in name or name.startswith("monitor") for line in lines for name in line)
    found = json.loads((workdir / "eval/held_out_8.json").read_text())
    assert found["accuracy"]["value"] == 1.0 and 0 < found["pairs"] < 8 and set(found["by_source"]) <= {"a", "b"}
    (row,) = (row for row in json.loads((workdir / "summary.json").read_text())["scores"] if row["name"] == f"Accuracy ({found['pairs']} pairs)")
    assert row["after"] == found["accuracy"] and row["before"] is None
    assert "Held-out pairs" in (workdir / "report.html").read_text()
    card = (workdir / "export/README.md").read_text()
    assert "trained to score answers" in card and "### Held-out pairs" in card and "RewardModel.read(" in card

    model = RewardModel.read(workdir / "export", make_mesh(1, 1, 1, jax.devices()[:1]))
    turn = Turn("user", (Part(media=0), Part(text="What is in picture 3?")))
    picture = PreferenceRecord("new", (Media("image", encoded((1, 2, 3), kind="PNG")),), (turn,), ())
    ((good, bad),) = model.scores([picture], [["There is a red cat.", "A dog and two birds on the table."]])
    assert good - bad == pytest.approx(found["margin"]["value"], rel=0.2)


@pytest.mark.nightly
def test_with_factors_and_on_from_there(tmp_path, base, rows):
    lora = {"train.steps": 6, "lora.rank": 2, "optimizer.score_head_learning_rate": 2e-2}
    first = train(tmp_path / "lora", base, rows, **lora)
    assert first[-1]["loss"] < first[0]["loss"]
    done = launch("launch/export.py", "--workdir", tmp_path / "lora", "--out", tmp_path / "adapter", "--adapter")
    assert done.returncode == 0, done.stderr
    merged, beside = (load_file(directory / "score_head.safetensors") for directory in (tmp_path / "lora/export", tmp_path / "adapter"))
    assert all(np.array_equal(merged[name], beside[name]) for name in merged)
    # from the merged model and from the adapter: the same scores before the first step
    again = [train(tmp_path / "merged", tmp_path / "lora/export", rows, **{"train.steps": 1})]
    again.append(train(tmp_path / "on", base, rows, **{"train.steps": 1, "model.adapter": tmp_path / "adapter"}))
    assert again[0][0]["loss"] == pytest.approx(again[1][0]["loss"], rel=1e-4) and again[0][0]["loss"] < first[0]["loss"]


@pytest.mark.nightly
def test_killed_and_gone_on(tmp_path, base, rows):
    settings = {"model.path": base, "data.path": rows} | SETTINGS | {"train.steps": 12, "checkpoint.every": 2}
    finish(start(tmp_path / "whole", "configs/base.py", settings))
    killed = start(tmp_path / "killed", "configs/base.py", settings)
    wait_for(lambda: steps_done(tmp_path / "killed") >= 5, killed)
    killed.kill()
    killed.communicate()
    finish(start(tmp_path / "killed", "configs/base.py", settings))
    same_result(tmp_path / "killed", tmp_path / "whole", 12)
    files = [(tmp_path / name / "export/score_head.safetensors").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1]
    held = [(tmp_path / name / "eval/held_out_12.json").read_bytes() for name in ("killed", "whole")]
    assert held[0] == held[1]
