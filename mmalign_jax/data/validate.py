"""The checks that every record passes before it is written, whoever made it."""

import math

from mmalign_jax.data.bad_rows import Place
from mmalign_jax.data.images import decode_image
from mmalign_jax.types import PreferenceRecord

IMAGE_TAG = "<image>"
ROLES = ("system", "user", "assistant", "tool")


def check_record(record: PreferenceRecord, place: Place, *, max_pixels: int, max_bytes: int) -> None:
    """Checks structure, answers, placeholders, and that every image decodes within the limits.

    Raises:
      BadRow: with the first thing that is wrong.
    """
    _check_turns(record, place)
    _check_slots(record, place)
    _check_responses(record, place)
    for medium in record.media:
        if medium.kind != "image":
            raise place.bad("malformed_row", f"media of kind {medium.kind!r} are not supported", "Use rows with images only.")
        decode_image(medium.data, max_pixels=max_pixels, max_bytes=max_bytes, file=place.file, row=place.row)


def _check_turns(record: PreferenceRecord, place: Place) -> None:
    if not record.id:
        raise place.bad("malformed_row", "the record has no id", "Give every record its own id.")
    if not record.turns or record.turns[-1].role not in ("user", "tool"):
        raise place.bad("malformed_row", "the prompt does not end with a user turn", "End the prompt with what the user asks.")
    for turn in record.turns:
        if turn.role not in ROLES:
            raise place.bad("malformed_row", f"unknown role {turn.role!r}", f"Use one of {', '.join(ROLES)}.")
    texts = [part.text for turn in record.turns for part in turn.parts if part.text is not None]
    if not any(text.strip() for text in texts):
        raise place.bad("malformed_row", "the prompt is empty", "Give the row a question.")
    for text in [*texts, record.id, record.prefix, *(response.text for response in record.responses)]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise place.bad("malformed_row", "a text holds half of a surrogate pair", "Repair the text's encoding.") from None


def _check_slots(record: PreferenceRecord, place: Place) -> None:
    slots = [part.media for turn in record.turns for part in turn.parts if part.media is not None]
    if sorted(slots) != list(range(len(record.media))):
        raise mismatch(place, len(slots), len(record.media))
    for turn in record.turns:
        if any(IMAGE_TAG in part.text for part in turn.parts if part.text is not None):
            raise place.bad("placeholder_mismatch", f"a text still holds {IMAGE_TAG}", "Make it an image part, or remove it.")
    if any(IMAGE_TAG in text for text in [record.prefix, *(response.text for response in record.responses)]):
        raise place.bad("placeholder_mismatch", f"an answer holds {IMAGE_TAG}", "Only prompts can show images; remove it.")


def mismatch(place: Place, slots: int, images: int):
    """The error for `slots` placeholders that should be filled by `images` images."""
    return place.bad(
        "placeholder_mismatch",
        f"{slots} image placeholders for {images} images",
        f"Write {IMAGE_TAG} (or an image part) in the prompt exactly once for each image.",
    )


def _check_responses(record: PreferenceRecord, place: Place) -> None:
    if not record.responses:
        raise place.bad("no_answer", "the row has no answer", "Give the row its answers or remove the row.")
    for index, response in enumerate(record.responses):
        if not response.text.strip():
            raise place.bad("no_answer", f"answer {index} is empty", "Give the row its answers or remove the row.")
        if not response.text.startswith(record.prefix):
            problem = f"answer {index} does not begin with the record's prefix"
            raise place.bad("malformed_row", problem, "Write whole answers, prefix included.")
        if not response.text.removeprefix(record.prefix).strip():
            raise place.bad("no_answer", f"answer {index} is nothing but the prefix", "Give the row its answers or remove the row.")
    for pref in record.prefs:
        if not (0 <= pref.win < len(record.responses) and 0 <= pref.lose < len(record.responses)) or pref.win == pref.lose:
            raise place.bad("malformed_row", f"the preference {pref.win} over {pref.lose} names no two answers", "Correct the indices.")
        if not (math.isfinite(pref.weight) and math.isfinite(pref.margin)):
            raise place.bad("malformed_row", "a preference has a weight or margin that is not finite", "Correct the number.")
        if record.responses[pref.win].text.strip() == record.responses[pref.lose].text.strip():
            raise place.bad("equal_answers", "the chosen and the rejected answer are the same text", "Remove the row.")
