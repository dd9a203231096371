"""A new model directory with random weights: what the built-in world trains from, and what tests use without torch."""

import copy
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmalign_jax.errors import UserError
from mmalign_jax.hf import families, names
from mmalign_jax.hf.files import make_sibling, move_into_place, write_json
from mmalign_jax.hf.safetensors_dir import DTYPES, Planned, write_weights
from mmalign_jax.models.config import MllmConfig

_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}

# The statistics of CLIP's training images, which every CLIP processor has.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Init:
    """How wide the random weights are.

    Args:
      embedding_std: of token embeddings; CLIP's class and position embeddings have `position_std`.
      position_std: see above.
      gain: factor on every linear kernel, whose standard deviation is otherwise 1/sqrt(fan-in).
      residual: how attention and MLP outputs shrink with the depth of their stack: their kernels are divided by sqrt(2 layers) when
        true (as in GPT-2).
    """

    embedding_std: float = 0.02
    position_std: float = 0.02
    gain: float = 1.0
    residual: bool = True


def initial(entry: names.Entry, config: MllmConfig, init: Init, random: np.random.Generator) -> np.ndarray:
    """One new tensor, float32, in its Hugging Face shape: norms 1 and 0, biases 0, everything else normal."""
    stack, *_, leaf = entry.path
    normal = lambda std: random.normal(0.0, std, entry.hf_shape).astype(np.float32)  # noqa: E731
    if leaf == "scale":
        return np.ones(entry.hf_shape, np.float32)
    if leaf == "bias":
        return np.zeros(entry.hf_shape, np.float32)
    if leaf == "embedding":
        return normal(init.embedding_std)
    if leaf in ("class_token", "positions", "newline"):
        return normal(init.position_std)
    std = init.gain / np.prod(entry.hf_shape[1:]) ** 0.5
    if init.residual and entry.path[-2] in ("out", "down"):
        layers = config.vision.layers if stack == "vision_tower" else config.decoder.layers
        std /= (2 * layers) ** 0.5
    return normal(std)


def write_fresh(
    directory: str | pathlib.Path,
    hf_config: Mapping[str, Any],
    seed: int,
    write_tokenizer: Callable[[pathlib.Path], None],
    *,
    init: Init | None = None,
    dtype: str = "float32",
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> pathlib.Path:
    """Writes a complete model directory in the hub's layout and returns it. Every tensor depends on (seed, its name) alone.

    Args:
      directory: missing or empty.
      hf_config: as `config.json` of a LLaVA; `text_config`, `vision_config` and `image_token_index` are required.
      seed: of the weights.
      write_tokenizer: writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into the directory it is given.
      init: widths of the weights.
      dtype: "float32", "bfloat16" or "float16".
      mean, std: normalisation of pixels in [0, 1].

    Raises:
      UserError: the config is not that of a supported LLaVA, or the directory is not empty.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: not empty; give a new directory for the model")
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    config, values = _complete(hf_config, dtype)
    table = families.of(config).names(config)
    fresh = make_sibling(directory)
    write_json(fresh / "config.json", values)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(fresh / "generation_config.json", {key: values["text_config"][key] for key in special if key in values["text_config"]})
    _write_processor(fresh, config, mean, std)
    write_tokenizer(fresh)

    def plan(entry: names.Entry, reduced: str) -> Planned:
        random = np.random.default_rng([seed, *hashlib.sha256(reduced.encode()).digest()])
        make = lambda: initial(entry, config, init or Init(), random).astype(_DTYPES[dtype])  # noqa: E731
        return Planned(table.hub_name(reduced), _DTYPES[dtype], entry.hf_shape, make)

    planned = [plan(entry, reduced) for entry in (*table.entries, *table.behind) for reduced in entry.names]
    write_weights(fresh, planned, shard_bytes=5_000_000_000)
    move_into_place(directory)
    return directory


def _complete(hf_config: Mapping[str, Any], dtype: str) -> tuple[MllmConfig, dict[str, Any]]:
    values = copy.deepcopy(dict(hf_config))
    for key in ("text_config", "vision_config", "image_token_index"):
        if key not in values:
            raise UserError(f"the new model's config lacks {key}")
    fixed = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "dtype": dtype}
    values = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"} | values | fixed
    values["text_config"] = {"model_type": "llama"} | values["text_config"]
    values["vision_config"] = {"model_type": "clip_vision_model"} | values["vision_config"]
    config = families.read(values, where="the new model's config")
    return config, values | {"image_seq_length": config.image_tokens}


def _write_processor(directory: pathlib.Path, config: MllmConfig, mean: tuple, std: tuple) -> None:
    side = config.vision.image_size
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    write_json(directory / "preprocessor_config.json", {"processor_class": "LlavaProcessor"} | images)
    values = families.of(config).processor_values(config, "<image>")
    write_json(directory / "processor_config.json", {"processor_class": "LlavaProcessor", **values, "image_processor": images})
