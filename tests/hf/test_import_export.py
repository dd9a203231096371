"""Weights go in and out unchanged, whatever layout, type and number of shards; a directory that does not fit is refused by name."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import LAYOUTS, quiet, tensors, tiny_llava
from safetensors.torch import load_file, save_file

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf import families
from mmalign_jax.hf.export import MARKER, export
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.params import abstract_params, param_shardings


def same_bytes(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].contiguous().view(torch.uint8).equal(b[name].contiguous().view(torch.uint8)), name


def reload(directory):
    with quiet():
        model, info = transformers.LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


def edit(directory, change):
    """Rewrites the single weight file of a directory after `change` has had its dict of tensors."""
    file = directory / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, {"format": "pt"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "shards"), [("float32", 3), ("bfloat16", 1), ("float16", 2)])
def test_untrained_round_trip_is_byte_identical(tmp_path, layout, dtype, shards):
    base = tiny_llava(tmp_path / "base", layout=layout, dtype=dtype, shards=shards)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shards > 1)
    params = load_params(base, read_config(base))
    out = export(params, base, tmp_path / "out", shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    same_bytes(tensors(base), tensors(out))
    copied = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in copied | {"preprocessor_config.json", "processor_config.json"}:
        assert (base / name).read_bytes() == (out / name).read_bytes(), name
    reload(out)


def test_names_of_llavas_own_code_are_read_and_written(tmp_path):
    base = tiny_llava(tmp_path / "base")
    expected = load_params(base, read_config(base))
    own = {
        "language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "vision_tower.": "model.vision_tower.vision_tower.",
        "multi_modal_projector.linear_1.": "model.mm_projector.0.", "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    }  # fmt: skip

    def rename(found):
        for name in list(found):
            prefix = next(prefix for prefix in own if name.startswith(prefix))
            found[own[prefix] + name.removeprefix(prefix)] = found.pop(name)

    edit(base, rename)
    params = load_params(base, read_config(base))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    same_bytes(tensors(base), tensors(export(params, base, tmp_path / "out")))


SIZES = {
    "odd": dict(text={"hidden_size": 21, "head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 33}),
    "biases": dict(text={"attention_bias": True, "mlp_bias": True}, multimodal_projector_bias=False),
    "layers": dict(vision_feature_layer=[-3, 2], vision_feature_select_strategy="full", vision={"num_hidden_layers": 5}),
    "last": dict(vision_feature_layer=-1),
    "tied": dict(tie_word_embeddings=True, text={"tie_word_embeddings": True}),
    "mistral": dict(text={"model_type": "mistral", "head_dim": 6}),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_tree_is_the_models_and_every_tensor_is_used_once(tmp_path, sizes):
    base = tiny_llava(tmp_path / "base", **sizes)
    config = read_config(base)
    params = load_params(base, config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
    table = families.of(config).names(config)
    reduced = [name for entry in table.entries for name in entry.names]
    assert len(set(reduced)) == len(reduced)
    unused = {table.reduce(name) for name in tensors(base)} - set(reduced)
    assert all(table.unused(name) for name in unused)
    assert unused == {table.reduce(table.hub_name(n)) for e in (*table.entries, *table.behind) for n in e.names} - set(reduced)
    same_bytes(tensors(base), tensors(export(params, base, tmp_path / "out")))


def test_values_and_transposes_are_those_of_torch(tmp_path):
    base = tiny_llava(tmp_path / "base")
    params = load_params(base, read_config(base))
    torch_model = reload(base).model
    x = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    layer = torch_model.language_model.layers[1].self_attn
    ours = np.einsum("td,dhe->the", x, params["decoder"]["layers"]["attention"]["key"]["kernel"][1]).reshape(5, -1)
    np.testing.assert_allclose(ours, layer.k_proj(torch.tensor(x)).detach(), atol=1e-5)
    heads = np.random.default_rng(1).normal(size=(5, 4, 6)).astype(np.float32)
    ours = np.einsum("the,hed->td", heads, params["decoder"]["layers"]["attention"]["out"]["kernel"][1])
    np.testing.assert_allclose(ours, layer.o_proj(torch.tensor(heads.reshape(5, 24))).detach(), atol=1e-5)
    pixels = np.random.default_rng(2).normal(size=(28, 28, 3)).astype(np.float32)
    patches = pixels.reshape(4, 7, 4, 7, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
    theirs = torch_model.vision_tower.embeddings.patch_embedding(torch.tensor(pixels).permute(2, 0, 1)[None]).detach()
    np.testing.assert_allclose(patches @ params["vision_tower"]["embedding"]["patch"]["kernel"], theirs[0].flatten(1).T, atol=1e-5)


def test_leaves_are_born_in_their_shard_and_exported_from_it(tmp_path):
    base = tiny_llava(tmp_path / "base", dtype="bfloat16")
    config = read_config(base)
    shardings = param_shardings(config, make_mesh(data=1, fsdp=4, tensor=2))
    params = load_params(base, config, shardings, ml_dtypes.bfloat16)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    assert len(params["decoder"]["head"]["kernel"].addressable_shards) == 8
    assert not params["decoder"]["head"]["kernel"].is_fully_replicated
    same_bytes(tensors(base), tensors(export(params, base, tmp_path / "out")))


def test_trained_values_arrive_in_transformers_in_the_base_type_or_another(tmp_path):
    base = tiny_llava(tmp_path / "base", layout="memory", dtype="bfloat16")
    params = load_params(base, read_config(base))
    moved = jax.tree.map(lambda x: x * 1.5, params)
    before, after = tensors(base), tensors(export(moved, base, tmp_path / "out"))
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    assert after[name].dtype == torch.bfloat16 and after[name].equal((before[name].float() * 1.5).bfloat16())
    unused = "model.vision_tower.post_layernorm.weight"
    assert after[unused].equal(before[unused])
    wide = export(moved, base, tmp_path / "wide", dtype="float32")
    assert {t.dtype for t in tensors(wide).values()} == {torch.float32}
    assert reload(wide).dtype == torch.float32
    with pytest.raises(UserError, match="weight: values up to .* do not fit float16"):
        export(jax.tree.map(lambda x: x * 1e6, params), base, tmp_path / "narrow", dtype="float16")
    assert not (tmp_path / "narrow").exists()


def test_a_head_that_differs_is_untied_and_an_equal_one_follows_the_embedding(tmp_path):
    tie = dict(tie_word_embeddings=True, text={"tie_word_embeddings": True})
    base = tiny_llava(tmp_path / "base", **tie)
    assert "language_model.lm_head.weight" not in tensors(base) and read_config(base).decoder.tied_head

    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    edit(base, lambda found: found.update({head: found[embedding].clone()}))
    config = read_config(base)
    assert config.decoder.tied_head
    params = load_params(base, config)
    assert "head" not in params["decoder"]
    after = tensors(export(jax.tree.map(lambda x: x * 2, params), base, tmp_path / "tied"))
    assert after[head].equal(after[embedding]) and after[embedding].equal(2 * tensors(base)[embedding])

    edit(base, lambda found: found[head].mul_(-1))
    config = read_config(base)
    assert not config.decoder.tied_head
    params = load_params(base, config)
    np.testing.assert_array_equal(params["decoder"]["head"]["kernel"].T, -params["decoder"]["embed"]["embedding"])
    same_bytes(tensors(base), tensors(export(params, base, tmp_path / "untied")))


def _drop(name):
    return lambda found: found.pop(name)


def _rename(old, new):
    return lambda found: found.update({new: found.pop(old)})


NORM = "language_model.model.layers.1.input_layernorm.weight"
MISFITS = {
    "extra": (
        lambda t: t.update({"language_model.model.layers.2.input_layernorm.weight": t[NORM].clone()}),
        "no place for .*layers.2.input",
    ),
    "foreign": (lambda t: t.update({"visual.blocks.0.norm.weight": torch.ones(3)}), "visual.blocks.0.norm.weight belong to no part"),
    "missing": (_drop(NORM), "lack decoder.layers.1.input_layernorm.weight"),
    "misnamed": (_rename(NORM, NORM.replace("input", "inptu")), "no place for .*inptu_layernorm"),
    "twice": (lambda t: t.update({"lm_head.weight": t["language_model.lm_head.weight"].clone()}), "same tensor in two layouts"),
    "misshapen": (
        lambda t: t.update({NORM: torch.ones(23)}),
        r"layers.1.input_layernorm.weight has shape \(23,\), .* for \(24,\)",
    ),
    "vocabulary": (lambda t: t.update({"language_model.model.embed_tokens.weight": torch.ones(400, 24)}), r"\(400, 24\).*\(416, 24\)"),
    "bias": (lambda t: t.update({NORM.replace("weight", "bias"): torch.ones(24)}), "no place for .*input_layernorm.bias"),
    "unused, odd": (lambda t: t.update({"vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias": torch.ones(20)}), "no place for"),
    "quantised": (lambda t: t.update({NORM: torch.ones(24, dtype=torch.int8)}), "type int8; quantised weights"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    base = tiny_llava(tmp_path / "base")
    edit(base, change)
    with pytest.raises(UserError, match=message):
        load_params(base, read_config(base))


def test_known_unused_tensors_are_copied(tmp_path):
    base = tiny_llava(tmp_path / "base", dtype="bfloat16")
    odd = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    edit(base, lambda found: found.update(odd))
    out = export(load_params(base, read_config(base)), base, tmp_path / "out")
    same_bytes(tensors(base), tensors(out))


def test_pickles_are_refused_and_never_copied(tmp_path):
    base = tiny_llava(tmp_path / "base")
    (base / "optimizer.pt").write_bytes(b"x")
    (base / "modeling.py").write_text("raise SystemExit")
    (base / "trained.index.json").write_text("{}")
    config = read_config(base)
    out = export(load_params(base, config), base, tmp_path / "out")
    assert not {"optimizer.pt", "modeling.py", "trained.index.json"} & {file.name for file in out.iterdir()}
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"optimizer.pt: pickled weights .* expected model.safetensors, or model.safetensors.index.json"):
        load_params(base, config)
    with pytest.raises(UserError, match="no such directory"):
        load_params(tmp_path / "nowhere", config)


def test_corrupt_and_missing_shards_are_named(tmp_path):
    base = tiny_llava(tmp_path / "base", shards=3)
    config = read_config(base)
    shard = sorted(base.glob("model-00002*"))[0]
    content = shard.read_bytes()
    for broken in (content[:-7], content[:5], b"\xff" * 8 + content[8:], content[:8] + b"}" + content[9:]):
        shard.write_bytes(broken)
        with pytest.raises(DataError, match=f"{shard.name}: truncated or corrupt safetensors"):
            load_params(base, config)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}: the file is missing"):
        load_params(base, config)


def test_an_index_stays_in_its_directory_and_tells_the_truth(tmp_path):
    base = tiny_llava(tmp_path / "base", shards=3)
    config = read_config(base)
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(iter(index["weight_map"]))
    shutil.copy(base / index["weight_map"][name], tmp_path / "outside.safetensors")
    for shard in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", "a\\b.safetensors", "model.bin"):
        file.write_text(json.dumps({"weight_map": index["weight_map"] | {name: shard}}))
        with pytest.raises(DataError, match="is not a"):
            load_params(base, config)
    others = [shard for shard in index["weight_map"].values() if shard != index["weight_map"][name]]
    file.write_text(json.dumps({"weight_map": index["weight_map"] | {name: others[0]}}))
    with pytest.raises(DataError, match=f"tensor {name} is"):
        load_params(base, config)
    for text in ("[1]", "{}", '{"weight_map": {"a": 1}}', "{"):
        file.write_text(text)
        with pytest.raises(DataError, match="index.json"):
            load_params(base, config)


def test_other_models_and_adapters_are_refused(tmp_path):
    base = tiny_llava(tmp_path / "base")
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        read_config(base)
    (base / "adapter_config.json").unlink()
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"model_type": "blip-2"}))
    with pytest.raises(UserError, match="model_type is 'blip-2'; supported: llava"):
        read_config(base)
    (base / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json: not JSON"):
        read_config(base)


def test_only_an_earlier_export_is_replaced(tmp_path):
    base = tiny_llava(tmp_path / "base")
    params = load_params(base, read_config(base))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(UserError, match="holds files that are not an export"):
        export(params, base, tmp_path / "mine")
    with pytest.raises(UserError, match="would replace the base"):
        export(params, base, base)
    assert (tmp_path / "mine" / "notes").read_text() == "keep"
    (tmp_path / ".out.writing").mkdir()  # what a killed export leaves
    (tmp_path / ".out.writing" / "half").write_text("")
    out = export(params, base, tmp_path / "out")
    assert (out / MARKER).is_file() and not (out / "half").exists()
    (out / "stale.json").write_text("{}")
    export(jax.tree.map(lambda x: x * 2, params), base, out)
    assert not (out / "stale.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mine", "out"]
    assert tensors(out)["language_model.lm_head.weight"].equal(2 * tensors(base)["language_model.lm_head.weight"])


def test_a_tree_of_another_model_is_refused(tmp_path):
    base = tiny_llava(tmp_path / "base")
    other = tiny_llava(tmp_path / "other", text={"intermediate_size": 32})
    with pytest.raises(UserError, match=r"decoder/layers/mlp/gate/kernel has shape \(2, 24, 32\), the base .* \(2, 24, 40\)"):
        export(load_params(other, read_config(other)), base, tmp_path / "out")


@pytest.mark.parametrize("absent", ["preprocessor_config.json", "processor_config.json"])
def test_both_generations_of_processor_files_are_written(tmp_path, absent):
    base = tiny_llava(tmp_path / "base")
    images = json.loads((base / "preprocessor_config.json").read_text())
    if absent == "preprocessor_config.json":
        top = json.loads((base / "processor_config.json").read_text())
        (base / "processor_config.json").write_text(json.dumps(top | {"image_processor": images}))
    expected = transformers.AutoProcessor.from_pretrained(tiny_llava(tmp_path / "whole"), backend="pil")
    (base / absent).unlink()
    out = export(load_params(base, read_config(base)), base, tmp_path / "out")
    found = transformers.AutoProcessor.from_pretrained(out, backend="pil")
    assert found.image_processor.to_dict() == expected.image_processor.to_dict()
    for name in ("patch_size", "image_token", "num_additional_image_tokens", "vision_feature_select_strategy"):
        assert getattr(found, name) == getattr(expected, name)
    assert json.loads((out / "preprocessor_config.json").read_text())["crop_size"] == {"height": 28, "width": 28}
