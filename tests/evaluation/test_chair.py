import pytest
from helpers.synonyms import TABLE

from mmalign_jax.errors import UserError
from mmalign_jax.evaluation import chair
from mmalign_jax.scenes import language


def test_scores_by_hand():
    captions = [
        "A dog, a dog and a duck.",  # 3 mentions, one of them wrong
        "",  # none
        "A puppy sees two ducks and a baby.",  # 3 mentions, 2 wrong
        "It is sunny today here.",  # none
    ]
    truths = [("dog", "chair"), ("bus",), ("puppy",), ()]
    scores = chair.score(captions, truths, TABLE)
    assert scores.mentions == 6 and scores.hallucinated_mentions == 3 and scores.captions == 4
    assert scores.chair_i == pytest.approx(3 / 6)
    assert scores.chair_s == pytest.approx(2 / 4)
    assert scores.recall == pytest.approx(2 / 4)  # dog and puppy, of dog, chair, bus, puppy
    assert scores.mean_words == pytest.approx((7 + 0 + 8 + 5) / 4)


def test_duplicates_count_for_chair_i_and_not_for_recall():
    scores = chair.score(["a bus, a bus, a bus and a dog dog"], [("dog", "knife")], TABLE)
    assert scores.chair_i == pytest.approx(3 / 5)
    assert scores.recall == pytest.approx(1 / 2)


def test_nothing_mentioned_and_nothing_shown():
    scores = chair.score(["", "Nice."], [(), ()], TABLE)
    assert (scores.chair_i, scores.chair_s, scores.recall, scores.mentions) == (0.0, 0.0, 0.0, 0)


def test_a_truth_that_the_table_does_not_know():
    with pytest.raises(UserError, match="'zebra' is in no row"):
        chair.score(["a dog"], [("zebra",)], TABLE)


def test_captions_and_truths_must_match():
    with pytest.raises(ValueError):
        chair.score(["a dog"], [], TABLE)


def test_hallucinated_words_as_they_are_written():
    assert chair.hallucinated("Puppies and Buses, a bus, Buses and a hot dog.", ("dog",), TABLE) == ("Buses", "bus", "hot dog")
    assert chair.hallucinated("A dog.", ("dog",), TABLE) == ()


def test_the_worlds_own_words():
    text = "At the top left there are two red cups and a red spoon. At the top right there are three blue fish."
    scores = chair.score([text], [("cup", "fish")], language.synonyms())
    assert (scores.mentions, scores.hallucinated_mentions, scores.recall) == (3, 1, 1.0)
