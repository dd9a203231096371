import sys
from pathlib import Path

import pytest

from mmalign_jax import config, config_files, gin_adapter
from mmalign_jax.errors import UserError

BASE = Path(__file__).resolve().parents[1] / "configs" / "base.py"


@pytest.fixture
def values():
    return config_files.load(BASE)


def test_bindings_and_files_set_the_same_fields(values, tmp_path):
    file = tmp_path / "a.gin"
    file.write_text("# a comment\ntrain.steps = 5\nobjective:\n  name = 'simpo'\n  gamma = 0.2\nmodel.freeze = ('decoder',)\n")
    gin_adapter.apply(values, [file], ["train.steps = 6", "optimizer.learning_rate = 1e-3"])
    out = config.from_mapping(values)
    assert out.train.steps == 6 and out.model.freeze == ("decoder",) and out.optimizer.learning_rate == 1e-3
    assert out.objective.name == "simpo" and out.objective.hyperparameters == {"gamma": 0.2}


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("train.stpes = 5", r"--gin_bindings, line 1: config\.train\.stpes: no such setting\. Did you mean config\.train\.steps\?"),
        ("steps = 5", r"config\.steps: no such setting"),
        ("train.steps = 'x'", r"config\.train\.steps: expected int, got 'x'"),
        ("train.steps = @five()", "@five: references are not supported"),
        ("train.steps = %FIVE", "%FIVE: macros are not supported"),
        ("scope/train.steps = 5", "scope/: scopes are not supported"),
        ("include 'other.gin'", "import and include are not supported"),
        ("import os", "import and include are not supported"),
        ("train.steps = ", "--gin_bindings, line 1: Unable to parse value"),
        ("train.steps = (1,", "--gin_bindings"),
        ("train.steps = 'a", "--gin_bindings"),
    ],
)
def test_errors_name_the_binding(values, binding, message):
    with pytest.raises(UserError, match=message):
        gin_adapter.apply(values, [], [binding])


def test_a_missing_file_is_named(values):
    with pytest.raises(UserError, match="--gin_file: none.gin: no such file"):
        gin_adapter.apply(values, ["none.gin"])


def test_without_gin_the_extra_is_named(values, monkeypatch):
    monkeypatch.setitem(sys.modules, "gin", None)
    gin_adapter.apply(values)  # nothing asked, nothing needed
    with pytest.raises(UserError, match=r"pip install \"mmalign_jax\[gin\]\""):
        gin_adapter.apply(values, [], ["train.steps = 5"])


def test_gin_itself_keeps_nothing(values):
    import gin

    gin_adapter.apply(values, [], ["train.steps = 5"])
    assert gin.config_str() == ""
