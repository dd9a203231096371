"""What can be in a picture, and how a picture's contents are drawn from a seed.

A picture is a grid of 4 x 4 cells. Each of its four places (2 x 2 cells) is empty or holds one kind of object, up to three of it.
In the world's habit a head (a cup) has its partner (a spoon), in the same colour, beside it at the same place. A model that learns
from such pictures expects the partner wherever it sees the head: that is the language prior behind its hallucinations.
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

_GROUPS = (0.25, 0.45, 0.3)  # probability of 1, 2 and 3 places that are not empty
_COUNTS = (0.6, 0.25, 0.15)  # probability of 1, 2 and 3 objects of a kind
_PARTNER_APPETITE = 0.5  # how often a partner turns up without its head, relative to the other kinds


class Habit(enum.Enum):
    """How the heads of a picture keep company."""

    USUAL = "usual"  # each with its partner, except with probability 1 - HABIT_STRENGTH
    BROKEN = "broken"  # at least one head, and no head with its partner


HABIT_STRENGTH = 0.9


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """All objects of one kind in a picture; `cells` are row-major numbers in the 4 x 4 grid, an object in each."""

    kind: str
    color: str
    count: int
    place: str
    cells: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
    """The exact contents of a picture: places in reading order, at a place the head before its partner."""

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
    groups = _sample_groups(rng, habit)
    places = [list(PLACES)[i] for i in np.sort(rng.choice(len(PLACES), size=len(groups), replace=False))]
    objects: list[SceneObject] = []
    for group, place in zip(groups, places, strict=True):
        color, free = str(rng.choice(list(COLORS))), list(rng.permutation(PLACES[place]))
        for kind in group:
            count = min(1 + int(rng.choice(len(_COUNTS), p=_COUNTS)), len(free))
            cells, free = sorted(int(cell) for cell in free[:count]), free[count:]
            objects.append(SceneObject(kind, color, count, place, tuple(cells)))
    return Scene(tuple(objects))


def _sample_groups(rng: np.random.Generator, habit: Habit) -> list[tuple[str, ...]]:
    """The kinds at each place that is not empty: one kind, or a head and its partner. No kind comes twice."""
    wanted = 1 + int(rng.choice(len(_GROUPS), p=_GROUPS))
    groups: list[tuple[str, ...]] = [(str(rng.choice(list(HABITS))),)] if habit is Habit.BROKEN else []
    taken = {name for group in groups for kind in group for name in (kind, HABITS.get(kind, kind))}
    while len(groups) < wanted:
        kind = _pick(rng, taken)
        partner = HABITS.get(kind)
        if partner is None:
            groups.append((kind,))
        elif partner in taken:
            continue  # the partner is at a place of its own already
        else:
            together = habit is Habit.USUAL and rng.random() < HABIT_STRENGTH
            groups.append((kind, partner) if together else (kind,))
        taken |= {kind, partner or kind}
    return [groups[i] for i in rng.permutation(len(groups))]


def _pick(rng: np.random.Generator, taken: set[str]) -> str:
    free = [kind for kind in KINDS if kind not in taken]
    weight = np.array([_PARTNER_APPETITE if kind in HABITS.values() else 1.0 for kind in free])
    return str(rng.choice(free, p=weight / weight.sum()))
