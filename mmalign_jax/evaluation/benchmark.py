"""A benchmark as this package runs it: what is asked, what a model's answers are worth, and the table of two models."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmalign_jax.evaluation import chair, pope
from mmalign_jax.evaluation.generate import Answered
from mmalign_jax.evaluation.interval import bootstrap
from mmalign_jax.mentions import Mentions, Synonyms
from mmalign_jax.report.records import Score, ScoreRow
from mmalign_jax.types import Part, PreferenceRecord, Response, Turn

Ask = Callable[[Sequence[PreferenceRecord]], Sequence[Answered]]

_SEED = 0  # of the intervals


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Captions with what their images show, questions, or both. Made once, asked before and after.

    Attributes:
      name: key of its results.
      title: heading of its scores.
      captions: records that ask for a caption; `truths` and `synonyms` belong to them.
      questions: POPE's.
      question_records: what the questions ask, each only once: a question that two splits share is answered once.
      record_of: index into `question_records` for every question.
    """

    name: str
    title: str
    captions: tuple[PreferenceRecord, ...] = ()
    truths: tuple[tuple[str, ...], ...] = ()
    synonyms: Synonyms = dataclasses.field(default_factory=dict)
    questions: tuple[pope.Question, ...] = ()
    question_records: tuple[PreferenceRecord, ...] = ()
    record_of: tuple[int, ...] = ()


def question_records(
    questions: Sequence[pope.Question], picture: Callable[[str], PreferenceRecord]
) -> tuple[tuple[PreferenceRecord, ...], tuple[int, ...]]:
    """The records that ask the questions, without repetition, and for every question the index of its record.

    Args:
      questions: of any splits.
      picture: image id -> a record with that image as its first medium.
    """
    number: dict[tuple[str, str], int] = {}
    records = []
    for question in questions:
        key = (question.image_id, question.text)
        if key not in number:
            number[key] = len(records)
            record = picture(question.image_id)
            turn = Turn("user", (Part(media=0), Part(text=question.text)))
            answer = (Response("yes" if question.label else "no", source="truth"),)
            name = f"{question.image_id}: {question.text}"
            records.append(dataclasses.replace(record, id=name, turns=(turn,), responses=answer, prefs=()))
    return tuple(records), tuple(number[question.image_id, question.text] for question in questions)


def measure(tests: Sequence[Benchmark], ask: Ask) -> dict[str, Any]:
    """Asks a model everything and scores its answers.

    Answers that ran out of tokens are scored as they are and counted as `unfinished`.

    Args:
      tests: the benchmarks, with different names.
      ask: one answer a record, in order.

    Returns:
      What JSON can hold: for every benchmark's name `{"title", "chair", "captions", "pope", "answers"}`, the parts that it has.
      A measure is `{"value", "low", "high"}`, with its 95 % interval over images.

    Raises:
      UserError: what `ask` or the table of synonyms raises.
    """
    return {test.name: {"title": test.title} | _captions(test, ask) | _questions(test, ask) for test in tests}


