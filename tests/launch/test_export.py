"""A run's checkpoints as Hugging Face directories, each with its model card."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from helpers.checkpoints import tensors, tiny_llava
from helpers.commands import ROOT, launch
from helpers.rows import rlaif_row, write_parquet

from mmalign_jax import config, config_files, pipeline
from mmalign_jax.data.feature_store import FeatureStore
from mmalign_jax.errors import UserError
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.report import model_card
from mmalign_jax.run_export import export_step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In float32, so that small steps are not lost in rounding; in a hub's cache, with a card of its own."""
    directory = tmp_path_factory.mktemp("hub") / "models--org--tiny-llava" / "snapshots" / "0123"
    directory.mkdir(parents=True)
    tiny_llava(directory, text={"num_hidden_layers": 1})
    (directory / model_card.FILE).write_text("---\nlicense: llama2\n---\n# Base\n")
    return directory


@pytest.fixture(scope="module")
def workdir(base, tmp_path_factory):
    """A run of two steps, a checkpoint after each, with scores as a run on the built-in world leaves them. Its steps read the tower's features."""
    file = write_parquet(tmp_path_factory.mktemp("data") / "set.parquet", [rlaif_row(number) for number in range(8)])
    workdir = tmp_path_factory.mktemp("runs") / "run"
    given = {
        "model.path": str(base), "data.path": file, "train.steps": 2, "train.batch_size": 8, "checkpoint.every": 1,
        "optimizer.learning_rate": 1e-3, "report.tensorboard": False, "report.gallery": 0, "objective.beta": 0.3,
        "features.cache": str(workdir.parent / "features"),
    }  # fmt: skip
    assert pipeline.run(config.from_mapping(config_files.load(ROOT / "configs" / "base.py", given)), workdir) == 0
    return workdir


def read_card(directory):
    text = (directory / model_card.FILE).read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_the_run_leaves_a_card(workdir):
    front, text = read_card(workdir / "export")
    assert front["base_model"] == "org/tiny-llava" and front["license"] == "llama2" and "datasets" not in front
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-text-to-text" and "dpo" in front["tags"]
    assert "set.parquet (format auto), 8 records" in text and re.search(r"objective\.beta \| 0\.3 \|", text)
    assert "| steps | 2, of 8 rows each |" in text and "The run measured nothing." in text and "# Base" not in text


def test_a_tower_whose_features_were_read_is_exported_as_it_was(workdir, base):
    assert len(FeatureStore(workdir.parent / "features")) == 8
    before, after = tensors(base), tensors(workdir / "export")
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and not [name for name in moved if "vision_tower" in name] and [name for name in before if "vision_tower" in name]


def test_the_newest_checkpoint_is_the_runs_export(workdir, tmp_path):
    done = launch("launch/export.py", "--workdir", workdir, "--out", tmp_path / "newest")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'newest'}\n", done.stderr
    names = {path.name for path in (workdir / "export").iterdir()}
    assert names == {path.name for path in (tmp_path / "newest").iterdir()} and model_card.FILE in names
    for name in names - {model_card.FILE}:  # the card's versions name the devices, eight here and one in the command
        assert (tmp_path / "newest" / name).read_bytes() == (workdir / "export" / name).read_bytes(), name
    assert read_card(tmp_path / "newest")[0] == read_card(workdir / "export")[0]


def test_a_step_by_its_number(workdir, base, tmp_path):
    first = export_step(workdir, 1, tmp_path / "first")
    assert export_step(workdir, 2, tmp_path / "second") == tmp_path / "second"
    states = [tensors(directory) for directory in (base, first, tmp_path / "second")]
    moved = {name for name in states[0] if not states[0][name].equal(states[1][name])}
    assert moved and not any("vision_tower" in name for name in moved)
    assert all(not states[1][name].equal(states[2][name]) for name in moved)
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (workdir / "export" / "model.safetensors").read_bytes()
    assert "| steps | 1 of the run's 2, of 8 rows each |" in read_card(first)[1]
    loaded = load_params(first, read_config(first))
    assert all(np.isfinite(leaf).all() for leaf in loaded["decoder"]["embed"].values())


def test_scores_of_the_run_are_in_the_card(workdir, tmp_path):
    """Of a run on the built-in world, whose scores lie in eval/; those of the last step are told from those of another."""
    score = {"value": 0.25, "low": 0.2, "high": 0.3}
    captions = {name: score for name in ("chair_i", "chair_s", "recall")} | {"mean_words": {"value": 9.0, "low": 8.0, "high": 10.0}, "unfinished": 0}
    (workdir / "eval").mkdir()
    for when, value in (("before", 0.5), ("after", 0.125)):
        found = {"test": {"title": "Usual pictures", "chair": captions | {"chair_i": {"value": value, "low": None, "high": None}}}}
        (workdir / "eval" / f"{when}.json").write_text(json.dumps(found))
    last, first = (read_card(export_step(workdir, step, tmp_path / str(step)))[1] for step in (2, 1))
    for text in (last, first):
        assert "### Usual pictures" in text and "| CHAIR_i | 50.0% | 12.5% | -37.5 pp |" in text
    assert "did not measure" not in last and "those of step 1, which the run did not measure" in first


def test_mistakes(workdir, tmp_path):
    with pytest.raises(UserError, match=r"checkpoints: no checkpoint of step 7; there are \[1, 2\]"):
        export_step(workdir, 7, tmp_path / "out")
    with pytest.raises(UserError, match="holds no run"):
        export_step(tmp_path, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    done = launch("launch/export.py", "--workdir", workdir, "--out", tmp_path / "full")
    assert done.returncode == 2 and "holds files that are not an export" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(UserError, match="the run has saved no checkpoint"):
        export_step(tmp_path / "begun", None, tmp_path / "out")
    assert not (tmp_path / "begun" / "checkpoints").exists()
