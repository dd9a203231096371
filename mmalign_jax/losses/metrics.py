"""What an objective reports beside its loss. Everything is a mean over the rows, in float32, cut off from differentiation."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmalign_jax.losses.beta import BetaSchedule
from mmalign_jax.losses.branches import CHOSEN, CHOSEN_OTHER_IMAGE, REJECTED, Branch, Need
from mmalign_jax.losses.likelihood import Odds
from mmalign_jax.losses.links import logistic
from mmalign_jax.losses.reward_head import RewardHead
from mmalign_jax.losses.scores import Mean, Score
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.terms import Pair, PerPair, Point, Term, Terms, Transport

Metrics = dict[str, Float[Array, ""]]
PerPairMetrics = dict[str, Float[Array, " B"] | Bool[Array, " B"]]  # not yet averaged


def main_term(terms: Terms) -> Term | None:
    """The first term that compares answers: its beta and its score define the rewards."""
    return next((term for _, term in terms if isinstance(term, (Pair, Point, Transport, Odds))), None)


def compared(terms: Terms) -> Term | None:
    """The first term that gives two answers rewards, and sets one above the other."""
    main = main_term(terms)
    return main if main is not None else next((term for _, term in terms if isinstance(term, RewardHead)), None)


def rewards_of(main: Term, stats: BranchStats) -> tuple[PerPair, PerPair]:
    """The rewards of the two sides of a term of `compared`."""
    if isinstance(main, RewardHead):
        return main.scores(stats)
    (score, beta), (win, lose) = _scale(main, stats), _sides(main)
    return beta * score(stats, win), beta * score(stats, lose)


def metrics_of(
    terms: Terms, stats: BranchStats, loss: PerPair, by_label: dict[str, PerPair], *, reference_free: bool = False
) -> Metrics:
    """Metrics of a batch. Statistics that the objective does not need are not reported, whether they were given or not.

    Args:
      reference_free: the reference is one that says nothing, so there is no distance from it.
      by_label: unweighted loss of the terms, by their labels; reported where there are several.
    """
    needs = frozenset().union(*(term.needs for _, term in terms))
    if Need.SAMPLED in needs or Need.REWARDS in needs:
        return _of_groups(terms, stats, loss, by_label)
    if Need.LABELS in needs:
        return _of_labelled(terms, stats, loss)
    if Need.OTHER_IMAGE not in needs:
        stats = dataclasses.replace(stats, other_image=None)
    if not any(term.reads_logps for _, term in terms):
        stats = dataclasses.replace(stats, answers=dataclasses.replace(stats.answers, policy=None))
    out = _likelihood(stats, loss)
    if len(by_label) > 1:
        out |= {f"loss/{label}": value for label, value in by_label.items()}
    answers = stats.answers.lengths.shape[1]
    if answers > 1:
        out |= {"lengths/rejected": stats.answers.lengths[:, 1]}
        out |= {} if stats.answers.policy is None else {"logps/rejected": stats.answers.policy[:, 1]}
    # an objective that was left with one side of its pairs has no pair to report
    if (main := main_term(terms)) is not None and answers > max(branch.answer for branch in _sides(main)):
        h, rewards = _rewards(main, stats)
        out |= rewards | {"grad_weight": _grad_weight(main, stats)}
        if isinstance(main, Pair) and isinstance(main.beta, BetaSchedule):
            out["beta"] = main.betas(stats)
        if Need.REFERENCE in needs and not reference_free:
            out |= _drift(stats, h, displacement=not isinstance(main, Transport))  # whose h are no row's own
    for _, term in terms:
        out |= term.metrics(stats)
    if stats.other_image is not None:
        out["logps/chosen_other_image"] = stats.other_image.policy[:, 0]
    return {name: jax.lax.stop_gradient(jnp.mean(value.astype(jnp.float32))) for name, value in out.items()}


def _of_groups(terms: Terms, stats: BranchStats, loss: PerPair, by_label: dict[str, PerPair]) -> Metrics:
    """Of rows whose answers are a group: no answer is the chosen one."""
    rewards = stats.rewards if stats.sampled is None else stats.sampled.rewards
    out = {
        "loss": loss,
        "rewards/mean": jnp.mean(rewards, axis=1),
        "rewards/best": jnp.max(rewards, axis=1),
        "rewards/std": jnp.std(rewards, axis=1),
        "rewards/all_equal": jnp.max(rewards, axis=1) == jnp.min(rewards, axis=1),  # such a group teaches nothing
        "lengths/mean": jnp.mean(stats.answers.lengths, axis=1),
    }
    if len(by_label) > 1:
        out |= {f"loss/{label}": value for label, value in by_label.items()}
    for _, term in terms:
        out |= term.metrics(stats)
    return {name: jax.lax.stop_gradient(jnp.mean(value.astype(jnp.float32))) for name, value in out.items()}


def _of_labelled(terms: Terms, stats: BranchStats, loss: PerPair) -> Metrics:
    """Of rows of one answer each, desirable or not."""
    out = {"loss": loss, "logps/mean": stats.answers.policy[:, 0], "lengths/mean": stats.answers.lengths[:, 0], "labels/desirable": stats.desirable}
    for _, term in terms:
        out |= term.metrics(stats)
    return {name: jax.lax.stop_gradient(jnp.mean(value.astype(jnp.float32))) for name, value in out.items()}


def _rewards(main: Term, stats: BranchStats) -> tuple[PerPair, PerPairMetrics]:
    """The argument of the main term's link (of its kind), and the rewards of its two branches."""
    chosen, rejected = rewards_of(main, stats)
    h = chosen - rejected if isinstance(main, Point) else main.logit(stats)
    out = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,  # a tie is wrong
    }
    score, beta = _scale(main, stats)
    if stats.other_image is not None and (not score.reference or stats.other_image.reference is not None):
        other = beta * score(stats, CHOSEN_OTHER_IMAGE)
        out |= {"rewards/chosen_other_image": other, "rewards/accuracies_image": beta * score(stats, CHOSEN) > other}
    return h, out


