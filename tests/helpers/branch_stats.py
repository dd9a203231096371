"""Branch statistics for tests of objectives: the three pairs of the golden numbers, random ones, and the list of what may be differentiated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmalign_jax import losses
from mmalign_jax.losses import AnswerLogps, BranchStats, Need, Objective
from mmalign_jax.types import Sampled

LP_W, LP_L = [-20.0, -35.5, -12.25], [-24.0, -30.0, -12.75]
REF_W, REF_L = [-22.0, -34.0, -12.0], [-23.0, -31.5, -14.0]
LEN_W, LEN_L = [10.0, 20.0, 5.0], [12.0, 15.0, 8.0]
S_OTHER = np.array([-1.0, 1.0, 0.5])  # log-ratios of the chosen answer under the other image
REF_OTHER = np.array([-25.0, -36.0, -13.0])

# Objectives of pairs, labelled answers and ranked groups by their files; what learns from samples is tested as a function of arrays
# (test_policy_gradient, test_policy_terms)
OF_PAIRS = [name for name in losses.names() if Need.SAMPLED not in losses.build(name).needs]
# And those of their settings that switch on code which the defaults leave out.
VARIANTS = [
    *((name, {}) for name in OF_PAIRS),
    ("dpo", {"label_smoothing": 0.1, "nll_weight": 0.3}),
    ("dpo", {"beta_by_epoch": (0.1, 0.2, 0.4)}),
    ("ipo", {"length_normalized": False}),
    *(("f_dpo", {"divergence": name}) for name in ("reverse_kl", "forward_kl", "alpha")),
    ("wpo", {"capped": False}),
    ("v_dpo", {"bias_weight": 0.5}),
    ("sft", {"length_norm": 32.0}),
    ("kto", {"desirable_weight": 1.33, "undesirable_weight": 0.5}),
    ("kto_unpaired", {"desirable_weight": 1.33, "undesirable_weight": 0.5}),
    ("reward_model", {"margin_weight": 0.5, "square_weight": 0.1}),
]
VARIANT_IDS = [" ".join([name, *(f"{k}={v}" for k, v in settings.items())]) for name, settings in VARIANTS]

# What a loss may be differentiated by. Everything else is a reference, a measurement or a label.
LEARNING = {
    *(f"{images}.{what}" for images in ("answers", "other_image", "self_rejected") for what in ("policy", "policy_tokens")),
    "nll", "auxiliary_nll", "kl", "scores", "values",
}  # fmt: skip


def golden(dtype=jnp.float32, **more) -> BranchStats:
    """The three pairs of the golden numbers, both models; `more` as in `BranchStats.pair`."""
    return BranchStats.pair(*(jnp.array(x, dtype) for x in (LP_W, LP_L, LEN_W, LEN_L, REF_W, REF_L)), **more)


def golden_other_image(dtype=jnp.float32) -> dict[str, jax.Array]:
    """Arguments of `golden` that mDPO needs."""
    return {
        "policy_chosen_other_image": jnp.array(REF_OTHER + S_OTHER, dtype),
        "reference_chosen_other_image": jnp.array(REF_OTHER, dtype),
    }


def random_stats(objective: Objective, *, rows: int = 4, slots: int = 3, seed: int = 0, dtype=jnp.float32) -> BranchStats:
    """Random statistics of exactly what the objective declares that it needs."""
    rng = np.random.default_rng(seed)
    needs = objective.needs

    def logps(count: int, reference: bool = True) -> AnswerLogps:
        lengths = rng.integers(1, slots + 1, size=(rows, count))
        inside = np.arange(slots) < lengths[..., None]
        policy, theirs = (np.where(inside, -rng.exponential(1.5, size=inside.shape) - 0.05, 0.0) for _ in range(2))
        cast = lambda x: jnp.array(x, dtype)  # noqa: E731
        out = AnswerLogps(cast(policy.sum(-1)), cast(lengths))
        if reference and Need.REFERENCE in needs:
            out = dataclasses.replace(out, reference=cast(theirs.sum(-1)))
        if Need.TOKENS in needs:
            out = dataclasses.replace(out, policy_tokens=cast(policy), token_weight=cast(inside))
            out = dataclasses.replace(out, reference_tokens=None if out.reference is None else cast(theirs))
        return dataclasses.replace(out, changed=jnp.array(inside & (rng.random(inside.shape) < 0.5))) if Need.CHANGED in needs else out

    def some(need: Need, value):
        return value if need in needs else None

    def real(*shape: int, low: float = 0.1, high: float = 3.0) -> jax.Array:
        return jnp.array(rng.uniform(low, high, size=shape), dtype)

    def sampled() -> Sampled:
        """A little off the policy, some of it beyond the clips."""
        inside = answers.token_weight > 0
        logps = jnp.where(inside, answers.policy_tokens + real(*inside.shape, low=-0.4, high=0.4), 0.0)
        total = jnp.broadcast_to(jnp.sum(answers.lengths) / rows, (rows,)).astype(dtype)
        return Sampled(real(*inside.shape[:2]), total, jnp.full(rows, 8.0, dtype), logps)

    def values() -> jax.Array:
        count = answers.lengths.shape[1]
        return jnp.where(np.arange(slots) < answers.lengths[..., None], real(rows, count, slots, low=-1.0), 0.0)

    answers = logps(4 if {Need.SAMPLED, Need.REWARDS} & needs else objective.answers)
    return BranchStats(
        answers=answers,
        sampled=sampled() if Need.SAMPLED in needs else None,
        desirable=some(Need.LABELS, jnp.arange(rows) % 3 != 1),
        rewards=some(Need.REWARDS, jnp.array(rng.integers(0, 3, size=(rows, 4)), dtype)),
        other_image=some(Need.OTHER_IMAGE, logps(max(objective.other_answers, 1))),
        no_image=some(Need.NO_IMAGE, logps(2)),
        mismatched=some(Need.MISMATCHED, logps(1)),
        self_rejected=some(Need.SELF_REJECTED, logps(1)),
        margin=some(Need.MARGIN, real(rows, low=-1.0)),
        auxiliary_nll=some(Need.AUXILIARY, real(rows)),
        collision=some(Need.COLLISION, -real(rows, 2)),
        kl=some(Need.KL, real(rows, 2)),
        scores=some(Need.SCORES, real(rows, objective.answers, low=-1.0)),
        values=values() if Need.VALUES in needs else None,
        epoch=some(Need.EPOCH, jnp.array(1)),
    )


def leaves(stats: BranchStats) -> dict[str, jax.Array]:
    """The arrays of the statistics by dotted name."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree_util.tree_leaves_with_path(stats)}


def with_leaf(stats: BranchStats, name: str, value: jax.Array) -> BranchStats:
    """The statistics with one array, `answers.policy` say, replaced."""
    head, _, tail = name.partition(".")
    return dataclasses.replace(stats, **{head: dataclasses.replace(getattr(stats, head), **{tail: value}) if tail else value})
