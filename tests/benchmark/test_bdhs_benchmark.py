"""The BDHS benchmark: its words, that both sides do the same, and what it reports."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest
from helpers.checkpoints import quiet
from helpers.commands import launch

from mmalign_jax.benchmark import bdhs, bdhs_ours, bdhs_transformers, words
from mmalign_jax.benchmark.compare import Estimate, Spread, z_of_means, z_of_shares
from mmalign_jax.benchmark.items import Timed
from mmalign_jax.benchmark.model import hf_config, write_model
from mmalign_jax.benchmark.workload import Item, Options, Result, Workload, make_items
from mmalign_jax.errors import UserError
from mmalign_jax.hf.import_ import read_config
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.models.params import abstract_params
from mmalign_jax.report.console import format_table

TINY = hf_config() | {
    "text_config": hf_config()["text_config"]
    | {"vocab_size": 256, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    "vision_config": hf_config()["vision_config"]
    | {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7},
}
OPTIONS = Options(rho_th=0.8, n_iter=3, eps=0.6, max_sentence_tokens=12, max_answer_tokens=20)




@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("benchmark") / "model", TINY)


def sides(workload):
    with quiet():
        other = bdhs_transformers.Straightforward(workload.model, workload.options)
    return bdhs_ours.runner(workload), lambda asked: [other(one.item) for one in asked]


def test_the_vocabulary():
    tokens = words.vocabulary(words.VOCABULARY)
    assert len(set(tokens)) == len(tokens) == words.VOCABULARY == 32064 and tokens[: len(words.SPECIAL_TOKENS)] == words.SPECIAL_TOKENS
    assert sum(token.endswith(".") for token in tokens) / len(tokens) == pytest.approx(1 / words.WORDS_TO_STOP, rel=0.01)
    with pytest.raises(UserError, match="--model: its vocabulary has 50 tokens; the benchmark's words take 164"):
        words.vocabulary(50)


def test_the_model_has_63_million_parameters(model):
    config = read_config(model)
    processor = load_processor(model, config)
    for seed in range(20):
        text = words.description(np.random.default_rng(seed))
        assert processor.decode(processor.answer(text).ids) == text and 4 <= text.count(".") <= 6
    from mmalign_jax.hf import families

    whole = families.read(hf_config() | {"model_type": "llava", "vision_feature_select_strategy": "default"}, where="the test")
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(whole))) == pytest.approx(63e6, rel=0.01)
    assert whole.image_tokens == 576


@pytest.mark.parametrize("rho_th", [0.0, 1.0])
def test_both_sides_write_the_same_where_nothing_is_drawn(model, tmp_path, rho_th):
    """Sentences of one word have one split. So hidden tokens, positions, contexts, stops and the similarity are the same."""
    items = make_items(tmp_path, 3, seed=1)
    answers = ("cup. table. dog.", "tree. lamp.", "book. door. horse. cake.")
    items = tuple(dataclasses.replace(item, answer=answer) for item, answer in zip(items, answers, strict=True))
    options = dataclasses.replace(OPTIONS, rho_th=rho_th, temperature=0.0, eps=1e-9, n_iter=2 if rho_th else 1)
    workload = Workload(str(model), options, items, batch_size=4)
    ours, theirs = (run(workload.pick(0, 3)) for run in sides(workload))
    assert [dataclasses.replace(one, similarity=0.0) for one in ours] == [dataclasses.replace(one, similarity=0.0) for one in theirs]
    np.testing.assert_allclose([one.similarity for one in ours], [one.similarity for one in theirs])
    assert len({one.words for one in ours}) > 1 or options.n_iter == 2


@pytest.mark.nightly
def test_both_sides_have_the_same_statistics(model, tmp_path):
    items = make_items(tmp_path, 12, seed=2)
    workload = Workload(str(model), OPTIONS, items, batch_size=8)
    ours, theirs = (bdhs._statistics(run(workload.pick(0, 24))) for run in sides(workload))
    for name, values in ours.items():
        assert abs(z_of_means(Estimate.of(values), Estimate.of(theirs[name]))) < 4, name
    assert 0 < sum(ours["ended in iteration 1"]) < 24


def side(name, seconds, similarity):
    results = tuple(Result(str(i), 1 + i % 3, similarity + 0.01 * i, i % 3 == 0, False, 80 + i) for i in range(6))
    rounds = [Timed(one, 2 * one, 10 << 20, results) for one in seconds]
    ready = {"imported_bytes": 1 << 20, "versions": {"package": "1"}, "options": dataclasses.asdict(OPTIONS)}
    return bdhs._Side(name, types.SimpleNamespace(ready=ready), 6, Timed(9.0, 9.0, 20 << 20, results), rounds)


def test_the_report(monkeypatch):
    ours, other = side(bdhs.OURS, [1.0, 2.0, 4.0], 0.5), side("transformers", [10.0, 30.0, 40.0], 0.5)
    compared = bdhs._compared(ours, other)
    assert compared["speed_ratio"] == {"median": 10.0, "least": 10.0, "most": 15.0}
    assert compared["peak_memory_ratio"] == 1.0 and compared["same_options"] and set(compared["z"].values()) == {0.0}
    report = {"sides": {one.name: bdhs._side(one) for one in (ours, other)}, "against": {"transformers": compared}}
    rows, columns = bdhs.table(json.loads(json.dumps(report)))
    text = format_table(rows, columns)
    for wanted in ("pairs/s", "peak memory, MiB", "9.0 (6)", "similarity", "z +0.0", "10 [10, 15]", "3 [1.5, 6]"):
        assert wanted in text, wanted
    assert all(len(row) == len(columns) == 4 for row in rows)


def test_spreads_and_differences():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Estimate.of([1.0, 3.0]) == Estimate(2.0, 1.0)
    assert z_of_means(Estimate(1.0, 0.3), Estimate(2.0, 0.4)) == -2.0
    # 30 of 40 and 20 of 40: pooled 0.625
    assert z_of_shares(30, 40, 20, 40) == pytest.approx(0.25 / math.sqrt(0.625 * 0.375 / 20))
    assert z_of_shares(5, 5, 9, 9) == 0.0


def test_items_come_again_under_other_numbers():
    items = tuple(Item(str(i), "", "", "") for i in range(3))
    asked = Workload("", OPTIONS, items, 1).pick(2, 5)
    assert [(one.number, one.item.id) for one in asked] == [(2, "2"), (3, "0"), (4, "1"), (5, "2"), (6, "0")]


@pytest.mark.nightly
def test_the_command(model, tmp_path):
    out = tmp_path / "report.json"
    flags = {"model": model, "records": 4, "against_records": 2, "rounds": 2, "batch": 4, "max_sentence_tokens": 12, "max_answer_tokens": 20}
    words_ = ["--workload=bdhs", "--against=transformers", f"--out={out}", *(f"--{name}={value}" for name, value in flags.items())]
    done = launch("launch/benchmark.py", *words_, torch=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["against"]["transformers"]["same_options"] and report["date"] and report["command"]
    for name, records in ((bdhs.OURS, 4), ("transformers", 2)):
        found = report["sides"][name]
        assert found["pairs"] == 2 * records and len(found["rounds"]) == 2 and found["peak_bytes"] > found["imported_bytes"] > 0
        assert found["options"]["max_sentence_tokens"] == 12 and found["versions"]
    assert done.stdout.count("pairs/s, median") == 1 and "jax 0." in done.stdout and "torch 2." in done.stdout
