"""A record comes back from its JSON exactly, and nothing but a record is accepted."""

import dataclasses
import json

import pytest
from helpers.rows import record

from mmalign_jax.data.records import from_example, to_example
from mmalign_jax.errors import DataError
from mmalign_jax.types import Media, Preference, Response

FULL = record(
    images=2,
    responses=(Response("ein Stück", "model", 0.5, "good"), Response("no", score=None)),
    prefs=(Preference(1, 0, 1.0, 0.25),),
    prefix="",
    complete=False,
    meta={"file": "a", "draws": [1, 2, {"mask": "\x00"}]},
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
        ("schema", 2), ("id", 5), ("media", plain["media"][:1]), ("turns", [{"role": "user"}]), ("responses", [{"text": "a"}]),
        ("turns", [{"role": "user", "parts": [{"text": "a", "media": 0}]}]), ("turns", [{"role": "user", "parts": [{"media": True}]}]),
        ("prefs", [{"win": 0.0, "lose": 1, "weight": 1.0, "margin": 0.0}]), ("meta", []), ("extra", 1),
    ]  # fmt: skip
    for key, value in cases:
        with pytest.raises(DataError, match="shard-0, row 3: not a preference record"):
            back({"record": json.dumps(plain | {key: value}), "media": [b"a", b"b"]})
    for text in ("", "[]", b"\xff\xfe"):
        with pytest.raises(DataError):
            back({"record": text, "media": []})
    with pytest.raises(DataError):
        back({"media": []})


def test_what_json_does_not_have_is_refused():
    with pytest.raises(ValueError):
        to_example(dataclasses.replace(FULL, meta={"score": float("nan")}))
