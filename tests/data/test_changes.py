"""Which tokens of two answers were replaced, for dense objectives."""

import numpy as np
import pytest
from helpers.rows import LetterProcessor, record

from mmalign_jax.data.changes import replaced
from mmalign_jax.data.layout import RowLayout, lay_out


def marked(chosen: str, rejected: str) -> tuple[str, str]:
    """Changed characters, the others as dots; a token is a character here."""
    ids = [np.array([ord(c) for c in text], np.int32) for text in (chosen, rejected)]
    return tuple(
        "".join(c if mark else "." for c, mark in zip(text, marks, strict=True))
        for text, marks in zip((chosen, rejected), replaced(*ids), strict=True)
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("a red cat sits", "a red dog sits", ("......cat.....", "......dog.....")),
        ("same", "same", ("....", "....")),
        ("xxxx", "yyy", ("xxxx", "yyy")),
        # an insertion has nothing on the other side
        ("a cat sits here", "a cat sits", ("...............", "..........")),
    ],
)
def test_replacements_alone_are_marked(chosen, rejected, expected):
    assert marked(chosen, rejected) == expected


def test_short_matches_between_differences_belong_to_them():
    assert marked("startXXabYYfinish", "startZZabWWfinish") == (".....XXabYY......", ".....ZZabWW......")
    assert marked("startXXabcYYfinish", "startZZabcWWfinish") == (".....XX...YY......", ".....ZZ...WW......")


def test_marks_stand_where_the_answers_tokens_do():
    row = record(chosen="a red cat", rejected="a red dog!", images=0)
    layout = RowLayout(4, 12, 2, 0, (4, 6), mark_changes=True)
    made = lay_out(row, row.prefs[0], LetterProcessor(), layout)
    assert "changed" not in lay_out(row, row.prefs[0], LetterProcessor(), RowLayout(4, 12, 2, 0, (4, 6)))
    tokens, marks = made["tokens"], made["changed"]
    assert "".join(map(chr, tokens[4:16][marks[4:16]])) == "cat" and "".join(map(chr, tokens[16:][marks[16:]])) == "dog!"
    assert not marks[:4].any()
