"""What a cached reference, or a tower's features, were computed from, field by field, so that a cache that does not fit any more says why."""

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from mmalign_jax.config import DataConfig
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.errors import UserError
from mmalign_jax.files import read_json
from mmalign_jax.hf.adapters import WEIGHTS
from mmalign_jax.hf.export import MARKER
from mmalign_jax.hf.import_ import part_hash
from mmalign_jax.hf.pictures import Expansion, Pictures, video_values
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.hf.safetensors_dir import open_weights
from mmalign_jax.types import PreferenceRecord, answers_of

SCHEMA = 1  # raised whenever the same inputs give other log-probs, or other files, than before
TOWER_SCHEMA = 2  # likewise of features

# Small files of a model directory: tokenizer, processor, end tokens. Sizes are the field `model`, the template a field of its own
_SMALL_FILES = (".json", ".txt", ".model")
_NO_PROCESSOR = ("config.json", "chat_template.json", "adapter_config.json", MARKER)
# Pictures by which a resolution shows: small and large, upright, lying and square (height, width)
_PROBES = ((224, 224), (480, 640), (1024, 768), (1080, 1920), (3000, 4000))
_SHOWN = 40  # longer values (hashes, templates) are not shown where they differ
_BLOCK = 256  # records that are looked at in parallel


def model_key(policy: Pretrained, reference_dtype: str) -> dict[str, Any]:
    """The fields of a reference: its files by content, and how it is computed.

    Args:
      policy: the model that training starts from. The reference is this model with the adapter that it is read with, without new factors.
      reference_dtype: type of the reference's parameters.
    """
    files = sorted({tensor.file for tensor in open_weights(policy.path).values()})
    adapter = {}
    if policy.adapter:
        factors = {part: dataclasses.asdict(lora) for part, lora in policy.sizes.lora.items()}
        adapter = {WEIGHTS: _file_hash(Path(policy.adapter) / WEIGHTS), "factors": factors}
    return _plain({
        "schema": SCHEMA,
        "weights": _hashes(files),
        "adapter": adapter,
        "model": dataclasses.asdict(policy.sizes.with_lora({})),
        "processor": _processor_files(policy.path),
        "chat_template": policy.processor.chat_template,
        "resolution": resolution(policy.processor.pictures),
        "compute_dtype": policy.model.dtype,
        "reference_dtype": reference_dtype,
        "platform": jax.default_backend(),
    })  # fmt: skip


def tower_key(policy: Pretrained, tower_dtype: str) -> dict[str, Any]:
    """The fields of a frozen tower's features of a picture: the tower by its values, what pictures become and what makes them so, and how it is
    computed.

    Image processors count by the values that they work with, not by their files: what these leave out are defaults of transformers' classes, and
    an export adds files with the same values.

    Args:
      tower_dtype: type in which the tower's parameters are kept.
    """
    sizes, pictures = policy.sizes, policy.processor.pictures
    return _plain({
        "schema": TOWER_SCHEMA,
        "weights": part_hash(policy.path, sizes, "vision_tower"),
        "tower": dataclasses.asdict(sizes.vision) | {"feature_layers": sizes.feature_layers, "class_token_kept": sizes.keep_class_token},
        "pictures": {"kind": type(pictures).__name__, "mean": pictures.mean, "std": pictures.std},
        "processors": {name: _of_pixels(one.to_dict()) for name, one in zip(("pictures", "frames"), pictures.processors, strict=False)},
        "videos": _of_pixels(video_values(policy.path) or {}) if pictures.video_placeholder else {},
        "made_with": {name: importlib.metadata.version(name) for name in ("pillow", "transformers")},
        "resolution": resolution(pictures),
        "compute_dtype": policy.model.dtype,
        "tower_dtype": tower_dtype,
        "platform": jax.default_backend(),
    })  # fmt: skip


def resolution(pictures: Pictures) -> dict[str, str]:
    """What pictures of some sizes become, in words: tiles, their size, and image tokens."""

    def become(size: tuple[int, int]) -> str:
        try:
            return _in_words(pictures.expand([size]))
        except UserError:
            return "refused"

    return {"blank": _in_words(pictures.blank), **{f"{height} x {width}": become((height, width)) for height, width in _PROBES}}


