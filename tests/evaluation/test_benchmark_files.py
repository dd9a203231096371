import json

import pytest

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.evaluation.benchmark import measure
from mmalign_jax.evaluation.files import chair_benchmark, pope_benchmark
from mmalign_jax.evaluation.generate import Answered

QUESTIONS = [("a.png", "Is there a cat in the image?", "yes"), ("a.png", "Is there a dog in the image?", "no")]


@pytest.fixture
def root(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(name.encode())
    (tmp_path / "secret.png").write_bytes(b"secret")
    return tmp_path


def write_pope(root, split, questions=QUESTIONS):
    folder = root / "pope"
    folder.mkdir(exist_ok=True)
    rows = [{"question_id": n, "image": i, "text": t, "label": y} for n, (i, t, y) in enumerate(questions, 1)]
    (folder / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_chair(root, *rows, synonyms=None):
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "synonyms.json").write_text(json.dumps({"cat": ["kitten"], "dog": []} if synonyms is None else synonyms))
    return root / "rows.jsonl", root / "images", root / "synonyms.json"


def test_pope_from_a_directory(root):
    write_pope(
        root, "popular", [*QUESTIONS, ("b.png", "Is there a dog in the image?", "yes"), ("b.png", "Is there a cat in the image?", "no")]
    )
    test = pope_benchmark(write_pope(root, "random"), root / "images", suffix=" Shortly.")
    assert [question.split for question in test.questions] == ["popular"] * 4 + ["random"] * 2
    assert len(test.question_records) == 4 and test.record_of == (0, 1, 2, 3, 0, 1)
    assert test.question_records[0].turns[0].parts[1].text == "Is there a cat in the image? Shortly."
    assert test.question_records[2].media[0].data == b"b.png"
    result = measure([test], lambda records: [Answered("Yes", 1, True)] * len(records))["pope"]["pope"]
    assert list(result) == ["random", "popular", "mean"]
    assert result["popular"]["questions"] == 4 and result["mean"]["accuracy"]["value"] == 0.5


def test_pope_one_file(root):
    test = pope_benchmark(write_pope(root, "adversarial") / "coco_pope_adversarial.json", root / "images")
    assert [question.label for question in test.questions] == [True, False]


def test_pope_two_files_of_a_split(root):
    folder = write_pope(root, "random")
    (folder / "random.jsonl").write_bytes((folder / "coco_pope_random.json").read_bytes())
    with pytest.raises(UserError, match="two files of the same split"):
        pope_benchmark(folder, root / "images")


@pytest.mark.parametrize("image, problem", [("../secret.png", "leaves the directory"), ("c.png", "no image file")])
def test_images_stay_under_their_root(root, image, problem):
    with pytest.raises(DataError, match=f"coco_pope_random.json.*{problem}"):
        pope_benchmark(write_pope(root, "random", [(image, "Is there a cat in the image?", "yes")]), root / "images")
    data = write_chair(root, {"id": "1", "image": image, "objects": []})
    with pytest.raises(DataError, match=f"rows.jsonl, row 1.*{problem}"):
        chair_benchmark(*data, prompt="Describe.")


def test_chair(root):
    data = write_chair(root, {"id": "1", "image": "a.png", "objects": ["kitten"]}, {"id": "2", "image": "b.png", "objects": []})
    test = chair_benchmark(*data, prompt="Describe.")
    assert test.truths == (("cat",), ())
    assert [part.text for part in test.captions[0].turns[0].parts] == [None, "Describe."]
    result = measure([test], lambda records: [Answered("A cat and a dog.", 5, True)] * len(records))["chair"]["chair"]
    assert result["chair_i"]["value"] == 0.75 and result["chair_s"]["value"] == 1.0 and result["recall"]["value"] == 1.0


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"id": "1", "image": "a.png"}, "not a row of CHAIR"),
        ({"id": 1, "image": "a.png", "objects": []}, "not a row of CHAIR"),
        ({"id": "1", "image": "a.png", "objects": "cat"}, "not a row of CHAIR"),
        ({"id": "1", "image": "a.png", "objects": ["zebra"]}, "'zebra' is in no row"),
        ([], "not a row of CHAIR"),
    ],
)
def test_chair_rows_are_checked(root, row, problem):
    with pytest.raises(DataError, match=f"rows.jsonl, row 1: .*{problem}"):
        chair_benchmark(*write_chair(root, row), prompt="Describe.")


def test_chair_needs_rows_and_single_ids(root):
    with pytest.raises(DataError, match="no row"):
        chair_benchmark(*write_chair(root), prompt="Describe.")
    row = {"id": "1", "image": "a.png", "objects": []}
    with pytest.raises(DataError, match="same id"):
        chair_benchmark(*write_chair(root, row, row), prompt="Describe.")


@pytest.mark.parametrize("table", [[], {"cat": "kitten"}, {"cat": [1]}])
def test_the_table_is_checked(root, table):
    with pytest.raises(UserError, match="synonyms.json: not a table"):
        chair_benchmark(*write_chair(root, synonyms=table), prompt="Describe.")
