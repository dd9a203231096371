"""What the tests need to know of a family to compare us with transformers."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import torch

from mmalign_jax.types import PreferenceRecord

Inputs = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class FamilyCase:
    """One tiny checkpoint of a family.

    Args:
      name: of the test, "FAMILY" or "FAMILY variant".
      write: (directory, seed) -> the directory, complete: config, random weights, tokenizer, chat template, processor files, as
        transformers' `save_pretrained` writes them.
      load: transformers' model of a directory: float32, eval mode, on CPU, with a neutral generation config.
      inputs: (directory, record) -> what transformers' own processor makes of the record's prompt and media: keyword arguments of the
        model for a batch of one, `input_ids` [1, n] among them.
      append: (inputs, token ids) -> the same with an answer's tokens behind the prompt.
      records: at least: two unlike pictures in a row each, both in one row where the family takes several, a row of text where it takes
        text; prompts and answers of unlike lengths. Each has two answers.
    """

    name: str
    write: Callable[[pathlib.Path, int], pathlib.Path]
    load: Callable[[pathlib.Path], torch.nn.Module]
    inputs: Callable[[pathlib.Path, PreferenceRecord], Inputs]
    append: Callable[[Inputs, Sequence[int]], Inputs]
    records: tuple[PreferenceRecord, ...]


def append_tokens(inputs: Inputs, tokens: Sequence[int]) -> Inputs:
    """Extends `input_ids` by the tokens, `attention_mask` by ones and every other tensor of the same shape by zeros."""
    ids = inputs["input_ids"]
    more = torch.tensor([list(tokens)], dtype=ids.dtype)
    out = dict(inputs)
    for name, value in inputs.items():
        if value.shape == ids.shape:
            added = more if name == "input_ids" else torch.full_like(more, int(name == "attention_mask"), dtype=value.dtype)
            out[name] = torch.cat([value, added.to(value.dtype)], dim=1)
    return out
