"""A step that reads the tower's features is the one that computes them, and they are read only where they are the tower's."""

import contextlib
import dataclasses
import errno
import io
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.arrays import none_stay
from helpers.checkpoints import tensors, tiny_llava
from helpers.families import KINDS, all_cases, one_a_kind
from helpers.tiny import FROZEN_TOWER, MIXED, noise_png, record
from safetensors.torch import save_file

from mmalign_jax import losses
from mmalign_jax.config import from_mapping
from mmalign_jax.data import feature_store
from mmalign_jax.data.device import to_device
from mmalign_jax.data.feature_store import FeatureStore, FeatureWriter
from mmalign_jax.data.loader import make_loader
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf.export import export
from mmalign_jax.hf.import_ import part_hash
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.losses import Need
from mmalign_jax.mesh import batch_divisor, make_mesh
from mmalign_jax.models.config import Lora
from mmalign_jax.report.console import Console
from mmalign_jax.sampling import DecodeOptions
from mmalign_jax.training import cache_key, kept_features
from mmalign_jax.training.branches import Side
from mmalign_jax.training.flops import Work, step_flops
from mmalign_jax.training.held_out import HeldOut
from mmalign_jax.training.kept_features import KeptFeatures
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.monitors import Monitor
from mmalign_jax.types import Media, record_key

KEY = jax.random.key(0)


def settings(directory, **groups):
    data = {"workers": 0} | groups.pop("data", {})
    return from_mapping({"train": {"batch_size": 4}, "features": {"cache": str(directory)}, "data": data} | groups)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("base"))


def one_device():
    return make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="module")
def policy(base):
    return Pretrained.read(base, one_device())


class Case:
    """A run up to training: its rows, and its features."""

    def __init__(self, policy, directory, records=MIXED, **groups):
        self.policy, self.records, self.config = policy, records, settings(directory, **groups)
        self.plan = plan_rows(records, policy.processor, self.config.data, answers=2)
        self.said = io.StringIO()

    def kept(self):
        return KeptFeatures.of(self.config, self.policy, Console(self.said))(self.records, self.plan)

    def batch(self, features=None, devices=0):
        """The rows `[B, ...]` of the first step."""
        options = {"batch_size": self.config.train.batch_size, "workers": 0, "devices": devices, "order": self.config.data.order}
        loader = make_loader(self.records, self.policy.processor, self.plan, **options, features=features)
        return jax.tree.map(lambda x: x[0], next(loader))


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


def both_ways(some, run, devices=0, tower=False):
    """What a function of (trainable, frozen, reference's, rows) gives of rows with pixels and of rows with features.

    Where rows bring features, there is no tower to compute them with, unless black pictures need it.
    """
    mesh, out = some.policy.mesh, []
    with jax.set_mesh(mesh):
        params, frozen = FROZEN_TOWER.split(some.policy.params())
        theirs = jax.tree.map(lambda x: x * np.float32(1.01), params)
        for features in (None, some.kept()):
            rows = some.batch(features, devices)
            assert (rows.images is None) == (features is not None)
            held = frozen if features is None or tower else {part: tree for part, tree in frozen.items() if part != "vision_tower"}
            out.append(jax.device_get(jax.jit(run)(params, held, theirs, to_device(rows, mesh, batch_axis=0))))
    return out


def value_metrics_and_gradient(loss):
    return lambda params, *others: jax.value_and_grad(loss, has_aux=True)(params, *others, KEY)


def assert_same(pixels, features):
    (value, metrics), grads = pixels
    (other_value, others), other_grads = features
    assert abs(metrics["chosen_drift"]) > 1e-2 and metrics.keys() == others.keys()
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    for name in metrics:
        # rewards are differences of two sums of about 60
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5, atol=2e-5, err_msg=name)
    alike = lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-5 * np.abs(a).max() + 1e-7)  # noqa: E731
    jax.tree.map(alike, grads, other_grads)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(other_grads["projector"]))


def test_loss_metrics_and_gradient_are_those_of_pixels_without_a_tower(policy, cache):
    some = Case(policy, cache)
    assert_same(*both_ways(some, value_metrics_and_gradient(LossFunction(policy.model, losses.build("dpo", beta=1.0)))))
    assert "those of 2 pictures in" in some.said.getvalue() and "are reused" in some.said.getvalue() and "Computing" not in some.said.getvalue()


@pytest.mark.nightly
def test_an_objective_that_also_sees_black_pictures(policy, cache):
    """They are made without pixels."""
    objective = losses.build("v_dpo", beta=1.0, guidance=0.5, bias_weight=0.5)
    some = Case(policy, cache, objective={"name": "v_dpo"})
    pixels, features = both_ways(some, value_metrics_and_gradient(LossFunction(policy.model, objective)), tower=True)
    assert_same(pixels, features)
    plain = both_ways(some, value_metrics_and_gradient(LossFunction(policy.model, losses.build("dpo", beta=1.0))))[1]
    assert abs(plain[0][0] - features[0][0]) > 1e-2


