"""A step that reads the tower's features is the one that computes them, and settings that need the tower are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.families import KINDS, all_cases, one_a_kind
from helpers.kept_features import EIGHT, Case, one_device, settings
from helpers.tiny import FROZEN_TOWER, MIXED

from mmalign_jax import losses
from mmalign_jax.data.device import to_device
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.losses import Need
from mmalign_jax.mesh import batch_divisor, make_mesh
from mmalign_jax.models.config import Lora
from mmalign_jax.report.console import Console
from mmalign_jax.sampling import DecodeOptions
from mmalign_jax.training.branches import Side
from mmalign_jax.training.flops import Work, step_flops
from mmalign_jax.training.held_out import HeldOut
from mmalign_jax.training.kept_features import KeptFeatures
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.monitors import Monitor
from mmalign_jax.types import record_key

KEY = jax.random.key(0)


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
    # differences of two sums of about 60: the last bit of features moves them by some 4e-6
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    for name in metrics:
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

    def alike(path, a, b):
        if not isinstance(a, str):
            # a correlation of four rewards, which the last bit of features moves by 6e-5
            atol = 2e-4 if "length_correlation" in str(path) else 1e-5
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=atol, err_msg=str(path))

    jax.tree_util.tree_map_with_path(alike, *found)


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


@pytest.mark.nightly
def test_bfloat16(base, tmp_path):
    policy = Pretrained.read(base, one_device(), "bfloat16")
    some = Case(policy, tmp_path)
    kept = some.kept()
    assert kept.store.dtype == jnp.bfloat16 and some.batch(kept).features.dtype == jnp.bfloat16
    loss = LossFunction(policy.model, losses.build("dpo", beta=1.0))
    (pixels, _), (features, _) = both_ways(some, lambda params, *others: loss(params, *others, KEY))
    np.testing.assert_allclose(features, pixels, rtol=6e-2)  # the last bit of features moves it by 2e-2


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
