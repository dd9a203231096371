"""Layouts for rows that are made as they come, and not planned for a data set."""

from collections.abc import Mapping, Sequence

from mmalign_jax.data.layout import RowLayout, RowTokens
from mmalign_jax.hf.processor import Processor

_PREFIX, _ANSWER = 64, 32  # slots are rounded up to multiples of these, so that similar calls share a program


def layout_of(rows: Sequence[RowTokens], processor: Processor, limits: Mapping[str, int]) -> RowLayout:
    """A layout that holds the rows, with slots that similar rows also get.

    Args:
      limits: `max_pixels` and `max_bytes` of a picture.
    """
    sizes, blank = [row.size for row in rows], processor.pictures.blank
    up = lambda longest, multiple: -(-longest // multiple) * multiple  # noqa: E731
    canvases = [blank.canvas, *(size.canvas for size in sizes)]
    return RowLayout(
        prefix_slots=up(max(size.prefix for size in sizes), _PREFIX),
        answer_slots=up(max(size.longest for size in sizes), _ANSWER),
        answers=max(len(size.answers) for size in sizes),
        images=max([blank.tiles, *(size.images for size in sizes)]),
        canvas=(max(y for y, _ in canvases), max(x for _, x in canvases)),
        patch_slots=max([blank.slots, *(size.patch_slots for size in sizes)]),
        max_positions=processor.traits.max_positions,
        **limits,
    )
