"""Text with `<image>` and `<video>` tags, or typed parts, -> turns whose media slots are numbered."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from mmalign_jax.data.bad_rows import Place
from mmalign_jax.data.validate import TAGS, mismatch
from mmalign_jax.types import Part, Turn

_KINDS = {tag: kind for kind, tag in TAGS.items()}
_TAG = re.compile(f"({'|'.join(map(re.escape, _KINDS))})")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where an image or a video goes; numbered only when the whole prompt is known."""

    kind: str = "image"


@dataclasses.dataclass(frozen=True)
class OpenTurn:
    role: str
    parts: tuple[str | Slot, ...]
    typed: bool = False  # the source gave a list of parts, not one string


def split_tags(text: str) -> tuple[str | Slot, ...]:
    """Cuts a text at its tags. One newline on either side of a tag belongs to the tag: the chat template writes its own."""
    pieces: list[str | Slot] = []
    for piece in _TAG.split(text):
        if piece in _KINDS:
            if pieces and isinstance(pieces[-1], str):
                pieces[-1] = pieces[-1].removesuffix("\n")
            pieces.append(Slot(_KINDS[piece]))
        else:
            pieces.append(piece.removeprefix("\n") if pieces else piece)
    return tuple(piece for piece in pieces if piece != "")


def close(turns: Sequence[OpenTurn], counts: Mapping[str, int], *, media_first: bool, place: Place) -> tuple[Turn, ...]:
    """Numbers the slots of each kind in reading order.

    Args:
      counts: kind -> how many media of it the row has; the record's media are those of the first kind, then those of the next.
      media_first: when there is no slot at all, put all media in front of the first user turn.

    Raises:
      BadRow: the number of slots of a kind is not that of its media.
    """
    found = collections.Counter(part.kind for turn in turns for part in turn.parts if isinstance(part, Slot))
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if not found and media_first and first is not None:
        front = tuple(Slot(kind) for kind, count in counts.items() for _ in range(count))
        turns = [*turns[:first], OpenTurn(turns[first].role, (*front, *turns[first].parts)), *turns[first + 1 :]]
        found = collections.Counter(counts)
    for kind in TAGS:
        if found[kind] != counts.get(kind, 0):
            raise mismatch(place, kind, found[kind], counts.get(kind, 0))
    numbers, start = {}, 0
    for kind, count in counts.items():
        numbers[kind] = itertools.count(start)
        start += count
    number = lambda part: Part(media=next(numbers[part.kind])) if isinstance(part, Slot) else Part(text=part)  # noqa: E731
    return tuple(Turn(turn.role, tuple(map(number, turn.parts))) for turn in turns)
