"""What objectives report, and the properties that every one of them has as a function of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.branch_stats import LEN_L, LEN_W, LP_L, LP_W, golden, golden_other_image, random_stats

from mmalign_jax import losses
from mmalign_jax.losses import AnswerLogps, BranchStats

COMMON = {
    "loss", "nll/chosen", "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "rewards/accuracies", "grad_weight",
}  # fmt: skip
DRIFT = {"chosen_drift", "chosen_drift_per_token", "displacement_rate"}
OTHER_IMAGE = {"rewards/accuracies_image", "rewards/chosen_other_image", "logps/chosen_other_image"}


def labels(*names: str) -> set[str]:
    return {f"loss/{name}" for name in names}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sft", {}, {"loss", "nll/chosen", "logps/chosen", "lengths/chosen"}),
        ("simpo", {}, COMMON),
        ("dpo", {}, COMMON | DRIFT),
        ("mdpo", {}, COMMON | DRIFT | OTHER_IMAGE | labels("text", "image", "anchor")),
        ("dpo", {"nll_weight": 0.1}, COMMON | DRIFT | labels("text", "likelihood")),
        ("mdpo", {"image_weight": 0.0, "anchor_weight": 0.0}, COMMON | DRIFT),
        ("orpo", {}, COMMON | labels("odds", "likelihood")),
        ("kto", {}, COMMON | DRIFT | labels("desirable", "undesirable")),
        ("mpo", {}, COMMON | DRIFT | labels("text", "quality", "likelihood")),
        ("mm_dpo", {}, COMMON | DRIFT | {"beta"}),
        ("ha_dpo", {}, COMMON | DRIFT | labels("text", "auxiliary")),
        (
            "kto_unpaired",
            {},
            {"loss", "logps/mean", "lengths/mean", "labels/desirable", "rewards/desirable", "rewards/undesirable", "rewards/baseline"}
            | {"rewards/accuracies", "grad_weight"},
        ),
        ("pl_dpo", {}, {"loss", "lengths/mean", "rewards/mean", "rewards/best", "rewards/std", "rewards/all_equal", "ranking/accuracies"}),
        ("reward_model", {}, COMMON - {"nll/chosen", "logps/chosen", "logps/rejected"} | {"rewards/mean", "rewards/std"}),
    ],
)
def test_metric_names(name, settings, expected):
    """Of statistics that hold what the objective needs, and nothing else."""
    objective = losses.build(name, **settings)
    _, metrics = objective(random_stats(objective))
    assert set(metrics) == expected
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def test_metric_values():
    _, metrics = losses.build("mdpo")(golden(**golden_other_image()))
    sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x)))  # noqa: E731
    expected = {
        "rewards/chosen": 0.1 * np.mean([2, -1.5, -0.25]),
        "rewards/rejected": 0.1 * np.mean([-1, 1.5, 1.25]),
        "rewards/margins": 0.1 * np.mean([3, -3, -1.5]),
        "rewards/accuracies": 1 / 3,
        "rewards/accuracies_image": 1 / 3,
        "logps/chosen": np.mean(LP_W),
        "logps/rejected": np.mean(LP_L),
        "lengths/chosen": np.mean(LEN_W),
        "lengths/rejected": np.mean(LEN_L),
        "nll/chosen": np.mean([2.0, 1.775, 2.45]),
        "grad_weight": np.mean(sigmoid([-0.3, 0.3, 0.15])),
        "chosen_drift": np.mean([2, -1.5, -0.25]),
        "chosen_drift_per_token": np.mean([0.2, -0.075, -0.05]),
        "displacement_rate": 0.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("name", "chosen", "rejected"),
    [
        ("sigmoid_norm", 5 * np.array([0.2, -0.075, -0.05]), 5 * np.array([-1 / 12, 0.1, 1.25 / 8])),
        ("simpo", 2 * np.array([-2.0, -1.775, -2.45]), 2 * np.array([-2.0, -2.0, -12.75 / 8])),
        ("orpo", np.array([-2.0, -1.775, -2.45]), np.array([-2.0, -2.0, -12.75 / 8])),
        ("kto", 0.1 * np.array([2, -1.5, -0.25]), 0.1 * np.array([-1, 1.5, 1.25])),
        ("aot", 0.01 * np.array([2, -1.5, -0.25]), 0.01 * np.array([-1, 1.5, 1.25])),
        ("image_dpo", 0.1 * np.array([2, -1.5, -0.25]), 0.1 * np.array([-1, 1, 0.5])),
    ],
)
def test_rewards_are_beta_times_the_objective_s_own_score(name, chosen, rejected):
    z = jnp.full(3, -1.0)
    _, metrics = losses.build(name)(golden(**golden_other_image(), policy_mismatched=z, reference_mismatched=z))
    np.testing.assert_allclose(metrics["rewards/chosen"], chosen.mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], rejected.mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["rewards/accuracies"], np.mean(chosen > rejected), atol=1e-6)


def test_displacement_is_a_better_pair_with_a_less_likely_chosen_answer():
    x = jnp.array
    stats = BranchStats.pair(x([-3.0, -1.0]), x([-5.0, -5.0]), x([4.0, 4.0]), x([4.0, 4.0]), x([-2.0, -2.0]), x([-2.0, -2.0]))
    assert losses.build("dpo")(stats)[1]["displacement_rate"] == 0.5


def policy_is_reference(stats: BranchStats) -> BranchStats:
    fields = {name: getattr(stats, name) for name in ("answers", "other_image", "self_rejected", "mismatched")}
    same = lambda x: dataclasses.replace(x, policy=x.reference, policy_tokens=x.reference_tokens)  # noqa: E731
    return dataclasses.replace(stats, **{name: same(x) for name, x in fields.items() if x is not None})


@pytest.mark.parametrize(
    ("name", "logs"),
    [
        ("dpo", 1), ("mdpo", 3), ("ddpo", 1), ("ddpo_released", 1), ("ld_dpo", 1), ("sigmoid_norm", 1), ("aot", 1), ("aot_unpaired", 1),
        ("bco", 2), ("nca", 2), ("dpop", 1), ("f_dpo", 1), ("image_dpo", 1), ("opa_dpo", 2.2), ("povid", 1), ("beta_dpo", 1), ("dama", 1),
        ("mm_dpo", 1), ("mia_dpo", 1), ("sentinel", 1),
    ],
)  # fmt: skip
def test_equal_policy_and_reference_give_log_2_and_ties_count_as_wrong(name, logs):
    objective = losses.build(name)
    loss, metrics = objective(policy_is_reference(random_stats(objective)))
    # losses of pairs that a schedule leaves out are 0, and the others count for more
    np.testing.assert_allclose(jnp.mean(loss), logs * np.log(2), rtol=1e-6)
    assert metrics["rewards/accuracies"] == 0 and metrics["rewards/margins"] == 0
    assert metrics.get("rewards/accuracies_image", 0) == 0


def swapped(x: AnswerLogps) -> AnswerLogps:
    return jax.tree.map(lambda a: a[:, ::-1], x)


@pytest.mark.parametrize("name", ["dpo", "sigmoid_norm", "simpo", "cpo", "ddpo", "ld_dpo", "f_dpo", "hinge", "tdpo"])
def test_swapping_the_pair_negates_h(name):
    objective = losses.build(name, **({"gamma": 0.0} if name == "simpo" else {}))
    stats = random_stats(objective)
    pair = next(term for _, term in objective.terms if term.label == "text")
    other = dataclasses.replace(stats, answers=swapped(stats.answers), kl=None if stats.kl is None else stats.kl[:, ::-1])
    np.testing.assert_allclose(pair.logit(other), -pair.logit(stats), atol=1e-6)


def test_swapping_the_pair_moves_the_loss_by_h():
    stats = golden()
    (loss, metrics), (other, other_metrics) = (losses.build("dpo")(s) for s in (stats, dataclasses.replace(stats, answers=swapped(stats.answers))))
    np.testing.assert_allclose(loss - other, -0.1 * np.array([3, -3, -1.5]), atol=1e-6)  # -ls(h) + ls(-h) = -h
    np.testing.assert_allclose(metrics["rewards/margins"], -other_metrics["rewards/margins"], atol=1e-6)


@pytest.mark.parametrize("name", losses.names())
def test_the_order_of_the_rows_and_slots_of_padding_change_nothing(name):
    objective = losses.build(name)
    stats = random_stats(objective)
    loss, metrics = objective(stats)

    def rearranged(x):
        x = x[::-1] if x.ndim else x
        return jnp.pad(x, ((0, 0), (0, 0), (0, 3))) if x.ndim == 3 else x

    other, other_metrics = objective(jax.tree.map(rearranged, stats))
    # AOT's losses come in sorted order
    expected = loss if name.startswith("aot") else loss[::-1]
    np.testing.assert_allclose(other, expected, rtol=1e-5)
    for key, value in metrics.items():
        np.testing.assert_allclose(other_metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["dpo", "mdpo", "simpo", "sft", "ddpo", "kto", "wpo", "tdpo", "orpo"])
def test_float32_from_bfloat16_statistics(name):
    objective = losses.build(name)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, random_stats(objective))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, narrow)
    loss, metrics = objective(narrow)
    assert loss.dtype == jnp.float32 and all(value.dtype == jnp.float32 for value in metrics.values())
    np.testing.assert_array_equal(loss, objective(wide)[0])
