"""TRL's conversational preference rows with images or videos, as parquet or jsonl.

Rules (as in TRL, so that a set trains on the same prompts here and there):
* a turn whose content is a plain string: when no turn names an image or video, all go in front of the first user turn, images first;
* typed content: as many image parts as images, as many video parts as videos;
* `<image>` or `<video>` inside a text counts as such a part;
* no column `prompt`: the prompt is the longest common start of chosen and rejected;
* `score_chosen` and `score_rejected` are the answers' scores; `margin`, or else their difference, is the pair's margin.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from mmalign_jax.config import DataConfig
from mmalign_jax.data.bad_rows import BadRow, Place
from mmalign_jax.data.sources import _single
from mmalign_jax.data.sources.prompt import OpenTurn, Slot, close, split_tags
from mmalign_jax.data.sources.source import MediaReader, Source, find_files, fingerprint, root_of
from mmalign_jax.data.sources.video import read_videos
from mmalign_jax.data.validate import ROLES, TAGS
from mmalign_jax.errors import DataError
from mmalign_jax.types import Preference, PreferenceRecord, Response

COLUMNS = ("prompt", "chosen", "rejected", "images", "image", "videos", "video", "fps", "id", "idx", "margin", "score_chosen", "score_rejected")
REQUIRED = ("chosen", "rejected")
_SHAPE = "Write messages as [{role, content}], content a string or a list of text, image and video parts."


def read(path: str, config: DataConfig) -> Source:
    """The rows at `path` (a parquet or jsonl file, a pattern or a directory). Paths of pictures are relative to each file's directory."""
    files, root = find_files(path, (".parquet", ".jsonl")), root_of(path)
    side_files: dict[str, tuple[int, int]] = {}

    def make(place, record_id, row):
        reader = MediaReader(Path(place.file).parent, config.max_image_bytes, side_files)
        return _record(record_id, row, reader, config.max_frames, place)

    def rows():
        for file in files:
            if file.suffix == ".jsonl":
                yield from _jsonl(file, root, make)
            else:
                yield from _single.each(_single.numbered_rows([file], root, COLUMNS, REQUIRED), make)

    return Source(path, fingerprint("trl 3", files), rows, side_files)


def _jsonl(file: Path, root: Path, make) -> Iterator[PreferenceRecord | BadRow]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines):
                if not line.strip():
                    continue
                place = Place(str(file), str(number))
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                except ValueError as error:
                    yield place.bad("malformed_row", f"the line is not JSON ({error})", "Write one JSON object a line.")
                else:
                    yield from _single.each(iter([(place, _single.record_id(file, root, number), row)]), make)
    except OSError as error:
        raise DataError(f"the file cannot be read ({error})", file=str(file), mend="Check its permissions.") from error


def _record(record_id: str, row: dict, media: MediaReader, max_frames: int, place: Place) -> PreferenceRecord:
    chosen, rejected = (_messages(row.get(name), name, "assistant", place) for name in REQUIRED)
    if row.get("prompt") is not None:
        prompt = _messages(row["prompt"], "prompt", "user", place)
    else:
        prompt = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))]
        if prompt and len(prompt) == len(chosen) == len(rejected):
            raise place.bad("equal_answers", "chosen and rejected are the same conversation", "Remove the row.")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    scores = [_number(row, f"score_{name}", place) for name in REQUIRED]
    answers = zip(REQUIRED, (chosen, rejected), scores, strict=True)
    responses = tuple(Response(_answer(turns, name, place), source=name, score=score) for name, turns, score in answers)
    if (margin := _number(row, "margin", place)) is None:
        margin = 0.0 if None in scores else scores[0] - scores[1]
    images = tuple(media.read(cell, place) for cell in _cells(row, "image", place))
    videos = read_videos(_cells(row, "video", place), row.get("fps"), media, max_frames, place)
    counts = {"image": len(images), "video": len(videos)}
    return PreferenceRecord(
        id=record_id,
        media=images + videos,
        turns=close(prompt, counts, media_first=not any(turn.typed for turn in prompt), place=place),
        responses=responses,
        prefs=(Preference(0, 1, margin=margin),),
        meta={"file": place.file, "row": place.row} | {key: str(row[key]) for key in ("id", "idx") if row.get(key) is not None} | _target(row, place),
    )


def _number(row: dict, name: str, place: Place) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError("no number")
        return float(value)
    except (TypeError, ValueError) as error:
        raise place.bad("malformed_row", f"{name} is {value!r}, no number", "Write a number, or leave the column out.") from error


def _target(row: dict, place: Place) -> dict[str, int]:
    """Which of the prompt's pictures it asks about, where the row says so."""
    if (number := _number(row, "target_image", place)) is None:
        return {}
    if not (number >= 0 and number.is_integer()):
        mend = "Give the number of the picture in the prompt, counted from 0."
        raise place.bad("malformed_row", f"target_image is {row['target_image']!r}, no number of a picture", mend)
    return {"target_image": int(number)}


def _cells(row: dict, kind: str, place: Place) -> list:
    several = kind + "s"
    if row.get(several) is None:
        return [] if row.get(kind) is None else [row[kind]]
    if not isinstance(row[several], list):
        raise place.bad("malformed_row", f"{several} is not a list", f"Give a list of {several}, or one {kind} as {kind}.")
    return row[several]


def _messages(value: object, name: str, role: str, place: Place) -> list[OpenTurn]:
    if value is None or value == [] or value == "":
        if name == "prompt":
            raise place.bad("malformed_row", "the prompt is empty", _SHAPE)
        raise place.bad("no_answer", f"the row has no {name} answer", "Give the row both answers or remove the row.")
    if isinstance(value, str):
        return [OpenTurn(role, split_tags(value))]
    if not isinstance(value, list):
        raise place.bad("malformed_row", f"{name} is not a list of messages", _SHAPE)
    return [_turn(message, name, place) for message in value]


def _turn(message: object, name: str, place: Place) -> OpenTurn:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ROLES:
        raise place.bad("malformed_row", f"{name} holds a message with role {role!r}", f"Use one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        return OpenTurn(role, split_tags(content))
    if not isinstance(content, list):
        raise place.bad("malformed_row", f"{name} holds a message without content", _SHAPE)
    parts: list[str | Slot] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.extend(split_tags(part["text"]))
        elif kind in TAGS and not any(value for key, value in part.items() if key not in ("type", "text")):
            parts.append(Slot(kind))
        elif kind in TAGS:
            mend = f'Move it to {kind}s and leave {{"type": "{kind}"}}.'
            raise place.bad("malformed_row", f"a part of type {kind} in {name} holds the {kind} itself", mend)
        else:
            raise place.bad("malformed_row", f"{name} holds a part of type {kind!r}", _SHAPE)
    return OpenTurn(role, tuple(parts), typed=True)


def _answer(turns: list[OpenTurn], name: str, place: Place) -> str:
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = ", ".join(turn.role for turn in turns) or "nothing"
        raise place.bad("malformed_row", f"behind the prompt, {name} holds {roles}", "It must hold one assistant message.")
    if any(isinstance(part, Slot) for part in turns[0].parts):
        raise place.bad("placeholder_mismatch", f"the {name} answer holds an image or a video", "Only prompts can show them; remove it.")
    return _single.answer("".join(turns[0].parts), name, place)
