"""Which records BDHS works on at a time: device batches as full as can be, and few records held."""

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
      contexts: what its next attempt goes on from, a row of a device batch each; none: it answers the prompt alone (unguided).
      plan: the split of each sentence, for a guided attempt.
    """

    order: int
    record: PreferenceRecord
    reference: Reference
    prompt: RowTokens
    place: int = -1
    iteration: int = 1
    plan: Sequence[Split] = ()
    contexts: Sequence[str] = ()


class Schedule:
    """A record that is done makes room for the next one, whatever iterations the others are in.

    Unguided attempts are long and, when others are guided, few: they wait until they fill a batch of their own, or until nothing new may
    start because records behind them would have to be held.

    Args:
      works: in order.
      rows: of a device batch of guided attempts.
      unguided_rows: of one of unguided attempts.
    """

    def __init__(self, works: Iterator[Work], rows: int, unguided_rows: int):
        self._works, self._rows, self._unguided_rows = works, rows, unguided_rows
        self._upcoming = next(works, None)
        self._active: list[Work] = []

    @property
    def going(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._active) or self._upcoming is not None

    def admit(self) -> list[Work]:
        """Starts records while there is room for them; each has a place among `rows + unguided_rows`."""
        free = sorted(set(range(self._rows + self._unguided_rows)) - {work.place for work in self._active})
        used, admitted = sum(len(work.contexts) for work in self._active), []
        while self._upcoming is not None and free and not self._far_behind:
            if used and used + len(self._upcoming.contexts) > self._rows:
                break
            used += len(self._upcoming.contexts)
            self._upcoming.place = free.pop(0)
            admitted.append(self._upcoming)
            self._active.append(self._upcoming)
            self._upcoming = next(self._works, None)
        return admitted

    def guided(self) -> list[Work]:
        return [work for work in self._active if work.contexts]

    def unguided(self) -> list[Work]:
        """Those whose time has come."""
        waiting = [work for work in self._active if not work.contexts]
        oldest_waits = bool(waiting) and waiting[0] is min(self._active, key=lambda work: work.order)
        if len(waiting) == len(self._active) or (self._far_behind and oldest_waits):
            return waiting
        return waiting[: len(waiting) // self._unguided_rows * self._unguided_rows]

    def done(self, work: Work) -> None:
        self._active.remove(work)

    @property
    def _far_behind(self) -> bool:
        """Whether the oldest record is so far behind that what comes after it would pile up."""
        oldest = min((work.order for work in self._active), default=None)
        return oldest is not None and self._upcoming is not None and self._upcoming.order - oldest >= _SPREAD * self._rows
