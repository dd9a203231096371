import itertools
import random

import pytest

from mmalign_jax.errors import UserError
from mmalign_jax.pairs.selectors import REFERENCE, Candidate, Filters, names, parse

OPEN = Filters(unfinished=True)


def scored(*scores):
    return [Candidate(f"answer {number}", "policy", score) for number, score in enumerate(scores)]


def edges(text, candidates, filters=OPEN):
    return [(pair.win, pair.lose, pair.margin) for pair in parse(text)(candidates, filters).pairs]


def test_all_pairs_and_the_widest_of_them():
    candidates = scored(1.0, 4.0, 3.0)
    assert edges("all_pairs", candidates) == [(1, 2, 1.0), (1, 0, 3.0), (2, 0, 2.0)]
    assert edges("all_pairs(1)", candidates) == [(1, 0, 3.0)]
    # the second pair takes answers that have not come up yet, where there are some
    assert edges("all_pairs(2)", scored(0.0, 10.0, 4.0, 6.0)) == [(1, 0, 10.0), (3, 2, 2.0)]


def test_best_and_worst():
    assert edges("best_worst", scored(2.0, 5.0, 1.0, 5.0)) == [(1, 2, 4.0)]
    assert edges("best_worst", scored(2.0)) == [] == edges("best_worst", [])


def test_the_reference_over_own_answers():
    candidates = [Candidate("own", "policy", 0.9), Candidate("truth", REFERENCE), Candidate("far", "policy", 0.25)]
    assert edges("reference_against_own", candidates) == [(1, 2, 0.0), (1, 0, 0.0)]
    assert edges("reference_against_own(most=1)", candidates) == [(1, 2, 0.0)]
    assert edges("reference_against_own", candidates[:1]) == []
    assert edges("reference_against_own(ceiling=0.25)", candidates) == [(1, 2, 0.0)]
    assert edges("reference_against_own(ceiling=0.2)", candidates) == []


def test_sources_in_their_order_whatever_the_scores():
    candidates = [Candidate("a", "policy", 0.0), Candidate("b", "blur", 0.5), Candidate("c", "policy", 0.0), Candidate("d", "swap", 0.0)]
    assert edges("by_source", candidates) == [(0, 1, 0), (0, 3, 0), (1, 3, 0), (2, 1, 0), (2, 3, 0)]
    assert edges("by_source(2)", candidates) == [(0, 1, 0), (2, 3, 0)]
    assert edges("by_source", candidates[:1] + candidates[2:3], Filters(gap=0.5)) == []


def test_correct_over_incorrect():
    candidates = scored(0.0, 1.0, 0.5, 0.2)
    assert edges("correct_against_incorrect", candidates) == [(1, 0, 1.0), (1, 3, 0.8), (2, 0, 0.5), (2, 3, 0.3)]
    assert edges("correct_against_incorrect(0.9)", candidates) == [(1, 0, 1.0), (1, 3, 0.8), (1, 2, 0.5)]
    assert edges("correct_against_incorrect(most=2)", candidates) == [(1, 0, 1.0), (2, 3, 0.3)]


@pytest.mark.parametrize("name", names())
def test_what_holds_of_every_selector(name):
    """Winners are better than losers, no pair comes twice, and nothing without a verdict is in one."""
    draw = random.Random(0)
    for _ in range(200):
        scores = [draw.choice((None, 0.0, 0.25, 0.5, 0.75)) for _ in range(draw.randrange(7))]
        candidates = [Candidate("truth", REFERENCE), *scored(*scores)]
        selection = parse(name)(candidates, OPEN)
        assert selection.refused.get("no verdict", 0) == scores.count(None)
        ends = [(pair.win, pair.lose) for pair in selection.pairs]
        assert len(set(ends)) == len(ends)
        for pair in selection.pairs:
            win, lose = candidates[pair.win], candidates[pair.lose]
            assert lose.score is not None
            if parse(name).compares:
                assert pair.margin > 0 and win.score - lose.score == pytest.approx(pair.margin)
            else:
                assert pair.margin == 0


def test_filters_say_why():
    a, b = Candidate("A red  cup.", "policy", 1.0), Candidate("A cup.", "policy", 0.5)
    refusal = Filters(gap=0.5, length_ratio=2.0).refusal
    assert refusal(a, b, 0.5) == ""
    cases = {
        "identical texts": (a, Candidate("A red cup.", "policy", 0.0), 1.0),
        "tie": (a, Candidate("A cat.", "policy", 1.0), 0.0),
        "gap too small": (a, b, 0.4),
        "winner is unfinished": (Candidate("A cat sits", "policy", 1.0, finished=False), b, 0.5),
        "lengths too unlike": (Candidate("A cup on a table.", "policy", 1.0), b, 0.5),
    }
    assert {reason: refusal(*case) for reason, case in cases.items()} == {reason: reason for reason in cases}
    selection = parse("all_pairs")([a, b, Candidate("A cup.", "policy", 0.25), Candidate("?", "policy")], Filters(gap=0.6))
    assert [(pair.win, pair.lose) for pair in selection.pairs] == [(0, 2)]
    assert selection.refused == {"no verdict": 1, "gap too small": 1, "identical texts": 1}


