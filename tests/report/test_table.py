import json

import pytest

from mmalign_jax.errors import UserError
from mmalign_jax.report.table import markdown, read_runs


def write(root, run, value, seed=0, before=None, **objective):
    rows = [
        {"group": "usual", "name": name_, "before": before and {"value": before}, "after": {"value": value * scale}}
        for name_, scale in (("CHAIR_i", 1), ("words", 100))
    ]
    rows.append({"group": "usual", "name": "only before", "before": {"value": 0.5} if before else None, "after": None})
    config = {
        "model": {"path": "models/first"},
        "objective": {"beta": None, **objective},
        "pairs": {"per_sentence": objective["name"] == "ipo", "when": "offline", "maker": "bdhs"},
        "samples": {"count": 2, "offline_share": 0.0},
        "rounds": {"count": 1},
        "train": {"seed": seed, "batch_size": 8},
    }
    (root / run).mkdir()
    (root / run / "config.json").write_text(json.dumps(config))
    (root / run / "summary.json").write_text(json.dumps({"scores": rows, "steps": 20}))


def test_one_line_a_method_with_mean_and_range_over_seeds_and_what_was_before(tmp_path):
    write(tmp_path, "a", 0.1, name="dpo", before=0.4)
    write(tmp_path, "b", 0.3, seed=1, name="dpo", before=0.4)
    write(tmp_path, "c", 0.2, name="ipo", beta=0.5)
    (tmp_path / "unfinished").mkdir()
    assert markdown(read_runs(tmp_path), "usual", ("CHAIR_i", "words", "only before"), percent=("CHAIR_i",)).splitlines() == [
        "| method | steps x rows | seeds | CHAIR_i | words | only before |",
        "|---|---|---|---|---|---|",
        "| before training, first | - | 1 | 40.0 | 0.4 | 0.5 |",
        "| dpo | 20 x 8 | 2 | 20.0 [10.0, 30.0] | 20.0 [10.0, 30.0] | - |",
        "| ipo (beta 0.5), per-sentence pairs | 20 x 8 | 1 | 20.0 | 20.0 | - |",
    ]


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        read_runs(tmp_path)
