"""This package's side: a checkpoint in float32 on the CPU, asked through the same prefill and decode lanes as everywhere else."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmalign_jax import losses
from mmalign_jax.config import DataConfig
from mmalign_jax.data.layout import RowTokens, lay_out, stack_rows, tokenize
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.hf import families
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.names import leaf_at
from mmalign_jax.hf.processor import Processor, load_processor
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.sampling import DecodeOptions, LaneStart, Samples, decode_lanes, lane_keys
from mmalign_jax.types import FIRST_ANSWER, PREFIX, PairBatch, Patches, PreferenceRecord
from mmalign_jax.verify.probe import NEW_TOKENS, Row


@dataclasses.dataclass(frozen=True)
class Ours:
    """A directory as this package reads it. Use under `exact`."""

    config: MllmConfig
    processor: Processor
    model: Mllm
    params: dict

    @classmethod
    def load(cls, directory: pathlib.Path) -> "Ours":
        """Raises UserError: see `hf.import_` and `hf.processor`."""
        config = read_config(directory)
        processor = load_processor(directory, config)
        return cls(config, processor, Mllm(config, processor.mean, processor.std, "float32"), load_params(directory, config))

    def tokenize(self, record: PreferenceRecord) -> RowTokens:
        """Raises DataError for a record that the model does not take."""
        return tokenize(record, None, self.processor, 1)

    def batch(self, records: Mapping[str, PreferenceRecord]) -> PairBatch:
        """All records in one batch, padded to the longest."""
        rows = tuple(records.values())
        layout = plan_rows(rows, self.processor, DataConfig(), answers=1).layout
        return stack_rows([lay_out(record, None, self.processor, layout) for record in rows], layout)

    def rows(self, records: Mapping[str, PreferenceRecord]) -> dict[str, Row]:
        """What we say about each record, all of them in one padded batch."""
        batch = self.batch(records)
        options = DecodeOptions(NEW_TOKENS, stop_ids=self.processor.eos_ids, banned_ids=self.processor.banned_ids)
        logits, logps, samples = jax.device_get(_answers(self.model, options, self.params, batch))
        out = {}
        for row, (name, record) in enumerate(records.items()):
            role, tiles = batch.role[row], sum(medium.tiles for medium in self.tokenize(record).expansions)
            answer = np.flatnonzero(role == FIRST_ANSWER)
            read = np.concatenate([np.flatnonzero(role == PREFIX), answer[:-1]])
            patches = None if batch.patches is None else jax.tree.map(lambda x, row=row: x[row], batch.patches)
            out[name] = Row(
                ids=batch.tokens[row][role == PREFIX],
                levels=_levels(batch.images[row], tiles, patches, self.config.vision.patch_size),
                logits=logits[row, read],
                logps=logps[row, 0, : len(answer)],
                greedy=tuple(samples.tokens[row, 0, : samples.lengths[row, 0]].tolist()),
            )
        return out

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by its reduced name, as checkpoints hold it: tower, projector, decoder."""
        for entry in families.of(self.config).names(self.config).entries:
            leaf = np.asarray(leaf_at(self.params, entry.path))
            for layer, name in enumerate(entry.names):
                yield name, entry.to_hf(leaf if entry.layers is None else leaf[layer])

    def tower(self, batch: PairBatch) -> np.ndarray:
        """Tower features of the batch's only row, those of empty tiles and slots too."""
        return np.asarray(_tower(self.model, self.params, batch.images, batch.patches))[0]

    def inputs(self, batch: PairBatch) -> np.ndarray:
        """What the decoder gets for the prompt of the batch's only row, `[n, D]`."""
        c, prompt = self.config.decoder, batch.role[0] == PREFIX
        features = np.asarray(_encode(self.model, self.params, batch.images, batch.patches))[0, :, : c.width]
        index, embedding = batch.image_index[0][prompt], np.asarray(self.params["decoder"]["embed"]["embedding"])
        tokens = np.minimum(batch.tokens[0][prompt], len(embedding) - 1)  # an image token need not be in the table
        words = embedding[tokens] * np.float32(c.embedding_scale)
        return np.where((index >= 0)[:, None], features[np.maximum(index, 0)], words)

    def hidden(self, batch: PairBatch, layers: int) -> np.ndarray:
        """Behind the first `layers` layers and the final norm, for the prompt of the batch's only row, `[n, D]`."""
        c, stack = self.config, self.params["decoder"]["layers"]
        short = dataclasses.replace(c, decoder=dataclasses.replace(c.decoder, layers=layers, local_layers=c.decoder.local_layers[:layers]))
        model = dataclasses.replace(self.model, config=short)
        params = self.params | {"decoder": self.params["decoder"] | {"layers": jax.tree.map(lambda leaf: leaf[:layers], stack)}}
        features = _encode(self.model, self.params, batch.images, batch.patches)
        return np.asarray(_hidden(model, params, features, batch))[0][batch.role[0] == PREFIX]

    def final_norm(self, hidden: np.ndarray) -> np.ndarray:
        """The RMS norm behind the last layer (arXiv 1910.07467), on other hidden states `[n, D]`."""
        c, scale = self.config.decoder, np.asarray(self.params["decoder"]["final_norm"]["scale"])
        normed = hidden / np.sqrt(np.mean(np.square(hidden, dtype=np.float64), axis=-1, keepdims=True) + c.norm_eps)
        return (normed * (1 + scale if c.norm_offset else scale)).astype(np.float32)


def exact() -> contextlib.AbstractContextManager:
    """The CPU: accelerators multiply float32 numbers in fewer bits."""
    return jax.default_device(jax.devices("cpu")[0])


_tower, _encode, _hidden = (jax.jit(method, static_argnums=0) for method in (Mllm.tower, Mllm.encode_images, Mllm.hidden))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answers(model: Mllm, options: DecodeOptions, params: dict, batch: PairBatch) -> tuple[jax.Array, jax.Array, Samples]:
    """Logits of every slot, log-probs of the answers, greedy text behind the prompts."""
    filled = model.prefill(params, model.encode_images(params, batch.images, batch.patches), batch)
    slots = {"prefix_slots": batch.prefix_slots, "answer_slots": batch.answer_slots}
    cap = model.config.decoder.final_softcap
    logps, _ = losses.answer_logps(filled.hidden, model.head(params), batch.tokens, batch.role, **slots, softcap=cap)
    keys = lane_keys(jax.random.key(0), batch.record_key, jnp.zeros_like(batch.record_key, jnp.int32), 1)
    samples = decode_lanes(model, params, filled, batch, LaneStart.behind_prefix(batch.role), keys, options)
    return model.logits(params, filled.hidden), logps, samples


def _levels(images: np.ndarray, tiles: int, patches: Patches | None, side: int) -> np.ndarray:
    """The row's tiles, or the patches that are cut from its canvases."""
    if patches is None:
        return images[:tiles].astype(np.float32)
    count, height, width, _ = images.shape
    cut = images.reshape(count, height // side, side, width // side, side, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, 3)
    return cut[patches.index[patches.segment >= 0]].astype(np.float32)
