"""The decoder's layers as arrays of their own, beside the stacked ones.

A scan over stacked layers copies a layer's weights out of the stack before it multiplies with them. That is nothing beside a whole
row, but a decode step on a CPU does little else than read weights. On accelerators the stack stays: there, a copy is all that would
take it apart.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_STACK, _ONE = "layers", "layers_{}"
_SMALL = 16 << 20  # bytes of a stack that a processor's caches hold; its copies take less time than compiling layer by layer


def are_apart(params: dict) -> bool:
    """Whether the layers of this tree are apart."""
    return _ONE.format(0) in params["decoder"]


def layers_apart(params: dict, small: int = _SMALL) -> dict:
    """The tree with `decoder/layers_0`, `decoder/layers_1` and so on beside the stack `decoder/layers`, which `Mllm.decode_step` reads then,
    if one CPU device holds it and it has more than `small` bytes; otherwise the tree as it is.

    Kernels are not copied: the new arrays are parts of the memory of the old ones, which stays while they are there. (Layers that do not
    begin at a multiple of 64 bytes are: those of small vectors.)
    """
    decoder = params["decoder"]
    leaves = jax.tree.leaves(decoder[_STACK])
    if are_apart(params) or not all(map(_on_one_cpu, leaves)) or sum(leaf.nbytes for leaf in leaves) <= small:
        return params
    count = leaves[0].shape[0]
    parts = jax.tree.map(_parts, decoder[_STACK])
    trees = jax.tree.transpose(jax.tree.structure(decoder[_STACK]), jax.tree.structure([0] * count), parts)
    layers = {_ONE.format(number): tree for number, tree in enumerate(trees)}
    return params | {"decoder": decoder | layers}


def _on_one_cpu(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and [one.platform for one in leaf.devices()] == ["cpu"]


def _parts(stack: jax.Array) -> list[jax.Array]:
    sharding = stack.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    # a shard's own array: what numpy keeps of it goes with the parts, so that the stack can be donated then
    return [jax.device_put(part, sharding, may_alias=True) for part in np.asarray(stack.addressable_shards[0].data)]
