import importlib.util
import json
import subprocess
import sys
import types

import pytest
from helpers.commands import ROOT, users_environment

from mmalign_jax.errors import UserError
from mmalign_jax.evaluation import pope
from mmalign_jax.scenes import model, splits

SCRIPT = ROOT / "launch" / "evaluate.py"


@pytest.fixture(scope="module")
def evaluate():
    spec = importlib.util.spec_from_file_location("launch_evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(**given):
    values = {
        "benchmark": "world",
        "data": "scenes",
        "images": None,
        "synonyms": None,
        "prompt": "?",
        "question_suffix": "",
        "pictures": 2,
        "seed": 0,
    }
    return types.SimpleNamespace(**(values | given))


@pytest.mark.parametrize("benchmark, captions, questions", [("world", True, True), ("chair", True, False), ("pope", False, True)])
def test_the_built_in_world(evaluate, benchmark, captions, questions):
    for test in evaluate._tests(options(benchmark=benchmark)):
        assert (bool(test.captions), bool(test.questions)) == (captions, questions)


@pytest.mark.parametrize(
    "given, problem",
    [
        ({"data": "x.json"}, "say --data scenes"),
        ({"benchmark": "pope", "data": "x.json"}, "--images"),
        ({"benchmark": "pope", "data": "x.json", "images": "/nowhere"}, "--images"),
        ({"benchmark": "chair", "data": "x.jsonl", "images": "."}, "--synonyms"),
    ],
)
def test_what_is_missing_is_named(evaluate, given, problem):
    with pytest.raises(UserError, match=problem):
        evaluate._tests(options(**given))


@pytest.mark.slow
def test_command(tmp_path):
    """Two models on published-style POPE files: one JSON file, every answer in it."""
    for name, seed in (("first", 0), ("second", 1)):
        model.write_initial(tmp_path / name, seed=seed)
    records = list(splits.records(0, "test", 2))
    questions = []
    for number, record in enumerate(records):
        (tmp_path / f"{number}.png").write_bytes(record.media[0].data)
        questions += [
            pope.Question(f"{number}.png", f"Is there a {kind} in the picture?", kind, kind == "cup", "random") for kind in ("cup", "key")
        ]
    pope.save(questions, tmp_path / "pope_random.json")
    flags = {
        "model": "first",
        "compare": "second",
        "benchmark": "pope",
        "data": "pope_random.json",
        "images": ".",
        "out": "out/scores.json",
    }
    command = [sys.executable, SCRIPT, *(f"--{name}={value}" for name, value in flags.items()), "--max_new_tokens=2", "--batch_size=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=users_environment())
    assert done.returncode == 0, done.stderr
    assert "POPE accuracy" in done.stdout and "--compare" in done.stdout
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (written["model"], written["compare"]["model"]) == ("first", "second")
    assert written["decoding"]["max_new_tokens"] == 2 and "jax" in written["environment"]
    for results in (written["results"], written["compare"]["results"]):
        assert len(results["pope"]["answers"]) == 4
        assert results["pope"]["pope"]["random"]["questions"] == 4
    assert written["results"]["pope"]["answers"] != written["compare"]["results"]["pope"]["answers"]
