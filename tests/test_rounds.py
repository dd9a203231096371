"""Rounds: each a run of its own, from the model of the one before."""

import json

import pytest

from mmalign_jax import pipeline, rounds
from mmalign_jax.config import from_mapping
from mmalign_jax.errors import UserError

MAPPING = {
    "model": {"path": "base"}, "pairs": {"maker": "bdhs", "seed": 3}, "train": {"seed": 5, "steps": 7},
    "rounds": {"count": 3}, "export": {"dtype": "bfloat16"},
}  # fmt: skip


def score(value):
    return None if value is None else {"value": value, "low": value, "high": value}


@pytest.fixture
def runs(monkeypatch):
    """What was run, and what is to happen: 0, or the code of a signal."""
    seen, codes = [], []

    def run(config, workdir):
        seen.append((workdir.name, config))
        workdir.mkdir(exist_ok=True)
        if code := codes.pop(0) if codes else 0:
            return code
        number = int(workdir.name.removeprefix("round_"))
        row = {"group": "test", "name": "CHAIR_i", "before": score(0.5 if config.eval.before else None), "after": score(0.5 - 0.1 * number)}
        (workdir / "summary.json").write_text(json.dumps({"objective": "dpo", "steps": 7, "stopped": "", "scores": [row]}))
        return 0

    monkeypatch.setattr(pipeline, "run", run)
    return seen, codes


def test_each_round_starts_from_the_model_of_the_one_before(runs, tmp_path, capsys):
    assert rounds.run(from_mapping(MAPPING), tmp_path) == 0
    names, configs = zip(*runs[0], strict=True)
    assert names == ("round_1", "round_2", "round_3")
    assert [config.model.path for config in configs] == ["base", str(tmp_path / "round_1" / "export"), str(tmp_path / "round_2" / "export")]
    assert [(config.pairs.seed, config.train.seed) for config in configs] == [(3, 5), (4, 6), (5, 7)]
    assert [config.export.dtype for config in configs] == ["float32", "float32", "bfloat16"]
    assert [config.eval.before for config in configs] == [True, False, False] and {config.rounds.count for config in configs} == {1}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["rounds"]) == (21, 3)
    assert [summary["scores"][0][when]["value"] for when in ("before", "after")] == [0.5, pytest.approx(0.2)]
    assert "CHAIR_i   0.500    0.400    0.300    0.200" in capsys.readouterr().out


def test_a_stopped_round_is_gone_on_with_and_finished_ones_are_not_repeated(runs, tmp_path):
    seen, codes = runs
    codes += [0, 143]
    assert rounds.run(from_mapping(MAPPING), tmp_path) == 143
    assert [name for name, _ in seen] == ["round_1", "round_2"]
    seen.clear()
    assert rounds.run(from_mapping(MAPPING), tmp_path) == 0
    assert [name for name, _ in seen] == ["round_2", "round_3"]
    with pytest.raises(UserError, match="holds a run with other settings"):
        rounds.run(from_mapping(MAPPING | {"train": {"seed": 6, "steps": 7}}), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": {"maker": "none"}}, "config.rounds.count: a round makes its pairs"),
        ({"pairs": {"maker": "bdhs", "when": "online"}}, "config.rounds.count: a round makes its pairs"),
        ({"export": {"enabled": False}}, "config.rounds.count: a round makes its pairs"),
        ({"data": {"holdout": 0.1}}, "config.data.holdout: what one round holds out"),
        ({"model": {"path": "base", "adapter": "a"}}, "config.model.adapter: a round merges its factors"),
        ({"model": {"init": "scenes"}}, "config.rounds.count: rounds start from a model"),
    ],
)
def test_what_has_no_rounds(change, message):
    with pytest.raises(UserError, match=message):
        from_mapping(MAPPING | change)
