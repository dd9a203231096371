"""Batches for training and for one ordered pass, read with Grain.

The order of training rows is a function of the seed alone: step s holds rows [s B, (s + 1) B) of an endless sequence
(`buckets.TrainingOrder`) in which every epoch is its own shuffle, and batches run across epoch ends. Process p of n takes rows p, p + n,
... of it. So the rows of a step, and the saved state (how many rows are behind us), are the same for any number of processes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from mmalign_jax.data.buckets import TrainingOrder
from mmalign_jax.data.layout import RowLayout, RowProcessor, lay_out
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.errors import UserError
from mmalign_jax.types import PairBatch

# More arrays of a row, named as in `types.PairBatch`: (number of the item, its layout) -> arrays
Extra = Callable[[int, RowLayout], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _LayOut:
    """Number of an item -> row. Reading and decoding happen here, on Grain's threads."""

    records: Records
    processor: RowProcessor
    plan: RowPlan
    layouts: Sequence[RowLayout]
    layout_of: np.ndarray  # number of the layout of each item
    extras: Sequence[Extra] = ()

    @classmethod
    def by_bucket(cls, records: Records, processor: RowProcessor, plan: RowPlan, extras: Sequence[Extra]) -> "_LayOut":
        layout_of = np.zeros(len(plan.items), np.int32)
        for number, bucket in enumerate(plan.buckets):
            layout_of[bucket.members] = number
        return cls(records, processor, plan, [bucket.layout for bucket in plan.buckets], layout_of, extras)

    @classmethod
    def in_one(cls, records: Records, processor: RowProcessor, plan: RowPlan, extras: Sequence[Extra]) -> "_LayOut":
        return cls(records, processor, plan, [plan.layout], np.zeros(len(plan.items), np.int32), extras)

    def __call__(self, number: int) -> dict[str, Any]:
        index, pref = map(int, self.plan.items[number])
        record, layout = self.records[index], self.layout_of[number]
        tokens = None if self.plan.tokens is None else self.plan.tokens[number]
        row = lay_out(record, self.plan.choice(record, pref), self.processor, self.layouts[layout], tokens)
        for extra in self.extras:
            row |= extra(number, self.layouts[layout])
        return {**row, "layout": layout}


