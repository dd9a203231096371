"""FLOPs of a step against the rule of thumb of 2 N a token, and their parts against each other."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.jaxprs import product_flops
from helpers.tiny import MIXED, Tiny, batch_of
from jax.interpreters.partial_eval import dce_jaxpr

from mmalign_jax import losses
from mmalign_jax.data.packing import PackedShape
from mmalign_jax.models.config import Lora
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.params import abstract_params
from mmalign_jax.models.presets import preset
from mmalign_jax.training.flops import Work, mfu, step_flops
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.packed import packed_flops
from mmalign_jax.training.trainable import Trainable
from mmalign_jax.types import PairBatch

SIZES = preset("llava-1.5-7b")
TOWER = ("vision_tower",)


def batch(rows, prefix=640, answer=128, images=1):
    slots = prefix + 2 * answer
    empty = np.zeros((1, rows, slots), np.int32)
    pixels = jax.ShapeDtypeStruct((1, rows, images, 336, 336, 3), np.uint8)
    key = np.zeros((1, rows), np.uint32)
    return PairBatch(empty, empty, empty, pixels, empty, empty.astype(np.float32), key, key.astype(np.float32), prefix, answer)


def flops(some, reference=True, other_image=False, freeze=TOWER):
    return step_flops(SIZES, some, work=Work(reference, int(other_image)), freeze=freeze)


def test_near_eight_times_parameters_times_tokens():
    """Forward 2, backward 4 and reference 2; the embedding costs nothing, and the head counts at answers only."""
    layers = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(SIZES)["decoder"]["layers"]))
    text = flops(batch(1, images=0))
    assert 1.0 < text / (8 * layers * 896) < 1.05
    tower = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(SIZES)["vision_tower"]["layers"]))
    assert 1.0 < (flops(batch(1)) - text) / (2 * tower * 577) < 1.15


def test_what_costs_more():
    one = flops(batch(1))
    np.testing.assert_allclose(flops(batch(4)), 4 * one)
    text = flops(batch(1, images=0))
    np.testing.assert_allclose(flops(batch(1, images=0), reference=False), text * 6 / 8)
    assert flops(batch(1), other_image=True) > 1.7 * one
    assert flops(batch(1), freeze=()) > one


@pytest.mark.parametrize(("freeze", "share"), [(("vision_tower", "decoder"), 6 / 8), (("vision_tower", "projector", "decoder"), 4 / 8)])
def test_a_frozen_decoder_still_carries_gradients_to_what_trains_below(freeze, share):
    some = batch(1, images=0)
    # attention has no weights, so none of it is spared
    np.testing.assert_allclose(flops(some, freeze=freeze), share * flops(some), rtol=0.01)


def lora_flops(some, parts=(), freeze=("vision_tower", "projector", "decoder")):
    sizes = SIZES.with_lora({part: Lora(16, 16.0, ("query", "down")) for part in parts})
    return step_flops(sizes, some, work=Work(reference=True), freeze=freeze)


def test_lora_carries_the_gradient_and_has_none_for_the_weights():
    text, picture = batch(1, images=0), batch(1)
    for freeze in (("vision_tower", "projector", "decoder"), ("vision_tower", "decoder")):
        np.testing.assert_allclose(lora_flops(text, ["decoder"], freeze), 6 / 8 * flops(text), rtol=0.01)
    # a tower with factors is computed for policy and for reference, and once more for the gradient
    tower = [lora_flops(picture, parts) - lora_flops(text, parts) for parts in ((), ["vision_tower"])]
    np.testing.assert_allclose(tower[1], 3 * tower[0], rtol=0.05)


def test_pictures_that_rows_share_count_once():
    four = batch(4)
    shared = dataclasses.replace(four, images=batch(2).images, picture=np.array([[[0, 0, 1, 1]]]))
    tower = (flops(four) - flops(batch(4, images=0))) / 4
    np.testing.assert_allclose(flops(four) - flops(shared), 2 * tower, rtol=1e-6)
    # under a view, every row has its own
    with_other = lambda some: flops(some, other_image=True) - flops(some)  # noqa: E731
    np.testing.assert_allclose(with_other(four), with_other(shared))


def test_a_tower_whose_features_rows_bring_does_not_count():
    four = batch(4)
    features = jax.ShapeDtypeStruct((1, 2, SIZES.tower_tile, SIZES.tower_width), np.float32)
    brought = dataclasses.replace(four, images=None, features=features, picture=np.array([[[0, 0, 1, 1]]]))
    assert flops(brought) == flops(batch(4, images=0))


def test_rows_of_several_pairs_count_as_rows():
    """And their pictures once, however they are spread over the rows."""
    shape = PackedShape(rows=3, prefix_slots=2000, answer_slots=400, tiles=7, longest=(2000, 400))
    found = packed_flops(SIZES, shape, 2, work=Work(True), freeze=TOWER)
    text = flops(batch(3, 2000, 400, images=0))
    np.testing.assert_allclose(found - text, 7 * (flops(batch(1)) - flops(batch(1, images=0))), rtol=1e-6)
    # the slots of one long row are more work than those of two short ones: it is attention that grows
    half = packed_flops(SIZES, PackedShape(6, 1000, 200, 7, (1000, 200)), 2, work=Work(True), freeze=TOWER)
    assert half < found < 1.2 * half
    # what is too far apart to be of one pair is not computed
    near = packed_flops(SIZES, dataclasses.replace(shape, longest=(500, 100)), 2, work=Work(True), freeze=TOWER)
    assert half < near < found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


# beside the answers under the row's own pictures: nothing, another row's answer, corrupted pictures, black ones, what is said under corrupted ones,
# adversarial ones, another data set, the whole vocabulary
OBJECTIVES = {"sft": {}, "simpo": {}, "kto": {}, "mdpo": {}, "povid": {"view": "black"}, "adpo": {}, "ha_dpo": {}, "tdpo": {}}
BLIND = {"bias_weight": 0.5}  # the reference sees black pictures, too
EVERYTHING = ("vision_tower", "projector", "decoder")
SETTINGS = [
    *((name, given, TOWER, ()) for name, given in OBJECTIVES.items()),
    *(("v_dpo", given, freeze, ()) for given in ({}, BLIND) for freeze in (TOWER, ())),
    *((name, OBJECTIVES[name], (), ()) for name in ("mdpo", "povid", "adpo")),
    ("simpo", {}, ("vision_tower", "decoder"), ()),
    ("simpo", {}, ("decoder",), ()),
    ("simpo", {}, EVERYTHING, ("decoder",)),
    ("mdpo", {}, EVERYTHING, ("vision_tower", "decoder")),
]


@pytest.mark.parametrize(("name", "hyperparameters", "freeze", "lora"), SETTINGS, ids=str)
def test_the_formula_counts_the_products_of_the_step(tiny, name, hyperparameters, freeze, lora):
    """But for the projector's, low-rank factors', and scores that the backward pass computes again. The tower is as much work as the decoder."""
    config = dataclasses.replace(tiny.config, vision=dataclasses.replace(tiny.config.vision, width=64, mlp_width=256))
    config = config.with_lora({part: Lora(1, 1.0, ("query",)) for part in lora})
    loss = LossFunction(Mllm(config, tiny.processor.mean, tiny.processor.std, remat="none"), losses.build(name, **hyperparameters))
    rows = batch_of(MIXED, tiny.processor, answers=loss.objective.answers)
    if name == "ha_dpo":
        rows = dataclasses.replace(rows, auxiliary=batch_of(MIXED[::-1], tiny.processor, answers=1))
    params, frozen = Trainable(frozenset(freeze)).split(abstract_params(config))
    reference = params if loss.reads_reference else None
    step = lambda params, frozen, reference: jax.value_and_grad(loss, has_aux=True)(params, frozen, reference, rows, jax.random.key(0))  # noqa: E731
    jaxpr = jax.make_jaxpr(step)(params, frozen, reference).jaxpr
    computed = product_flops(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])
    found = step_flops(config, rows, work=Work.of(loss.objective, live_reference=reference is not None), freeze=freeze)
    assert 0.94 < found / computed < 0.99


def test_updates_count_what_the_policy_changes():
    """Further updates are steps without a reference, and without a tower that does not train; who drew samples scores them once."""
    picture, text = batch(1), batch(1, images=0)
    of = lambda some, freeze=TOWER, **work: step_flops(SIZES, some, work=Work(**work), freeze=freeze)  # noqa: E731
    np.testing.assert_allclose(of(picture, reference=True, updates=3), of(picture, reference=True) + 2 * of(text))
    np.testing.assert_allclose(of(picture, freeze=(), reference=True, updates=3), of(picture, (), reference=True) + 2 * of(picture, ()))
    np.testing.assert_allclose(of(text, drawn=True), of(text, reference=True))
    objective = losses.build("grpo")
    assert [Work.of(objective, live_reference=True, **how).drawn for how in ({}, {"updates": 2}, {"older_policy": True})] == [False, True, True]
    assert not Work.of(losses.build("dpo"), live_reference=True, updates=2).drawn


def test_mfu_is_not_guessed_for_an_unknown_device():
    assert mfu(1e12, 1.0) is None
