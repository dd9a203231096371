"""Rows that show the same pictures are given these once a device, whatever the split, and may be put side by side."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers.rows import LetterPictures, LetterProcessor, encoded, record

from mmalign_jax.config import DataConfig
from mmalign_jax.data.loader import bucket_pass, make_loader
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.data.shared_pictures import digest, places, sizes_for
from mmalign_jax.errors import UserError
from mmalign_jax.types import Media, Preference, record_key

PICTURES, PAIRS = 6, 4


def rows():
    """Pictures with four pairs each, two of them of one record; and two rows of text."""
    for number in range(PICTURES):
        media = (Media("image", encoded((number * 40, 10, 200))),)
        for name in range(PAIRS // 2):
            yield record(f"r{number}.{name}", media=media, prefs=(Preference(0, 1), Preference(1, 0)))
    for name in range(2):
        yield record(f"text{name}", images=0)


class CountingPictures(LetterPictures):
    """Says how many pictures were made."""

    def __init__(self):
        self.made = 0

    def pixels(self, frames, times=None):
        self.made += 1
        return super().pixels(frames, times)


class Counting(LetterProcessor):
    def __init__(self):
        self.pictures = CountingPictures()


RECORDS = list(rows())
PLAN = plan_rows(RECORDS, LetterProcessor(), DataConfig(), answers=2)


def loader(processor=None, **settings):
    processor = processor or LetterProcessor()
    return make_loader(RECORDS, processor, PLAN, **{"batch_size": 16, "seed": 3, "workers": 2, "order": "by_image"} | settings)


def apart(batch):
    """The same rows with pictures of their own, and no `picture`."""
    if batch.picture is None:
        return batch
    lead, (parts, groups, rows) = batch.images.shape[0], batch.picture.shape
    assert lead == parts
    grouped = batch.images.reshape(parts, groups, -1, *batch.images.shape[2:])
    images = np.stack([[grouped[a, g, batch.picture[a, g]] for g in range(groups)] for a in range(parts)])
    return dataclasses.replace(batch, images=images.reshape(parts, groups * rows, *batch.images.shape[2:]), picture=None)


def test_places_and_who_comes_first():
    place, first = places(np.array([[7, 7, 3, 7], [1, 2, 1, 2]]))
    assert place.tolist() == [[0, 0, 1, 0], [0, 1, 0, 1]]
    assert first.tolist() == [[True, False, True, False], [True, True, False, False]]


def test_sizes_are_few_and_worth_their_compilation():
    assert sizes_for([8, 8, 8, 7], 8) == (8,)  # one picture in 32
    assert sizes_for([4] * 9 + [8], 8) == (4, 8)
    assert sizes_for([1, 2, 3, 4, 5, 6, 7, 8] * 4, 8) == (2, 4, 8)
    assert sizes_for([2, 2], 8) == (2, 8)  # what comes later may have more


def test_digests_tell_pictures_apart():
    image = Media("image", encoded())
    video = [Media("video", frames=(encoded(), encoded((1, 2, 3))), times=times) for times in ((0.0, 1.0), (0.0, 2.0))]
    sets = [(), (image,), (image, image), *((one,) for one in video), (Media("image", encoded((1, 2, 3))),)]
    assert len({digest(media) for media in sets}) == len(sets)
    assert digest([image]) == digest([Media("image", encoded(), origin="elsewhere")])


def test_the_plan_knows_equal_pictures():
    assert collections.Counter(PLAN.pictures.tolist()) == {**dict.fromkeys(range(PICTURES), PAIRS), -1: 2}


@pytest.mark.parametrize(("parts", "devices"), [(1, 1), (2, 2), (1, 4)])
def test_shared_rows_are_the_separate_ones(parts, devices):
    """And the pictures are made once."""
    counting = Counting()
    shared, separate = loader(counting, accumulate=parts, devices=devices, workers=0), loader(accumulate=parts)
    assert len(shared.sizes) > 1 and separate.sizes == (1,)
    held = 0
    for _ in range(6):
        one, other = next(shared), next(separate)
        held += one.images.shape[0] * one.images.shape[1]
        jax.tree.map(np.testing.assert_array_equal, apart(one), other)
        if one.picture is not None:
            assert one.picture.shape == (parts, devices, 16 // (parts * devices)) and one.picture.max() < one.images.shape[1] // devices
    assert counting.pictures.made <= held < 0.8 * 6 * 16


def test_what_begins_has_the_shape_of_what_comes():
    """Of the first step, and of a later one, of fewer or more pictures."""
    seen = set()
    for step in range(6):
        some = loader(devices=2, accumulate=2)
        some.set_state(some.get_state() | {"rows": 16 * step})
        form = some.begin()
        batch = next(some)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), form) == jax.tree.map(lambda x: (x.shape, x.dtype), batch)
        seen.add(batch.picture is None)
    assert False in seen


def test_processes_agree_on_the_shape_and_have_the_rows_of_one():
    alone = loader(devices=4)
    parts = [loader(devices=2, process_index=index, process_count=2) for index in range(2)]
    assert all(part.sizes == alone.sizes for part in parts)
    for _ in range(6):
        together = jax.tree.map(lambda *halves: np.concatenate(halves, axis=1), *map(next, parts))
        jax.tree.map(np.testing.assert_array_equal, together, next(alone))


def test_a_set_without_equal_pictures_has_one_shape():
    alone = [record(f"r{number}", media=(Media("image", encoded((number * 20, 0, 0))),)) for number in range(8)]
    plan = plan_rows(alone, LetterProcessor(), DataConfig(), answers=2)
    lone = make_loader(alone, LetterProcessor(), plan, batch_size=8, devices=2)
    assert lone.sizes == (4,) and all(next(lone).picture is None for _ in range(3))


def test_by_image_every_row_comes_once_an_epoch_and_pictures_stay_together():
    order = loader(batch_size=1)
    numbers = np.array([int(next(order).record_key[0, 0]) for _ in range(3 * len(PLAN.items))]).reshape(3, -1)
    keys = [int(key) for key in numbers[0]]
    assert all(sorted(epoch) == sorted(keys) for epoch in numbers.tolist())
    assert len({tuple(epoch) for epoch in numbers.tolist()}) == 3
    picture = {record_key(RECORDS[index].id): number for (index, _), number in zip(PLAN.items, PLAN.pictures, strict=True)}
    for epoch in numbers.tolist():
        shown = [picture[key] for key in epoch]
        runs = 1 + sum(a != b for a, b in zip(shown[:-1], shown[1:], strict=True))
        assert runs in (PICTURES + 1, PICTURES + 2)  # a run each, and rows of text alone or by chance side by side


def test_a_state_of_another_order_is_refused():
    state = json.loads(json.dumps(loader().get_state()))
    loader().set_state(state)
    with pytest.raises(UserError, match="of another run"):
        loader(order="shuffled").set_state(state)
    with pytest.raises(UserError, match="of another run"):
        loader().set_state(loader(order="shuffled").get_state())


def test_a_pass_shares_pictures_too():
    members = np.asarray(PLAN.buckets[0].members)
    options = {"batch_size": 8, "workers": 2}
    separate = list(bucket_pass(RECORDS, LetterProcessor(), PLAN, members, **options))
    shared = list(bucket_pass(RECORDS, LetterProcessor(), PLAN, members, devices=2, **options))
    lead = lambda batch: jax.tree.map(lambda x: x[None], batch)  # noqa: E731
    for (one, numbers), (other, expected) in zip(shared, separate, strict=True):
        assert numbers.tolist() == expected.tolist()
        jax.tree.map(np.testing.assert_array_equal, apart(lead(one)), lead(other))
    assert sum(len(batch.images) for batch, _ in shared) < 0.7 * sum(len(batch.images) for batch, _ in separate)
    assert sorted(number for _, numbers in shared for number in numbers if number >= 0) == members.tolist()
