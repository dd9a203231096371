"""Pictures of Idefics3, SmolVLM and InternVL: tiles, tokens and pixels known from sizes, as transformers' processors make them."""

import functools
import json

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from helpers.checkpoints import quiet, tensors
from helpers.families import idefics3, internvl

from mmalign_jax.errors import UserError
from mmalign_jax.hf import families
from mmalign_jax.hf.export import export
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import load_processor

WRITERS = {
    "smolvlm": idefics3.write,
    "idefics3": functools.partial(idefics3.write, family="idefics3"),
    "internvl": internvl.write,
}
# Sides up to 300 pixels, squares, long strips, and sizes on either side of where the number of tiles changes
SIZES = [
    *((height, width) for height in (1, 2, 9, 27, 28, 29, 31, 57, 113, 300) for width in (1, 3, 14, 28, 30, 55, 56, 57, 84, 113, 299)),
    (1, 150), (150, 1), (113, 112), (85, 84), (57, 56), (170, 113),
]  # fmt: skip


@pytest.fixture(scope="module", params=WRITERS)
def base(request, tmp_path_factory):
    return WRITERS[request.param](tmp_path_factory.mktemp("tiles"), 0)


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def pictures_of(directory):
    return load_processor(directory, read_config(directory)).pictures


def noise(size, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def their_tiles(directory, size):
    """The text that transformers' processor puts in the place of a picture, and its tiles, before normalisation."""
    processor, plain = theirs(directory), {"do_rescale": False, "do_normalize": False}
    if "idefics3" in type(processor.image_processor).__module__ or "smolvlm" in type(processor.image_processor).__module__:
        made = processor.image_processor(noise(size), return_row_col_info=True, do_pad=False, **plain)
        tiles = np.stack(made["pixel_values"][0])
    else:
        made = processor.image_processor(noise(size), crop_to_patches=True, **plain)
        tiles = np.stack(made["pixel_values"])
    return processor.replace_image_token(made, 0), tiles.transpose(0, 2, 3, 1)


@functools.cache
def theirs(directory):
    return (internvl if read_config(directory).family == "internvl" else idefics3).theirs(directory)


def same(directory, sizes=SIZES):
    """Compares every size, and returns which numbers of tiles there were."""
    pictures, config, counts = pictures_of(directory), read_config(directory), set()
    for size in sizes:
        text, tiles = their_tiles(directory, size)
        expansion = pictures.expand([size if pictures.needs_size else (0, 0)])
        assert expansion.text == text, size
        assert expansion.tiles == len(tiles), size
        assert expansion.features.tolist() == list(range(len(tiles) * config.image_tokens)), size
        assert text.count(pictures.placeholder) == len(expansion.features)
        np.testing.assert_array_equal(pictures.pixels([noise(size)]), tiles, err_msg=str(size))
        counts.add(len(tiles))
    return counts


def test_tiles_and_tokens_for_many_sizes(base):
    # Idefics3 enlarges small pictures to 56 pixels before it cuts them, and adds a tile that shows all; so does InternVL
    assert same(base) == ({1, 3, 4, 5} if read_config(base).family == "internvl" else {3, 5})


# (family, values of preprocessor_config.json): tiles that do not divide the size resized to, no resizing, other sizes, fewer tiles
PROCESSORS = [
    ("smolvlm", {"size": {"longest_edge": 100}}),
    ("smolvlm", {"size": {"longest_edge": 45}, "resample": 3}),
    ("smolvlm", {"size": {"longest_edge": 28}}),
    ("idefics3", {"do_resize": False}),
    ("idefics3", {"size": {"height": 40, "width": 90}}),
    ("idefics3", {"size": {"longest_edge": 5000}}),
    ("smolvlm", {"do_image_splitting": False}),
    ("internvl", {"max_patches": 1}),
    ("internvl", {"min_patches": 3, "max_patches": 7, "crop_to_patches": True}),
]


@pytest.mark.parametrize(("family", "values"), PROCESSORS)
def test_other_image_processors(tmp_path, family, values):
    directory = WRITERS[family](tmp_path, 0)
    change_json(directory / "preprocessor_config.json", **values)
    huge = values.get("size", {}).get("longest_edge") == 5000
    counts = same(directory, [(28, 90)] if huge else SIZES[::5])
    one = (
        values.get("max_patches") == 1
        or not values.get("do_image_splitting", True)
        or {"height", 28} & {*values.get("size", {}), *values.get("size", {}).values()}
    )
    assert len(counts) == 1 if one or huge else len(counts) > 1


def test_a_real_size(tmp_path):
    """SmolVLM-256M's numbers: 512 pixels in patches of 16, 64 tokens a tile, pictures of 2048 pixels."""
    directory = idefics3.write(tmp_path, 0, vision={"image_size": 512, "patch_size": 16}, scale_factor=4)
    change_json(directory / "preprocessor_config.json", size={"longest_edge": 2048})
    pictures = pictures_of(directory)
    for size, tiles in (((480, 640), 13), ((640, 480), 13), ((1000, 1000), 17), ((100, 2000), 5), ((1537, 2048), 17), ((1536, 2048), 13)):
        assert pictures.expand([size]).tiles == tiles, size
        assert pictures.expand([size]).features.size == 64 * tiles


def test_frames_of_a_video_are_a_tile_each(tmp_path):
    directory = internvl.write(tmp_path, 0)
    processor, frames = load_processor(directory, read_config(directory)), [noise((20, 61), seed) for seed in range(3)]
    given = theirs(directory).replace_video_token({"pixel_values_videos": [np.zeros((3, 3, 28, 28))]}, 0)
    expansion = processor.pictures.expand([(20, 61)] * 3, (0.0, 0.5, 1.0))
    assert (expansion.text, expansion.tiles, expansion.video) == (given, 3, True)
    plain = {"do_rescale": False, "do_normalize": False, "crop_to_patches": False}
    expected = np.stack(theirs(directory).image_processor(frames, **plain)["pixel_values"]).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(processor.pictures.pixels(frames, (0.0, 0.5, 1.0)), expected)
    # the video processor's own values hold for frames, and for frames alone
    images = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "video_preprocessor_config.json").write_text(json.dumps(images | {"resample": 0}))
    changed = pictures_of(directory)
    assert not np.array_equal(changed.pixels(frames, (0.0, 0.5, 1.0)), expected)
    np.testing.assert_array_equal(changed.pixels(frames[:1]), processor.pictures.pixels(frames[:1]))
    for values, message in (({"image_mean": [0, 0, 0]}, "frames of videos are normalised"), ({"do_center_crop": True}, "do_center_crop")):
        (directory / "video_preprocessor_config.json").write_text(json.dumps(images | values))
        with pytest.raises(UserError, match=message):
            pictures_of(directory)


