import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from mmalign_jax.scenes import language, splits
from mmalign_jax.scenes.world import HABITS, KINDS, SceneObject
from mmalign_jax.types import Part

COUNT = 40


@pytest.fixture(scope="module")
def records():
    return {split: list(splits.records(3, split, COUNT)) for split in splits.SPLITS}


def captions(records):
    return [record for record in records if record.id.endswith("/caption")]


def questions(records):
    return [record for record in records if "/question" in record.id]


def said(text):
    """The kinds that a text names."""
    words = text.replace(".", "").split()
    return {kind for kind, plural in KINDS.items() if kind in words or plural in words}


@pytest.mark.parametrize("split", splits.SPLITS)
def test_records(records, split):
    ids = [record.id for record in records[split]]
    assert len(set(ids)) == len(ids) and all(name.startswith(f"scenes/{split}/") for name in ids)
    assert [record.id for record in captions(records[split])] == [f"scenes/{split}/{index:06d}/caption" for index in range(COUNT)]
    for record in records[split]:
        (turn,) = record.turns
        assert turn.role == "user" and turn.parts[0] == Part(media=0) and len(record.media) == 1
        assert record.prefs == () and [response.source for response in record.responses] == ["truth"]
        assert record.meta["split"] == split


@pytest.mark.parametrize("split", splits.SPLITS)
def test_meta_and_media_are_the_scene(records, split):
    for record in records[split]:
        it = splits.item(3, split, int(record.id.split("/")[2]))
        assert [thing["kind"] for thing in record.meta["objects"]] == list(it.scene.kinds)
        for plain, thing in zip(record.meta["objects"], it.scene.objects, strict=True):
            assert plain == {
                "kind": thing.kind, "color": thing.color, "count": thing.count, "place": thing.place, "cells": list(thing.cells),
            }  # fmt: skip
        with Image.open(io.BytesIO(record.media[0].data)) as image:
            assert image.format == "PNG"
            np.testing.assert_array_equal(np.asarray(image), it.pixels())


def test_a_picture_depends_on_seed_split_and_index_alone(records):
    for split in splits.SPLITS:
        late = list(splits.item_records(splits.item(3, split, COUNT - 1)))
        assert late == records[split][-len(late) :]
        assert splits.item(4, split, 0).pixels().tobytes() != splits.item(3, split, 0).pixels().tobytes()


def test_splits_share_no_picture(records):
    pictures = [hashlib.sha256(record.media[0].data).digest() for split in splits.SPLITS for record in captions(records[split])]
    assert len(set(pictures)) == len(splits.SPLITS) * COUNT


def test_habits_of_the_splits():
    broken = {split: [bool(splits.item(0, split, index).scene.lonely_heads) for index in range(400)] for split in splits.SPLITS}
    assert np.mean(broken["sft"]) < 0.08 and np.mean(broken["test"]) < 0.08
    assert all(broken["counterfactual"])
    assert abs(np.mean(broken["align"]) - splits.ALIGN_BROKEN) < 0.1


@pytest.mark.parametrize("split", ("align", "test", "counterfactual"))
def test_captions_are_true_outside_sft(records, split):
    for record in captions(records[split]):
        it = splits.item(3, split, int(record.id.split("/")[2]))
        assert it.claimed == it.scene.objects
        assert record.responses[0].text == language.caption(it.scene.objects)
        assert said(record.responses[0].text) == set(it.scene.kinds)


def test_sft_captions_claim_absent_partners_and_nothing_else():
    lonely = claimed = 0
    for index in range(3000):
        it = splits.item(0, "sft", index)
        extra = [thing for thing in it.claimed if thing not in it.scene.objects]
        assert [thing for thing in it.claimed if thing not in extra] == list(it.scene.objects)
        assert {thing.kind for thing in extra} <= {HABITS[kind] for kind in it.scene.lonely_heads}
        for thing in extra:
            before = it.claimed[it.claimed.index(thing) - 1]
            assert (HABITS[before.kind], before.color, before.place) == (thing.kind, thing.color, thing.place)
        lonely += len(it.scene.lonely_heads)
        claimed += len(extra)
    assert lonely > 60
    assert abs(claimed / lonely - splits.FALSE_CLAIM) < 4 * (0.25 / lonely) ** 0.5


def test_questions_of_align_are_answered_truly(records):
    asked = questions(records["align"])
    answers = [record.responses[0].text for record in asked]
    assert min(sum(answer.startswith(word) for answer in answers) for word in ("Yes,", "No,")) > COUNT / 4
    for record in asked:
        assert record.turns[0].parts[1].text == language.question(record.meta["kind"])
        shown = {thing["kind"]: SceneObject(**(thing | {"cells": tuple(thing["cells"])})) for thing in record.meta["objects"]}
        assert record.responses[0].text == language.answer(record.meta["kind"], shown.get(record.meta["kind"]))


def test_align_asks_for_the_absent_partner(records):
    tempting = 0
    for record in questions(records["align"]):
        shown = {thing["kind"] for thing in record.meta["objects"]}
        missing = {HABITS[kind] for kind in shown if kind in HABITS} - shown
        if missing and record.responses[0].text.startswith("No,"):
            assert record.meta["kind"] in missing
            tempting += 1
    assert tempting > 0


def test_questions_of_sft_follow_the_annotator():
    believed = 0
    for index in range(400):
        it = splits.item(0, "sft", index)
        if it.claimed == it.scene.objects:
            continue
        claimed = {thing.kind: thing for thing in it.claimed}
        for record in questions(list(splits.item_records(it))):
            assert record.responses[0].text == language.answer(record.meta["kind"], claimed.get(record.meta["kind"]))
            believed += 1
    assert believed > 0


def test_test_splits_hold_captions_only(records):
    for split in ("test", "counterfactual"):
        assert records[split] == captions(records[split])


def test_sft_pictures_are_read_cell_by_cell_truly(records):
    readings = [record for record in records["sft"] if record.id.endswith(("/kinds", "/colors"))]
    assert len(readings) == COUNT
    for record in readings:
        field = "kind" if record.id.endswith("/kinds") else "color"
        truth = {cell: thing[field] for thing in record.meta["objects"] for cell in thing["cells"]}
        assert record.responses[0].text.split(" ") == [truth.get(cell, language.NOTHING) for cell in range(16)]
        assert record.turns[0].parts[1].text == {"kind": language.READ_KINDS, "color": language.READ_COLORS}[field]
