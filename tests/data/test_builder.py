"""An import keeps every good row, names every bad one, and is either finished or not there."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
from helpers.rows import encoded, record, rlaif_row, write_parquet

from mmalign_jax.config import DataConfig
from mmalign_jax.data import builder
from mmalign_jax.data import records as records_on_disk
from mmalign_jax.data.bad_rows import BadRow
from mmalign_jax.data.sources.source import MARKER, Source
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.types import Media


def bad_table():
    return [
        rlaif_row(0),
        rlaif_row(1, image={"bytes": None, "path": "gone.jpg"}),
        rlaif_row(2, chosen=""),
        rlaif_row(3, question="<image><image>"),
        rlaif_row(4, image={"bytes": encoded(size=(300, 200))[:900], "path": ""}),
        rlaif_row(5, image={"bytes": encoded(size=(301, 200)), "path": ""}),
        rlaif_row(6, chosen="A cat. "),
        rlaif_row(7),
    ]


REASONS = ["missing_image", "no_answer", "placeholder_mismatch", "unreadable_image", "image_too_large", "equal_answers"]


def given(*records, fingerprint="1"):
    return Source("made here", fingerprint, lambda: iter(records))


def test_skip_counts_and_lists_every_bad_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", bad_table())
    config = DataConfig(path=path, on_bad_row="skip", max_image_pixels=300 * 200)
    seen = []
    done = builder.obtain(config, tmp_path / "set", progress=lambda read, skipped: seen.append((read, skipped)))
    assert done.skipped == dict.fromkeys(REASONS, 1)
    assert done.read == 8 == done.count + sum(done.skipped.values())
    assert seen[-1] == (8, 6)
    lines = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == REASONS
    assert [line["row"] for line in lines] == [f"{n} (idx {n})" for n in range(1, 7)]
    assert all(line["file"] == path and line["problem"] and line["mend"] for line in lines)
    kept = builder.open_records(tmp_path / "set")
    assert [kept[index].id for index in range(len(kept))] == ["a.parquet:0", "a.parquet:7"]


@pytest.mark.parametrize("number,reason", list(enumerate(REASONS, 1)))
def test_error_names_the_first_bad_row_and_leaves_nothing(tmp_path, number, reason):
    table = bad_table()
    path = write_parquet(tmp_path / "a.parquet", [table[0], table[number]])
    with pytest.raises(BadRow, match=f"a.parquet, row 1 .idx {number}.: ") as caught:
        builder.obtain(DataConfig(path=path, max_image_pixels=300 * 200), tmp_path / "set")
    assert caught.value.reason == reason
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_records_come_back_in_order_and_exactly(tmp_path):
    records = [record(f"r{n}", prompt=f"Ünï {n}", images=n % 3, meta={"n": n}) for n in range(23)]
    # trailing zeros would be lost by a fixed-width numpy string
    records[4] = dataclasses.replace(records[4], media=(Media("image", encoded() + b"\0\0\0", "x"),))
    done = builder.prepare(DataConfig(), given(*records), tmp_path / "set")
    found = builder.open_records(done.dir)
    assert [found[index] for index in range(len(found))] == records
    with pytest.raises(IndexError):
        found[23]


def test_many_shards_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "_SHARD_RECORDS", 6)
    monkeypatch.setattr(builder, "_CHUNK_RECORDS", 4)
    done = builder.prepare(DataConfig(), given(*(record(f"r{n}") for n in range(20))), tmp_path / "set")
    assert len(list(done.dir.rglob("*array_record*"))) == 4
    found = builder.open_records(done.dir)
    assert [found[index].id for index in range(20)] == [f"r{n}" for n in range(20)]
    (last,) = done.dir.rglob("*array_record*3")
    damage(last, flip)
    found = builder.open_records(done.dir)
    assert found[17].id == "r17"
    with pytest.raises(DataError, match=f"{last.name}, row 18: the shard is corrupt"):
        found[18]


HEAD = """
import os, sys
sys.path.insert(0, sys.argv[2])
from helpers.rows import record
from mmalign_jax.config import DataConfig
from mmalign_jax.data import builder
from mmalign_jax.data.sources.source import Source
"""


def run(code, out):
    """The exit status of a fresh process that runs `code` with `sys.argv[1]` as the set to write."""
    tests = str(pathlib.Path(__file__).parents[1])
    return subprocess.run([sys.executable, "-c", HEAD + code, str(out), tests], timeout=100).returncode


def test_no_tensorflow(tmp_path):
    code = """
