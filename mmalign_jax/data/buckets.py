"""A few static row shapes instead of one: rows of like size share a layout, and each layout is compiled once."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int

from mmalign_jax.data.layout import RowLayout, RowSize

_CANDIDATES = 64  # borders that are tried, at quantiles of the rows' sizes


def ladder(slots: int) -> list[int]:
    """Lengths up to `slots`, shortest first: each about three quarters of the next, in eights. Rows that are made on the way take the shortest
    that holds them, so that few shapes are compiled."""
    out = [slots]
    while out[0] > 32:
        out.insert(0, -(-3 * out[0] // 32) * 8)
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Bucket:
    """Rows that share a layout: their numbers among the plan's items, and the share of their slots that is empty."""

    layout: RowLayout
    members: np.ndarray
    padding_fraction: float


def cost(size: RowSize, answers: int) -> int:
    """Slots that a row takes by itself, of the decoder and of the tower."""
    return size.prefix + answers * size.longest + size.patch_slots


def split(sizes: Sequence[RowSize], answers: int, most: int, layout_of: Callable[[Sequence[RowSize]], RowLayout]) -> list[Bucket]:
    """At most `most` groups of rows, in order of their cost, so that all rows together take few slots: the better of two ways.

    Rows sorted by their cost are cut at the best places (`_by_cost`); or groups are cut in two again and again by the length of one part
    (`_by_part`), so that rows with long prompts and rows with long answers need not share a layout.

    Args:
      layout_of: the smallest layout that holds these rows.
    """

    def slots(rows: int, largest: RowSize) -> int:
        layout = layout_of([largest])
        return rows * (layout.tokens + layout.patch_slots)

    costs = np.array([cost(size, answers) for size in sizes])
    ways = [_by_cost(sizes, costs, most, slots), _by_part(sizes, most, slots)]
    taken = lambda way: sum(slots(len(group), functools.reduce(_both, (sizes[n] for n in group))) for group in way)  # noqa: E731
    found = []
    for group in sorted(min(ways, key=taken), key=lambda group: (int(costs[group].max()), int(group.min()))):
        members = np.sort(group)
        layout = layout_of([sizes[number] for number in members])
        used = sum(_used(sizes[number], layout) for number in members)
        found.append(Bucket(layout, members, 1.0 - used / (len(members) * (layout.tokens + layout.patch_slots))))
    return found


_Slots = Callable[[int, RowSize], int]  # (number of rows, what holds each of them) -> slots of all


def _by_cost(sizes: Sequence[RowSize], costs: np.ndarray, most: int, slots: _Slots) -> list[np.ndarray]:
    """The rows sorted by their cost, cut so that they take the fewest slots."""
    order = np.argsort(costs, kind="stable")
    borders = np.unique(np.linspace(0, len(sizes), min(len(sizes), _CANDIDATES if most > 1 else 1) + 1).astype(int))
    # rows of one cost stay together, so that the groups do not depend on the order of the set
    borders = np.unique([np.searchsorted(costs[order], costs[order[border]]) if border < len(sizes) else border for border in borders])

    # what holds the rows between two neighbouring borders; a group's layout must hold some of these one behind the other
    pieces = [functools.reduce(_both, (sizes[n] for n in order[i:j])) for i, j in zip(borders[:-1], borders[1:], strict=True)]

    def by_end(start: int) -> Iterator[int]:
        """Slots of the groups that begin with a piece, by where they end."""
        for stop, size in enumerate(itertools.accumulate(pieces[start:], _both), start + 1):
            yield slots(int(borders[stop] - borders[start]), size)

    return [order[borders[i] : borders[j]] for i, j in _fewest_slots(len(pieces), most, by_end)]


