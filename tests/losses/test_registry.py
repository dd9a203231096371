"""Objectives by name: their hyper-parameters, what they need, and how mistakes are named."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.branch_stats import golden, golden_other_image, random_stats, with_leaf

from mmalign_jax import losses
from mmalign_jax.errors import UserError
from mmalign_jax.losses import AnswerLogps, BranchStats, Need

R = Need.REFERENCE


@pytest.mark.parametrize(
    ("name", "needs", "answers", "other_answers", "view"),
    [
        ("sft", set(), 1, 0, ""),
        ("simpo", set(), 2, 0, ""),
        ("orpo", set(), 2, 0, ""),
        ("dpo", {R}, 2, 0, ""),
        ("mdpo", {R, Need.OTHER_IMAGE}, 2, 1, "random_crop"),
        ("image_dpo", {R, Need.OTHER_IMAGE}, 1, 1, "gaussian_blur(6)"),
        ("adpo", {R, Need.OTHER_IMAGE, Need.TOKENS}, 2, 2, "pgd(2,10)"),
        ("povid", {R, Need.SELF_REJECTED}, 2, 0, "diffusion(500)"),
        ("kto", {R, Need.MISMATCHED, Need.BATCH}, 2, 0, ""),
        ("bco", {R, Need.BATCH}, 2, 0, ""),
        ("v_dpo", {R, Need.NO_IMAGE}, 2, 0, ""),
        ("tdpo", {R, Need.KL}, 2, 0, ""),
        ("wpo", {R, Need.COLLISION}, 2, 0, ""),
        ("ddpo", {R, Need.TOKENS, Need.CHANGED}, 2, 0, ""),
        ("chip", {R, Need.TOKENS, Need.CHANGED, Need.KL, Need.OTHER_IMAGE}, 2, 1, "diffusion(500)"),
        ("mm_dpo", {R, Need.MARGIN}, 2, 0, ""),
        ("dama", {R, Need.MARGIN, Need.BATCH}, 2, 0, ""),
        ("ha_dpo", {R, Need.AUXILIARY}, 2, 0, ""),
        ("reward_model", {Need.SCORES}, 2, 0, ""),
        ("kto_unpaired", {R, Need.LABELS, Need.MISMATCHED, Need.BATCH}, 1, 0, ""),
        ("pl_dpo", {R, Need.REWARDS}, 1, 0, ""),
    ],
)
def test_needs(name, needs, answers, other_answers, view):
    objective = losses.build(name)
    assert (objective.needs, objective.answers, objective.other_answers, objective.view) == (needs, answers, other_answers, view)


def test_what_has_weight_0_is_not_needed():
    assert losses.build("mdpo", image_weight=0.0).needs == {R}
    assert losses.build("mdpo", image_weight=0.0).view == ""
    assert losses.build("v_dpo", guidance=0.0).needs == {R}
    assert losses.build("dpo", beta_by_epoch=(0.1,)).needs == {R, Need.EPOCH}
    with pytest.raises(UserError, match="all terms of orpo have weight 0"):
        losses.build("orpo", odds_weight=0.0, nll_weight=0.0)


@pytest.mark.parametrize("name", losses.names())
def test_whatever_an_objective_declares_is_missed_when_it_is_not_there(name):
    objective = losses.build(name)
    stats = random_stats(objective)
    objective(stats)
    fields = {Need.OTHER_IMAGE: "other_image", Need.AUXILIARY: "auxiliary_nll"}
    for need in objective.needs - {Need.BATCH, R, Need.TOKENS, Need.CHANGED}:
        with pytest.raises(ValueError, match=f"^{name} needs.*{need.value}"):
            objective(dataclasses.replace(stats, **{fields.get(need, need.value): None}))
    parts = [part for part in ("answers", "other_image", "self_rejected", "mismatched") if getattr(stats, part) is not None]
    for need, leaf in ((R, "reference"), (Need.TOKENS, "policy_tokens"), (Need.TOKENS, "token_weight"), (Need.CHANGED, "changed")):
        # the corrupted image's answers are read by whole sums where no term says otherwise
        for part in parts if need in objective.needs and need == R else (["answers"] if need in objective.needs and name != "adpo" else []):
            with pytest.raises(ValueError, match=f"^{name} needs {need.value}"):
                objective(with_leaf(stats, f"{part}.{leaf}", None))


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        ("dpo", "answers.reference", "dpo needs reference"),
        ("mdpo", "other_image.reference", "mdpo needs reference of other_image"),
        ("kto", "mismatched.reference", "kto needs reference of mismatched"),
        ("ddpo", "answers.reference_tokens", "ddpo needs tokens"),
        ("chip_released", "other_image.policy_tokens", "chip_released needs tokens of other_image"),
        ("chip_released", "other_image.changed", "chip_released needs changed of other_image"),
        ("adpo", "other_image.policy_tokens", "adpo needs tokens of other_image"),
    ],
)
def test_missing_statistics_are_named(name, leaf, message):
    objective = losses.build(name)
    with pytest.raises(ValueError, match=message):
        objective(with_leaf(random_stats(objective), leaf, None))


def test_missing_images_are_named():
    with pytest.raises(ValueError, match="mdpo needs other_image"):
        losses.build("mdpo")(golden())


def test_one_answer_is_too_few_for_a_pair_and_enough_for_sft():
    stats = BranchStats(AnswerLogps(jnp.array([[-4.0]]), jnp.array([[2.0]])))
    np.testing.assert_allclose(losses.build("sft")(stats)[0], [2.0])
    with pytest.raises(ValueError, match="simpo needs 2 answers"):
        losses.build("simpo")(stats)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dp0", {}, "no objective 'dp0'. Did you mean dpo?"),
        ("dpo", {"betta": 0.1}, "config.objective.betta: dpo has no such setting. Did you mean beta?"),
        ("sft", {"beta": 0.1}, "sft has no such setting"),
        ("dpo", {"beta": 0.0}, "config.objective.beta: 0.0 is out of range, must be above 0"),
        ("dpo", {"label_smoothing": 0.5}, "config.objective.label_smoothing: 0.5 is out of range"),
        ("dpo", {"beta_by_epoch": (0.1, "x")}, "config.objective.beta_by_epoch: expected a finite number"),
        ("dpo", {"beta_by_epoch": (0.1, 0.0)}, "config.objective.beta_by_epoch: 0.0 is out of range, must be above 0"),
        ("mdpo", {"anchor_weight": -1.0}, "config.objective.anchor_weight: -1.0 is out of range"),
        ("simpo", {"gamma": float("nan")}, "config.objective.gamma: expected a finite number"),
        ("simpo", {"gamma": True}, "config.objective.gamma: expected a finite number"),
        ("exo", {"label_smoothing": 0.0}, "config.objective.label_smoothing: 0.0 is out of range, must be above 0 and below 0.5"),
        ("exo_pair", {"label_smoothing": 0.0}, "config.objective.label_smoothing: 0.0 is out of range"),
        ("f_dpo", {"divergence": "kl"}, "config.objective.divergence: 'kl' is not one of"),
        ("f_dpo", {"divergence": "alpha", "alpha": 1.0}, "config.objective.alpha: 1.0 is out of range"),
        ("alpha_po", {"alpha": 0.0}, "config.objective.alpha: 0.0 is out of range"),
        ("wpo", {"capped": 1}, "config.objective.capped: expected bool"),
        ("reward_model", {"centering": -0.1}, "config.objective.centering: -0.1 is out of range, must be at least 0"),
        ("beta_dpo", {"rho": 1.0}, "config.objective.rho: 1.0 is out of range"),
    ],
)
def test_mistakes_are_named(name, settings, message):
    with pytest.raises(UserError) as error:
        losses.build(name, **settings)
    assert message in str(error.value)


def test_hyperparameters_are_the_defaults_and_do_not_leak():
    assert losses.hyperparameters("simpo") == {"beta": 2.0, "gamma": 0.5, "nll_weight": 0.0}
    assert losses.hyperparameters("sft") == {"length_norm": 0.0}
    losses.hyperparameters("dpo")["beta"] = 9.0
    losses.build("dpo", beta=9.0)
    assert losses.build("dpo").hyperparameters["beta"] == 0.1


@pytest.mark.parametrize("name", losses.names())
def test_equal_settings_make_equal_objectives(name):
    """So that a program is compiled once, whoever builds the objective."""
    key, default = next((k, v) for k, v in losses.hyperparameters(name).items() if isinstance(v, float))
    assert losses.build(name) == losses.build(name, **{key: default}) and hash(losses.build(name)) == hash(losses.build(name, **{key: default}))
    assert losses.build(name) != losses.build(name, **{key: default + 0.125})


def test_aliases_are_those_of_trl():
    for alias, name in losses.ALIASES.items():
        assert losses.build(alias) == losses.build(name) and losses.build(alias).name == name
        assert losses.hyperparameters(alias) == losses.hyperparameters(name)


@pytest.mark.parametrize("name", losses.names())
def test_every_objective_says_what_it_is(name):
    assert len(losses.summary(name)) > 20


def pair_of(**more):
    one = jnp.array([-1.0])
    return BranchStats.pair(one, one, -one, -one, one, one, **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"chosen_kl": jnp.ones(1)}, "give the KL divergence of both"),
        ({"policy_rejected_other_image": -jnp.ones(1)}, "under the other image .* chosen"),
        (
            dict.fromkeys(("policy_chosen_other_image", "policy_rejected_other_image", "reference_chosen_other_image"), -jnp.ones(1)),
            "the other image",
        ),
        (dict.fromkeys(("policy_chosen_other_image", "reference_rejected_other_image"), -jnp.ones(1)), "the other image"),
    ],
)
def test_half_of_a_pair_is_a_mistake(more, message):
    with pytest.raises(ValueError, match=message):
        pair_of(**more)


def test_pair_fills_the_record():
    stats = golden(**golden_other_image(), margin=jnp.ones(3))
    assert stats.answers.policy.shape == stats.answers.reference.shape == stats.answers.lengths.shape == (3, 2)
    np.testing.assert_array_equal(stats.answers.policy[:, 1], [-24.0, -30.0, -12.75])
    np.testing.assert_array_equal(stats.other_image.lengths[:, 0], stats.answers.lengths[:, 0])
    assert stats.no_image is None and stats.kl is None


def test_a_likelihood_from_elsewhere_is_in_the_term_s_own_unit():
    """`nll` is a mean over tokens; a term that divides the sum by a constant takes it for the answer's length."""
    logps = AnswerLogps(jnp.array([[-4.0]]), jnp.array([[2.0]]))
    np.testing.assert_allclose(losses.build("sft", length_norm=8.0)(BranchStats(logps))[0], [0.5])
    np.testing.assert_allclose(losses.build("sft", length_norm=8.0)(BranchStats(logps, nll=jnp.array([3.0])))[0], [0.75])
    np.testing.assert_allclose(losses.build("sft")(BranchStats(logps, nll=jnp.array([3.0])))[0], [3.0])
