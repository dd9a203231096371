"""Sizes, order of patches and rotary positions of pictures of any size are those of transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from helpers.families import qwen
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as their_video_resize
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from mmalign_jax.errors import UserError
from mmalign_jax.hf import any_size
from mmalign_jax.hf.families import qwen2_5_vl, qwen3_vl
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.patch_order import PatchGrid
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.models.config import VisionConfig

RNG = np.random.default_rng(0)
SIZES = [tuple(size) for size in RNG.integers(1, 3000, (300, 2)).tolist()] + [(14, 14), (13, 15), (1, 200), (42, 8400), (28, 28), (70, 70)]
TOWER = VisionConfig(image_size=0, patch_size=4, width=8, mlp_width=8, layers=1, heads=1, norm_eps=1e-6, frames_per_patch=2, merge=2)


@pytest.mark.parametrize("limits", [(3136, 12_845_056), (3136, 200_704), (65_536, 1_000_000)])
def test_sizes_of_pictures_are_those_of_transformers(limits):
    for height, width in SIZES:
        if max(height, width) <= 200 * min(height, width):
            assert any_size.smart_resize(height, width, 28, *limits) == their_resize(height, width, 28, *limits), (height, width)
        else:
            with pytest.raises(UserError, match="longer than 200:1"):
                any_size.smart_resize(height, width, 28, *limits)


@pytest.mark.parametrize("limits", [(4096, 25_165_824), (131_072, 786_432)])
def test_sizes_of_frames_are_those_of_transformers(limits):
    for number, (height, width) in enumerate(SIZES):
        frames = 2 + number % 17
        try:
            expected = their_video_resize(frames, height, width, 2, 32, *limits)
        except ValueError:
            with pytest.raises(UserError, match="longer than 200:1"):
                any_size.smart_resize_video(frames, height, width, 32, 2, *limits)
        else:
            assert any_size.smart_resize_video(frames, height, width, 32, 2, *limits) == expected, (frames, height, width)
    with pytest.raises(UserError, match=r"1 frame\(s\).*no fewer than 2"):
        any_size.smart_resize_video(1, 64, 64, 32, 2, *limits)


GRIDS = [PatchGrid(2 * rows, 2 * columns, tiles, 2, 2) for rows, columns, tiles in [(1, 1, 1), (4, 6, 1), (5, 3, 1), (3, 7, 4), (2, 5, 5)]]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("window", [0, 1, 2, 4])
def test_the_order_is_that_of_transformers(grid, window):
    grid = PatchGrid(grid.rows, grid.columns, grid.tiles, grid.depth, grid.merge, window)
    order, thw = grid.order(), torch.tensor([[grid.times, grid.rows, grid.columns]])
    there = order.segment >= 0
    assert grid.slots == len(there) and there.sum() == thw.prod()
    for values in (order.cell, order.place, order.grid):
        assert np.all(values[~there] == -1)
    assert np.all(order.grid[there] == (grid.rows, grid.columns))
    places = get_vision_position_ids(thw, 2).reshape(-1, 4, 2)
    squares = order.place[there].reshape(-1, 4, 2)
    if window:
        index, borders = get_vision_window_index(thw, 2, window * 2 * 14, 14)
        np.testing.assert_array_equal(squares, places[index].numpy())
        # windows of theirs are runs of ours, which keep the slots that lie behind a border
        runs = there.reshape(-1, (2 * window) ** 2).sum(axis=1)
        assert runs.tolist() == torch.diff(borders).tolist()
    else:
        np.testing.assert_array_equal(squares, places.numpy())
    # features in reading order
    feature = grid.feature_order()
    np.testing.assert_array_equal(order.place.reshape(-1, 4, 2)[feature], places.numpy())
    np.testing.assert_array_equal(order.segment.reshape(-1, 4)[feature, 0], np.repeat(np.arange(grid.times), grid.features))


def test_frames_of_a_patch():
    """A picture stands for both frames, and the last frame of an odd number for its neighbour."""
    assert np.all(PatchGrid(4, 4, 1, 2, 2).order().cell[..., 0] == 0)
    cells = PatchGrid(2, 2, 3, 2, 2).order().cell
    assert cells[:, :, 0].tolist() == [[0, 1]] * 4 + [[2, 2]] * 4
    np.testing.assert_array_equal(cells[:4, 0, 1:], [[0, 0], [0, 1], [1, 0], [1, 1]])


def test_turns():
    turns = PatchGrid(4, 6, 3, 2, 2).turns(np.array([0, 5], np.int32))
    assert turns.tolist() == [[0] * 6 + [5] * 6, ([0] * 3 + [1] * 3) * 2, [0, 1, 2] * 4]


def patches_of(pictures, frames, times=None):
    """Patches as transformers flattens them, from our pixels and our order: `[n, channel, frame, row, column]`."""
    expansion = pictures.expand([frame.size[::-1] for frame in frames], times)
    tiles, order = pictures.pixels(frames, times), expansion.grid.order()
    held = order.cell[order.segment >= 0]
    side = 4
    cut = [[tiles[t, side * r : side * (r + 1), side * c : side * (c + 1)] for t, r, c in cell] for cell in held]
    return np.array(cut).transpose(0, 4, 1, 2, 3).reshape(len(held), -1)


def test_patches_are_those_of_the_processor():
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 256, "longest_edge": 4096})
    pictures = any_size.AnySizePictures(images, TOWER, ("<i>", "<v>"), any_size.Videos(None, None, None))
    for height, width in [(30, 50), (9, 11), (200, 40), (64, 64), (333, 111)]:
        picture = Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))
        theirs = images(picture, do_rescale=False, do_normalize=False, return_tensors="np")
        np.testing.assert_array_equal(patches_of(pictures, [picture]), theirs["pixel_values"])
        expansion = pictures.expand([(height, width)])
        assert expansion.text == "<i>" * (theirs["image_grid_thw"].prod() // 4) and len(expansion.features) == len(expansion.text) // 3
        assert (expansion.tiles, expansion.video, expansion.slots) == (1, False, len(theirs["pixel_values"]))


def test_frames_are_resized_as_torchvision_resizes_them():
    """Its resize is torch's on bytes, which rounds differently from Pillow's: by two grey levels at most, in one value of a hundred."""
    for (height, width), size in [((120, 160), (84, 112)), ((37, 53), (56, 84)), ((90, 200), (84, 196))]:
        frame = RNG.integers(0, 256, (height, width, 3), np.uint8)
        ours = np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
        theirs = torch.nn.functional.interpolate(torch.from_numpy(frame.transpose(2, 0, 1).copy())[None], size, mode="bicubic", antialias=True)
        difference = np.abs(ours - theirs[0].numpy().transpose(1, 2, 0))
        assert difference.max() <= 2 and (difference > 0).mean() < 0.01


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: qwen.write(tmp_path_factory.mktemp(name), 0, family=name) for name in qwen.VARIANTS}


def pictures_of(directory):
    return load_processor(directory, read_config(directory)).pictures


def test_times_of_frames(checkpoints):
    times = (3.0, 3.1, 3.5, 3.6, 4.9, 5.0, 5.0 + 1e-3)
    sizes, steps = [(32, 32)] * 7, 4
    _, five, three = (pictures_of(directory).expand(sizes, times) for directory in checkpoints.values())
    per_step = len(five.features) // steps
    assert five.video and five.tiles == 7 and five.text == "<|video_pad|>" * len(five.features)
    # two units a second, from the first frame on; the fourth step is 2.001 seconds behind it
    assert five.turns[0].tolist() == np.repeat([0, 1, 3, 4], per_step).tolist()
    per_step = len(three.features) // steps
    step = "<|vision_start|>" + "<|video_pad|>" * per_step + "<|vision_end|>"
    assert three.text == "".join(f"<{time} seconds>{step}" for time in ("3.0", "3.5", "5.0", "5.0"))
    assert np.all(three.turns[0] == 0)
    two = pictures_of(checkpoints["qwen2_vl"]).expand(sizes, times)
    assert two.turns[0].tolist() == np.repeat(range(4), len(two.features) // 4).tolist()


def test_videos_that_are_refused(checkpoints):
    pictures = pictures_of(checkpoints["qwen3_vl"])
    with pytest.raises(UserError, match="frames of a video have different sizes"):
        pictures.expand([(32, 32), (32, 40)], (0.0, 1.0))
    with pytest.raises(UserError, match=r"1 frame\(s\)"):
        pictures.expand([(32, 32)], (0.0,))
    assert pictures_of(checkpoints["qwen2_5_vl"]).expand([(32, 32)], (0.0,)).grid.times == 1


def test_rows_go_on_behind_the_largest_time_of_a_video(checkpoints):
    """transformers' numbers for a video that is longer than it is wide, but for the text behind it (see `data.media.rotary_positions`)."""
    from mmalign_jax.data.media import rotary_positions

    directory = checkpoints["qwen2_5_vl"]
    config, times = transformers.AutoConfig.from_pretrained(directory), tuple(np.arange(12) * 0.75)
    medium = pictures_of(directory).expand([(24, 32)] * 12, times)
    is_image = np.array([False] * 3 + [True] * len(medium.features) + [False] * 5)
    ours = rotary_positions(is_image, [medium])
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLModel(config)
    grid = torch.tensor([[medium.grid.times, medium.grid.rows, medium.grid.columns]])
    kinds = torch.from_numpy(is_image.astype(np.int64) * 2)[None]
    theirs, delta = model.get_rope_index(torch.zeros_like(kinds), kinds, video_grid_thw=grid, second_per_grid_ts=[1.5])
    np.testing.assert_array_equal(ours[:, :-5], theirs[:, 0, :-5].numpy())
    assert ours[:, -5:].tolist() == [list(range(3 + 15 + 1, 3 + 15 + 6))] * 3  # five steps of three units
    assert theirs[0, 0, -5:].tolist() != ours[0, -5:].tolist() and len(is_image) + int(delta) == ours[0, -5]


