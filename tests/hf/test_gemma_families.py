"""Gemma 3 and PaliGemma: configs in every spelling, names in every layout, and the ends and limits of their turns."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import tensors
from helpers.families import gemma3, paligemma
from helpers.tiny import record
from safetensors.torch import save_file

from mmalign_jax.data.layout import tokenize
from mmalign_jax.errors import UserError
from mmalign_jax.hf import families, names
from mmalign_jax.hf.export import export
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.types import Part, Turn

CASES = {case.name: case for module in (gemma3, paligemma) for case in module.cases()}

# As google/gemma-3-4b-it has them: everything else is a default of transformers' config classes.
GEMMA3 = {
    "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144, "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
    "patch_size": 14, "projection_dim": 2048, "vision_use_head": False,
}  # fmt: skip
# As google/paligemma-3b-pt-224 and google/paligemma2-3b-pt-224 have them.
PALIGEMMA = {
    "model_type": "paligemma", "image_token_index": 257152, "projection_dim": 2048, "vision_config": VISION,
    "text_config": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18,
        "num_key_value_heads": 1, "vocab_size": 257216,
    },
}  # fmt: skip
PALIGEMMA2 = {
    "model_type": "paligemma", "image_token_index": 257152, "projection_dim": 2304, "vision_config": VISION,
    "text_config": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "vocab_size": 257216,
    },
}  # fmt: skip


@pytest.mark.parametrize("values", [GEMMA3, PALIGEMMA, PALIGEMMA2], ids=["gemma3", "paligemma", "paligemma 2"])
def test_hub_configs_are_read_as_transformers_reads_them(values):
    ours = families.read(values)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(values)))
    text, d = theirs.text_config, ours.decoder
    assert (d.width, d.mlp_width, d.layers) == (text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    assert (d.heads, d.kv_heads, d.head_width) == (text.num_attention_heads, text.num_key_value_heads, text.head_dim)
    assert (d.vocab_size, d.norm_eps, d.max_positions) == (text.vocab_size, text.rms_norm_eps, text.max_position_embeddings)
    assert d.tied_head and theirs.tie_word_embeddings
    assert d.sliding_window == getattr(text, "sliding_window", None)
    if d.sliding_window:
        assert d.local_layers == tuple(kind == "sliding_attention" for kind in text.layer_types)
        assert d.query_scale == text.query_pre_attn_scalar**-0.5
        assert (d.attention_softcap, d.final_softcap) == (text.attn_logit_softcapping, text.final_logit_softcapping)
    ropes = text.rope_parameters
    pairs = [(d.rope, ropes.get("full_attention", ropes))] + ([(d.local_rope, ropes["sliding_attention"])] if d.local_rope else [])
    for rope, expected in pairs:
        assert (rope.theta, rope.kind, rope.factor) == (expected["rope_theta"], expected["rope_type"], expected.get("factor", 1.0))
    assert ours.image_tokens == getattr(theirs, "mm_tokens_per_image", None) or ours.image_tokens == text.num_image_tokens
    # what transformers writes of it again means the same
    assert families.read(json.loads(theirs.to_json_string(use_diff=False))) == ours


@pytest.mark.parametrize(
    ("values", "changes", "named"),
    [
        (GEMMA3, {"mm_tokens_per_image": 100}, "mm_tokens_per_image"),
        (GEMMA3, {"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
        (GEMMA3, {"text_config": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping"),
        (GEMMA3, {"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
        (GEMMA3, {"text_config": {"model_type": "gemma2"}}, "text_config.model_type"),
        (PALIGEMMA, {"projection_dim": 1024}, "projection_dim"),
        (PALIGEMMA, {"text_config": {"model_type": "gemma3_text"}}, "text_config.model_type"),
        (PALIGEMMA2, {"vision_config": {"model_type": "clip_vision_model"}}, "vision_config.model_type"),
    ],
)
def test_what_a_config_may_not_ask_for(values, changes, named):
    changed = {key: {**values[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=named):
        families.read(values | changed)


@pytest.mark.parametrize("name", ["gemma3", "paligemma 2"])
def test_every_layout_of_names(tmp_path, name):
    """What a model built by transformers 5 saves, what the hub has, and the names of the modules, with heads and without."""
    base = CASES[name].write(tmp_path, 3)
    fresh, file = tensors(base), base / "model.safetensors"
    config = read_config(base)
    table = families.of(config).names(config)
    expected = load_params(base, config)
    hub = {table.hub_name(table.reduce(key)): value for key, value in fresh.items()}
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in hub and "language_model.model.norm.weight" in hub
    assert not any("lm_head" in key for key in hub)
    modules = {f"model.{key.replace('language_model.model.', 'language_model.')}": value for key, value in fresh.items()}
    # old files write a tied head once more; SigLIP's pooling head is of no use to these models
    whole = hub | {
        "language_model.lm_head.weight": hub["language_model.model.embed_tokens.weight"].clone(),
        "vision_tower.vision_model.head.probe": torch.ones(1, 1, 16),
    }
    for layout in (hub, modules, whole):
        save_file(layout, file, {"format": "pt"})
        assert read_config(base) == config
        found = load_params(base, config)
        for entry in table.entries:
            np.testing.assert_array_equal(names.leaf_at(found, entry.path), names.leaf_at(expected, entry.path))
        again = tensors(export(found, base, tmp_path / "out"))
        assert again.keys() == layout.keys() and all(again[key].equal(layout[key]) for key in layout)


def test_a_head_of_its_own_is_not_tied(tmp_path):
    base = CASES["gemma3"].write(tmp_path, 3)
    found = tensors(base)
    embedding = next(value for key, value in found.items() if key.endswith("embed_tokens.weight"))
    save_file(found | {"language_model.lm_head.weight": embedding + 1}, base / "model.safetensors", {"format": "pt"})
    config = read_config(base)
    assert not config.decoder.tied_head
    np.testing.assert_array_equal(load_params(base, config)["decoder"]["head"]["kernel"], embedding.T + 1)


@pytest.fixture(scope="module", params=list(CASES))
def case_and_processor(request, tmp_path_factory):
    case = CASES[request.param]
    directory = case.write(tmp_path_factory.mktemp("tiny"), 0)
    return case, directory, load_processor(directory, read_config(directory))


def test_answers_end_with_the_end_of_a_turn(case_and_processor):
    case, _, processor = case_and_processor
    end = gemma3.END_OF_TURN if case.name == "gemma3" else paligemma.EOS
    answer = processor.answer("There is a red cat.", "There is")
    assert answer.ids[-1] == end and end in processor.eos_ids
    assert processor.decode(answer.ids) == "There is a red cat."
    assert not answer.scored[:2].any() and answer.scored[-1]
    assert set(processor.image_token_ids) <= set(processor.banned_ids)


def test_other_turns(case_and_processor):
    """Gemma 3 takes turns, a system prompt and images anywhere in them; PaliGemma one prompt behind its images."""
    case, directory, processor = case_and_processor
    one = record("r", "What is it?", "A dog.", images=[1])
    image, again = Part(media=0), Part(text="And what else?")
    turns = (Turn("system", (Part(text="Be short."),)), *one.turns, Turn("assistant", (Part(text="A dog."),)), Turn("user", (again,)))
    late = (Turn("user", (Part(text="What is"), image, Part(text="this?"))),)
    blank = [processor.pictures.blank]
    if case.name == "gemma3":
        for given in (turns, late):
            expected = case.inputs(directory, dataclasses.replace(one, turns=given))["input_ids"][0]
            assert processor.prompt_ids(given, blank).tolist() == expected.tolist()
        return
    with pytest.raises(UserError, match="one user turn"):
        processor.prompt_ids(turns, blank)
    with pytest.raises(UserError, match="one user turn"):
        processor.prompt_ids(turns[1:], blank)
    with pytest.raises(UserError, match="in front of the prompt"):
        processor.prompt_ids(late, blank)
    alone = processor.prompt_ids((Turn("user", (image,)),), blank)
    newline = processor.prompt_ids((Turn("user", (Part(text="?"),)),), [])[-1]
    assert alone.tolist() == [*processor.image_token_ids * 16, paligemma.BOS, newline]


def test_where_the_start_of_an_answer_stands(case_and_processor):
    """It is shared where attention is causal. A prefix that sees what follows must not hold it: a model that answers never sees that."""
    case, _, processor = case_and_processor
    row = record("r", "What is it?", "There is a red cat.", "There is a dog.", images=[1])
    bare = tokenize(row, row.prefs[0], processor, 2)
    out = tokenize(dataclasses.replace(row, prefix="There is a"), row.prefs[0], processor, 2)
    shared = len(out.prefix) - len(bare.prefix)
    assert (shared > 0) == (case.name == "gemma3")
    for (ids, scored), (whole, _) in zip(out.answers, bare.answers, strict=True):
        assert ids.tolist() == whole[shared:].tolist() and scored.any() and scored.all() == (shared > 0)


def test_an_image_token_behind_the_embedding_is_the_only_one(tmp_path):
    directory = CASES["paligemma"].write(tmp_path, 0)
    config = read_config(directory)
    assert config.image_token_id == config.decoder.vocab_size
    load_processor(directory, config)
    smaller = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=config.decoder.vocab_size - 1))
    with pytest.raises(UserError, match="the model's vocabulary"):
        load_processor(directory, smaller)


def test_files_that_do_not_fit_gemma3(tmp_path):
    directory = CASES["gemma3"].write(tmp_path, 0)
    processor, tokenizer = directory / "processor_config.json", directory / "tokenizer_config.json"
    config = read_config(directory)

    def refused(file, old, new, match):
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new))
        with pytest.raises(UserError, match=match):
            load_processor(directory, config)
        file.write_text(before)

    refused(processor, '"do_normalize"', '"do_pan_and_scan": true, "do_normalize"', "do_pan_and_scan")
    refused(processor, '"height": 48', '"height": 42', "the model takes")
    refused(tokenizer, '"boi_token"', '"boi"', "no boi_token")
    refused(tokenizer, '"<image_soft_token>"', '"<start_of_image>"', "image_token")
