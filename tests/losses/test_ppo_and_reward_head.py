"""The array functions of PPO, and the reward model's loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax import losses
from mmalign_jax.losses import BranchStats
from mmalign_jax.losses.ppo import gae, shaped_rewards, value_loss, whitened
from mmalign_jax.losses.reward_head import bradley_terry

MASK = np.arange(5) < np.array([[5], [3], [1]])
RNG = np.random.default_rng(0)
REWARDS, VALUES, OLD = RNG.normal(size=(3, 3, 5)).astype(np.float32)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.9, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    advantages, returns = gae(*map(jnp.array, (REWARDS, VALUES, MASK)), gamma=gamma, lam=lam)
    expected = np.zeros((3, 5))
    for b, length in enumerate(MASK.sum(1)):
        values = np.append(VALUES[b, :length], 0.0)
        delta = REWARDS[b, :length] + gamma * values[1:] - values[:-1]
        for t in range(length):
            expected[b, t] = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, expected + VALUES * MASK, rtol=1e-5, atol=1e-6)


def test_without_discount_every_return_is_what_is_still_to_come():
    _, returns = gae(*map(jnp.array, (REWARDS, VALUES, MASK)))
    to_come = np.cumsum((REWARDS * MASK)[:, ::-1], axis=1)[:, ::-1] * MASK
    np.testing.assert_allclose(returns, to_come, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("estimate", "kl"), [("k1", lambda x: x), ("k1_clamped", lambda x: np.maximum(x, 0)), ("k3", lambda x: np.exp(-x) + x - 1)])
def test_shaped_rewards(estimate, kl):
    logps, reference = -np.abs(VALUES), -np.abs(OLD)
    scores = np.array([1.0, -2.0, 0.5], np.float32)
    found = shaped_rewards(*map(jnp.array, (scores, logps, reference, MASK)), kl_weight=0.1, estimate=estimate)
    expected = -0.1 * kl(logps - reference) * MASK
    expected[range(3), MASK.sum(1) - 1] += scores
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_whitened():
    found = np.asarray(whitened(jnp.array(VALUES), jnp.array(MASK)))
    np.testing.assert_allclose([found[MASK].mean(), found[MASK].std()], [0, 1], atol=1e-5)
    assert not found[~MASK].any()
    assert np.isfinite(whitened(jnp.ones((2, 2)), jnp.ones((2, 2), bool))).all()


def test_clipped_value_loss():
    returns = REWARDS
    kept = np.clip(VALUES, OLD - 0.2, OLD + 0.2)
    expected = 0.5 * np.maximum((VALUES - returns) ** 2, (kept - returns) ** 2)[MASK].mean()
    total = lambda v, o, r: value_loss(v, o, r, jnp.array(MASK))  # noqa: E731
    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*map(jnp.array, (VALUES, OLD, returns)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.any(gradients[0]) and not np.any(gradients[0][~MASK])
    assert not np.any(gradients[1]) and not np.any(gradients[2])


CHOSEN, REJECTED = jnp.array([1.2, -0.3, 0.5]), jnp.array([0.2, 0.4, 0.5])


def test_reward_model():
    loss, metrics = bradley_terry(CHOSEN, REJECTED, centering=0.01)
    np.testing.assert_allclose(loss, [0.332862, 1.103286, 0.703147], atol=1e-5)
    np.testing.assert_allclose(metrics["scores/accuracies"], 1 / 3, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(loss), atol=1e-6)
    with_margin, _ = bradley_terry(CHOSEN, REJECTED, margin=jnp.array([0.0, 1.0, 0.5]))
    np.testing.assert_allclose(with_margin, np.log1p(np.exp(-np.array([1.0, -1.7, -0.5]))), rtol=1e-5)


def test_the_objective_is_the_function_and_its_regularisers():
    stats = BranchStats.pair(*[jnp.zeros(3)] * 4, chosen_score=CHOSEN, rejected_score=REJECTED, margin=jnp.array([0.0, 2.0, 1.0]))
    loss, metrics = losses.build("reward_model")(stats)
    np.testing.assert_allclose(loss, [0.332862, 1.103286, 0.703147], atol=1e-5)
    np.testing.assert_allclose(metrics["rewards/accuracies"], 1 / 3, atol=1e-6)
    both = np.stack([CHOSEN, REJECTED])
    np.testing.assert_allclose([metrics["rewards/mean"], metrics["rewards/std"]], [both.mean(), both.std()], rtol=1e-5)
    more, _ = losses.build("reward_model", margin_weight=0.5, centering=0.0, square_weight=0.001)(stats)
    np.testing.assert_allclose(more, np.log1p(np.exp(-np.array([1.0, -1.7, -0.5]))) + 0.001 * (both**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(losses.build("reward_model").rewards(stats), both.T)
    with pytest.raises(ValueError, match="dpo needs log-probs"):
        losses.build("dpo")(dataclasses.replace(stats, answers=dataclasses.replace(stats.answers, policy=None)))


def test_reward_model_s_gradient():
    gradient = jax.grad(lambda w: bradley_terry(w, REJECTED, margin=jnp.ones(3), centering=0.01)[0].sum())(CHOSEN)
    gap = np.asarray(CHOSEN - REJECTED) - 1
    np.testing.assert_allclose(gradient, -1 / (1 + np.exp(gap)) + 0.02 * np.asarray(CHOSEN + REJECTED), rtol=1e-5)
    far = jax.grad(lambda w: bradley_terry(w, -w)[0].sum())(jnp.array([1e3, -1e3, 0.0]))
    assert jnp.isfinite(far).all()
    assert bradley_terry(CHOSEN.astype(jnp.bfloat16), REJECTED.astype(jnp.bfloat16))[0].dtype == jnp.float32
