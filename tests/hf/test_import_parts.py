"""Parts of a model are read without the others, and large leaves a layer at a time."""

import jax
import numpy as np
from helpers.checkpoints import tiny_llava

from mmalign_jax.hf import import_
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.safetensors_dir import Tensor
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.params import param_shardings


def test_only_the_parts_that_are_asked_for_are_read(tmp_path, monkeypatch):
    directory = tiny_llava(tmp_path)
    config, reads = read_config(directory), []
    read = Tensor.read
    monkeypatch.setattr(Tensor, "read", lambda tensor: reads.append(tensor.start) or read(tensor))
    whole = load_params(directory, config)
    everything = sorted(reads)
    found, apart = {}, []
    for part in whole:
        reads.clear()
        found |= load_params(directory, config, wanted=lambda path, part=part: path[0] == part)
        assert reads
        apart += reads
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    assert sorted(apart) == everything
    reads.clear()
    assert load_params(directory, config, wanted=lambda path: False) == {} and not reads


def test_layers_that_do_not_fit_on_the_host_together_arrive_one_by_one(tmp_path, monkeypatch):
    base = tiny_llava(tmp_path, text={"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2})
    config = read_config(base)
    mesh = make_mesh(2, 4, 1)
    shardings = param_shardings(config, mesh)
    expected, sharded = load_params(base, config), load_params(base, config, shardings)
    monkeypatch.setattr(import_, "STACK_BYTES", 0)
    largest = []
    place = import_.place
    monkeypatch.setattr(import_, "place", lambda host, sharding: largest.append(host.size) or place(host, sharding))
    streamed, alone = load_params(base, config, shardings), load_params(base, config)
    for one, other, reference in zip(*map(jax.tree.leaves, (streamed, alone, expected)), strict=True):
        np.testing.assert_array_equal(one, reference)
        np.testing.assert_array_equal(other, reference)
    assert jax.tree.map(lambda x: x.sharding, streamed) == jax.tree.map(lambda x: x.sharding, sharded)
    # no more than the largest tensor of the files, which is the embedding
    assert max(largest) == config.decoder.vocab_size * 32