def _scale(main: Term, stats: BranchStats) -> tuple[Score, PerPair | float]:
    """What a term compares, and beta."""
    if isinstance(main, Odds):
        return Score(Mean(), reference=False), 1.0
    return main.score, main.betas(stats) if isinstance(main, Pair) else main.beta


def _likelihood(stats: BranchStats, loss: PerPair) -> PerPairMetrics:
    answers = stats.answers
    length = answers.lengths[:, 0]
    if answers.policy is None:
        return {"loss": loss, "lengths/chosen": length}
    return {
        "loss": loss,
        "nll/chosen": -answers.policy[:, 0] / jnp.where(length > 0, length, 1.0) if stats.nll is None else stats.nll,
        "logps/chosen": answers.policy[:, 0],
        "lengths/chosen": length,
    }


def _sides(main: Term) -> tuple[Branch, Branch]:
    return (main.win, main.lose) if isinstance(main, Pair) else (CHOSEN, REJECTED)


def _grad_weight(main: Term, stats: BranchStats) -> PerPair:
    """How strongly a pair still pulls: the size of the link's derivative, sigmoid(-h) for DPO."""
    link, x = (logistic(), main.logit(stats)) if isinstance(main, Odds) else (main.link, main.logit(stats))
    return jnp.abs(jax.grad(lambda x: jnp.sum(link(x)))(x))


def _drift(stats: BranchStats, h: PerPair, displacement: bool) -> PerPairMetrics:
    """How far the chosen answer has moved from the reference; displaced pairs improve while their chosen answer gets less likely."""
    answers = stats.answers
    chosen, length = answers.policy[:, 0] - answers.reference[:, 0], answers.lengths[:, 0]
    out = {"chosen_drift": chosen, "chosen_drift_per_token": chosen / jnp.where(length > 0, length, 1.0)}
    return out | ({"displacement_rate": (chosen < 0) & (h > 0)} if displacement else {})
