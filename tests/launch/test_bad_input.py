"""A user's mistake is one line that names file, row and mend; rows that are skipped are counted and listed."""

import dataclasses
import html
import json
import re

import pytest
from helpers.checkpoints import tiny_llava
from helpers.commands import ROOT, launch
from helpers.rows import encoded, photo_bytes, rlaif_row, write_parquet

from mmalign_jax import config, config_files, pipeline
from mmalign_jax.config import DataConfig
from mmalign_jax.data import builder
from mmalign_jax.data.builder import RecordSource
from mmalign_jax.data.sources.source import MARKER
from mmalign_jax.errors import DataError, UserError


def bomb():
    """A picture of 66 million pixels in 64 kB."""
    data = encoded(0, (8128, 8128), "PNG", "L")
    assert len(data) < 100_000
    return data


# reason -> (change of a good row, the problem that is named, the mend)
BAD = {
    "missing_image": (lambda: {"image": {"bytes": None, "path": "gone.jpg"}}, "there is no image file 'gone.jpg'", "Put the image under"),
    "no_answer": (lambda: {"rejected": " "}, "the row has no rejected answer", "Give the row both answers"),
    "placeholder_mismatch": (
        lambda: {"question": "<image> and <image>: which is red?"}, "2 image placeholders for 1 images", "exactly once for each image",
    ),
    "unreadable_image": (lambda: {"image": {"bytes": photo_bytes()[:-700], "path": ""}}, "truncated or corrupt", "Replace the image"),
    "image_too_large": (lambda: {"image": {"bytes": bomb(), "path": ""}}, "8128 x 8128, over the limit", "Shrink the image"),
}  # fmt: skip


def good(number):
    return rlaif_row(number, image={"bytes": photo_bytes("coffee"), "path": f"{number}.jpg"})


def table(path, *reasons):
    """Four good rows; behind the second one a bad row for every reason."""
    bad = [rlaif_row(2 + number, **BAD[reason][0]()) for number, reason in enumerate(reasons)]
    return write_parquet(path, [good(0), good(1), *bad, good(2 + len(bad)), good(3 + len(bad))])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("model"))


def settings(model, data, **more):
    given = {"model.path": str(model), "data.path": str(data), "train.steps": 2, "train.batch_size": 8, "report.tensorboard": False}
    return config.from_mapping(config_files.load(ROOT / "configs" / "base.py", given | more))