def test_idefics3_takes_no_video(tmp_path):
    pictures = pictures_of(idefics3.write(tmp_path, 0))
    with pytest.raises(UserError, match="takes no video"):
        pictures.expand([(20, 61)] * 2, (0.0, 1.0))
    with pytest.raises(UserError, match="takes no video"):
        pictures.pixels([noise((20, 61))] * 2, (0.0, 1.0))


def places_in_order(side):
    """Whether transformers gives the patches of a full tile the positions 0, 1, 2 and so on."""
    kind = transformers.models.idefics3.modeling_idefics3.Idefics3VisionEmbeddings
    module = kind(transformers.Idefics3Config(vision_config={"image_size": side, "patch_size": 1, "hidden_size": 1}).vision_config)
    with torch.no_grad():
        module.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
        module.patch_embedding.weight.zero_()
        module.patch_embedding.bias.zero_()
        found = module(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool))[0, :, 0]
    return found.equal(torch.arange(side**2, dtype=found.dtype))


def test_positions_of_full_tiles():
    """Numbers of patches that transformers places in order are taken, those that it shifts by its rounding are refused."""
    for side in (2, 4, 6, 14, 16, 24, 26, 27, 28, 32, 25, 29, 31, 41, 50):
        values = {"model_type": "idefics3", "scale_factor": 1, "vision_config": {"image_size": side, "patch_size": 1}}
        if places_in_order(side):
            assert families.read(values).vision.patches == side**2
        else:
            with pytest.raises(UserError, match=f"{side} patches along a tile"):
                families.read(values)
    # published checkpoints: Idefics3-8B, SmolVLM, SmolVLM-256M and -500M; and one that is shifted
    assert [places_in_order(side) for side in (26, 27, 32, 25)] == [True, True, True, False]


