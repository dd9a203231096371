"""DPO-Positive (Smaug, arXiv 2402.13228, equation 3): a penalty where the chosen answer is less likely than under the reference."""

from mmalign_jax.losses.parts import ChosenPenalty, Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, penalty_weight: float = 5.0, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, inside=(ChosenPenalty(penalty_weight),)) + nll_weight * Likelihood()
