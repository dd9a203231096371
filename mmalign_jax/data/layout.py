"""One record -> one row `[images and prompt | answer 1 | ... | answer K]`, each region padded on its right to its own length."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from mmalign_jax.data.bad_rows import Place, place_of
from mmalign_jax.data.images import MAX_BYTES, MAX_PIXELS, decode_image
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.types import FIRST_ANSWER, PAD, PREFIX, Preference, PreferenceRecord, Turn, record_key


@runtime_checkable
class RowProcessor(Protocol):
    """What the layout needs of a checkpoint's processor."""

    @property
    def image_token_id(self) -> int: ...

    @property
    def image_tokens(self) -> int:
        """N, placeholders of one image."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels."""

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8[Y, W, 3]"""

    def prompt_ids(self, turns: Sequence[Turn]) -> np.ndarray:
        """int32[n], every image expanded to N placeholders"""

    def answer_ids(self, text: str, prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        """int32[n] of the whole answer with its end token, and bool[n]: scored, false on tokens of the prefix"""


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The static sizes of a row: P, R, K and M. `shorten_answers`: cut answers that are longer than R (never a prefix)."""

    prefix_slots: int
    answer_slots: int
    answers: int
    images: int
    shorten_answers: bool = False
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES

    @property
    def tokens(self) -> int:
        """T = P + K R."""
        return self.prefix_slots + self.answers * self.answer_slots


@dataclasses.dataclass(frozen=True)
class RowSize:
    """How long a row is: tokens of the prefix, images, and for each answer its tokens and the index of the first scored one."""

    prefix: int
    images: int
    answers: tuple[int, ...]
    first_scored: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.answers, default=0)


@dataclasses.dataclass(frozen=True)
class RowTokens:
    """The tokens of a row before padding. `answers` holds (ids, scored) of each answer."""

    prefix: np.ndarray
    answers: tuple[tuple[np.ndarray, np.ndarray], ...]
    media: tuple[int, ...]  # the record's media in the order of their placeholders

    @property
    def nbytes(self) -> int:
        return self.prefix.nbytes + sum(ids.nbytes + scored.nbytes for ids, scored in self.answers)

    @property
    def size(self) -> RowSize:
        first = tuple(int(np.argmax(scored)) if scored.any() else len(scored) for _, scored in self.answers)
        return RowSize(len(self.prefix), len(self.media), tuple(len(ids) for ids, _ in self.answers), first)


def tokenize(record: PreferenceRecord, pref: Preference | None, processor: RowProcessor, answers: int) -> RowTokens:
    """Tokens of one row.

    The record's own prefix, text with which every answer starts, ends up in the prefix region, so that it is computed once. A token
    on the border that the answers do not share stays in the answers, unscored where the processor says so.

    Args:
      pref: which responses are the chosen and the rejected one; None for the reference answer, response 0.
      answers: K, 2 for (win, lose), 1 for the win or the reference alone, 0 for the prompt alone.

    Raises:
      DataError: the row has no preference though K is 2, a text cannot be tokenised, or placeholders and images do not fit.
    """
    place = place_of(record)
    if answers == 2 and pref is None:
        raise place.bad("no_answer", "the row has no pair of answers", "Make pairs first (config.pairs.maker) or remove the row.")
    if pref is not None and pref.weight != 1.0:
        raise place.bad("malformed_row", f"the preference has weight {pref.weight}; only 1 is supported", "Set the weight to 1.")
    chosen = ((0,) if pref is None else (pref.win, pref.lose))[:answers]
    media = tuple(part.media for turn in record.turns for part in turn.parts if part.media is not None)
    try:
        prompt = processor.prompt_ids(record.turns)
        parts = [processor.answer_ids(record.responses[index].text, record.prefix) for index in chosen]
    except DataError:
        raise
    except UserError as error:
        raise place.bad("malformed_row", f"the row cannot be tokenised: {error}", "Correct the text or remove the row.") from error
    if not record.complete:
        parts = [(ids[:-1], scored[:-1]) for ids, scored in parts]  # the end token
    _check_placeholders(prompt, parts, len(media), processor, place)
    shared = _shared(parts) if parts else 0
    prefix = np.concatenate([prompt, parts[0][0][:shared]]).astype(np.int32) if parts else prompt
    return RowTokens(prefix, tuple((ids[shared:], scored[shared:]) for ids, scored in parts), media)


