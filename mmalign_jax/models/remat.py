"""What of a layer is kept for the backward pass, by name; the rest is computed again there."""

from typing import TypeVar

import flax.linen as nn
import jax

Layer = TypeVar("Layer", bound=type[nn.Module])

POLICIES = ("none", "dots", "block", "offload")
ATTENTION = "attention"  # `checkpoint_name` of what attention reads and gives
AUTO = "auto"  # a setting, no policy: the cheapest that fits into the devices' memory, see `training.memory`


def least(setting: str) -> str:
    """The policy of a model that is made before the choice: what is compiled with it needs no more memory than the step."""
    return "block" if setting == AUTO else setting


def remat(layer: Layer, policy: str) -> Layer:
    """The layer, for a scan over layers.

    Args:
      policy: "none" keeps everything; "dots" keeps the results of the linears and of attention (but not cuDNN's), so no product is computed again but
        those of queries and keys, of which attention keeps nothing; "offload" keeps the results of the linears, in the host's memory
        (accelerators only); "block" keeps the layer's input alone.

    Raises:
      ValueError: another policy.
    """
    known = jax.checkpoint_policies
    policies = {
        "dots": known.save_from_both_policies(known.dots_with_no_batch_dims_saveable, known.save_only_these_names(ATTENTION)),
        "block": None,
        "offload": known.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }
    if policy not in POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}; there are {', '.join(POLICIES)}")
    # nothing outside of a scan's body could be shared with what is computed again in it
    return layer if policy == "none" else nn.remat(layer, prevent_cse=False, policy=policies[policy])
