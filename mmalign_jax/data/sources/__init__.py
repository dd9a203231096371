"""One importer a published format, and the detection of the format."""

import json
from pathlib import Path

from mmalign_jax.config import DataConfig
from mmalign_jax.data.sources import rlaif_v, rlhf_v, trl
from mmalign_jax.data.sources.source import MARKER, Source, columns_of, find_files
from mmalign_jax.errors import DataError, UserError

IMPORTERS = {"rlhf_v": rlhf_v.read, "rlaif_v": rlaif_v.read, "trl": trl.read}


def detect(path: str) -> str:
    """The format of what is at `path`: records, rlhf_v, rlaif_v or trl.

    Raises:
      UserError: nothing is there, or its columns fit no format.
    """
    if path and (Path(path) / MARKER).is_file():
        return "records"
    file = find_files(path, (".parquet", ".jsonl"))[0]
    if file.suffix == ".jsonl":
        columns = dict.fromkeys(_first_keys(file), "")
    elif file.suffix == ".parquet":
        columns = columns_of(file)
    else:
        raise UserError(f"config.data.path: {file} is neither a .parquet nor a .jsonl file")
    if "text" in columns and "image" in columns and "chosen" not in columns and file.suffix == ".parquet":
        return "rlhf_v"
    if {"question", "chosen", "rejected", "image"} <= set(columns) and file.suffix == ".parquet":
        return "rlaif_v"
    if {"chosen", "rejected"} <= set(columns):
        return "trl"
    raise UserError(
        f"config.data.format: {file} has the columns {', '.join(columns)}, which fit no known format; known are {', '.join(IMPORTERS)}"
    )


def read(config: DataConfig) -> Source:
    """The rows of a published set, not yet checked (`builder.prepare` does that).

    Raises:
      UserError: there are no such files, or the format is not one of `IMPORTERS`.
    """
    name = detect(config.path) if config.format == "auto" else config.format
    if name not in IMPORTERS:
        raise UserError(f"config.data.format: {name!r} is not imported from files; importers: {', '.join(IMPORTERS)}")
    return IMPORTERS[name](config.path, config)


def _first_keys(file: Path) -> list[str]:
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                try:
                    return list(json.loads(line))
                except (ValueError, TypeError) as error:
                    problem = f"the first line is not a JSON object ({error})"
                    raise DataError(problem, file=str(file), mend="Write one JSON object a line.") from error
    raise DataError("the file is empty", file=str(file), mend="Give a file with rows.")
