"""Gradients of every objective: what may learn gets that of the loss, everything else gets none, and nothing extreme makes a NaN."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.branch_stats import LEARNING, VARIANT_IDS, VARIANTS, golden, golden_other_image, leaves, random_stats, with_leaf

from mmalign_jax import losses
from mmalign_jax.losses import AnswerLogps, BranchStats, Need


class Stopped:
    """Stands for `jax.lax.stop_gradient`: keeps what is stopped in the first pass, and gives the same again in every later one.

    So a difference quotient sees what the gradient sees: baselines, schedules and weights that do not move.
    """

    def __init__(self):
        self.kept, self.at, self.filling = [], 0, True

    def __call__(self, tree):
        if self.filling:
            self.kept.append(tree)
        self.at += 1
        return self.kept[self.at - 1]

    def again(self):
        self.at, self.filling = 0, False


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=VARIANT_IDS)
def test_gradient_equals_finite_differences(name, settings, monkeypatch):
    objective = losses.build(name, **settings)
    with jax.enable_x64(True):
        stats = random_stats(objective, rows=3, slots=2, dtype=jnp.float64)
        # no gradient may come from the metrics: they are added on this side alone
        both = lambda s: (lambda loss, metrics: loss.sum() + sum(metrics.values()))(*objective(s))  # noqa: E731
        own = leaves(jax.grad(both, allow_int=True)(stats))
        stopped = Stopped()
        monkeypatch.setattr(jax.lax, "stop_gradient", stopped)
        objective(stats)
        learns = False
        for path, value in leaves(stats).items():
            if path not in LEARNING:
                assert own[path].dtype == jax.dtypes.float0 or not np.any(own[path]), f"{path} gets a gradient"
                continue
            # along a random direction, in which no wrong element can hide
            step = 1e-5 * np.random.default_rng(1).normal(size=value.shape)
            difference = 0.0
            for sign in (1, -1):
                stopped.again()
                difference += sign * float(objective(with_leaf(stats, path, value + sign * step))[0].sum())
            np.testing.assert_allclose(np.sum(own[path] * step), difference / 2, rtol=1e-6, atol=1e-12, err_msg=path)
            learns = learns or bool(np.any(own[path]))
    assert learns


def extreme(objective: losses.Objective) -> BranchStats:
    """Answers of one token whose log-probs are 0, a few nats, or so low that a link's argument is of order 1e3; all combinations."""
    values = [0.0, -1e-7, -2.0, -1e4]
    policy_w, policy_l, reference_w, reference_l = jnp.array(list(itertools.product(values, repeat=4))).T
    rows = len(policy_w)

    def logps(policy, reference) -> AnswerLogps:
        token = lambda x: x[..., None] if Need.TOKENS in objective.needs else None  # noqa: E731
        inside = jnp.ones_like(policy)[..., None]
        return AnswerLogps(policy, jnp.ones_like(policy), reference, token(policy), token(reference), inside, inside > 0)

    both = logps(jnp.stack([policy_w, policy_l], 1), jnp.stack([reference_w, reference_l], 1))
    other = logps(jnp.stack([policy_l, policy_w], 1), jnp.stack([reference_w, reference_l], 1))
    one = logps(policy_l[:, None], reference_w[:, None])
    large = jnp.linspace(-1e3, 1e3, rows)
    return BranchStats(
        answers=both, other_image=other, no_image=other, mismatched=one, self_rejected=one, margin=large, auxiliary_nll=-policy_l,
        collision=-both.reference / 1e3 - 12.0, kl=-both.policy, epoch=jnp.array(7), scores=jnp.stack([large, large[::-1]], 1),
        desirable=large > 0, rewards=jnp.stack([large, large[::-1]], 1),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=VARIANT_IDS)
def test_extreme_pairs_stay_finite(name, settings):
    objective = losses.build(name, **settings)
    stats = extreme(objective)
    learning = {path: x for path, x in leaves(stats).items() if path in LEARNING}

    def total(changed):
        all_of = stats
        for path, x in changed.items():
            all_of = with_leaf(all_of, path, x)
        loss, metrics = objective(all_of)
        return loss.sum(), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(learning)
    assert jnp.isfinite(loss).all()
    for path, x in (gradient | metrics).items():
        assert jnp.isfinite(x).all(), path


def test_dpo_gradient_is_beta_times_sigmoid_of_minus_h():
    stats = golden()
    gradient = jax.grad(lambda p: losses.build("dpo")(with_leaf(stats, "answers.policy", p))[0].sum())(stats.answers.policy)
    weight = 0.1 / (1 + np.exp(0.1 * np.array([3, -3, -1.5])))
    np.testing.assert_allclose(gradient, np.stack([-weight, weight], axis=-1), rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "hinge", "ipo", "robust", "exo", "discopop", "simpo", "cpo", "f_dpo", "r_dpo"])
def test_equal_answers_teach_a_text_edge_nothing(name):
    """The two answers' gradients cancel where they are one and the same text."""
    settings = {"nll_weight": 0.0} if name == "cpo" else {}
    same = jnp.array([-20.0, -3.0])
    logps = AnswerLogps(jnp.stack([same, same], 1), jnp.full((2, 2), 4.0), jnp.stack([same + 1, same + 1], 1))
    move = lambda shift: losses.build(name, **settings)(BranchStats(dataclasses.replace(logps, policy=logps.policy + shift)))[0].sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(move)(jnp.zeros(())), 0.0, atol=1e-7)


@pytest.mark.parametrize("mean", [-1e-7, -1e-6, -0.6931, -0.6932, -30.0])
def test_log_odds_of_nearly_certain_answers(mean):
    logps = AnswerLogps(jnp.array([[mean, -1.0]]), jnp.ones((1, 2)))
    objective = losses.build("orpo", nll_weight=0.0, odds_weight=1.0)
    loss, gradient = jax.value_and_grad(lambda p: objective(BranchStats(dataclasses.replace(logps, policy=p)))[0].sum())(logps.policy)
    a, b = np.float64(np.float32(mean)), -1.0
    log_odds = a - np.log(-np.expm1(a)) - (b - np.log(-np.expm1(b)))
    np.testing.assert_allclose(loss, np.log1p(np.exp(-log_odds)), rtol=1e-5)
    assert jnp.isfinite(gradient).all() and gradient[0, 0] < 0 < gradient[0, 1]


def test_golden_pairs_are_not_reached_through_the_reference_or_the_lengths():
    gradient = leaves(jax.grad(lambda s: losses.build("mdpo")(s)[0].sum())(golden(**golden_other_image())))
    assert {path for path, x in gradient.items() if np.any(x)} == {"answers.policy", "other_image.policy"}
