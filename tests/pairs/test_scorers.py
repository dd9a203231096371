"""What answers are worth, by hand."""

import dataclasses

import pytest
from helpers.tiny import record

from mmalign_jax.errors import UserError
from mmalign_jax.mentions import Mentions
from mmalign_jax.pairs import scorers
from mmalign_jax.pairs.selectors import Candidate

TRUTH = scorers.Truth(Mentions({"cup": ("mug",), "spoon": (), "cat": ()}), max_tokens=20)
SHOWN = dataclasses.replace(record("caption", "Describe.", "A cup and a spoon."), meta={"objects": [{"kind": "cup"}, "spoon"]})
ASKED = dataclasses.replace(record("asked", "Is there a cat?", "No, there is no cat."), meta={"objects": ["cup"]})


def scored(texts, answer, one=SHOWN, truth=TRUTH, finished=True, tokens=5):
    ((found,),) = scorers.parse(texts, truth)([one], [[Candidate(answer, "policy", finished=finished, tokens=tokens)]])
    return found


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("A mug.", 0.5),
        ("Cups, spoons!", 1.0),
        ("A cup beside a cup.", 0.5),  # named once
        ("A cat, a cup, a spoon and a cat.", 0.0),  # two wrong mentions
        ("A cat.", -0.5),
        ("", 0.0),
    ],
)
def test_objects(answer, score):
    assert scored(["objects"], answer).total == score
    assert scored(["objects(2)"], answer).total == 2 * score


def test_yes_and_no():
    assert [scored(["yes_no"], answer, ASKED).total for answer in ("no", "No!", "Yes, no.", "Not one.", "")] == [1, 1, 0, 0, 0]
    # the words of such an answer are no claims
    assert dict(scored(["objects", "yes_no"], "No cat.", ASKED).parts) == {"yes_no": 1.0}
    assert dict(scored(["objects", "yes_no"], "A cup.").parts) == {"objects": 0.5}


def test_exact():
    assert [scored(["exact"], answer).total for answer in ("a  CUP and a spoon", "A cup and a spoon.", "A cup.")] == [1, 1, 0]


def test_the_form_of_an_answer():
    texts = ["exact", "missing_end(-8)", "length(-10)", "overlong(buffer=10)"]
    found = scored(texts, "A cup and a spoon.", finished=False, tokens=15)
    assert dict(found.parts) == {"exact": 1.0, "missing_end": 1.0, "length": 0.75, "overlong": -0.5}
    assert found.total == pytest.approx(1 - 8 - 7.5 - 0.5)
    assert [scored(texts, "", tokens=tokens).parts["overlong"] for tokens in (1, 10, 20)] == [0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["object"], r"no scorer 'object'. Did you mean objects\?"),
        (["exact", "exact(2)"], "exact comes twice"),
        (["overlong(buffer=0)"], "buffer must be a whole number in 1"),
    ],
)
def test_mistakes_are_named(texts, message):
    with pytest.raises(UserError, match=message):
        scorers.parse(texts, TRUTH)


def test_what_cannot_be_judged_is_named():
    with pytest.raises(UserError, match="config.samples.synonyms: the scorer objects looks words up"):
        scorers.parse(["objects"], scorers.Truth())
    for texts, one, message in (
        (["yes_no", "length"], SHOWN, "none of yes_no, length says what is true of record caption"),
        (["objects"], dataclasses.replace(SHOWN, meta={"objects": ["dog"]}), "record caption: .*'dog' is in no row of the table"),
        (["objects"], dataclasses.replace(SHOWN, meta={"objects": "cup"}), "record caption: .*is a list of names"),
        (["objects"], dataclasses.replace(SHOWN, meta={"objects": [{"name": "cup"}]}), "record caption: .*is a list of names"),
    ):
        with pytest.raises(UserError, match=message):
            scorers.parse(texts, TRUTH).check(one)
    scorers.parse(["objects", "yes_no"], TRUTH).check(SHOWN)
    scorers.parse(["objects", "yes_no"], TRUTH).check(ASKED)