class Loader:
    """An endless iterator of `PairBatch` with numpy arrays `[A, b, ...]`, b the rows of this process in one of A parts of a step."""

    def __init__(
        self,
        rows: grain.MapDataset,
        plan: RowPlan,
        *,
        batch_size: int,
        accumulate: int,
        process: tuple[int, int],
        workers: int,
        seed: int,
    ):
        self._rows, self._layouts = rows, [bucket.layout for bucket in plan.buckets]
        self._batch_size, self._accumulate, self._process, self._workers = batch_size, accumulate, process, workers
        buckets = hashlib.sha256(b"".join(bucket.members.astype("<i8").tobytes() + b"|" for bucket in plan.buckets)).hexdigest()[:16]
        self._identity = {"seed": seed, "items": len(plan.items), "batch_size": batch_size, "buckets": buckets}
        self._start(0)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> PairBatch:
        arrays = next(self._batches)
        self._behind += self._batch_size
        return _batch(jax.tree.map(lambda value: value.reshape(*self._lead, *value.shape[1:]), arrays), self._layouts)

    def begin(self) -> PairBatch:
        """Begins to make the next batch on the threads, and says what it will be: arrays as shapes and types.

        Raises:
          DataError: its first row cannot be read.
        """
        self._batches.start_prefetch()
        # all rows of a step have one layout, and what an extra adds to it is known when it has been made
        row = self._rows[self._behind + self._process[0]]
        layout = self._layouts[int(row.pop("layout"))]
        lead = self._lead
        arrays = jax.tree.map(lambda value: jax.ShapeDtypeStruct((*lead, *np.shape(value)), np.asarray(value).dtype), row)
        return PairBatch(**arrays, prefix_slots=layout.prefix_slots, answer_slots=layout.answer_slots)

    def get_state(self) -> dict[str, int]:
        """What JSON can hold: the rows that all processes together have taken, and what the order depends on."""
        return {"rows": self._behind, **self._identity}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to where `get_state` was called, also with another number of processes.

        Raises:
          UserError: the state belongs to another seed or another set of rows.
        """
        identity = {name: state.get(name) for name in self._identity}
        if identity != self._identity or not isinstance(state.get("rows"), int):
            raise UserError(
                f"the saved position in the data is of another run: {identity}, this run has {self._identity}; use a new --workdir"
            )
        self._start(state["rows"])

    @property
    def _lead(self) -> tuple[int, int]:
        """(A, b)"""
        return self._accumulate, self._batch_size // (self._accumulate * self._process[1])

    def _start(self, behind: int) -> None:
        index, count = self._process
        self._behind = behind
        mine, rows = self._rows[behind + index :: count], self._batch_size // count
        self._batches = iter(mine.to_iter_dataset(_read_options(self._workers, rows)).batch(rows))


def make_loader(
    records: Records,
    processor: RowProcessor,
    plan: RowPlan,
    *,
    batch_size: int,
    accumulate: int = 1,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 4,
    extras: Sequence[Extra] = (),
) -> Loader:
    """The training loader over `plan.items`.

    Args:
      batch_size: rows of one optimizer step over all processes.
      accumulate: A, the parts of a step.
      process_index, process_count: of the processes that feed different rows (`device.process_slice`).
      workers: threads that read and decode; 0: none.
      extras: what else rows hold.

    Raises:
      UserError: `accumulate * process_count` does not divide `batch_size`.
    """
    if batch_size % (accumulate * process_count):
        raise UserError(
            f"config.train.batch_size: {batch_size} is not a multiple of accumulate = {accumulate} times {process_count} processes"
        )
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])  # Grain takes 32 bits
    order = TrainingOrder(plan.buckets, batch_size, shuffle_seed)
    rows = grain.MapDataset.source(order).map(_LayOut.by_bucket(records, processor, plan, extras))
    process = (process_index, process_count)
    return Loader(rows, plan, batch_size=batch_size, accumulate=accumulate, process=process, workers=workers, seed=seed)


@dataclasses.dataclass(frozen=True)
class PassBatch:
    """A batch `[b, ...]` of an ordered pass. `valid bool[b]` is false on the rows that only fill the last batch;
    `items i32[b, 2]` are the rows of `plan.items`."""

    batch: PairBatch
    valid: np.ndarray
    items: np.ndarray


def one_pass(
    records: Records,
    processor: RowProcessor,
    plan: RowPlan,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 4,
    extras: Sequence[Extra] = (),
) -> Iterator[PassBatch]:
    """Every row of `plan.items` once and in order, for evaluation and pair making.

    The last batch is filled with copies of the last row. Process p of n gets rows p, p + n, ... of each batch.

    Raises:
      UserError: `process_count` does not divide `batch_size`.
    """
    if batch_size % process_count:
        raise UserError(f"batch_size: {batch_size} is not a multiple of the {process_count} processes")
    count = len(plan.items)
    lay = _LayOut.in_one(records, processor, plan, extras)

    def row(index: int) -> dict[str, Any]:
        number = min(index, count - 1)
        return {**lay(number), "valid": np.bool_(index < count), "items": plan.items[number]}

    padded = -(-count // batch_size) * batch_size
    rows = grain.MapDataset.range(padded)[process_index::process_count].map(row)
    for arrays in rows.to_iter_dataset(_read_options(workers)).batch(batch_size // process_count):
        valid, items = arrays.pop("valid"), arrays.pop("items")
        yield PassBatch(_batch(arrays, [plan.layout]), valid, items)


def bucket_pass(
    records: Records,
    processor: RowProcessor,
    plan: RowPlan,
    numbers: np.ndarray,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 4,
    extras: Sequence[Extra] = (),
) -> Iterator[tuple[PairBatch, np.ndarray]]:
    """The items `numbers i[n]` of one bucket once and in order, laid out as training does: batches `[b, ...]`, and `i32[b]`, each row's number.

    The last batch is filled with copies of the last row, whose number is -1. Process p of n gets rows p, p + n, ... of each batch.

    Raises:
      UserError: `process_count` does not divide `batch_size`.
    """
    if batch_size % process_count:
        raise UserError(f"batch_size: {batch_size} is not a multiple of the {process_count} processes")
    lay = _LayOut.by_bucket(records, processor, plan, extras)

    def row(index: int) -> dict[str, Any]:
        number = int(numbers[min(index, len(numbers) - 1)])
        return {**lay(number), "number": np.int32(number if index < len(numbers) else -1)}

    padded = -(-len(numbers) // batch_size) * batch_size
    rows = grain.MapDataset.range(padded)[process_index::process_count].map(row)
    for arrays in rows.to_iter_dataset(_read_options(workers)).batch(batch_size // process_count):
        found = arrays.pop("number")
        yield _batch(arrays, lay.layouts), found


def _read_options(workers: int, rows: int = 0) -> grain.ReadOptions:
    """Args: rows: of a step, so that all of the next one are made beside it."""
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(4 * workers, rows if workers else 0))


def _batch(arrays: dict[str, Any], layouts: Sequence[RowLayout]) -> PairBatch:
    """The batch of rows that were all laid out by one of the layouts, `arrays["layout"]`."""
    layout = layouts[int(arrays.pop("layout").flat[0])]
    return PairBatch(**arrays, prefix_slots=layout.prefix_slots, answer_slots=layout.answer_slots)
