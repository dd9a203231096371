"""The loss of a reward model: Bradley-Terry on the scores of two answers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Metrics = dict[str, Float[Array, ""]]


def bradley_terry(
    chosen: Float[Array, " B"], rejected: Float[Array, " B"], *, margin: Float[Array, " B"] | None = None, centering: float = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """-log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2 of each pair, and metrics (means over the batch).

    Args:
      chosen, rejected: scores of the two answers, from a head on the hidden state of the last token that is not padding.
      margin: by how much the chosen answer's score should be larger (Llama 2, arXiv 2307.09288, section 3.2.2).
      centering: keeps scores near 0, which differences alone leave open (arXiv 2312.09244); 0.01 is usual.
    """
    chosen, rejected = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (chosen, rejected))
    gap = chosen - rejected
    loss = -jax.nn.log_sigmoid(gap if margin is None else gap - jax.lax.stop_gradient(margin)) + centering * jnp.square(chosen + rejected)
    both = jnp.stack([chosen, rejected])
    metrics = {
        "loss": jnp.mean(loss),
        "scores/accuracies": jnp.mean(gap > 0),  # a tie is wrong
        "scores/margins": jnp.mean(gap),
        "scores/mean": jnp.mean(both),
        "scores/std": jnp.std(both),
    }
    return loss, {name: jax.lax.stop_gradient(value.astype(jnp.float32)) for name, value in metrics.items()}
