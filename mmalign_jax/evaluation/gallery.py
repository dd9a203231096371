"""The examples that a report shows: pairs that were trained on, and what the model says to the same prompts before and after."""

from collections.abc import Sequence

import numpy as np

from mmalign_jax.config import DataConfig
from mmalign_jax.data.images import decode_image
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.evaluation import world
from mmalign_jax.evaluation.generate import Answered
from mmalign_jax.report.records import Answer, GalleryItem
from mmalign_jax.types import PreferenceRecord

_LOOKED_AT = 8  # rows that are looked at for one that is shown
_FRAMES = 4  # at most, of a video; evenly apart


def choose(records: Records, plan: RowPlan, count: int) -> tuple[PreferenceRecord, ...]:
    """The first records of different pictures with a better and a worse whole answer, at most `count` of them, among the first rows of the plan."""
    chosen: dict[str, PreferenceRecord] = {}
    for index, _ in plan.items[: _LOOKED_AT * count]:
        record = records[int(index)]
        if _sides(record) and not record.prefix:
            chosen.setdefault((record.media[0].origin if record.media else "") or record.id, record)
        if len(chosen) == count:
            break
    return tuple(chosen.values())


def items(
    records: Sequence[PreferenceRecord], before: Sequence[Answered] | None, after: Sequence[Answered] | None, limits: DataConfig
) -> tuple[GalleryItem, ...]:
    """What the report shows of each record; for the built-in world's pictures, hallucinated words are named.

    Args:
      before, after: the model's answers to the records' prompts; None where it was not trained to answer.
      limits: of images, as when the records were imported.
    """
    nothing = [None] * len(records)
    return tuple(_item(*one, limits) for one in zip(records, before or nothing, after or nothing, strict=True))


def _item(record: PreferenceRecord, before: Answered | None, after: Answered | None, limits: DataConfig) -> GalleryItem:
    truth = world.objects_of(record) if "objects" in record.meta else None

    def mark(text: str) -> Answer:
        return Answer(text, () if truth is None else world.hallucinated(text, truth))

    bounds = {"max_pixels": limits.max_image_pixels, "max_bytes": limits.max_image_bytes}
    pictures = [data for medium in record.media for data in medium.pictures[:: -(-len(medium.pictures) // _FRAMES)]]
    images = tuple(np.asarray(decode_image(picture, file="records", row=record.id, **bounds)) for picture in pictures)
    prompt = " ".join(part.text for turn in record.turns for part in turn.parts if part.text is not None)
    said = (None if answer is None else mark(_ended(answer)) for answer in (before, after))
    chosen, rejected = (record.responses[index].text for index in _sides(record))
    return GalleryItem(record.id, images, prompt, mark(chosen), mark(rejected), *said)


def _sides(record: PreferenceRecord) -> tuple[int, int] | None:
    """A better and a worse answer: of the first pair, of the first labels, or of the first group's scores; None where there are no two."""
    if record.prefs:
        return record.prefs[0].win, record.prefs[0].lose
    if record.groups:
        score = lambda index: record.responses[index].score  # noqa: E731
        return max(record.groups[0].answers, key=score), min(record.groups[0].answers, key=score)
    sides = [next((label.answer for label in record.labels if label.desirable == wanted), None) for wanted in (True, False)]
    return None if None in sides else (sides[0], sides[1])


def _ended(answer: Answered) -> str:
    return answer.text if answer.finished else answer.text + " …"