def lay_out(
    record: PreferenceRecord, pref: Preference | None, processor: RowProcessor, layout: RowLayout, row: RowTokens | None = None
) -> dict[str, Any]:
    """The numpy arrays of one row, named as in `types.PairBatch`: `[T]` each, images `[M, Y, W, 3]`.

    Args:
      row: what `tokenize` gave for this row and the layout's K, where that is at hand.

    Raises:
      DataError: the row does not fit into the layout, or see `tokenize` and `decode_image`.
    """
    row = row or tokenize(record, pref, processor, layout.answers)
    if len(row.answers) != layout.answers:
        raise ValueError(f"tokens of {len(row.answers)} answers for a layout of {layout.answers}")
    place = place_of(record)
    if problem := misfit(row.size, layout):
        raise place.bad("malformed_row", problem, "Raise config.data.prefix_tokens or answer_tokens, or set config.data.on_long_row.")
    n, slots = len(row.prefix), layout.tokens
    tokens, role = np.zeros(slots, np.int32), np.full(slots, PAD, np.int8)
    positions, weight = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
    tokens[:n], role[:n], positions[:n] = row.prefix, PREFIX, np.arange(n)
    for k, (ids, scored) in enumerate(row.answers):
        start, length = layout.prefix_slots + k * layout.answer_slots, min(len(ids), layout.answer_slots)
        where = slice(start, start + length)
        tokens[where], role[where], weight[where] = ids[:length], FIRST_ANSWER + k, scored[:length]
        positions[where] = n + np.arange(length)  # every answer goes on where the prefix ends
    image_index = np.full(slots, -1, np.int32)
    at = np.flatnonzero(row.prefix == processor.image_token_id)
    image_index[at] = np.arange(len(at))
    if len(at) != len(row.media) * processor.image_tokens or np.any(tokens[layout.prefix_slots :] == processor.image_token_id):
        raise AssertionError("image placeholders changed while the row was laid out")
    return {
        "tokens": tokens,
        "role": role,
        "positions": positions,
        "images": _images(record, row.media, processor, layout, place),
        "image_index": image_index,
        "token_weight": weight,
        "record_key": np.uint32(record_key(record.id)),
        "margin": np.float32(0.0 if pref is None else pref.margin),
    }


def misfit(row: RowSize, layout: RowLayout) -> str:
    """Why a row does not fit into a layout, "" when it does."""
    if row.prefix > layout.prefix_slots:
        return f"images and prompt take {row.prefix} tokens, there are {layout.prefix_slots} slots"
    if row.images > layout.images:
        return f"the row has {row.images} images, there is room for {layout.images}"
    if row.longest > layout.answer_slots and not layout.shorten_answers:
        return f"an answer takes {row.longest} tokens, there are {layout.answer_slots} slots"
    if any(first >= min(length, layout.answer_slots) for first, length in zip(row.first_scored, row.answers, strict=True)):
        return "an answer has no token that is scored"
    return ""


def _shared(parts: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """How many unscored tokens all answers start with."""
    lead = min(int(np.argmax(scored)) if scored.any() else len(scored) for _, scored in parts)
    heads = np.stack([ids[:lead] for ids, _ in parts])
    same = np.all(heads == heads[0], axis=0)
    return lead if same.all() else int(np.argmin(same))


def _check_placeholders(prompt, parts, images: int, processor: RowProcessor, place: Place) -> None:
    found = int(np.sum(prompt == processor.image_token_id))
    if found != images * processor.image_tokens:
        raise place.bad(
            "placeholder_mismatch",
            f"{found} image tokens in the prompt for {images} images of {processor.image_tokens}",
            "The chat template or a text adds image tokens of its own; remove them.",
        )
    if any(np.any(ids == processor.image_token_id) for ids, _ in parts):
        raise place.bad("placeholder_mismatch", "an answer holds the image token", "Only prompts can show images; remove it.")


def _images(record: PreferenceRecord, media: tuple[int, ...], processor: RowProcessor, layout: RowLayout, place: Place) -> np.ndarray:
    """uint8[M, Y, W, 3]; slots without an image are zero, and no token points at their features."""
    out = np.zeros((layout.images, *processor.size, 3), np.uint8)
    for slot, index in enumerate(media):
        data = record.media[index].data
        picture = decode_image(data, max_pixels=layout.max_pixels, max_bytes=layout.max_bytes, file=place.file, row=place.row)
        out[slot] = processor.pixels(picture)
    return out
