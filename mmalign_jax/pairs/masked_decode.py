"""Answers that are written while most image tokens are hidden: the device part of BDHS.

The decoder does not compute hidden image tokens: a row's prefix shrinks to what is visible of it. Rows are prefilled a few at a time and take
the places of rows that are done (`sampling.turns`), so that decode steps are full for as long as rows wait.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32

from mmalign_jax.config import PairsConfig
from mmalign_jax.data.buckets import ladder
from mmalign_jax.data.device import to_device
from mmalign_jax.data.layout import RowLayout, RowTokens, lay_out_tokens, stack_rows
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.feature_pool import rows_of
from mmalign_jax.sampling import DecodeOptions, LaneStart, compiler_options, kept_slots, lane_keys, turns, without_hidden
from mmalign_jax.types import PREFIX, PairBatch, PreferenceRecord

_NO_PICTURES = np.zeros((0, 1, 1, 3), np.uint8)  # the features are at hand
_FEWEST = 4  # rows of a decode step; fewer take no less time


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A row to prefill, and its lanes: lane number -> tokens of the row's answer in front of which it starts.

    Args:
      row: its tokens; the answer, where there is one, is the context.
      place: of the record's features in the pool.
      number: of the attempt; with the record's id and a lane's number, what all draws are made from.
    """

    record: PreferenceRecord
    row: RowTokens
    place: int
    number: int
    lanes: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class Written:
    """The tokens of one lane, a stop token included; `stopped` is false when it ran out of slots."""

    tokens: Int32[np.ndarray, " n"]
    stopped: bool


