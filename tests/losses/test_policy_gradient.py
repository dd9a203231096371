"""GRPO and its relatives against numbers that were computed by hand, and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax.losses.policy_gradient import group_advantages, k3, leave_one_out, policy_gradient

NAN = np.nan  # whatever stands off the mask
LOGPS = np.array([[-1.0, -0.5, -2.0], [-0.7, -1.2, NAN]])
OLD = np.array([[-1.2, -0.5, -1.5], [-1.0, -1.1, NAN]])
REFERENCE = np.array([[-1.1, -0.6, -1.8], [-0.9, -1.0, NAN]])
ADVANTAGES = np.array([1.0, -1.0])
MASK = np.array([[True, True, True], [True, True, False]])
USUAL = {"clip_low": 0.2, "clip_high": 0.28}
KINDS = [
    ("grpo", USUAL, 0.092352),
    ("bnpo", USUAL, -0.114647),
    ("dapo", USUAL, -0.114647),
    ("dr_grpo", USUAL | {"max_length": 4}, -0.071655),
    ("sapo", {}, 0.043099),
    ("grpo", USUAL | {"level": "sequence"}, 0.100167),
    ("luspo", USUAL | {"level": "sequence"}, -0.252085),
    ("cispo", {"clip_high": 5.0}, 0.180752),
]


def arrays(dtype=jnp.float32):
    return jnp.array(LOGPS, dtype), jnp.array(OLD, dtype), jnp.array(ADVANTAGES, dtype), jnp.array(MASK)


@pytest.mark.parametrize(("kind", "settings", "expected"), KINDS)
def test_golden_numbers(kind, settings, expected):
    loss, metrics = jax.jit(lambda *a: policy_gradient(*a, kind=kind, **settings))(*arrays())
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    assert all(x.shape == () and x.dtype == jnp.float32 and jnp.isfinite(x) for x in metrics.values())


def test_k3():
    logps, reference, mask = LOGPS[MASK], REFERENCE[MASK], MASK
    np.testing.assert_allclose(np.mean(k3(jnp.array([logps]), jnp.array([reference]))), 0.014242, atol=1e-6)
    loss, metrics = policy_gradient(*arrays(), kind="bnpo", **USUAL, reference=jnp.array(REFERENCE, jnp.float32), kl_weight=2.0)
    np.testing.assert_allclose(metrics["kl"], 0.014242, atol=1e-6)
    np.testing.assert_allclose(loss, -0.114647 + 2 * 0.014242, atol=1e-5)
    loss, _ = policy_gradient(*arrays(), kind="bnpo", **USUAL, reference=jnp.array(REFERENCE, jnp.float32), kl_weight=2.0, kl_by_ratio=True)
    gap = reference - logps
    corrected = np.mean(np.exp(LOGPS - OLD)[mask] * (np.exp(gap) - gap - 1))
    np.testing.assert_allclose(loss, -0.114647 + 2 * corrected, atol=1e-5)


def test_vespo_weighs_answers_by_their_own_ratio():
    w = np.exp(np.nansum(LOGPS - OLD, axis=1))
    phi = np.array([np.exp(3) * w[0] ** 2 * np.exp(-3 * w[0]), np.exp(2) * w[1] ** 3 * np.exp(-2 * w[1])])
    expected = -np.nansum(phi[:, None] * ADVANTAGES[:, None] * LOGPS) / 5
    np.testing.assert_allclose(policy_gradient(*arrays(), kind="vespo")[0], expected, rtol=1e-5)


def test_ratio_cap_bounds_the_other_side():
    loss, _ = policy_gradient(*arrays(), kind="bnpo", **USUAL, ratio_cap=1.1)
    ratio = np.exp(LOGPS - OLD)
    by_token = -np.minimum(np.minimum(ratio, 1.1) * ADVANTAGES[:, None], np.clip(ratio, 0.8, 1.28) * ADVANTAGES[:, None])
    np.testing.assert_allclose(loss, np.nanmean(by_token[MASK]), rtol=1e-5)


def test_fresh_samples_give_the_plain_policy_gradient():
    logps, _, advantages, mask = arrays()
    for kind, settings in (("bnpo", {}), ("dapo", {}), ("cispo", {"clip_high": 5.0}), ("vespo", {})):
        gradient = jax.grad(lambda x, kind=kind, settings=settings: policy_gradient(x, None, advantages, mask, kind=kind, **settings)[0])(logps)
        np.testing.assert_allclose(gradient, np.where(MASK, -ADVANTAGES[:, None], 0) / 5, rtol=1e-5, err_msg=kind)


def test_total_tokens_make_batches_of_a_step_add_up():
    logps, old, advantages, mask = arrays()
    whole = policy_gradient(logps, old, advantages, mask, kind="dapo")[0]
    parts = [policy_gradient(*(x[i : i + 1] for x in arrays()), kind="dapo", total_tokens=jnp.float32(5.0))[0] for i in range(2)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_advantages_may_be_by_token():
    logps, old, advantages, mask = arrays()
    by_token = jnp.tile(advantages[:, None], (1, 3))
    np.testing.assert_allclose(policy_gradient(logps, old, by_token, mask)[0], policy_gradient(logps, old, advantages, mask)[0])


@pytest.mark.parametrize(("kind", "settings"), [(kind, settings) for kind, settings, _ in KINDS if kind != "cispo"])
def test_gradient_equals_finite_differences_and_old_log_probs_get_none(kind, settings):
    with jax.enable_x64(True):
        *inputs, mask = arrays(jnp.float64)
        reference = jnp.array(REFERENCE)
        total = lambda *a: policy_gradient(*a[:3], mask, kind=kind, reference=a[3], kl_weight=0.3, **settings)[0]  # noqa: E731
        gradient, *rest = jax.grad(total, argnums=(0, 1, 2, 3))(*inputs, reference)
        step = 1e-6 * jnp.array([[1.0, -0.7, 0.4], [-1.3, 0.6, 0.0]])
        difference = total(inputs[0] + step, *inputs[1:], reference) - total(inputs[0] - step, *inputs[1:], reference)
        np.testing.assert_allclose(jnp.sum(gradient * step), difference / 2, rtol=1e-6)
    assert np.any(gradient) and not np.any(gradient[~MASK])
    assert not any(np.any(x) for x in rest)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_far_samples_stay_finite(kind):
    """Also where the advantage is 0, as in groups whose rewards are all equal, and where the reference is far from the policy."""
    gap = jnp.repeat(jnp.array([-1e3, -60.0, 60.0, 1e3]), 3)[:, None] * jnp.ones(2)
    arguments = -1e3 - gap, jnp.tile(jnp.array([1.0, -1.0, 0.0]), 4), jnp.ones_like(gap, bool)
    level = "sequence" if kind == "luspo" else "token"

    def total(x):
        return policy_gradient(x, *arguments, kind=kind, level=level, reference=-1e3 + gap, kl_weight=0.1, kl_by_ratio=True)

    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(jnp.full_like(gap, -1e3))
    assert jnp.isfinite(loss) and jnp.isfinite(gradient).all()
    assert all(jnp.isfinite(x) for x in metrics.values())


def test_an_answer_without_tokens_has_no_loss():
    logps, old, advantages, mask = arrays()
    for kind in ("grpo", "bnpo"):
        loss, gradient = jax.value_and_grad(lambda x, kind=kind: policy_gradient(x, old, advantages, mask & False, kind=kind)[0])(logps)
        assert loss == 0 and not np.any(gradient)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ppo"}, "unknown kind 'ppo'"),
        ({"level": "word"}, "unknown level"),
        ({"kind": "luspo"}, "luspo wants the sequence's ratio"),
        ({"kind": "dr_grpo"}, "divides by max_length"),
        ({"kl_weight": 0.1}, "kl_weight needs the reference"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        policy_gradient.__wrapped__(*arrays(), **settings)


def test_group_advantages():
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    signs = np.array([[1, -1, -1, 1]])
    np.testing.assert_allclose(group_advantages(rewards), 0.865875 * signs, atol=1e-5)
    np.testing.assert_allclose(group_advantages(rewards, population=True), 0.999800 * signs, atol=1e-5)
    np.testing.assert_allclose(group_advantages(rewards, "none"), 0.5 * signs)
    two = jnp.array([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    np.testing.assert_array_equal(group_advantages(two)[1], 0)
    np.testing.assert_allclose(group_advantages(two, "batch")[0], 0.5 * signs[0] / (np.std(two, ddof=1) + 1e-4), rtol=1e-5)
    np.testing.assert_array_equal(group_advantages(two[:, :1]), 0)


def test_leave_one_out():
    rewards = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    others = [[np.mean(np.delete(row, place)) for place in range(5)] for row in rewards]
    np.testing.assert_allclose(leave_one_out(jnp.array(rewards)), rewards - others, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(leave_one_out(jnp.array(rewards[:, :1])), 0)
