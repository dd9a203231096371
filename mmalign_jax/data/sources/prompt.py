"""Text with `<image>` tags, or typed parts, -> turns whose image slots are numbered."""

import dataclasses
from collections.abc import Sequence

from mmalign_jax.data.bad_rows import Place
from mmalign_jax.data.validate import IMAGE_TAG, mismatch
from mmalign_jax.types import Part, Turn


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where an image goes; numbered only when the whole prompt is known."""


@dataclasses.dataclass(frozen=True)
class OpenTurn:
    role: str
    parts: tuple[str | Slot, ...]
    typed: bool = False  # the source gave a list of parts, not one string


def split_tags(text: str) -> tuple[str | Slot, ...]:
    """Cuts a text at its tags. One newline on either side of a tag belongs to the tag: the chat template writes its own."""
    pieces: list[str | Slot] = []
    for index, piece in enumerate(text.split(IMAGE_TAG)):
        if index:
            if pieces and isinstance(pieces[-1], str):
                pieces[-1] = pieces[-1].removesuffix("\n")
            pieces.append(Slot())
            piece = piece.removeprefix("\n")
        pieces.append(piece)
    return tuple(piece for piece in pieces if piece != "")


def close(turns: Sequence[OpenTurn], images: int, *, images_first: bool, place: Place) -> tuple[Turn, ...]:
    """Numbers the slots 0, 1, ... in reading order.

    Args:
      images_first: when there is no slot at all, put the images in front of the first user turn.

    Raises:
      BadRow: the number of slots is not the number of images.
    """
    slots = sum(isinstance(part, Slot) for turn in turns for part in turn.parts)
    if slots == 0 and images and images_first:
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            turn = turns[first]
            turns = [*turns[:first], OpenTurn(turn.role, (*[Slot()] * images, *turn.parts)), *turns[first + 1 :]]
            slots = images
    if slots != images:
        raise mismatch(place, slots, images)
    numbers = iter(range(images))
    return tuple(
        Turn(turn.role, tuple(Part(media=next(numbers)) if isinstance(part, Slot) else Part(text=part) for part in turn.parts))
        for turn in turns
    )
