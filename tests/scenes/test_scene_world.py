import collections

import numpy as np
import pytest

from mmalign_jax.scenes import render, world
from mmalign_jax.scenes.world import CELL, COLORS, GRID, HABITS, KINDS, PLACES, Habit, Scene, SceneObject


def scenes(habit, count, seed=0):
    return [world.sample_scene(world.generator(seed, index), habit) for index in range(count)]


def cells_of(pixels):
    """`[64, 64, 3]` -> `[16, 256, 3]`, cells in row-major order."""
    return pixels.reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2).reshape(GRID**2, CELL**2, 3).astype(np.float64)


def test_names():
    assert len(KINDS) >= 16
    assert set(HABITS) | set(HABITS.values()) <= set(KINDS)
    assert not set(HABITS) & set(HABITS.values())  # a partner is not itself a head
    assert sorted(cell for cells in PLACES.values() for cell in cells) == list(range(GRID**2))


@pytest.mark.parametrize("habit", Habit)
def test_a_scene_is_well_formed(habit):
    for scene in scenes(habit, 300):
        assert len(set(scene.kinds)) == len(scene.kinds)
        cells = [cell for thing in scene.objects for cell in thing.cells]
        assert len(set(cells)) == len(cells)
        order = [list(PLACES).index(thing.place) for thing in scene.objects]
        assert order == sorted(order) and 1 <= len(set(order)) <= 3
        for thing in scene.objects:
            assert thing.color in COLORS and thing.count == len(thing.cells) in (1, 2, 3)
            assert set(thing.cells) <= set(PLACES[thing.place]) and list(thing.cells) == sorted(thing.cells)
        for first, second in zip(scene.objects, scene.objects[1:], strict=False):
            if first.place == second.place:
                assert HABITS[first.kind] == second.kind and first.color == second.color


def test_a_scene_is_a_function_of_its_stream():
    assert scenes(Habit.USUAL, 20) == scenes(Habit.USUAL, 20)
    assert scenes(Habit.USUAL, 20) != scenes(Habit.USUAL, 20, seed=1)
    assert len(set(scenes(Habit.USUAL, 200))) > 190


def test_usual_heads_nearly_always_have_their_partner():
    heads, together = collections.Counter(), collections.Counter()
    for scene in scenes(Habit.USUAL, 3000):
        for kind in scene.kinds:
            if kind in HABITS:
                heads[kind] += 1
                together[kind] += kind not in scene.lonely_heads
    assert set(heads) == set(HABITS)
    share = together.total() / heads.total()
    assert abs(share - world.HABIT_STRENGTH) < 4 * (0.05 * 0.95 / heads.total()) ** 0.5
    assert 0.5 < heads.total() / 3000 < 0.8  # heads are common, and so are pictures without one


def test_broken_heads_never_have_their_partner():
    for scene in scenes(Habit.BROKEN, 500):
        heads = [kind for kind in scene.kinds if kind in HABITS]
        assert heads and tuple(heads) == scene.lonely_heads


def test_partners_also_come_alone():
    alone = [kind for scene in scenes(Habit.USUAL, 1000) for kind in scene.kinds if kind in HABITS.values()]
    heads = {partner: head for head, partner in HABITS.items()}
    lonely = [1 for scene in scenes(Habit.USUAL, 1000) for kind in scene.kinds if kind in heads and heads[kind] not in scene.kinds]
    assert 0.1 < len(lonely) / len(alone) < 0.5


@pytest.mark.parametrize("habit", Habit)
def test_the_truth_is_in_the_pixels(habit):
    """Cells of objects, and no others, differ from the ground, and the colour that differs most is the one that the scene says."""
    for index, scene in enumerate(scenes(habit, 60)):
        cells = cells_of(render.render(scene, world.generator(1, index)))
        contrast = np.abs(cells - np.median(cells, axis=(0, 1))).max(axis=2)
        inked = np.flatnonzero(np.sort(contrast, axis=1)[:, -12] > 40)
        assert set(inked) == {cell for thing in scene.objects for cell in thing.cells}
        for thing in scene.objects:
            for cell in thing.cells:
                ink = cells[cell][np.argsort(contrast[cell])[-12:]].mean(axis=0)
                # a shade adds the same to all channels
                distance = {name: np.ptp(ink - color) + np.abs(ink - color).mean() for name, color in COLORS.items()}
                assert min(distance, key=distance.get) == thing.color


def test_pixels_are_a_function_of_the_stream_and_vary_with_it():
    scene = Scene((SceneObject("cat", "red", 2, "top left", (0, 5)),))
    one, again, other = (render.render(scene, world.generator(0, number)) for number in (0, 0, 1))
    assert one.shape == (world.SIZE, world.SIZE, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, again)
    assert (one[:CELL, :CELL] != other[:CELL, :CELL]).mean() > 0.5
    assert np.abs(cells_of(one)[0] - cells_of(one)[5]).max() > 20  # not one stamp


def test_kinds_look_different():
    """The nearest mean picture of a kind tells it, whatever the shift, size and shade."""

    def draw(kind, number):
        scene = Scene((SceneObject(kind, "blue", 1, "top left", (0,)),))
        patch = cells_of(render.render(scene, world.generator(2, number)))[0].mean(axis=1)
        return (patch - patch.mean()) / patch.std()

    means = np.stack([np.mean([draw(kind, number) for number in range(12)], axis=0) for kind in KINDS])
    hits = [np.argmin(((means - draw(kind, number)) ** 2).sum(axis=1)) == place for place, kind in enumerate(KINDS) for number in range(100, 110)]
    assert np.mean(hits) > 0.97
