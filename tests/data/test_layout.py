"""What a row looks like, token by token; nothing is cut but what the policy names, and that is counted."""

import dataclasses

import numpy as np
import pytest
from helpers.rows import BOS, EOS, IMAGE, LetterProcessor, encoded, record

from mmalign_jax.config import DataConfig
from mmalign_jax.data.bad_rows import BadRow
from mmalign_jax.data.layout import RowLayout, lay_out, tokenize
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.types import Media, Part, Preference, Response, Turn, record_key

PROCESSOR = LetterProcessor()


def sized(prefix_slots, answer_slots, answers, images, **options):
    return RowLayout(prefix_slots, answer_slots, answers, images, (4, 6), **options)


def letters(text):
    return list(map(ord, text))


def test_a_pair():
    row = record("r", prompt="Q?", chosen="yes", rejected="no", prefs=(Preference(0, 1, 1.0, 0.5),))
    out = lay_out(row, row.prefs[0], PROCESSOR, sized(prefix_slots=8, answer_slots=5, answers=2, images=2))
    n = 6
    assert out["tokens"].tolist() == [BOS, *[IMAGE] * 3, *letters("Q?"), 0, 0, *letters("yes"), EOS, 0, *letters("no"), EOS, 0, 0]
    assert out["role"].tolist() == [1] * 6 + [0] * 2 + [2] * 4 + [0] + [3] * 3 + [0] * 2
    assert out["positions"].tolist() == [*range(6), 0, 0, n, n + 1, n + 2, n + 3, 0, n, n + 1, n + 2, 0, 0]
    assert out["image_index"].tolist() == [-1, 0, 1, 2] + [-1] * 14
    assert out["token_weight"].tolist() == [0] * 8 + [1] * 4 + [0] + [1] * 3 + [0] * 2
    assert out["record_key"] == record_key("r") and out["margin"] == 0.5
    assert out["images"].shape == (2, 4, 6, 3) and out["images"][0].any() and not out["images"][1].any()
    dtypes = {name: value.dtype.name for name, value in out.items()}
    assert dtypes == {
        "tokens": "int32", "role": "int8", "positions": "int32", "images": "uint8", "image_index": "int32", "token_weight": "float32",
        "record_key": "uint32", "margin": "float32", "weight": "float32",
    }  # fmt: skip


def test_win_and_lose_decide_the_order():
    row = record(chosen="yes", rejected="no", prefs=(Preference(1, 0),))
    ids = [ids.tolist() for ids, _ in tokenize(row, row.prefs[0], PROCESSOR, 2).answers]
    assert ids == [[*letters("no"), EOS], [*letters("yes"), EOS]]


def test_a_reference_answer():
    row = record(prefs=(), responses=(Response("yes"),))
    out = lay_out(row, None, PROCESSOR, sized(8, 4, 1, 1))
    assert out["tokens"].tolist()[8:] == [*letters("yes"), EOS] and out["margin"] == 0
    with pytest.raises(DataError, match="no pair of answers"):
        tokenize(row, None, PROCESSOR, 2)


def test_a_prompt_alone_and_an_answer_that_goes_on():
    row = record(chosen="yes", rejected="no")
    alone = lay_out(row, None, PROCESSOR, sized(8, 0, 0, 1))
    assert alone["tokens"].tolist() == [BOS, *[IMAGE] * 3, *letters("Q?"), 0, 0]
    cut = dataclasses.replace(row, complete=False)
    assert [ids.tolist() for ids, _ in tokenize(cut, row.prefs[0], PROCESSOR, 2).answers] == [letters("yes"), letters("no")]


def test_text_only_and_several_images():
    row = record(images=0)
    out = lay_out(row, row.prefs[0], PROCESSOR, sized(8, 4, 2, 1))
    assert not out["images"].any() and (out["image_index"] == -1).all()
    two = record(images=2)
    out = lay_out(two, two.prefs[0], PROCESSOR, sized(16, 4, 2, 2))
    assert out["image_index"][out["image_index"] >= 0].tolist() == list(range(6))
    # images are stacked in the order in which the prompt shows them
    swapped = dataclasses.replace(two, turns=(Turn("user", (Part(media=1), Part(text="Q?"), Part(media=0))),))
    again = lay_out(swapped, two.prefs[0], PROCESSOR, sized(16, 4, 2, 2))
    np.testing.assert_array_equal(again["images"], out["images"][::-1])
    assert (out["images"][0] != out["images"][1]).any()


