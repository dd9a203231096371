"""Which reference a run has, and what is refused because it would be another one than it says."""

import pytest

from mmalign_jax import losses
from mmalign_jax.config import from_mapping
from mmalign_jax.errors import UserError
from mmalign_jax.training.reference import Reference
from mmalign_jax.training.trainable import Trainable

ALL = frozenset({"vision_tower", "projector", "decoder"})
FULL, LORA, OLD_LORA = Trainable(frozenset({"vision_tower"})), Trainable(ALL), Trainable(ALL, adapter_off=False)
OWN = {"pairs": {"maker": "samples", "when": "online"}, "samples": {"scorers": ("exact",)}}
KERNEL, FACTOR = ("decoder", "layers", "kernel"), ("decoder", "layers", "lora_a")


def of(objective: str, kind: str = "auto", rule: Trainable = FULL, **settings) -> Reference:
    config = from_mapping({"objective": {"name": objective}, "reference": {"kind": kind}, **settings})
    return Reference.of(config, rule, losses.build(objective, **config.objective.hyperparameters))


@pytest.mark.parametrize(
    ("objective", "kind", "rule", "expected", "copies"),
    [
        ("dpo", "auto", FULL, "live", (True, False)),
        ("dpo", "live", FULL, "live", (True, False)),
        ("dpo", "auto", LORA, "adapter_off", (False, False)),
        ("dpo", "adapter_off", LORA, "adapter_off", (False, False)),
        # an adapter that goes on training is part of the reference
        ("dpo", "auto", OLD_LORA, "live", (False, True)),
        ("dpo", "ema", FULL, "ema", (True, True)),
        ("dpo", "ema", LORA, "ema", (False, True)),
        ("dpo", "cached", FULL, "cached", (False, False)),
        ("dpo", "none", FULL, "none", (False, False)),
        ("simpo", "auto", FULL, "none", (False, False)),
        ("simpo", "none", FULL, "none", (False, False)),
        ("mdpo", "cached", FULL, "cached", (False, False)),
    ],
)
def test_what_a_reference_is_made_of(objective, kind, rule, expected, copies):
    found = of(objective, kind, rule)
    assert found.kind == expected and (found.follow is not None) == (expected == "ema")
    assert found.free == (expected == "none" and objective == "dpo")
    assert found.copied(KERNEL) == copies[0]
    if rule is not FULL:
        assert found.copied(FACTOR) == copies[1]


def test_how_a_reference_follows():
    follow = of("dpo", "ema").follow
    assert (follow.share, follow.every) == (0.6, 512)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("simpo", "live"), {}, "config.reference.kind: simpo compares with no reference"),
        (("simpo", "cached"), {}, "config.reference.kind: simpo compares with no reference"),
        (("grpo", "none"), OWN, "grpo takes a divergence from the reference; set its weight to 0"),
        (("tdpo", "none"), {}, "reads the divergence"),
        (("dpo", "adapter_off"), {}, "nothing is adapted"),
        (("dpo", "adapter_off"), {"lora": {"rank": 4}}, "more than new low-rank factors trains"),
        (("tdpo", "cached"), {}, "reads the reference's whole distribution"),
        (("chip", "cached"), {}, "reads the reference's whole distribution"),
        (("kto", "cached"), {}, "scores answers of other rows"),
        (("povid", "cached"), {}, "what the policy says at that moment"),
        (("v_dpo", "cached"), {}, "without their images"),
        (("adpo", "cached"), {}, "depends on the policy"),
        (("dpo", "cached"), {"stop": {"kl_budget": 1.0}}, "config.stop.kl_budget: a cached reference"),
        (("mdpo", "cached"), {"train": {"redraw_views": "epoch"}}, "config.train.redraw_views: random_crop.* is drawn anew in every epoch"),
    ],
)
def test_what_is_refused_by_name(arguments, settings, message):
    with pytest.raises(UserError, match=message):
        of(*arguments, **settings)


def test_a_view_without_draws_may_be_cached_whatever_the_epoch():
    settings = {"objective": {"name": "image_dpo", "view": "gaussian_blur(6)"}, "train": {"redraw_views": "epoch"}, "reference": {"kind": "cached"}}
    config = from_mapping(settings)
    assert Reference.of(config, FULL, losses.build("image_dpo")).kind == "cached"


def test_online_pairs_cannot_be_cached_and_need_an_objective_that_reads_both_answers():
    online = {"pairs": {"maker": "bdhs", "when": "online"}}
    with pytest.raises(UserError, match="config.reference.kind: pairs that are made online cannot be cached"):
        from_mapping(online | {"reference": {"kind": "cached"}})
    with pytest.raises(UserError, match="config.pairs.when: image_dpo reads no rejected answers"):
        from_mapping(online | {"objective": {"name": "image_dpo"}})