def rewrite(directory, name, **changes):
    file = directory / name
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({key: value for key, value in (values | changes).items() if value is not None}))


def test_where_the_video_processor_is_read(tmp_path):
    directory = qwen.write(tmp_path, 0, family="qwen3_vl")
    images = load_processor(directory, read_config(directory)).pictures._images

    def limits():
        return any_size.video_limits(directory, images, {"size": {"shortest_edge": 1, "longest_edge": 2}})[1]

    assert limits() == (256, 8192)
    rewrite(directory, "processor_config.json", image_processor={}, processor_class="Qwen3VLProcessor")
    assert limits() == (256, 8192)
    rewrite(directory, "processor_config.json", video_processor={"size": {"shortest_edge": 5, "longest_edge": 7}})
    assert limits() == (5, 7)
    (directory / "processor_config.json").unlink()
    (directory / "video_preprocessor_config.json").unlink()
    assert limits() == (256, 4096)  # the pictures'
    rewrite(directory, "preprocessor_config.json", min_pixels=300, max_pixels=900)
    assert limits() == (300, 900)
    rewrite(directory, "preprocessor_config.json", size=None, min_pixels=None)
    assert limits() == (1, 900)
    rewrite(directory, "preprocessor_config.json", size={"height": 8}, min_pixels=None, max_pixels=None)
    with pytest.raises(UserError, match="lacks shortest_edge or longest_edge"):
        limits()
    rewrite(directory, "video_preprocessor_config.json", image_mean=[0, 0, 0])
    with pytest.raises(UserError, match=r"video processor has image_mean \[0, 0, 0\]"):
        limits()


