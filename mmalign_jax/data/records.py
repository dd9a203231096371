"""PreferenceRecord <-> the example that is on disk: JSON for everything but the bytes of media, read back strictly."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mmalign_jax.errors import DataError
from mmalign_jax.types import Group, Label, Media, Part, Preference, PreferenceRecord, Response, Turn

SCHEMA = 3  # raised whenever the JSON below changes; older sets are imported again

_STR, _INT, _FLOAT, _SCORE = (str,), (int,), (float, int), (float, int, type(None))
_TOP = {
    "schema": _INT, "id": _STR, "media": (list,), "turns": (list,), "responses": (list,), "prefs": (list,), "prefix": _STR,
    "complete": (bool,), "meta": (dict,), "labels": (list,), "groups": (list,),
}  # fmt: skip
_MEDIA = {"kind": _STR, "origin": _STR, "times": (list,)}
_TURN = {"role": _STR, "parts": (list,)}
_RESPONSE = {"text": _STR, "source": _STR, "score": _SCORE, "critique": _STR}
_PREF = {"win": _INT, "lose": _INT, "weight": _FLOAT, "margin": _FLOAT}
_LABEL = {"answer": _INT, "desirable": (bool,), "weight": _FLOAT}
_GROUP = {"answers": (list,), "weight": _FLOAT}


def to_example(record: PreferenceRecord) -> dict[str, Any]:
    """`{"record": JSON text, "media": list of bytes}`. The bytes are those of all pictures in order: one an image, one a frame of a video.

    Raises:
      ValueError, TypeError: `record.meta` holds something that JSON does not have (a NaN, an object).
    """
    plain = {
        "schema": SCHEMA,
        "id": record.id,
        "media": [{"kind": m.kind, "origin": m.origin, "times": list(map(float, m.times))} for m in record.media],
        "turns": [{"role": turn.role, "parts": [_part(part) for part in turn.parts]} for turn in record.turns],
        "responses": [dataclasses.asdict(response) for response in record.responses],
        **{field: [dataclasses.asdict(one) for one in getattr(record, field)] for field in ("prefs", "labels", "groups")},
        "prefix": record.prefix,
        "complete": record.complete,
        "meta": dict(record.meta),
    }
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return {"record": text, "media": [picture for medium in record.media for picture in medium.pictures]}


def from_example(example: Mapping[str, Any], *, file: str, row: str) -> PreferenceRecord:
    """The inverse of `to_example`. `record` may be text or UTF-8 bytes.

    Raises:
      DataError: another schema version, a missing or unknown key, or a value of the wrong type.
    """
    try:
        plain = json.loads(example["record"])
        _check(plain, _TOP, "record")
        if plain["schema"] != SCHEMA:
            raise ValueError(f"schema version {plain['schema']}, this release reads {SCHEMA}")
        return PreferenceRecord(
            id=plain["id"],
            media=_media(plain["media"], list(example["media"])),
            turns=tuple(_turn(turn) for turn in plain["turns"]),
            responses=tuple(Response(**_check(response, _RESPONSE, "response")) for response in plain["responses"]),
            prefs=tuple(Preference(**_check(pref, _PREF, "pref")) for pref in plain["prefs"]),
            prefix=plain["prefix"],
            complete=plain["complete"],
            meta=plain["meta"],
            labels=tuple(Label(**_check(label, _LABEL, "label")) for label in plain["labels"]),
            groups=tuple(_group(group) for group in plain["groups"]),
        )
    except (ValueError, KeyError, OverflowError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise DataError(f"not a preference record ({error})", file=file, row=row, mend="Import the data set again.") from error


def _media(plain: list, data: list[bytes]) -> tuple[Media, ...]:
    """Gives every description its pictures, in order."""
    out, used = [], 0
    for medium in plain:
        _check(medium, _MEDIA, "media")
        image, times = medium["kind"] == "image", [_check({"time": time}, {"time": _FLOAT}, "times")["time"] for time in medium["times"]]
        found = tuple(map(bytes, data[used : used + (1 if image else len(times))]))
        used += len(found)
        if image and not found:
            raise ValueError("an image without bytes")
        content = {"data": found[0]} if image else {"frames": found}
        out.append(Media(medium["kind"], origin=medium["origin"], times=tuple(map(float, times)), **content))
    if used != len(data):
        raise ValueError(f"{len(data)} pictures, the media have {used}")
    return tuple(out)


def _part(part: Part) -> dict[str, Any]:
    return {"text": part.text} if part.media is None else {"media": part.media}


def _turn(plain: Any) -> Turn:
    _check(plain, _TURN, "turn")
    parts = []
    for part in plain["parts"]:
        if not isinstance(part, dict) or len(part) != 1:
            raise ValueError(f"a part has one key, text or media; got {part!r}")
        _check(part, {"text": _STR} if "text" in part else {"media": _INT}, "part")
        parts.append(Part(**part))
    return Turn(plain["role"], tuple(parts))


def _group(plain: Any) -> Group:
    _check(plain, _GROUP, "group")
    return Group(tuple(_check({"answer": answer}, {"answer": _INT}, "group")["answer"] for answer in plain["answers"]), plain["weight"])


def _check(value: Any, spec: Mapping[str, tuple], name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(spec):
        raise ValueError(f"{name}: expected the keys {sorted(spec)}")
    for key, kinds in spec.items():
        if not isinstance(value[key], kinds) or (isinstance(value[key], bool) and bool not in kinds):
            raise ValueError(f"{name}.{key}: got {value[key]!r}")
    return value
