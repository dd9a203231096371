"""Pictures of any size as patches: which patch stands in which slot of the tower, and which token it becomes (Qwen's vision towers)."""

import dataclasses

import numpy as np
from jaxtyping import Int32


@dataclasses.dataclass(frozen=True, eq=False)
class PatchOrder:
    """The patches of one picture or video in the tower's order, in whole runs of one window; see `types.Patches`.

    `cell`: for each of a patch's frames the tile, row and column that it is cut from. Slots without a patch are -1 everywhere.
    """

    cell: Int32[np.ndarray, "q C 3"]
    place: Int32[np.ndarray, "q 2"]
    grid: Int32[np.ndarray, "q 2"]
    segment: Int32[np.ndarray, " q"]


@dataclasses.dataclass(frozen=True)
class PatchGrid:
    """The patches of one picture or video, before they are put in order.

    Args:
      rows, columns: of patches, multiples of `merge`.
      tiles: frames; 1 for a picture.
      depth: frames that one patch spans. A picture is repeated, and so is the last frame of a video that ends before its patch does.
      merge: side of the square of patches that becomes one feature.
      window: side, in features, of the square that is one attention window; 0 without windows. Windows that reach over the border keep
        their slots.
    """

    rows: int
    columns: int
    tiles: int = 1
    depth: int = 1
    merge: int = 1
    window: int = 0

    @property
    def times(self) -> int:
        """Steps in time: groups of `depth` frames."""
        return -(-self.tiles // self.depth)

    @property
    def features(self) -> int:
        """Features of one step in time."""
        return (self.rows // self.merge) * (self.columns // self.merge)

    @property
    def slots(self) -> int:
        down, across, side = self._windows
        return self.times * down * across * (side * self.merge) ** 2

    @property
    def _windows(self) -> tuple[int, int, int]:
        """Windows down and across, and their side in features. Without windows every feature is its own."""
        side = self.window or 1
        return -(-self.rows // (side * self.merge)), -(-self.columns // (side * self.merge)), side

    def order(self) -> PatchOrder:
        """Slots run over times, windows row by row, features of a window row by row, and patches of a feature row by row."""
        down, across, side = self._windows
        shape = (self.times, down, across, side, side, self.merge, self.merge)
        time, window_row, window_column, feature_row, feature_column, row, column = np.indices(shape, np.int32).reshape(len(shape), -1)
        row = (window_row * side + feature_row) * self.merge + row
        column = (window_column * side + feature_column) * self.merge + column
        there = (row < self.rows) & (column < self.columns)
        tile = np.minimum(time[:, None] * self.depth + np.arange(self.depth, dtype=np.int32), self.tiles - 1)
        row_column = np.stack([row, column], axis=-1)
        cell = np.concatenate([tile[..., None], np.broadcast_to(row_column[:, None], (*tile.shape, 2))], axis=-1)
        hidden = lambda values: np.where(there.reshape(-1, *[1] * (values.ndim - 1)), values, -1).astype(np.int32)  # noqa: E731
        grid = np.broadcast_to(np.array([self.rows, self.columns]), row_column.shape)
        return PatchOrder(hidden(cell), hidden(row_column), hidden(grid), hidden(time))

    def feature_order(self) -> Int32[np.ndarray, " n"]:
        """For each feature in reading order (times, rows, columns) its number among the tower's slots, in units of one square."""
        down, across, side = self._windows
        time, row, column = self._reading
        window = (time * down + row // side) * across + column // side
        return (window * side**2 + row % side * side + column % side).astype(np.int32)

    def turns(self, clock: Int32[np.ndarray, " t"]) -> Int32[np.ndarray, "3 n"]:
        """Time, row and column of each feature in reading order; step t in time stands at `clock[t]`."""
        time, row, column = self._reading
        return np.stack([clock[time], row, column]).astype(np.int32)

    @property
    def _reading(self) -> np.ndarray:
        shape = (self.times, self.rows // self.merge, self.columns // self.merge)
        return np.indices(shape, np.int32).reshape(3, -1)
