"""AdPO (arXiv 2504.01735): the rejected answer, and the chosen answer's likelihood, under an adversarial image. Train the tower alone."""

from mmalign_jax.losses.parts import CHOSEN_OTHER_IMAGE, REJECTED_OTHER_IMAGE, ConfidenceLikelihood, Pair, Terms


def objective(*, beta: float = 0.1, likelihood_weight: float = 1.0, view: str = "pgd(2,10)") -> Terms:
    return Pair(beta, lose=REJECTED_OTHER_IMAGE) + likelihood_weight * ConfidenceLikelihood(CHOSEN_OTHER_IMAGE)
