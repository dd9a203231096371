"""The splash kernel, interpreted, against blocks of queries, and where it is lowered for a TPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed import GROUPS, HEADS, REGIONS, USED, config, rows

from mmalign_jax.mesh import make_mesh, sharding
from mmalign_jax.models import splash
from mmalign_jax.models.attention import Regions, attend, packed_mask
from mmalign_jax.models.remat import ATTENTION
from mmalign_jax.types import PAD


def both(c, regions, used, width):
    """(mixed values where there is no padding, gradients) by the kernel and by blocks."""
    qkv, role, positions = rows(regions, used, width)
    there = role != PAD
    kind = "none" if regions.causal else "prefix"
    mask = packed_mask(role, positions, jnp.full_like(role, -1), bidirectional=kind)
    by_blocks = lambda *qkv: attend(c, *qkv, mask, regions)  # noqa: E731
    by_splash = lambda *qkv: splash.attend(c, *qkv, there, regions, interpret=True)  # noqa: E731

    def measure(how):
        def read(qkv):
            mixed = how(*qkv) * there[..., None, None]
            return jnp.sum(jnp.sin(mixed)), mixed

        grads, mixed = jax.jit(jax.grad(read, has_aux=True))(qkv)
        return mixed, *grads

    return zip(measure(by_splash), measure(by_blocks), strict=True)


@pytest.mark.parametrize(
    ("regions", "changes", "width", "block"),
    [
        (REGIONS, {}, 64, 128),
        pytest.param(REGIONS, {"attention_softcap": 3.0, "query_scale": 0.2}, 16, 384, marks=pytest.mark.nightly),
        pytest.param(dataclasses.replace(REGIONS, causal=False), {}, 160, 128, marks=pytest.mark.nightly),
    ],
)
def test_the_kernel_gives_what_blocks_give(monkeypatch, regions, changes, width, block):
    monkeypatch.setattr(splash, "block_size", lambda regions, slots: (block, 384))
    for found, expected in both(config(head_width=width, **changes), regions, USED, width):
        assert float(jnp.abs(expected).max()) > 0.1
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("causal", [True, False])
def test_segments_keep_the_pairs_of_a_row_apart(monkeypatch, causal):
    monkeypatch.setattr(splash, "block_size", lambda regions, slots: (128, 384))
    regions, c = dataclasses.replace(REGIONS, causal=causal, longest=(90, 55)), config(head_width=64)
    qkv, role, positions = rows(regions, ((150, 70, 70), (140, 60, 65)), 64)
    # each region holds the parts of two pairs, cut at other places
    segment, place = np.zeros(role.shape, int), np.array(positions)
    for start, cut, stop in ((0, 90, 150), (150, 170, 220), (220, 275, 290)):
        segment[:, cut:stop] = 1
        before = 0 if not start else np.array([[90], [150 - 90]])  # where each pair's answers go on
        place[:, start:cut] = np.arange(cut - start) + (0 if not start else before[0])
        place[:, cut:stop] = np.arange(stop - cut) + (0 if not start else before[1])
    there = role != PAD
    segment, place = jnp.where(there, segment, -1), jnp.array(place)
    mask = packed_mask(role, place, jnp.full_like(role, -1), bidirectional="none" if causal else "prefix", segment=segment)
    by = (lambda *qkv: splash.attend(c, *qkv, there, regions, segment, interpret=True), lambda *qkv: attend(c, *qkv, mask, regions))
    read = lambda how: lambda qkv: jnp.sum(jnp.sin(how(*qkv) * there[..., None, None]))  # noqa: E731
    (value, grads), (expected, expected_grads) = (jax.jit(jax.value_and_grad(read(how)))(qkv) for how in by)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_static_mask_is_the_mask_of_rows_without_padding(causal):
    regions = Regions(10, 6, causal)
    _, role, positions = rows(regions, ((10, 6, 6),), 1)
    expected = packed_mask(role, positions, jnp.full_like(role, -1), bidirectional="none" if causal else "prefix")[0]
    found = splash.static_mask(regions, 22, 32)
    np.testing.assert_array_equal(found[:22, :22], expected)
    assert not found[:22, 22:].any() and not found[22:, :22].any() and found.any(axis=1).all()
    assert splash.static_mask(Regions(10, 6, causal), 10, 10).sum() == (55 if causal else 100)


def test_large_blocks_where_they_hide_nearly_as_much():
    assert splash.block_size(Regions(704, 352, True), 1408) == (512, 1536)
    assert splash.block_size(Regions(4096, 512, True), 5120) == (512, 5120)
    assert splash.block_size(Regions(704, 128, True), 1728) == (384, 1920)
    assert splash.block_size(Regions(20, 10, True), 40) == (128, 128)


def test_every_device_has_its_rows_and_heads():
    """Lowered for TPUs under the mesh: a kernel sees the rows and heads of one device, and all of its slots."""
    mesh = make_mesh(1, 2, 2, jax.devices()[:4])
    c, regions = config(head_width=128), Regions(256, 128, True)
    placed = functools.partial(sharding, mesh)
    shape = lambda heads: jax.ShapeDtypeStruct((4, 512, heads, 128), jnp.bfloat16, sharding=placed("batch", None, "heads", None))  # noqa: E731
    there = jax.ShapeDtypeStruct((4, 512), jnp.bool_, sharding=placed("batch", None))
    with jax.set_mesh(mesh):
        step = jax.jit(lambda q, k, v, there: splash.attend(c, q, k, v, there, regions))
        traced = step.trace(shape(HEADS), shape(GROUPS), shape(GROUPS), there)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text and "2x2x512x128xbf16" in text


def test_what_is_kept_by_name_spares_the_forward_kernel():
    c, regions = config(head_width=128), Regions(256, 128, True)
    qkv, role, _ = rows(regions, ((256, 128, 128),), 128)

    def kernels(policy):
        """How many there are, forward and backward, of a layer that is computed again in the backward pass."""
        layer = jax.checkpoint(lambda *qkv: jnp.sin(splash.attend(c, *qkv, role != PAD, regions)), policy=policy)
        traced = jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(layer(*qkv)))).trace(qkv)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        bodies = dict(re.findall(r"func\.func \w+ @(\w+)\((.*?)(?=func\.func|\Z)", text, re.DOTALL))

        def run(function):  # equal functions are written once
            calls = re.findall(r"call @(\w+)\(", bodies[function])
            return sum(1 if name == "tpu_custom_call" else run(name) for name in calls)

        return run("main")

    assert kernels(None) == 4
    assert kernels(jax.checkpoint_policies.save_only_these_names(ATTENTION)) == 3
