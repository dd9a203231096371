import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mmalign_jax import config, config_files, losses
from mmalign_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASE = CONFIGS / "base.py"


def write(path: Path, body: str) -> Path:
    path.write_text(body)
    return path


def child(tmp_path: Path, line: str) -> Path:
    body = f"    config = config_files.load({str(BASE)!r})\n    {line}\n    return config\n"
    return write(tmp_path / "child.py", "from mmalign_jax import config_files\ndef get_config():\n" + body)


def test_base_holds_every_setting_at_its_default():
    assert config.from_mapping(config_files.load(BASE)) == config.Config()


@pytest.mark.parametrize("name", losses.names())
def test_base_has_a_place_for_every_hyperparameter(name):
    defaults = losses.hyperparameters(name)
    of_samples = losses.Need.SAMPLED in losses.build(name).needs
    base = CONFIGS / "recipes" / "world_rewards.py" if of_samples else BASE
    values = config_files.load(base, {"objective.name": name} | {f"objective.{key}": default for key, default in defaults.items()})
    assert config.from_mapping(values).objective.hyperparameters == defaults


TRAINING = [path for path in CONFIGS.rglob("*.py") if path.parent.name not in ("sweeps", "objectives")]


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_every_config_is_valid_from_any_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.from_mapping(config_files.load(path))


def test_overrides_are_set_and_the_file_is_run_anew(tmp_path):
    path = child(tmp_path, "config.train.steps = 7")
    assert config_files.load(path, {"train.batch_size": 2}).train.to_dict() == config_files.load(BASE).train.to_dict() | {
        "steps": 7, "batch_size": 2,
    }  # fmt: skip
    assert config_files.load(path).train.batch_size == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objectve.beta": 1.0}, "config.objectve.beta: no such setting. Did you mean config.objective.beta?"),
        ({"steps": 1}, "config.steps: no such setting. Did you mean config.train.steps?"),
        ({"zzz": 1}, "config.zzz: no such setting. The groups are auxiliary, checkpoint, data,"),
        ({"train": 1}, "config.train: is a group of settings; set one of config.train.accumulate,"),
        ({"train.steps": "five"}, "config.train.steps: expected int, got 'five'"),
    ],
)
def test_wrong_overrides_name_the_key(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_files.load(BASE, overrides)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.train.stpes = 5", "child.py, line 4: config.train.stpes = 5:"),
        ("config.train.steps = 'x'", "child.py, line 4: config.train.steps = 'x':"),
        ("confg.train.steps = 5", "child.py, line 4: confg.train.steps = 5: name 'confg' is not defined"),
        ("return 3", "get_config() must return an ml_collections.ConfigDict, got int"),
        ("config.train.steps = ", "child.py, line 4: invalid syntax"),
    ],
)
def test_a_slip_in_a_file_is_one_line_with_its_place(tmp_path, line, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        config_files.load(child(tmp_path, line))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_missing_file_and_missing_function(tmp_path):
    with pytest.raises(UserError, match="nothing.py: no such config file"):
        config_files.load(tmp_path / "nothing.py")
    with pytest.raises(UserError, match=r"defines get_config\(\)"):
        config_files.load(write(tmp_path / "empty.py", ""))
    with pytest.raises(UserError, match="ends in .py"):
        config_files.load(write(tmp_path / "config.json", "{}"))


def test_a_file_without_base_is_a_config_too(tmp_path):
    body = "def get_config():\n    return ConfigDict({'train': {'steps': 3}})\n"
    path = write(tmp_path / "own.py", "from ml_collections import ConfigDict\n" + body)
    loaded = config_files.load(path)
    assert isinstance(loaded, ConfigDict) and list(config_files.keys(loaded)) == ["train.steps"]


def test_an_objective_is_no_config_and_says_how_it_is_used():
    with pytest.raises(UserError, match=r"mdpo\.py: defines an objective; .* --config\.objective\.name=mdpo"):
        config_files.load(CONFIGS / "objectives/mdpo.py")
