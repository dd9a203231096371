"""WPO (arXiv 2406.11827): DPO, each pair weighted by how likely the policy is to write its answers."""

from mmalign_jax.losses.parts import Likelihood, Pair, Terms, Trust


def objective(*, beta: float = 0.01, capped: bool = True, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, trust=Trust(capped)) + nll_weight * Likelihood()
