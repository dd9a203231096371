"""Golden numbers: three pairs, computed by hand and by the published trainers' own functions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax import losses, mesh
from mmalign_jax.errors import UserError

LP_W, LP_L = [-20.0, -35.5, -12.25], [-24.0, -30.0, -12.75]
REF_W, REF_L = [-22.0, -34.0, -12.0], [-23.0, -31.5, -14.0]
LEN_W, LEN_L = [10.0, 20.0, 5.0], [12.0, 15.0, 8.0]
S_OTHER = np.array([-1.0, 1.0, 0.5])  # log-ratios of the chosen answer under the other image
TEXT = [0.554355, 0.854355, 0.770957]
IMAGE = [0.554355, 0.825939, 0.731350]
ANCHOR = [0.598139, 0.770957, 0.705725]
COMMON = {
    "loss", "nll/chosen", "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "rewards/accuracies", "grad_weight",
}  # fmt: skip
DRIFT = {"chosen_drift", "chosen_drift_per_token", "displacement_rate"}


def stats(dtype=jnp.float32, other_image: bool = True) -> losses.BranchStats:
    arrays = [jnp.array(x, dtype) for x in (LP_W, LP_L, LEN_W, LEN_L, REF_W, REF_L)]
    reference_other = jnp.array([-25.0, -36.0, -13.0], dtype)
    edge = {"policy_chosen_other_image": reference_other + jnp.array(S_OTHER, dtype), "reference_chosen_other_image": reference_other}
    return losses.BranchStats.pair(*arrays, **(edge if other_image else {}))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (losses.build("dpo"), TEXT),
        (losses.build("dpo", label_smoothing=0.1), [0.584355, 0.824355, 0.755957]),
        (losses.build("simpo"), [0.974077, 0.718460, 2.316343]),
        (losses.build("mdpo"), [1.706849, 2.451252, 2.208032]),
        (losses.build("mdpo", image_weight=0, anchor_weight=0), TEXT),
        (losses.build("mdpo", anchor_weight=0), np.add(TEXT, IMAGE)),
        (losses.build("mdpo", image_weight=0), np.add(TEXT, ANCHOR)),
        (losses.build("mdpo", image_weight=0, delta=0.1), np.add(TEXT, np.log1p(np.exp([-0.1, 0.25, 0.125])))),
        (losses.build("dpo", nll_weight=0.5), np.add(TEXT, 0.5 * np.array([2.0, 1.775, 2.45]))),
        (losses.build("sft"), [2.0, 1.775, 2.45]),
    ],
)
def test_golden_numbers(objective, expected):
    loss, metrics = jax.jit(objective)(stats())
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(expected), atol=1e-5)


@pytest.mark.parametrize("name", ["mdpo", "simpo"])
def test_likelihood_term_is_the_mean_over_tokens(name):
    without, _ = losses.build(name)(stats())
    with_term, _ = losses.build(name, nll_weight=0.5)(stats())
    np.testing.assert_allclose(with_term - without, 0.5 * np.array([2.0, 1.775, 2.45]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sft", {"loss", "nll/chosen", "logps/chosen", "lengths/chosen"}),
        ("simpo", COMMON),
        ("dpo", COMMON | DRIFT),
        (
            "mdpo",
            COMMON
            | DRIFT
            | {
                "loss/text",
                "loss/image",
                "loss/anchor",
                "rewards/accuracies_image",
                "rewards/chosen_other_image",
                "logps/chosen_other_image",
            },
        ),
    ],
)
def test_metric_names(name, expected):
    _, metrics = losses.build(name)(stats())
    assert set(metrics) == expected
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def test_metric_values():
    _, metrics = losses.build("mdpo")(stats())
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
        "loss/text": np.mean(TEXT),
        "loss/image": np.mean(IMAGE),
        "loss/anchor": np.mean(ANCHOR),
        "grad_weight": np.mean(sigmoid([-0.3, 0.3, 0.15])),
        "chosen_drift": np.mean([2, -1.5, -0.25]),
        "chosen_drift_per_token": np.mean([0.2, -0.075, -0.05]),
        "displacement_rate": 0.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-5, err_msg=name)


def test_displacement_is_a_better_pair_with_a_less_likely_chosen_answer():
    x = jnp.array
    s = losses.BranchStats.pair(x([-3.0, -1.0]), x([-5.0, -5.0]), x([4.0, 4.0]), x([4.0, 4.0]), x([-2.0, -2.0]), x([-2.0, -2.0]))
    assert losses.build("dpo")(s)[1]["displacement_rate"] == 0.5


@pytest.mark.parametrize("name", ["dpo", "mdpo"])
def test_equal_policy_and_reference_give_log_2_and_ties_count_as_wrong(name):
    s = stats()
    s = dataclasses.replace(s, policy=s.reference, policy_other_image=s.reference_other_image)
    loss, metrics = losses.build(name)(s)
    terms = 3 if name == "mdpo" else 1
    np.testing.assert_allclose(loss, terms * np.log(2) * np.ones(3), rtol=1e-6)
    assert metrics["rewards/accuracies"] == 0 and metrics["rewards/margins"] == 0
    assert name == "dpo" or metrics["rewards/accuracies_image"] == 0


def test_swapping_the_pair_negates_h():
    s = stats()
    swapped = dataclasses.replace(s, policy=s.policy[:, ::-1], reference=s.reference[:, ::-1], lengths=s.lengths[:, ::-1])
    (loss, metrics), (other, other_metrics) = losses.build("dpo")(s), losses.build("dpo")(swapped)
    np.testing.assert_allclose(loss - other, -0.1 * np.array([3, -3, -1.5]), atol=1e-6)  # -ls(h) + ls(-h) = -h
    np.testing.assert_allclose(metrics["rewards/margins"], -other_metrics["rewards/margins"], atol=1e-6)


@pytest.mark.parametrize("name", ["sft", "dpo", "mdpo", "simpo"])
@pytest.mark.parametrize("field", ["policy", "policy_other_image"])
def test_gradient_equals_finite_differences(name, field):
    extra = {} if name == "sft" else {"nll_weight": 0.3}
    if name == "dpo":
        extra["label_smoothing"] = 0.1
    with jax.enable_x64(True):
        s = stats(jnp.float64)
        objective = losses.build(name, **extra)
        total = lambda x: objective(dataclasses.replace(s, **{field: x}))[0].sum()  # noqa: E731
        x = getattr(s, field)
        gradient = jax.grad(total)(x)
        for index in np.ndindex(x.shape):
            step = jnp.zeros_like(x).at[index].set(1e-5)
            np.testing.assert_allclose(gradient[index], (total(x + step) - total(x - step)) / 2e-5, atol=1e-8)
        assert field != "policy" or jnp.any(gradient != 0)


def test_dpo_gradient_is_beta_times_sigmoid_of_minus_h():
    s = stats()
    gradient = jax.grad(lambda p: losses.build("dpo")(dataclasses.replace(s, policy=p))[0].sum())(s.policy)
    weight = 0.1 / (1 + np.exp(0.1 * np.array([3, -3, -1.5])))
    np.testing.assert_allclose(gradient, np.stack([-weight, weight], axis=-1), rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "mdpo", "simpo"])
def test_no_gradient_reaches_the_reference_the_lengths_or_the_metrics(name):
    gradient = jax.grad(lambda s: losses.build(name)(s)[0].sum())(stats())
    assert jnp.any(gradient.policy != 0)
    for field in ("reference", "reference_other_image", "lengths"):
        assert not jnp.any(getattr(gradient, field) != 0), field
    through_metrics = jax.grad(lambda s: sum(losses.build(name)(s)[1].values()))(stats())
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(through_metrics))


@pytest.mark.parametrize("name", losses.names())
def test_float32_from_bfloat16_sums(name):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stats())  # these sums are exact in bfloat16
    loss, _ = losses.build(name)(low)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, losses.build(name)(stats())[0])


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_extreme_pairs_stay_finite(name):
    x = jnp.array
    s = losses.BranchStats.pair(x([-1e4, 0.0]), x([0.0, -1e4]), x([1.0, 1.0]), x([1.0, 1.0]), x([0.0, 0.0]), x([0.0, 0.0]))
    loss, gradient = jax.value_and_grad(lambda p: losses.build(name)(dataclasses.replace(s, policy=p))[0].sum())(s.policy)
    assert jnp.isfinite(loss) and jnp.isfinite(gradient).all()


def test_needs():
    needs = {name: (o.needs_reference, o.needs_other_image, o.answers) for name in losses.names() for o in [losses.build(name)]}
    assert needs == {"dpo": (True, False, 2), "mdpo": (True, True, 2), "sft": (False, False, 1), "simpo": (False, False, 2)}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dpo", {"reference": None}, "dpo needs reference"),
        ("mdpo", {"policy_other_image": None}, "mdpo needs policy_other_image"),
        ("mdpo", {"reference_other_image": None}, "mdpo needs reference_other_image"),
    ],
)
def test_missing_statistics_are_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        losses.build(name)(dataclasses.replace(stats(), **change))


def test_one_answer_is_too_few_for_a_pair_and_enough_for_sft():
    s = losses.BranchStats(policy=jnp.array([[-4.0]]), lengths=jnp.array([[2.0]]))
    np.testing.assert_allclose(losses.build("sft")(s)[0], [2.0])
    with pytest.raises(ValueError, match="simpo needs 2 answers"):
        losses.build("simpo")(s)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("dp0", {}, "no objective 'dp0'. Did you mean dpo?"),
        ("dpo", {"betta": 0.1}, "config.objective.betta: dpo has no such setting. Did you mean beta?"),
        ("sft", {"beta": 0.1}, "sft has no such setting"),
        ("dpo", {"beta": 0.0}, "config.objective.beta: 0.0 is out of range, must be above 0"),
        ("dpo", {"label_smoothing": 0.5}, "config.objective.label_smoothing: 0.5 is out of range"),
        ("mdpo", {"anchor_weight": -1.0}, "config.objective.anchor_weight: -1.0 is out of range"),
        ("simpo", {"gamma": float("nan")}, "config.objective.gamma: expected a finite number"),
        ("simpo", {"gamma": True}, "config.objective.gamma: expected a finite number"),
    ],
)
def test_mistakes_are_named(name, hyperparameters, message):
    with pytest.raises(UserError) as error:
        losses.build(name, **hyperparameters)
    assert message in str(error.value)


def test_hyperparameters_are_the_defaults_and_do_not_leak():
    assert losses.hyperparameters("simpo") == {"beta": 2.0, "gamma": 0.5, "nll_weight": 0.0}
    assert losses.hyperparameters("sft") == {"length_norm": 0.0}
    losses.hyperparameters("dpo")["beta"] = 9.0
    losses.build("dpo", beta=9.0)
    assert losses.build("dpo").hyperparameters["beta"] == 0.1
    assert losses.build("dpo") == losses.build("dpo", beta=0.1) and hash(losses.build("dpo")) == hash(losses.build("dpo", beta=0.1))
    assert losses.build("dpo") != losses.build("dpo", beta=0.2)


@pytest.mark.parametrize("name", losses.names())
def test_a_sharded_batch_gives_the_same_numbers(name):
    wide = jax.tree.map(lambda x: jnp.tile(x, (8,) + (1,) * (x.ndim - 1)), stats())
    expected, expected_metrics = losses.build(name)(wide)
    grid = mesh.make_mesh(data=2, fsdp=4)
    with jax.set_mesh(grid):
        sharded = jax.tree.map(lambda x: jax.device_put(x, mesh.sharding(grid, "batch", *[None] * (x.ndim - 1))), wide)
        loss, metrics = jax.jit(losses.build(name))(sharded)
        assert jax.typeof(loss).sharding.spec == mesh.spec("batch")
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
