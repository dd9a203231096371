"""Batches for training and for one ordered pass, read with Grain.

The order of training rows is a function of the seed alone: step s holds rows [s B, (s + 1) B) of an endless sequence
(`buckets.TrainingOrder`) in which every epoch is its own shuffle, and batches run across epoch ends. Process p of n takes the p-th of n
equal runs of rows of each part of a step. So the rows of a step, their order, and the saved state (how many rows are behind us), are the
same for any number of processes. Pictures that several rows of a device show are read, decoded and handed over once (`shared_pictures`).
Where several pairs share a row, "rows" here are pairs: each part of a step has the same ones, dealt to devices by their length (`packed_rows`).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from mmalign_jax.data.buckets import TrainingOrder
from mmalign_jax.data.features import RowFeatures
from mmalign_jax.data.layout import RowLayout, RowProcessor, lay_out_pictures, lay_out_tokens, tokenize
from mmalign_jax.data.packed_rows import PackedPlace, PackedRows
from mmalign_jax.data.packing import Chosen, Cost, PackedShape
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.data.shared_pictures import OwnRows, Place, Split, stack
from mmalign_jax.errors import UserError
from mmalign_jax.types import PairBatch

# More arrays of a row, named as in `types.PairBatch`: (number of the item, its layout) -> arrays
Extra = Callable[[int, RowLayout], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _LayOut:
    """Number of an item -> row, with its pictures (or what the tower makes of them) or without. Reading and decoding happen here, on Grain's
    threads."""

    records: Records
    processor: RowProcessor
    plan: RowPlan
    layouts: Sequence[RowLayout]
    layout_of: np.ndarray  # number of the layout of each item
    extras: Sequence[Extra] = ()
    features: RowFeatures | None = None

    @classmethod
    def by_bucket(
        cls, records: Records, processor: RowProcessor, plan: RowPlan, extras: Sequence[Extra], features: RowFeatures | None
    ) -> "_LayOut":
        layout_of = np.zeros(len(plan.items), np.int32)
        for number, bucket in enumerate(plan.buckets):
            layout_of[bucket.members] = number
        return cls(records, processor, plan, [bucket.layout for bucket in plan.buckets], layout_of, extras, features)

    @classmethod
    def in_one(cls, records: Records, processor: RowProcessor, plan: RowPlan, extras: Sequence[Extra]) -> "_LayOut":
        return cls(records, processor, plan, [plan.layout], np.zeros(len(plan.items), np.int32), extras)

    def __call__(self, number: int, pictures: bool = True) -> dict[str, Any]:
        index, pref = map(int, self.plan.items[number])
        record, layout = self.records[index], self.layouts[self.layout_of[number]]
        choice, limits = self.plan.choice(record, pref), {"max_pixels": layout.max_pixels, "max_bytes": layout.max_bytes}
        known = None if self.plan.tokens is None else self.plan.tokens[number]
        tokens = known or tokenize(record, choice, self.processor, layout.answers, **limits)
        row = lay_out_tokens(record, choice, self.processor, layout, tokens)
        if pictures:
            row |= (self.features or lay_out_pictures)(record, self.processor, layout, tokens)
        for extra in self.extras:
            row |= extra(number, layout)
        return {**row, "layout": self.layout_of[number]}

    def at(self, place: Place | PackedPlace) -> tuple[Place | PackedPlace, dict[str, Any]]:
        return place, self(place.number, place.brings)


class Loader:
    """An endless iterator of `PairBatch` with numpy arrays `[A, b, ...]`, b the rows of this process in one of A parts of a step.

    `sizes`: for how many sets of pictures of a device there is a shape; the last is its number of rows, each with its own. (1,) where pairs share
    rows: all of a device show one set, as large as the shape says.
    `packing`: of rows with several pairs, their shapes, and what these mean; None where a row is a pair.
    """

    def __init__(self, rows: OwnRows | PackedRows, lay_out: _LayOut, split: Split, workers: int, identity: dict[str, Any]):
        self._own, self._rows, self._split, self._workers = rows, grain.MapDataset.source(rows).map(lay_out.at), split, workers
        self.packing: Chosen | None = rows.chosen if isinstance(rows, PackedRows) else None
        self._layouts: Sequence[RowLayout | PackedShape] = lay_out.layouts if self.packing is None else self.packing.shapes
        self._identity, self.sizes = identity, rows.sizes
        self._start(0)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> PairBatch:
        arrays, parts = next(self._batches), self._split.parts
        self._behind += self._split.batch
        return _batch(jax.tree.map(lambda value: value.reshape(parts, len(value) // parts, *value.shape[1:]), arrays), self._layouts)

    def begin(self) -> PairBatch:
        """Begins to make the next batch on the threads, and says what it will be: arrays as shapes and types.

        Raises:
          DataError: its first row cannot be read.
        """
        self._batches.start_prefetch()
        # all rows of a step have one layout, and what an extra adds to it is known when it has been made; the first row has its pictures with it
        place, row = self._rows[self._behind // self._split.processes]
        number = int(row["layout"]) if self.packing is None else place.shape
        return _batch({**self._own.form(place, row), "layout": np.array(number)}, self._layouts)

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

    def _start(self, behind: int) -> None:
        self._behind, own = behind, self._split.batch // self._split.processes
        mine = self._rows[behind // self._split.processes :].to_iter_dataset(_read_options(self._workers, own))
        self._batches = iter(mine.batch(own, batch_fn=self._own.stack))


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
    devices: int = 0,
    order: str = "shuffled",
    features: RowFeatures | None = None,
    packed: Cost | None = None,
) -> Loader:
    """The training loader over `plan.items`.

    Args:
      batch_size: rows of one optimizer step over all processes.
      accumulate: A, the parts of a step.
      process_index, process_count: of the processes that feed different rows (`device.process_slice`).
      workers: threads that read and decode; 0: none.
      extras: what else rows hold.
      devices: of one process, that rows are split over; the rows of a device share pictures. 0: every row has its own.
      order: "shuffled", or "by_image": rows that show the same pictures follow one another.
      features: rows hold these in the place of pixels.
      packed: what the rows of a device cost, by which the shapes of rows with several pairs are chosen; None: a row is a pair. The plan then has
        one layout, and a process has devices.

    Raises:
      UserError: `accumulate * process_count` does not divide `batch_size`.
      ValueError: pairs share rows, and the plan has several layouts.
    """
    if packed is not None and len(plan.buckets) > 1:
        raise ValueError(f"rows of several pairs have one layout, and the plan has {len(plan.buckets)}")
    if batch_size % (accumulate * process_count):
        raise UserError(
            f"config.train.batch_size: {batch_size} is not a multiple of accumulate = {accumulate} times {process_count} processes"
        )
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])  # Grain takes 32 bits
    by_image = order == "by_image"
    sequence = TrainingOrder(plan.buckets, batch_size, shuffle_seed, plan.pictures if by_image else None)
    numbers = lambda step: np.array([sequence[step * batch_size + row] for row in range(batch_size)])  # noqa: E731
    split = Split(batch_size, accumulate, process_count, devices)
    if packed is None:
        rows = OwnRows(numbers, plan.pictures, split, process_index, tried=max(1, len(plan.items) // batch_size))
    else:
        known = (plan.lengths, plan.pictures, plan.buckets[0].layout, processor.traits)
        rows = PackedRows(numbers, *known, split, process_index, packed)
    depends = b"".join(bucket.members.astype("<i8").tobytes() + b"|" for bucket in plan.buckets)
    depends += plan.pictures.astype("<i4").tobytes() if by_image else b""
    buckets = hashlib.sha256(depends).hexdigest()[:16]
    identity = {"seed": seed, "items": len(plan.items), "batch_size": batch_size, "buckets": buckets}
    return Loader(rows, _LayOut.by_bucket(records, processor, plan, extras, features), split, workers, identity)


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
    devices: int = 0,
    features: RowFeatures | None = None,
) -> Iterator[tuple[PairBatch, np.ndarray]]:
    """The items `numbers i[n]` of one bucket once and in order, laid out as training does: batches `[b, ...]`, and `i32[b]`, each row's number.

    The last batch is filled with copies of the last row, whose number is -1. Process p of n gets the p-th of n runs of rows of each batch.

    Args:
      devices: of one process, see `make_loader`; so is `features`.

    Raises:
      UserError: `process_count` does not divide `batch_size`.
    """
    if batch_size % process_count:
        raise UserError(f"batch_size: {batch_size} is not a multiple of the {process_count} processes")
    lay, last = _LayOut.by_bucket(records, processor, plan, extras, features), len(numbers) - 1
    of_batch = lambda step: np.asarray(numbers)[np.minimum(step * batch_size + np.arange(batch_size), last)]  # noqa: E731
    batches = -(-len(numbers) // batch_size)
    own = OwnRows(of_batch, plan.pictures, Split(batch_size, 1, process_count, devices), process_index, tried=batches)

    def row(place: Place) -> tuple[Place, dict[str, Any]]:
        return place, {**lay.at(place)[1], "number": np.int32(place.number if place.position <= last else -1)}

    rows = grain.MapDataset.source(own)[: batches * (batch_size // process_count)].map(row)
    for arrays in rows.to_iter_dataset(_read_options(workers)).batch(batch_size // process_count, batch_fn=stack):
        found = arrays.pop("number")
        yield _batch(arrays, lay.layouts), found


def _read_options(workers: int, rows: int = 0) -> grain.ReadOptions:
    """Args: rows: of a step, so that all of the next one are made beside it."""
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(4 * workers, rows if workers else 0))


def _batch(arrays: dict[str, Any], layouts: Sequence[RowLayout | PackedShape]) -> PairBatch:
    """The batch of rows that were all laid out by one of the layouts, `arrays["layout"]`."""
    layout = layouts[int(arrays.pop("layout").flat[0])]
    slots = {"prefix_slots": layout.prefix_slots, "answer_slots": layout.answer_slots}
    return PairBatch(**{"images": None} | arrays, **slots, longest=layout.longest if isinstance(layout, PackedShape) else None)
