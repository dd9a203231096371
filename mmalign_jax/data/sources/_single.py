"""What the RLHF-V and RLAIF-V tables share: one image, one question, a chosen and a rejected answer."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mmalign_jax.data.bad_rows import BadRow, Place
from mmalign_jax.data.sources.prompt import OpenTurn, close, split_tags
from mmalign_jax.data.sources.source import MediaReader, rows_of_parquet
from mmalign_jax.types import Preference, PreferenceRecord, Response

# idx is an int in one release and a str in another
META = ("idx", "ds_name", "origin_dataset", "origin_split", "image_path")


def record_id(file: Path, root: Path, number: int) -> str:
    """The id of row `number` of a file: its path under the set's root, so that it is unique in the set and the same on every machine."""
    return f"{file.relative_to(root).as_posix()}:{number}"


def numbered_rows(
    files: list[Path], root: Path, columns: tuple[str, ...], required: tuple[str, ...]
) -> Iterator[tuple[Place, str, dict]]:
    """Yields (place, record id, row) over all files. `root`: see `source.root_of`."""
    for file in files:
        for number, row in rows_of_parquet(file, columns, required):
            label = f"{number} (idx {row['idx']})" if row.get("idx") is not None else str(number)
            yield Place(str(file), label), record_id(file, root, number), row


def answer(value: object, name: str, place: Place) -> str:
    """The text of an answer.

    Raises:
      BadRow: it is missing, not a text, or blank.
    """
    if not isinstance(value, str) or not value.strip():
        raise place.bad("no_answer", f"the row has no {name} answer", "Give the row both answers or remove the row.")
    return value


def pair(name: str, row: Mapping, texts: Mapping, media: MediaReader, place: Place) -> PreferenceRecord:
    """The record `name` of one row; `texts` holds question, chosen and rejected.

    Raises:
      BadRow: the image, the question or an answer is unusable, or placeholders and images differ.
    """
    question = texts.get("question")
    if not isinstance(question, str) or not question.strip():
        raise place.bad("malformed_row", "the row has no question", "Give the row a question or remove the row.")
    responses = tuple(Response(answer(texts.get(name), name, place), source=name) for name in ("chosen", "rejected"))
    image = row.get("image")
    empty = image is None or (isinstance(image, dict) and not image.get("bytes") and not image.get("path"))
    medium = media.read(row.get("image_path") if empty else image, place)
    return PreferenceRecord(
        id=name,
        media=(medium,),
        turns=close([OpenTurn("user", split_tags(question))], {"image": 1}, media_first=True, place=place),
        responses=responses,
        prefs=(Preference(0, 1),),
        meta={"file": place.file, "row": place.row} | {key: str(row[key]) for key in META if row.get(key) is not None},
    )


def each(rows: Iterator[tuple[Place, str, dict]], make) -> Iterator[PreferenceRecord | BadRow]:
    """Applies `make(place, id, row)`; a row that it refuses is yielded as the error, so that the caller can count it and go on."""
    for place, name, row in rows:
        try:
            yield make(place, name, row)
        except BadRow as error:
            yield error
