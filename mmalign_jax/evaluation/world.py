"""The built-in world's measurement: captions scored by CHAIR and yes/no questions by POPE, on both test splits."""

from collections.abc import Collection, Sequence

from mmalign_jax.config import ScenesConfig
from mmalign_jax.evaluation import chair, pope
from mmalign_jax.evaluation.benchmark import Benchmark as WorldTest
from mmalign_jax.evaluation.benchmark import measure, question_records, rows
from mmalign_jax.scenes import language, splits
from mmalign_jax.scenes.world import KINDS
from mmalign_jax.types import PreferenceRecord

__all__ = ["TITLES", "WorldTest", "hallucinated", "make_tests", "measure", "objects_of", "rows"]

TITLES = {"counterfactual": "Counterfactual pictures (the habit is broken)", "test": "Usual pictures"}


def make_tests(scenes: ScenesConfig, benchmarks: Collection[str]) -> tuple[WorldTest, ...]:
    """The tests of the two splits, `scenes.test` pictures each.

    POPE's questions are built by the authors' rules from the exact contents of the pictures. In both splits usual pictures say what is
    frequent and what comes together: they are what the model learned from, so that beside a lonely cup the adversarial question is
    for the spoon.

    Args:
      scenes: seed and number of pictures.
      benchmarks: "chair", "pope" or both.
    """
    usual = [splits.item(scenes.seed, "test", index).scene.kinds for index in range(scenes.test)]
    return tuple(_make_test(scenes, split, title, benchmarks, usual) for split, title in TITLES.items())


def objects_of(record: PreferenceRecord) -> tuple[str, ...]:
    """The kinds that a record's picture shows."""
    return tuple(thing["kind"] for thing in record.meta["objects"])


def hallucinated(text: str, truth: Collection[str]) -> tuple[str, ...]:
    """The words of a text about a picture of this world that name what the picture does not show."""
    return chair.hallucinated(text, truth, language.synonyms())


def _make_test(scenes: ScenesConfig, split: str, title: str, benchmarks: Collection[str], usual: Sequence[tuple[str, ...]]) -> WorldTest:
    captions = tuple(splits.records(scenes.seed, split, scenes.test))
    truths = tuple(objects_of(record) for record in captions)
    questions: tuple[pope.Question, ...] = ()
    if "pope" in benchmarks:
        pictures = [record.media[0].origin for record in captions]
        truth = list(zip(pictures, truths, strict=True))
        questions = pope.build_questions(truth, seed=scenes.seed, vocabulary=tuple(KINDS), question=language.question, statistics=usual)
    by_picture = {record.media[0].origin: record for record in captions}
    asked, record_of = question_records(questions, by_picture.__getitem__)
    if "chair" not in benchmarks:
        captions, truths = (), ()
    return WorldTest(split, title, captions, truths, language.synonyms(), questions, asked, record_of)
