import dataclasses
import json

import pytest

from mmalign_jax.config import ScenesConfig
from mmalign_jax.evaluation import pope, world
from mmalign_jax.evaluation.generate import Answered
from mmalign_jax.report.records import score_cells
from mmalign_jax.scenes import language
from mmalign_jax.scenes.world import HABITS, KINDS

SCENES = ScenesConfig(seed=5, test=12)


@pytest.fixture(scope="module")
def tests():
    return world.make_tests(SCENES, ("chair", "pope"))


def truthful(records):
    return [Answered(record.responses[0].text.capitalize(), 3, True) for record in records]


def believer(records):
    """Claims the partner of every head, as a model does that learned the habit."""
    out = []
    for record in records:
        kinds = world.objects_of(record)
        believed = {*kinds, *(HABITS[kind] for kind in kinds if kind in HABITS)}
        prompt = record.turns[0].parts[1].text
        if prompt == language.DESCRIBE:
            out.append(Answered(" and ".join(f"a {kind}" for kind in sorted(believed)), 20, False))
        else:
            (asked,) = (kind for kind in KINDS if prompt == language.question(kind))
            out.append(Answered("Yes." if asked in believed else "No.", 2, True))
    return out


def test_two_splits_with_exact_truth(tests):
    assert [test.name for test in tests] == ["counterfactual", "test"]
    for test in tests:
        assert len(test.captions) == SCENES.test
        assert tuple(map(world.objects_of, test.captions)) == test.truths
        for question, number in zip(test.questions, test.record_of, strict=True):
            record = test.question_records[number]
            assert (question.object in world.objects_of(record)) == question.label
            assert [part.text for part in record.turns[0].parts] == [None, question.text]
            assert record.media[0].origin == question.image_id
        assert {record.media for record in test.question_records} <= {record.media for record in test.captions}


def test_a_question_that_splits_share_is_asked_once(tests):
    for test in tests:
        asked = [(record.media[0].origin, record.turns[0].parts[1].text) for record in test.question_records]
        assert len(asked) == len(set(asked)) < len(test.questions)
        assert len({record.id for record in test.question_records}) == len(asked)


def test_adversarial_questions_tempt_with_the_partner():
    """On habit-breaking pictures, too: what comes together is counted on usual ones, of which it takes a few dozen."""
    counterfactual = world.make_tests(dataclasses.replace(SCENES, test=60), ("pope",))[0]
    shown, absent = {}, {}
    for q in counterfactual.questions:
        if q.split == "adversarial":
            (shown if q.label else absent).setdefault(q.image_id, set()).add(q.object)
    heads = [(image, head) for image, objects in shown.items() for head in objects if head in HABITS]
    assert len(heads) >= 60 and all(HABITS[head] in absent[image] for image, head in heads)


def test_the_same_seed_gives_the_same_test(tests):
    assert world.make_tests(SCENES, ("chair", "pope")) == tests
    assert world.make_tests(dataclasses.replace(SCENES, seed=6), ("pope",)) != world.make_tests(SCENES, ("pope",))


def test_only_what_is_asked_for(tests):
    only_chair, only_pope = world.make_tests(SCENES, ("chair",))[0], world.make_tests(SCENES, ("pope",))[0]
    assert only_chair.captions == tests[0].captions and not only_chair.questions and not only_chair.question_records
    assert only_pope.questions == tests[0].questions and not only_pope.captions
    assert set(world.measure([only_chair], truthful)["counterfactual"]) == {"title", "chair", "captions"}
    result = world.measure([only_pope], truthful)
    assert set(result["counterfactual"]) == {"title", "pope", "answers"}
    assert not [row for row in world.rows(None, result) if "POPE" not in row.name]


def test_a_truthful_model(tests):
    for result in world.measure(tests, truthful).values():
        assert [result["chair"][name]["value"] for name in ("chair_i", "chair_s", "recall")] == [0.0, 0.0, 1.0]
        for split in (*pope.SPLITS, "mean"):
            scores = result["pope"][split]
            assert scores["accuracy"] == scores["f1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
            assert scores["yes_ratio"]["value"] == 0.5 and scores["unparsed"] == scores["unfinished"] == 0
        assert result["pope"]["mean"]["questions"] == 3 * result["pope"]["random"]["questions"]


def test_a_model_of_habit_fails_where_the_habit_is_broken(tests):
    counterfactual, usual = world.measure(tests, believer).values()
    assert counterfactual["chair"]["chair_s"]["value"] == 1.0 > usual["chair"]["chair_s"]["value"]
    assert counterfactual["chair"]["recall"]["value"] == 1.0
    assert counterfactual["pope"]["adversarial"]["accuracy"]["value"] < usual["pope"]["adversarial"]["accuracy"]["value"]
    assert counterfactual["pope"]["adversarial"]["accuracy"]["value"] < counterfactual["pope"]["random"]["accuracy"]["value"]
    wrong = sum(kind in HABITS for truth in tests[0].truths for kind in truth)
    assert counterfactual["chair"]["hallucinated_mentions"] == wrong
    assert counterfactual["chair"]["unfinished"] == SCENES.test


def test_result_is_json_and_lists_every_answer(tests):
    result = world.measure(tests, believer)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for test in tests:
        assert [item["id"] for item in result[test.name]["captions"]] == [record.id for record in test.captions]
        assert set(result[test.name]["captions"][0]) == {"id", "text", "tokens", "finished"}
        assert [item["id"] for item in result[test.name]["answers"]] == [record.id for record in test.question_records]
        assert {item["truth"] for item in result[test.name]["answers"]} == {"yes", "no"}


def test_rows(tests):
    before, after = world.measure(tests, believer), world.measure(tests, truthful)
    rows = world.rows(before, after)
    names = [row.name for row in rows if row.group == world.TITLES["counterfactual"]]
    assert names == [
        "CHAIR_i", "CHAIR_s", "Object recall", "Words per caption", "Unfinished captions",
        "POPE accuracy", "POPE precision", "POPE recall", "POPE F1", "POPE yes-ratio",
        "POPE accuracy, random", "POPE accuracy, popular", "POPE accuracy, adversarial",
    ]  # fmt: skip
    by_name = {row.name: row for row in rows if row.group == world.TITLES["counterfactual"]}
    assert score_cells(by_name["CHAIR_s"])[1:] == ("100.0% [100.0, 100.0]", "0.0% [0.0, 0.0]", "-100.0 pp")
    assert [by_name[name].better for name in ("CHAIR_i", "Object recall", "POPE yes-ratio")] == ["lower", "higher", ""]
    assert (by_name["Unfinished captions"].before.value, by_name["Unfinished captions"].after.value) == (12, 0)
    alone = world.rows(None, after)
    assert all(row.before is None for row in alone) and "Unfinished captions" not in {row.name for row in alone}
    assert list(dict.fromkeys(row.group for row in rows)) == list(world.TITLES.values())


def test_hallucinated():
    assert world.hallucinated("There are two red cups and a Spoon.", ("cup",)) == ("Spoon",)
