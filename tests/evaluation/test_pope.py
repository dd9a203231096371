import json

import pytest

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.evaluation import pope
from mmalign_jax.evaluation.pope import Question

VOCABULARY = ("cat", "dog", "bus", "sofa", "fork", "kite", "pear")
TRUTH = (
    ("a.jpg", ("cat", "sofa")),
    ("b.jpg", ("dog", "sofa", "cat", "bus")),
    ("c.jpg", ("dog",)),
    ("d.jpg", ("cat", "fork")),
)


def ask(name: str) -> str:
    return f"Is there a {name}?"


def build(truth=TRUTH, **changes) -> tuple[Question, ...]:
    return pope.build_questions(truth, **({"seed": 0, "vocabulary": VOCABULARY, "question": ask} | changes))


def asked(questions, split: str, image: str) -> list[tuple[str, bool]]:
    return [(question.object, question.label) for question in questions if question.split == split and question.image_id == image]


@pytest.mark.parametrize(
    "answer, yes",
    [
        ("No.", False),
        ("no", False),
        ("No, there is a dog.", False),
        ("No,there is", True),  # the comma goes, the words grow together
        ("There is not a cat.", False),
        ("Yes, there is no doubt.", False),
        ("Yes. There is no cat.", True),  # only the first sentence
        ("Nothing there.", True),
        ("NO.", True),
        ("No\nit is", True),
        ("None", True),
        ("", True),
        (". No", True),
        ("There isn't one.", True),
        ("yes", True),
    ],
)
def test_parser(answer, yes):
    assert pope.parse(answer) is yes


@pytest.mark.parametrize(
    "answer, neither", [("", True), ("Nothing.", True), ("NO.", True), ("YES!", False), ("no", False), ("Eyes.", True)]
)
def test_says_neither(answer, neither):
    assert pope.says_neither(answer) is neither


def test_positives_are_the_first_objects_and_labels_balance():
    questions = build()
    for split in pope.SPLITS:
        assert [name for name, yes in asked(questions, split, "b.jpg") if yes] == ["dog", "sofa", "cat"]
        assert [yes for _, yes in asked(questions, split, "b.jpg")] == [True, False] * 3
    assert sum(question.label for question in questions) * 2 == len(questions)


def test_negatives_are_absent_and_not_repeated():
    for question in build():
        assert question.label == (question.object in dict(TRUTH)[question.image_id])
        assert question.text == ask(question.object)
    for split in pope.SPLITS:
        for image, _ in TRUTH:
            names = [name for name, _ in asked(build(), split, image)]
            assert len(names) == len(set(names))


def test_popular_by_hand():
    # frequency: cat 3, dog 2, sofa 2, bus 1, fork 1, kite and pear 0
    questions = build()
    assert asked(questions, "popular", "a.jpg") == [("cat", True), ("dog", False), ("sofa", True), ("bus", False)]
    assert asked(questions, "popular", "c.jpg") == [("dog", True), ("cat", False)]
    assert asked(questions, "popular", "d.jpg") == [("cat", True), ("dog", False), ("fork", True), ("sofa", False)]


def test_adversarial_by_hand():
    # with cat: sofa 2, dog 1, bus 1, fork 1; with fork: cat 1; with dog: sofa 1, cat 1, bus 1
    questions = build()
    assert asked(questions, "adversarial", "c.jpg") == [("dog", True), ("sofa", False)]
    first, second, third, fourth = asked(questions, "adversarial", "d.jpg")
    assert (first, second, third) == (("cat", True), ("sofa", False), ("fork", True))
    assert fourth[0] in ("dog", "bus", "kite", "pear") and not fourth[1]  # nothing else comes with a fork: drawn


def test_statistics_of_other_images():
    questions = build(statistics=[("dog", "kite"), ("dog", "kite"), ("dog", "bus"), ("kite",)])
    assert asked(questions, "adversarial", "c.jpg") == [("dog", True), ("kite", False)]
    assert asked(questions, "popular", "a.jpg")[1] == ("dog", False)
    assert asked(questions, "popular", "c.jpg")[1] == ("kite", False)


def test_draws_depend_on_seed_and_image_alone():
    vocabulary = tuple(f"thing{number}" for number in range(200)) + VOCABULARY
    whole, again = build(vocabulary=vocabulary), build(vocabulary=vocabulary)
    assert whole == again
    alone = build(truth=TRUTH[2:3], vocabulary=vocabulary)
    assert asked(alone, "random", "c.jpg") == asked(whole, "random", "c.jpg")
    others = [asked(build(seed=seed, vocabulary=vocabulary), "random", "c.jpg") for seed in range(4)]
    assert len({tuple(one) for one in others}) > 1


