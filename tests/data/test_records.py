"""A record comes back from its JSON exactly, and nothing but a record is accepted."""

import dataclasses
import json

import pytest
from helpers.rows import record

from mmalign_jax.data.records import from_example, to_example
from mmalign_jax.errors import DataError
from mmalign_jax.types import Group, Label, Media, Preference, Response

FULL = record(
    images=2,
    responses=(Response("ein Stück", "model", 0.5, "good"), Response("no", score=None)),
    prefs=(Preference(1, 0, 1.0, 0.25),),
    prefix="",
    complete=False,
    meta={"file": "a", "draws": [1, 2, {"mask": "\x00"}]},
    labels=(Label(1, False), Label(0, True, 0.5)),
    groups=(Group((1, 0), 2.0),),
)


def back(example):
    return from_example(example, file="shard-0", row="3")


def test_round_trip():
    assert back(to_example(FULL)) == FULL
    raw = to_example(FULL)
    assert back({"record": raw["record"].encode(), "media": raw["media"]}) == FULL


def test_bytes_that_end_with_zeros_stay():
    odd = dataclasses.replace(FULL, media=(Media("image", b"\x00ab\x00\x00"), Media("image", b"\xff")))
    assert back(to_example(odd)) == odd


def test_every_damage_is_an_error():
    plain = json.loads(to_example(FULL)["record"])
    cases = [
        ("schema", True), ("complete", 1),
        ("schema", 1), ("schema", 2), ("id", 5), ("media", plain["media"][:1]), ("turns", [{"role": "user"}]), ("responses", [{"text": "a"}]),
        ("turns", [{"role": "user", "parts": [{"text": "a", "media": 0}]}]), ("turns", [{"role": "user", "parts": [{"media": True}]}]),
        ("prefs", [{"win": 0.0, "lose": 1, "weight": 1.0, "margin": 0.0}]), ("meta", []), ("extra", 1),
        ("labels", [{"answer": 0, "desirable": 1, "weight": 1.0}]), ("labels", [{"answer": True, "desirable": True, "weight": 1.0}]),
        ("groups", [{"answers": [0, 1.0], "weight": 1.0}]), ("groups", [{"answers": [0, 1]}]), ("groups", None),
    ]  # fmt: skip
    for key, value in cases:
        with pytest.raises(DataError, match="shard-0, row 3: not a preference record"):
            back({"record": json.dumps(plain | {key: value}), "media": [b"a", b"b"]})
    for text in ("", "[]", b"\xff\xfe"):
        with pytest.raises(DataError):
            back({"record": text, "media": []})
    with pytest.raises(DataError):
        back({"media": []})


VIDEO = dataclasses.replace(
    FULL,
    media=(
        Media("image", b"a\0"),
        Media("video", origin="f/0.png", frames=(b"b", b"\0", b"d"), times=(0.1, 0.30000000000000004, 7)),
        Media("image", b"e"),
    ),
)


def test_round_trip_of_a_video():
    example = to_example(VIDEO)
    assert example["media"] == [b"a\0", b"b", b"\0", b"d", b"e"]
    found = back(example)
    assert found == VIDEO and found.media[1].pictures == VIDEO.media[1].frames and found.media[0].pictures == (b"a\0",)


def test_every_damage_of_a_video_is_an_error():
    example = to_example(VIDEO)
    plain = json.loads(example["record"])
    changes = [
        {"times": [0, 1]}, {"times": [0, 1, 2, 3]}, {"times": []}, {"times": [0, 1, 1]}, {"times": [0, 2, 1]}, {"times": [0, 1, "2"]},
        {"times": [0, True, 2]}, {"times": [0, 1, float("inf")]}, {"times": [0, 1, 10**400]}, {"times": 3}, {"kind": "image"}, {"kind": "film"},
    ]  # fmt: skip
    for change in changes:
        media = [plain["media"][0], plain["media"][1] | change, plain["media"][2]]
        with pytest.raises(DataError, match="not a preference record"):
            back(example | {"record": json.dumps(plain | {"media": media})})
    for pictures in (example["media"][:-1], [*example["media"], b"f"]):
        with pytest.raises(DataError, match="not a preference record"):
            back(example | {"media": pictures})


@pytest.mark.parametrize(
    "fields,problem",
    [
        ({"kind": "audio", "data": b"a"}, "unknown kind of media 'audio'"),
        ({"kind": "image", "data": b"a", "frames": (b"a",)}, "no frames and no times"),
        ({"kind": "image", "data": b"a", "times": (0.0,)}, "no frames and no times"),
        ({"kind": "video", "data": b"a", "frames": (b"a",), "times": (0.0,)}, "no data"),
        ({"kind": "video"}, "at least one"),
        ({"kind": "video", "frames": (b"a", b"b"), "times": (0.0,)}, "2 frames has 1 times"),
        ({"kind": "video", "frames": (b"a", b"b"), "times": (0.0, float("nan"))}, "finite"),
        ({"kind": "video", "frames": (b"a", b"b"), "times": (0.0, float("inf"))}, "finite"),
        ({"kind": "video", "frames": (b"a", b"b"), "times": (1.0, 1.0)}, "increase strictly"),
        ({"kind": "video", "frames": (b"a", b"b"), "times": (1.0, 0.5)}, "increase strictly"),
    ],
)
def test_media_that_cannot_be(fields, problem):
    with pytest.raises(ValueError, match=problem):
        Media(**fields)


def test_what_json_does_not_have_is_refused():
    with pytest.raises(ValueError):
        to_example(dataclasses.replace(FULL, meta={"score": float("nan")}))
