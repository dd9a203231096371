"""POPE: yes/no questions about objects (Li et al. 2023, arXiv 2305.10355), with the authors' builder, parser and measures.

An image is asked for objects that it shows and for as many that it does not. The three splits differ in the second: `random` is any
absent object, `popular` the most frequent ones, `adversarial` those that most often come with the object asked for just before.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.evaluation.interval import Values, ratio
from mmalign_jax.types import record_key

SPLITS = ("random", "popular", "adversarial")
MEAN = "mean"

# (said, truth) -> place on the last axis of `confusion`: true yes, false yes, true no, false no
_OUTCOMES = {(True, True): 0, (True, False): 1, (False, False): 2, (False, True): 3}


@dataclasses.dataclass(frozen=True)
class Question:
    """`label` is the truth, yes as True; `object` is "" where a published file does not say it apart from the text."""

    image_id: str
    text: str
    object: str
    label: bool
    split: Literal["random", "popular", "adversarial"]


@dataclasses.dataclass(frozen=True)
class PopeScores:
    """Yes is the positive class; `yes_ratio` is predicted yes / questions. A fraction of nothing is 0: precision without a yes, for one.

    `unparsed` answers say neither yes nor what the parser takes for a no; it reads them as yes.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    questions: int
    unparsed: int


def build_questions(
    truth: Sequence[tuple[str, Sequence[str]]],
    *,
    seed: int,
    vocabulary: Sequence[str],
    question: Callable[[str], str],
    per_image: int = 3,
    statistics: Iterable[Sequence[str]] | None = None,
) -> tuple[Question, ...]:
    """The three splits, one after another; in each, image by image, a question to be answered yes and one to be answered no in turn.

    Differs from the authors' builder in two points: an image with fewer than `per_image` objects is asked for all it has (theirs
    fails), and a draw depends on (seed, image, split) alone, not on the images before it.

    Args:
      truth: image id, and the objects that it shows; it is asked for the first ones.
      seed: of the absent objects that are drawn.
      vocabulary: what can be asked for.
      question: object -> text.
      per_image: questions of each answer, at most.
      statistics: objects of the images over which frequency and co-occurrence are counted; those of `truth` when None. What is
        likely is a property of the data that a model has seen, so images that break its habits need the counts of images that do not.

    Raises:
      UserError: the vocabulary has too few objects that an image does not show.
    """
    shown = [tuple(dict.fromkeys(objects)) for _, objects in truth]
    counted = shown if statistics is None else [tuple(dict.fromkeys(objects)) for objects in statistics]
    frequency = Counter(name for objects in counted for name in objects)
    together: dict[str, Counter] = {}
    for objects in counted:
        for name in objects:
            together.setdefault(name, Counter()).update(other for other in objects if other != name)
    popular = sorted(vocabulary, key=lambda name: -frequency[name])  # stable: equals stay in the vocabulary's order
    likely = {name: [other for other, _ in counter.most_common()] for name, counter in together.items()}

    out: list[Question] = []
    for split in SPLITS:
        for (image_id, _), objects in zip(truth, shown, strict=True):
            asked = objects[:per_image]
            absent = [name for name in vocabulary if name not in objects]
            if len(absent) < len(asked):
                raise UserError(
                    f"POPE: {image_id!r} leaves {len(absent)} absent objects for {len(asked)} questions; use a larger vocabulary"
                )
            rng = np.random.default_rng((seed, record_key(image_id), SPLITS.index(split)))
            drawn = [absent[index] for index in rng.permutation(len(absent))]
            for name in asked:
                ranked = {"random": (), "popular": popular, "adversarial": likely.get(name, ())}[split]
                other = next(candidate for candidate in (*ranked, *drawn) if candidate in absent)
                absent.remove(other)
                out.append(Question(image_id, question(name), name, True, split))
                out.append(Question(image_id, question(other), other, False, split))
    return tuple(out)


def parse(answer: str) -> bool:
    """The authors' reading of an answer, to the letter: in its first sentence, commas dropped, a word No, no or not says no, and
    everything else says yes. So "Nothing", "NO" and "No\\nit is" say yes; `says_neither` tells them apart."""
    return not {"No", "not", "no"} & set(answer.split(".")[0].replace(",", "").split(" "))


def says_neither(answer: str) -> bool:
    """Whether `parse` reads yes out of an answer that does not say it."""
    return parse(answer) and not re.search(r"\byes\b", answer.split(".")[0], re.IGNORECASE)


