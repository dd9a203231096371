"""Adapters in PEFT's form, written, read, merged and refused. Every family's are compared with PEFT's in tests/families."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from helpers.checkpoints import tensors, tiny_llava
from helpers.lora import random_factors
from helpers.tiny import Tiny
from safetensors.torch import load_file, save_file

from mmalign_jax.config import from_mapping
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf.adapters import CONFIG, WEIGHTS, export_adapter, import_adapter, read_adapter, with_adapter
from mmalign_jax.hf.export import export
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.lora import is_factor, merge_factors
from mmalign_jax.models.params import param_shardings
from mmalign_jax.models.tree import split, union
from mmalign_jax.training.trainable import Trainable


def asked(**lora):
    return from_mapping({"lora": {"rank": 3, "alpha": 6.0, **lora}})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def sizes(tiny):
    return with_adapter(asked(), tiny.config)


@pytest.fixture(scope="module")
def factors(sizes):
    return random_factors(sizes, size=0.1)


@pytest.fixture(scope="module")
def adapter(tiny, sizes, factors, tmp_path_factory):
    return export_adapter(factors, sizes, tiny.directory, tmp_path_factory.mktemp("adapters") / "adapter")


def test_the_default_is_every_linear_of_the_language_model(tiny, sizes):
    assert sizes.lora.keys() == {"decoder"}
    assert set(sizes.lora["decoder"].targets) == {"query", "key", "value", "out", "gate", "up", "down"}
    assert with_adapter(from_mapping({}), tiny.config) == tiny.config
    some = with_adapter(asked(targets=["attention", "down"], parts=["decoder", "vision_tower"]), tiny.config).lora
    assert some["decoder"] == some["vision_tower"] and some["decoder"].targets == ("query", "key", "value", "out", "down")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["qkv"]}, "config.lora.targets: decoder of this model has no 'qkv'; its linears are query, key, value, out, gate, up, down"),
        ({"targets": ["attention"], "parts": ["decoder", "projector"]}, "config.lora.parts: projector has none of the linears"),
    ],
)
def test_linears_that_the_model_does_not_have(tiny, lora, message):
    with pytest.raises(UserError, match=re.escape(message)):
        with_adapter(asked(**lora), tiny.config)


def test_files(adapter, tiny):
    values = json.loads((adapter / CONFIG).read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"], values["lora_dropout"]) == ("LORA", 3, 6, 0.0)
    assert values["base_model_name_or_path"] == str(tiny.directory)
    found = load_file(adapter / WEIGHTS)
    assert len(found) == 2 * 7 * 2
    first = found["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"]
    second = found["base_model.model.model.language_model.layers.1.mlp.down_proj.lora_B.weight"]
    assert first.shape == (3, 24) and second.shape == (24, 3) and {value.dtype for value in found.values()} == {torch.float32}
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in found}
    assert all(re.fullmatch(values["target_modules"], module) for module in modules)
    for other in ("model.vision_tower.encoder.layers.0.self_attn.q_proj", "lm_head", "model.language_model.layers.2.self_attn.q_proj"):
        assert not re.fullmatch(values["target_modules"], other)


def test_read_back_byte_for_byte(adapter, tiny, sizes, factors):
    again = read_adapter(adapter, tiny.config)
    assert again == sizes
    read = import_adapter(adapter, again)
    assert jax.tree.structure(read) == jax.tree.structure(factors)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), read, factors))


def test_read_into_shards(adapter, sizes, factors):
    shardings = param_shardings(sizes, make_mesh(2, 2, 2))
    read = import_adapter(adapter, sizes, shardings, "bfloat16")
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, read, split(shardings, is_factor)[0]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype("bfloat16")), read, factors)


def test_older_names_are_read(adapter, sizes, factors, tiny, tmp_path):
    """Adapters that were trained when transformers' modules were called as the hub's files are."""
    write(tmp_path, adapter, lambda name: name.replace(".model.language_model.", ".language_model.model."))
    assert all(name.startswith("base_model.model.language_model.model.layers.") for name in load_file(tmp_path / WEIGHTS))
    jax.tree.map(np.testing.assert_array_equal, import_adapter(tmp_path, read_adapter(tmp_path, tiny.config)), factors)


def write(target, adapter, rename=lambda name: name, drop=(), change=lambda found: found, **settings):
    """A copy of the adapter with changes."""
    values = json.loads((adapter / CONFIG).read_text()) | settings
    (target / CONFIG).write_text(json.dumps(values))
    found = {rename(name): value for name, value in load_file(adapter / WEIGHTS).items() if not any(part in name for part in drop)}
    save_file(change(found), target / WEIGHTS)


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported: LORA"),
        ({"use_dora": True}, "use_dora is True; supported: False"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']; supported: None"),
        ({"bias": "all"}, "bias is 'all'; supported: 'none'"),
        ({"r": 0}, "r is 0 and lora_alpha 6"),
        ({"r": 4}, f"{FIRST} has shape (3, 24), expected (4, 24)"),
        ({"drop": ["layers.1.self_attn.q_proj.lora_B"]}, "lacks decoder.layers.1.self_attn.q_proj.lora_B.weight"),
        ({"rename": lambda name: name.replace("q_proj", "x_proj")}, "the model has no linear for base_model.model.model.language_model.layers"),
        ({"rename": lambda name: name.replace("layers.1", "layers.7")}, "the model has no linear for"),
        ({"rename": lambda name: name.replace("lora_A.weight", "lora_magnitude_vector")}, "is not a low-rank factor; expected base_model"),
        ({"rename": lambda name: name.replace("base_model.model.model", "x")}, "is not a low-rank factor"),
        ({"rename": lambda name: name.replace("model.language_model", "audio_tower")}, "belongs to no part of the model"),
        ({"change": lambda found: {}}, "holds no tensors"),
    ],
)
def test_adapters_that_are_refused(adapter, tiny, tmp_path, changes, message):
    write(tmp_path, adapter, **changes)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        import_adapter(tmp_path, read_adapter(tmp_path, tiny.config))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_refused(adapter, tiny, tmp_path):
    (tmp_path / CONFIG).write_text((adapter / CONFIG).read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="no adapter_model.safetensors; adapter_model.bin is pickled"):
        read_adapter(tmp_path, tiny.config)
    (tmp_path / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(DataError, match="truncated or corrupt"):
        read_adapter(tmp_path, tiny.config)
    with pytest.raises(UserError, match="no such file"):
        read_adapter(tmp_path / "nowhere", tiny.config)
    with pytest.raises(UserError, match="config.model.adapter"):
        read_config(adapter)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_merges_into_the_base_s_own_values(dtype, sizes, factors, tmp_path):
    """In float32, from the base's files: the run's own copy of frozen weights may be rounded."""
    base = tiny_llava(tmp_path / "base", dtype=dtype)
    params = load_params(base, sizes)
    out = export(factors, base, tmp_path / "out", lora=sizes.lora)
    expected = merge_factors(union(params, factors), sizes.lora)
    got = load_params(out, read_config(out))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(dtype).astype(np.float32)), got, expected)
    before, after = tensors(base), tensors(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if re.search(r"language_model.*(_proj).weight", name)}
    # a tree that holds the kernels, too, gives the same
    whole = export(union(params, factors), base, tmp_path / "whole", lora=sizes.lora)
    assert all(torch.equal(value, after[name]) for name, value in tensors(whole).items())


def test_factors_and_other_parts_are_exported_together(tiny, sizes, factors, tmp_path):
    moved = union(factors, {"projector": jax.tree.map(lambda leaf: leaf + 1, tiny.params["projector"])})
    got = load_params(export(moved, tiny.directory, tmp_path / "out", lora=sizes.lora), tiny.config)
    jax.tree.map(np.testing.assert_array_equal, got["projector"], moved["projector"])
    with pytest.raises(UserError, match="an adapter holds factors alone, and projector trained besides"):
        export_adapter(moved, sizes, tiny.directory, tmp_path / "adapter")
    with pytest.raises(UserError, match="trained no low-rank factors"):
        export_adapter({}, tiny.config, tiny.directory, tmp_path / "adapter")


def test_a_part_with_weights_of_its_own_is_exported_whole_or_not_at_all(tiny, tmp_path):
    part, _ = split(tiny.params, lambda path: path[:2] == ("projector", "fc1"))
    with pytest.raises(UserError, match="the parameters have no projector/fc2/kernel"):
        export(part, tiny.directory, tmp_path / "out")


def test_a_run_goes_on_from_an_adapter(tiny, sizes, factors, adapter):
    """Its factors are the policy's and, as a copy, the reference's."""
    config = from_mapping({"model": {"adapter": str(adapter)}, "train": {"seed": 3}})
    policy = Pretrained.read(tiny.directory, make_mesh(1, 1, 1, jax.devices()[:1])).adapted(config)
    assert policy.sizes == sizes == policy.model.config
    jax.tree.map(np.testing.assert_array_equal, policy.params(), union(tiny.params, factors))
    rule = Trainable.of(config, policy.sizes)
    reference = policy.params("bfloat16", rule.in_reference)
    assert jax.tree.structure(reference) == jax.tree.structure(factors)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(reference)} == {"bfloat16"}
    new = Pretrained.read(tiny.directory, policy.mesh).adapted(asked())
    assert jax.tree.structure(new.params(wanted=is_factor)) == jax.tree.structure(factors)