def test_features_are_the_towers_own_numbers(policy, cache):
    some = Case(policy, cache)
    batch, rows = some.batch(), some.batch(some.kept())
    with jax.set_mesh(policy.mesh):
        expected = jax.jit(policy.model.tower)(policy.params(), to_device(batch.images, policy.mesh, batch_axis=0))
    assert rows.features.dtype == expected.dtype and rows.features.shape == expected.shape
    count = {record_key(one.id): policy.sizes.tower_tile * len(one.media) for one in MIXED}
    for key, ours, theirs in zip(rows.record_key, rows.features, np.asarray(expected), strict=True):
        held = count[int(key)]
        np.testing.assert_array_equal(ours[:held], theirs[:held])  # the same program, the same bits
        assert not ours[held:].any()


# two rows of each of four sets of the same two pictures
FOUR = (*MIXED[:2], MIXED[3], record("turned", "What?", "A red cat.", "No, a dog.", images=[2, 1]))
EIGHT = [dataclasses.replace(one, id=f"{one.id} {half}") for one in FOUR for half in range(2)]


@pytest.mark.nightly
def test_eight_devices_and_pictures_that_rows_share(base, cache):
    """The features of one device serve."""
    some = Case(Pretrained.read(base, make_mesh(2, 2, 2)), cache, EIGHT, data={"order": "by_image"}, train={"batch_size": 8})
    loss = LossFunction(some.policy.model, losses.build("dpo", beta=1.0))
    devices = batch_divisor(some.policy.mesh)
    assert some.batch(some.kept(), devices).features.shape[0] == 4 and some.batch(some.kept(), devices).picture.shape == (4, 2)
    assert_same(*both_ways(some, value_metrics_and_gradient(loss), devices))
    assert "Computing" not in some.said.getvalue()


@pytest.mark.nightly
def test_eight_devices_write_what_one_does(base, cache, tmp_path):
    some = Case(Pretrained.read(base, make_mesh(2, 2, 2)), tmp_path, EIGHT, train={"batch_size": 8})
    some.kept()
    one, eight = FeatureStore(cache), FeatureStore(tmp_path)
    assert one.key == eight.key and len(one) == len(eight) == 2
    for picture in pictures(cache):
        np.testing.assert_allclose(eight.read(picture), one.read(picture), rtol=1e-5, atol=1e-6)


def pictures(directory):
    """Digests of the pictures of a store, in the order in which they were added."""
    files = sorted(directory.glob("part-*.json"), key=lambda file: file.stat().st_mtime_ns)
    parts = [json.loads(file.read_text()) for file in files]
    return [bytes.fromhex(digest) for part in parts for digest in part["pictures"]]


@pytest.mark.nightly
def test_what_is_measured_beside_the_step_is_the_same(policy, cache):
    """The monitor, which sees black pictures, too; and rewards of held-out pairs."""
    some = Case(policy, cache)
    monitor = Monitor(policy.model, DecodeOptions(4, temperature=0.0, stop_ids=policy.processor.eos_ids))
    loss, found = LossFunction(policy.model, losses.build("dpo", beta=1.0)), []
    with jax.set_mesh(policy.mesh):
        params, frozen = FROZEN_TOWER.split(policy.params())
        theirs = jax.tree.map(lambda x: x * np.float32(1.01), params)
        measure = jax.jit(monitor)
        for features in (None, some.kept()):
            rows = to_device(some.batch(features), policy.mesh, batch_axis=0)
            options = {"batch_size": 4, "workers": 0, "features": features}
            held_out = HeldOut(MIXED, policy.processor, some.plan, loss, policy.mesh, **options)(params, frozen, theirs, KEY)
            found.append({"monitor": jax.device_get(measure(params, frozen, theirs, rows, KEY)), "held out": held_out})
    assert abs(found[0]["monitor"]["monitor/image_gain"]) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5) if not isinstance(a, str) else None, *found)


