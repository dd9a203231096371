"""Which records BDHS works on at a time: decode steps as full as can be, and few records held."""

import dataclasses
from collections.abc import Iterator, Sequence

from mmalign_jax.data.layout import RowTokens
from mmalign_jax.pairs.splits import Reference, Split
from mmalign_jax.types import PreferenceRecord

_SPREAD = 8  # batches of rows between the oldest record that is worked on and the newest


@dataclasses.dataclass(eq=False)
class Work:
    """A record on its way through the iterations.

    Args:
      order: its number among the records.
      prompt: its tokens up to the answer.
      place: of its image features in the pool.
      contexts: what its next attempt goes on from, a row each; "": from the prompt. None at all: the attempt waits for others like it.
      plan: the split of each sentence, for a guided attempt; None for another.
    """

    order: int
    record: PreferenceRecord
    reference: Reference
    prompt: RowTokens
    place: int = -1
    iteration: int = 1
    plan: Sequence[Split] | None = None
    contexts: Sequence[str] = ()


class Schedule:
    """A record that is done makes room for the next one, whatever iterations the others are in.

    The last attempts of guided records are unguided, long and few: they wait until they fill a batch of their own, or until nothing new may
    start because records behind them would have to be held.

    Args:
      works: in order.
      rows: that are decoded together.
      unguided_rows: of a batch of attempts that wait.
      at_once: how many records start together; their pictures are encoded together.
      places: how many can be worked on at a time; more than `unguided_rows`.
    """

    def __init__(self, works: Iterator[Work], rows: int, unguided_rows: int, at_once: int, places: int):
        self._works, self._rows, self._unguided_rows, self._at_once, self._places = works, rows, unguided_rows, at_once, places
        self._upcoming = next(works, None)
        self._active: dict[int, Work] = {}  # by place

    @property
    def going(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._active) or self.more

    @property
    def more(self) -> bool:
        """Whether there are records that were not begun."""
        return self._upcoming is not None

    def admit(self, room: int) -> list[Work]:
        """Starts records, `at_once` together, until they fill `room` rows; each has a place."""
        free = [place for place in range(self._places) if place not in self._active]
        used, admitted = 0, []
        while used < room:
            for _ in range(self._at_once):
                if not (self.more and free) or self._far_behind:
                    return admitted
                work, self._upcoming = self._upcoming, next(self._works, None)
                work.place = free.pop(0)
                self._active[work.place] = work
                used += len(work.contexts)
                admitted.append(work)
        return admitted

    def waiting(self) -> list[Work]:
        """Those of the attempts that wait whose time has come."""
        waiting = [work for work in self._active.values() if not work.contexts]
        if len(waiting) == len(self._active) or (self._far_behind and not self._oldest.contexts):
            return waiting
        return waiting[: len(waiting) // self._unguided_rows * self._unguided_rows]

    def at(self, place: int) -> Work:
        """The record whose features are there."""
        return self._active[place]

    def done(self, work: Work) -> None:
        del self._active[work.place]

    @property
    def _oldest(self) -> Work:
        return min(self._active.values(), key=lambda work: work.order)

    @property
    def _far_behind(self) -> bool:
        """Whether the oldest record is so far behind that what comes after it would pile up."""
        return bool(self._active) and self.more and self._upcoming.order - self._oldest.order >= _SPREAD * self._rows
