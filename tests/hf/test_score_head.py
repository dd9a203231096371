"""The score head's file: written beside models and adapters, read where a model is asked to have a head."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tensors, tiny_llava
from helpers.lora import random_factors
from helpers.tiny import Tiny
from safetensors.numpy import load_file, save_file

from mmalign_jax.config import from_mapping
from mmalign_jax.errors import UserError
from mmalign_jax.hf.adapters import export_adapter
from mmalign_jax.hf.export import export
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.hf.score_head import FILE
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.config import Lora
from mmalign_jax.models.score_head import initial_head
from mmalign_jax.models.tree import split

REWARD = {"objective": {"name": "reward_model"}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def head(tiny):
    return {"kernel": initial_head(tiny.config, 9)["kernel"], "bias": np.array(0.5, np.float32)}


@pytest.fixture(scope="module")
def exported(tiny, head, tmp_path_factory):
    """The base with a head alone: all that trained."""
    return export({"score_head": jax.tree.map(jnp.asarray, head)}, tiny.directory, tmp_path_factory.mktemp("models") / "reward")


def policy(directory, **values):
    return Pretrained.read(directory, make_mesh(1, 2, 1, jax.devices()[:2]), "float32").adapted(from_mapping(REWARD | values))


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, dict(found), dict(expected))


def test_the_file(tiny, head, exported):
    found = load_file(exported / FILE)
    assert {name: value.shape for name, value in found.items()} == {"score.weight": (1, 24), "score.bias": (1,)}
    np.testing.assert_array_equal(found["score.weight"][0], head["kernel"])
    assert found["score.bias"] == 0.5 and all(value.dtype == np.float32 for value in found.values())
    base, there = tensors(tiny.directory), tensors(exported)
    assert there.keys() - base.keys() == found.keys()
    assert all(there[name].equal(base[name]) for name in base)


def test_it_is_read_where_the_model_is_asked_to_have_a_head(tiny, head, exported):
    params = policy(exported).params("bfloat16")
    same(params["score_head"], head)
    assert params["score_head"]["kernel"].dtype == jnp.float32 and params["projector"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert policy(exported).params(wanted=lambda path: path == ("score_head", "bias")).keys() == {"score_head"}
    plain = Pretrained.read(exported, policy(exported).mesh, "float32")
    assert "score_head" not in plain.params() and "score_head" not in plain.adapted(from_mapping({})).params()
    assert "score_head" not in load_params(exported, read_config(exported))


def test_without_one_it_is_new_and_of_the_seed(tiny):
    for seed in (0, 1):
        same(policy(tiny.directory, train={"seed": seed}).params()["score_head"], initial_head(tiny.config, seed))


def test_the_output_kernel_may_be_left_out_of_an_export(tiny, head, tmp_path):
    trained, _ = split(tiny.params, lambda path: path[:2] != ("decoder", "head"))
    moved = jax.tree.map(lambda x: x + 1, trained)
    out = export(moved | {"score_head": head}, tiny.directory, tmp_path / "out")
    found = load_params(out, read_config(out))
    np.testing.assert_array_equal(found["decoder"]["head"]["kernel"], tiny.params["decoder"]["head"]["kernel"])
    np.testing.assert_array_equal(found["decoder"]["final_norm"]["scale"], moved["decoder"]["final_norm"]["scale"])
    # the next export is of a model without a head, and the old head would not fit it
    again = export(found, out, tmp_path / "again")
    assert not (again / FILE).exists() and not (again / "model.safetensors.index.json").exists()


def test_adapters_have_the_head_beside_them(tiny, head, exported, tmp_path):
    sizes = tiny.config.with_lora({"decoder": Lora(2, 4.0, ("query",))})
    factors = random_factors(sizes)
    out = export_adapter(factors | {"score_head": head}, sizes, tiny.directory, tmp_path / "adapter")
    assert sorted(file.name for file in out.glob("*.safetensors")) == ["adapter_model.safetensors", FILE]
    # that of the adapter, whatever the base has
    other = shutil.copytree(exported, tmp_path / "base")
    save_file({"score.weight": np.zeros((1, 24), np.float32), "score.bias": np.zeros(1, np.float32)}, other / FILE)
    there = policy(other, model={"adapter": str(out)})
    params = there.params()
    same(params["score_head"], head)
    same(split(params, lambda path: path[-1].startswith("lora"))[0], factors)
    with pytest.raises(UserError, match="projector trained besides"):
        export_adapter(factors | {"score_head": head, "projector": tiny.params["projector"]}, sizes, tiny.directory, tmp_path / "no")


@pytest.mark.parametrize(
    "tensors",
    [
        {"score.weight": np.zeros((1, 8), np.float32), "score.bias": np.zeros(1, np.float32)},
        {"score.weight": np.zeros((1, 24), np.float32)},
        {"v_head.weight": np.zeros((1, 24), np.float32)},
    ],
)
def test_a_head_of_another_model(exported, tmp_path, tensors):
    other = shutil.copytree(exported, tmp_path / "other")
    save_file(tensors, other / FILE)
    with pytest.raises(UserError, match=r"score_head.safetensors: holds .* the score head of this model is .* remove the file"):
        policy(other).params()


def test_the_definition_is_the_same_but_for_the_head(exported):
    there = policy(exported)
    assert there.model.config == there.sizes and dataclasses.replace(there.sizes, score_head=False) == read_config(exported)
