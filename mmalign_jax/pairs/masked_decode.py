"""Answers that are written while most image tokens are hidden: the device part of BDHS.

Images are encoded once a record (`FeaturePool`; under noise once an attempt), whatever number of contexts it takes. The decoder does not
compute hidden image tokens: a row's prefix shrinks to what is visible of it.
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
from jaxtyping import Array, Bool, Float, Int, Int32, UInt, UInt8

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import PairsConfig
from mmalign_jax.data.buckets import ladder
from mmalign_jax.data.device import to_device
from mmalign_jax.data.layout import RowLayout, RowTokens, lay_out_pictures, lay_out_tokens, stack_rows
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.seen import encode_seen
from mmalign_jax.pairs.views import View
from mmalign_jax.sampling import (
    DecodeOptions,
    LaneStart,
    LaneTokens,
    compiler_options,
    decode_in_turn,
    kept_slots,
    lane_keys,
    without_hidden,
)  # fmt: skip
from mmalign_jax.types import PREFIX, PairBatch, Patches, PreferenceRecord, record_key

_NO_PICTURES = np.zeros((0, 1, 1, 3), np.uint8)  # the features are at hand


@dataclasses.dataclass(frozen=True)
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


class FeaturePool:
    """Image features of the records that are being worked on, on the device; each stays in its place until another takes it.

    Args:
      layout: of the pictures.
      places: how many records, a multiple of what the mesh splits.
      view: what is done to the pictures first, if anything.
    """

    def __init__(self, model: Mllm, processor: Processor, mesh: Mesh, layout: RowLayout, places: int, view: View | None):
        self._model, self._processor, self._mesh, self._layout, self._places = model, processor, mesh, layout, places
        self._view = view
        self._step = mesh_lib.batch_rows(mesh, -(-places // 4))  # few at a time: mostly it is some that change
        self._features: Array | None = None

    @property
    def features(self) -> Float[Array, "N F U"]:
        if self._features is None:
            raise ValueError("nothing is encoded yet")
        return self._features

    def put(self, params: dict, entries: Mapping[int, tuple[PreferenceRecord, RowTokens, int]], seed: int) -> None:
        """Encodes the pictures of records and puts them in the places that are named, over what was there.

        Args:
          entries: place -> record, its tokens, and the number of the attempt, which with seed and id decides what a view draws.

        Raises:
          DataError: a picture cannot be read.
        """
        places = sorted(entries)
        for start in range(0, len(places), self._step):
            chosen = places[start : start + self._step]
            rows = []
            for record, row, number in (entries[place] for place in chosen):
                drawn = {"record_key": np.uint32(record_key(record.id)), "number": np.int32(number)}
                rows.append(lay_out_pictures(record, self._processor, self._layout, row) | drawn)
            rows += [rows[-1]] * (self._step - len(rows))
            source = np.full(self._places, -1, np.int32)
            source[chosen] = np.arange(len(chosen))
            with jax.set_mesh(self._mesh):
                pictures: dict[str, Any] = to_device(jax.tree.map(lambda *leaves: np.stack(leaves), *rows), self._mesh, batch_axis=0)
                drawn = pictures["record_key"], pictures["number"], jax.random.key(seed)
                new = _encode(self._model, self._view, params, pictures["images"], pictures.get("patches"), *drawn)
                if self._features is None:
                    shape = (self._places, *new.shape[1:])
                    self._features = jnp.zeros(shape, new.dtype, device=mesh_lib.sharding(self._mesh, "batch", None, None))
                self._features = _replace(self._features, new, to_device(source, self._mesh, batch_axis=0))


class MaskedDecoder:
    """Runs jobs, a device batch at a time. Batches have few shapes: their prefixes shrink to a few lengths (`buckets.ladder`).

    Args:
      layout: of rows with one answer (the context), or with none when all lanes start behind the prompt.
      lanes: S, lane numbers are below it.
      config: of it `rho_th` and `mask_scope`.
      rows: of a device batch, a multiple of what the mesh splits.
    """

    def __init__(
        self,
        model: Mllm,
        processor: Processor,
        mesh: Mesh,
        layout: RowLayout,
        lanes: int,
        options: DecodeOptions,
        config: PairsConfig,
        rows: int,
    ):
        self._model, self._processor, self._mesh, self._layout, self._lanes = model, processor, mesh, layout, lanes
        self._options, self._rows = options, rows
        self._rho_th, self._whole = np.float32(config.rho_th), config.mask_scope == "text"

    def __call__(self, params: dict, features: Float[Array, "N F U"], jobs: Sequence[Job], seed: int) -> list[dict[int, Written]]:
        """What every job's lanes wrote, by lane number.

        Raises:
          DataError: a job's row does not fit into the layout.
        """
        out = []
        for start in range(0, len(jobs), self._rows):
            out += self._run(params, features, jobs[start : start + self._rows], seed)
        return out

    def _run(self, params: dict, features: Array, jobs: Sequence[Job], seed: int) -> list[dict[int, Written]]:
        rows = [lay_out_tokens(job.record, None, self._processor, self._layout, job.row) | {"images": _NO_PICTURES} for job in jobs]
        slot, active = np.zeros((self._rows, self._lanes), np.int32), np.zeros((self._rows, self._lanes), bool)
        place, number = np.zeros(self._rows, np.int32), np.zeros(self._rows, np.int32)
        for index, (job, row) in enumerate(zip(jobs, rows, strict=True)):
            place[index], number[index] = job.place, job.number
            prefix = int(np.sum(row["role"] == PREFIX))
            for lane, kept in job.lanes.items():
                slot[index, lane] = self._layout.prefix_slots + kept - 1 if kept else prefix - 1
                active[index, lane] = True
        rows += [rows[-1]] * (self._rows - len(rows))  # they fill the batch and have no active lane
        batch = stack_rows(rows, self._layout)
        with jax.set_mesh(self._mesh):
            on_device = to_device((batch, LaneStart(slot, active), place, number), self._mesh, batch_axis=0)
            batch, start, place, number = on_device
            mask_key, sample_key = jax.random.split(jax.random.key(seed))
            visible, most = _visible(batch, start, mask_key, number, self._rho_th)
            # what image tokens still see of each other has to be computed
            needed = max(int(most), usual_slots(rows, float(self._rho_th)))
            slots = None if self._whole else next(length for length in ladder(self._layout.prefix_slots) if length >= needed)
            complete = functools.partial(_completing(self._mesh), self._model, self._options, slots)
            samples = jax.device_get(complete(params, features, place, batch, visible, start, number, sample_key))

        def written(row: int, lane: int) -> Written:
            return Written(samples.tokens[row, lane, : samples.lengths[row, lane]], bool(samples.stopped[row, lane]))

        return [{lane: written(index, lane) for lane in job.lanes} for index, job in enumerate(jobs)]


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(
    model: Mllm,
    view: View | None,
    params: dict,
    images: UInt8[Array, "E M Y W 3"],
    patches: Patches | None,
    record_key: UInt[Array, " E"],
    number: Int[Array, " E"],
    key: Array,
) -> Float[Array, "E F U"]:
    return encode_seen(model, view, params, images, patches, lane_keys(key, record_key, number, 1)[:, 0])


@functools.partial(jax.jit, donate_argnames="pool")
def _replace(pool: Float[Array, "N F U"], new: Float[Array, "E F U"], source: Int[Array, " N"]) -> Float[Array, "N F U"]:
    """The pool with `new[source]` where `source` is not negative."""
    return jnp.where((source >= 0)[:, None, None], _rows_of(new, jnp.maximum(source, 0)), pool)


def _rows_of(values: Float[Array, "N F U"], index: Int[Array, " B"]) -> Float[Array, "B F U"]:
    return values.at[index].get(out_sharding=mesh_lib.out_sharding("batch", None, None))


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


@functools.cache
def _completing(mesh: Mesh) -> Callable[..., LaneTokens]:
    return jax.jit(_complete, static_argnums=(0, 1, 2), compiler_options=compiler_options(mesh))


def _complete(
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
) -> LaneTokens:
    """Prefill and decode of one device batch.

    Args:
      prefix_slots: to which prefixes shrink; None: image tokens see all of each other, and text what is visible of them.
    """
    if prefix_slots is not None:
        batch, visible, now_at = without_hidden(batch, visible, prefix_slots)
        start = LaneStart(jax.vmap(lambda values, slot: values[slot])(now_at, start.slot), start.active)
    prefill = model.prefill(params, _rows_of(pool, place), batch, visible, images_see_all=prefix_slots is None)
    keys = lane_keys(key, batch.record_key, number, start.slot.shape[1])
    return decode_in_turn(model, params, prefill, batch, start, keys, options, visible)
