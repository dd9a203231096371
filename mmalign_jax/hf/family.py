"""What a family of models is to this package: how its config is read, how its tensors are called, what its pictures become."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmalign_jax.hf.names import NameTable
from mmalign_jax.hf.pictures import Pictures
from mmalign_jax.models.config import MllmConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of `families.FAMILIES`.

    Args:
      model_type: of `config.json`.
      architecture, processor_class: transformers' names, written to new directories.
      read: (config.json, where it is) -> sizes; raises UserError that names the key of what is not supported.
      names: the model's table of names.
      pictures: (directory, sizes, tokenizer) -> the family's pictures.
      processor_values: what an export's `processor_config.json` holds beside the image processor, where the base has none.
      chat_template: for checkpoints of families that have none.
    """

    model_type: str
    architecture: str
    processor_class: str
    read: Callable[[Mapping[str, Any], str], MllmConfig]
    names: Callable[[MllmConfig], NameTable]
    pictures: Callable[[Path, MllmConfig, Any], Pictures]
    processor_values: Callable[[MllmConfig, str], Mapping[str, Any]]
    chat_template: str | None = None
