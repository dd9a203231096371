"""What objectives carry from step to step, and schedules of beta."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.branch_stats import golden, leaves, random_stats

from mmalign_jax import losses
from mmalign_jax.losses import BranchStats
from mmalign_jax.losses.beta import largest

STATES = {"bco": {"reward_mean", "reward_steps"}, "mpo": {"reward_mean", "reward_steps"}} | dict.fromkeys(
    ("beta_dpo", "dama", "mm_dpo_released"), {"gap_mean"}
)


def steps(objective: losses.Objective, count: int, rows: int = 10) -> list[BranchStats]:
    return [random_stats(objective, rows=rows, seed=seed) for seed in range(count)]


def ratios(stats: BranchStats) -> np.ndarray:
    return np.asarray(stats.answers.policy - stats.answers.reference, np.float64)


def sig(x):
    return 1 / (1 + np.exp(-x))


def test_only_these_have_a_state():
    assert {name: set(state) for name in losses.names() if (state := losses.build(name).initial_state())} == STATES


@pytest.mark.parametrize("name", ["dpo", "kto", *STATES])
def test_state_keeps_its_shape_and_gets_no_gradient(name):
    objective = losses.build(name)
    state, stats = objective.initial_state(), random_stats(objective)
    assert set(state) == STATES.get(name, set())
    new = objective.next_state(stats)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in new.values())
    gradient = jax.grad(lambda s: sum(objective.next_state(s).values(), jnp.zeros(())), allow_int=True)(stats)
    assert not any(np.any(x) for x in leaves(gradient).values() if x.dtype != jax.dtypes.float0)


@pytest.mark.parametrize(("name", "beta"), [("bco", 0.01), ("mpo", 0.1)])
def test_running_mean_of_the_rewards(name, beta):
    objective = losses.build(name)
    state, seen = objective.initial_state(), []
    step = jax.jit(
        lambda stats, state: (objective(dataclasses.replace(stats, state=state))[1], objective.next_state(dataclasses.replace(stats, state=state)))
    )
    for number, stats in enumerate(steps(objective, 5), start=1):
        metrics, state = step(stats, state)
        rewards = beta * ratios(stats)
        seen.append(rewards.mean())
        np.testing.assert_allclose(state["reward_mean"], np.mean(seen), rtol=1e-5)
        assert state["reward_steps"] == number
        # this step's rewards are in the baseline that it uses
        quality = np.logaddexp(0, -(rewards[:, 0] - np.mean(seen))) + np.logaddexp(0, rewards[:, 1] - np.mean(seen))
        labels = {"bco": ("loss/chosen", "loss/rejected"), "mpo": ("loss/quality",)}[name]
        np.testing.assert_allclose(sum(metrics[label] for label in labels), quality.mean(), rtol=1e-5)


def kept(gap: np.ndarray, mean: float, rho: float) -> np.ndarray:
    """Without a key: those nearest to the running mean."""
    count = max(1, round((1 - rho) * len(gap)))
    out = np.zeros(len(gap))
    out[np.argsort(np.abs(gap - mean), kind="stable")[:count]] = len(gap) / count
    return out


@pytest.mark.parametrize(
    ("name", "settings", "a"), [("beta_dpo", {}, 0.6), ("beta_dpo", {"momentum": 0.5, "rho": 0.5}, 0.6), ("mm_dpo_released", {}, 0.1)]
)
def test_beta_moves_with_the_batch(name, settings, a):
    objective = losses.build(name, **settings)
    momentum, rho = settings.get("momentum", 0.9), settings.get("rho", 0.2)
    state, mean = objective.initial_state(), 0.0
    for stats in steps(objective, 4):
        stats = dataclasses.replace(stats, state=state)
        loss, metrics = objective(stats)
        gap = ratios(stats) @ [1, -1]
        weight = kept(gap, mean, rho)
        beta = max(0.1 * (1 + a * (np.mean(gap * weight) - mean)), 1e-3)
        np.testing.assert_allclose(metrics["beta"], beta, rtol=1e-4)
        nll = -np.asarray(stats.answers.policy[:, 0] / stats.answers.lengths[:, 0])
        expected = np.logaddexp(0, -beta * gap) * weight + (0.25 * nll if name == "mm_dpo_released" else 0)
        np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)
        state, mean = objective.next_state(stats), momentum * mean + (1 - momentum) * gap.mean()
        np.testing.assert_allclose(state["gap_mean"], mean, rtol=1e-5)


def test_dama_s_beta_is_hardness_in_the_data_times_that_for_the_model():
    objective = losses.build("dama")
    state, mean = objective.initial_state(), 0.0
    for stats in steps(objective, 3):
        stats = dataclasses.replace(stats, state=state)
        loss, _ = objective(stats)
        gap = ratios(stats) @ [1, -1]
        weight = kept(gap, mean, 0.2)
        hardness = sig(np.asarray(stats.margin, np.float64)) / sig(0.0482)
        beta = np.maximum(0.1 * hardness * np.mean(sig(gap) * weight) / sig(mean), 1e-3)
        np.testing.assert_allclose(loss, np.logaddexp(0, -beta * gap) * weight, rtol=1e-4, atol=1e-6)
        state, mean = objective.next_state(stats), 0.9 * mean + 0.1 * gap.mean()
        np.testing.assert_allclose(state["gap_mean"], mean, rtol=1e-5)


def test_with_a_key_the_kept_share_is_a_draw_of_the_key_alone():
    objective = losses.build("beta_dpo")
    stats = random_stats(objective, rows=20)
    draws = [np.asarray(objective(dataclasses.replace(stats, key=jax.random.key(seed)))[0]) > 0 for seed in (0, 0, 1, 2, 3)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert all(draw.sum() == 16 for draw in draws)
    assert len({draw.tobytes() for draw in draws}) > 1
    # of the key and the weights alone: other lengths and another learning state of the policy leave it as it is
    other = dataclasses.replace(stats, key=jax.random.key(0), answers=dataclasses.replace(stats.answers, lengths=stats.answers.lengths + 1))
    np.testing.assert_array_equal(np.asarray(objective(other)[0]) > 0, draws[0])


def test_draws_follow_the_weights():
    """A pair far from the running mean is drawn seldom, one near it often."""
    objective = losses.build("beta_dpo", rho=0.5)
    gap = jnp.array([0.0, 0.1, 3.0, -0.2])
    zero = jnp.zeros((4, 2))
    stats = BranchStats(losses.AnswerLogps(zero.at[:, 0].set(gap), zero + 1, zero))
    schedule = next(iter(objective.terms))[1].schedule
    stats = dataclasses.replace(stats, state=objective.initial_state())
    draw = jax.jit(jax.vmap(lambda key: schedule.keep(dataclasses.replace(stats, key=key), gap) > 0))
    share = np.asarray(draw(jax.random.split(jax.random.key(0), 2000))).mean(0)
    weight = np.exp(-0.5 * np.square(gap) / np.var(gap))
    p = weight / weight.sum()
    # the chance of each to be among two that are drawn without replacement
    expected = p + sum(np.where(np.arange(4) == i, 0, p[i] * p / (1 - p[i])) for i in range(4))
    np.testing.assert_allclose(share, expected, atol=0.04)


def test_largest_takes_the_first_of_equal_ones():
    np.testing.assert_array_equal(largest(jnp.array([1.0, 3.0, 1.0, 1.0]), 2), [1, 1, 0, 0])
    np.testing.assert_array_equal(largest(jnp.zeros(3), 3), [1, 1, 1])


def test_beta_by_epoch():
    objective = losses.build("dpo", beta_by_epoch=(0.1, 0.2))
    for epoch, beta in enumerate((0.1, 0.2, 0.2, 0.2)):
        loss, metrics = objective(dataclasses.replace(golden(), epoch=jnp.array(epoch)))
        np.testing.assert_allclose(loss, np.logaddexp(0, -beta * np.array([3, -3, -1.5])), rtol=1e-5)
        np.testing.assert_allclose(metrics["beta"], beta, rtol=1e-6)


def test_no_gradient_flows_into_a_schedule():
    """With beta as it is at this batch the gradient is that of DPO with this beta."""
    objective = losses.build("beta_dpo", rho=0.0)
    stats = random_stats(objective, rows=5)
    beta = float(objective(stats)[1]["beta"])
    gradient = lambda o: jax.grad(lambda s: o(s)[0].sum())(stats).answers.policy  # noqa: E731
    np.testing.assert_allclose(gradient(objective), gradient(losses.build("dpo", beta=beta)), rtol=1e-5)
