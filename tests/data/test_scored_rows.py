"""Rows of answers that were scored and not paired: what a record may say of them, how they are laid out, and what is refused."""

import dataclasses

import numpy as np
import pytest
from helpers.rows import EOS, LetterProcessor, record

from mmalign_jax.config import DataConfig
from mmalign_jax.data.bad_rows import BadRow, place_of
from mmalign_jax.data.loader import make_loader, one_pass
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.data.validate import check_record
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.types import Group, Label, Preference, Response

PROCESSOR = LetterProcessor()
ANSWERS = (Response("yes", "policy", 1.0), Response("no", "policy", 0.0), Response("perhaps", "policy", 0.5))


def scored(name="r0", **rows):
    return record(name, responses=ANSWERS, prefs=(), **rows)


LABELLED = scored("a", labels=(Label(2, True, 0.5), Label(0, False)))
GROUPED = scored("b", groups=(Group((2, 0, 1)),))


def planned(records, answers, reads, **settings):
    return plan_rows(records, PROCESSOR, DataConfig(workers=0, **settings), answers=answers, reads=reads)


def answers_of(batch, row):
    """The letters of each answer of a row."""
    values = batch.tokens[row, batch.prefix_slots :].reshape(batch.answers, batch.answer_slots)
    return ["".join(chr(token) for token in ids if token and token != EOS) for ids in values]


def test_labelled_answers_are_a_row_each():
    records = [LABELLED, scored("c", labels=(Label(1, True),))]
    plan = planned(records, 1, "labels")
    assert plan.layout.answers == 1 and plan.items.tolist() == [[0, 0], [0, 1], [1, 0]] and plan.reads == "labels"
    (found,) = one_pass(records, PROCESSOR, plan, batch_size=3, workers=0)
    assert [answers_of(found.batch, row) for row in range(3)] == [["perhaps"], ["yes"], ["no"]]
    assert found.batch.desirable.tolist() == [True, False, True] and found.batch.weight.tolist() == [0.5, 1.0, 1.0]
    assert found.batch.rewards is None and found.batch.record_key[0] == found.batch.record_key[1] != found.batch.record_key[2]


def test_a_group_is_a_row_with_the_scores_of_its_answers():
    records = [GROUPED, dataclasses.replace(GROUPED, id="c", groups=(Group((0, 1, 2)), Group((1, 2, 0), 0.25)))]
    plan = planned(records, 1, "groups")
    assert plan.layout.answers == 3 and plan.items.tolist() == [[0, 0], [1, 0], [1, 1]]
    (found,) = one_pass(records, PROCESSOR, plan, batch_size=3, workers=0)
    assert answers_of(found.batch, 0) == ["perhaps", "yes", "no"] and answers_of(found.batch, 2) == ["no", "perhaps", "yes"]
    assert found.batch.rewards.tolist() == [[0.5, 1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.5, 1.0]] and found.batch.weight.tolist() == [1, 1, 0.25]
    assert found.batch.desirable is None and found.batch.first_answers(2).rewards is None
    batch = next(make_loader(records, PROCESSOR, plan, batch_size=2, accumulate=2, workers=0))
    assert batch.rewards.shape == (2, 1, 3) and batch.rewards.dtype == np.float32


def test_groups_of_another_size_are_named():
    records = [GROUPED, scored("short", groups=(Group((0, 1)),))]
    with pytest.raises(DataError, match="row short: a group of 2 answers, in a set that begins with one of 3"):
        planned(records, 1, "groups")
    plan = planned(records, 1, "groups", on_bad_row="skip")
    assert plan.counts["kept"] == 1 and [row.record_id for row in plan.left_out] == ["short"]


PAIR = record("p", responses=ANSWERS, prefs=(Preference(0, 1),))
REFERENCE = record("s", responses=ANSWERS[:1], prefs=())


@pytest.mark.parametrize(
    ("one", "answers", "reads", "message"),
    [
        (LABELLED, 2, "prefs", "record a holds labelled answers, and pairs or references are asked for; labelled answers train kto_unpaired"),
        (LABELLED, 1, "prefs", "record a holds labelled answers, and pairs or references"),  # sft would train on answer 0, whoever wrote it
        (GROUPED, 2, "prefs", "record b holds groups, and pairs or references are asked for; groups train pl_dpo"),
        (GROUPED, 1, "labels", "record b holds groups, and labelled answers are asked for"),
        (LABELLED, 1, "groups", "record a holds labelled answers, and groups are asked for"),
        (PAIR, 1, "labels", "record p holds pairs, and labelled answers are asked for; pairs train dpo"),
        (REFERENCE, 1, "groups", "record s holds no scored answers, and groups are asked for; groups train pl_dpo"),
    ],
)
def test_rows_of_another_form_than_is_read_are_refused_by_name(one, answers, reads, message):
    for policy in ("error", "skip"):  # the whole set is the wrong one
        with pytest.raises(UserError, match=f"config.objective.name: {message}"):
            planned([one], answers, reads, on_bad_row=policy)
    assert planned([one], 0, "prefs").layout.answers == 0  # its prompt can be answered


def test_what_is_true_of_a_record():
    assert PAIR.reference == REFERENCE.reference == ANSWERS[0] and LABELLED.reference is GROUPED.reference is None
    assert record(prefs=(Preference(1, 0),)).reference.text == "no" and record(responses=(), prefs=()).reference is None


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ({"labels": (Label(3, True),)}, "a label names answer 3"),
        ({"labels": (Label(-1, True),)}, "a label names answer -1"),
        ({"labels": (Label(0, True), Label(0, False))}, "an answer has two labels"),
        ({"labels": (Label(0, True, float("nan")),)}, "a weight that is not finite or below 0"),
        ({"labels": (Label(0, True, -1.0),)}, "a weight that is not finite or below 0"),
        ({"groups": (Group((0,)),)}, "names no two or more different answers"),
        ({"groups": (Group((0, 0)),)}, "names no two or more different answers"),
        ({"groups": (Group((0, 5)),)}, "names no two or more different answers"),
        ({"groups": (Group((0, 3)),), "responses": (*ANSWERS, Response("hm"))}, "an answer of a group has no finite score"),
    ],
)
def test_what_a_record_may_not_say(rows, problem):
    check = lambda one: check_record(one, place_of(one), max_pixels=1000, max_bytes=10_000)  # noqa: E731
    check(LABELLED)
    check(GROUPED)
    with pytest.raises(BadRow, match=problem):
        check(dataclasses.replace(scored(), **rows))
