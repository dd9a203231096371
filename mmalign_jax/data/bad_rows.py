"""A row that cannot be used, with the name under which it is counted."""

import dataclasses

from mmalign_jax.errors import DataError
from mmalign_jax.types import PreferenceRecord

REASONS = (
    "missing_image",  # no bytes, no such file, or a path that leaves the root
    "unreadable_image",  # truncated, corrupt, animated, or a format that is not supported
    "image_too_large",  # over the limit on bytes, pixels or aspect ratio
    "unreadable_video",  # an encoded file instead of frames
    "video_too_long",  # over the limit on frames or on bytes of all frames together
    "placeholder_mismatch",  # placeholders and images or videos differ in number
    "no_answer",  # an answer is missing or empty
    "equal_answers",  # chosen and rejected are the same text
    "malformed_row",  # anything else that the format does not allow
    "duplicate_id",
)


class BadRow(DataError):
    """A `DataError` about one row; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, problem: str, *, file: str, row: str, mend: str):
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        super().__init__(problem, file=file, row=row, mend=mend)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row came from; makes the errors about it."""

    file: str
    row: str

    def bad(self, reason: str, problem: str, mend: str) -> BadRow:
        return BadRow(reason, problem, file=self.file, row=self.row, mend=mend)


def place_of(record: PreferenceRecord, file: str = "records") -> Place:
    """The file and row that a record was imported from; `file` and the record's id where it does not say."""
    return Place(str(record.meta.get("file", file)), str(record.meta.get("row", record.id)))
