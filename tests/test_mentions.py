"""Words that name things."""

import pytest
from helpers.synonyms import TABLE

from mmalign_jax.errors import UserError
from mmalign_jax.mentions import Mentions


def kinds(text: str) -> list[str]:
    return [mention.kind for mention in Mentions(TABLE)(text)]


def test_terms_plurals_and_case():
    assert kinds("Two PUPPIES, a dog's bowl and three ducks.") == ["dog", "dog", "bird"]
    assert kinds("men, women and children; persons and people") == ["person", "person", "person", "person"]
    assert kinds("knives on buses with sheep and glasses") == ["knife", "bus", "sheep", "wine glass"]
    assert kinds("doghouse, underbus, chairman") == []
    assert kinds("") == []


def test_the_longest_term_wins():
    assert kinds("a hot dog") == ["hot dog"]
    assert kinds("hot-dogs and hot, dogs") == ["hot dog", "hot dog"]
    assert kinds("hot days, dog days") == ["dog"]
    assert kinds("wine glasses") == ["wine glass"]
    assert kinds("a baby bird and a baby") == ["bird", "person"]
    assert kinds("a toilet seat, a toilet and a seat") == ["toilet", "toilet", "chair"]


def test_mentions_say_where_they_are():
    text = "A Hot  Dog there."
    (mention,) = Mentions(TABLE)(text)
    assert text[mention.start : mention.stop] == "Hot  Dog"


def test_a_term_of_two_kinds_is_refused():
    with pytest.raises(UserError, match="'seat' is a term of 'chair' and of 'toilet'"):
        Mentions({"chair": ["seat"], "toilet": ["seat"]})
    with pytest.raises(UserError, match="no word"):
        Mentions({"chair": ["-"]})


def test_what_the_table_says_stands_above_the_plural_rule():
    table = Mentions({"glass": [], "spectacles": ["glasses"]})
    assert [mention.kind for mention in table("a glass, glasses")] == ["glass", "spectacles"]


def test_a_kind_in_the_place_of_another():
    table = Mentions({"cat": ("kitten",), "baby bird": (), "box": (), "glass": ()})
    pairs = [("cat", "box"), ("cats", "box"), ("Kittens", "baby bird"), ("boxes", "cat"), ("glass", "box"), ("glasses", "box")]
    assert [table.name(kind, like) for like, kind in pairs] == ["box", "boxes", "baby birds", "cats", "box", "boxes"]
    own = Mentions({"cat": ("cat", "cats"), "fish": ("fish",), "man": ("men",)})
    pairs = [("cats", "fish"), ("cats", "man"), ("men", "cat"), ("fish", "cat")]
    assert [own.name(kind, like) for like, kind in pairs] == ["fish", "men", "cats", "cat"]
