"""Answers that are written while most image tokens are hidden: the device part of BDHS."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.data.device import to_device
from mmalign_jax.data.layout import RowLayout, lay_out, stack_rows
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.sampling import DecodeOptions, LaneStart, Samples, decode_lanes, lane_keys
from mmalign_jax.types import PREFIX, PairBatch, PreferenceRecord


@dataclasses.dataclass(frozen=True)
class Job:
    """A record whose response 0 is the context, and its lanes: lane number -> tokens of the response in front of which it starts.

    A lane's number, not its place among the others, is part of its random key.
    """

    record: PreferenceRecord
    lanes: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class Written:
    """The tokens of one lane, a stop token included; `stopped` is false when it ran out of slots."""

    tokens: Int32[np.ndarray, " n"]
    stopped: bool


class MaskedDecoder:
    """Runs jobs, a device batch at a time. Every batch has the same shape, so it is compiled once.

    Args:
      layout: of rows with one answer (the context), or with none when all lanes start behind the prompt.
      lanes: S, lane numbers are below it.
      rho_th: probability that an image token is hidden.
      batch_size: rows of a device batch, rounded up to what the mesh can split.
    """

    def __init__(
        self,
        model: Mllm,
        processor: Processor,
        mesh: Mesh,
        layout: RowLayout,
        lanes: int,
        options: DecodeOptions,
        rho_th: float,
        batch_size: int,
    ):
        self._model, self._processor, self._mesh, self._layout, self._lanes = model, processor, mesh, layout, lanes
        self._options, self._rho_th = options, rho_th
        self._rows = -(-batch_size // mesh_lib.batch_divisor(mesh)) * mesh_lib.batch_divisor(mesh)

    def __call__(self, params: dict, jobs: Sequence[Job], seed: int, number: int) -> list[dict[int, Written]]:
        """What every job's lanes wrote, by lane number.

        Args:
          seed, number: with the record's id and a lane's number, all that its draws depend on.

        Raises:
          DataError: a job's record does not fit into the layout.
        """
        out = []
        for start in range(0, len(jobs), self._rows):
            out += self._run(params, jobs[start : start + self._rows], seed, number)
        return out

    def _run(self, params: dict, jobs: Sequence[Job], seed: int, number: int) -> list[dict[int, Written]]:
        rows = [lay_out(job.record, None, self._processor, self._layout) for job in jobs]
        slot, active = np.zeros((self._rows, self._lanes), np.int32), np.zeros((self._rows, self._lanes), bool)
        for index, (job, row) in enumerate(zip(jobs, rows, strict=True)):
            prefix = int(np.sum(row["role"] == PREFIX))
            for lane, kept in job.lanes.items():
                slot[index, lane] = self._layout.prefix_slots + kept - 1 if kept else prefix - 1
                active[index, lane] = True
        rows += [rows[-1]] * (self._rows - len(rows))  # they fill the batch and have no active lane
        batch = stack_rows(rows, self._layout)
        with jax.set_mesh(self._mesh):
            on_device = to_device((batch, LaneStart(slot, active), np.full(self._rows, number, np.int32)), self._mesh, batch_axis=0)
            key = jax.random.key(seed)
            samples = jax.device_get(_complete(self._model, self._options, params, *on_device, key, np.float32(self._rho_th)))

        def written(row: int, lane: int) -> Written:
            return Written(samples.tokens[row, lane, : samples.lengths[row, lane]], bool(samples.stopped[row, lane]))

        return [{lane: written(index, lane) for lane in job.lanes} for index, job in enumerate(jobs)]


@functools.partial(jax.jit, static_argnames=("model", "options"))
def _complete(
    model: Mllm,
    options: DecodeOptions,
    params: dict,
    batch: PairBatch,
    start: LaneStart,
    number: Int[Array, " B"],
    key: Array,
    rho_th: Float[Array, ""],
) -> Samples:
    """Masked prefill and decode of one device batch: one mask a row, shared by its lanes and steps (arXiv 2407.02477, eq. 6)."""
    mask_key, sample_key = jax.random.split(key)
    features = model.encode_images(params, batch.images, batch.patches)
    row_keys = lane_keys(mask_key, batch.record_key, number, 1)[:, 0]
    keep = jax.vmap(lambda one: jax.random.uniform(one, batch.tokens.shape[1:]) >= rho_th)(row_keys)
    # by the image token's number in its row, so that neither the words around it nor the slots have a say
    is_image = batch.image_index >= 0
    ordinal = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)
    visible = ~is_image | jnp.take_along_axis(keep, ordinal, axis=1)
    prefill = model.prefill(params, features, batch, visible)
    keys = lane_keys(sample_key, batch.record_key, number, start.slot.shape[1])
    return decode_lanes(model, params, prefill, batch, start, keys, options, visible)
