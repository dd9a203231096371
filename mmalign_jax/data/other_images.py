"""The pictures of another record in the form of a row's own: a corrupted image for views that show another example's."""

import dataclasses

import numpy as np
from PIL import Image

from mmalign_jax.data import media as media_lib
from mmalign_jax.data.bad_rows import place_of
from mmalign_jax.data.images import decode_image
from mmalign_jax.data.layout import RowLayout, RowProcessor, tokenize
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.errors import UserError
from mmalign_jax.types import PreferenceRecord, record_key


@dataclasses.dataclass(frozen=True)
class OtherImages:
    """Number of an item -> the row's `other_images`. Which record they are of depends on the row's own id and on the set alone.

    Every picture is resized to the size of the one whose place it takes, so that it takes as many tokens.
    """

    records: Records
    processor: RowProcessor
    plan: RowPlan

    def __call__(self, number: int, layout: RowLayout) -> dict[str, np.ndarray]:
        index, pref = map(int, self.plan.items[number])
        record = self.records[index]
        blank = np.zeros((layout.images, *layout.canvas, 3), np.uint8)
        if not record.media:
            return {"other_images": blank}
        tokens = self.plan.tokens
        limits = {"max_pixels": layout.max_pixels, "max_bytes": layout.max_bytes}
        if tokens is None:
            row = tokenize(record, self.plan.choice(record, pref), self.processor, layout.answers, **limits)
        else:
            row = tokens[number]
        other = self._partner(index, record)
        theirs, place, frames, taken = [data for medium in other.media for data in medium.pictures], place_of(other), [], 0
        for medium_index in row.media:
            own = []
            for data in record.media[medium_index].pictures:
                size = decode_image(data, **limits, file=place_of(record).file, row=place_of(record).row).size
                picture = decode_image(theirs[taken % len(theirs)], **limits, file=place.file, row=place.row)
                own.append(picture.resize(size, Image.Resampling.BILINEAR))
                taken += 1
            frames.append(own)
        media = [record.media[medium_index] for medium_index in row.media]
        sizes = {"tiles": layout.images, "canvas": layout.canvas}
        return {"other_images": media_lib.pixels_of(frames, media, row.expansions, self.processor.pictures, place, **sizes)}

    def _partner(self, index: int, record: PreferenceRecord) -> PreferenceRecord:
        count, own = len(self.records), {data for medium in record.media for data in medium.pictures}
        if count > 1:
            start = record_key(record.id) % (count - 1)
            for step in range(count - 1):
                other = self.records[(index + 1 + (start + step) % (count - 1)) % count]
                # sets have several questions about one picture
                if other.media and not {data for medium in other.media for data in medium.pictures} & own:
                    return other
        raise UserError("config.objective.view: a view shows another row's picture, and no other record has another one")
