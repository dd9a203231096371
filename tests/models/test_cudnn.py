"""Attention as cuDNN is asked for it: with XLA in its place against blocks of queries, and lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers.packed import GROUPS, HEADS, REGIONS, USED, config, rows
from jax._src.cudnn import fused_attention_stablehlo

from mmalign_jax.mesh import make_mesh, sharding
from mmalign_jax.models import cudnn
from mmalign_jax.models.attention import Regions, attend, packed_mask
from mmalign_jax.types import PAD


def measure(how, qkv, there):
    def read(qkv):
        mixed = how(*qkv) * there[..., None, None]
        return jnp.sum(jnp.sin(mixed)), mixed

    grads, mixed = jax.jit(jax.grad(read, has_aux=True))(qkv)
    return mixed, *grads


def test_sequences_without_holes_give_what_blocks_give():
    qkv, role, positions = rows(REGIONS, USED, 16)
    c, there = config(head_width=16), role != PAD
    mask = packed_mask(role, positions, jnp.full_like(role, -1))
    found = measure(lambda *qkv: cudnn.attend(c, *qkv, there, REGIONS, implementation="xla"), qkv, there)
    expected = measure(lambda *qkv: attend(c, *qkv, mask, REGIONS), qkv, there)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_a_prompt_alone_is_one_sequence():
    regions, used = Regions(19, 0, causal=True), ((19,), (13,))
    qkv, role, positions = rows(regions, used, 8)
    there, mask = role != PAD, packed_mask(role, positions, jnp.full_like(role, -1))
    found = cudnn.attend(config(head_width=8), *qkv, there, regions, implementation="xla")
    expected = attend(config(head_width=8), *qkv, mask, regions)
    np.testing.assert_allclose(found[there], expected[there], rtol=2e-5, atol=2e-5)


def test_the_gradient_is_lowered_for_a_gpu(monkeypatch):
    """No GPU here: what is asked of cuDNN has to be what its checks in jax allow, with a call for each direction, on one device's share."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    mesh = make_mesh(1, 2, 2, jax.devices()[:4])
    placed = functools.partial(sharding, mesh)
    shape = lambda heads: jax.ShapeDtypeStruct((4, 352, heads, 128), jnp.bfloat16, sharding=placed("batch", None, "heads", None))  # noqa: E731
    there = jax.ShapeDtypeStruct((4, 352), jnp.bool_, sharding=placed("batch", None))
    c, regions = config(head_width=128), Regions(150, 101, causal=True)

    def read(qkv, there):
        return jnp.sum(cudnn.attend(c, *qkv, there, regions).astype(jnp.float32))

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(read)).trace((shape(HEADS), shape(GROUPS), shape(GROUPS)), there)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == 1 and text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    # two rows a device, each with two answers of 150 + 101 slots and one that makes them even; half of the heads
    assert "4x252x2x128xbf16" in text and "CAUSAL" in text
