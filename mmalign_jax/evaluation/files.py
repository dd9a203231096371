"""Benchmarks from files: POPE's published json lines, and CHAIR over any images whose objects are known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign_jax.data.bad_rows import Place
from mmalign_jax.data.images import MAX_BYTES
from mmalign_jax.data.sources.source import MediaReader
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.evaluation import pope
from mmalign_jax.evaluation.benchmark import Benchmark, question_records
from mmalign_jax.mentions import Mentions, read_synonyms
from mmalign_jax.types import Media, Part, PreferenceRecord, Turn

_CHAIR_ROW = '{"id": "1", "image": "a.jpg", "objects": ["cat", "sofa"]}'


def pope_benchmark(data: Path, images: Path, *, suffix: str = "") -> Benchmark:
    """POPE's questions from a file, or from the files of a directory, one a split.

    Args:
      data: as `pope.load` reads it; of a directory, every `.json` and `.jsonl` file that lies in it.
      images: the directory under which the files' image names lie.
      suffix: text behind every question, such as " Answer the question using a single word or phrase." of LLaVA's evaluation.

    Raises:
      UserError: no file, or two of the same split.
      DataError: a line is no question, or its image is missing, too large or outside `images`.
    """
    files = sorted(file for file in data.iterdir() if file.suffix in (".json", ".jsonl")) if data.is_dir() else [data]
    if not files:
        raise UserError(f"{data}: no .json or .jsonl file in the directory")
    loaded = [pope.load(file, suffix=suffix) for file in files]
    if len({questions[0].split for questions in loaded}) < len(files):
        raise UserError(f"{data}: two files of the same split; leave one of them")
    origin = {question.image_id: file for file, questions in zip(files, loaded, strict=True) for question in questions}
    pictures = {
        name: _record(name, _image(name, images, Place(str(file), name)), "", Place(str(file), name)) for name, file in origin.items()
    }
    questions = tuple(question for part in loaded for question in part)
    asked, record_of = question_records(questions, pictures.__getitem__)
    return Benchmark("pope", f"POPE, {data.name}", questions=questions, question_records=asked, record_of=record_of)


def chair_benchmark(data: Path, images: Path, synonyms: Path, *, prompt: str) -> Benchmark:
    """Captions of images whose objects are known.

    Args:
      data: json lines `{"id", "image", "objects"}`; objects are named by any term of the table.
      images: the directory under which the image names lie.
      synonyms: a JSON object, kind -> list of terms.
      prompt: what the model is asked.

    Raises:
      UserError: a file is missing, or the table is not such an object or has a term twice.
      DataError: a line is not such a row, names an object that the table does not have, or its image is unusable.
    """
    table = read_synonyms(synonyms)
    mentions = Mentions(table)
    records: list[PreferenceRecord] = []
    truths: list[tuple[str, ...]] = []
    for place, row in _rows(data):
        try:
            truths.append(tuple(mentions.kind(name) for name in row["objects"]))
        except UserError as error:
            raise DataError(str(error), file=place.file, row=place.row, mend=f"Edit {synonyms} or the row.") from error
        records.append(_record(row["id"], _image(row["image"], images, place), prompt, place))
    if not records:
        raise DataError("there is no row in it", file=str(data), mend=f"Write lines such as {_CHAIR_ROW}.")
    if len({record.id for record in records}) < len(records):
        raise DataError("two rows have the same id", file=str(data), mend="Give every row its own.")
    return Benchmark("chair", f"CHAIR, {data.name}", captions=tuple(records), truths=tuple(truths), synonyms=table)


def _record(name: str, image: Media, prompt: str, place: Place) -> PreferenceRecord:
    turn = Turn("user", (Part(media=0), Part(text=prompt)))
    return PreferenceRecord(name, (image,), (turn,), (), meta={"file": place.file, "row": place.row})


def _image(name: str, root: Path, place: Place) -> Media:
    return MediaReader(root, MAX_BYTES, {}).read(name, place)


def _rows(file: Path):
    """Yields (place, checked row)."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; give json lines such as {_CHAIR_ROW}")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = Place(str(file), str(number))
            if line.strip():
                yield place, _chair_row(line, place)


def _chair_row(line: bytes, place: Place) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # of JSON, or of UTF-8
        raise place.bad("malformed_row", f"the line is not JSON ({error})", "Write one JSON object a line.") from error
    fields = [row.get(name) for name in ("id", "image")] if isinstance(row, dict) else [None]
    objects = row.get("objects") if isinstance(row, dict) else None
    if not all(isinstance(value, str) and value for value in fields) or not _are_texts(objects):
        raise place.bad("malformed_row", "the line is not a row of CHAIR", f"Write {_CHAIR_ROW}.")
    return row


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
