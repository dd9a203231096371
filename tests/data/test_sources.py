"""The published layouts become records; a row that breaks a rule becomes an error in its place, and the rows around it stay."""

import collections
import json
import os

import pytest
from helpers.rows import encoded, photo_bytes, rlaif_row, write_parquet

from mmalign_jax.config import DataConfig
from mmalign_jax.data import sources
from mmalign_jax.data.bad_rows import BadRow
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.types import Part, PreferenceRecord


def rows(path, **settings):
    return list(sources.read(DataConfig(path=str(path), **settings)).rows())


def reasons(path, **settings):
    return [row.reason if isinstance(row, BadRow) else "good" for row in rows(path, **settings)]


def jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rlaif_v(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [rlaif_row(n, image={"bytes": photo_bytes(), "path": "x.jpg"}) for n in range(70)])
    assert sources.detect(path) == "rlaif_v"
    found = rows(path)
    assert len(found) == 70 and len({row.id for row in found}) == 70
    row = found[69]
    assert row.turns[0].parts == (Part(media=0), Part(text="What is in picture 69?"))
    assert [response.text for response in row.responses] == ["A desk with lamp 69.", "A cat."]
    assert (row.prefs[0].win, row.prefs[0].lose) == (0, 1)
    assert row.media[0].data == photo_bytes() and row.media[0].origin == "x.jpg"
    assert row.meta["idx"] == "69" and row.meta["row"] == "69 (idx 69)" and row.meta["file"] == path


def rlhf_row(number, **texts):
    text = {"question": "Q?", "chosen": "yes", "rejected": "no"} | texts
    return {"ds_name": "d", "image": {"bytes": encoded(), "path": None}, "text": json.dumps(text), "idx": number, "image_path": "x.jpg"}


def test_rlhf_v(tmp_path):
    table = [rlhf_row(0), rlhf_row(1, chosen=""), rlhf_row(2) | {"text": "question: Q"}, rlhf_row(3, question="<image>\nWhere?")]
    path = write_parquet(tmp_path / "a.parquet", table)
    assert sources.detect(path) == "rlhf_v"
    assert reasons(path) == ["good", "no_answer", "malformed_row", "good"]
    first, last = rows(path)[0], rows(path)[3]
    assert [response.text for response in first.responses] == ["yes", "no"] and first.meta["idx"] == "0"
    assert last.turns[0].parts == (Part(media=0), Part(text="Where?"))


def test_bad_rows_of_a_table(tmp_path):
    table = [
        rlaif_row(0),
        rlaif_row(1, chosen=None),
        rlaif_row(2, rejected="  "),
        rlaif_row(3, question=""),
        rlaif_row(4, question="<image> and <image>"),
        rlaif_row(5, image={"bytes": None, "path": None}, image_path=None),
        rlaif_row(6, image={"bytes": None, "path": "gone.jpg"}),
        rlaif_row(7, image=None),  # image_path names a file that is not there
    ]
    path = write_parquet(tmp_path / "a.parquet", table)
    expected = ["good", "no_answer", "no_answer", "malformed_row", "placeholder_mismatch"] + ["missing_image"] * 3
    assert reasons(path) == expected
    for number, row in enumerate(rows(path)[1:], 1):
        assert str(row).startswith(f"{path}, row {number} (idx {number}): ") and row.mend


