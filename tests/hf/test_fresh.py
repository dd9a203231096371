"""A fresh directory is a whole LLaVA checkpoint: transformers loads it, and it depends on the seed alone."""

import json

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import CHAT_TEMPLATE, quiet, tensors, write_tokenizer

from mmalign_jax.errors import UserError
from mmalign_jax.hf.export import export
from mmalign_jax.hf.fresh import Init, write_fresh
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import load_processor

CONFIG = {
    "image_token_index": 3,
    "text_config": {
        "vocab_size": 416, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4,
    },
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"vision_feature_layer": -1, "tie_word_embeddings": True}, {"multimodal_projector_bias": False}])
def test_transformers_loads_every_tensor(tmp_path, changes):
    directory = write_fresh(tmp_path / "new", CONFIG | changes, 0, write_tokenizer)
    with quiet():
        model, info = transformers.LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert model.generation_config.eos_token_id == 2
    config = read_config(directory)
    assert config.decoder.tied_head == changes.get("tie_word_embeddings", False)
    assert len(load_processor(directory, config).pictures.blank.features) == 16 == model.config.image_seq_length
    processor = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
    assert processor.chat_template == CHAT_TEMPLATE and processor.image_processor.size["shortest_edge"] == 28
    out = export(load_params(directory, config), directory, tmp_path / "out")
    before, after = tensors(directory), tensors(out)
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def test_a_tensor_depends_on_the_seed_and_its_name_alone(tmp_path):
    one = tensors(write_fresh(tmp_path / "a", CONFIG, 7, write_tokenizer))
    again = tensors(write_fresh(tmp_path / "b", CONFIG, 7, write_tokenizer))
    other = tensors(write_fresh(tmp_path / "c", CONFIG, 8, write_tokenizer))
    deeper = CONFIG | {"text_config": CONFIG["text_config"] | {"num_hidden_layers": 3}}
    more = tensors(write_fresh(tmp_path / "d", deeper, 7, write_tokenizer))
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    assert all(one[key].equal(again[key]) for key in one)
    assert not one[name].equal(other[name]) and one[name].equal(more[name])
    assert not one[name].equal(one[name.replace("layers.1", "layers.0")])


def test_weights_have_the_widths_that_were_asked_for(tmp_path):
    big = CONFIG | {"text_config": CONFIG["text_config"] | {"hidden_size": 240, "num_hidden_layers": 2}}
    init = Init(embedding_std=0.5, position_std=0.1, gain=2.0)
    made = tensors(write_fresh(tmp_path / "new", big, 0, write_tokenizer, init=init, dtype="bfloat16"))
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    std = {name: float(tensor.float().std()) for name, tensor in made.items()}
    layer = "language_model.model.layers.0."
    np.testing.assert_allclose(std[layer + "self_attn.q_proj.weight"], 2 / 240**0.5, rtol=0.05)
    np.testing.assert_allclose(std[layer + "self_attn.o_proj.weight"], 2 / 240**0.5 / 4**0.5, rtol=0.05)
    np.testing.assert_allclose(std[layer + "mlp.down_proj.weight"], 2 / 40**0.5 / 4**0.5, rtol=0.05)
    np.testing.assert_allclose(std["language_model.model.embed_tokens.weight"], 0.5, rtol=0.05)
    np.testing.assert_allclose(std["vision_tower.vision_model.embeddings.position_embedding.weight"], 0.1, rtol=0.2)
    np.testing.assert_allclose(std["vision_tower.vision_model.embeddings.patch_embedding.weight"], 2 / (3 * 49) ** 0.5, rtol=0.1)
    assert made[layer + "input_layernorm.weight"].eq(1).all() and made["vision_tower.vision_model.pre_layrnorm.bias"].eq(0).all()


def test_bad_configs_and_full_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match="lacks image_token_index"):
        write_fresh(tmp_path / "a", {k: v for k, v in CONFIG.items() if k != "image_token_index"}, 0, write_tokenizer)
    with pytest.raises(UserError, match="text_config.model_type is 'gemma'"):
        write_fresh(tmp_path / "a", CONFIG | {"text_config": {"model_type": "gemma"}}, 0, write_tokenizer)
    with pytest.raises(UserError, match="dtype 'int8' is not one of"):
        write_fresh(tmp_path / "a", CONFIG, 0, write_tokenizer, dtype="int8")
    assert not any(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes").write_text("")
    with pytest.raises(UserError, match="not empty"):
        write_fresh(tmp_path / "a", CONFIG, 0, write_tokenizer)


def test_the_config_is_complete(tmp_path):
    directory = write_fresh(tmp_path / "new", CONFIG, 0, write_tokenizer)
    values = json.loads((directory / "config.json").read_text())
    assert values["model_type"] == "llava" and values["architectures"] == ["LlavaForConditionalGeneration"]
    assert values["text_config"]["model_type"] == "llama" and values["vision_config"]["model_type"] == "clip_vision_model"
    assert values["image_seq_length"] == 16 and values["dtype"] == "float32"
