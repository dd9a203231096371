"""The tower's features of a row's pictures, read in the place of the pictures: nothing is decoded."""

import dataclasses
from typing import Any

import numpy as np

from mmalign_jax.data.feature_store import FeatureStore
from mmalign_jax.data.layout import RowLayout, RowProcessor, RowTokens, lay_out_patches
from mmalign_jax.data.shared_pictures import digest
from mmalign_jax.errors import DataError
from mmalign_jax.hf.pictures import Expansion
from mmalign_jax.types import PreferenceRecord


@dataclasses.dataclass(frozen=True, eq=False)
class RowFeatures:
    """A record -> `features [G, Z]` of its row, as `types.PairBatch` calls them, and `patches` where pictures have any size.

    Slots of tiles and patches that the row does not have are zeros; no token points at them.

    Args:
      store: with every picture of the rows.
      tile: features of one tile; 0 where pictures have any size.
    """

    store: FeatureStore
    tile: int

    def __call__(self, record: PreferenceRecord, processor: RowProcessor, layout: RowLayout, row: RowTokens) -> dict[str, Any]:
        """Raises DataError where a file of the store is damaged, or was written for pictures of another size."""
        slots = layout.images * self.tile if self.tile else layout.patch_slots
        out, at = np.zeros((slots, self.store.width), self.store.dtype), 0
        for index, expansion in zip(row.media, row.expansions, strict=True):
            found, count = self.store.read(digest([record.media[index]])), features_of(expansion, self.tile)
            if len(found) != count:
                problem = f"{len(found)} features of a picture of record {record.id}, which takes {count}"
                raise DataError(problem, file=str(self.store.directory), mend="Delete the directory; it is computed again.")
            out[at : at + count] = found
            at += count
        return {"features": out} | lay_out_patches(processor, layout, row)


def features_of(expansion: Expansion, tile: int) -> int:
    """How many features of the tower a picture has. `tile` as in `RowFeatures`."""
    return expansion.tiles * tile if tile else expansion.slots
