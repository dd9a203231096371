"""V-DPO (arXiv 2411.02712): the policy's log-probs are guided away from what it would say without the image."""

from mmalign_jax.losses.parts import CHOSEN_NO_IMAGE, Likelihood, Pair, Score, Terms


def objective(*, beta: float = 0.1, guidance: float = 0.5, bias_weight: float = 0.0, nll_weight: float = 0.0) -> Terms:
    """A guidance of 0 is DPO. bias_weight: of a pair of the chosen answer with and without the image."""
    bias = Pair(beta, lose=CHOSEN_NO_IMAGE)
    return Pair(beta, score=Score(guidance=guidance)) + bias_weight * bias + nll_weight * Likelihood()
