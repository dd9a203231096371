"""Features are read where they are the tower's own, and refused by the field that has changed."""

import json
import re
import shutil

import pytest
import torch
from helpers.checkpoints import tensors, tiny_llava
from helpers.families import KINDS, all_cases, one_a_kind
from helpers.kept_features import Case, changed, one_device
from safetensors.torch import save_file

from mmalign_jax.data.feature_store import FeatureStore
from mmalign_jax.errors import UserError
from mmalign_jax.hf.export import export
from mmalign_jax.hf.import_ import part_hash
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.report.console import Console
from mmalign_jax.training import cache_key, kept_features
from mmalign_jax.training.kept_features import KeptFeatures


def refused(some, directory, *words):
    """The error names these fields and no others, the file, and the mend."""
    with pytest.raises(UserError) as caught:
        some.kept()
    found = re.fullmatch(r"(.*): the vision features .* were computed from something else: (.*)\. Delete (.*), or choose .*", str(caught.value))
    assert found and found[1] == str(directory / "key.json") and found[3] == str(directory) and "config.features.cache" in str(caught.value)
    assert re.fullmatch("; ".join(words), found[2]), found[2]
    assert "Computing" not in some.said.getvalue()


def test_another_tower_processor_or_computation_is_refused_by_the_field(base, policy, cache, tmp_path):
    other = Pretrained.read(tiny_llava(tmp_path / "seed", seed=1), policy.mesh)
    refused(Case(other, cache), cache, "weights")
    mean = lambda data: data.replace(b'"image_mean": [\n    0.48145466', b'"image_mean": [\n    0.5')  # noqa: E731
    other = Pretrained.read(changed(base, tmp_path / "mean", "preprocessor_config.json", mean), policy.mesh)
    fields = [f"{name}: .* there, \\[0\\.5, .*\\] now" for name in ("mean", "pictures.image_mean")]
    refused(Case(other, cache), cache, f"pictures \\({fields[0]}\\)", f"processors \\({fields[1]}\\)")
    half = Pretrained.read(base, policy.mesh, "bfloat16")
    types = [f'{name} \\("float32" there, "bfloat16" now\\)' for name in ("compute_dtype", "tower_dtype")]
    refused(Case(half, cache), cache, *types)
    refused(Case(policy, cache, model={"reference_dtype": "bfloat16"}), cache, types[1])


def test_what_no_feature_depends_on_may_change(base, policy, cache, tmp_path):
    """The decoder, the tokenizer, and the names under which tensors are stored."""
    other = tiny_llava(tmp_path / "base", layout="memory")
    weights = tensors(other)
    name = next(name for name in weights if "language_model" in name and name.endswith("down_proj.weight"))
    save_file(weights | {name: weights[name] * 2}, other / "model.safetensors", {"format": "pt"})
    settings = json.loads((other / "tokenizer_config.json").read_text()) | {"model_max_length": 1024}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    some = Case(Pretrained.read(other, policy.mesh), cache)
    some.kept()
    assert "are reused" in some.said.getvalue() and "Computing" not in some.said.getvalue()


@pytest.mark.parametrize("name", one_a_kind(KINDS[:1]))
def test_the_key_of_a_model_is_that_of_its_export(name, tmp_path):
    """Rounds export in float32, and an export has files that its base may lack."""
    base, keys = all_cases()[name].write(tmp_path / "base", 2), []
    save_file({key: value.to(torch.bfloat16) for key, value in tensors(base).items()}, base / "model.safetensors", {"format": "pt"})
    export({}, base, tmp_path / "export", dtype="float32")
    for directory in (base, tmp_path / "export"):
        keys.append(cache_key.tower_key(Pretrained.read(directory, one_device()), "float32"))
    assert cache_key.differences(*keys) == []


def test_a_tower_counts_by_its_values(base, policy, tmp_path):
    """In whatever type they are stored."""
    weights, found = tensors(base), {}
    for name, dtype in (("half", torch.bfloat16), ("other half", torch.float16)):
        half = {key: value.to(dtype) for key, value in weights.items()}
        for copy, some in ((name, half), (f"{name} in float32", {key: value.float() for key, value in half.items()})):
            directory = shutil.copytree(base, tmp_path / copy)
            save_file(some, directory / "model.safetensors", {"format": "pt"})
            found[copy] = part_hash(directory, policy.sizes, "vision_tower")
        assert found[name] == found[f"{name} in float32"]
    assert len({*found.values(), part_hash(base, policy.sizes, "vision_tower")}) == 3


def test_what_makes_the_pixels_counts(base, policy, cache, monkeypatch):
    """Values that a processor's file leaves out are defaults of a library."""
    assert str(base) not in json.dumps(FeatureStore(cache).key)
    with monkeypatch.context() as patch:
        patch.setattr(policy.processor.pictures.processors[0], "resample", 0)
        refused(Case(policy, cache), cache, r"processors \(pictures\.resample: 3 there, 0 now\)")
    monkeypatch.setattr(cache_key.importlib.metadata, "version", lambda name: "0.1")
    refused(Case(policy, cache), cache, r"made_with \(pillow: .* there, \"0.1\" now; transformers: .* there, \"0.1\" now\)")


def test_the_tower_is_read_once_a_run(policy, cache, monkeypatch):
    some, calls = Case(policy, cache), []
    monkeypatch.setattr(kept_features, "tower_key", lambda *how: calls.append(how) or cache_key.tower_key(*how))
    make = KeptFeatures.of(some.config, policy, Console(some.said))
    assert not calls
    make(some.records, some.plan)
    make(some.records, some.plan)
    assert len(calls) == 1