builder.prepare(DataConfig(), Source("s", "1", lambda: iter([record("a")])), sys.argv[1])
assert builder.open_records(sys.argv[1])[0] == record("a")
assert "tensorflow" not in sys.modules
"""
    assert run(code, tmp_path / "set") == 0


def test_reuse_and_change(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [rlaif_row(0)])
    config = DataConfig(path=path)
    out = tmp_path / "set"
    assert not builder.obtain(config, out).reused
    assert builder.obtain(config, out).reused
    assert not builder.obtain(dataclasses.replace(config, max_image_pixels=10**6), out).reused
    write_parquet(path, [rlaif_row(0), rlaif_row(1)])
    assert builder.obtain(config, out).count == 2
    assert builder.obtain(dataclasses.replace(config, path=str(out)), tmp_path / "unused").count == 2  # format "records"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.parquet", "set"]


def test_two_sets_share_a_cache(tmp_path):
    tables = [write_parquet(tmp_path / f"{name}.parquet", [rlaif_row(question=name)]) for name in ("a", "b")]
    first, second = (DataConfig(path=path, cache=str(tmp_path / "cache")) for path in tables)
    unused = tmp_path / "unused"
    a = builder.obtain(first, unused)
    opened = builder.open_records(a.dir)
    b = builder.obtain(second, unused)
    limited = builder.obtain(dataclasses.replace(first, max_frames=8), unused)
    made = builder.obtain(second, unused, given(record("made")))
    assert len({a.dir, b.dir, limited.dir, made.dir}) == 4 and not unused.exists()
    assert opened[0].turns[0].parts[1].text == "a" and builder.open_records(b.dir)[0].turns[0].parts[1].text == "b"
    assert builder.open_records(made.dir)[0].id == "made"
    for config, prepared in ((first, a), (second, b)):
        again = builder.obtain(config, unused)
        assert again.reused and again.dir == prepared.dir


def test_sets_of_an_older_schema(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [rlaif_row(0)])
    with monkeypatch.context() as old:
        for module in (builder, records_on_disk):
            old.setattr(module, "SCHEMA", 1)
        builder.obtain(DataConfig(path=path), tmp_path / "set")
    with pytest.raises(DataError, match="schema version 1, this release reads 3.*Import the data set again"):
        builder.open_records(tmp_path / "set")[0]
    done = builder.obtain(DataConfig(path=path), tmp_path / "set")
    assert not done.reused and builder.open_records(done.dir)[0].id == "a.parquet:0"


def test_a_changed_image_file_is_noticed(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded())
    path = write_parquet(tmp_path / "a.parquet", [rlaif_row(0, image={"bytes": None, "path": "x.jpg"})])
    builder.obtain(DataConfig(path=path), tmp_path / "set")
    assert builder.obtain(DataConfig(path=path), tmp_path / "set").reused
    (tmp_path / "x.jpg").write_bytes(encoded(size=(50, 50)))
    done = builder.obtain(DataConfig(path=path), tmp_path / "set")
    assert not done.reused and builder.open_records(done.dir)[0].media[0].data == encoded(size=(50, 50))


def test_the_same_rows_make_the_same_files(tmp_path):
    def shards(name):
        done = builder.prepare(DataConfig(workers=0 if name == "a" else 3), given(*(record(f"r{n}") for n in range(9))), tmp_path / name)
        return {file.name: file.read_bytes() for file in done.dir.rglob("*array_record*")}

    assert shards("a") == shards("b")


def test_an_interrupted_import_leaves_what_was_there(tmp_path):
    builder.prepare(DataConfig(), given(record("old")), tmp_path / "set")

    def rows():
        yield record("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder.prepare(DataConfig(), Source("s", "2", rows), tmp_path / "set")
    assert [file.name for file in tmp_path.iterdir()] == ["set"]
    assert builder.open_records(tmp_path / "set")[0].id == "old"


def test_a_killed_import_is_no_set_and_does_not_hinder_the_next(tmp_path):
    code = """