def test_images_by_path_stay_under_the_root(tmp_path):
    (tmp_path / "set" / "pictures").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(encoded())
    (tmp_path / "set" / "pictures" / "a.jpg").write_bytes(encoded())
    os.symlink(tmp_path / "secret.jpg", tmp_path / "set" / "link.jpg")
    outside = ["../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "pictures", "x" * 5000, "a\0b"]
    names = ["pictures/a.jpg", *outside, "pictures/../pictures/a.jpg"]
    table = [rlaif_row(number, image={"bytes": None, "path": name}) for number, name in enumerate(names)]
    path = write_parquet(tmp_path / "set" / "a.parquet", table)
    assert reasons(path) == ["good"] + ["missing_image"] * 6 + ["good"]
    assert rows(path)[0].media[0].data == encoded()
    assert reasons(path, max_image_bytes=10)[0] == "image_too_large"


def test_several_files_in_sorted_order(tmp_path):
    for name in ("train-1", "train-0"):
        write_parquet(tmp_path / f"{name}.parquet", [rlaif_row(0), rlaif_row(1)])
    assert [row.id for row in rows(tmp_path)] == ["train-0.parquet:0", "train-0.parquet:1", "train-1.parquet:0", "train-1.parquet:1"]
    write_parquet(tmp_path / "test-0.parquet", [rlaif_row(0)])
    with pytest.raises(UserError, match="splits test, train"):
        rows(tmp_path)
    (tmp_path / "test-0.parquet").unlink()
    (tmp_path / "cache").mkdir()  # a set that was prepared inside the source's directory is not read again
    (tmp_path / "cache" / "import.json").write_text("{}")
    (tmp_path / "cache" / "skipped.jsonl").write_text("{}\n")
    assert len(rows(tmp_path)) == 4
    assert len(rows(tmp_path / "train-*.parquet", format="rlaif_v")) == 4


def test_ids_tell_files_of_the_same_name_apart(tmp_path):
    trl = {"prompt": [user("Q?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    tables = {"rlaif_v": rlaif_row(0), "rlhf_v": rlhf_row(0), "trl": trl}

    def ids(root, name, pattern=""):
        return [row.id for row in rows(root / name / pattern, format=name)]

    for root in (tmp_path / "here", tmp_path / "there" / "deeper"):
        for name, row in tables.items():
            for folder in ("x", "y/z"):
                (root / name / folder).mkdir(parents=True)
                write_parquet(root / name / folder / "data.parquet", [row])
        jsonl(root / "trl" / "x" / "data.jsonl", [trl])
    for name in tables:
        both = ["x/data.parquet:0", "y/z/data.parquet:0"]
        expected = ["x/data.jsonl:0", *both] if name == "trl" else both
        assert ids(tmp_path / "here", name) == expected
        assert ids(tmp_path / "there" / "deeper", name) == expected
        assert ids(tmp_path / "here", name, "**/*.parquet") == both
        assert ids(tmp_path / "here", name, "*/data.parquet") == both[:1]
        assert ids(tmp_path / "here", name, "y/z/data.parquet") == ["data.parquet:0"]


def test_ids_of_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    write_parquet(tmp_path / "x" / "data.parquet", [rlaif_row(0)])
    monkeypatch.chdir(tmp_path)
    assert [row.id for path in (".", "*/data.parquet", "./x/*.parquet", "x") for row in rows(path)] == [
        "x/data.parquet:0", "x/data.parquet:0", "data.parquet:0", "data.parquet:0",
    ]  # fmt: skip


def text(value):
    return {"type": "text", "text": value}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_trl_typed_parquet(tmp_path):
    prompt = [user([{"type": "image", "text": None}, text("Left of"), {"type": "image", "text": None}, text("?")])]
    row = {"prompt": prompt, "chosen": [assistant([text("yes")])], "rejected": [assistant([text("no")])]}
    both = [{"bytes": encoded((n, 0, 0)), "path": None} for n in (1, 2)]
    path = write_parquet(tmp_path / "a.parquet", [row | {"images": both}, row | {"images": both[:1]}])
    assert sources.detect(path) == "trl"
    good, bad = rows(path)
    assert good.turns[0].parts == (Part(media=0), Part(text="Left of"), Part(media=1), Part(text="?"))
    assert [medium.data for medium in good.media] == [encoded((1, 0, 0)), encoded((2, 0, 0))]
    assert bad.reason == "placeholder_mismatch" and "2 image placeholders for 1 images" in str(bad)


def test_trl_jsonl(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(kind="PNG"))
    system = {"role": "system", "content": "Be brief."}
    yes, no = [assistant("yes")], [assistant("no")]
    lines = [
        {"prompt": [system, user("Q?")], "chosen": yes, "rejected": no, "images": ["a.png", "a.png"]},
        {"prompt": [user("Q <image>?")], "chosen": yes, "rejected": no, "image": "a.png"},
        {"chosen": [user("Q?"), *yes], "rejected": [user("Q?"), *no], "images": ["a.png"]},
        {"prompt": [user("Q?")], "chosen": yes, "rejected": no, "images": []},
        {"prompt": [user([text("Q?")])], "chosen": yes, "rejected": no, "images": ["a.png"]},
        {"chosen": [user("Q?"), *yes], "rejected": [user("Other?"), *no]},
        {"chosen": [user("Q?"), *yes], "rejected": [user("Q?"), *yes]},
        {"prompt": [user("Q?")], "chosen": yes, "rejected": None},
        {"prompt": [user("Q?")], "chosen": yes, "rejected": [assistant([{"type": "image"}])]},
        {"prompt": [user([{"type": "video"}])], "chosen": yes, "rejected": no},
        {"prompt": [user([{"type": "audio"}])], "chosen": yes, "rejected": no},
        {"prompt": [{"role": "human", "content": "Q?"}], "chosen": yes, "rejected": no},
    ]
    path = jsonl(tmp_path / "a.jsonl", lines)
    path.write_text(path.read_text() + "{broken\n[1]\n")
    assert sources.detect(str(path)) == "trl"
    assert reasons(path) == ["good"] * 4 + [
        "placeholder_mismatch", "malformed_row", "equal_answers", "no_answer", "placeholder_mismatch",
        "placeholder_mismatch", "malformed_row", "malformed_row", "malformed_row", "malformed_row",
    ]  # fmt: skip
    first, second, third, fourth = rows(path)[:4]
    assert [turn.role for turn in first.turns] == ["system", "user"]
    assert first.turns[1].parts == (Part(media=0), Part(media=1), Part(text="Q?"))
    assert second.turns[0].parts == (Part(text="Q "), Part(media=0), Part(text="?"))
    assert third.turns[0].parts == (Part(media=0), Part(text="Q?")) and third.responses[1].text == "no"
    assert fourth.media == () and fourth.turns[0].parts == (Part(text="Q?"),)


def test_trl_scores_and_margins(tmp_path):
    row = {"prompt": [user("Q?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    scores = {"score_chosen": 3, "score_rejected": 0.5}
    given = [{}, scores, scores | {"margin": "7"}, {"margin": 0.25, "score_chosen": 1}, {"margin": "big"}, {"score_chosen": True}]
    *good, word, truth = rows(jsonl(tmp_path / "a.jsonl", [row | more for more in given]))
    assert [one.prefs[0].margin for one in good] == [0.0, 2.5, 7.0, 0.25]
    assert [[answer.score for answer in one.responses] for one in good] == [[None, None], [3.0, 0.5], [3.0, 0.5], [1.0, None]]
    assert "margin is 'big', no number" in str(word) and "score_chosen is True, no number" in str(truth)


def test_trl_rows_that_name_their_picture(tmp_path):
    row = {"prompt": [user("Q?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    first, second, *bad = rows(jsonl(tmp_path / "a.jsonl", [row | {"target_image": number} for number in (None, 1, -1, 0.5, "two", "inf")]))
    assert "target_image" not in first.meta and second.meta["target_image"] == 1
    assert all("target_image is" in str(one) for one in bad) and len(bad) == 4


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="config.data.path"):
        sources.read(DataConfig())
    with pytest.raises(UserError, match="no .parquet or .jsonl file at"):
        sources.detect(str(tmp_path / "gone"))
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(DataError, match="a.parquet: the parquet file cannot be read"):
        sources.detect(str(broken))
    with pytest.raises(DataError, match="a.parquet: the parquet file cannot be read"):
        rows(broken, format="rlaif_v")
    other = write_parquet(tmp_path / "b.parquet", [{"a": 1, "b": 2}])
    with pytest.raises(UserError, match="columns a, b"):
        sources.detect(other)
    with pytest.raises(DataError, match="no column question, chosen, rejected, image; there are a, b"):
        rows(other, format="rlaif_v")


def test_a_fingerprint_sees_a_changed_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [rlaif_row(0)])
    before = sources.read(DataConfig(path=path)).fingerprint
    assert sources.read(DataConfig(path=path)).fingerprint == before
    os.utime(path, ns=(1, 1))
    assert sources.read(DataConfig(path=path)).fingerprint != before


def test_reading_takes_a_batch_at_a_time(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [rlaif_row(n) for n in range(200)])
    stream = sources.read(DataConfig(path=path)).rows()
    assert isinstance(next(stream), PreferenceRecord)
    assert collections.Counter(type(row) for row in stream) == {PreferenceRecord: 199}
