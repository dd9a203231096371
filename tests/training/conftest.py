"""A tiny policy, and its tower's features on disk, for the tests of `training.kept_features` and its key; other files here have their own."""

import re

import pytest
from helpers.arrays import none_stay
from helpers.checkpoints import tiny_llava
from helpers.kept_features import Case, one_device

from mmalign_jax.hf.pretrained import Pretrained


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def policy(base):
    return Pretrained.read(base, one_device())


@pytest.fixture(scope="module")
def cache(policy, tmp_path_factory):
    """The features of `MIXED`, whose two pictures are shown by three rows. It is not changed."""
    directory = tmp_path_factory.mktemp("cache")
    some = Case(policy, directory)
    with none_stay():  # no parameter is kept
        some.kept()
    said = some.said.getvalue()
    assert re.search(r"those of 0 of 2 pictures are reused; those of 2 pictures take [\d.e-]+ GiB, and .* has [\d.]+ GiB free", said)
    assert "Computing vision features: done" in said
    return directory