IDEFICS3 = [
    ({"scale_factor": 3}, "scale_factor is 3"),
    ({"vision_config": {"image_size": 50, "patch_size": 2}, "scale_factor": 5}, "25 patches along a tile"),
    ({"vision_config": {"image_size": [28, 28]}}, r"vision_config.image_size is \[28, 28\]"),
    ({"vision_config": {"model_type": "clip_vision_model"}}, "vision_config.model_type is 'clip_vision_model'"),
    ({"vision_config": {"num_channels": 1}}, "vision_config.num_channels is 1"),
    ({"text_config": {"model_type": "gemma2"}}, "text_config.model_type is 'gemma2'"),
]
INTERNVL = [
    ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
    ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer is \[-1, -2\]"),
    ({"downsample_ratio": 0.4}, "downsample_ratio is 0.4"),
    ({"downsample_ratio": 1 / 3}, "does not divide the 4 patches"),
    ({"projector_hidden_act": "selu"}, "projector_hidden_act is 'selu'"),
    ({"vision_config": {"image_size": [28, 56]}}, "vision_config.image_size"),
    ({"vision_config": {"norm_type": "batch_norm"}}, "vision_config.norm_type is 'batch_norm'"),
    ({"vision_config": {"norm_type": "rms_norm", "use_mean_pooling": False}}, "without use_mean_pooling"),
    ({"vision_config": {"hidden_act": "selu"}}, "vision_config.hidden_act is 'selu'"),
]


@pytest.mark.parametrize(("family", "changes", "message"), [*(("smolvlm", *c) for c in IDEFICS3), *(("internvl", *c) for c in INTERNVL)])
def test_refused_switches_are_named(family, changes, message):
    tower = {"hidden_size": 8, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    values = {"model_type": family, "text_config": {"model_type": "llama"}, "vision_config": tower}
    families.read(values)
    nested = {key: values[key] | changes[key] for key in changes if isinstance(changes[key], dict)}
    with pytest.raises(UserError, match=message):
        families.read(values | changes | nested)


@pytest.mark.parametrize(
    ("family", "values"), [("smolvlm", {"max_image_size": {"longest_edge": 27}}), ("internvl", {"size": {"height": 28, "width": 35}})]
)
def test_a_processor_of_another_size_is_refused(tmp_path, family, values):
    directory = WRITERS[family](tmp_path, 0)
    change_json(directory / "preprocessor_config.json", **values)
    with pytest.raises(UserError, match=r"27|35"):
        pictures_of(directory)


def test_internvl_is_tied_where_its_config_does_not_say():
    values = {"model_type": "internvl", "text_config": {"model_type": "qwen2"}, "vision_config": {}}
    assert families.read(values).decoder.tied_head
    assert not families.read(values | {"tie_word_embeddings": False}).decoder.tied_head
    assert not families.read(values | {"model_type": "idefics3", "scale_factor": 7}).decoder.tied_head


def test_module_names_are_read_and_kept(base, tmp_path):
    """The other layout, as `save_pretrained(save_original_format=False)` writes it."""
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with quiet():
        transformers.AutoModelForImageTextToText.from_pretrained(base).save_pretrained(tmp_path, save_original_format=False)
    found = tensors(tmp_path)
    assert all(name.startswith(("model.", "lm_head.")) for name in found)
    params, same_params = load_params(base, read_config(base)), load_params(tmp_path, read_config(tmp_path))
    assert all(np.array_equal(a, b) for a, b in zip(*map(leaves, (params, same_params)), strict=True))
    after = tensors(export(same_params, tmp_path, tmp_path / "out"))
    assert after.keys() == found.keys() and all(after[name].equal(found[name]) for name in found)
    table = families.of(read_config(base)).names(read_config(base))
    assert {table.hub_name(table.reduce(name)) for name in found} == tensors(base).keys()


def leaves(tree):
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]
