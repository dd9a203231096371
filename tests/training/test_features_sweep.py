"""Features are computed once, picture by picture, by one run at a time, and what cannot be kept is told."""

import contextlib
import dataclasses
import errno
import shutil
import types

import jax
import numpy as np
import pytest
from helpers.checkpoints import tensors
from helpers.kept_features import EIGHT, Case, changed, one_device, pictures, settings
from helpers.tiny import MIXED, noise_png, record
from safetensors.torch import save_file

from mmalign_jax.data import feature_store
from mmalign_jax.data.feature_store import FeatureStore, FeatureWriter
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.mesh import make_mesh
from mmalign_jax.report.console import Console
from mmalign_jax.training import kept_features
from mmalign_jax.training.kept_features import KeptFeatures
from mmalign_jax.types import Media


@pytest.mark.nightly
def test_eight_devices_write_what_one_does(base, cache, tmp_path):
    some = Case(Pretrained.read(base, make_mesh(2, 2, 2)), tmp_path, EIGHT, train={"batch_size": 8})
    some.kept()
    one, eight = FeatureStore(cache), FeatureStore(tmp_path)
    assert one.key == eight.key and len(one) == len(eight) == 2
    for picture in pictures(cache):
        np.testing.assert_allclose(eight.read(picture), one.read(picture), rtol=1e-5, atol=1e-6)


def test_only_pictures_that_are_not_there_are_computed(policy, cache, tmp_path):
    """Whichever records show them, in whatever company."""
    shutil.copytree(cache, tmp_path / "cache")
    again = Case(policy, tmp_path / "cache", [record("new", "What?", "A cat.", "A dog.", images=[2, 1])], train={"batch_size": 1})
    again.kept()
    assert "those of 2 pictures in" in again.said.getvalue() and "Computing" not in again.said.getvalue()
    more = [*MIXED, record("more", "What?", "A cat.", "A dog.", images=[3, 1]), record("last", "What?", "A cat.", "A dog.", images=[3])]
    grown = Case(policy, tmp_path / "cache", more)
    kept = grown.kept()
    assert "those of 2 of 3 pictures are reused; those of 1 pictures take" in grown.said.getvalue()
    assert len(kept.store) == 3 and len(FeatureStore(cache)) == 2
    for picture in pictures(cache):
        np.testing.assert_array_equal(kept.store.read(picture), FeatureStore(cache).read(picture))


def test_a_set_of_texts_has_a_cache_without_pictures(policy, tmp_path):
    some = Case(policy, tmp_path, MIXED[2:3], train={"batch_size": 1})
    kept = some.kept()
    assert len(kept.store) == 0 and not some.batch(kept).features.any()


