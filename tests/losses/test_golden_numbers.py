"""Golden numbers: three pairs, computed by hand and by the published trainers' own functions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.branch_stats import S_OTHER, golden, golden_other_image

from mmalign_jax import losses
from mmalign_jax.losses import scores

TEXT = [0.554355, 0.854355, 0.770957]
IMAGE = [0.554355, 0.825939, 0.731350]
ANCHOR = [0.598139, 0.770957, 0.705725]
NLL = [2.0, 1.775, 2.45]
GOLDEN = [
    ("dpo", {}, TEXT),
    ("sigmoid", {}, TEXT),
    ("dpo", {"label_smoothing": 0.1}, [0.584355, 0.824355, 0.755957]),
    ("robust", {"label_smoothing": 0.1}, [0.516855, 0.891855, 0.789707]),
    ("hinge", {}, [0.7, 1.3, 1.15]),
    ("exo", {"label_smoothing": 1e-3}, [2.258199, 3.286512, 3.022554]),
    ("nca", {"beta": 0.1}, [1.319407, 1.466914, 1.424887]),
    ("bco", {"beta": 0.1}, [1.241983, 1.542190, 1.462770]),
    ("sppo", {"beta": 0.1}, [25.0, 84.5, 66.625]),
    ("aot", {"beta": 0.1}, [0.854355, 0.718460, 0.598139]),
    ("aot_unpaired", {"beta": 0.1}, [0.718460, 0.770957, 0.668460]),
    ("aot_pair", {"beta": 0.1}, [0.718460, 0.770957, 0.668460]),
    ("apo_zero", {}, [0.925187, 1.074860, 1.037459]),
    ("apo_down", {}, [0.975391, 1.037013, 1.031180]),
    ("discopop", {}, [0.849338, 0.789495, 0.794567]),
    ("f_dpo", {"divergence": "js"}, [0.635589, 0.770957, 0.722260]),
    ("f_dpo", {"divergence": "alpha", "alpha": 0.5}, [0.573243, 0.871074, 0.754722]),
    ("f_dpo", {"divergence": "reverse_kl"}, TEXT),
    ("ipo", {}, [22.246944, 26.780625, 27.105039]),
    ("ipo", {"length_normalized": False}, [4.0, 64.0, 42.25]),
    ("sigmoid_norm", {}, [0.217142, 1.223445, 1.336203]),
    ("simpo", {}, [0.974077, 0.718460, 2.316343]),
    ("cpo", {"nll_weight": 0.0}, [0.513015, 1.005492, 0.668460]),
    ("cpo", {}, np.add([0.513015, 1.005492, 0.668460], NLL)),
    ("orpo", {}, 0.1 * np.log1p(np.exp(-np.array([0.0, 0.265294, -0.993108]))) + NLL),
    ("mdpo", {}, [1.706849, 2.451252, 2.208032]),
    ("mdpo", {"image_weight": 0.0, "anchor_weight": 0.0}, TEXT),
    ("mdpo", {"anchor_weight": 0.0}, np.add(TEXT, IMAGE)),
    ("mdpo", {"image_weight": 0.0}, np.add(TEXT, ANCHOR)),
    ("mdpo", {"image_weight": 0.0, "delta": 0.1}, np.add(TEXT, np.log1p(np.exp([-0.1, 0.25, 0.125])))),
    ("image_dpo", {}, IMAGE),
    ("opa_dpo", {}, np.add(TEXT, ANCHOR) + 0.2 * np.array(IMAGE)),
    ("dpop", {"penalty_weight": 5.0}, [0.554355, 1.350058, 0.840071]),
    ("r_dpo", {"alpha": 0.01}, [0.562915, 0.825939, 0.787192]),
    ("dpo", {"nll_weight": 0.5}, np.add(TEXT, 0.5 * np.array(NLL))),
    ("sft", {}, NLL),
    ("stic", {}, np.add(TEXT, np.array([20.0, 35.5, 12.25]) / 1024)),
    ("mia_dpo", {}, TEXT),
    ("sentinel", {}, TEXT),
    ("sym_dpo", {}, np.add(TEXT, NLL)),
]


@pytest.mark.parametrize(("name", "settings", "expected"), GOLDEN)
def test_golden_numbers(name, settings, expected):
    loss, metrics = losses.build(name, **settings)(golden(**golden_other_image()))
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(expected), atol=1e-5)


def test_terms_of_mdpo():
    _, metrics = losses.build("mdpo")(golden(**golden_other_image()))
    for label, expected in (("text", TEXT), ("image", IMAGE), ("anchor", ANCHOR)):
        np.testing.assert_allclose(metrics[f"loss/{label}"], np.mean(expected), atol=1e-5)


def test_mpo_is_preference_quality_and_generation():
    loss, metrics = losses.build("mpo")(golden(nll=jnp.full(3, 1.5)))
    np.testing.assert_allclose(loss, [2.191881, 2.491922, 2.409320], atol=1e-5)
    np.testing.assert_allclose(metrics["loss/text"], np.mean(TEXT), atol=1e-5)
    np.testing.assert_allclose(metrics["loss/quality"], np.mean([1.241983, 1.542190, 1.462770]), atol=1e-5)
    np.testing.assert_allclose(metrics["loss/likelihood"], 1.5, atol=1e-6)


def test_first_baseline_of_bco_is_the_first_batch_s_mean():
    state = losses.build("bco", beta=0.1).next_state(golden())
    np.testing.assert_allclose(state["reward_mean"], 0.033333, atol=1e-6)
    assert state["reward_steps"] == 1


DESIRABLE, UNDESIRABLE = [0.457602, 0.544879, 0.513747], [0.467546, 0.529964, 0.523732]


def test_kto():
    z = {"policy_mismatched": jnp.array([-9.7, -9.8, -9.6]), "reference_mismatched": jnp.array([-10.0, -10.2, -9.8])}  # 0.3, 0.4, 0.2
    stats = golden(**z)
    loss, metrics = losses.build("kto")(stats)
    np.testing.assert_allclose(loss, np.add(DESIRABLE, UNDESIRABLE), atol=1e-5)
    np.testing.assert_allclose(metrics["loss/desirable"], np.mean(DESIRABLE), atol=1e-5)
    np.testing.assert_allclose(metrics["loss/undesirable"], np.mean(UNDESIRABLE), atol=1e-5)
    np.testing.assert_allclose(losses.build("kto", undesirable_weight=0.0)(stats)[0], DESIRABLE, atol=1e-5)
    np.testing.assert_allclose(losses.build("kto", desirable_weight=0.0)(stats)[0], UNDESIRABLE, atol=1e-5)


def test_kto_s_baseline_is_not_negative():
    below = golden(policy_mismatched=jnp.full(3, -10.0), reference_mismatched=jnp.full(3, -9.0))
    level = golden(policy_mismatched=jnp.full(3, -10.0), reference_mismatched=jnp.full(3, -10.0))
    np.testing.assert_array_equal(losses.build("kto")(below)[0], losses.build("kto")(level)[0])


def test_mm_dpo_and_its_betas():
    objective = losses.build("mm_dpo")
    margin = jnp.array([0.0, 1.0, 4.0])
    loss, metrics = objective(golden(margin=margin))
    np.testing.assert_allclose(loss, [0.554355, 0.888684, 0.806331], atol=1e-5)
    np.testing.assert_allclose(metrics["beta"], np.mean([0.1, 0.119673, 0.143233]), atol=1e-6)
    for gap, beta in zip((0.0, 1.0, 4.0, -3.0), (0.1, 0.119673, 0.143233, 0.1), strict=True):
        _, metrics = objective(golden(margin=jnp.full(3, gap)))
        np.testing.assert_allclose(metrics["beta"], beta, atol=1e-6)


def test_log_odds():
    term = next(term for _, term in losses.build("orpo").terms if term.label == "odds")
    np.testing.assert_allclose(term.logit(golden()), [0.0, 0.265294, -0.993108], atol=1e-5)


def test_aggregators():
    tokens, weight = jnp.array([-1.0, -0.5, -2.0, -0.25]), jnp.array([1.0, 5.0, 5.0, 1.0])
    np.testing.assert_allclose(scores.weighted_sum(tokens, weight), -13.75, atol=1e-6)
    np.testing.assert_allclose(scores.weighted_mean(tokens, weight), -1.145833, atol=1e-6)
    both = jnp.array([[[-1.0, -0.5, -2.0, -0.25], [-3.0, -0.125, 0.0, 0.0]]])
    inside = jnp.array([[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]])
    np.testing.assert_allclose(scores.length_desensitized(both, inside, 0.5), [[-2.625, -3.125]], atol=1e-6)
    # what is not scored does not count towards the prefix
    shifted = jnp.pad(both, ((0, 0), (0, 0), (1, 0)), constant_values=-7.0), jnp.pad(inside, ((0, 0), (0, 0), (1, 0)))
    np.testing.assert_allclose(scores.length_desensitized(*shifted, 0.5), [[-2.625, -3.125]], atol=1e-6)


def test_dense_dpo_weighs_changed_tokens_of_both_models():
    tokens = jnp.array([[-1.0, -0.5, -2.0, -0.25]])
    changed = jnp.array([[False, True, True, False]])
    stats = losses.BranchStats.pair(
        *(jnp.array([x]) for x in (-3.75, -4.0, 4.0, 4.0, -4.0, -4.0)),
        policy_chosen_tokens=tokens, reference_chosen_tokens=tokens - 0.25, chosen_changed=changed,
        policy_rejected_tokens=tokens, reference_rejected_tokens=tokens, rejected_changed=changed,
    )  # fmt: skip
    # the reference has 0.25 nats less at each of the chosen answer's tokens
    np.testing.assert_allclose(losses.build("ddpo")(stats)[0], np.log1p(np.exp([-0.5 * 0.25])), atol=1e-6)
    np.testing.assert_allclose(losses.build("ddpo_released")(stats)[0], np.log1p(np.exp([-0.1 * 0.25 * 4.2])), atol=1e-6)


def test_a_row_s_weight_multiplies_its_loss():
    stats = golden()
    loss, metrics = losses.build("dpo")(dataclasses.replace(stats, weight=jnp.array([2.0, 0.0, 1.0])))
    np.testing.assert_allclose(loss, np.multiply(TEXT, [2.0, 0.0, 1.0]), atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(loss), atol=1e-6)


def test_other_image_s_log_ratios_are_those_of_the_table():
    _, metrics = jax.jit(losses.build("mdpo"))(golden(**golden_other_image()))
    np.testing.assert_allclose(metrics["rewards/chosen_other_image"], 0.1 * np.mean(S_OTHER), atol=1e-5)
