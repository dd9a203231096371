"""Groups of samples as an objective: the same numbers as the functions of flat batches, whatever the rows are split into."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.branch_stats import random_stats

from mmalign_jax import losses
from mmalign_jax.losses import Need, ppo
from mmalign_jax.losses.policy_gradient import group_advantages, leave_one_out, policy_gradient
from mmalign_jax.losses.ppo_terms import Returns

NAMES = [name for name in losses.names() if Need.SAMPLED in losses.build(name).needs]


def flat(x):
    return x.reshape(-1, *x.shape[2:])


def expected(name, stats, kind="grpo", level="token", scale="group", **settings):
    """The loss of all samples at once."""
    answers = stats.answers
    advantages = leave_one_out(stats.sampled.rewards) if scale == "leave_one_out" else group_advantages(stats.sampled.rewards, scale)
    reference = None if answers.reference_tokens is None else flat(answers.reference_tokens)
    mask, tokens = flat(answers.token_weight > 0), (flat(answers.policy_tokens), flat(stats.sampled.logps))
    more = {"reference": reference if settings.get("kl_weight") else None, "max_length": 8, **settings}
    return policy_gradient(*tokens, advantages.reshape(-1), mask, kind=kind, level=level, **more)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "settings"),
    [
        ("grpo", {}, {"kl_weight": 0.04}),
        ("grpo", {"kind": "bnpo", "kl_weight": 0.0}, {"kind": "bnpo"}),
        ("grpo", {"kind": "luspo", "level": "sequence", "kl_weight": 0.0}, {"kind": "luspo", "level": "sequence"}),
        ("grpo", {"kind": "vespo", "kl_weight": 0.0}, {"kind": "vespo"}),
        ("dr_grpo", {}, {"kind": "dr_grpo", "scale": "none"}),
        ("dapo", {}, {"kind": "dapo", "clip_high": 0.28}),
        ("gspo", {}, {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
        ("cispo", {}, {"kind": "cispo", "scale": "batch", "clip_high": 5.0}),
        ("sapo", {}, {"kind": "sapo"}),
        ("rloo", {"kl_in_reward": 0.0}, {"level": "sum", "scale": "leave_one_out"}),
    ],
)
def test_the_mean_over_rows_is_the_loss_of_all_samples(name, hyperparameters, settings):
    objective = losses.build(name, **hyperparameters)
    stats = random_stats(objective)
    wanted, wanted_metrics = expected(name, stats, **settings)
    loss, metrics = objective(stats)
    assert loss.shape == (4,)
    np.testing.assert_allclose(jnp.mean(loss), wanted, rtol=2e-6, atol=5e-8)
    np.testing.assert_allclose(metrics["rewards/mean"], jnp.mean(stats.sampled.rewards), rtol=1e-6)
    assert metrics["rewards/all_equal"] == 0.0 and "logps/chosen" not in metrics
    if "advantages" in wanted_metrics:
        np.testing.assert_allclose(metrics["policy/advantages"], wanted_metrics["advantages"], rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ppo"])  # whose advantages depend on values
def test_better_samples_get_likelier(name):
    objective = losses.build(name)
    stats = random_stats(objective)
    # as they were just drawn: no clip
    stats = dataclasses.replace(stats, sampled=dataclasses.replace(stats.sampled, logps=None))
    assert objective(stats)[1]["policy/ratio"] == 1.0 and objective(stats)[1]["policy/clip_fraction"] == 0.0
    of = lambda tokens: jnp.mean(objective(dataclasses.replace(stats, answers=dataclasses.replace(stats.answers, policy_tokens=tokens)))[0])  # noqa: E731
    pull = -jnp.sum(jax.grad(of)(stats.answers.policy_tokens), axis=-1)
    best, worst = (np.asarray(pick(stats.sampled.rewards, axis=1)) for pick in (jnp.argmax, jnp.argmin))
    rows = np.arange(4)
    if name != "rloo":  # whose KL is part of the reward
        assert (pull[rows, best] > 0).all() and (pull[rows, worst] < 0).all()
    equal = dataclasses.replace(stats, sampled=dataclasses.replace(stats.sampled, rewards=jnp.ones((4, 4))))
    free = losses.build(name, **{key: 0.0 for key in objective.hyperparameters if key.startswith("kl_")})
    none = lambda tokens: jnp.mean(free(dataclasses.replace(equal, answers=dataclasses.replace(equal.answers, policy_tokens=tokens)))[0])  # noqa: E731
    np.testing.assert_allclose(jax.grad(none)(stats.answers.policy_tokens), 0.0, atol=1e-7)
    assert free(equal)[1]["rewards/all_equal"] == 1.0


def test_the_divergence_is_taken_off_the_rewards_of_rloo():
    objective = losses.build("rloo", kl_in_reward=0.5)
    stats = random_stats(objective)
    gap = jnp.sum(jnp.where(stats.answers.token_weight > 0, stats.sampled.logps - stats.answers.reference_tokens, 0.0), axis=-1)
    shaped = dataclasses.replace(stats, sampled=dataclasses.replace(stats.sampled, rewards=stats.sampled.rewards - 0.5 * gap))
    np.testing.assert_allclose(objective(stats)[0], losses.build("rloo", kl_in_reward=0.0)(shaped)[0], rtol=1e-5)


def test_an_answer_that_does_not_count_moves_nothing():
    """Unfinished ones are left out by weights of 0 (DAPO's overlong filtering)."""
    objective = losses.build("dapo")
    stats = random_stats(objective)
    silent = stats.answers.token_weight.at[:, 0].set(0.0)
    without = dataclasses.replace(stats, answers=dataclasses.replace(stats.answers, token_weight=silent))
    of = lambda tokens: jnp.mean(objective(dataclasses.replace(without, answers=dataclasses.replace(without.answers, policy_tokens=tokens)))[0])  # noqa: E731
    grads = jax.grad(of)(stats.answers.policy_tokens)
    assert (grads[:, 0] == 0).all() and (jnp.abs(grads[:, 1:]).sum(axis=(1, 2)) > 0).all()


def ppo_by_hand(stats, kl_weight=0.1, clip=0.2, lam=0.9):
    """The losses of policy and value over all samples at once."""
    answers, sampled = stats.answers, stats.sampled
    mask, values = flat(answers.token_weight > 0), flat(stats.values)
    shaped = ppo.shaped_rewards(sampled.rewards.reshape(-1), flat(sampled.logps), flat(answers.reference_tokens), mask, kl_weight=kl_weight)
    advantages, returns = ppo.gae(shaped, values, mask, lam=lam)
    settings = {"kind": "bnpo", "clip_low": clip, "clip_high": clip}
    policy, _ = policy_gradient(flat(answers.policy_tokens), flat(sampled.logps), ppo.whitened(advantages, mask), mask, **settings)
    return policy, ppo.value_loss(values, values, returns, mask, clip=clip)


def test_ppo_is_clipped_policy_gradient_and_value_loss():
    objective = losses.build("ppo", lam=0.9)
    stats = random_stats(objective)
    policy, value = ppo_by_hand(stats)
    loss, metrics = objective(stats)
    np.testing.assert_allclose(jnp.mean(loss), policy + 0.1 * value, rtol=1e-5)
    np.testing.assert_allclose([metrics["loss/policy"], metrics["loss/value"]], [policy, value], rtol=1e-5)
    # the values when the answers were drawn hold the clip and the advantages
    old = dataclasses.replace(stats, sampled=dataclasses.replace(stats.sampled, values=stats.values))
    moved = dataclasses.replace(old, values=stats.values + 0.5)
    np.testing.assert_allclose(objective(old)[0], loss, rtol=1e-6)
    np.testing.assert_allclose(objective(moved)[1]["loss/policy"], policy, rtol=1e-5)
    assert objective(moved)[1]["loss/value"] != pytest.approx(float(value))


def test_the_value_head_learns_from_returns_alone():
    objective = losses.build("ppo")
    stats = random_stats(objective)
    of = lambda values: jnp.sum(objective(dataclasses.replace(stats, values=values))[0])  # noqa: E731
    policy, returns = (jax.grad(of)(stats.values), Returns()(stats)[1])
    mask = stats.answers.token_weight > 0
    np.testing.assert_allclose(policy, jnp.where(mask, 0.1 * (stats.values - returns), 0.0) / stats.sampled.row_tokens[0], rtol=1e-4, atol=1e-6)
