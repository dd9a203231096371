"""Layers apart: the same numbers as from the stack, out of the same memory."""

import jax
import numpy as np
import pytest

from mmalign_jax.models.apart import are_apart, layers_apart

pytestmark = pytest.mark.optimised


def test_layers_are_parts_of_the_stack_s_memory_and_let_it_go():
    stack = jax.jit(lambda: jax.random.normal(jax.random.key(0), (3, 64, 16)))()
    values, address = np.array(stack), stack.unsafe_buffer_pointer()
    params = {"decoder": {"layers": {"mlp": {"kernel": stack}}, "final_norm": {"scale": np.ones(16)}}}
    assert layers_apart(params) is params  # so small
    tree = layers_apart(params, small=0)
    assert are_apart(tree) and set(tree["decoder"]) == {"layers", "layers_0", "layers_1", "layers_2", "final_norm"}
    for number in range(3):
        part = tree["decoder"][f"layers_{number}"]["mlp"]["kernel"]
        np.testing.assert_array_equal(np.array(part), values[number])
        assert part.unsafe_buffer_pointer() == address + number * values[number].nbytes
    assert layers_apart(tree, small=0) is tree
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    del tree, part, params
    assert add(stack).unsafe_buffer_pointer() == address and stack.is_deleted()


def test_what_several_devices_hold_stays_stacked():
    devices = jax.devices()
    everywhere = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ("x",)), jax.sharding.PartitionSpec())
    spread = jax.device_put(np.zeros((2, 8, 8), np.float32), everywhere)
    params = {"decoder": {"layers": {"kernel": spread}}}
    assert len(devices) > 1 and layers_apart(params, small=0) is params
