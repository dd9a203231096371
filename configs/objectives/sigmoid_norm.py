"""Length-normalised DPO (Tulu 3; SimPO's ablation): -log sigmoid(beta (s_w / |y_w| - s_l / |y_l|))."""

from mmalign_jax.losses.parts import Likelihood, Mean, Pair, Score, Terms


def objective(*, beta: float = 5.0, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, score=Score(Mean())) + nll_weight * Likelihood()
