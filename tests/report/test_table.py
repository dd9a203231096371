import json
import xml.etree.ElementTree

import pytest

from mmalign_jax.errors import UserError
from mmalign_jax.report.curves import read_curves, standalone
from mmalign_jax.report.table import markdown, pair_markdown, read_runs


def write(root, run, value, seed=0, before=None, pairs=None, **objective):
    rows = [
        {"group": "usual", "name": name_, "before": before and {"value": before}, "after": {"value": value * scale}}
        for name_, scale in (("CHAIR_i", 1), ("words", 100))
    ]
    rows.append({"group": "usual", "name": "only before", "before": {"value": 0.5} if before else None, "after": None})
    config = {
        "model": {"path": "models/first"},
        "objective": {"beta": None, **objective},
        "pairs": {"per_sentence": objective["name"] == "ipo", "when": "offline", "maker": "bdhs", **(pairs or {})},
        "samples": {"count": 2, "offline_share": 0.0, "sources": ["policy"], "scorers": [], "selector": "best_worst"},
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


def test_pairs_and_what_tells_their_makers_apart(tmp_path):
    for seed, first in ((0, 6), (1, 8)):
        write(tmp_path, f"a{seed}", 0.1, seed=seed, name="dpo", pairs={"rho_th": 0.75, "guided": False})
        counts = {"records": 10, "pairs": 9, "unchanged": 1, "by_iteration": {"1": first, "2": 10 - first}}
        (tmp_path / f"a{seed}" / "pairs.json").write_text(json.dumps(counts))
    write(tmp_path, "b", 0.3, name="dpo")
    runs = read_runs(tmp_path)
    assert {run.label for run in runs} == {"dpo", "dpo, rho_th 0.75, guided False"}
    assert pair_markdown(runs).splitlines() == [
        "| method | seeds | records | pairs | unchanged | iteration 1 | iteration 2 |",
        "|---|---|---|---|---|---|---|",
        "| dpo, rho_th 0.75, guided False | 2 | 10 | 9 | 1 | 70.0 [60.0, 80.0] | 30.0 [20.0, 40.0] |",
    ]
    assert pair_markdown(runs[-1:]) == ""


def test_curves_are_means_over_the_seeds(tmp_path):
    for seed, values in ((0, (0.5, 0.7)), (1, (0.7, 0.8))):
        write(tmp_path, f"a{seed}", 0.1, seed=seed, name="dpo")
        lines = [{"step": step, "samples/score": value} for step, value in zip((1, 10), values, strict=True)] + [{"step": 20 + seed, "loss": 1.0}]
        (tmp_path / f"a{seed}" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (one,) = read_curves(tmp_path, "samples/score")
    assert (one.name, one.steps) == ("dpo", (1, 10)) and one.values == pytest.approx((0.6, 0.75))
    drawn = xml.etree.ElementTree.fromstring(standalone([one]))
    assert drawn.tag.endswith("svg") and "dpo" in [element.text for element in drawn.iter() if element.tag.endswith("text")]
    with pytest.raises(UserError, match="has logged rewards"):
        read_curves(tmp_path, "rewards")


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        read_runs(tmp_path)
