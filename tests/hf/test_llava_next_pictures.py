"""AnyRes and frames: how many tokens a size takes, which feature lands where, and which pixels; as transformers has them."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from helpers.families import llava_next as helper
from helpers.tiny import Tiny, batch_of
from transformers.image_transforms import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from mmalign_jax.errors import UserError
from mmalign_jax.hf.export import export
from mmalign_jax.hf.families import llava_next, read
from mmalign_jax.hf.families.llava_next import PINPOINTS, Grid
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.models.connector import Connector
from mmalign_jax.models.presets import preset
from mmalign_jax.types import Part, Turn

SIDE, CELLS = 336, 24
# squares, the pinpoints themselves and their neighbours, strips of which nothing or one row is left
ODD = [(1, 1), (336, 336), (335, 337), (672, 672), (671, 673), (336, 1008), (1008, 336), (1, 200), (200, 1), (3, 500), (500, 3), (480, 640)]
RANDOM = [tuple(map(int, size)) for size in np.exp(np.random.default_rng(0).uniform(0, np.log(4000), (300, 2))).astype(int)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return helper.write(tmp_path_factory.mktemp("next"), 0, "llava_next")


@pytest.fixture(scope="module")
def video_base(tmp_path_factory):
    return helper.write(tmp_path_factory.mktemp("video"), 0, "llava_next_video")


@functools.cache
def theirs() -> tuple[transformers.LlavaNextProcessor, LlavaNextModel]:
    """Of LLaVA-1.6's sizes. The model has one feature of width 1 a patch, so that packing shows which feature went where."""
    config = transformers.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 14, "hidden_size": 1, "num_hidden_layers": 1,
                       "intermediate_size": 1, "num_attention_heads": 1},
        text_config={"model_type": "llama", "hidden_size": 1, "num_hidden_layers": 1, "intermediate_size": 1, "num_attention_heads": 1,
                     "vocab_size": 8, "num_key_value_heads": 1},
        image_grid_pinpoints=[*map(list, PINPOINTS)],
    )  # fmt: skip
    images = transformers.LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = object.__new__(transformers.LlavaNextProcessor)
    processor.image_processor, processor.patch_size, processor.num_additional_image_tokens = images, 14, 1
    return processor, LlavaNextModel(config)


@pytest.mark.parametrize("sizes", [ODD, RANDOM], ids=["odd", "random"])
def test_tokens_and_features_are_those_of_transformers(sizes):
    processor, model = theirs()
    counts, stride = set(), CELLS**2
    for size in sizes:
        grid = Grid.of(size, PINPOINTS, SIDE, CELLS)
        features = grid.features(CELLS, stride)
        assert len(features) == processor._get_number_of_features(*size, SIDE, SIDE) - 1, size
        tiles = 1 + grid.tiles[0] * grid.tiles[1]
        numbered = torch.arange(tiles * CELLS**2, dtype=torch.float32).reshape(tiles, CELLS**2, 1)
        packed, lengths = model.pack_image_features([numbered], [size], "default", torch.tensor([-1.0]))
        np.testing.assert_array_equal(features, packed[0][:, 0].numpy().astype(int), err_msg=str(size))
        assert lengths.tolist() == [len(features)]
        counts.add(len(features))
    # the sizes try something: from the small copy alone to nearly the fullest grid
    assert min(counts) == CELLS**2 and max(counts) > 4.9 * CELLS**2 and len(counts) >= 8


