"""The checks that every record passes before it is written, whoever made it."""

import math

from mmalign_jax.data.bad_rows import BadRow, Place
from mmalign_jax.data.images import decode_image
from mmalign_jax.types import Media, PreferenceRecord

TAGS = {"image": "<image>", "video": "<video>"}  # kind of media -> its placeholder in texts
MAX_FRAMES = 512
MAX_RECORD_BYTES = 1 << 30  # of all pictures of a record: a record is one protobuf message, which cannot have 2 GiB
ROLES = ("system", "user", "assistant", "tool")


def check_record(record: PreferenceRecord, place: Place, *, max_pixels: int, max_bytes: int, max_frames: int = MAX_FRAMES) -> None:
    """Checks structure, answers, placeholders, and that every image and every frame decodes within the limits.

    Raises:
      BadRow: with the first thing that is wrong.
    """
    _check_turns(record, place)
    _check_slots(record, place)
    _check_responses(record, place)
    size = sum(len(picture) for medium in record.media for picture in medium.pictures)
    if size > MAX_RECORD_BYTES:
        problem = f"the row's pictures have {size} bytes, over the limit of {MAX_RECORD_BYTES}"
        raise place.bad("image_too_large", problem, "Give fewer or smaller pictures.")
    for number, medium in enumerate(record.media):
        if medium.kind == "image":
            decode_image(medium.data, max_pixels=max_pixels, max_bytes=max_bytes, file=place.file, row=place.row)
        else:
            _check_frames(medium, number, place, max_pixels, max_bytes, max_frames)


def _check_frames(video: Media, number: int, place: Place, max_pixels: int, max_bytes: int, max_frames: int) -> None:
    if len(video.frames) > max_frames:
        problem = f"medium {number} has {len(video.frames)} frames, over the limit of {max_frames}"
        raise place.bad("video_too_long", problem, "Give fewer frames or raise config.data.max_frames.")
    first = None
    for index, frame in enumerate(video.frames):
        try:
            size = decode_image(frame, max_pixels=max_pixels, max_bytes=max_bytes, file=place.file, row=place.row).size
        except BadRow as error:
            raise place.bad(error.reason, f"frame {index} of medium {number}: {error.problem}", error.mend) from error
        first = first or size
        if size != first:
            problem = f"frame {index} of medium {number} is {size[0]} x {size[1]}, the first one {first[0]} x {first[1]}"
            raise place.bad("malformed_row", problem, "Give all frames of a video the same size.")


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
        problem = f"the prompt shows the media {sorted(slots)}, the row has {len(record.media)}"
        raise place.bad("placeholder_mismatch", problem, "Show every image and video of the row exactly once.")
    for tag in TAGS.values():
        for turn in record.turns:
            if any(tag in part.text for part in turn.parts if part.text is not None):
                raise place.bad("placeholder_mismatch", f"a text still holds {tag}", "Make it a part of its own, or remove it.")
        if any(tag in text for text in [record.prefix, *(response.text for response in record.responses)]):
            raise place.bad("placeholder_mismatch", f"an answer holds {tag}", "Only prompts can show images and videos; remove it.")


def mismatch(place: Place, kind: str, slots: int, media: int) -> BadRow:
    """The error for `slots` placeholders that should be filled by `media` images or videos."""
    return place.bad(
        "placeholder_mismatch",
        f"{slots} {kind} placeholders for {media} {kind}s",
        f"Write {TAGS[kind]} (or a part of type {kind}) in the prompt exactly once for each {kind}.",
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
    _check_scored(record, place)


def _check_scored(record: PreferenceRecord, place: Place) -> None:
    known = range(len(record.responses))
    for label in record.labels:
        if label.answer not in known:
            raise place.bad("malformed_row", f"a label names answer {label.answer}, which is not there", "Correct the index.")
    if len({label.answer for label in record.labels}) < len(record.labels):
        raise place.bad("malformed_row", "an answer has two labels", "Leave one of them.")
    for group in record.groups:
        if len(group.answers) < 2 or len(set(group.answers)) < len(group.answers) or not set(group.answers) <= set(known):
            raise place.bad("malformed_row", f"the group {group.answers} names no two or more different answers", "Correct the indices.")
        scores = [record.responses[index].score for index in group.answers]
        if not all(score is not None and math.isfinite(score) for score in scores):
            raise place.bad("malformed_row", "an answer of a group has no finite score", "Give all answers of a group their scores.")
    if not all(math.isfinite(one.weight) and one.weight >= 0 for one in (*record.labels, *record.groups)):
        raise place.bad("malformed_row", "a label or a group has a weight that is not finite or below 0", "Correct the number.")
