"""Records that are kept out of training, to be measured on: a share of them, by their pictures."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Int

from mmalign_jax.data.plan import Records
from mmalign_jax.errors import UserError
from mmalign_jax.types import PreferenceRecord


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some of the records, in order."""

    records: Records
    indices: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> PreferenceRecord:
        return self.records[int(self.indices[index])]


def split(records: Records, share: float, seed: int) -> tuple[Subset, Subset]:
    """(records to train on, records that are held out).

    Where a record goes is a function of the seed and its pictures' content, or of its id where it has none, so that records of the same pictures
    are on one side, and that neither order nor other records matter. Of rows of several pictures, one may come again among others.

    Raises:
      UserError: one of the two has no record.
    """
    held = np.array([_place(records[index], seed) < share for index in range(len(records))], bool)
    if held.all() or not held.any():
        side = "training" if held.all() else "the held-out pairs"
        raise UserError(f"config.data.holdout: {share} of {len(records)} records leaves none for {side}; choose another share, or 0")
    return Subset(records, np.flatnonzero(~held)), Subset(records, np.flatnonzero(held))


def _place(record: PreferenceRecord, seed: int) -> float:
    """A number in [0, 1)."""
    digest = hashlib.sha256(f"{seed}|".encode())
    pictures = [picture for medium in record.media for picture in medium.pictures]
    for content in pictures or [record.id.encode()]:
        digest.update(hashlib.sha256(content).digest())
    return int.from_bytes(digest.digest()[:6], "little") / 2**48