def test_a_cap_on_the_pixels_of_frames(tmp_path):
    """`cap_pixels_per_frame` bounds a frame as in transformers' `resize`."""
    for family, most in (("qwen2_5_vl", 4 * 64 * 0.9 * 2 // 8), ("qwen3_vl", 8192 // 8)):
        directory = qwen.write(tmp_path / family, 0, family=family)
        rewrite(directory, "video_preprocessor_config.json", cap_pixels_per_frame=True, max_video_tokens=4 if "2" in family else 100)
        height, width = pictures_of(directory).expand([(64, 64)] * 8, tuple(range(8))).canvas
        most = max(most, int(256 * 1.05))
        expected = their_resize(64, 64, 8, 256, most) if "2" in family else their_video_resize(8, 64, 64, 2, 8, 256, 8 * most)
        assert (height, width) == expected


@pytest.mark.parametrize(("key", "value"), [("patch_size", 8), ("merge_size", 1), ("temporal_patch_size", 1), ("do_resize", False)])
def test_a_processor_that_does_not_fit_the_tower_is_refused(key, value):
    images = Qwen2VLImageProcessorPil(**{"patch_size": 4, key: value})
    with pytest.raises(UserError, match=f"{key} {value}"):
        any_size.AnySizePictures(images, TOWER, ("<i>", "<v>"), any_size.Videos(None, None, None))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_configs_of_version_4(tmp_path, family):
    """The decoder's keys lie at the top, sections under rope_scaling, and the tower has its parent's model_type."""
    directory = qwen.write(tmp_path, 0, family=family, tied=True)
    new, file = read_config(directory), directory / "config.json"
    assert new.decoder.tied_head
    values = json.loads(file.read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    old = {key: value for key, value in text.items() if key not in ("model_type", "layer_types", "sliding_window")}
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    old |= {"use_sliding_window": False, "sliding_window": 32768, "torch_dtype": "float32"}
    values["vision_config"] |= {"model_type": family, "in_chans": 3, "spatial_patch_size": 4}
    values["vision_config"].pop("in_channels")
    file.write_text(json.dumps(values | old))
    assert read_config(directory) == new
    load_params(directory, new)
    # the copy of transformers that reads such files understands them the same way
    theirs = transformers.AutoConfig.from_pretrained(directory)
    assert theirs.tie_word_embeddings and theirs.text_config.rope_parameters["mrope_section"] == rope["mrope_section"]


def test_configs_that_are_not_supported():
    text = qwen.VARIANTS["qwen3_vl"]["text_config"]
    three = {"model_type": "qwen3_vl"} | qwen.VARIANTS["qwen3_vl"]
    changed = lambda **values: three | {"vision_config": three["vision_config"] | values}  # noqa: E731
    assert qwen3_vl.read(three, "here").decoder.rope.interleaved
    for config, message in (
        (changed(deepstack_visual_indexes=[2, 0]), "deepstack_visual_indexes"),
        (changed(deepstack_visual_indexes=[4]), "deepstack_visual_indexes"),
        (changed(out_hidden_size=31), "the tower's output width is 31; supported: 32"),
        (changed(in_channels=1), "in_channels"),
        (changed(rope_parameters={"rope_theta": 5.0}), "rope_theta"),
        (three | {"text_config": text | {"rope_parameters": {"mrope_section": [1, 1, 1]}}}, "mrope_section"),
        (three | {"text_config": text | {"model_type": "qwen3"}}, "text_config.model_type"),
    ):
        with pytest.raises(UserError, match=message):
            qwen3_vl.read(config, "here")
    two = {"model_type": "qwen2_5_vl"} | qwen.VARIANTS["qwen2_5_vl"]
    yarn = two["text_config"] | {"rope_parameters": {"rope_type": "yarn", "mrope_section": [1, 2, 1]}}
    with pytest.raises(UserError, match="yarn"):
        qwen2_5_vl.read(two | {"text_config": yarn}, "here")
