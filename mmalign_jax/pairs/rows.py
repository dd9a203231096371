"""Rows that are made as they come, and not planned for a data set: their layouts and batches."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mmalign_jax.data.device import to_device
from mmalign_jax.data.layout import RowLayout, RowTokens, lay_out, stack_rows, tokenize
from mmalign_jax.hf.processor import Processor
from mmalign_jax.types import PairBatch, PreferenceRecord

_PREFIX, _ANSWER = 64, 32  # slots are rounded up to multiples of these, so that similar calls share a program


def layout_of(rows: Sequence[RowTokens], processor: Processor, limits: Mapping[str, int]) -> RowLayout:
    """A layout that holds the rows, with slots that similar rows also get.

    Args:
      limits: `max_pixels` and `max_bytes` of a picture.
    """
    sizes, blank = [row.size for row in rows], processor.pictures.blank
    canvases = [blank.canvas, *(size.canvas for size in sizes)]
    return RowLayout(
        prefix_slots=_up(max(size.prefix for size in sizes), _PREFIX),
        answer_slots=answer_slots(max(size.longest for size in sizes)),
        answers=max(len(size.answers) for size in sizes),
        images=max([blank.tiles, *(size.images for size in sizes)]),
        canvas=(max(y for y, _ in canvases), max(x for _, x in canvases)),
        patch_slots=max([blank.slots, *(size.patch_slots for size in sizes)]),
        max_positions=processor.traits.max_positions,
        **limits,
    )


def answer_slots(longest: int) -> int:
    """Slots for answers of at most so many tokens."""
    return _up(longest, _ANSWER)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def tokenize_answers(record: PreferenceRecord, texts: Sequence[str], processor: Processor, limits: Mapping[str, int]) -> RowTokens:
    """The row of a record's prompt with these answers, whatever responses the record has.

    Raises:
      DataError: the prompt cannot be tokenised.
      UserError: an answer cannot.
    """
    prompt = tokenize(record, None, processor, 0, **limits)
    return dataclasses.replace(prompt, answers=tuple(processor.answer_ids(text, record.prefix) for text in texts))


def lay_out_answers(record: PreferenceRecord, row: RowTokens, processor: Processor, layout: RowLayout) -> dict[str, Any]:
    """The laid out row, with copies of its first answer behind its own where the layout has more."""
    answers = (*row.answers, *[row.answers[0]] * (layout.answers - len(row.answers)))
    return lay_out(record, None, processor, layout, dataclasses.replace(row, answers=answers))


def batches(
    count: int, lay: Callable[[int], dict[str, Any]], layout: RowLayout, mesh: Mesh, rows: int
) -> Iterator[tuple[Sequence[int], PairBatch]]:
    """Rows 0 .. count - 1 on the mesh, `rows` at a time: their numbers and the batch, of which the last is filled with copies of its last row.

    Args:
      lay: number -> the laid out row.
    """
    for start in range(0, count, rows):
        numbers = range(start, min(start + rows, count))
        laid = [lay(number) for number in numbers]
        laid += [laid[-1]] * (rows - len(laid))
        with jax.set_mesh(mesh):
            batch = to_device(stack_rows(laid, layout), mesh, batch_axis=0)
        yield numbers, batch
