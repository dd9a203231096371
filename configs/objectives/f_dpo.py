"""f-DPO (arXiv 2309.16240): another divergence from the reference than the reverse KL: reverse_kl, forward_kl, js, alpha."""

from mmalign_jax.losses.parts import Divergence, Pair, Score, Terms, logistic


def objective(*, beta: float = 0.1, divergence: str = "js", alpha: float = 0.5, label_smoothing: float = 0.0) -> Terms:
    score = Score(transform=Divergence(divergence, alpha))
    return 1.0 * Pair(beta, logistic(label_smoothing=label_smoothing), score=score)
