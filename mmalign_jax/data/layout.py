"""One record -> one row `[images and prompt | answer 1 | ... | answer K]`, each region padded on its right to its own length."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from mmalign_jax.data import changes
from mmalign_jax.data import media as media_lib
from mmalign_jax.data.bad_rows import Place, place_of
from mmalign_jax.data.images import MAX_BYTES, MAX_PIXELS
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf.pictures import Expansion, Pictures, RowTraits
from mmalign_jax.types import FIRST_ANSWER, PAD, PREFIX, Choice, Group, Label, PairBatch, Preference, PreferenceRecord, Turn, answers_of, record_key


@runtime_checkable
class RowProcessor(Protocol):
    """What the layout needs of a checkpoint's processor."""

    @property
    def image_token_ids(self) -> tuple[int, ...]: ...

    @property
    def pictures(self) -> Pictures:
        """What pictures become."""

    @property
    def traits(self) -> RowTraits: ...

    def prompt_ids(self, turns: Sequence[Turn], expansions: Sequence[Expansion]) -> np.ndarray:
        """int32[n], every placeholder replaced by its expansion"""

    def answer_ids(self, text: str, prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        """int32[n] of the whole answer with its end token, and bool[n]: scored, false on tokens of the prefix"""


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The static sizes of a row.

    Args:
      prefix_slots, answer_slots, answers, images: P, R, K and M.
      canvas: height and width of each of the M images.
      patch_slots: Q, 0 for towers that take tiles.
      max_positions: most tokens of a prefix and one answer together.
      shorten_answers: cut answers that are longer than R (never a prefix).
      mark_changes: say which tokens of two answers differ (`data.changes`).
    """

    prefix_slots: int
    answer_slots: int
    answers: int
    images: int
    canvas: tuple[int, int]
    patch_slots: int = 0
    max_positions: int = 1 << 30
    shorten_answers: bool = False
    mark_changes: bool = False
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES

    @property
    def tokens(self) -> int:
        """T = P + K R."""
        return self.prefix_slots + self.answers * self.answer_slots


@dataclasses.dataclass(frozen=True)
class RowSize:
    """How long a row is: tokens of the prefix, images, and for each answer its tokens and the index of the first scored one.

    `images` are those that the tower takes: tiles, or the canvases of pictures and frames.
    """

    prefix: int
    images: int
    canvas: tuple[int, int]
    patch_slots: int
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
    expansions: tuple[Expansion, ...]  # of these media

    @property
    def nbytes(self) -> int:
        answers = sum(ids.nbytes + scored.nbytes for ids, scored in self.answers)
        return self.prefix.nbytes + answers + sum(medium.nbytes for medium in self.expansions)

    @property
    def size(self) -> RowSize:
        first = tuple(int(np.argmax(scored)) if scored.any() else len(scored) for _, scored in self.answers)
        sides = [medium.canvas for medium in self.expansions]
        canvas = (max(y for y, _ in sides), max(x for _, x in sides)) if sides else (0, 0)
        tiles, slots = sum(medium.tiles for medium in self.expansions), sum(medium.slots for medium in self.expansions)
        return RowSize(len(self.prefix), tiles, canvas, slots, tuple(len(ids) for ids, _ in self.answers), first)


def tokenize(
    record: PreferenceRecord,
    pref: Choice | None,
    processor: RowProcessor,
    answers: int,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> RowTokens:
    """Tokens of one row.

    The record's own prefix, text with which every answer starts, ends up in the prefix region, so that it is computed once. A token
    on the border that the answers do not share stays in the answers, unscored where the processor says so; so does all of it where the
    region's tokens see what follows them (prefix-LM), which no part of an answer may.

    Args:
      pref: which responses are the row's: the chosen and the rejected one, one with a label, or a group; None for the reference answer, response 0.
      answers: K, 2 for (win, lose), 1 for the win, the labelled answer or the reference alone, 0 for the prompt alone; all of a group.

    Raises:
      DataError: the row has no preference though K is 2, a text cannot be tokenised, or placeholders and images do not fit.
    """
    place = place_of(record)
    if answers == 2 and pref is None:
        raise place.bad("no_answer", "the row has no pair of answers", "Make pairs first (config.pairs.maker) or remove the row.")
    if pref is not None and not (np.isfinite(pref.weight) and pref.weight >= 0):
        raise place.bad("malformed_row", f"the row has weight {pref.weight}", "Set it to a finite number of at least 0.")
    chosen = ((0,) if pref is None else answers_of(pref))[:answers]
    media = tuple(part.media for turn in record.turns for part in turn.parts if part.media is not None)
    limits = {"max_pixels": max_pixels, "max_bytes": max_bytes}
    expansions = tuple(media_lib.expand(record.media[index], processor.pictures, place, **limits) for index in media)
    try:
        prompt = processor.prompt_ids(record.turns, expansions)
        parts = [processor.answer_ids(record.responses[index].text, record.prefix) for index in chosen]
    except DataError:
        raise
    except UserError as error:
        raise place.bad("malformed_row", f"the row cannot be tokenised: {error}", "Correct the text or remove the row.") from error
    if not record.complete:
        parts = [(ids[:-1], scored[:-1]) for ids, scored in parts]  # the end token
    _check_placeholders(prompt, parts, expansions, processor, place)
    shared = _shared(parts) if parts and not processor.traits.prefix_attends else 0
    prefix = np.concatenate([prompt, parts[0][0][:shared]]).astype(np.int32) if parts else prompt
    return RowTokens(prefix, tuple((ids[shared:], scored[shared:]) for ids, scored in parts), media, expansions)


def lay_out(
    record: PreferenceRecord, pref: Choice | None, processor: RowProcessor, layout: RowLayout, row: RowTokens | None = None
) -> dict[str, Any]:
    """The numpy arrays of one row, named as in `types.PairBatch`: `[T]` each, images `[M, Y, W, 3]`.

    Args:
      row: what `tokenize` gave for this row and the layout's K, where that is at hand.

    Raises:
      DataError: the row does not fit into the layout, or see `tokenize` and `decode_image`.
    """
    row = row or tokenize(record, pref, processor, layout.answers, max_pixels=layout.max_pixels, max_bytes=layout.max_bytes)
    return lay_out_tokens(record, pref, processor, layout, row) | lay_out_pictures(record, processor, layout, row)


def lay_out_pictures(record: PreferenceRecord, processor: RowProcessor, layout: RowLayout, row: RowTokens) -> dict[str, Any]:
    """The part of `lay_out` that the vision tower reads: `images`, and `patches` where it takes pictures of any size."""
    limits = {"max_pixels": layout.max_pixels, "max_bytes": layout.max_bytes}
    media = [record.media[index] for index in row.media]
    place, sizes = place_of(record), {"tiles": layout.images, "canvas": layout.canvas}
    images = media_lib.pixels(media, row.expansions, processor.pictures, place, **sizes, **limits)
    return {"images": images, **lay_out_patches(processor, layout, row)}


def lay_out_patches(processor: RowProcessor, layout: RowLayout, row: RowTokens) -> dict[str, Any]:
    """`patches` of a row where pictures have any size, else nothing; no picture is decoded."""
    if not layout.patch_slots:
        return {}
    sizes = {"slots": layout.patch_slots, "tiles": layout.images, "canvas": layout.canvas}
    return {"patches": media_lib.patches(row.expansions, processor.traits, **sizes)}


def lay_out_tokens(
    record: PreferenceRecord, pref: Choice | None, processor: RowProcessor, layout: RowLayout, row: RowTokens
) -> dict[str, Any]:
    """The part of `lay_out` that the decoder reads; no picture is decoded.

    Raises:
      DataError: the row does not fit into the layout.
    """
    if len(row.answers) != layout.answers:
        raise ValueError(f"tokens of {len(row.answers)} answers for a layout of {layout.answers}")
    if problem := misfit(row.size, layout):
        mend = "Raise config.data.prefix_tokens or answer_tokens, or set config.data.on_long_row."
        raise place_of(record).bad("malformed_row", problem, mend)
    n, slots = len(row.prefix), layout.tokens
    tokens, role = np.zeros(slots, np.int32), np.full(slots, PAD, np.int8)
    positions, weight = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
    tokens[:n], role[:n], positions[:n] = row.prefix, PREFIX, np.arange(n)
    for k, (ids, scored) in enumerate(row.answers):
        start, length = layout.prefix_slots + k * layout.answer_slots, min(len(ids), layout.answer_slots)
        where = slice(start, start + length)
        tokens[where], role[where], weight[where] = ids[:length], FIRST_ANSWER + k, scored[:length]
        positions[where] = n + np.arange(length)  # every answer goes on where the prefix ends
    image_index, is_image = np.full(slots, -1, np.int32), np.isin(row.prefix, processor.image_token_ids)
    features, traits = media_lib.feature_indices(row.expansions, processor.traits), processor.traits
    if is_image.sum() != len(features) or np.isin(tokens[layout.prefix_slots :], processor.image_token_ids).any():
        raise AssertionError("image placeholders changed while the row was laid out")
    image_index[:n][is_image] = features
    extra: dict[str, Any] = {}
    if layout.mark_changes:
        extra["changed"] = changed = np.zeros(slots, bool)
        for k, marks in enumerate(changes.replaced(*(ids for ids, _ in row.answers))):
            start = layout.prefix_slots + k * layout.answer_slots
            changed[start : start + layout.answer_slots][: len(marks)] = marks[: layout.answer_slots]
    if isinstance(pref, Label):
        extra["desirable"] = np.bool_(pref.desirable)
    if isinstance(pref, Group):
        extra["rewards"] = np.array([record.responses[index].score for index in pref.answers], np.float32)
    if traits.mrope:
        extra["mrope"] = _mrope(is_image, row.expansions, positions, layout.prefix_slots)
    return {
        "tokens": tokens,
        "role": role,
        "positions": positions,
        "image_index": image_index,
        "token_weight": weight,
        "record_key": np.uint32(record_key(record.id)),
        "margin": np.float32(pref.margin if isinstance(pref, Preference) else 0.0),
        "weight": np.float32(1.0 if pref is None else pref.weight),
        **extra,
    }


def _mrope(is_image: np.ndarray, expansions: Sequence[Expansion], positions: np.ndarray, prefix_slots: int) -> np.ndarray:
    """Rotary positions of the whole row: every answer goes on behind the largest number of the prefix."""
    turning, n = np.broadcast_to(positions, (3, len(positions))).copy(), len(is_image)
    turning[:, :n] = media_lib.rotary_positions(is_image, expansions)
    turning[:, prefix_slots:] += turning[:, :n].max(initial=-1) + 1 - n
    return turning


def stack_rows(rows: Sequence[dict[str, Any]], layout: RowLayout) -> PairBatch:
    """A batch `[b, ...]` of laid out rows."""
    fields = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    return PairBatch(**fields, prefix_slots=layout.prefix_slots, answer_slots=layout.answer_slots)


def misfit(row: RowSize, layout: RowLayout) -> str:
    """Why a row does not fit into a layout, "" when it does."""
    if row.prefix > layout.prefix_slots:
        return f"images and prompt take {row.prefix} tokens, there are {layout.prefix_slots} slots"
    if row.images > layout.images:
        return f"the row has {row.images} images or tiles, there is room for {layout.images}"
    if row.canvas[0] > layout.canvas[0] or row.canvas[1] > layout.canvas[1]:
        return f"a picture has {row.canvas} pixels, there is room for {layout.canvas}"
    if row.patch_slots > layout.patch_slots:
        return f"the pictures take {row.patch_slots} patches, there are {layout.patch_slots} slots"
    if row.longest > layout.answer_slots and not layout.shorten_answers:
        return f"an answer takes {row.longest} tokens, there are {layout.answer_slots} slots"
    if row.prefix + min(row.longest, layout.answer_slots) > layout.max_positions:
        return f"prefix and answer take {row.prefix + row.longest} positions, the model was made for {layout.max_positions}"
    if any(first >= min(length, layout.answer_slots) for first, length in zip(row.first_scored, row.answers, strict=True)):
        return "an answer has no token that is scored"
    return ""


def _shared(parts: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """How many unscored tokens all answers start with."""
    lead = min(int(np.argmax(scored)) if scored.any() else len(scored) for _, scored in parts)
    heads = np.stack([ids[:lead] for ids, _ in parts])
    same = np.all(heads == heads[0], axis=0)
    return lead if same.all() else int(np.argmin(same))


def _check_placeholders(prompt, parts, expansions: Sequence[Expansion], processor: RowProcessor, place: Place) -> None:
    found, wanted = int(np.isin(prompt, processor.image_token_ids).sum()), sum(len(medium.features) for medium in expansions)
    if found != wanted:
        raise place.bad(
            "placeholder_mismatch",
            f"{found} image tokens in the prompt for {len(expansions)} images of {wanted} together",
            "The chat template or a text adds image tokens of its own; remove them.",
        )
    if any(np.isin(ids, processor.image_token_ids).any() for ids, _ in parts):
        raise place.bad("placeholder_mismatch", "an answer holds the image token", "Only prompts can show images; remove it.")
