"""What is held out depends on the pictures and the seed alone."""

import dataclasses

import numpy as np
import pytest
from helpers.rows import LetterProcessor, encoded, record

from mmalign_jax.config import DataConfig
from mmalign_jax.data.holdout import split
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.types import Media


def of_pictures(count, each=2):
    """So many pictures, with several records each, and as many records of text."""
    out = []
    for number in range(count):
        media = (Media("image", encoded((number, 3, 7), kind="PNG")),)
        out += [dataclasses.replace(record(f"{number}/{part}"), media=media) for part in range(each)]
        out.append(record(f"text {number}", images=0))
    return out


def ids(records):
    return [records[index].id for index in range(len(records))]


def test_a_picture_is_on_one_side():
    records = of_pictures(200)
    train, held = split(records, 0.25, 0)
    assert sorted(ids(train) + ids(held)) == sorted(ids(records)) and not set(ids(train)) & set(ids(held))
    with_pictures = [name for name in ids(held) if "/" in name]
    assert len({name.split("/")[0] for name in with_pictures}) * 2 == len(with_pictures)
    assert 0.17 < len(held) / len(records) < 0.33
    assert ids(train) == [one.id for one in records if one.id not in set(ids(held))]  # in order


def test_neither_order_nor_others_matter_and_seeds_do():
    records = of_pictures(60)
    held = set(ids(split(records, 0.3, 0)[1]))
    assert set(ids(split(records[::-1], 0.3, 0)[1])) == held
    assert set(ids(split(records[:90], 0.3, 0)[1])) == held & set(ids(records[:90]))
    assert set(ids(split(records, 0.5, 0)[1])) > held
    assert set(ids(split(records, 0.3, 1)[1])) != held


def test_a_side_without_records_is_refused():
    with pytest.raises(UserError, match="config.data.holdout: 0.001 of 6 records leaves none for the held-out pairs"):
        split(of_pictures(2), 0.001, 0)
    with pytest.raises(UserError, match="leaves none for training"):
        split(of_pictures(2), 0.9999, 0)


def test_answers_that_are_cut_are_no_rows_of_an_objective_that_scores_them():
    records, processor = [record("whole"), record("cut", complete=False)], LetterProcessor()
    assert len(plan_rows(records, processor, DataConfig(), answers=2).items) == 2
    with pytest.raises(DataError, match="row cut.*no end token"):
        plan_rows(records, processor, DataConfig(), answers=2, whole_answers=True)
    plan = plan_rows(records, processor, DataConfig(on_bad_row="skip"), answers=2, whole_answers=True)
    np.testing.assert_array_equal(plan.items, [[0, 0]])
    assert plan.left_out[0].record_id == "cut" and plan.counts["dropped_bad"] == 1
    with pytest.raises(UserError, match="config.data.on_long_row.*shortened ones lack"):
        plan_rows(records[:1], processor, DataConfig(on_long_row="shorten_answer"), answers=2, whole_answers=True)