def splits_of(questions: Sequence[Question]) -> tuple[str, ...]:
    """The splits that have questions, in the usual order."""
    return tuple(split for split in SPLITS if any(question.split == split for question in questions))


def confusion(questions: Sequence[Question], answers: Sequence[str]) -> np.ndarray:
    """True yes, false yes, true no, false no of every image and split, `[images, splits, 4]`."""
    images = {name: i for i, name in enumerate(dict.fromkeys(question.image_id for question in questions))}
    splits = splits_of(questions)
    out = np.zeros((len(images), len(splits), 4), np.int64)
    for question, answer in zip(questions, answers, strict=True):
        out[images[question.image_id], splits.index(question.split), _OUTCOMES[parse(answer), question.label]] += 1
    return out


def measures(counts: np.ndarray) -> dict[str, Values]:
    """Counts `[*b, 4]` -> the five measures, `[*b]` each."""
    true_yes, false_yes, true_no, false_no = np.moveaxis(counts, -1, 0)
    total = true_yes + false_yes + true_no + false_no
    return {
        "accuracy": ratio(true_yes + true_no, total),
        "precision": ratio(true_yes, true_yes + false_yes),
        "recall": ratio(true_yes, true_yes + false_no),
        "f1": ratio(2 * true_yes, 2 * true_yes + false_yes + false_no),
        "yes_ratio": ratio(true_yes + false_yes, total),
    }


def mean_measures(counts: np.ndarray) -> dict[str, Values]:
    """Counts `[*b, splits, 4]` -> the mean of each measure over the splits, `[*b]`."""
    return {name: values.mean(axis=-1) for name, values in measures(counts).items()}


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, PopeScores]:
    """Scores by split, and under "mean" the mean of each measure over the splits with the sums of the counts.

    Raises:
      ValueError: there is no question, or answers and questions differ in number.
    """
    if not questions:
        raise ValueError("POPE needs at least one question")
    total = confusion(questions, answers).sum(axis=0)
    unparsed = count_unparsed(questions, answers)
    out = {split: _scores(measures(row), row, unparsed[split]) for split, row in zip(unparsed, total, strict=True)}
    out[MEAN] = _scores(mean_measures(total), total, sum(unparsed.values()))
    return out


def _scores(values: Mapping[str, Values], counts: np.ndarray, unparsed: int) -> PopeScores:
    return PopeScores(**{name: float(value) for name, value in values.items()}, questions=int(counts.sum()), unparsed=unparsed)


def count_unparsed(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, int]:
    """Answers of every split that say neither yes nor no."""
    out = dict.fromkeys(splits_of(questions), 0)
    for question, answer in zip(questions, answers, strict=True):
        out[question.split] += says_neither(answer)
    return out


def save(questions: Sequence[Question], file: Path) -> None:
    """Writes the published layout, an object a line: question_id (from 1), image, text, label. One file holds one split."""
    if len(splits_of(questions)) > 1:
        raise ValueError("a file holds the questions of one split")
    rows = [
        {"question_id": number, "image": question.image_id, "text": question.text, "label": "yes" if question.label else "no"}
        for number, question in enumerate(questions, 1)
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def load(file: Path, *, suffix: str = "") -> tuple[Question, ...]:
    """Reads the published layout. The file's name says the split, as in `coco_pope_random.json`; `suffix` goes behind every question.

    Raises:
      UserError: no such file, or its name holds none or several of random, popular, adversarial.
      DataError: a line is not such an object, or there is none.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; give POPE's json lines")
    named = [split for split in SPLITS if split in file.stem.lower()]
    if len(named) != 1:
        raise UserError(f"{file}: the file's name must hold one of {', '.join(SPLITS)}; rename it")
    out = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = _row(line, file, number)
                found = re.fullmatch(r"Is there an? (.+) in the im\w+\?", row["text"])
                out.append(Question(row["image"], row["text"] + suffix, found[1] if found else "", row["label"] == "yes", named[0]))
    if not out:
        raise DataError("there is no question in it", file=str(file), mend="Download the file again.")
    return tuple(out)


def _row(line: bytes, file: Path, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # of JSON, or of UTF-8
        raise DataError(f"the line is not JSON ({error})", file=str(file), row=str(number), mend="Write one JSON object a line.") from error
    fields = [row.get(name) for name in ("image", "text", "label")] if isinstance(row, dict) else [None]
    if not all(isinstance(value, str) and value for value in fields) or row["label"] not in ("yes", "no"):
        mend = 'Write {"question_id": 1, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "yes"}.'
        raise DataError("the line is not a POPE question", file=str(file), row=str(number), mend=mend)
    return row