def mistake(*words):
    """The one line that the command prints on standard error before it ends with 2."""
    done = launch(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_named(model, tmp_path, reason):
    _, problem, mend = BAD[reason]
    file = table(tmp_path / "set.parquet", reason)
    with pytest.raises(DataError) as caught:
        pipeline.run(settings(model, file), tmp_path / "run")
    line = str(caught.value)
    assert line.startswith(f"{file}, row 2 (idx 2): ") and problem in line and mend in line and "\n" not in line
    assert caught.value.reason == reason
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["config.json"]


def test_the_command_says_it_in_one_line(model, tmp_path):
    file = table(tmp_path / "set.parquet", "unreadable_image")
    words = ["launch/train.py", "--config", "configs/base.py", f"--config.model.path={model}", f"--config.data.path={file}"]
    line = mistake(*words, "--workdir", tmp_path / "run")
    assert line.startswith(f"error: {file}, row 2 (idx 2): the image is truncated or corrupt") and line.rstrip().endswith("remove the row.")


def test_an_objective_that_goes_by_margins_wants_some(model, tmp_path):
    file = table(tmp_path / "set.parquet")
    with pytest.raises(UserError, match=r"config\.objective\.name: mm_dpo goes by the pairs' margins, and in this data set all are 0"):
        pipeline.run(settings(model, file, **{"objective.name": "mm_dpo"}), tmp_path / "run")


def test_an_objective_that_sorts_losses_wants_pairs_of_one_weight(model, tmp_path, monkeypatch):
    read = RecordSource.__getitem__

    def weighted(source, index):
        record = read(source, index)
        return dataclasses.replace(record, prefs=tuple(dataclasses.replace(pref, weight=0.5) for pref in record.prefs))

    monkeypatch.setattr(RecordSource, "__getitem__", weighted)
    with pytest.raises(UserError, match=r"config\.objective\.name: aot sorts the losses of a step.* weights other than 1"):
        pipeline.run(settings(model, table(tmp_path / "set.parquet"), **{"objective.name": "aot"}), tmp_path / "run")


def test_only_the_built_in_world_is_measured_in_a_run_on_it(model, tmp_path):
    file = table(tmp_path / "set.parquet")
    with pytest.raises(UserError, match=r"config\.eval\.benchmarks: .* this data set is not of it"):
        pipeline.run(settings(model, file, **{"eval.benchmarks": ("pope",)}), tmp_path / "run")
    with pytest.raises(UserError, match=r"config\.eval\.probe_every: .* this data set is not of it"):
        pipeline.run(settings(model, file, **{"eval.probe_every": 1, "data.format": "rlaif_v"}), tmp_path / "other")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config.objective.bta=0.2"], "config.objective.bta: no such setting. Did you mean config.objective.beta?"),
        pytest.param(
            ["--config.train.batch_size=0"], "config.train.batch_size: 0 is out of range, must be at least 1", marks=pytest.mark.nightly
        ),
        (["--config.model.path=nowhere"], "nowhere/config.json: no such file; expected a Hugging Face model directory"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, words, message):
    assert mistake("launch/train.py", "--config", "configs/llava15_7b_dpo.py", *words, "--workdir", tmp_path) == f"error: {message}\n"


def test_a_missing_config_file_is_one_line(tmp_path):
    line = mistake("launch/train.py", "--config", "configs/none.py", "--workdir", tmp_path)
    assert line == "error: configs/none.py: no such config file\n"


@pytest.mark.parametrize("where", ["given", "own"])
def test_a_corrupt_shard_is_named(model, tmp_path, where):
    """In a prepared set that the user names, and in the run's own import of a set: both are found before training."""
    file, workdir = table(tmp_path / "set.parquet"), tmp_path / "run"
    directory = tmp_path / "prepared" if where == "given" else workdir / "data"
    builder.obtain(DataConfig(path=file, format="rlaif_v"), directory)
    (shard,) = directory.rglob("*array_record*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError) as caught:
        pipeline.run(settings(model, directory if where == "given" else file, **{"data.format": "auto"}), workdir)
    line = str(caught.value)
    assert f"{shard.name}, row " in line and "the shard is corrupt" in line and "\n" not in line
    assert line.endswith(f"Delete {directory} and import the data set again.")


def test_another_run_is_not_overwritten(model, tmp_path):
    """A run that a mistake stopped before it computed anything gives way to the mended one, in the same directory; later ones do not."""
    file = table(tmp_path / "set.parquet", "no_answer")
    for _ in range(2):
        with pytest.raises(DataError, match="no rejected answer"):
            pipeline.run(settings(model, file), tmp_path / "run")
    mended = write_parquet(tmp_path / "other.parquet", [good(0)])
    with pytest.raises(UserError, match="cannot be split"):
        pipeline.run(settings(model, mended, **{"train.batch_size": 4}), tmp_path / "run")  # over the eight devices of the tests
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    message = re.escape(f"{tmp_path / 'run'} holds a run with other settings (config.train.batch_size: 4 there, 8 now); use a new directory")
    with pytest.raises(UserError, match=message):
        pipeline.run(settings(model, mended), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["batch_size"] == 4


def listed(workdir):
    """(file, row, why) of the rows that the report lists as left out."""
    section = re.search(r"<h2>Rows left out</h2>(.*?)</section>", (workdir / "report.html").read_text(), re.DOTALL)[1]
    cells = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", section)
    assert f"<p>{len(cells)} row" in section
    return [tuple(map(html.unescape, row)) for row in cells]


@pytest.mark.nightly
def test_skipped_rows_are_counted_and_listed(model, tmp_path):
    """A whole run with BDHS pairs, in which bad rows are skipped and one that is too long is dropped: nothing gets lost on the way."""
    long = rlaif_row(9, image=good(9)["image"], chosen="A cat. " * 60)
    rows = [*map(good, range(2)), *(rlaif_row(2 + n, **BAD[reason][0]()) for n, reason in enumerate(BAD)), good(7), good(8), long]
    file = write_parquet(tmp_path / "set.parquet", rows)
    flags = {
        "model.path": model, "data.path": file, "data.on_bad_row": "skip", "data.on_long_row": "drop", "data.answer_tokens": 96,
        "train.steps": 2, "train.batch_size": 4, "report.tensorboard": False, "report.gallery": 1, "eval.max_new_tokens": 2,
        "pairs.maker": "bdhs", "pairs.n_iter": 1, "pairs.max_sentence_tokens": 4, "pairs.batch_size": 4,
    }  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in flags.items()]
    workdir = tmp_path / "run"
    done = launch("launch/train.py", "--config", "configs/base.py", *overrides, "--workdir", workdir)
    assert done.returncode == 0, done.stdout + done.stderr

    reasons = ", ".join(f"1 {reason}" for reason in sorted(BAD))
    assert f"5 records of 10 rows; skipped: {reasons}\n" in done.stdout
    assert "1 records left out before that" in done.stdout
    imported = json.loads((workdir / "data" / MARKER).read_text())
    assert imported["read"] == 10 == imported["count"] + sum(imported["skipped"].values()) and imported["skipped"] == dict.fromkeys(BAD, 1)
    lines = [json.loads(line) for line in (workdir / "data" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["file"], line["row"], line["reason"]) for line in lines] == [
        (file, f"{2 + number} (idx {2 + number})", reason) for number, reason in enumerate(BAD)
    ]
    for line in lines:
        assert BAD[line["reason"]][1] in line["problem"] and BAD[line["reason"]][2] in line["mend"]

    shown = listed(workdir)
    assert shown[:5] == [(line["file"], line["row"], f"{line['reason']}: {line['problem']}") for line in lines]
    assert shown[5][:2] == ("records", "set.parquet:9") and shown[5][2].startswith("dropped_long: ")
    pairs = json.loads((workdir / "pairs" / "statistics.json").read_text())
    assert pairs["records"] == 4 and pairs["records"] == pairs["pairs"] + pairs["unchanged"] + pairs["unusable"]
