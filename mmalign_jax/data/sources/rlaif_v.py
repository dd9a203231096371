"""RLAIF-V (openbmb/RLAIF-V-Dataset): parquet with flat columns question, chosen, rejected, image."""

from pathlib import Path

from mmalign_jax.config import DataConfig
from mmalign_jax.data.sources import _single
from mmalign_jax.data.sources.source import MediaReader, Source, find_files, fingerprint, root_of

REQUIRED = ("question", "chosen", "rejected", "image")


def read(path: str, config: DataConfig) -> Source:
    """The rows at `path` (a parquet file, a pattern or a directory). Image paths are relative to each file's directory."""
    files = find_files(path, (".parquet",))
    side_files: dict[str, tuple[int, int]] = {}

    def make(place, record_id, row):
        return _single.pair(record_id, row, row, MediaReader(Path(place.file).parent, config.max_image_bytes, side_files), place)

    def rows():
        return _single.each(_single.numbered_rows(files, root_of(path), REQUIRED + _single.META, REQUIRED), make)

    return Source(path, fingerprint("rlaif_v 2", files), rows, side_files)
