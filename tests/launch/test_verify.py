"""launch/verify.py: exit code 0 for a good directory, and the name of what differs first for any other."""

import importlib.util
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from helpers.checkpoints import tiny_llava
from helpers.commands import ROOT, launch
from safetensors.torch import load_file, save_file

from mmalign_jax.errors import UserError
from mmalign_jax.verify import probe
from mmalign_jax.verify.compare import _greedy, compare, verify
from mmalign_jax.verify.probe import Row

LANGUAGE = "language_model.model."
# One tensor of each stage, and what is said of it
STAGES = {
    "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight": "two pictures: the vision tower's output differs first",
    "multi_modal_projector.linear_2.bias": "two pictures: the projector differs first",
    LANGUAGE + "embed_tokens.weight": "two pictures: the embeddings of the words differ first",
    LANGUAGE + "layers.0.self_attn.q_proj.weight": r"two pictures: decoder layer 0 \(of 0 to 2\) differs first",
    LANGUAGE + "layers.1.mlp.down_proj.weight": r"two pictures: decoder layer 1 \(of 0 to 2\) differs first",
    LANGUAGE + "norm.weight": "two pictures: the final norm differs first",
    "language_model.lm_head.weight": "two pictures: the output head differs first",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's thread pool costs more than such small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("good"), seed=1, text={"num_hidden_layers": 3})


def changed(directory, out, name, by=0.05):
    """A copy whose tensor `name` is another."""
    shutil.copytree(directory, out)
    tensors = load_file(out / "model.safetensors")
    tensors[name] = tensors[name] + by * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_good_directory(good):
    said = []
    assert verify(good, said.append) == 0
    text = "\n".join(said)
    assert "DIFFERENT" not in text and "not compared" not in text and said[-1].endswith("our numbers equal those of transformers")
    for what in ("prompt tokens", "logits", "answer log-probs", "greedy tokens"):
        for row in ("two pictures", "text"):
            assert f"{row}: {what}" in text
    assert "two pictures: pixels" in text and "weights (" in text


@pytest.mark.parametrize("name", STAGES, ids=[name.split(".", 2)[-1] for name in STAGES])
def test_the_first_stage_and_the_first_tensor_are_named(good, tmp_path, name):
    verdict = compare(changed(good, tmp_path / "ours", name), good)
    assert not verdict.equal
    failed = {check.name for check in verdict.checks if not check.holds}
    assert {"two pictures: logits", "two pictures: answer log-probs"} <= failed
    # what words alone do not pass through, words alone do not see
    assert ("text: logits" in failed) == name.startswith("language_model")
    tensor = name.split(".", 2)[2] if name.startswith(("vision", LANGUAGE)) else name.removeprefix("language_model.")
    assert re.search(rf"the first tensor that differs is \S*{re.escape(tensor)} \(by 0\.", verdict.first), verdict.first
    assert re.search(STAGES[name], verdict.first), verdict.first


def edited(directory, out, file, change):
    shutil.copytree(directory, out)
    (out / file).write_text(change((out / file).read_text()))
    return out


@pytest.mark.nightly
def test_what_is_not_in_the_weights_is_found_too(good, tmp_path):
    """A wrong base of the rotary angles, other grey levels, another template."""
    theta = edited(good, tmp_path / "theta", "config.json", lambda text: text.replace('"rope_theta": 10000.0', '"rope_theta": 9000.0'))
    assert re.fullmatch(r"two pictures: decoder layer 0 \(of 0 to 2\) differs first.*", compare(theta, good).first)
    mean = edited(good, tmp_path / "mean", "preprocessor_config.json", lambda text: text.replace("0.48145466", "0.5"))
    assert compare(mean, good).first == "two pictures: the pixels differ first"
    template = edited(good, tmp_path / "template", "chat_template.jinja", lambda text: text.replace("['text'] + ' '", "['text'] + '\n'", 1))
    verdict = compare(template, good)
    assert verdict.first.startswith("two pictures: the prompt's tokens differ") and not verdict.equal
    assert not any("logits" in check.name for check in verdict.checks)


def test_a_tie_ends_the_comparison_of_greedy_text():
    blank = np.zeros((0, 1, 1, 3), np.float32)
    values = (np.arange(3, dtype=np.int32), blank, np.zeros((4, 9), np.float32), np.zeros(2, np.float32))
    mine = Row(*values, greedy=(5, 6, 7))
    for gap, holds, note in ((0.9, False, "token 1 is 6 here, 8 there"), (1e-6, True, "the first 1; then the runner-up is 1e-06 behind")):
        check = _greedy("text", mine, Row(*values, greedy=(5, 8, 8), gaps=(1.0, gap, 1.0)), 1e-5)
        assert check.holds == holds and note in check.note
    assert not _greedy("text", mine, Row(*values, greedy=(5, 6), gaps=(1.0, 1.0)), 1e-5).holds


def test_a_tensor_that_no_number_sees_is_found(good, tmp_path):
    """The key's bias moves all scores of a query alike."""
    silent = "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias"
    verdict = compare(changed(good, tmp_path / "ours", silent), good)
    assert [check.name.split(" (")[0] for check in verdict.checks if not check.holds] == ["weights"]
    assert "layers.0.self_attn.k_proj.bias (by 0." in verdict.first and ";" not in verdict.first


def test_the_code_and_the_message_of_a_bad_directory(good, tmp_path, monkeypatch):
    bad = changed(good, tmp_path / "ours", LANGUAGE + "norm.weight")
    monkeypatch.setattr("mmalign_jax.verify.compare.compare", lambda directory: compare(bad, good))
    said = []
    assert verify(bad, said.append) == 1
    assert any("DIFFERENT" in line for line in said) and "norm.weight" in said[-1]


def test_the_two_pictures_are_unlike():
    first, second = probe.pictures()
    assert first.shape[0] > first.shape[1] and second.shape[0] < second.shape[1]
    for picture in (first, second):
        assert not any((picture == other).all() for other in (picture[::-1], picture[:, ::-1], picture[..., ::-1]))


WITHOUT_TORCH = """
import runpy, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in ("torch", "torchvision") else find(name, *rest)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("words", [["launch/verify.py", "--model"], ["launch/export.py", "--verify", "--workdir", "nowhere", "--out"]])
def test_without_torch(good, words):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words, str(good)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "torch is not installed" in done.stderr and "pip install torch" in done.stderr


@pytest.mark.nightly
def test_the_command(good):
    done = launch("launch/verify.py", "--model", good, torch=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("our numbers equal those of transformers\n")


@pytest.mark.parametrize(("asked", "code"), [(True, 1), (False, 0)])
def test_export_verifies_what_it_wrote(tmp_path, monkeypatch, capsys, asked, code):
    spec = importlib.util.spec_from_file_location("launch_export", ROOT / "launch" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seen = []
    monkeypatch.setattr(module, "export_step", lambda workdir, step, out, adapter: out)
    monkeypatch.setattr(module, "verify", lambda directory: seen.append(directory) or 1)
    values = types.SimpleNamespace(workdir="run", out=str(tmp_path), step=None, verify=asked, adapter=False)
    monkeypatch.setattr(module, "flags", types.SimpleNamespace(FLAGS=values))
    assert module.main() == code and seen == ([tmp_path] if asked else [])
    assert str(tmp_path) in capsys.readouterr().out
    values.adapter = values.verify = True
    with pytest.raises(UserError, match="--verify: compares whole models"):
        module.main()


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        compare(tmp_path)
