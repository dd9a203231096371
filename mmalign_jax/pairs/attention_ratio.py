"""Whether an answer looks at the picture that its prompt asks about: the attention ratio of MIA-DPO (arXiv 2410.17637)."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import DataConfig
from mmalign_jax.data.device import to_device
from mmalign_jax.data.layout import RowTokens
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.rows import batches, lay_out_answers, layout_of, tokenize_answers
from mmalign_jax.types import FIRST_ANSWER, PairBatch, PreferenceRecord

TARGET = "target_image"  # in a record's meta: which picture of the prompt it asks about, from 0
PER = ("image", "token")


class AttentionRatio:
    """Scores an answer by R less what is asked of prompts with so many pictures; at most 0 for one that looks elsewhere.

    R = a_target / sum_i a_i, where a_i is the attention to the tokens of picture i: its sum over them, the mean over heads, layers, and the
    answer's tokens but the one that ends it. The released code takes the mean over a picture's tokens (the same where all have as many) of layer 16
    alone, and rejects answers with R <= 0.8 for two pictures, 0.7 for three, 0.6 for more.

    The attention is that of a teacher-forced pass over the answer's text. Pictures count in the order in which the prompt shows them; a video is
    one. A score is a function of the record's prompt and pictures and of the answer's text alone.
    """

    counts: ClassVar[Mapping[str, int]] = {}

    def __init__(
        self,
        policy: Pretrained,
        *,
        layer: int = -1,
        per: str = "image",
        asked: tuple[float, float, float] = (0.8, 0.7, 0.6),
        batch_size: int = 32,
        limits: DataConfig | None = None,
    ):
        """
        Args:
          layer: the one whose attention is read, from 0; -1: all of them.
          per: "image": a_i is a sum over the picture's tokens; "token": a mean.
          asked: what is taken off R: for two pictures, for three, for more.
          batch_size: records at a time.
          limits: the bounds on images are read of it.

        Raises:
          UserError: the model has no such layer.
        """
        if per not in PER:
            raise ValueError(f"per is one of {', '.join(PER)}, not {per!r}")
        if layer >= policy.sizes.decoder.layers:
            raise UserError(f"config.samples.scorers: attention: layer {layer} of a model of {policy.sizes.decoder.layers}, which count from 0")
        limits = limits or DataConfig()
        self._policy, self._per, self._asked = policy, per, asked
        self._limits = {"max_pixels": limits.max_image_pixels, "max_bytes": limits.max_image_bytes}
        self._rows = mesh_lib.batch_rows(policy.mesh, batch_size)
        with jax.set_mesh(policy.mesh):
            self._params = policy.params(policy.model.dtype)
        self._run = jax.jit(functools.partial(_ratios, policy.model, layer))

    def check(self, record: PreferenceRecord) -> None:
        """Raises UserError for a record that shows fewer than two pictures, or does not say which of them it asks about."""
        shown, target = _shown(record), record.meta.get(TARGET)
        if shown < 2:
            raise UserError(f"record {record.id}: its prompt shows {shown} pictures; the scorer attention compares one with others")
        if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < shown:
            found = "is missing" if TARGET not in record.meta else f"is {target!r}"
            raise UserError(
                f'record {record.id}: meta["{TARGET}"] {found}; the scorer attention wants the number, 0 to {shown - 1}, of the picture that is '
                "asked about"
            )

    def __call__(self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """What each of the answers to each record is worth; None for one that is longer than the model's positions, or sees no picture.

        Raises:
          UserError: see `check`.
          DataError: a prompt cannot be tokenised.
        """
        processor, out = self._policy.processor, [[None] * len(texts) for texts in answers]
        rows: dict[int, RowTokens] = {}
        fit: dict[int, list[int]] = {}
        for number, (record, texts) in enumerate(zip(records, answers, strict=True)):
            if not texts:
                continue
            self.check(record)
            row = tokenize_answers(record, texts, processor, self._limits)
            kept = [at for at, (ids, _) in enumerate(row.answers) if len(row.prefix) + len(ids) <= processor.traits.max_positions]
            if kept:
                rows[number], fit[number] = dataclasses.replace(row, answers=tuple(row.answers[at] for at in kept)), kept
        if not rows:
            return out
        asked, layout = list(rows), layout_of(list(rows.values()), processor, self._limits)
        lay = lambda at: lay_out_answers(records[asked[at]], rows[asked[at]], processor, layout)  # noqa: E731
        pictures = max(len(row.expansions) for row in rows.values())
        for places, batch in batches(len(asked), lay, layout, self._policy.mesh, self._rows):
            some = [asked[place] for place in places]
            filled = [*some, *[some[-1]] * (self._rows - len(some))]
            numbers = [_picture_of_slot(rows[n], processor.image_token_ids, layout.prefix_slots) for n in filled]
            units = [self._units(rows[n], pictures) for n in filled]
            targets = [records[n].meta[TARGET] for n in filled]
            host = np.stack(numbers), np.stack(units), np.array(targets, np.int32)
            with jax.set_mesh(self._policy.mesh):
                found = jax.device_get(self._run(self._params, batch, *to_device(host, self._policy.mesh, batch_axis=0)))
            for n, ratios in zip(some, np.asarray(found), strict=False):
                threshold = self._asked[min(len(rows[n].expansions), 4) - 2]
                for at, ratio in zip(fit[n], ratios.tolist(), strict=False):
                    out[n][at] = None if np.isnan(ratio) else ratio - threshold
        return out

    def _units(self, row: RowTokens, pictures: int) -> np.ndarray:
        """What the attention to each picture is multiplied by; 0 where there is none."""
        out = np.zeros(pictures, np.float32)
        out[: len(row.expansions)] = 1.0 if self._per == "image" else [1 / len(one.features) for one in row.expansions]
        return out


def _shown(record: PreferenceRecord) -> int:
    return sum(part.media is not None for turn in record.turns for part in turn.parts)


def _picture_of_slot(row: RowTokens, image_token_ids: Sequence[int], slots: int) -> np.ndarray:
    """int32[P]: the picture of each image token, in the order of the prompt; -1 elsewhere."""
    out, is_image = np.full(slots, -1, np.int32), np.isin(row.prefix, image_token_ids)
    lengths = [len(one.features) for one in row.expansions]
    out[: len(row.prefix)][is_image] = np.repeat(np.arange(len(lengths)), lengths)
    return out


def _ratios(
    model: Mllm,
    layer: int,
    params: dict,
    batch: PairBatch,
    picture: Int[Array, "B P"],
    unit: Float[Array, "B M"],
    target: Int[Array, " B"],
) -> Float[Array, "B K"]:
    features = model.encode_images(params, batch.images, batch.patches)
    mass = model.attention_to_images(params, features, batch, picture, unit.shape[-1])
    mass = jnp.mean(mass, axis=0) if layer < 0 else mass[layer]
    there = batch.by_answer(batch.role) == FIRST_ANSWER + jnp.arange(batch.answers, dtype=batch.role.dtype)[:, None]
    ends = jnp.cumsum(there, axis=-1) == jnp.sum(there, axis=-1, keepdims=True)
    looked = jnp.sum(jnp.where((there & ~ends)[..., None], mass, 0.0), axis=2) * unit[:, None]
    is_target = jnp.arange(unit.shape[-1]) == target[:, None, None]
    return jnp.sum(jnp.where(is_target, looked, 0.0), axis=-1) / jnp.sum(looked, axis=-1)