def data_key(digests: UInt8[np.ndarray, "records 16"], plan: RowPlan, config: DataConfig) -> dict[str, Any]:
    """The field `data`: the records, which of their pairs are rows, and what may cut or drop a row."""
    limits = {name: getattr(config, name) for name in ("on_long_row", "prefix_tokens", "answer_tokens")}
    rows = {"rows": len(plan.items), "items": hashlib.sha256(plan.items.astype("<i4").tobytes()).hexdigest()}
    rows |= {} if plan.reads == "prefs" else {"reads": plan.reads}
    return {"records": len(digests), "content": hashlib.sha256(digests.tobytes()).hexdigest(), **rows, **limits}


def record_digests(records: Records, workers: int, progress: Callable[[int, int], None]) -> UInt8[np.ndarray, "records 16"]:
    """A digest of each record's content, in order: of all that log-probs depend on. Weights, margins, scores and origins are not among it."""
    count, found = len(records), []
    with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:
        for start in range(0, count, _BLOCK):
            found += pool.map(lambda index: _digest(records[index]), range(start, min(start + _BLOCK, count)))
            progress(len(found), count)
    return np.frombuffer(b"".join(found), np.uint8).reshape(count, 16)


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields that differ, each with what of it does, for a reader."""
    out = []
    for field in sorted(kept.keys() | now.keys()):
        parts = _differing(kept.get(field), now.get(field), "")
        if parts:
            details = "; ".join(part for part in parts[:4] if part) + ("; ..." if len(parts) > 4 else "")
            out.append(f"{field} ({details})" if details else field)
    return out


def _differing(kept: Any, now: Any, name: str) -> list[str]:
    if isinstance(kept, Mapping) and isinstance(now, Mapping):
        under = f"{name}." if name else ""
        return [text for key in sorted(kept.keys() | now.keys()) for text in _differing(kept.get(key), now.get(key), under + key)]
    if kept == now:
        return []
    there, here = (json.dumps(value, ensure_ascii=False) for value in (kept, now))
    values = f"{there} there, {here} now" if max(len(there), len(here)) <= _SHOWN else ""
    return [": ".join(filter(None, (name, values)))]


def _in_words(expansion: Expansion) -> str:
    height, width = expansion.canvas
    return f"{expansion.tiles} of {height} x {width}, {len(expansion.features)} tokens"


def _digest(record: PreferenceRecord) -> bytes:
    plain = {
        "id": record.id,
        "media": [[medium.kind, list(medium.times), [len(data) for data in medium.pictures]] for medium in record.media],
        "turns": [[turn.role, [part.media if part.text is None else part.text for part in turn.parts]] for turn in record.turns],
        "responses": [response.text for response in record.responses],
        "prefs": [[pref.win, pref.lose] for pref in record.prefs],
        "prefix": record.prefix,
        "complete": record.complete,
    }
    if record.labels or record.groups:
        plain |= {field: [answers_of(one) for one in getattr(record, field)] for field in ("labels", "groups")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for medium in record.media:
        for data in medium.pictures:
            digest.update(data)
    return digest.digest()[:16]


def _hashes(files: list[Path]) -> dict[str, str]:
    # hashing lets go of the interpreter lock
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return {file.name: found for file, found in zip(files, pool.map(_file_hash, files), strict=True)}


def _file_hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _processor_files(directory: Path) -> dict[str, str]:
    """Name of a file -> hash. JSON counts by what it says, without the chat template; of the generation settings, only the end tokens."""
    out = {}
    for file in sorted(directory.iterdir()):
        if file.suffix not in _SMALL_FILES or file.name in _NO_PROCESSOR or file.name.endswith(".index.json") or not file.is_file():
            continue
        if file.suffix != ".json":
            out[file.name] = _file_hash(file)
            continue
        values = read_json(file)
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key != "chat_template"}
            values = {"eos_token_id": values.get("eos_token_id")} if file.name == "generation_config.json" else values
        out[file.name] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return out


def _of_pixels(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a processor's values that pixels may depend on: not where it was read from, and with which tokenizer."""
    return {name: value for name, value in values.items() if not name.startswith("_") and "path" not in name and name != "processor_class"}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back."""
    return json.loads(json.dumps(values, default=str))