def test_a_small_vocabulary_is_refused():
    with pytest.raises(UserError, match="b.jpg.*2 absent objects for 3"):
        build(vocabulary=VOCABULARY[:6])


def test_scores_by_hand():
    # random: yes->Yes, no->Yes, yes->No, no->No; popular: yes->Yes, no->No
    questions = [
        *(Question("a", "?", "", label, "random") for label in (True, False, True, False)),
        *(Question("a", "?", "", label, "popular") for label in (True, False)),
    ]
    scores = pope.score(questions, ["Yes.", "Certainly.", "No", "no", "Yes", "No."])
    assert list(scores) == ["random", "popular", "mean"]
    random = scores["random"]
    assert (random.accuracy, random.precision, random.recall, random.f1, random.yes_ratio) == pytest.approx((0.5, 0.5, 0.5, 0.5, 0.5))
    assert (random.questions, random.unparsed) == (4, 1)
    assert scores["popular"].accuracy == scores["popular"].f1 == 1.0
    mean = scores["mean"]
    assert (mean.accuracy, mean.precision, mean.f1) == pytest.approx((0.75, 0.75, 0.75))
    assert (mean.questions, mean.unparsed) == (6, 1)


def test_the_yes_ratio_is_of_predictions():
    questions = [Question("a", "?", "", label, "random") for label in (True, False, False)]
    scores = pope.score(questions, ["Yes"] * 3)["random"]
    assert (scores.yes_ratio, scores.recall) == (1.0, 1.0)
    assert scores.precision == pytest.approx(1 / 3)
    assert scores.f1 == pytest.approx(0.5)


def test_never_yes():
    questions = [Question("a", "?", "", label, "adversarial") for label in (True, False)]
    scores = pope.score(questions, ["No"] * 2)["adversarial"]
    assert (scores.accuracy, scores.precision, scores.recall, scores.f1, scores.yes_ratio) == (0.5, 0.0, 0.0, 0.0, 0.0)


def test_score_needs_questions_and_their_answers():
    with pytest.raises(ValueError):
        pope.score([], [])
    with pytest.raises(ValueError):
        pope.score([Question("a", "?", "", True, "random")], [])


def test_published_layout(tmp_path):
    file = tmp_path / "coco_pope_popular.json"
    file.write_text(
        '{"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a hot dog in the image?", "label": "yes"}\n'
        '{"question_id": 2, "image": "COCO_1.jpg", "text": "Is there an oven in the imange?", "label": "no"}\n'
        '{"question_id": "3", "image": "COCO_2.jpg", "text": "A cat?", "label": "no"}\n\n'
    )
    questions = pope.load(file)
    assert [(q.image_id, q.object, q.label, q.split) for q in questions] == [
        ("COCO_1.jpg", "hot dog", True, "popular"),
        ("COCO_1.jpg", "oven", False, "popular"),
        ("COCO_2.jpg", "", False, "popular"),
    ]
    assert pope.load(file, suffix=" Say yes or no.")[2].text == "A cat? Say yes or no."
    copy = tmp_path / "popular.json"
    pope.save(questions, copy)
    assert pope.load(copy) == questions
    assert json.loads(copy.read_text().splitlines()[1])["question_id"] == 2


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"image": "a", "text": "b", "label": "maybe"}', '{"image": 3, "text": "b", "label": "yes"}', ""]
)
def test_bad_files_are_named(tmp_path, line):
    file = tmp_path / "pope_random.json"
    file.write_text('\n{"image": "a", "text": "b", "label": "yes"}\n' * bool(line) + line)
    with pytest.raises(DataError, match="pope_random.json(, row 3)?:"):
        pope.load(file)


def test_the_files_name_says_the_split(tmp_path):
    (tmp_path / "pope.json").write_text("")
    with pytest.raises(UserError, match="must hold one of random"):
        pope.load(tmp_path / "pope.json")
    with pytest.raises(UserError, match="no such file"):
        pope.load(tmp_path / "random.json")


def test_save_keeps_splits_apart(tmp_path):
    with pytest.raises(ValueError):
        pope.save(build(), tmp_path / "all.json")
