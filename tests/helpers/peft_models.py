"""PEFT's view of an adapter."""

import pathlib
import warnings

import peft
import torch
from safetensors.torch import load_file


def with_adapter(model: torch.nn.Module, directory: pathlib.Path) -> peft.PeftModel:
    """transformers' model with the adapter, after counting that every tensor of the file is used and no other factor is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT asks transformers by a name that has become old
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = peft.PeftModel.from_pretrained(model, directory).eval()
    there = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
    written = {name.replace(".weight", ".default.weight"): value for name, value in load_file(directory / "adapter_model.safetensors").items()}
    assert there.keys() == written.keys() and len(there) > 0
    for name, value in written.items():
        assert torch.equal(there[name], value), name
    return adapted


def merged(adapted: peft.PeftModel) -> dict[str, torch.Tensor]:
    """PEFT's own merge, by transformers' names."""
    return adapted.merge_and_unload().state_dict()