def test_a_sweep_that_was_killed_goes_on_where_it_was(policy, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "PART_BYTES", 1)
    add = FeatureWriter.add

    def killed(writer, picture, features):
        if pictures(tmp_path):
            raise KeyboardInterrupt
        add(writer, picture, features)

    monkeypatch.setattr(FeatureWriter, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        Case(policy, tmp_path, features={"cache": str(tmp_path), "batch_size": 1}).kept()
    monkeypatch.setattr(FeatureWriter, "add", add)
    (there,) = pictures(tmp_path)
    again = Case(policy, tmp_path)
    kept = again.kept()
    assert "those of 1 of 2 pictures are reused; those of 1 pictures take" in again.said.getvalue()
    assert pictures(tmp_path)[0] == there and sorted(pictures(tmp_path)) == sorted(pictures(cache))
    for picture in pictures(cache):
        np.testing.assert_allclose(kept.store.read(picture), FeatureStore(cache).read(picture), rtol=1e-5, atol=1e-6)


def test_pictures_that_another_run_adds_meanwhile_are_not_computed(policy, cache, tmp_path, monkeypatch):
    """And take the room that it says is not there."""
    monkeypatch.setattr(kept_features.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    some = Case(policy, tmp_path / "cache")

    @contextlib.contextmanager
    def claimed(directory, waiting):
        waiting()
        shutil.copytree(cache, tmp_path / "cache")
        yield True

    monkeypatch.setattr(kept_features, "claimed", claimed)
    assert len(some.kept().store) == 2
    assert f"Another run adds to {tmp_path / 'cache'}; waiting for it" in some.said.getvalue() and "Computing" not in some.said.getvalue()


def test_few_rows_at_a_time(policy):
    rows = lambda **groups: KeptFeatures.of(settings("x", **groups), policy, Console(enabled=False)).rows  # noqa: E731
    assert rows(train={"batch_size": 256}) == 4 and rows(train={"batch_size": 2}) == 2
    assert rows(train={"batch_size": 256}, features={"cache": "x", "batch_size": 32}) == 32


def test_a_directory_of_something_else_is_not_written_to(base, policy, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    before = sorted(model.iterdir())
    with pytest.raises(UserError, match=r"config.features.cache: .*model holds other files \(.*, \.\.\.\) and no vision features \(no key.json\)"):
        Case(policy, model).kept()
    assert sorted(model.iterdir()) == before


def two_processes(monkeypatch, first):
    """What one of two sees. first: what is missing here -> what the first process finds missing."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(kept_features, "from_first", first)


def test_nothing_is_locked_where_nothing_is_missing(policy, cache, tmp_path, monkeypatch):
    def claimed(directory, waiting):
        raise PermissionError(errno.EACCES, "Permission denied", str(directory))

    monkeypatch.setattr(kept_features, "claimed", claimed)
    with pytest.raises(UserError, match="config.features.cache: .*cache cannot be written .*; make it writable, or choose another directory"):
        Case(policy, tmp_path / "cache").kept()
    two_processes(monkeypatch, lambda missing: missing)
    assert len(Case(policy, cache).kept().store) == 2


def test_what_another_process_has_written_may_be_seen_late(policy, cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / "cache")
    (list_of_part,) = (tmp_path / "cache").glob("part-*.json")
    list_of_part.rename(tmp_path / "later")
    two_processes(monkeypatch, np.zeros_like)
    monkeypatch.setattr(kept_features.time, "sleep", lambda _: (tmp_path / "later").rename(list_of_part))
    assert len(Case(policy, tmp_path / "cache").kept().store) == 2
    monkeypatch.setattr(kept_features, "SEEN_S", 0.0)
    list_of_part.rename(tmp_path / "later")
    with pytest.raises(DataError, match="the features of 2 of 2 pictures are not there, though .* Start the run again") as caught:
        Case(policy, tmp_path / "cache").kept()
    assert caught.value.file == str(tmp_path / "cache")


def test_a_picture_over_the_limits_is_refused_though_it_is_kept(policy, cache):
    limit = {"workers": 0, "max_image_pixels": 100}
    with pytest.raises(DataError, match="row red: the image is .*, over the limit of 100 pixels"):
        Case(policy, cache, data=limit).kept()


def test_a_file_is_no_directory(policy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="config.features.cache: .*file is not a directory"):
        Case(policy, tmp_path / "file").kept()


def test_no_room_is_told_before_anything_is_computed(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_features.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    some = Case(policy, tmp_path / "new" / "cache")
    with pytest.raises(UserError, match=r"config.features.cache: no room. .* those of 2 pictures take .* GiB free; choose"):
        some.kept()
    assert not (tmp_path / "new/cache/key.json").exists() and "Computing" not in some.said.getvalue()


def test_features_that_are_not_finite_are_not_kept(base, tmp_path):
    weights = tensors(base)
    broken = changed(base, tmp_path / "broken", "config.json", lambda data: data + b"\n")
    name = next(name for name in weights if "patch_embedding.weight" in name)
    save_file(weights | {name: weights[name] * float("inf")}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="record red: the vision tower's features are not finite"):
        Case(Pretrained.read(broken, one_device()), tmp_path / "cache").kept()
    assert not pictures(tmp_path / "cache")


def test_a_picture_that_cannot_be_decoded_is_told_and_the_others_are_kept(policy, tmp_path):
    bad = dataclasses.replace(MIXED[0], id="bad", media=(Media("image", noise_png(5)[:-40]),))
    some = Case(policy, tmp_path, [MIXED[3], bad], features={"cache": str(tmp_path), "batch_size": 1}, train={"batch_size": 1})
    with pytest.raises(DataError, match="bad"):
        some.kept()
    assert len(pictures(tmp_path)) == 1
