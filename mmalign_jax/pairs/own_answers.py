"""The policy's own answers: several to a prompt, which is prefilled once."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int, Int32

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import SamplesConfig
from mmalign_jax.data.device import to_device
from mmalign_jax.data.layout import RowLayout, RowTokens, lay_out_tokens, stack_rows
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.seen import encode_seen
from mmalign_jax.pairs.views import View
from mmalign_jax.sampling import DecodeOptions, LaneStart, Samples, compiler_options, decode_lanes, lane_keys
from mmalign_jax.sampling.stop_strings import automaton
from mmalign_jax.types import PairBatch, PreferenceRecord, record_key

OWN = "policy"  # the source of an answer that the policy drew with the prompt and its pictures before it


@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    """An answer that the policy wrote, or that another source gave.

    Args:
      tokens: with the one that ended it.
      logps: of the policy at temperature 1, nats; NaN where it did not draw the answer, or saw something else when it did.
      finished: whether it ended, and did not run out of slots.
      source: who wrote it.
    """

    tokens: Int32[np.ndarray, " n"]
    logps: Float32[np.ndarray, " n"]
    text: str
    finished: bool
    source: str = OWN


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A record, its tokens without an answer, and its pictures as `lay_out_pictures` makes them."""

    record: PreferenceRecord
    row: RowTokens
    pictures: Mapping[str, Any]


class OwnAnswers:
    """Draws `config.count` answers to each prompt. One is a function of (seed, record, draw, its number) alone, and of the policy.

    Args:
      layout: of the prompts (K = 0).
      rows: prompts of a device batch.
      view: what the policy sees in the place of the pictures. The answers' source is then the view.
      source: their source by another name; each has draws of its own.

    Raises:
      UserError: a stop string holds a special token, which ends an answer, or is never drawn, by itself.
    """

    def __init__(
        self,
        model: Mllm,
        processor: Processor,
        mesh: Mesh,
        config: SamplesConfig,
        layout: RowLayout,
        rows: int,
        view: View | None = None,
        source: str = "",
    ):
        if layout.answers:
            raise ValueError("answers are drawn behind prompts, rows without answers")
        self._processor, self._mesh, self._layout = processor, mesh, layout
        self._rows = mesh_lib.batch_rows(mesh, rows)
        self.name, self.max_tokens = source or (OWN if view is None else str(view)), config.max_tokens
        self._seed, self._stream = config.seed, 0 if self.name == OWN else record_key(self.name)
        for text in config.stop_strings:
            processor.check_plain(text)
        options = DecodeOptions(
            config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_ids=processor.eos_ids,
            banned_ids=processor.banned_ids,
            stop_strings=automaton(config.stop_strings, _texts(model, processor)) if config.stop_strings else None,
        )
        self._draw = jax.jit(functools.partial(_answers, model, view, options, config.count), compiler_options=compiler_options(mesh))

    def __call__(self, params: dict, prompts: Sequence[Prompt], draw: int = 0, layout: RowLayout | None = None) -> list[list[Own]]:
        """The answers to each prompt, in order.

        Args:
          params: the policy's.
          draw: other numbers give other answers.
          layout: of these prompts, where it is another one.

        Raises:
          DataError: a prompt does not fit into the layout.
        """
        out: list[list[Own]] = []
        layout = layout or self._layout
        key = jax.random.key(self._seed)
        key = jax.random.fold_in(key, np.uint32(self._stream)) if self._stream else key
        for start in range(0, len(prompts), self._rows):
            chosen = prompts[start : start + self._rows]
            laid = [{**lay_out_tokens(one.record, None, self._processor, layout, one.row), **one.pictures} for one in chosen]
            laid += [laid[-1]] * (self._rows - len(laid))  # they fill the batch
            batch, draws = stack_rows(laid, layout), np.full(self._rows, draw, np.int32)
            with jax.set_mesh(self._mesh):
                on_device = to_device((batch, draws), self._mesh, batch_axis=0)
                samples = jax.device_get(self._draw(params, *on_device, key))
            out += [self._of_row(samples, row) for row in range(len(chosen))]
        return out

    def _of_row(self, samples: Samples, row: int) -> list[Own]:
        out = []
        for lane, length in enumerate(samples.lengths[row]):
            tokens, logps = samples.tokens[row, lane, :length], samples.logps[row, lane, :length]
            known = logps if self.name == OWN else np.full_like(logps, np.nan)
            out.append(Own(tokens, known, self._processor.decode(tokens), bool(samples.stopped[row, lane]), self.name))
        return out


def _answers(
    model: Mllm, view: View | None, options: DecodeOptions, count: int, params: dict, batch: PairBatch, draw: Int[Array, " B"], key: Array
) -> Samples:
    view_keys = lane_keys(key, batch.record_key, draw, 1)[:, 0]
    features = encode_seen(model, view, params, batch.images, batch.patches, view_keys)
    prefill = model.prefill(params, features, batch)
    start, keys = LaneStart.behind_prefix(batch.role, count), lane_keys(key, batch.record_key, draw, count)
    return decode_lanes(model, params, prefill, batch, start, keys, options)


def _texts(model: Mllm, processor: Processor) -> list[str]:
    """What each number of the vocabulary writes."""
    texts = processor.token_texts()[: model.config.decoder.vocab_size]
    return texts + [""] * (model.config.decoder.vocab_size - len(texts))
