"""What can be in a picture, and how a picture's contents are drawn from a seed.

A picture is a grid of 4 x 4 cells. Its four corners (2 x 2 cells each) hold at most one kind of object each, one to three of it.
In the world's habit a head (a cup) is followed, in reading order, by its partner (a spoon) of the same colour. A model that
learns from such pictures expects the partner wherever it sees the head: that is the language prior behind its hallucinations.
"""

import dataclasses
import enum

import numpy as np

GRID = 4
CELL = 16
SIZE = GRID * CELL  # pixels on a side

# singular -> plural, in the order in which everything is numbered
KINDS = {
    "cup": "cups", "spoon": "spoons", "tree": "trees", "bird": "birds", "boat": "boats", "fish": "fish",
    "table": "tables", "chair": "chairs", "moon": "moons", "star": "stars", "house": "houses", "flower": "flowers",
    "cat": "cats", "ball": "balls", "lamp": "lamps", "clock": "clocks", "hat": "hats", "key": "keys",
}  # fmt: skip

# head -> partner
HABITS = {"cup": "spoon", "tree": "bird", "boat": "fish", "table": "chair", "moon": "star"}

COLORS = {
    "red": (214, 40, 40), "green": (36, 150, 60), "blue": (40, 80, 210),
    "yellow": (236, 186, 16), "purple": (150, 50, 180), "black": (32, 32, 36),
}  # fmt: skip

# place -> its cells (row-major numbers), in reading order
PLACES = {"top left": (0, 1, 4, 5), "top right": (2, 3, 6, 7), "bottom left": (8, 9, 12, 13), "bottom right": (10, 11, 14, 15)}

MAX_COUNT = 3
_KIND_NUMBERS = (0.1, 0.3, 0.35, 0.25)  # probability of 1, 2, 3 and 4 kinds in a picture
_COUNTS = (0.6, 0.25, 0.15)  # probability of 1, 2 and 3 objects of a kind
_PARTNER_APPETITE = 0.5  # how often a partner kind turns up without its head, relative to the other kinds


class Habit(enum.Enum):
    """How the heads of a picture keep company."""

    USUAL = "usual"  # with their partner, except with probability 1 - HABIT_STRENGTH
    BROKEN = "broken"  # at least one head, and never a partner of a head in the picture


HABIT_STRENGTH = 0.95


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """All objects of one kind in a picture; `cells` are row-major numbers in the 4 x 4 grid, one object each."""

    kind: str
    color: str
    count: int
    place: str
    cells: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
    """The exact contents of a picture, in reading order of the places."""

    objects: tuple[SceneObject, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(thing.kind for thing in self.objects)

    @property
    def lonely_heads(self) -> tuple[str, ...]:
        """The heads whose partner is not in the picture."""
        return tuple(kind for kind in self.kinds if kind in HABITS and HABITS[kind] not in self.kinds)


def generator(seed: int, *where: int) -> np.random.Generator:
    """The stream of random numbers of one place in the world; streams of different places are independent."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, *where))))


def sample_scene(rng: np.random.Generator, habit: Habit) -> Scene:
    """Draws a picture's contents."""
    wanted = 1 + int(rng.choice(len(_KIND_NUMBERS), p=_KIND_NUMBERS))
    chosen = _broken_kinds(rng, wanted) if habit is Habit.BROKEN else _usual_kinds(rng, wanted)
    places = [list(PLACES)[i] for i in np.sort(rng.choice(len(PLACES), size=len(chosen), replace=False))]
    objects = []
    for kind, place in zip(chosen, places, strict=True):
        color = str(rng.choice(list(COLORS)))
        if objects and HABITS.get(objects[-1].kind) == kind:
            color = objects[-1].color
        count = 1 + int(rng.choice(MAX_COUNT, p=_COUNTS))
        cells = tuple(sorted(int(cell) for cell in rng.choice(PLACES[place], size=count, replace=False)))
        objects.append(SceneObject(kind, color, count, place, cells))
    return Scene(tuple(objects))


def _usual_kinds(rng: np.random.Generator, wanted: int) -> list[str]:
    chosen: list[str] = []
    while len(chosen) < wanted:
        kind = _pick(rng, set(chosen))
        partner = HABITS.get(kind)
        together = rng.random() < HABIT_STRENGTH
        if partner is None or not together:
            chosen.append(kind)
        elif partner not in chosen and len(chosen) + 2 <= wanted:
            chosen += [kind, partner]
    return chosen


def _broken_kinds(rng: np.random.Generator, wanted: int) -> list[str]:
    chosen = [str(rng.choice(list(HABITS)))]
    while len(chosen) < wanted:
        kind = _pick(rng, set(chosen))
        if HABITS.get(kind) not in chosen and kind not in {HABITS.get(other) for other in chosen}:
            chosen.append(kind)
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _pick(rng: np.random.Generator, taken: set[str]) -> str:
    free = [kind for kind in KINDS if kind not in taken]
    weight = np.array([_PARTNER_APPETITE if kind in HABITS.values() else 1.0 for kind in free])
    return str(rng.choice(free, p=weight / weight.sum()))
