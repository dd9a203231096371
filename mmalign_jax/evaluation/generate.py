"""Greedy answers to records' prompts: what every generative benchmark scores."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import DataConfig
from mmalign_jax.data.device import to_device
from mmalign_jax.data.loader import one_pass
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import UserError
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.sampling import DecodeOptions, LaneStart, Samples, compiler_options, decode_lanes, lane_keys
from mmalign_jax.types import PairBatch, PreferenceRecord


@dataclasses.dataclass(frozen=True)
class Answered:
    """A generated answer; `finished` is false when it ran out of tokens before it ended."""

    text: str
    tokens: int
    finished: bool


class Generator:
    """Greedy generation with one model definition; parameters are given at each call, so that policies before and after share the compilation."""

    def __init__(self, model: Mllm, processor: Processor, mesh: Mesh, *, batch_size: int, max_new_tokens: int, data: DataConfig | None = None):
        self._processor, self._mesh, self._data = processor, mesh, data or DataConfig()
        self._rows = mesh_lib.batch_rows(mesh, batch_size)
        options = DecodeOptions(max_new_tokens, stop_ids=processor.eos_ids, banned_ids=processor.banned_ids)
        self._generate = jax.jit(functools.partial(_greedy, model, options), compiler_options=compiler_options(mesh))

    def _limits(self) -> DataConfig:
        """Prompts are as long as they are; only the bounds on images hold here."""
        return DataConfig(max_image_pixels=self._data.max_image_pixels, max_image_bytes=self._data.max_image_bytes)

    def __call__(self, params: dict, records: Sequence[PreferenceRecord], progress: Callable[[int], None] = lambda done: None) -> list[Answered]:
        """One answer a record, in order. Responses of the records are not read.

        Raises:
          UserError: several processes; evaluation runs in one.
        """
        if jax.process_count() > 1:
            raise UserError("config.eval.benchmarks: evaluation runs in one process; leave it empty here and use launch/evaluate.py after the run")
        if not records:
            return []
        plan = plan_rows(records, self._processor, self._limits(), answers=0)
        out: list[Answered] = []
        for part in one_pass(records, self._processor, plan, batch_size=self._rows, workers=self._data.workers):
            with jax.set_mesh(self._mesh):
                samples = jax.device_get(self._generate(params, to_device(part.batch, self._mesh, batch_axis=0)))
            for row in np.flatnonzero(part.valid):
                length = int(samples.lengths[row, 0])
                text = self._processor.decode(samples.tokens[row, 0, :length])
                out.append(Answered(text, length, bool(samples.stopped[row, 0])))
            progress(len(out))
        return out


def _greedy(model: Mllm, options: DecodeOptions, params: dict, batch: PairBatch) -> Samples:
    features = model.encode_images(params, batch.images, batch.patches)
    prefill = model.prefill(params, features, batch)
    start = LaneStart.behind_prefix(batch.role)
    keys = lane_keys(jax.random.key(0), batch.record_key, jnp.zeros_like(batch.record_key, jnp.int32), 1)
    return decode_lanes(model, params, prefill, batch, start, keys, options)
