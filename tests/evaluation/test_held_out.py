"""Accuracy on held-out pairs, of numbers worked out by hand."""

import json

import numpy as np
import pytest
from helpers.rows import record

from mmalign_jax.evaluation.held_out import TITLE, Judged, metrics, rows, source_of, summarise
from mmalign_jax.types import Response

PAIRS = [
    Judged("a", "x", (1.0, 0.0), (5, 3)),
    Judged("a", "y", (0.5, 0.5), (3, 3)),  # a tie is wrong
    Judged("b", "x", (-1.0, 2.0), (2, 4)),
    Judged("c", "x", (2.0, -1.0), (6, 4)),
]


def test_summary():
    found = json.loads(json.dumps(summarise(PAIRS)))
    assert found["pairs"] == 4 and found["accuracy"]["value"] == 0.5
    assert found["accuracy"]["low"] <= 0.5 <= found["accuracy"]["high"]
    every = np.array([pair.rewards for pair in PAIRS])
    assert found["margin"]["value"] == pytest.approx((1 + 0 - 3 + 3) / 4)
    assert found["mean"]["value"] == pytest.approx(every.mean()) and found["std"]["value"] == pytest.approx(every.std())
    assert {name: (part["pairs"], part["accuracy"]["value"]) for name, part in found["by_source"].items()} == {"x": (3, 2 / 3), "y": (1, 0.0)}
    lengths = {name: (part["pairs"], part["accuracy"]["value"]) for name, part in found["by_length"].items()}
    assert lengths == {"chosen_longer": (2, 1.0), "chosen_shorter": (1, 0.0), "same_length": (1, 0.0)}
    named = metrics(found)
    assert named["held_out/accuracies"] == 0.5 and named["held_out/accuracies_chosen_longer"] == 1.0
    assert set(named) == {f"held_out/{name}" for name in (
        "accuracies", "margins", "mean", "std", "accuracies_chosen_longer", "accuracies_chosen_shorter", "accuracies_same_length")}  # fmt: skip


def test_table():
    table = rows(summarise(PAIRS))
    assert {row.group for row in table} == {TITLE} and all(row.before is None for row in table)
    names = [row.name for row in table]
    assert names[:2] == ["Accuracy (4 pairs)", "Accuracy, chosen longer (2 pairs)"] and "Accuracy, source y (1 pairs)" in names
    assert rows(None) == []
    assert not any("source" in row.name for row in rows(summarise([pair for pair in PAIRS if pair.source == "x"])))


def test_a_perfect_model_and_a_blind_one():
    right = [Judged(str(n), "x", (1.0, 0.0), (1, 1)) for n in range(5)]
    assert summarise(right)["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    blind = [Judged(str(n), "x", (0.3, 0.3), (1, 1)) for n in range(5)]
    found = summarise(blind)
    assert found["accuracy"]["value"] == 0.0 and found["std"]["value"] == pytest.approx(0.0, abs=1e-7)


def test_sources():
    pair = (Response("yes", source="human"), Response("no", source="bdhs"))
    assert source_of(record(responses=pair), 0) == "bdhs"
    assert source_of(record(responses=pair, meta={"origin_dataset": "VQAv2"}), 0) == "VQAv2"
    assert source_of(record(), 0) == "not named"
