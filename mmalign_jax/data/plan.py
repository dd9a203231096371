"""Which rows are trained on, and how large a row must be: one scan over the tokens, before any pixel is decoded."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from mmalign_jax.config import DataConfig
from mmalign_jax.data.bad_rows import place_of
from mmalign_jax.data.buckets import Bucket, split
from mmalign_jax.data.layout import RowLayout, RowProcessor, RowSize, RowTokens, misfit, tokenize
from mmalign_jax.data.shared_pictures import digest
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.types import FORMS, Choice, PreferenceRecord


@runtime_checkable
class Records(Protocol):
    """Random access to records: a `builder.RecordSource`, or a plain list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> PreferenceRecord: ...


# Tokens of the scan are kept while they take less: tokenising costs more than decoding a small picture. Larger sets tokenise again.
KEEP_TOKEN_BYTES = 256 << 20

AUTO_BUCKETS = 4  # layouts of models whose pictures take what their size asks for


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A row that is not trained on as it is, and why."""

    record_id: str
    policy: str  # dropped_long, dropped_bad, shortened_answer
    problem: str


@dataclasses.dataclass(frozen=True, eq=False)
class RowPlan:
    """The layout, and the rows that are laid out: `items i32[n, 2]`, record index and index into its field `reads` (-1: reference answer).

    `layout` holds every row; `buckets` are the layouts that training uses, each for its own rows.
    `pictures i32[n]` has equal numbers for rows that show the same pictures; -1 for rows of text.
    `lengths i32[n, 2 + K]` are each row's tokens of the prefix, tiles, and tokens of each answer as it is laid out.
    `counts` holds `rows` (all that the records have), `kept`, and by name what happened to the others:
    `rows == kept + dropped_long + dropped_bad`; `shortened_answer` rows are kept.
    """

    layout: RowLayout
    items: np.ndarray
    counts: Mapping[str, int]
    left_out: tuple[LeftOut, ...]
    padding_fraction: float  # share of the slots in the buckets that are empty, on average over rows
    buckets: tuple[Bucket, ...]
    pictures: np.ndarray
    lengths: np.ndarray
    tokens: tuple[RowTokens, ...] | None = dataclasses.field(default=None, repr=False)  # of `items`, None when they are too many to keep
    reads: str = "prefs"

    def choice(self, record: PreferenceRecord, index: int) -> Choice | None:
        """The second number of an item, of its record."""
        return choice_of(record, index, self.reads)


def choice_of(record: PreferenceRecord, index: int, reads: str) -> Choice | None:
    return None if index < 0 else getattr(record, reads)[index]


def plan_rows(
    records: Records,
    processor: RowProcessor,
    config: DataConfig,
    *,
    answers: int,
    mark_changes: bool = False,
    multiple: int = 8,
    whole_answers: bool = False,
    reads: str = "prefs",
) -> RowPlan:
    """Scans all rows and decides by `config.on_long_row` and `config.on_bad_row` what becomes of those that do not fit.

    Args:
      answers: K, 2 for pairs (one row a preference), 1 for reference answers (one row a record) and for labelled ones. Groups have a K of their
        own, all the same.
      mark_changes: rows say which tokens of their answers differ.
      multiple: measured slots are rounded up to it.
      whole_answers: every answer must be there with its end token.
      reads: the field of a record whose members are rows, of `types.FORMS`.

    Raises:
      DataError: a row that does not fit, cannot be tokenised, or has answers that are not whole where they must be, when the policy says
        error; a prefix that is too long under `shorten_answer` (prefixes are never cut); no row is left.
      UserError: answers must be whole, and the policy is to shorten them; or the records hold rows of another form than `reads` says.
    """
    left_out: list[LeftOut] = []

    def refuse(error: DataError, record_id: str) -> None:
        if config.on_bad_row == "error":
            raise error
        left_out.append(LeftOut(record_id, "dropped_bad", str(error)))

    rows: list[tuple[int, int, RowSize]] = []
    shown: list[int] = []
    known: dict[bytes, int] = {}
    tokens: list[RowTokens] = []
    room = KEEP_TOKEN_BYTES
    if whole_answers and config.on_long_row == "shorten_answer":
        raise UserError("config.data.on_long_row: the objective scores answers at their end token, which shortened ones lack; use error or drop")
    if reads == "groups":
        answers = _group_size(records)
    for index, pref, row, seen in _rows(records, processor, answers, config, refuse, whole_answers, reads):
        rows.append((index, pref, row.size))
        shown.append(known.setdefault(seen, len(known)) if row.media else -1)
        room -= row.nbytes
        if room >= 0:
            tokens.append(row)
    bad = len(left_out)
    layout_of = lambda some: _layout(some, processor, config, answers, multiple, mark_changes)  # noqa: E731
    layout = layout_of([row for _, _, row in rows])

    items, kept = [], []
    for number, (index, pref, row) in enumerate(rows):
        if problem := misfit(row, layout):
            record = records[index]
            if config.on_long_row != "drop":
                place = place_of(record)
                mend = 'Raise config.data.prefix_tokens or answer_tokens, or set config.data.on_long_row to "drop".'
                raise DataError(problem, file=place.file, row=place.row, mend=mend)
            left_out.append(LeftOut(record.id, "dropped_long", problem))
            continue
        if row.longest > layout.answer_slots:
            problem = f"an answer of {row.longest} tokens is cut to {layout.answer_slots}"
            left_out.append(LeftOut(records[index].id, "shortened_answer", problem))
        items.append((index, pref))
        kept.append(number)
    if not items:
        raise DataError("no row is left to train on", file=config.path or "records", mend="Check the data set and config.data.on_long_row.")
    counts = {"rows": len(rows) + bad, "kept": len(items), "dropped_long": 0, "dropped_bad": 0, "shortened_answer": 0}
    counts |= collections.Counter(row.policy for row in left_out)
    most = config.buckets or (AUTO_BUCKETS if processor.pictures.needs_size and not config.packed else 1)
    sizes = [rows[number][2] for number in kept]
    kept_layout = layout_of(sizes)  # without the pictures of the rows that were dropped
    layout = dataclasses.replace(layout, images=kept_layout.images, canvas=kept_layout.canvas, patch_slots=kept_layout.patch_slots)
    buckets = tuple(split(sizes, answers, most, layout_of))
    padding = sum(len(bucket.members) * bucket.padding_fraction for bucket in buckets) / len(items)
    of_items = tuple(tokens[number] for number in kept) if room >= 0 else None
    items, pictures = np.array(items, np.int32).reshape(-1, 2), np.array([shown[number] for number in kept], np.int32)
    lengths = np.array([(size.prefix, size.images, *(min(length, layout.answer_slots) for length in size.answers)) for size in sizes], np.int32)
    return RowPlan(layout, items, counts, tuple(left_out), padding, buckets, pictures, lengths, of_items, reads)


def _check_form(record: PreferenceRecord, reads: str, answers: int) -> None:
    """Raises UserError for a record whose rows are of another form, by which a whole set is the wrong one."""
    found = [field for field in FORMS if getattr(record, field)]
    if not answers or reads in found or (reads == "prefs" and not found):
        return
    has, wanted = FORMS[found[0]] if found else "no scored answers", "pairs or references" if reads == "prefs" else FORMS[reads]
    mends = {"prefs": "pairs train dpo and others", "labels": "labelled answers train kto_unpaired", "groups": "groups train pl_dpo"}
    mend = mends[found[0] if found else reads]
    raise UserError(
        f"config.objective.name: record {record.id} holds {has}, and {wanted} are asked for; {mend} (config.samples.selector says what is made)"
    )


def _group_size(records: Records) -> int:
    """How many answers the first group has."""
    if not len(records):
        return 0
    first = records[0]
    _check_form(first, "groups", 1)
    return len(first.groups[0].answers)


def _rows(
    records: Records,
    processor: RowProcessor,
    answers: int,
    config: DataConfig,
    refuse: Callable[[DataError, str], None],
    whole_answers: bool,
    reads: str,
) -> Iterator[tuple[int, int, RowTokens, bytes]]:
    """Yields (record index, pref index, tokens, digest of the pictures); a row that cannot be tokenised goes to `refuse`."""
    limits = {"max_pixels": config.max_image_pixels, "max_bytes": config.max_image_bytes}
    for index in range(len(records)):
        record = records[index]
        _check_form(record, reads, answers)
        if whole_answers and not record.complete:
            mend = "Use whole answers (config.pairs.per_sentence makes others) or remove the row."
            refuse(place_of(record).bad("no_answer", "the answers are cut, so no end token follows them on which they are scored", mend), record.id)
            continue
        seen = digest(record.media[part.media] for turn in record.turns for part in turn.parts if part.media is not None)
        count = len(getattr(record, reads))
        if reads == "prefs" and answers < 2:
            count = min(count, 1)  # one answer a row: the chosen one of the first preference
        for pref in range(count) if count else (-1,):
            choice = choice_of(record, pref, reads)
            try:
                if reads == "groups" and len(choice.answers) != answers:
                    problem = f"a group of {len(choice.answers)} answers, in a set that begins with one of {answers}"
                    raise place_of(record).bad("malformed_row", problem, "Give all groups one size, as the selector group does.")
                row = tokenize(record, choice, processor, answers, **limits)
            except DataError as error:
                refuse(error, record.id)
            else:
                yield index, pref, row, seen


def _layout(
    rows: Sequence[RowSize], processor: RowProcessor, config: DataConfig, answers: int, multiple: int, mark_changes: bool
) -> RowLayout:
    def slots(longest: int, limit: int) -> int:
        wanted = -(-longest // multiple) * multiple
        return min(wanted, limit) if limit else wanted

    # a set of texts alone still has one (empty) picture, so that every batch has the same fields
    blank = processor.pictures.blank
    canvases = [blank.canvas, *(row.canvas for row in rows)]
    return RowLayout(
        prefix_slots=slots(max((row.prefix for row in rows), default=1), config.prefix_tokens),
        answer_slots=slots(max((row.longest for row in rows), default=1), config.answer_tokens),
        answers=answers,
        images=max([blank.tiles, *(row.images for row in rows)]),
        canvas=(max(y for y, _ in canvases), max(x for _, x in canvases)),
        patch_slots=max([blank.slots, *(row.patch_slots for row in rows)]),
        max_positions=processor.traits.max_positions,
        shorten_answers=config.on_long_row == "shorten_answer",
        mark_changes=mark_changes,
        max_pixels=config.max_image_pixels,
        max_bytes=config.max_image_bytes,
    )
