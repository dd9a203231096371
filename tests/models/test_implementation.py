"""Which implementation of attention is chosen, and which requests are refused."""

import dataclasses

import jax
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import MIXED, Tiny, batch_of

from mmalign_jax import config as settings
from mmalign_jax.errors import UserError
from mmalign_jax.models.attention import Regions
from mmalign_jax.models.implementation import SETTINGS, Attention
from mmalign_jax.models.presets import preset

PAIR = Regions(704, 352, causal=True)
LLAVA = preset("llava-1.5-7b").decoder


def of(setting, platform, dtype="bfloat16", regions=PAIR, **changes):
    return Attention(setting, platform).of(dataclasses.replace(LLAVA, **changes), dtype, regions)


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("cpu", "blocks"), ("tpu", "splash"), ("cuda", "blocks"), ("rocm", "blocks")],
)
def test_auto_goes_by_the_platform(platform, expected):
    assert of("auto", platform) == expected
    assert of("blocks", platform) == "blocks"
    # who wants float32 does not want half of it
    assert of("auto", platform, "float32") == "blocks"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": 1056}, "splash"),  # as far as a prefix and an answer reach
        ({"sliding_window": 1055}, "blocks"),
        ({"sliding_window": 100, "local_layers": (False,) * 32}, "splash"),
        ({"sliding_window": 100, "local_layers": (False,) * 31 + (True,)}, "blocks"),
        ({"bidirectional": "image"}, "blocks"),
        ({"bidirectional": "prefix", "regions": dataclasses.replace(PAIR, causal=False)}, "splash"),
        ({"attention_softcap": 50.0}, "splash"),
        ({"head_width": 100}, "splash"),
    ],
)
def test_auto_never_takes_a_kernel_that_cannot(changes, expected):
    assert of("auto", "tpu", **changes) == expected


def test_cudnn_by_name():
    assert of("cudnn", "cuda") == "cudnn"


def test_rows_of_several_pairs():
    """A window matters where it hides something of one pair."""
    several = dataclasses.replace(PAIR, longest=(300, 100))
    assert of("auto", "tpu", regions=several, sliding_window=400) == "splash"
    assert of("auto", "tpu", regions=several, sliding_window=399) == "blocks"
    assert Attention("auto", "tpu").of(LLAVA, "bfloat16", several) == "splash"
    with pytest.raises(UserError, match="config.model.attention: cudnn makes one causal sequence .* rows hold several pairs"):
        Attention("cudnn", "cuda").of(LLAVA, "bfloat16", several)


@pytest.mark.parametrize(
    ("setting", "platform", "dtype", "changes", "message"),
    [
        ("splash", "cpu", "float32", {}, "splash runs on the platform tpu, and this is cpu"),
        ("cudnn", "rocm", "bfloat16", {}, "cudnn runs on the platform cuda, and this is rocm"),
        ("splash", "tpu", "bfloat16", {"bidirectional": "image"}, "splash knows masks that are the same for all rows"),
        ("splash", "tpu", "bfloat16", {"sliding_window": 512}, "a window of 512 positions .* have 1056 slots"),
        ("cudnn", "cuda", "float32", {}, "half precision, and this run in float32 .config.model.compute_dtype."),
        ("cudnn", "cuda", "bfloat16", {"head_width": 300}, "multiple of 8 channels, at most 256; the model's have 300"),
        ("cudnn", "cuda", "bfloat16", {"attention_softcap": 50.0}, "no soft cap"),
        ("cudnn", "cuda", "bfloat16", {"bidirectional": "prefix"}, "where the prefix is causal"),
    ],
)
def test_what_cannot_run_is_refused_by_name(setting, platform, dtype, changes, message):
    with pytest.raises(UserError, match=f"config.model.attention: .*{message}.*; auto or blocks can"):
        of(setting, platform, dtype, **changes)


def test_names():
    with pytest.raises(ValueError, match="unknown attention 'flash'"):
        Attention("flash")
    for name in SETTINGS:
        assert settings.from_mapping({"model": {"attention": name}}).model.attention == name
    with pytest.raises(UserError, match="config.model.attention: 'flash' is not one of"):
        settings.from_mapping({"model": {"attention": "flash"}})


def test_a_model_refuses_and_its_prefill_goes_by_blocks(tmp_path):
    """Slots may be hidden in a prefill, so it never asks for a kernel."""
    tiny = Tiny.load(tiny_llava(tmp_path, layout="memory"))
    batch = batch_of(MIXED, tiny.processor)
    model = dataclasses.replace(tiny.model, attention=Attention("splash", "cpu"))
    run = lambda how: jax.eval_shape(lambda params: how(params, model.encode_images(params, batch.images), batch), tiny.params)  # noqa: E731
    with pytest.raises(UserError, match="config.model.attention: splash runs on the platform tpu"):
        run(model.hidden)
    assert run(model.prefill).hidden.shape[:2] == batch.tokens.shape
