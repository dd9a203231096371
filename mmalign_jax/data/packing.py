"""Several pairs a row: which pairs of a device go together, and the few shapes that such rows have.

A row keeps its regions, and each region holds the parts of several pairs one behind the other: `[prefix a, prefix b | chosen a, chosen b |
rejected a, rejected b]`. So what must fit is the sum of the prefixes, and for each answer the sum of its tokens.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_SHAPES = 7  # with a spare one and that of a row a pair; each is compiled by itself, when rows of it first come
WORTH = 0.02  # least share of the cost that another shape must save
TRIED_PAIRS, TRIED_STEPS = 8192, 128  # of the training order, to find the shapes
_MULTIPLE = 8  # as `data.plan` rounds
# Shapes that are tried: room for what this share of the steps needs at least, and for so much more, since no packing is perfect
_SHARES, _SLACK = (0.3, 0.6, 0.85, 1.0), (1.0, 1.03, 1.06, 1.1, 1.15, 1.25)
_ROWS, _PROMISING, _ALIKE = 24, 4, 0.2  # numbers of rows that are looked at, and that are tried; those of a ratio below exp(0.2) are alike
_TILE_SHARES = (0.95, 1.0)
_SPARE = 1.2  # room of a shape for steps that need more than all that were looked at; without it each of these would take a row a pair
_ROUNDING = 1e-9  # of sums of shares of a row, each a multiple of 1 / its slots


@dataclasses.dataclass(frozen=True)
class PackedShape:
    """What the packed rows of one device and one part of a step have room for.

    Args:
      rows: of the device.
      prefix_slots, answer_slots: P and R of each row.
      tiles: pictures of the device, which its rows share.
      longest: most slots of a pair's prefix, and of one of its answers.
    """

    rows: int
    prefix_slots: int
    answer_slots: int
    tiles: int
    longest: tuple[int, int]


Cost = Callable[[PackedShape], float]  # of the rows of a device, in any unit


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """Shapes, cheapest first, and what they mean for the steps of the training order that were looked at.

    `shapes[-1]` holds a pair a row, so every step has one that fits. The one before it is a spare: it has a fifth more room than any of these steps
    needs at least. It is left out where it would cost as much as a row a pair.

    Args:
      used: share of the steps that takes each shape, as `first_that_holds` finds it.
      empty: share of the slots that is empty, on average over steps.
      mean: cost of a device's rows, on average over steps.
      alone: the same of rows of one pair.
    """

    shapes: tuple[PackedShape, ...]
    used: tuple[float, ...]
    empty: float
    mean: float
    alone: float

    @property
    def cost(self) -> float:
        """Of a step, relative to rows of one pair."""
        return self.mean / self.alone


def deal(sizes: Int[np.ndarray, "pairs parts"], groups: int) -> Int[np.ndarray, "groups own"]:
    """The pairs of each group, equally many, so that groups have about equal sums of every part. In each group, pairs are in their order.

    The largest come first, each to the group that is then the least full of what it is fullest of.
    """
    own = len(sizes) // groups
    share = sizes / np.maximum(sizes.mean(axis=0), 1e-9)
    full, held = np.zeros((groups, sizes.shape[1])), np.zeros(groups, np.int64)
    group_of = np.zeros(len(sizes), np.int64)
    for pair in np.argsort(-share.max(axis=1), kind="stable"):
        after = np.where(held < own, (full + share[pair]).max(axis=1), np.inf)
        group = int(np.argmin(after))
        full[group] += share[pair]
        held[group] += 1
        group_of[pair] = group
    return np.argsort(group_of, kind="stable").reshape(groups, own)


def pack(sizes: Int[np.ndarray, "pairs parts"], rows: int, room: Sequence[int]) -> Int[np.ndarray, " pairs"] | None:
    """The row of each pair, so that no part of a row takes more than its room. None where no way is found, which does not say that there is none.

    The largest pairs come first, each where it leaves the most, or, if that does not end well, the least (best-fit decreasing), by the part that
    is then shortest of room. Equal arguments give equal rows on every machine.

    Args:
      sizes: tokens of the prefix and of each answer.
      room: of a row, likewise.
    """
    limit = np.array(room)
    if (sizes > limit).any() or (sizes.sum(axis=0) > rows * limit).any():
        return None
    if rows >= len(sizes):
        return np.arange(len(sizes))
    share = sizes / limit
    order = np.argsort(-share.max(axis=1), kind="stable")
    for sign in (1, -1):
        left, row_of = np.ones((rows, len(limit))), np.zeros(len(sizes), np.int64)
        for pair in order:
            after = left - share[pair]
            shortest = after.min(axis=1)
            fits = shortest > -_ROUNDING
            row = int(np.argmax(np.where(fits, sign * shortest, -np.inf)))
            if not fits[row]:
                break
            left[row], row_of[pair] = after[row], row
        else:
            return row_of
    return None


def choose(sizes: Int[np.ndarray, "steps groups pairs parts"], tiles: Int[np.ndarray, " steps"], last: PackedShape, cost: Cost) -> Chosen:
    """At most `MOST_SHAPES` shapes: some that save enough in these steps, a spare one, and the last.

    Args:
      sizes: of the pairs of each device and part (a group), see `pack`.
      tiles: the most pictures that a group of the step shows.
      last: holds a pair a row, whatever pairs come.
    """
    steps, groups, pairs, _ = sizes.shape
    tried = list(_candidates(sizes, tiles, last, cost))
    shapes = [last, *(shape for shape, _ in tried)]
    fits = np.stack([np.ones(steps, bool), *(held for _, held in tried)])
    costs = np.array([cost(shape) for shape in shapes])
    of_step = np.where(fits, costs[:, None], np.inf)
    picked, best = [0], of_step[0]
    while len(picked) < MOST_SHAPES - 1:
        totals = np.minimum(best, of_step).sum(axis=1)
        number = int(np.argmin(totals))
        if best.sum() - totals[number] < WORTH * best.sum():
            break
        picked, best = [*picked, number], np.minimum(best, of_step[number])
    picked = [*sorted(picked[1:], key=lambda number: costs[number]), 0]
    found = [shapes[number] for number in picked]
    if len(found) > 1 and found[-2] != (spare := _spare(found[-2], sizes, tiles, last)) and cost(spare) < cost(last):
        found = [*found[:-1], spare, last]
    taken = np.array([first_that_holds(found, sizes[step], int(tiles[step]))[0] for step in range(steps)])
    slots = np.array([shape.rows * sum(room_of(shape, sizes.shape[-1])) for shape in found])[taken]
    empty = 1.0 - sizes.sum(axis=(1, 2, 3)) / (groups * slots)
    alone = cost(dataclasses.replace(last, tiles=max(1, int(tiles.max()))))
    used = np.bincount(taken, minlength=len(found)) / steps
    mean = float(np.mean([cost(found[number]) for number in taken]))
    return Chosen(tuple(found), tuple(map(float, used)), float(empty.mean()), mean, alone)


def first_that_holds(
    shapes: Sequence[PackedShape], groups: Int[np.ndarray, "groups pairs parts"], tiles: int
) -> tuple[int, Int[np.ndarray, "groups pairs"]]:
    """The number of the shape that a step takes, and the row of each pair.

    Args:
      shapes: cheapest first; the last holds a pair a row, whatever pairs come.
      groups: sizes of the pairs of each device and part, see `pack`.
      tiles: the most pictures that a group shows.
    """
    for number, shape in enumerate(shapes):
        room = room_of(shape, groups.shape[-1])
        rows = [pack(group, shape.rows, room) for group in groups] if tiles <= shape.tiles else [None]
        if all(row is not None for row in rows):
            return number, np.stack(rows)
    raise AssertionError("a row a pair holds every step")


def room_of(shape: PackedShape, parts: int) -> list[int]:
    """What `pack` takes: of the prefix and of each answer."""
    return [shape.prefix_slots] + [shape.answer_slots] * (parts - 1)


def _spare(
    largest: PackedShape, sizes: Int[np.ndarray, "steps groups pairs parts"], tiles: Int[np.ndarray, " steps"], last: PackedShape
) -> PackedShape:
    """As many rows as the largest of the others, no less room than these, and more than the steps need at least."""
    needed = _SPARE * _least(sizes, largest.rows).max(axis=0)
    wanted = np.maximum(needed, [largest.prefix_slots, largest.answer_slots])
    shown = min(last.tiles, max(largest.tiles, math.ceil(_SPARE * int(tiles.max()))))
    return _shape(largest.rows, wanted, 1.0, shown, last)


def _candidates(
    sizes: Int[np.ndarray, "steps groups pairs parts"], tiles: Int[np.ndarray, " steps"], last: PackedShape, cost: Cost
) -> Iterator[tuple[PackedShape, Bool[np.ndarray, " steps"]]]:
    """Shapes, and which steps they hold."""
    pairs, parts = sizes.shape[2:]
    ways = sorted({max(1, round(rows)) for rows in (*np.geomspace(1, pairs, _ROWS), *(pairs / few for few in range(2, 9)))} - {pairs})
    least = {rows: _least(sizes, rows) for rows in ways}
    typical = {rows: cost(_shape(rows, least[rows].mean(axis=0), 1, 1, last)) for rows in ways}
    unlike: list[int] = []
    for rows in sorted(ways, key=typical.__getitem__):
        if all(abs(math.log(rows / other)) > _ALIKE for other in unlike):
            unlike.append(rows)
    for rows in unlike[:_PROMISING]:
        known: dict[PackedShape, np.ndarray] = {}
        for share, tile_share in itertools.product(_SHARES, _TILE_SHARES):
            wanted = np.quantile(least[rows], share, axis=0)
            shown = int(np.ceil(np.quantile(tiles, max(share, tile_share))))
            held = np.zeros(len(sizes), bool)
            for slack in _SLACK:
                shape = _shape(rows, wanted, slack, shown, last)
                if shape.tiles > last.tiles or cost(shape) >= cost(last):
                    break
                if shape in known:
                    held = known[shape]
                    continue
                room = room_of(shape, parts)
                possible = (least[rows] <= [shape.prefix_slots, shape.answer_slots]).all(axis=1) & (tiles <= shape.tiles) & ~held
                more = [all(pack(group, rows, room) is not None for group in sizes[step]) for step in np.flatnonzero(possible)]
                held = held.copy()
                held[possible] = more
                known[shape] = held
                yield shape, held
                if held.all():
                    break


def _least(sizes: Int[np.ndarray, "steps groups pairs parts"], rows: int) -> Float[np.ndarray, "steps 2"]:
    """Slots of the prefix and of an answer that every step needs at least in so many rows."""
    least = np.maximum(sizes.max(axis=2), np.ceil(sizes.sum(axis=2) / rows)).max(axis=1)
    return np.stack([least[:, 0], least[:, 1:].max(axis=1)], axis=1)


def _shape(rows: int, wanted: Float[np.ndarray, " 2"], slack: float, tiles: int, last: PackedShape) -> PackedShape:
    prefix, answer = (int(-(-slots * slack // _MULTIPLE)) * _MULTIPLE for slots in wanted)
    return PackedShape(rows, prefix, max(answer, _MULTIPLE), max(1, tiles), last.longest)
