"""What a config.json may ask for, and what a mesh may split."""

import dataclasses

import pytest
from jax.sharding import PartitionSpec as P

from mmalign_jax.errors import UserError
from mmalign_jax.hf.decoders import ACTIVATIONS
from mmalign_jax.hf.families import read
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.config import RopeConfig
from mmalign_jax.models.layers import activation
from mmalign_jax.models.params import param_shardings

HF = {
    "model_type": "llava",
    "text_config": {
        "model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 416,
    },
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
    },
}  # fmt: skip


def changed(**parts):
    return {key: {**value, **parts.pop(key, {})} if isinstance(value, dict) else value for key, value in HF.items()} | parts


def test_old_and_new_spelling_of_rotary_scaling():
    old = changed(text_config={"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})
    new = changed(text_config={"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}})
    expected = RopeConfig(theta=5e5, kind="linear", factor=4.0, original_max_positions=2048)
    assert read(old).decoder.rope == read(new).decoder.rope == expected


def test_dynamic_scaling_is_the_default_up_to_the_positions_that_rows_may_have():
    scaled = changed(text_config={"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 77})
    decoder = read(scaled).decoder
    assert decoder.rope.kind == "default" and decoder.max_positions == 77


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "blip_2"}, "model_type is 'blip_2'"),
        ({"text_config": {"model_type": "opt"}}, "text_config.model_type is 'opt'"),
        ({"vision_config": {"model_type": "dinov2"}}, "vision_config.model_type"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "mish"}, "projector_hidden_act is 'mish'; supported: silu"),
        ({"text_config": {"hidden_act": "mish"}}, "text_config.hidden_act"),
        ({"vision_config": {"hidden_act": "mish"}}, "vision_config.hidden_act"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named) as error:
        read(changed(**changes), where="dir/config.json")
    assert str(error.value).startswith("dir/config.json: ")


def test_every_activation_that_a_config_may_name_is_there():
    assert all(callable(activation(name)) for name in ACTIVATIONS)
    with pytest.raises(ValueError, match="mish"):
        activation("mish")


@pytest.mark.parametrize(
    ("part", "sizes", "named"),
    [
        ("decoder", {"kv_heads": 1}, "num_key_value_heads = 1"),
        ("decoder", {"vocab_size": 417}, "vocab_size = 417"),
        ("decoder", {"width": 23, "head_width": 6}, "hidden_size = 23"),
        ("vision", {"mlp_width": 21}, "vision intermediate_size = 21"),
    ],
)
def test_sizes_that_the_tensor_axis_does_not_divide_are_refused(part, sizes, named):
    config = read(HF)
    config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **sizes)})
    with pytest.raises(UserError, match=f"config.mesh.tensor: 2 does not divide the model's {named}"):
        param_shardings(config, make_mesh(2, 2, 2))


def test_widths_that_fsdp_does_not_divide_stay_whole():
    config = read(HF)
    narrow = dataclasses.replace(config, vision=dataclasses.replace(config.vision, width=18))
    shardings = param_shardings(narrow, make_mesh(1, 4, 2))
    assert shardings["vision_tower"]["layers"]["attention"]["query"]["kernel"].spec == P(None, None, "tensor", None)
    assert shardings["decoder"]["layers"]["attention"]["query"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert shardings["decoder"]["head"]["kernel"].spec == P("fsdp", "tensor")