def rows(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[ScoreRow]:
    """The lines of the before/after table, from two results of `measure` of the same benchmarks; `before` may be missing."""
    out: list[ScoreRow] = []
    for name, now in after.items():
        then = {} if before is None else before[name]
        if "chair" in now:
            out += _chair_rows(then.get("chair"), now["chair"], now["title"])
        if "pope" in now:
            out += _pope_rows(then.get("pope"), now["pope"], now["title"])
    return out


def _captions(test: Benchmark, ask: Ask) -> dict[str, Any]:
    if not test.captions:
        return {}
    answers = ask(test.captions)
    counts = chair.count([answer.text for answer in answers], test.truths, Mentions(test.synonyms))
    scores = chair.summarise(counts)
    found: dict[str, Any] = _plain(bootstrap(counts, chair.measures, seed=_SEED))
    found |= {"captions": scores.captions, "mentions": scores.mentions, "hallucinated_mentions": scores.hallucinated_mentions}
    found["unfinished"] = sum(not answer.finished for answer in answers)
    return {"chair": found, "captions": [_answer(record, answer) for record, answer in zip(test.captions, answers, strict=True)]}


def _questions(test: Benchmark, ask: Ask) -> dict[str, Any]:
    if not test.questions:
        return {}
    asked = ask(test.question_records)
    answers = [asked[number] for number in test.record_of]
    texts = [answer.text for answer in answers]
    counts, unparsed = pope.confusion(test.questions, texts), pope.count_unparsed(test.questions, texts)
    found: dict[str, Any] = {}
    for index, split in enumerate(unparsed):
        of_split = [answer for question, answer in zip(test.questions, answers, strict=True) if question.split == split]
        unfinished = sum(not answer.finished for answer in of_split)
        found[split] = _plain(bootstrap(counts[:, index], pope.measures, seed=_SEED))
        found[split] |= {"questions": len(of_split), "unparsed": unparsed[split], "unfinished": unfinished}
    sums = {name: sum(scores[name] for scores in found.values()) for name in ("questions", "unparsed", "unfinished")}
    found[pope.MEAN] = _plain(bootstrap(counts, pope.mean_measures, seed=_SEED)) | sums
    listed = [
        _answer(record, answer) | {"truth": record.responses[0].text} for record, answer in zip(test.question_records, asked, strict=True)
    ]
    return {"pope": found, "answers": listed}


def _chair_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any], group: str) -> list[ScoreRow]:
    return [
        ScoreRow("CHAIR_i", _score(before, "chair_i"), _score(after, "chair_i"), "lower", group=group),
        ScoreRow("CHAIR_s", _score(before, "chair_s"), _score(after, "chair_s"), "lower", group=group),
        ScoreRow("Object recall", _score(before, "recall"), _score(after, "recall"), "higher", group=group),
        ScoreRow("Words per caption", _score(before, "mean_words"), _score(after, "mean_words"), percent=False, group=group),
        *_unfinished("Unfinished captions", before, after, group),
    ]


def _pope_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any], group: str) -> list[ScoreRow]:
    then, now = None if before is None else before[pope.MEAN], after[pope.MEAN]
    out = [
        ScoreRow("POPE accuracy", _score(then, "accuracy"), _score(now, "accuracy"), "higher", group=group),
        ScoreRow("POPE precision", _score(then, "precision"), _score(now, "precision"), "higher", group=group),
        ScoreRow("POPE recall", _score(then, "recall"), _score(now, "recall"), "higher", group=group),
        ScoreRow("POPE F1", _score(then, "f1"), _score(now, "f1"), "higher", group=group),
        ScoreRow("POPE yes-ratio", _score(then, "yes_ratio"), _score(now, "yes_ratio"), group=group),
    ]
    for split in (name for name in after if name != pope.MEAN):
        earlier = None if before is None else _score(before[split], "accuracy")
        out.append(ScoreRow(f"POPE accuracy, {split}", earlier, _score(after[split], "accuracy"), "higher", group=group))
    return out + _unfinished("Unfinished POPE answers", then, now, group)


def _score(result: Mapping[str, Any] | None, name: str) -> Score | None:
    return None if result is None else Score(**result[name])


def _unfinished(title: str, before: Mapping[str, Any] | None, after: Mapping[str, Any], group: str) -> list[ScoreRow]:
    then, now = None if before is None else before["unfinished"], after["unfinished"]
    if not then and not now:
        return []
    return [ScoreRow(title, None if then is None else Score(then), Score(now), "lower", percent=False, group=group)]


def _answer(record: PreferenceRecord, answer: Answered) -> dict[str, Any]:
    return {"id": record.id, "text": answer.text, "tokens": answer.tokens, "finished": answer.finished}


def _plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: dataclasses.asdict(score) for name, score in scores.items()}
