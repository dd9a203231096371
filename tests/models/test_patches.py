"""Rotary tables, interpolated positions and masks of towers that take patches are those of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.tiny import quick_jit
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from mmalign_jax.data.media import patches as patches_of
from mmalign_jax.hf.patch_order import PatchGrid
from mmalign_jax.hf.pictures import Expansion, RowTraits
from mmalign_jax.models.attention import rope_tables
from mmalign_jax.models.config import RopeConfig, VisionConfig
from mmalign_jax.models.patches import PatchEmbedding, rotary_tables, segment_mask, take_patches, window_mask
from mmalign_jax.types import Patches

SIDE, WINDOW = 4, 2
GRIDS = (PatchGrid(6, 10, 1, 2, 2, WINDOW), PatchGrid(4, 2, 3, 2, 2, WINDOW), PatchGrid(2, 2, 1, 2, 2, WINDOW))


def expansion(grid: PatchGrid) -> Expansion:
    return Expansion("", grid.feature_order(), grid.tiles, (grid.rows * SIDE, grid.columns * SIDE), None, grid)


def row(*grids: PatchGrid, empty: int = 0) -> tuple[Patches, tuple[int, int]]:
    """A batch of one row with these pictures, and the size of its canvases."""
    canvas = (max(grid.rows for grid in grids) * SIDE, max(grid.columns for grid in grids) * SIDE)
    traits = RowTraits(0, merge=4, patch_size=SIDE, patch_depth=2)
    sizes = {"slots": sum(grid.slots for grid in grids) + empty, "tiles": sum(grid.tiles for grid in grids), "canvas": canvas}
    patches = patches_of([expansion(grid) for grid in grids], traits, **sizes)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], patches), canvas


PATCHES, CANVAS = row(*GRIDS, empty=16)
HELD = np.asarray(PATCHES.segment[0] >= 0)
# order of transformers' patches, which have no windows here: by picture, time, and squares row by row
THW = torch.tensor([[grid.times, grid.rows, grid.columns] for grid in GRIDS])


def in_their_order(values):
    """Our slots, put into their order of squares."""
    values, at, out = np.asarray(values), 0, []
    for grid in GRIDS:
        squares = values[at : at + grid.slots].reshape(-1, 4, *values.shape[1:])
        out.append(squares[grid.feature_order()].reshape(-1, *values.shape[1:]))
        at += grid.slots
    return np.concatenate(out)


def test_places():
    np.testing.assert_array_equal(in_their_order(PATCHES.place[0]), get_vision_position_ids(THW, 2))
    assert HELD.sum() == THW.prod(dim=1).sum() and len(HELD) == sum(grid.slots for grid in GRIDS) + 16


def test_rotary_tables():
    config = Qwen3VLVisionConfig(hidden_size=32, num_heads=2)
    cos, sin = Qwen3VLVisionRotaryEmbedding(config)(torch.zeros(1), get_vision_position_ids(THW, 2))
    ours = quick_jit(lambda patches: rotary_tables(patches, 16))(PATCHES)
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(in_their_order(mine[0]), theirs, atol=1e-6)


@pytest.mark.parametrize("side", [3, 6, 48])
def test_interpolated_positions(side):
    v = VisionConfig(
        image_size=0, patch_size=SIDE, width=6, mlp_width=8, layers=1, heads=1, norm_eps=1e-6, frames_per_patch=2, merge=2, window=WINDOW,
        positions="interpolated", position_side=side,
    )  # fmt: skip
    table = np.random.default_rng(side).standard_normal((side * side, 6)).astype(np.float32)
    params = {"patch": {"kernel": jnp.zeros((2 * SIDE * SIDE * 3, 6))}, "positions": jnp.asarray(table)}
    pixels = jnp.zeros((1, len(HELD), 2 * SIDE * SIDE, 3))
    ours = quick_jit(lambda patches: PatchEmbedding(v).apply({"params": params}, pixels, patches))(PATCHES)
    index, weights = get_vision_interpolation_indices_and_weights(THW, side, "bilinear", align_corners=True, spatial_merge_size=2)
    theirs = (torch.from_numpy(table)[index] * weights[:, :, None]).sum(1)
    np.testing.assert_allclose(in_their_order(ours[0]), theirs, atol=1e-5)


def test_patches_are_cut_out_of_the_canvases():
    tiles = sum(grid.tiles for grid in GRIDS)
    images = jax.random.randint(jax.random.key(0), (1, tiles, *CANVAS, 3), 0, 256).astype(jnp.uint8)
    taken = quick_jit(lambda images: take_patches(images, PATCHES, SIDE))(images)
    assert taken.dtype == jnp.uint8 and np.all(taken[0, ~HELD] == 0)
    ours = in_their_order(taken[0]).reshape(-1, 2, SIDE, SIDE, 3)
    at = first = 0
    for grid in GRIDS:
        for time in range(grid.times):
            pair = np.asarray(images[0, [first + min(2 * time + frame, grid.tiles - 1) for frame in range(2)]])
            for place in get_vision_position_ids(torch.tensor([[1, grid.rows, grid.columns]]), 2).numpy() * SIDE:
                rows, columns = (slice(start, start + SIDE) for start in place)
                np.testing.assert_array_equal(ours[at], pair[:, rows, columns])
                at += 1
        first += grid.tiles
    assert at == len(ours)


def test_masks():
    full, within = np.asarray(segment_mask(PATCHES))[0], np.asarray(window_mask(PATCHES, 16))[0]
    assert not full[HELD][:, ~HELD].any() and not full[~HELD].any()
    # one picture, two steps of the video, one picture
    assert [block.sum() for block in (full[HELD][:, HELD][start] for start in (0, 60, 68, 76))] == [60, 8, 8, 4]
    assert within.shape == (len(HELD) // 16, 1, 16) and within.sum() == HELD.sum()
    # no window holds two pictures
    segments = np.asarray(PATCHES.segment[0]).reshape(-1, 16)
    assert all(len({number for number in run if number >= 0}) <= 1 for run in segments.tolist())


@pytest.mark.parametrize("interleaved", [False, True])
def test_sections_of_rotary_positions(interleaved):
    """As in transformers' text models: sections one after the other, or time, row and column by turns."""
    from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    sections = (24, 20, 20) if interleaved else (16, 24, 24)
    values = {"hidden_size": 128, "num_attention_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}}
    theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**values)) if interleaved else Qwen2_5_VLRotaryEmbedding(Qwen2_5_VLTextConfig(**values))
    positions = np.random.default_rng(0).integers(0, 50, (2, 3, 7))
    cos, sin = theirs(torch.zeros(1), torch.from_numpy(positions.transpose(1, 0, 2).copy()))
    ours = rope_tables(RopeConfig(sections=sections, interleaved=interleaved), 128, jnp.asarray(positions))
    np.testing.assert_allclose(ours[0], cos, atol=1e-5)
    np.testing.assert_allclose(ours[1], sin, atol=1e-5)