def test_a_shared_prefix_is_conditioned_on_and_computed_once():
    row = record(prompt="Q", chosen="A. B", rejected="A. C", prefix="A. ")
    out = lay_out(row, row.prefs[0], PROCESSOR, sized(8, 3, 2, 1))
    assert out["tokens"].tolist() == [BOS, *[IMAGE] * 3, *letters("QA. "), ord("B"), EOS, 0, ord("C"), EOS, 0]
    assert out["role"].tolist() == [1] * 8 + [2, 2, 0, 3, 3, 0]
    assert out["positions"].tolist()[8:10] == [8, 9] and out["token_weight"].tolist() == [0] * 8 + [1, 1, 0] * 2


def test_a_border_token_that_answers_do_not_share_stays_with_them():
    class Odd(LetterProcessor):
        def answer_ids(self, text, prefix=""):
            ids, scored = super().answer_ids(text, prefix)
            ids[len(prefix) - 1] = 600 + ord(text[-1])  # another token where the prefix ends
            return ids, scored

    row = record(prompt="Q", chosen="A. B", rejected="A. C", prefix="A. ")
    out = lay_out(row, row.prefs[0], Odd(), sized(7, 3, 2, 1))
    assert out["tokens"].tolist()[4:] == [*letters("QA."), 600 + ord("B"), ord("B"), EOS, 600 + ord("C"), ord("C"), EOS]
    assert out["token_weight"].tolist()[7:] == [0, 1, 1, 0, 1, 1]


def test_image_tokens_are_counted():
    class Lossy(LetterProcessor):
        def prompt_ids(self, turns, expansions):
            return super().prompt_ids(turns, expansions)[:3]

    row = record()
    with pytest.raises(BadRow, match="2 image tokens in the prompt for 1 images of 3") as caught:
        tokenize(row, row.prefs[0], Lossy(), 2)
    assert caught.value.reason == "placeholder_mismatch"
    with pytest.raises(BadRow, match="an answer holds the image token"):
        tokenize(record(chosen=chr(IMAGE)), row.prefs[0], PROCESSOR, 2)


def test_a_row_that_does_not_fit_is_an_error():
    row = record("r", meta={"file": "a.parquet", "row": "9"})
    for layout, problem in (
        (sized(5, 5, 2, 1), "prompt take 6 tokens, there are 5 slots"),
        (sized(8, 3, 2, 1), "an answer takes 4 tokens, there are 3 slots"),
        (sized(8, 5, 2, 0), "has 1 images or tiles, there is room for 0"),
    ):
        with pytest.raises(DataError, match=f"a.parquet, row 9: .*{problem}"):
            lay_out(row, row.prefs[0], PROCESSOR, layout)
    cut = lay_out(row, row.prefs[0], PROCESSOR, sized(8, 3, 2, 1, shorten_answers=True))
    assert cut["tokens"].tolist()[8:11] == letters("yes")
    with pytest.raises(DataError, match="prompt take"):
        lay_out(row, row.prefs[0], PROCESSOR, sized(5, 3, 2, 1, shorten_answers=True))


def test_images_are_decoded_with_the_limits_again():
    row = dataclasses.replace(record(), media=(Media("image", encoded(size=(40, 40))),))
    with pytest.raises(BadRow, match="over the limit of 100 pixels"):
        lay_out(row, row.prefs[0], PROCESSOR, sized(8, 4, 2, 1, max_pixels=100))


def test_a_layout_rounds_up():
    rows = [record("a"), record("b", prompt="x" * 20, chosen="y" * 9, images=2)]

    def layout(rows, **options):
        return plan_rows(rows, PROCESSOR, DataConfig(), answers=2, **options).layout

    measured = layout(rows)
    assert (measured.prefix_slots, measured.answer_slots, measured.images, measured.tokens) == (32, 16, 2, 64)
    assert (measured.canvas, measured.patch_slots) == ((4, 6), 0)
    exact = layout(rows, multiple=1)
    assert (exact.prefix_slots, exact.answer_slots) == (27, 10)
    assert layout([record(images=0)]).images == 1


LONG = [record("a"), record("b", chosen="y" * 30), record("c", prompt="x" * 30), record("d", prefs=(Preference(0, 1), Preference(1, 0)))]


def planned(records=LONG, answers=2, **settings):
    return plan_rows(records, PROCESSOR, DataConfig(path="set", **settings), answers=answers)