@dataclasses.dataclass(frozen=True)
class MaskedDecoder:
    """How jobs are run.

    Args:
      layout: of rows with one answer (the context), or with none when all lanes start behind the prompt.
      lanes: S, lane numbers are below it.
      config: of it `rho_th` and `mask_scope`.
      rows: that are decoded together, a multiple of what the mesh splits.
      at_once: rows that are prefilled together, likewise; at most `rows`.
    """

    model: Mllm
    processor: Processor
    mesh: Mesh
    layout: RowLayout
    lanes: int
    options: DecodeOptions
    config: PairsConfig
    rows: int
    at_once: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many rows a decode step may have. Rows that several devices hold stay where they are."""
        out = [self.rows]
        while self.mesh.size == 1 and out[-1] // 2 >= max(_FEWEST, self.at_once):
            out.append(out[-1] // 2)
        return tuple(out)


class Decoding:
    """Jobs of one policy on their way, in the order in which they were added.

    Args:
      params: the policy's whole tree.
      seed: of all draws.
    """

    def __init__(self, decoder: MaskedDecoder, params: dict, seed: int):
        self._decoder, self._params = decoder, params
        self._mask_key, self._sample_key = jax.random.split(jax.random.key(seed))
        self._queue: list[Job] = []
        self._turns: turns.Turns | None = None
        self._jobs: list[Job | None] = [None] * decoder.rows

    @property
    def busy(self) -> int:
        """Rows at work."""
        return sum(job is not None for job in self._jobs)

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return len(self._queue)

    @property
    def room(self) -> int:
        """How many more jobs could start now."""
        return max(self._decoder.rows - self.busy - self.queued, 0)

    def add(self, jobs: Sequence[Job]) -> None:
        """Jobs that start when there is room for them."""
        self._queue += jobs

    def advance(self, features: Float[Array, "N F U"], more: bool) -> list[tuple[Job, dict[int, Written]]]:
        """Works until some jobs are done, and returns what their lanes wrote, by lane number.

        Args:
          features: of the records, by `Job.place`.
          more: whether others will be added when some are done. Otherwise decode steps get smaller as jobs come to their end.

        Raises:
          DataError: a job's row does not fit into the layout.
        """
        if not self.busy:
            self._turns, self._jobs = None, [None] * self._decoder.rows
        while self._queue and (free := self._jobs.count(None)) >= min(len(self._queue), self._decoder.at_once):
            count = min(len(self._queue), self._decoder.at_once, free)
            self._start(features, self._queue[:count])
            del self._queue[:count]
        if not self.busy:
            return []
        decoder = self._decoder
        if more or self._queue:
            most = len(self._jobs) - decoder.at_once
        else:
            self._leave_out()
            most = 0 if len(self._jobs) == decoder.sizes[-1] else len(self._jobs) // 2
        with jax.set_mesh(decoder.mesh):
            advance = _compiled(decoder.mesh).advance
            # at least one comes to its end
            self._turns = advance(decoder.model, self._params, decoder.options, self._turns, np.int32(min(most, self.busy - 1)))
            lane, written = jax.device_get((self._turns.lane, self._turns.written))
        out = []
        for place, job in enumerate(self._jobs):
            if job is not None and lane[place] == decoder.lanes:
                self._jobs[place] = None
                tokens = {one: written.tokens[place, one, : written.lengths[place, one]] for one in job.lanes}
                out.append((job, {one: Written(ids, bool(written.stopped[place, one])) for one, ids in tokens.items()}))
        return out

    def _start(self, features: Array, jobs: Sequence[Job]) -> None:
        """Prefills jobs and gives them places."""
        decoder = self._decoder
        with jax.set_mesh(decoder.mesh):
            new = self._begun(features, jobs)
            if self._turns is None:
                self._turns = _compiled(decoder.mesh).blank(new, decoder.rows)
            self._turns = turns.wider(self._turns, new.slots)
            source = np.full(len(self._jobs), -1, np.int32)
            free = [place for place, job in enumerate(self._jobs) if job is None]
            for number, (place, job) in enumerate(zip(free, jobs, strict=False)):
                source[place], self._jobs[place] = number, job
            self._turns = _compiled(decoder.mesh).put(self._turns, new, to_device(source, decoder.mesh, batch_axis=0))

    def _begun(self, features: Array, jobs: Sequence[Job]) -> turns.Turns:
        decoder = self._decoder
        layout, config = decoder.layout, decoder.config
        rows = [lay_out_tokens(job.record, None, decoder.processor, layout, job.row) | {"images": _NO_PICTURES} for job in jobs]
        slot, active = np.zeros((decoder.at_once, decoder.lanes), np.int32), np.zeros((decoder.at_once, decoder.lanes), bool)
        place, number = np.zeros(decoder.at_once, np.int32), np.zeros(decoder.at_once, np.int32)
        for index, (job, row) in enumerate(zip(jobs, rows, strict=True)):
            place[index], number[index] = job.place, job.number
            prefix = int(np.sum(row["role"] == PREFIX))
            for lane, kept in job.lanes.items():
                slot[index, lane] = layout.prefix_slots + kept - 1 if kept else prefix - 1
                active[index, lane] = True
        rows += [rows[-1]] * (decoder.at_once - len(rows))  # they fill the batch and have no active lane
        batch = stack_rows(rows, layout)
        batch, start, place, number = to_device((batch, LaneStart(slot, active), place, number), decoder.mesh, batch_axis=0)
        visible, most = _visible(batch, start, self._mask_key, number, np.float32(config.rho_th))
        # what image tokens still see of each other has to be computed
        needed = max(int(most), usual_slots(rows, config.rho_th))
        whole = config.mask_scope == "text"
        slots = None if whole else next(length for length in ladder(layout.prefix_slots) if length >= needed)
        begin = functools.partial(_compiled(decoder.mesh).begin, decoder.model, decoder.options, slots)
        return begin(self._params, features, place, batch, visible, start, number, self._sample_key)

    def _leave_out(self) -> None:
        """Makes decode steps as small as the rows at work let them be."""
        size = min(size for size in self._decoder.sizes if size >= self.busy)
        if size < len(self._jobs):
            order = sorted(range(len(self._jobs)), key=lambda place: self._jobs[place] is None)[:size]
            self._jobs = [self._jobs[place] for place in order]
            with jax.set_mesh(self._decoder.mesh):
                self._turns = _compiled(self._decoder.mesh).pick(self._turns, np.array(order, np.int32))


@dataclasses.dataclass(frozen=True)
class _Compiled:
    begin: Callable[..., turns.Turns]
    advance: Callable[..., turns.Turns]
    blank: Callable[..., turns.Turns]
    put: Callable[..., turns.Turns]
    pick: Callable[..., turns.Turns]


@functools.cache
def _compiled(mesh: Mesh) -> _Compiled:
    return _Compiled(
        begin=jax.jit(_begin, static_argnums=(0, 1, 2), compiler_options=compiler_options(mesh)),
        advance=jax.jit(turns.advance, static_argnums=(0, 2), donate_argnums=3, compiler_options=compiler_options(mesh)),
        blank=jax.jit(lambda new, rows: turns.idle(turns.pick(new, jnp.arange(rows) % new.lane.shape[0])), static_argnums=1),
        put=jax.jit(turns.put, donate_argnums=0),
        pick=jax.jit(turns.pick),
    )


def usual_slots(rows: Sequence[Mapping[str, Any]], rho_th: float) -> int:
    """Slots that the visible prefix of each row hardly ever exceeds: four standard deviations above the mean.

    How many image tokens a mask leaves differs from batch to batch. Were a prefix as long as the batch at hand needs it, there would be
    several lengths, and each takes a compilation that costs more than the slots.
    """
    most = 0
    for row in rows:
        images, prefix = int(np.sum(row["image_index"] >= 0)), int(np.sum(row["role"] == PREFIX))
        deviation = math.sqrt(images * rho_th * (1 - rho_th))
        most = max(most, prefix - images + min(images, math.ceil(images * (1 - rho_th) + 4 * deviation)))
    return most


@jax.jit
def _visible(
    batch: PairBatch, start: LaneStart, key: Array, number: Int[Array, " B"], rho_th: Float[Array, ""]
) -> tuple[Bool[Array, "B T"], Int[Array, ""]]:
    """One mask a row, shared by its lanes and steps (arXiv 2407.02477, eq. 6), and the most slots of a prefix that have to be computed.

    Rows without an active lane, which fill the batch, do not count; what is cut off of them is read by nobody.
    """
    row_keys = lane_keys(key, batch.record_key, number, 1)[:, 0]
    keep = jax.vmap(lambda one: jax.random.uniform(one, batch.tokens.shape[1:]) >= rho_th)(row_keys)
    # by the image token's number in its row, so that neither the words around it nor the slots have a say
    is_image = batch.image_index >= 0
    ordinal = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)
    visible = ~is_image | jnp.take_along_axis(keep, ordinal, axis=1)
    needed = jnp.sum(kept_slots(batch, visible), axis=1)
    return visible, jnp.max(jnp.where(jnp.any(start.active, axis=1), needed, 0))


def _begin(
    model: Mllm,
    options: DecodeOptions,
    prefix_slots: int | None,
    params: dict,
    pool: Float[Array, "N F U"],
    place: Int[Array, " B"],
    batch: PairBatch,
    visible: Bool[Array, "B T"],
    start: LaneStart,
    number: Int[Array, " B"],
    key: Array,
) -> turns.Turns:
    """Prefill of a few rows, and the first tokens of their lanes.

    Args:
      prefix_slots: to which prefixes shrink; None: image tokens see all of each other, and text what is visible of them.
    """
    if prefix_slots is not None:
        batch, visible, now_at = without_hidden(batch, visible, prefix_slots)
        start = LaneStart(jax.vmap(lambda values, slot: values[slot])(now_at, start.slot), start.active)
    prefill = model.prefill(params, rows_of(pool, place), batch, visible, images_see_all=prefix_slots is None)
    keys = lane_keys(key, batch.record_key, number, start.slot.shape[1])
    return turns.begin(model, params, prefill, batch, start, keys, options, visible)