def rows():
    yield from (record(f"r{n}") for n in range(5))
    os._exit(9)

builder.prepare(DataConfig(workers=0), Source("s", "1", rows), sys.argv[1])
"""
    assert run(code, tmp_path / "set") == 9
    assert (tmp_path / ".set.importing").is_dir()
    with pytest.raises(UserError, match="not a set of prepared records"):
        builder.open_records(tmp_path / "set")
    assert builder.prepare(DataConfig(), given(record()), tmp_path / "set").count == 1
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        builder.prepare(DataConfig(), given(record()), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_double_ids_and_empty_sets(tmp_path):
    with pytest.raises(BadRow, match="made here, row a: the id 'a' occurs twice"):
        builder.prepare(DataConfig(), given(record("a"), record("b"), record("a")), tmp_path / "set")
    with pytest.raises(DataError, match="made here: no usable row .it is empty."):
        builder.prepare(DataConfig(), given(), tmp_path / "set")
    with pytest.raises(DataError, match="no usable row .1 no_answer."):
        builder.prepare(DataConfig(on_bad_row="skip"), given(record(chosen=" ")), tmp_path / "set")


def test_records_of_other_makers_are_checked_too(tmp_path):
    good = record()
    cases = {
        "placeholder_mismatch": [dataclasses.replace(good, media=()), record(prompt="a <image>"), record(chosen="an <image>")],
        "malformed_row": [
            record(""), record(prompt=" "), dataclasses.replace(good, turns=()), record(prompt="\ud800"), record(prefix="No"),
        ],
        "no_answer": [dataclasses.replace(good, responses=(), prefs=()), record(chosen="no", rejected="no", prefix="no")],
        "equal_answers": [record(chosen="no ")],
        "unreadable_image": [dataclasses.replace(good, media=(Media("image", b"GIF89a"),))],
    }  # fmt: skip
    for reason, records in cases.items():
        for wrong in records:
            with pytest.raises(BadRow) as caught:
                builder.prepare(DataConfig(workers=0), given(wrong), tmp_path / "set")
            assert caught.value.reason == reason


def damage(file, change):
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(bytes(data))


def flip(data):
    data[120] ^= 0xFF


def halve(data):
    del data[len(data) // 2 :]


def blank(data):
    data[:] = bytes(len(data))


@pytest.mark.parametrize("change", [flip, halve, blank, bytearray.clear])
def test_a_corrupt_shard_is_named(tmp_path, change):
    builder.prepare(DataConfig(), given(*(record(f"r{n}") for n in range(5))), tmp_path / "set")
    (shard,) = (tmp_path / "set").rglob("*array_record*")
    damage(shard, change)
    with pytest.raises(DataError, match=f"{shard.name}.*corrupt.*import the data set again"):
        found = builder.open_records(tmp_path / "set")
        [found[index] for index in range(5)]


def test_missing_pieces_are_named(tmp_path):
    out = tmp_path / "set"
    builder.prepare(DataConfig(), given(record()), out)
    (shard,) = out.rglob("*array_record*")
    shard.rename(tmp_path / "away")
    with pytest.raises(DataError, match=f"{shard.name}: the shard is missing"):
        builder.open_records(out)
    (tmp_path / "away").rename(shard)
    next(out.rglob("dataset_info.json")).write_text("{")
    with pytest.raises(DataError, match="description of the set is damaged"):
        builder.open_records(out)
    (out / MARKER).write_text("{}")
    with pytest.raises(DataError, match="import.json: damaged"):
        builder.open_records(out)