def test_pairs_are_few_and_spread():
    candidates = scored(*range(8))
    ends = list(itertools.chain.from_iterable(edge[:2] for edge in edges("all_pairs(4)", candidates)))
    assert sorted(ends) == list(range(8))


def labels(text, candidates, filters=OPEN):
    found = parse(text)(candidates, filters)
    assert not found.pairs and not found.groups and found.rows == len(found.labels)
    return [(label.answer, label.desirable) for label in found.labels], found.refused


def test_every_answer_by_itself_against_a_threshold():
    assert labels("unpaired", scored(0.5, 0.2, None, 1.0)) == ([(0, True), (1, False), (3, True)], {"no verdict": 1})
    assert labels("unpaired(0.9)", scored(0.5, 1.0)) == ([(0, False), (1, True)], {})
    assert labels("unpaired", scored(0.5)) == ([(0, True)], {}) and labels("unpaired", []) == ([], {})
    # at the threshold is no tie, but no distance either
    assert labels("unpaired", scored(0.5, 0.1), Filters(gap=0.2, unfinished=True)) == ([(1, False)], {"gap too small": 1})


def test_every_answer_by_itself_against_the_mean():
    assert labels("unpaired(by=mean)", scored(3.0, 1.0, 2.0)) == ([(0, True), (1, False)], {"tie": 1})
    assert labels("unpaired(by=mean)", scored(0.1, 0.1, 0.1)) == ([], {"tie": 3})
    assert labels("unpaired(by=mean)", scored(3.0, None, 1.0)) == ([(0, True), (2, False)], {"no verdict": 1})


def test_filters_of_answers_by_themselves():
    texts = ("a b c d", "a  b c d", "e f g", "h", "i j k l")
    candidates = [Candidate(text, "policy", number / 4, finished=number != 4) for number, text in enumerate(texts)]
    found = labels("unpaired", candidates, Filters(length_ratio=2.0))
    assert found == ([(0, False), (2, True)], {"identical texts": 1, "lengths too unlike": 1, "desirable answer is unfinished": 1})


def test_a_group_is_the_first_answers_with_their_scores():
    def groups(text, candidates, filters=OPEN, asked=0):
        found = parse(text)(candidates, filters, asked)
        assert not found.pairs and not found.labels and found.rows == len(found.groups) <= 1
        return [one.answers for one in found.groups], found.refused

    assert groups("group", scored(1.0, 0.0, 1.0)) == ([(0, 1, 2)], {})
    assert groups("group", scored(1.0, 0.0), asked=3) == ([], {"group is not whole": 1})  # one was out of tokens
    assert groups("group(2)", scored(None, 0.0, 1.0, 2.0), asked=5) == ([(1, 2)], {"no verdict": 1})
    assert groups("group", scored(None, 0.0, 1.0)) == ([], {"no verdict": 1, "group is not whole": 1})
    assert groups("group", scored(1.0)) == ([], {"group is not whole": 1})
    assert groups("group", scored(1.0, 1.0)) == ([], {"tie": 1})
    assert groups("group", scored(1.0, 0.5), Filters(gap=0.6)) == ([], {"gap too small": 1})
    same = [Candidate("a cup", "policy", 1.0), Candidate("a  cup", "policy", 0.5)]
    assert groups("group", same) == ([], {"identical texts": 1})
    assert groups("group", [*same, Candidate("a cup on it", "policy", 0.0)], Filters(length_ratio=2.0)) == ([(0, 1, 2)], {})
    assert groups("group", [*same, Candidate("a cup on a table", "policy", 0.0)], Filters(length_ratio=2.0)) == ([], {"lengths too unlike": 1})


def test_how_many_answers_a_selector_takes():
    least = {"best_worst": 2, "unpaired": 1, "unpaired(by=mean)": 2, "group": 2, "group(5)": 5}
    assert {text: parse(text).least for text in least} == least
    assert [parse(text).makes for text in ("all_pairs", "unpaired", "group")] == ["prefs", "labels", "groups"]


def test_mistakes():
    with pytest.raises(UserError, match="config.build.selector: no selector 'best_wurst'. Did you mean best_worst?"):
        parse("best_wurst", "config.build.selector")
    with pytest.raises(UserError, match="all_pairs: most must be a whole number"):
        parse("all_pairs(-1)")
    with pytest.raises(UserError, match="config.s: group: one answer is ranked with nothing"):
        parse("group(1)", "config.s")
    with pytest.raises(UserError, match="unpaired: by must be threshold or mean"):
        parse("unpaired(by=median)")