def test_frames_features_stand_between_the_tiles():
    grid = Grid.of((40, 90), ((28, 56), (56, 28), (56, 56)), 28, 4)
    plain, spread = grid.features(4, 16), grid.features(4, 20)
    assert np.array_equal(spread, np.where(plain < 0, -1, plain // 16 * 20 + plain % 16))


@pytest.mark.parametrize("size", [(40, 90), (75, 30), (28, 28), (5, 9), (300, 29), (64, 64)])
def test_pixels_are_the_processors(base, size):
    picture = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
    ours, images = load_processor(base, read_config(base)).pictures, transformers.AutoImageProcessor.from_pretrained(base, backend="pil")
    pixels = ours.pixels([picture])
    assert pixels.dtype == np.uint8 and pixels.shape == (ours.expand([size]).tiles, 28, 28, 3)
    expected = images(picture, data_format=ChannelDimension.LAST)["pixel_values"][0]
    expected = expected.transpose(0, 2, 3, 1) if expected.shape[-1] != 3 else expected
    np.testing.assert_allclose((pixels.astype(np.float32) / 255 - np.float32(ours.mean)) / np.float32(ours.std), expected, atol=2e-6)


def test_a_row_of_several_pictures_of_unlike_sizes(base):
    """Tokens, tiles and features of each follow one another; what a row lacks of tiles is empty."""
    tiny = Tiny.load(base)
    batch = batch_of(helper.RECORDS, tiny.processor)
    assert batch.images.shape[1:] == (6, 28, 28, 3)
    wide, two, text, tall = (np.asarray(row)[np.asarray(row) >= 0] for row in batch.image_index)
    assert len(text) == 0
    np.testing.assert_array_equal(two, [*tall, *np.where(wide == 0, 0, wide + 16 * 3)])
    assert wide[0] == tall[0] == 1 and (wide == 0).sum() > 0
    assert not np.asarray(batch.images)[0, 3:].any() and not np.asarray(batch.images)[2].any()


def test_frames_of_a_video(video_base):
    tiny = Tiny.load(video_base)
    video = helper.CLIP_OF_3
    sizes, times = [(33, 50)] * 3, video.times
    found = tiny.processor.pictures.expand(sizes, times)
    assert found.video and found.tiles == 3 and found.text == "<video>" * 12
    np.testing.assert_array_equal(found.features, [16, 17, 18, 19, 36, 37, 38, 39, 56, 57, 58, 59])
    turns = (Turn("user", (Part(media=0), Part(media=1), Part(text="Describe?"))),)
    picture = tiny.processor.pictures.expand([(40, 90)])
    ids = tiny.processor.prompt_ids(turns, [picture, found])
    assert (ids == 3).sum() == len(picture.features) and (ids == helper.VIDEO_TOKEN).sum() == 12
    # the template writes pictures first: in this order the video's features would land on the picture's tokens
    with pytest.raises(UserError, match="moves pictures before videos"):
        tiny.processor.prompt_ids(turns, [found, picture])


def test_pictures_that_come_without_videos(base):
    with pytest.raises(UserError, match="takes no video"):
        load_processor(base, read_config(base)).pictures.expand([(30, 30)], (0.0,))


@pytest.mark.parametrize("pool", ["average", "max"])
def test_pooling_of_frames_is_torchs(video_base, pool):
    config = read({**json.loads((video_base / "config.json").read_text()), "spatial_pool_mode": pool})
    params = load_params(video_base, config)["projector"]
    features = np.random.default_rng(0).standard_normal((2, 3 * 16, 16)).astype(np.float32)  # three tiles of 4 x 4 patches
    out = np.asarray(Connector(config).apply({"params": params}, jnp.asarray(features)))
    assert out.shape == (2, 1 + 3 * 20, 24) and np.all(out[:, 0] == params["newline"])
    images = torch.from_numpy(features).reshape(6, 4, 4, 16).permute(0, 3, 1, 2)
    layer = torch.nn.AvgPool2d(2, 2) if pool == "average" else torch.nn.MaxPool2d(2, 2)
    pooled = layer(images).flatten(2).transpose(1, 2)
    both = torch.cat([torch.from_numpy(features).reshape(6, 16, 16), pooled], dim=1).reshape(2, 60, 16)
    linear = lambda x, name: x @ torch.tensor(params[name]["kernel"]) + torch.tensor(params[name]["bias"])  # noqa: E731
    expected = linear(torch.nn.functional.gelu(linear(both, "fc1")), "fc2")
    np.testing.assert_allclose(out[:, 1:], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("llava_next", {"image_grid_pinpoints": [[28, 56], [40, 28]]}, "image_grid_pinpoints"),
        ("llava_next", {"image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy of a tower with a class token"),
        ("llava_next", {"use_image_newline_parameter": False}, "use_image_newline_parameter"),
        ("llava_next", {"text_config": {"model_type": "opt"}}, "text_config.model_type is 'opt'"),
        ("llava_next_video", {"spatial_pool_mode": "conv"}, "spatial_pool_mode is 'conv'; supported: average, max"),
        ("llava_next_video", {"spatial_pool_stride": 4}, "spatial_pool_stride is 4"),
        ("llava_next_video", {"vision_config": {**helper.CLIP, "patch_size": 9}}, "3 x 3 patches"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(variant, changes, named):
    values = {"model_type": variant, "image_grid_pinpoints": helper.PINPOINTS} | helper.VARIANTS[variant] | changes
    with pytest.raises(UserError, match=named) as error:
        read(values, where="dir/config.json")
    assert str(error.value).startswith("dir/config.json: ")


def test_processors_that_do_not_fit_the_model_are_refused(video_base, tmp_path):
    for file in video_base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config, file = read_config(video_base), tmp_path / "processor_config.json"
    values = json.loads(file.read_text())

    def refused(part: str, **changes) -> str:
        file.write_text(json.dumps({**values, part: values[part] | changes}))
        with pytest.raises(UserError) as error:
            load_processor(tmp_path, config)
        return str(error.value)

    assert "image_grid_pinpoints" in refused("image_processor", image_grid_pinpoints=[[28, 56]])
    assert "the model takes uint8(28, 28, 3)" in refused("image_processor", crop_size={"height": 14, "width": 14})
    assert "the model takes uint8(28, 28, 3)" in refused("video_processor", crop_size={"height": 14, "width": 14})
    assert "frames of videos are normalised by" in refused("video_processor", image_mean=[0.5, 0.5, 0.5])
    assert "cannot be loaded" in refused("video_processor", size="large")
    file.write_text(json.dumps({name: part for name, part in values.items() if name not in ("video_processor", "image_processor")}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values["image_processor"]))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(values["video_processor"]))
    assert load_processor(tmp_path, config).pictures.video_placeholder == "<video>"


def test_presets_are_those_of_the_published_models():
    for name, kv_heads in (("llava-1.6-vicuna-7b", 32), ("llava-1.6-mistral-7b", 8)):
        config = preset(name)
        assert config.family == "llava_next" and config.connector.newline and config.decoder.kv_heads == kv_heads
        assert config.tile_features == 576
    assert llava_next.names(preset("llava-1.6-mistral-7b")).hub_name("projector.image_newline") == "image_newline"


def test_names_of_the_newline():
    table = llava_next.names(preset("llava-1.6-vicuna-7b"))
    assert table.reduce("image_newline") == table.reduce("model.image_newline") == "projector.image_newline"
    assert table.reduce("multi_modal_projector.linear_1.weight") == "projector.linear_1.weight"


def test_exports_hold_the_video_processor_for_older_readers(video_base, tmp_path):
    out = export(load_params(video_base, read_config(video_base)), video_base, tmp_path / "out")
    nested = json.loads((out / "processor_config.json").read_text())
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        key = "video_processor" if name.startswith("video") else "image_processor"
        assert json.loads((out / name).read_text()) == {"processor_class": "LlavaNextVideoProcessor", **nested[key]}
