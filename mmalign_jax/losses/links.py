"""Links: from the argument x of a preference, positive where the model agrees with it, to the loss. All are `[B] -> [B]` functions.

They are finite, with finite gradients, for arguments as large as 1e3 in float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PerPair = Float[Array, " B"]
Link = Callable[[PerPair], PerPair]

# exp of more than this is not far from float32's end
_LARGEST_EXPONENT = 80.0


def exp(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """exp, its argument bounded by 80: further than that there is no gradient either."""
    return jnp.exp(jnp.minimum(x, _LARGEST_EXPONENT))


def link(function: Callable[..., PerPair]) -> Callable[..., Link]:
    """Makes `f(x, *, setting=...)` a function of its settings that returns the link."""

    @functools.wraps(function)
    def with_settings(**settings: float) -> Link:
        return functools.partial(function, **settings)

    return with_settings


@link
def logistic(x: PerPair, *, label_smoothing: float = 0.0) -> PerPair:
    """-(1 - eps) log sigmoid(x) - eps log sigmoid(-x): Bradley-Terry, with labels that are flipped with probability eps (cDPO)."""
    # log sigmoid(-x) = log sigmoid(x) - x
    return -jax.nn.log_sigmoid(x) + (label_smoothing * x if label_smoothing else 0.0)


@link
def robust(x: PerPair, *, label_smoothing: float) -> PerPair:
    """[-(1 - eps) log sigmoid(x) + eps log sigmoid(-x)] / (1 - 2 eps): unbiased when labels are flipped at that rate; may be negative
    (arXiv 2403.00409, equation 12)."""
    return (-(1 - label_smoothing) * jax.nn.log_sigmoid(x) + label_smoothing * jax.nn.log_sigmoid(-x)) / (1 - 2 * label_smoothing)


@link
def hinge(x: PerPair) -> PerPair:
    """max(0, 1 - x) (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return jnp.maximum(0.0, 1.0 - x)


@link
def square(x: PerPair, *, target: float, scale: float = 1.0) -> PerPair:
    """((x - target) / scale)^2. With x = beta s, target 1/2 and scale beta it is (s - 1 / (2 beta))^2 (IPO, arXiv 2310.12036; SPPO)."""
    return jnp.square((x - target) / scale)


@link
def sigmoid(x: PerPair) -> PerPair:
    """sigmoid(-x) = 1 - sigmoid(x): bounded, so that pairs far from right count as little as those far from wrong (KTO, APO)."""
    return jax.nn.sigmoid(-x)


@link
def exo(x: PerPair, *, label_smoothing: float) -> PerPair:
    """Reverse KL from (sigmoid(x), sigmoid(-x)) to the smoothed label (1 - eps, eps) (EXO for pairs, arXiv 2402.00856, equation 15)."""
    agree, disagree = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    return jnp.exp(agree) * (agree - jnp.log1p(-label_smoothing)) + jnp.exp(disagree) * (disagree - jnp.log(label_smoothing))


@link
def discopop(x: PerPair, *, tau: float) -> PerPair:
    """Log-ratio modulated loss (DiscoPOP, arXiv 2406.08414): -(1 - c) log sigmoid(x) + c exp(-x), c = sigmoid(x / tau)."""
    # c exp(-x) in one exponential: each factor alone may leave float32 where their product is of order 1
    return -jax.nn.sigmoid(-x / tau) * jax.nn.log_sigmoid(x) + exp(jax.nn.log_sigmoid(x / tau) - x)
