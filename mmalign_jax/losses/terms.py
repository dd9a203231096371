"""What the objectives are made of: links, means and the metrics that they share. Everything is computed in float32 at least."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmalign_jax.types import BranchStats

Metrics = dict[str, Float[Array, ""]]
PerPair = Float[Array, " B"]
PerPairMetrics = dict[str, Float[Array, " B"] | Bool[Array, " B"]]  # not yet averaged


def as_float32(stats: BranchStats) -> BranchStats:
    """The statistics in float32, references cut off from differentiation.

    Log-ratios are small differences of large sums: sums that arrive in bfloat16 have lost their signal already, but nothing more is lost
    here. float64 is left as it is.
    """

    def read(x: Array) -> Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def fixed(x: Array | None) -> Array | None:
        return None if x is None else jax.lax.stop_gradient(read(x))

    return BranchStats(
        policy=read(stats.policy),
        lengths=jax.lax.stop_gradient(read(stats.lengths)),
        reference=fixed(stats.reference),
        policy_other_image=None if stats.policy_other_image is None else read(stats.policy_other_image),
        reference_other_image=fixed(stats.reference_other_image),
        margin=fixed(stats.margin),
    )


def logistic(h: PerPair, label_smoothing: float = 0.0) -> PerPair:
    """-(1 - eps) log sigmoid(h) - eps log sigmoid(-h): Bradley-Terry, with labels that are flipped with probability eps (cDPO)."""
    loss = -jax.nn.log_sigmoid(h)
    # log sigmoid(-h) = log sigmoid(h) - h
    return loss + label_smoothing * h if label_smoothing else loss


def mean_logps(stats: BranchStats) -> Float[Array, "B K"]:
    """Mean log-prob a token. An answer without scored tokens has mean 0."""
    return stats.policy / jnp.where(stats.lengths > 0, stats.lengths, 1.0)


def log_ratios(stats: BranchStats) -> Float[Array, "B K"]:
    """s = log policy - log reference, summed over the answer."""
    return stats.policy - stats.reference


def pair_metrics(stats: BranchStats, loss: PerPair, rewards: Float[Array, "B 2"], h: PerPair) -> PerPairMetrics:
    """Metrics of every pair objective: `rewards` are the implicit rewards, `h` is the argument of the pair's sigmoid."""
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    return {
        **likelihood_metrics(stats, loss),
        "logps/rejected": stats.policy[:, 1],
        "lengths/rejected": stats.lengths[:, 1],
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,  # a tie is wrong
        "grad_weight": jax.nn.sigmoid(-h),
    }


def likelihood_metrics(stats: BranchStats, loss: PerPair) -> PerPairMetrics:
    return {
        "loss": loss,
        "nll/chosen": -mean_logps(stats)[:, 0],
        "logps/chosen": stats.policy[:, 0],
        "lengths/chosen": stats.lengths[:, 0],
    }


def drift_metrics(stats: BranchStats, h: PerPair) -> PerPairMetrics:
    """How far the chosen answer has moved from the reference; displaced pairs improve while their chosen answer gets less likely."""
    chosen = log_ratios(stats)[:, 0]
    return {
        "chosen_drift": chosen,
        "chosen_drift_per_token": chosen / jnp.where(stats.lengths[:, 0] > 0, stats.lengths[:, 0], 1.0),
        "displacement_rate": (chosen < 0) & (h > 0),
    }


def averaged(per_pair: PerPairMetrics) -> Metrics:
    """Means over the whole batch, float32, cut off from differentiation."""
    return {name: jax.lax.stop_gradient(jnp.mean(value.astype(jnp.float32))) for name, value in per_pair.items()}
