"""Which rows of a batch show the same pictures, so that each device is given these once.

Pictures are shared among the rows of one device: then neither pixels nor features go from device to device, and what a row finds does not
depend on the mesh. Every process knows the pictures of all rows of a batch, so all agree on its shape without asking.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

from mmalign_jax.types import Media

MOST_SIZES = 3  # each is compiled by itself
WORTH = 0.05  # least share of the pictures that another size must save
TRIED_ROWS, TRIED_STEPS = 8192, 256  # of the training order, to find the sizes

PICTURES = ("images", "patches", "features")  # fields of `types.PairBatch` that hold pictures, or what the tower makes of them


def digest(media: Iterable[Media]) -> bytes:
    """Of all that a row's pictures come from: bytes, and the times of frames. Rows of one layout with the same digest have the same pixels."""
    found = hashlib.sha256()
    for medium in media:
        found.update(repr((medium.kind, medium.times, [len(data) for data in medium.pictures])).encode())
        for data in medium.pictures:
            found.update(data)
    return found.digest()[:16]


def places(pictures: Int[np.ndarray, "*groups rows"]) -> tuple[Int32[np.ndarray, "*groups rows"], Bool[np.ndarray, "*groups rows"]]:
    """For each row, the place of its pictures among the distinct ones of its group in order, and whether it is the first to show them."""
    leader = np.argmax(pictures[..., :, None] == pictures[..., None, :], axis=-1)
    first = leader == np.arange(pictures.shape[-1])
    place = np.cumsum(first, axis=-1) - 1
    return np.take_along_axis(place, leader, axis=-1).astype(np.int32), first


def sizes_for(counts: Sequence[int], rows: int) -> tuple[int, ...]:
    """For how many pictures of a device there is to be a program, fewest first; the last is `rows`, one for each.

    A step takes the first that holds it. At most `MOST_SIZES`, each of them chosen for what it saves in these steps.

    Args:
      counts: the most distinct pictures that a device has, by step.
    """
    counts, sizes = np.asarray(counts), [rows]
    encoded = lambda sizes: int(np.sum(np.array(sizes)[np.searchsorted(sizes, counts)]))  # noqa: E731
    while len(sizes) < MOST_SIZES:
        ways = [sorted([*sizes, int(size)]) for size in np.unique(counts) if size not in sizes]
        best = min(ways, key=encoded, default=sizes)
        if encoded(sizes) - encoded(best) < WORTH * encoded(sizes) or best == sizes:
            break
        sizes = best
    return tuple(sizes)


class Place(NamedTuple):
    """A row's place: in the sequence of all processes, which item it is, and where its pictures are.

    Args:
      picture: the place of its pictures among those of its device.
      brings: whether it has them with it, or an earlier row of its device has.
      size, rows: pictures and rows of each device.
    """

    position: int
    number: int
    picture: int
    brings: bool
    size: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Split:
    """How the rows of a batch are split: in parts, one after another; among processes; among the devices of each, which are groups of rows
    that share pictures, or are the rows themselves where nothing is shared."""

    batch: int
    parts: int = 1
    processes: int = 1
    devices: int = 0  # 0: nothing is shared

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Parts, processes, groups and rows of each: the axes along which a batch's rows come."""
        own = self.batch // (self.parts * self.processes)
        groups = self.devices or own
        return self.parts, self.processes, groups, own // groups

    def locate(self, position: int, process: int) -> tuple[int, tuple[int, int, int, int], int]:
        """Of the row at `position` among all of a process: its batch, its place along `shape`, and its position among the rows of all processes."""
        parts, _, groups, rows = self.shape
        batch, place = divmod(int(position), parts * groups * rows)
        part, row = divmod(place, groups * rows)
        at = (part, process, *divmod(row, rows))
        return batch, at, batch * self.batch + int(np.ravel_multi_index(at, self.shape))


class OwnRows:
    """The rows of one process: its consecutive rows of each part of each batch. Random access by position, from several threads.

    Args:
      numbers: number of a batch -> the items of its rows.
      pictures: of all items, equal where their pictures are.
      tried: how many batches to look at for sizes.
    """

    def __init__(
        self, numbers: Callable[[int], Int[np.ndarray, " rows"]], pictures: Int[np.ndarray, " items"], split: Split, process: int, tried: int
    ):
        self._numbers, self._pictures, self._split, self._process = numbers, pictures, split, process
        rows = split.shape[-1]
        self.sizes = (rows,)
        if rows > 1 and len(np.unique(pictures)) < len(pictures):
            tried = max(1, min(tried, TRIED_STEPS, TRIED_ROWS // split.batch))
            self.sizes = sizes_for([self._found(numbers(step))[2] for step in range(tried)], rows)
        self._batch = functools.lru_cache(16)(self._make)

    def __len__(self) -> int:
        return np.iinfo(np.int64).max // 2

    def __getitem__(self, position: int) -> Place:
        step, at, overall = self._split.locate(position, self._process)
        numbers, picture, brings, size = self._batch(step)
        return Place(overall, int(numbers[at]), int(picture[at]), bool(brings[at]), size, self._split.shape[-1])

    def stack(self, rows: Sequence[tuple[Place, dict[str, Any]]]) -> dict[str, Any]:
        return stack(rows)

    def form(self, place: Place, row: dict[str, Any]) -> dict[str, Any]:
        """What `stack` makes of the rows of the step of which this is the first: shapes `[parts, ...]` and types."""
        parts, _, groups, rows = self._split.shape

        def shape(value: Any, count: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((parts, groups * count, *np.shape(value)), np.asarray(value).dtype)

        own = {name: value for name, value in row.items() if name != "layout"}
        arrays = {name: jax.tree.map(lambda value, n=place.size if name in PICTURES else rows: shape(value, n), own[name]) for name in own}
        if place.size < rows:
            arrays["picture"] = jax.ShapeDtypeStruct((parts, groups, rows), np.int32)
        return arrays

    def _make(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        numbers = self._numbers(step)
        picture, brings, most = self._found(numbers)
        size, rows = next(size for size in self.sizes if size >= most), self._split.shape[-1]
        if size == rows:  # the program for rows with pictures of their own
            picture, brings = np.broadcast_to(np.arange(rows, dtype=np.int32), picture.shape), np.ones(brings.shape, bool)
        return numbers.reshape(self._split.shape), picture, brings, size

    def _found(self, numbers: Int[np.ndarray, " rows"]) -> tuple[np.ndarray, np.ndarray, int]:
        picture, brings = places(self._pictures[numbers].reshape(self._split.shape))
        return picture, brings, int(brings.sum(axis=-1).max())


def stack(rows: Sequence[tuple[Place, dict[str, Any]]]) -> dict[str, Any]:
    """The arrays of the rows of one process, one behind the other; of rows that share pictures, those once, and `picture [groups, rows]`.

    Groups with fewer pictures than others are filled with their own first ones, at which no row points.
    """
    size, count = rows[0][0].size, rows[0][0].rows
    plain = [{name: value for name, value in row.items() if name not in PICTURES} for _, row in rows]
    brought: list[dict[str, Any]] = []
    for start in range(0, len(rows), count):
        own = [{name: row[name] for name in PICTURES if name in row} for place, row in rows[start : start + count] if place.brings]
        brought += own + own[:1] * (size - len(own))
    put = lambda some: jax.tree.map(lambda *leaves: np.stack(leaves), *some)  # noqa: E731
    out = put(plain) | put(brought)
    if size < count:
        out["picture"] = np.array([place.picture for place, _ in rows], np.int32).reshape(-1, count)
    return out
