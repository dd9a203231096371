"""Objectives of labelled answers and of ranked groups, against their papers' formulas, and beside those of pairs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from helpers.branch_stats import LEN_L, LEN_W, LP_L, LP_W, REF_L, REF_W, golden, random_stats

from mmalign_jax import losses
from mmalign_jax.losses import AnswerLogps, BranchStats

# The golden numbers of KTO with z = 0.3, desirable and undesirable
DESIRABLE, UNDESIRABLE = [0.457602, 0.544879, 0.513747], [0.467546, 0.529964, 0.523732]


def column(*values):
    return jnp.concatenate([jnp.array(one) for one in values])[:, None]


def labelled(desirable, z=0.3):
    """The golden pairs' answers, chosen and then rejected ones, a row each; the mismatched answers' log-ratios are `z` nats."""
    count = len(desirable)
    answers = AnswerLogps(column(LP_W, LP_L), column(LEN_W, LEN_L), column(REF_W, REF_L))
    partner = AnswerLogps(jnp.full((count, 1), z), jnp.ones((count, 1)), jnp.zeros((count, 1)))
    return BranchStats(answers, mismatched=partner, desirable=jnp.array(desirable))


def test_kto_of_single_answers_has_the_golden_numbers():
    stats = labelled([True] * 3 + [False] * 3)
    loss, metrics = losses.build("kto_unpaired")(stats)
    np.testing.assert_allclose(loss, DESIRABLE + UNDESIRABLE, atol=1e-6)
    rewards = 0.1 * np.array([2, -1.5, -0.25, -1, 1.5, 1.25])
    np.testing.assert_allclose(metrics["rewards/desirable"], rewards[:3].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/undesirable"], rewards[3:].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/baseline"], 0.03, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/accuracies"], np.mean([*(rewards[:3] > 0.03), *(rewards[3:] < 0.03)]))
    assert metrics["labels/desirable"] == 0.5
    weighted, _ = losses.build("kto_unpaired", desirable_weight=2.0, undesirable_weight=0.5)(stats)
    np.testing.assert_allclose(weighted, np.repeat([2.0, 0.5], 3) * loss, rtol=1e-6)
    # the label alone decides, not the place
    other, metrics = losses.build("kto_unpaired")(labelled([True] * 6))
    np.testing.assert_allclose(other[:3], DESIRABLE, atol=1e-6)
    assert np.all(np.asarray(other[3:]) != np.asarray(loss[3:])) and np.isnan(metrics["rewards/undesirable"])


def test_two_labelled_rows_are_a_pair_of_kto():
    z = jnp.full(3, 0.3)
    of_pairs, _ = losses.build("kto")(golden(policy_mismatched=z, reference_mismatched=jnp.zeros(3)))
    of_rows, _ = losses.build("kto_unpaired")(labelled([True] * 3 + [False] * 3))
    np.testing.assert_allclose(of_rows[:3] + of_rows[3:], of_pairs, rtol=1e-6)


def ranked(h, rewards, beta=0.1):
    """A group whose log-ratios times beta are `h`."""
    h = jnp.asarray(h, jnp.float32)
    return BranchStats(AnswerLogps(h / beta, jnp.ones_like(h), jnp.zeros_like(h)), rewards=jnp.asarray(rewards, jnp.float32))


def test_a_ranking_is_as_likely_as_plackett_and_luce_say():
    rng = np.random.default_rng(0)
    h, rewards = rng.normal(size=(5, 4)) * 2, np.stack([rng.permutation(4) for _ in range(5)])
    loss, metrics = losses.build("pl_dpo")(ranked(h, rewards))
    for row in range(5):
        order = np.argsort(-rewards[row])
        factors = [np.exp(h[row, order[k]]) / np.exp(h[row, order[k:]]).sum() for k in range(4)]
        np.testing.assert_allclose(loss[row], -np.log(np.prod(factors)), rtol=1e-5)
    pairs = [(row, i, j) for row in range(5) for i, j in itertools.permutations(range(4), 2) if rewards[row, i] > rewards[row, j]]
    np.testing.assert_allclose(metrics["ranking/accuracies"], np.mean([h[row, i] > h[row, j] for row, i, j in pairs]), rtol=1e-6)
    # all orders of a group together have the probability 1
    every = np.array(list(itertools.permutations(range(4))))
    of_orders, _ = losses.build("pl_dpo")(ranked(np.repeat(h[:1], len(every), 0), every))
    np.testing.assert_allclose(np.exp(-np.asarray(of_orders)).sum(), 1.0, rtol=1e-5)


def test_a_group_of_two_is_dpo_wherever_the_better_one_stands():
    stats = golden()
    expected, _ = losses.build("dpo")(stats)
    loss, _ = losses.build("pl_dpo")(dataclasses.replace(stats, rewards=jnp.tile(jnp.array([2.0, -1.0]), (3, 1))))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    turned = dataclasses.replace(stats, answers=jax.tree.map(lambda x: x[:, ::-1], stats.answers))
    loss, _ = losses.build("pl_dpo")(dataclasses.replace(turned, rewards=jnp.tile(jnp.array([-1.0, 2.0]), (3, 1))))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_equal_rewards_are_not_compared():
    objective = losses.build("pl_dpo")
    stats = dataclasses.replace(random_stats(objective), rewards=jnp.ones((4, 4)))
    loss, metrics = objective(stats)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    assert metrics["rewards/all_equal"] == 1 and metrics["ranking/accuracies"] == 0
    # one answer above three equal ones: its softmax, and nothing between the three
    h = np.array([[0.3, -0.2, 1.0, 0.1]])
    loss, _ = objective(ranked(h, [[1, 0, 0, 0]]))
    np.testing.assert_allclose(loss, np.log(np.exp(h).sum()) - h[0, 0], rtol=1e-5)