def _by_part(sizes: Sequence[RowSize], most: int, slots: _Slots) -> list[np.ndarray]:
    """Groups that were cut in two, the one first whose cut saves the most, by the prefix, the longest answer or the patches."""
    table = np.array([(s.prefix, s.longest, s.patch_slots, s.images, *s.canvas) for s in sizes])

    def largest(row: np.ndarray) -> RowSize:
        prefix, longest, patches, images, *canvas = map(int, row)
        return RowSize(prefix, images, (canvas[0], canvas[1]), patches, (longest,), (0,))

    def cut(group: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """(slots that the best cut saves, one side, the other)"""
        whole, best = slots(len(group), largest(table[group].max(axis=0))), (0, group, group[:0])
        for part in range(3):
            order = group[np.argsort(table[group, part], kind="stable")]
            rows = table[order]
            below, above = np.maximum.accumulate(rows), np.maximum.accumulate(rows[::-1])[::-1]
            tried = np.unique(rows[np.linspace(0, len(rows) - 1, min(len(rows), _CANDIDATES)).astype(int), part])
            for border in np.searchsorted(rows[:, part], tried[1:]):
                saved = whole - slots(int(border), largest(below[border - 1])) - slots(len(rows) - int(border), largest(above[border]))
                if saved > best[0]:
                    best = (saved, order[:border], order[border:])
        return best

    groups = [cut(np.arange(len(sizes)))] if most > 1 else []
    while groups and len(groups) < most:
        number = max(range(len(groups)), key=lambda number: groups[number][0])
        saved, one, other = groups[number]
        if not saved:
            break
        groups[number : number + 1] = [cut(one), cut(other)]
    return [np.concatenate(sides) for _, *sides in groups] or [np.arange(len(sizes))]


def _used(size: RowSize, layout: RowLayout) -> int:
    return size.prefix + sum(min(length, layout.answer_slots) for length in size.answers) + size.patch_slots


def _both(one: RowSize, other: RowSize) -> RowSize:
    """The size of a row that takes as much as either of two."""
    canvas = (max(one.canvas[0], other.canvas[0]), max(one.canvas[1], other.canvas[1]))
    slots, longest = max(one.patch_slots, other.patch_slots), max(one.longest, other.longest)
    return RowSize(max(one.prefix, other.prefix), max(one.images, other.images), canvas, slots, (longest,), (0,))


def _fewest_slots(pieces: int, most: int, slots: Callable[[int], Iterator[int]]) -> list[tuple[int, int]]:
    """Groups of neighbouring pieces, at most `most` of them, with the smallest sum of `slots`: first and one-past-last piece of each."""
    known = {(i, j): total for i in range(pieces) for j, total in enumerate(slots(i), i + 1)}
    best: list[dict[int, tuple[int, list[int]]]] = [{0: (0, [0])}]
    for _ in range(min(most, pieces)):
        here = {}
        for end in range(1, pieces + 1):
            ways = [(total + known[i, end], [*cuts, end]) for i, (total, cuts) in best[-1].items() if i < end]
            if ways:
                here[end] = min(ways)
        best.append(here)
    _, cuts = min((row[pieces] for row in best if pieces in row), key=lambda way: (way[0], len(way[1])))
    return list(itertools.pairwise(cuts))


class TrainingOrder:
    """Position in the endless sequence of training rows -> number of a plan's item, by random access.

    The rows of a step are of one bucket. A bucket's rows are shuffled anew each time they are through, and its steps are spread evenly
    over all steps, as many as its rows deserve. With one bucket the sequence is a shuffle an epoch.

    Args:
      pictures: of all items, equal where their pictures are; the rows of a bucket that show the same ones then follow one another.
    """

    def __init__(self, buckets: Sequence[Bucket], batch_size: int, seed: int, pictures: Int[np.ndarray, " items"] | None = None):
        def shuffle(bucket: Bucket) -> "grain.MapDataset | _ByPicture":
            if pictures is not None:
                return _ByPicture(bucket.members, pictures[bucket.members], seed)
            return grain.MapDataset.source(bucket.members).shuffle(seed).repeat()

        self._rows, self._batch_size = [shuffle(bucket) for bucket in buckets], batch_size
        counts = np.array([len(bucket.members) for bucket in buckets])
        # the k-th of a bucket's n steps is due at (k + 1/2) / n of a period of as many steps as there are rows
        which = np.repeat(np.arange(len(buckets)), counts)
        use = np.concatenate([np.arange(count) for count in counts])
        period = np.argsort((use + 0.5) / counts[which], kind="stable")
        self._which, self._use, self._counts = which[period], use[period], counts

    def __len__(self) -> int:
        return np.iinfo(np.int64).max // 2

    def __getitem__(self, position: int) -> int:
        step, row = divmod(int(position), self._batch_size)
        periods, place = divmod(step, len(self._which))
        bucket = self._which[place]
        turn = periods * int(self._counts[bucket]) + int(self._use[place])
        return int(self._rows[bucket][turn * self._batch_size + row])


class _ByPicture:
    """An endless sequence of rows: in each epoch the pictures in a new order, all rows of a picture one behind the other, in a new order too.
    Rows of text, -1, stay alone."""

    def __init__(self, members: Int[np.ndarray, " rows"], pictures: Int[np.ndarray, " rows"], seed: int):
        alone = np.where(pictures < 0, pictures.max(initial=0) + 1 + np.arange(len(pictures)), pictures)
        self._members, self._seed = members, seed
        self._group = np.unique(alone, return_inverse=True)[1]
        self._epoch = functools.lru_cache(2)(self._shuffled)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, len(self._members))
        return int(self._epoch(epoch)[place])

    def _shuffled(self, epoch: int) -> Int[np.ndarray, " rows"]:
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch))))
        turn = random.permutation(int(self._group.max()) + 1)[self._group]
        return self._members[np.lexsort((random.permutation(len(turn)), turn))]
