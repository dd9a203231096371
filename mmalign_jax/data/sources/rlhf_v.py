"""RLHF-V (openbmb/RLHF-V-Dataset): parquet whose column `text` is a str that holds JSON {question, chosen, rejected}."""

import json
from pathlib import Path

from mmalign_jax.config import DataConfig
from mmalign_jax.data.sources import _single
from mmalign_jax.data.sources.source import MediaReader, Source, find_files, fingerprint, root_of

REQUIRED = ("text", "image")


def read(path: str, config: DataConfig) -> Source:
    """The rows at `path` (a parquet file, a pattern or a directory). Image paths are relative to each file's directory."""
    files = find_files(path, (".parquet",))
    side_files: dict[str, tuple[int, int]] = {}

    def make(place, record_id, row):
        reader = MediaReader(Path(place.file).parent, config.max_image_bytes, side_files)
        return _single.pair(record_id, row, _texts(row["text"], place), reader, place)

    def rows():
        return _single.each(_single.numbered_rows(files, root_of(path), REQUIRED + _single.META, REQUIRED), make)

    return Source(path, fingerprint("rlhf_v 2", files), rows, side_files)


def _texts(text, place):
    try:
        texts = json.loads(text)
    except (TypeError, ValueError):
        texts = None
    if not isinstance(texts, dict):
        mend = 'Write it as {"question": ..., "chosen": ..., "rejected": ...}.'
        raise place.bad("malformed_row", "column text is not a JSON object", mend)
    return texts
