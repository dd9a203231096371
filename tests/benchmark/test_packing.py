"""The arithmetic of padding: nothing is empty where all rows are alike, and a packed row never costs less than its pairs."""

import pytest

from mmalign_jax.benchmark import packed_step
from mmalign_jax.benchmark.packing import SETS, analyse, best_fit, packed
from mmalign_jax.data.layout import RowSize
from mmalign_jax.models.presets import preset

MODEL = preset("llava-1.5-7b")


def size(prefix, *answers, tiles=1):
    return RowSize(prefix, tiles, (336, 336), 0, answers, (0, 0))


def test_best_fit_takes_the_fullest_row_that_has_room():
    # 6 | 5; 4 goes to 6, 3 to 5, 2 to the rest of 5
    assert best_fit([2, 3, 4, 5, 6], 10) == [0, 0]
    assert best_fit([6, 6, 3], 10) == [1, 4] and best_fit([10], 10) == [0]


def test_rows_that_are_alike_cost_the_same_either_way():
    found = analyse([size(640, 64, 64)] * 8, MODEL, (1, 4), slots=(768 * 2,))
    assert found.empty == {1: 0.0, 4: 0.0} and found.packed_empty == 0.0
    assert found.flops == pytest.approx({1: 1.0, 4: 1.0}) and found.packed == found.flops[1] == pytest.approx(1.0)


def test_unlike_rows_take_more_and_buckets_take_less_of_it():
    # 672, 672, 1112 and 1056 tokens: 1728 and 1784 slots of 1792
    found = analyse([size(600, 64, 8), size(600, 8, 64), size(600, 256, 256), size(600, 200, 256)], MODEL, (1, 2), slots=(1024, 1792, 4096))
    assert found.empty[1] > found.empty[2] > 0 and found.flops[1] > found.flops[2] > found.packed > 1
    assert found.slots == 1792 and found.packed_empty == pytest.approx(72 / 3584)
    assert found.saved(1) == pytest.approx(1 - found.packed / found.flops[1]) and found.saved(1) > found.saved(2) > 0


@pytest.mark.parametrize("lengths", SETS, ids=lambda lengths: lengths.name)
def test_the_sets_are_what_their_names_say(lengths):
    sizes = lengths.sizes(64, seed=1)
    assert sizes == lengths.sizes(64, seed=1) != lengths.sizes(64, seed=2)
    found = analyse(sizes, preset(lengths.model), (1, 4))
    assert 1 < found.packed and 1 < found.flops[4] < found.flops[1] and 0 < found.empty[4] < found.empty[1] < 1


def test_rows_of_several_pairs_as_training_makes_them():
    """Less than rows of one pair, never less than no padding; and the same for one device with all pairs or two with half of them, about."""
    sizes = SETS[4].sizes(64, seed=1)
    found = analyse(sizes, MODEL, (1,), splits=((8, 1), (4, 2)))
    for empty, flops in found.ours.values():
        assert 0 < empty < 0.6 and 1 < flops < 0.6 * found.flops[1]
    chosen = packed(sizes, MODEL, 8, 1)
    assert found.ours[8, 1] == (chosen.empty, pytest.approx(chosen.cost * found.flops[1], rel=0.05))


@pytest.mark.nightly
def test_the_timed_sides_train_on_the_same_pairs(monkeypatch):
    for name, value in {"PAIRS": 24, "BATCH": 4, "ROUNDS": 1, "STEPS": dict.fromkeys(packed_step.STEPS, 1), "_SHORTER": 16}.items():
        monkeypatch.setattr(packed_step, name, value)
    one, eight, several = packed_step.measure("mixed")
    assert one.flops > several.flops > 0 and one.empty > several.empty
    assert all(len(side.seconds) == 1 and side.programs == 1 for side in (one, eight, several))
