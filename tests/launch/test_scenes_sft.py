"""The command that made the model which ships with the package: its first steps, and the shape of what it leaves."""

import json
import math

import pytest
from helpers.checkpoints import tensors
from helpers.commands import ROOT, launch

from mmalign_jax.hf.export import MARKER

SHIPPED = ROOT / "mmalign_jax" / "assets" / "scenes_sft"
STEPS = 3


pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "scenes_sft"
    small = ["--config.scenes.sft=16", "--config.scenes.align=4", "--config.scenes.test=2", "--config.eval.benchmarks=()"]
    words = ["--config", "configs/scenes_sft.py", *small, f"--config.train.steps={STEPS}", "--workdir", workdir]
    done = launch("launch/train.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no gradient" not in done.stdout and done.stderr == ""
    return workdir


def files(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_its_first_steps_train_every_part(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, STEPS]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["zero_gradients"] == 0 for line in lines)
    before, after = tensors(workdir / "initial_model"), tensors(workdir / "export")
    assert before.keys() == after.keys()
    same = {name for name in before if before[name].equal(after[name])}
    # CLIP's last norm is behind the layer that is read
    assert all("post_layernorm" in name for name in same), same


def test_what_ships_is_what_it_makes(workdir):
    export = workdir / "export"
    assert files(export) - {"README.md"} == files(SHIPPED)  # what the model card tells stands in the configs and the README
    made, shipped = tensors(export), tensors(SHIPPED)
    assert {name: (value.shape, value.dtype) for name, value in made.items()} == {name: (value.shape, value.dtype) for name, value in shipped.items()}
    for name in sorted(files(SHIPPED) - {MARKER}):  # it names the version that wrote it
        if not name.endswith(".safetensors"):
            assert (SHIPPED / name).read_bytes() == (export / name).read_bytes(), name


@pytest.mark.parametrize("which", ["made", "shipped"])
def test_it_is_at_most_4_megabytes(workdir, which):
    directory = workdir / "export" if which == "made" else SHIPPED
    assert directory.is_dir()
    assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) <= 4_000_000