def test_policies_for_long_rows():
    whole = planned()
    assert whole.items.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]] and whole.counts["kept"] == 5 and not whole.left_out
    with pytest.raises(DataError, match="records, row b: an answer takes 31 tokens, there are 8 slots"):
        planned(answer_tokens=8)
    dropped = planned(prefix_tokens=8, answer_tokens=8, on_long_row="drop")
    assert dropped.items.tolist() == [[0, 0], [3, 0], [3, 1]]
    assert [(row.record_id, row.policy) for row in dropped.left_out] == [("b", "dropped_long"), ("c", "dropped_long")]
    assert dropped.counts == {"rows": 5, "kept": 3, "dropped_long": 2, "dropped_bad": 0, "shortened_answer": 0}
    short = planned(answer_tokens=8, on_long_row="shorten_answer")
    assert short.counts["kept"] == 5 and short.counts["shortened_answer"] == 1 and short.left_out[0].record_id == "b"
    with pytest.raises(DataError, match="row c: images and prompt take 34 tokens"):
        planned(prefix_tokens=8, answer_tokens=8, on_long_row="shorten_answer")
    with pytest.raises(DataError, match="no row is left"):
        planned(prefix_tokens=2, on_long_row="drop")


def test_a_limit_is_no_size():
    plan = planned([record(prompt="12", chosen="123", rejected="1234567")], prefix_tokens=704, answer_tokens=352)
    assert (plan.layout.prefix_slots, plan.layout.answer_slots) == (8, 8)
    plan = planned(prefix_tokens=30, answer_tokens=12, on_long_row="drop")
    assert (plan.layout.prefix_slots, plan.layout.answer_slots, plan.counts["dropped_long"]) == (30, 12, 2)


def test_padding_is_known():
    plan = planned([record(prompt="12", chosen="123", rejected="1234567")], prefix_tokens=8, answer_tokens=8)
    assert plan.padding_fraction == pytest.approx(1 - (6 + 4 + 8) / 24)


def test_rows_without_a_pair_or_that_cannot_be_tokenised():
    class Strict(LetterProcessor):
        def prompt_ids(self, turns, expansions):
            if any(part.text == "bad" for part in turns[0].parts):
                raise UserError("the text holds </s>")
            return super().prompt_ids(turns, expansions)

    rows = [record("a"), record("b", prefs=()), record("c", prompt="bad", meta={"file": "f", "row": "2"})]
    with pytest.raises(BadRow, match="row b: the row has no pair"):
        plan_rows(rows, Strict(), DataConfig(), answers=2)
    plan = plan_rows(rows, Strict(), DataConfig(on_bad_row="skip"), answers=2)
    assert plan.counts == {"rows": 3, "kept": 1, "dropped_long": 0, "dropped_bad": 2, "shortened_answer": 0}
    assert "f, row 2: the row cannot be tokenised: the text holds </s>" in plan.left_out[1].problem
    assert plan_rows(rows[:2], Strict(), DataConfig(), answers=1).items.tolist() == [[0, 0], [1, -1]]


def test_a_weight_travels_with_its_row():
    row = record(prefs=(Preference(0, 1, 0.5),))
    sizes = sized(prefix_slots=8, answer_slots=5, answers=2, images=2)
    assert lay_out(row, row.prefs[0], PROCESSOR, sizes)["weight"] == 0.5 and record().prefs[0].weight == 1


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(DataError, match="weight"):
        planned([record(prefs=(Preference(0, 1, weight),))])


def test_a_row_longer_than_the_decoder_was_made_for_does_not_fit():
    class Short(LetterProcessor):
        traits = dataclasses.replace(LetterProcessor.traits, max_positions=9)

    # six tokens of prefix, and three or four of answer
    rows = [record("a", chosen="ye", rejected="no"), record("b")]
    plan = plan_rows(rows, Short(), DataConfig(on_long_row="drop"), answers=2)
    assert [row.record_id for row in plan.left_out] == ["b"] and "the model was made for 9" in plan.left_out[0].problem
    with pytest.raises(DataError, match="take 10 positions, the model was made for 9"):
        plan_rows(rows, Short(), DataConfig(), answers=2)


def test_pixels_must_be_what_was_planned():
    class Changed(LetterProcessor):
        class pictures(type(LetterProcessor.pictures)):
            def pixels(self, frames, times=None):
                return super().pixels(frames, times)[:, :-1]

        pictures = pictures()

    row = record()
    with pytest.raises(AssertionError, match="what was planned"):
        lay_out(row, row.prefs[0], Changed(), sized(8, 4, 2, 1))
