"""DPO for rankings (Plackett-Luce; arXiv 2305.18290, appendix A.3): all answers of a group, in the order of their scores."""

from mmalign_jax.losses.parts import Ranking, Terms


def objective(*, beta: float = 0.1) -> Terms:
    return 1.0 * Ranking(beta)