def test_the_tower_is_not_counted(policy, cache):
    some = Case(policy, cache)
    work = Work.of(losses.build("dpo"), live_reference=True)
    pixels, features = (step_flops(policy.sizes, jax.tree.map(lambda x: x[None], some.batch(way)), work=work, freeze=("vision_tower",))
                        for way in (None, some.kept()))  # fmt: skip
    blank = dataclasses.replace(some.batch(), images=some.batch().images[:, :0])
    assert features < pixels
    assert features == step_flops(policy.sizes, jax.tree.map(lambda x: x[None], blank), work=work, freeze=("vision_tower",))
    # of black pictures, one tile in the place of two
    blind = Work.of(losses.build("v_dpo"), live_reference=True)
    one = dataclasses.replace(some.batch(), images=some.batch().images[:, :1])
    rows = jax.tree.map(lambda x: x[None], one)
    tower = step_flops(policy.sizes, rows, work=work, freeze=("vision_tower",)) - features
    more = lambda batch: step_flops(policy.sizes, jax.tree.map(lambda x: x[None], batch), work=blind, freeze=("vision_tower",))  # noqa: E731
    assert tower > 0 and more(one) - more(some.batch(some.kept())) == pytest.approx(tower)


@pytest.mark.parametrize("name", one_a_kind(KINDS[:1]))
def test_families(name, tmp_path):
    """Features in the place of the tower's, also of black pictures, whatever pictures take."""
    case = all_cases()[name]
    policy = Pretrained.read(case.write(tmp_path / "base", 2), one_device())
    some = Case(policy, tmp_path / "cache", case.records, data={"buckets": 1}, train={"batch_size": len(case.records)})
    model, kept = policy.model, some.kept()
    with jax.set_mesh(policy.mesh):
        params = policy.params()
        see = jax.jit(lambda params, rows: model.project(params, Side(model, params).tower(rows)))
        black = jax.jit(lambda params, rows: model.project(params, model.tower_of_black(params, rows.features, rows.patches)))
        pixels, rows = some.batch(), some.batch(kept)
        assert rows.images is None and rows.features.shape[-1] == policy.sizes.tower_width
        blind = pixels.with_images(jnp.zeros_like(pixels.images))
        for theirs, ours in ((see(params, pixels), see(params, rows)), (see(params, blind), black(params, rows))):
            here, index = pixels.image_index >= 0, np.maximum(pixels.image_index, 0)[..., None]
            theirs, ours = (np.take_along_axis(np.asarray(x), index, axis=1)[here] for x in (theirs, ours))
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


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


def changed(base, directory, name, change):
    shutil.copytree(base, directory)
    file = directory / name
    data = file.read_bytes()
    file.write_bytes(change(data))
    assert file.read_bytes() != data
    return directory


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


@pytest.mark.nightly
def test_bfloat16(base, tmp_path):
    policy = Pretrained.read(base, one_device(), "bfloat16")
    some = Case(policy, tmp_path)
    kept = some.kept()
    assert kept.store.dtype == jnp.bfloat16 and some.batch(kept).features.dtype == jnp.bfloat16
    loss = LossFunction(policy.model, losses.build("dpo", beta=1.0))
    (pixels, _), (features, _) = both_ways(some, lambda params, *others: loss(params, *others, KEY))
    np.testing.assert_allclose(features, pixels, rtol=1e-2)


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


@pytest.mark.parametrize(("groups", "words"), [
    ({"model": {"freeze": ("decoder",)}}, "config.model.freeze: the vision tower trains"),
    ({"lora": {"rank": 2, "parts": ("decoder", "vision_tower")}}, "config.lora.parts: the vision tower has factors that train"),
    ({"objective": {"name": "mdpo"}}, r"config.objective.name: mdpo also sees corrupted pictures \(random_crop"),
    ({"objective": {"name": "adpo"}}, "config.objective.name: adpo also sees corrupted pictures"),
    ({"objective": {"name": "povid"}}, "config.objective.name: povid also sees corrupted pictures"),
    ({"pairs": {"maker": "bdhs", "when": "online"}}, "config.pairs.when: pairs that are made online"),
])  # fmt: skip
def test_settings_that_need_pixels_or_another_tower_are_refused_by_name(groups, words):
    with pytest.raises(UserError, match=f"^{words}.*leave config.features.cache empty"):
        settings("somewhere", **groups)
    assert settings("", **groups).features.cache == ""


def test_every_objective_is_refused_or_reads_a_rows_own_pictures_alone():
    for name in losses.names():
        objective = losses.build(name)
        seen = {Need.OTHER_IMAGE, Need.SELF_REJECTED} & objective.needs
        assert bool(seen) == bool(objective.other_pictures), name


def test_an_adapter_with_factors_in_the_tower_is_refused(policy, tmp_path):
    sizes = policy.sizes.with_lora({"vision_tower": Lora(2, 4.0, ("query",))})
    config = settings(tmp_path, model={"adapter": str(tmp_path)})
    with pytest.raises(UserError, match="config.model.adapter: the adapter has factors in the vision tower"):
        KeptFeatures.of(config, dataclasses.replace(policy, sizes=sizes), Console(enabled=False))
    assert KeptFeatures.of(settings(""), policy, Console(enabled=False)) is None
