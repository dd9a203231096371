"""Parts of a model are read without the others."""

import jax
import numpy as np
from helpers.checkpoints import tiny_llava

from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.safetensors_dir import Tensor


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
