"""The command on a tiny checkpoint and a published format."""

import json

import pytest
from helpers import checkpoints
from helpers.commands import ROOT, launch
from helpers.rows import record, rlaif_row, write_parquet

from mmalign_jax.config import DataConfig
from mmalign_jax.data.builder import describe, open_records, prepare
from mmalign_jax.data.sources.source import Source

SCENES_SFT = ROOT / "mmalign_jax" / "assets" / "scenes_sft"
CONFIG = ROOT / "configs" / "pairs" / "bdhs.py"
SETTINGS = ("n_iter=2", "max_sentence_tokens=4", "max_answer_tokens=8", "batch_size=4", "temperature=0.0")


def command(model, data, out, *more):
    argv = [str(ROOT / "launch" / "make_pairs.py"), "--config", str(CONFIG), "--model", model, "--data", data, "--out", out]
    argv += [*(f"--config.pairs.{setting}" for setting in SETTINGS), *more]
    return launch(*argv)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.mark.nightly
def test_pairs_of_a_published_set(model, tmp_path):
    data = write_parquet(tmp_path / "set.parquet", [rlaif_row(number) for number in range(5)])
    done = command(model, data, tmp_path / "pairs")
    assert done.returncode == 0, done.stderr
    pairs = open_records(tmp_path / "pairs")
    statistics = json.loads((tmp_path / "pairs" / "statistics.json").read_text())
    assert statistics["records"] == 5 == statistics["pairs"] + statistics["unchanged"] + statistics["unusable"]
    assert len(pairs) == statistics["pairs"] > 0 and sum(statistics["by_iteration"].values()) == 5
    for pair in map(pairs.__getitem__, range(len(pairs))):
        reference, rejected = pair.responses
        assert reference.text.startswith("A desk with lamp") and (pair.prefs[0].win, pair.prefs[0].lose) == (0, 1)
        assert rejected.source == "bdhs" and rejected.text != reference.text
        assert pair.meta["bdhs"]["settings"]["rho_th"] == 0.99 and pair.meta["bdhs"]["iteration"] in (1, 2)
    assert "ended in iteration 1" in done.stdout and f"Written: {len(pairs)} pairs" in done.stdout

    # the same command finds that it is done; other settings make other pairs; the device batch is not one of them
    again = command(model, data, tmp_path / "pairs", "--config.pairs.batch_size=8")
    assert again.returncode == 0 and f"Made before: {len(pairs)} pairs" in again.stdout and "Making pairs" not in again.stdout
    assert "ended in iteration 1" in again.stdout
    before = describe(tmp_path / "pairs").fingerprint
    other = command(model, data, tmp_path / "pairs", "--config.pairs.seed=1", "--config.pairs.per_sentence=True")
    assert other.returncode == 0 and "Making pairs" in other.stdout
    assert describe(tmp_path / "pairs").fingerprint != before


def test_prepared_records_and_rows_that_are_left_out(model, tmp_path):
    rows = [record(f"r{number}", chosen=text, prefs=()) for number, text in enumerate(["A cat. A dog.", "Yes.", "A " + "table " * 40])]
    prepare(DataConfig(), Source("rows", "1", lambda: iter(rows)), tmp_path / "set")
    done = command(model, tmp_path / "set", tmp_path / "pairs", "--config.data.answer_tokens=32", "--config.data.on_long_row=drop")
    assert done.returncode == 0, done.stderr
    statistics = json.loads((tmp_path / "pairs" / "statistics.json").read_text())
    assert statistics["records"] == 2 and [row["record_id"] for row in statistics["left_out"]] == ["r2"]
    assert not (tmp_path / "pairs.imported").exists()


@pytest.mark.nightly
def test_pairs_of_the_built_in_world(tmp_path):
    """`--data scenes` gives what the same records give when they are named as a prepared set."""
    settings = ("--config.scenes.align=2", "--config.pairs.n_iter=1")
    done = command(SCENES_SFT, "scenes", tmp_path / "pairs", *settings)
    assert done.returncode == 0, done.stderr
    drawn = tmp_path / "pairs.imported"
    assert describe(drawn).count == 6 and "6 records of scenes" in done.stdout  # a caption and two questions a picture
    again = command(SCENES_SFT, drawn, tmp_path / "again", *settings)
    assert again.returncode == 0, again.stderr
    one, other = (open_records(tmp_path / name) for name in ("pairs", "again"))
    assert list(map(one.__getitem__, range(len(one)))) == list(map(other.__getitem__, range(len(other)))) and len(one) > 0
    assert all(pair.meta["split"] == "align" for pair in map(one.__getitem__, range(len(one))))
    sft = command(SCENES_SFT, "scenes", tmp_path / "pairs", "--config.scenes.sft=1", "--config.data.split=sft", "--config.pairs.n_iter=1")
    assert sft.returncode == 0 and "3 records of scenes" in sft.stdout and "Making pairs" in sft.stdout


@pytest.mark.parametrize(
    "out, more, message",
    [
        ("set", (), "--out: is the directory of --data"),
        pytest.param("pairs", ("--config.pairs.maker=none",), "config.pairs.maker: 'none' makes no pairs", marks=pytest.mark.nightly),
        ("pairs", ("--config.data.on_long_row=shorten_answer",), "config.data.on_long_row"),
        pytest.param("", (), "--model, --data and --out", marks=pytest.mark.nightly),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, out, more, message):
    done = command(model, tmp_path / "set", tmp_path / out if out else "", *more)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
