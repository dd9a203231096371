"""Pairs that share a row: none is lost, all fit, and every process finds the same rows."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers.rows import LetterPictures, LetterProcessor, encoded, record

from mmalign_jax.config import DataConfig
from mmalign_jax.data import packed_rows, packing
from mmalign_jax.data.loader import make_loader
from mmalign_jax.data.packing import Chosen, PackedShape, choose, deal, pack
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import UserError
from mmalign_jax.training.packed import check_packed, in_words
from mmalign_jax.types import FIRST_ANSWER, PAD, PREFIX, Media, Response

RANDOM = np.random.default_rng(0)


def words(least, most):
    return "".join(map(chr, RANDOM.integers(97, 123, RANDOM.integers(least, most))))


def rows():
    """Pairs with a picture, two of them with the same one, with two pictures, and with none; of unlike lengths."""
    for number in range(40):
        shown = (number // 2 % 7,) if number % 4 < 2 else (number % 5, 8) if number % 8 == 3 else ()
        media = tuple(Media("image", encoded((index * 30, 10, 200))) for index in shown)
        made = record(f"r{number}", words(1, 30), images=len(media), media=media, responses=(Response(words(1, 25)), Response(words(1, 25))))
        yield dataclasses.replace(made, prefs=(dataclasses.replace(made.prefs[0], margin=float(number)),))


RECORDS = list(rows())
PLAN = plan_rows(RECORDS, LetterProcessor(), DataConfig(), answers=2)


def cost(shape):
    return shape.rows * (shape.prefix_slots + 2 * shape.answer_slots + (shape.prefix_slots / 50) ** 2) + shape.tiles


def loader(packed=cost, **settings):
    return make_loader(RECORDS, LetterProcessor(), PLAN, **{"batch_size": 16, "seed": 3, "workers": 2, "devices": 2} | settings, packed=packed)


def pairs_of(batch):
    """In the order of their keys: the tokens of the prefix and of each answer, the pictures that the prefix shows, and the margin."""
    found = []
    for part, group in np.ndindex(batch.picture.shape[:2]):
        (rows, own), groups = (batch.picture.shape[2], batch.record_key.shape[1] // batch.picture.shape[1]), batch.picture.shape[1]
        for pair in range(own):
            at = part, group * own + pair
            place = pair if batch.place is None else int(batch.place[part, group, pair])
            row, segment = (place, None) if batch.place is None else divmod(place, own)
            row_of_all = group * rows + row
            inside = batch.role[part, row_of_all] != PAD
            if segment is not None:
                inside &= batch.segment[part, row_of_all] == segment
            role = batch.role[part, row_of_all][inside]
            take = lambda name: getattr(batch, name)[part, row_of_all][inside]  # noqa: B023, E731
            images = batch.images[part, group * (batch.images.shape[1] // groups) + batch.picture[part, group, row]]
            index = take("image_index")
            shown = [images[tile].tobytes() for tile in dict.fromkeys((index[index >= 0] // 3).tolist())]
            arrays = [take(name).tolist() for name in ("tokens", "positions", "token_weight")]
            found.append((int(batch.record_key[at]), role.tolist(), arrays, (index % 3).tolist(), shown, float(batch.margin[at])))
    return sorted(found)


def separate(batch, parts=1, devices=2):
    """Rows with pictures of their own, told as where they share."""
    if batch.picture is not None:
        return batch
    own = 16 // parts // devices
    return dataclasses.replace(batch, picture=np.broadcast_to(np.arange(own), (parts, devices, own)))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(packed_rows, "TRIED_STEPS", 12)


def test_the_largest_go_first_and_nothing_overflows():
    sizes = np.array([[6, 1], [5, 1], [4, 1], [3, 1], [2, 1]])
    assert pack(sizes, 2, (10, 3)).tolist() in ([0, 1, 1, 0, 1], [0, 1, 0, 1, 1])
    assert pack(sizes, 2, (10, 2)) is None and pack(sizes, 1, (20, 5)).tolist() == [0] * 5
    assert pack(sizes, 2, (9, 5)) is None  # 20 of 18
    assert pack(sizes, 5, (6, 1)).tolist() == [0, 1, 2, 3, 4] and pack(sizes, 4, (5, 9)) is None
    many = np.random.default_rng(1).integers(1, 40, (60, 3))
    row = pack(many, 12, (130, 130, 130))
    held = np.stack([many[row == number].sum(axis=0) for number in range(12)])
    assert held.max() <= 130 and held.sum() == many.sum() and pack(many, 12, (130, 130, 130)).tolist() == row.tolist()


def test_pairs_are_dealt_evenly():
    sizes = np.random.default_rng(2).lognormal(4, 0.7, (64, 3)).astype(int)
    dealt = deal(sizes, 8)
    assert dealt.shape == (8, 8) and sorted(dealt.ravel()) == list(range(64)) and (np.diff(dealt, axis=1) > 0).all()
    even, as_they_come = (sizes[order].sum(axis=1) for order in (dealt, np.arange(64).reshape(8, 8)))
    assert (even.max(axis=0) / even.mean(axis=0)).max() < 1.1 < (as_they_come.max(axis=0) / as_they_come.mean(axis=0)).min()


def test_shapes_hold_what_they_say_and_each_saves_enough():
    sizes = np.random.default_rng(3).lognormal(3, 0.8, (16, 2, 8, 3)).astype(int) + 1
    tiles = np.random.default_rng(4).integers(2, 9, 16)
    longest = int(sizes[..., 0].max()) + 1, int(sizes[..., 1:].max()) + 1
    last = PackedShape(8, *longest, 16, longest)
    found = choose(sizes, tiles, last, cost)
    assert found.shapes[-1] == last and 1 < len(found.shapes) <= packing.MOST_SHAPES and sum(found.used) == pytest.approx(1)
    assert [cost(shape) for shape in found.shapes] == sorted(map(cost, found.shapes))
    assert found.cost < 0.6 and found.empty < 0.4
    attention = lambda *slots: "blocks"  # noqa: E731
    lines = list(in_words(found, 2, attention))
    assert lines[0].startswith(f"8 pairs of a device share rows: {found.empty:.0%} of the slots are empty") and len(lines) == 1 + len(found.shapes)
    little = dataclasses.replace(found, mean=0.96 * found.alone)
    assert list(in_words(little, 2, attention))[1] == "  That is little less; rows of one pair in buckets (config.data.buckets) may cost less"


def test_what_is_told_of_the_shapes_is_what_the_steps_take():
    """Also of the spare one, which is sized by the largest step, whichever shape that one took."""
    sizes, tiles = np.random.default_rng(5).lognormal(3, 0.3, (24, 2, 8, 3)).astype(int) + 1, np.full(24, 4)
    sizes[7], tiles[7] = 2 * sizes[7], 6
    last = PackedShape(8, 300, 300, 12, (300, 300))
    found = choose(sizes, tiles, last, cost)
    fits = lambda shape, step: tiles[step] <= shape.tiles and all(  # noqa: E731
        pack(group, shape.rows, (shape.prefix_slots, shape.answer_slots, shape.answer_slots)) is not None for group in sizes[step]
    )
    taken = [next(shape for shape in found.shapes if fits(shape, step)) for step in range(24)]
    assert found.used == tuple(taken.count(shape) / 24 for shape in found.shapes)
    assert found.mean == pytest.approx(np.mean([cost(shape) for shape in taken]))
    slots = [2 * shape.rows * (shape.prefix_slots + 2 * shape.answer_slots) for shape in taken]
    assert found.empty == pytest.approx(np.mean([1 - sizes[step].sum() / slots[step] for step in range(24)]))
    *_, spare, _ = found.shapes
    needed = -(-sizes.sum(axis=2).max(axis=(0, 1)) // spare.rows)
    assert spare.prefix_slots >= 1.2 * needed[0] and spare.answer_slots >= 1.2 * needed[1:].max() and spare.tiles == 8
    assert taken[7] != last


@pytest.mark.parametrize(("parts", "devices"), [(1, 2), (2, 2), (1, 1)])
def test_a_step_has_the_pairs_that_it_has_without_packing(parts, devices):
    """With their tokens, positions, pictures and margins, each once, in rows that hold several."""
    together, alone = loader(devices=devices, accumulate=parts), loader(None, devices=devices, accumulate=parts)
    assert len(together.packing.shapes) > 1
    for _ in range(5):
        one, other = next(together), next(alone)
        other = separate(other, parts, devices)
        assert one.record_key.shape == other.record_key.shape == (parts, 16 // parts) and one.tokens.shape[1] < 16 // parts
        assert pairs_of(one) == pairs_of(other) and len(pairs_of(one)) == 16
        assert (one.role == PAD).mean() < (0.7 if parts == 1 else 0.8) * (other.role == PAD).mean()  # 4 pairs of a device leave less choice
        # a region holds its own parts alone, and everything off the pairs is empty
        p, r = one.prefix_slots, one.answer_slots
        assert set(np.unique(one.role[..., :p])) <= {PAD, PREFIX} and set(np.unique(one.role[..., p : p + r])) <= {PAD, FIRST_ANSWER}
        assert ((one.segment >= 0) == (one.role != PAD)).all()
        for name, filler in (("tokens", 0), ("image_index", -1), ("token_weight", 0)):
            assert (getattr(one, name)[one.role == PAD] == filler).all(), name


def test_a_part_of_a_step_has_the_pairs_that_it_has_without_packing():
    """And each says which one it is there."""
    for one, other in itertools.islice(zip(loader(accumulate=2), loader(None, accumulate=2), strict=True), 4):
        assert not np.array_equal(one.record_key, other.record_key)
        np.testing.assert_array_equal(np.take_along_axis(one.record_key, np.argsort(one.turn, axis=1), axis=1), other.record_key)


def test_no_region_takes_more_than_its_room():
    some = loader()
    pairs = [some._rows[number] for number in range(16)]
    with pytest.raises(AssertionError, match="pairs of row 0 take more than the .* slots of part"):
        some._own.stack([(place._replace(row=0, shape=len(some.packing.shapes) - 1), row) for place, row in pairs])


def test_processes_agree_and_have_the_pairs_of_one():
    alone = loader(devices=4, accumulate=2)
    halves = [loader(devices=2, accumulate=2, process_index=index, process_count=2) for index in range(2)]
    assert all(half.packing.shapes == alone.packing.shapes for half in halves)
    for _ in range(5):
        together = jax.tree.map(lambda *some: np.concatenate(some, axis=1), *map(next, halves))
        jax.tree.map(np.testing.assert_array_equal, together, next(alone))


def test_what_begins_has_the_shape_of_what_comes_and_a_run_goes_on_either_way():
    """The position in the data is that of rows of one pair."""
    packed = loader()
    later = [next(packed) for _ in range(3)][2]
    for start in range(3):
        some = loader()
        some.set_state({**loader(None).get_state(), "rows": 16 * start})
        form, batch = some.begin(), next(some)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), form) == jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    jax.tree.map(np.testing.assert_array_equal, batch, later)
    assert packed.get_state() == loader(None).get_state() | {"rows": 48}


def test_a_step_that_fits_no_shape_takes_a_row_a_pair(monkeypatch):
    few = lambda sizes, tiles, last, cost: Chosen((PackedShape(1, 168, 120, 7, last.longest), last), (1.0, 0.0), 0.1, 1.0, 2.0)  # noqa: E731
    monkeypatch.setattr(packed_rows, "choose", few)
    batches = list(itertools.islice(loader(), 8))
    assert {batch.tokens.shape[1:] for batch in batches} == {(2, 408), (16, PLAN.layout.tokens)}
    alone = loader(None)
    assert all(pairs_of(batch) == pairs_of(separate(next(alone))) for batch in batches)


class OfPatches(LetterProcessor):
    traits = dataclasses.replace(LetterProcessor.traits, tile_features=0)


class Turning(LetterProcessor):
    traits = dataclasses.replace(LetterProcessor.traits, mrope=True)


class OfManyTiles(LetterProcessor):
    """Pictures take what their size asks for, in tiles of one size."""

    pictures = type("Pictures", (LetterPictures,), {"needs_size": True})()


@pytest.mark.parametrize(("processor", "message"), [(OfPatches(), "patches are those of one row"), (Turning(), "turn by time, row and column")])
def test_models_whose_rows_cannot_be_shared_are_refused(processor, message):
    with pytest.raises(UserError, match=f"config.data.packed: .*{message}"):
        check_packed(processor.traits, 2)


def test_pairs_share_rows_of_one_layout():
    check_packed(OfManyTiles.traits, 2)
    several = plan_rows(RECORDS, OfManyTiles(), DataConfig(), answers=2)
    assert len(several.buckets) > 1 == len(plan_rows(RECORDS, OfManyTiles(), DataConfig(packed=True), answers=2).buckets)
    with pytest.raises(ValueError, match="rows of several pairs have one layout, and the plan has"):
        make_loader(RECORDS, OfManyTiles(), several, batch_size=16, devices=2, packed=cost)


def test_a_pair_a_device_gains_nothing():
    check_packed(LetterProcessor.traits, 2)
    with pytest.raises(UserError, match="config.data.packed: a device has one pair of each part of a step"):
        check_packed(LetterProcessor.traits, 1)
