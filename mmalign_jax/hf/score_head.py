"""A score head on disk: `score_head.safetensors` beside a model or an adapter, `score.weight [1, D]` and `score.bias [1]` as a torch Linear has
them. No index lists the file, so transformers loads the directory as if it were not there.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmalign_jax.errors import UserError
from mmalign_jax.hf.import_ import place
from mmalign_jax.hf.safetensors_dir import open_file
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.score_head import PART, initial_head

FILE = "score_head.safetensors"
KERNEL, BIAS = "score.weight", "score.bias"


def has_head(directory: str | pathlib.Path) -> bool:
    return (pathlib.Path(directory) / FILE).is_file()


def load_head(directories: Sequence[pathlib.Path], sizes: MllmConfig, seed: int, shardings: Mapping | None = None) -> dict[str, jax.Array]:
    """The head of the first directory that has one; a new one where none has.

    Args:
      seed: of a new head, which depends on it alone.
      shardings: of the model's whole tree; None puts every leaf on the default device.

    Raises:
      UserError: the head is not one of a model of this width.
      DataError: the file is corrupt.
    """
    there = next((directory for directory in directories if has_head(directory)), None)
    leaves: dict[str, Any] = initial_head(sizes, seed) if there is None else _read(there / FILE, sizes.decoder.width)
    return {name: place(leaf, None if shardings is None else shardings[PART][name]) for name, leaf in leaves.items()}


def _read(file: pathlib.Path, width: int) -> dict[str, np.ndarray]:
    tensors, shapes = open_file(file), {KERNEL: (1, width), BIAS: (1,)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes:
        raise UserError(f"{file}: holds {found}, the score head of this model is {shapes}; remove the file to begin with a new head")
    kernel, bias = (np.asarray(tensors[name].read(), np.float32) for name in (KERNEL, BIAS))
    # copies: a device array on the CPU must not live in a file's pages
    return {"kernel": kernel.reshape(width).copy(), "bias": bias.reshape(()).copy()}
