"""The pairs of a process where several share a row: dealt to devices by their length, and put behind one another (`data.packing`).

A step has the pairs that it has without packing, and so has each of its parts. Every process knows the lengths of all of them, so all agree on
the step's shape, and on where each pair goes, without asking; neither depends on the number of processes, only on that of devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from mmalign_jax.data.layout import RowLayout
from mmalign_jax.data.packing import TRIED_PAIRS, TRIED_STEPS, Cost, PackedShape, choose, deal, first_that_holds, room_of
from mmalign_jax.data.shared_pictures import PICTURES, Split, places
from mmalign_jax.hf.pictures import RowTraits
from mmalign_jax.types import BY_SLOT, FILLERS, PAD


class PackedPlace(NamedTuple):
    """A pair's place: in the sequence of all processes, which item it is, its row on its device, and where its pictures are.

    Args:
      turn: which one of its part of the step it is without packing.
      brings: whether it has its pictures with it, or an earlier pair of its device has.
      tile, tiles: the place of its pictures among those of its device, and how many they are.
      shape: number of the step's shape.
    """

    position: int
    number: int
    turn: int
    row: int
    brings: bool
    tile: int
    tiles: int
    shape: int


class _Step(NamedTuple):
    """Of the pairs `[parts, processes, groups, pairs]` of a step, as in `PackedPlace`."""

    numbers: np.ndarray
    turn: np.ndarray
    row: np.ndarray
    brings: np.ndarray
    tile: np.ndarray
    tiles: np.ndarray
    shape: int


class PackedRows:
    """The pairs of one process, by position, from several threads; see `shared_pictures.OwnRows`, whose place it takes.

    Args:
      numbers: number of a batch -> the items of its pairs.
      lengths: of all items, `RowPlan.lengths`.
      pictures: of all items, equal where their pictures are.
      layout: of rows of one pair, that holds every item.
      traits: of a model whose pictures are tiles of one size.
      split: of the pairs of a step; its groups are devices.
      process: number of this one.
      cost: of a device's rows, by which shapes are chosen.
    """

    def __init__(
        self,
        numbers: Callable[[int], Int[np.ndarray, " pairs"]],
        lengths: Int[np.ndarray, "items columns"],
        pictures: Int[np.ndarray, " items"],
        layout: RowLayout,
        traits: RowTraits,
        split: Split,
        process: int,
        cost: Cost,
    ):
        self._numbers, self._pictures, self._split, self._process = numbers, pictures, split, process
        self._sizes, self._tiles, self._traits, self._answers = np.delete(lengths, 1, axis=1), lengths[:, 1], traits, layout.answers
        _, _, _, pairs = split.shape
        self.sizes = (1,)  # see `Loader`
        alone = (layout.prefix_slots, layout.answer_slots)
        last = PackedShape(pairs, *alone, max(1, pairs * int(self._tiles.max())), alone)
        seen = [self._dealt(step)[0] for step in range(max(1, min(TRIED_STEPS, TRIED_PAIRS // split.batch)))]
        sizes = np.stack([self._sizes[dealt].reshape(-1, pairs, self._sizes.shape[1]) for dealt in seen])
        shown = np.array([self._shown(dealt)[2] for dealt in seen])
        self.chosen = choose(sizes, shown, last, functools.cache(cost))
        self.shapes = self.chosen.shapes
        self._step = functools.lru_cache(16)(self._make)

    def __len__(self) -> int:
        return np.iinfo(np.int64).max // 2

    def __getitem__(self, position: int) -> PackedPlace:
        number, at, overall = self._split.locate(position, self._process)
        step = self._step(number)
        mine = (int(step.turn[at]), int(step.row[at]), bool(step.brings[at]), int(step.tile[at]), int(step.tiles[at]))
        return PackedPlace(overall, int(step.numbers[at]), *mine, step.shape)

    def stack(self, pairs: Sequence[tuple[PackedPlace, dict[str, Any]]]) -> dict[str, Any]:
        """The arrays of the pairs of one process, by row, by pair and by device, named as in `types.PairBatch`; and `layout`, the shape's number."""
        shape, own = self.shapes[pairs[0][0].shape], self._split.shape[-1]
        groups = len(pairs) // own
        by_slot = [name for name in pairs[0][1] if name in BY_SLOT]
        apart = [name for name in pairs[0][1] if name not in (*BY_SLOT, *PICTURES, "layout")]
        out = {name: np.stack([row[name] for _, row in pairs]) for name in apart}
        slots, width = shape.prefix_slots + self._answers * shape.answer_slots, shape.rows * groups
        for name in by_slot:
            one = pairs[0][1][name]
            out[name] = np.full((width, *one.shape[:-1], slots), FILLERS.get(name, 0), one.dtype)
        out["segment"] = np.full((width, slots), -1, np.int32)
        out["turn"] = np.array([place.turn for place, _ in pairs], np.int32)
        out["place"] = np.zeros((groups, own), np.int32)
        out["picture"] = np.zeros((groups, shape.rows), np.int32)
        canvas = next(row["images"].shape[1:] for place, row in pairs if place.brings)
        out["images"] = np.zeros((groups, shape.tiles, *canvas), np.uint8)
        room = room_of(shape, 1 + self._answers)
        filled, held = np.zeros((width, 1 + self._answers), np.int64), np.zeros(width, np.int64)
        for number, (place, row) in enumerate(pairs):
            group, pair = divmod(number, own)
            at = group * shape.rows + place.row
            out["place"][group, pair] = place.row * own + held[at]
            for part, (start, length) in enumerate(self._regions(row["role"])):
                region = part and shape.prefix_slots + (part - 1) * shape.answer_slots
                if filled[at, part] + length > room[part]:
                    raise AssertionError(f"pairs of row {at} take more than the {room[part]} slots of part {part}")
                there = slice(region + filled[at, part], region + filled[at, part] + length)
                for name in by_slot:
                    out[name][at, ..., there] = self._moved(name, row[name][..., start : start + length], place)
                out["segment"][at, there] = held[at]
                filled[at, part] += length
            if place.brings:
                out["images"][group, place.tile : place.tile + place.tiles] = row["images"][: place.tiles]
            held[at] += 1
        return out | {"layout": np.full(groups, pairs[0][0].shape)}

    def form(self, place: PackedPlace, row: dict[str, Any]) -> dict[str, Any]:
        """What `stack` makes of the pairs of the step of which this is the first: shapes `[parts, ...]` and types."""
        (parts, _, groups, own), shape = self._split.shape, self.shapes[place.shape]
        slots = shape.prefix_slots + self._answers * shape.answer_slots
        lead = lambda count, *rest: (parts, groups * count, *rest)  # noqa: E731
        out = {}
        for name, value in ((name, np.asarray(value)) for name, value in row.items() if name not in ("layout", *PICTURES)):
            dims = lead(shape.rows, *value.shape[:-1], slots) if name in BY_SLOT else lead(own, *value.shape)
            out[name] = jax.ShapeDtypeStruct(dims, value.dtype)
        int32 = {"segment": lead(shape.rows, slots), "turn": lead(own), "place": lead(1, own), "picture": lead(1, shape.rows)}
        out |= {name: jax.ShapeDtypeStruct(dims, np.int32) for name, dims in int32.items()}
        return out | {"images": jax.ShapeDtypeStruct(lead(1, shape.tiles, *row["images"].shape[1:]), np.uint8)}

    def _moved(self, name: str, values: np.ndarray, place: PackedPlace) -> np.ndarray:
        """Values of a part of a pair where the pair's pictures stand behind those of others; a newline's feature stands before all."""
        if name != "image_index":
            return values
        return np.where(values >= self._traits.first_feature, values + place.tile * self._traits.tile_features, values)

    def _regions(self, role: np.ndarray) -> list[tuple[int, int]]:
        """(first slot, tokens) of the prefix and of each answer of a row of one pair."""
        alone = self.shapes[-1]
        starts = [0, *range(alone.prefix_slots, len(role), alone.answer_slots)]
        ends = [*starts[1:], len(role)]
        return [(start, int(np.count_nonzero(role[start:end] != PAD))) for start, end in zip(starts, ends, strict=True)]

    def _dealt(self, step: int) -> tuple[Int[np.ndarray, "parts processes groups pairs"], Int[np.ndarray, "parts processes groups pairs"]]:
        """The items of a step, by device, and which one of its part each is without packing: a part has the pairs that it has there."""
        parts, processes, groups, _ = self._split.shape
        numbers = np.asarray(self._numbers(step)).reshape(parts, -1)
        turn = np.stack([deal(self._sizes[part], processes * groups).ravel() for part in numbers])
        return np.take_along_axis(numbers, turn, axis=1).reshape(self._split.shape), turn.reshape(self._split.shape)

    def _shown(self, dealt: Int[np.ndarray, "parts processes groups pairs"]) -> tuple[np.ndarray, np.ndarray, int]:
        """For each pair the place of its pictures among its device's distinct ones, and whether it shows them first; the most of a device."""
        alone = self._pictures[dealt]
        _, first = places(alone)
        tiles = np.where(first, self._tiles[dealt], 0)
        leader = np.argmax(alone[..., :, None] == alone[..., None, :], axis=-1)
        tile = np.take_along_axis(np.cumsum(tiles, axis=-1) - tiles, leader, axis=-1)
        return tile, first, int(tiles.sum(axis=-1).max())

    def _make(self, step: int) -> _Step:
        dealt, turn = self._dealt(step)
        tile, first, most = self._shown(dealt)
        groups = self._sizes[dealt].reshape(-1, *dealt.shape[-1:], self._sizes.shape[1])
        number, rows = first_that_holds(self.shapes, groups, most)
        return _Step(dealt, turn, rows.reshape(dealt.shape), first, tile, self._tiles[dealt], number)
