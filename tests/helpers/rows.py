"""Small pictures, tables of published layouts, and a processor whose tokens are characters."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmalign_jax.hf.pictures import Expansion, RowTraits
from mmalign_jax.types import Media, Part, Preference, PreferenceRecord, Response, Turn

IMAGE, EOS, BOS = 500, 501, 502


class LetterPictures:
    """Three image tokens a picture, 4 x 6 pixels."""

    placeholder, video_placeholder = "<image>", ""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    processors, needs_size = (), False
    blank = Expansion("", np.arange(3, dtype=np.int32), 1, (4, 6))

    def expand(self, sizes, times=None):
        return self.blank

    def pixels(self, frames, times=None):
        return np.asarray(frames[0].resize((6, 4), Image.Resampling.BOX), np.uint8)[None]


class LetterProcessor:
    """One token a character, three image tokens a picture."""

    image_token_ids = (IMAGE,)
    pictures = LetterPictures()
    traits = RowTraits(tile_features=3)

    def prompt_ids(self, turns, expansions):
        ids = [BOS]
        for part in (part for turn in turns for part in turn.parts):
            ids += [IMAGE] * 3 if part.text is None else list(map(ord, part.text))
        return np.array(ids, np.int32)

    def answer_ids(self, text, prefix=""):
        ids = np.array([*map(ord, text), EOS], np.int32)
        return ids, np.arange(len(ids)) >= len(prefix)


def encoded(color=(200, 30, 30), size=(12, 8), kind="JPEG", mode="RGB", **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, kind, **options)
    return out.getvalue()


def photo_bytes(name="astronaut", size=(64, 64)) -> bytes:
    from skimage import data

    out = io.BytesIO()
    Image.fromarray(getattr(data, name)()).resize(size).save(out, "JPEG")
    return out.getvalue()


def rlaif_row(number=0, **changes) -> dict:
    row = {
        "ds_name": "demo",
        "image": {"bytes": encoded((number * 7 % 256, 60, 90)), "path": f"{number}.jpg"},
        "question": f"What is in picture {number}?",
        "chosen": f"A desk with lamp {number}.",
        "rejected": "A cat.",
        "origin_dataset": "demo",
        "origin_split": "{}",
        "idx": str(number),
        "image_path": f"{number}.jpg",
    }
    return row | changes


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def record(name="r0", prompt="Q?", chosen="yes", rejected="no", images=1, **changes) -> PreferenceRecord:
    media = tuple(Media("image", encoded((index * 90, 10, 200))) for index in range(images))
    parts = (*(Part(media=index) for index in range(images)), Part(text=prompt))
    values = {
        "id": name,
        "media": media,
        "turns": (Turn("user", parts),),
        "responses": (Response(chosen), Response(rejected)),
        "prefs": (Preference(0, 1),),
    }
    return PreferenceRecord(**values | changes)
