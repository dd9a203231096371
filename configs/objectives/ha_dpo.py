"""HA-DPO (arXiv 2311.16839): DPO, and the likelihood of rows of the original instruction data (config.auxiliary)."""

from mmalign_jax.losses.parts import Auxiliary, Pair, Terms


def objective(*, beta: float = 0.1, auxiliary_weight: float = 0.5) -> Terms:
    return Pair(beta) + auxiliary_weight * Auxiliary()
