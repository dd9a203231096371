"""Image-DPO (ViLP, arXiv 2501.00569): the same answer under the good and under a corrupted image, and nothing else."""

from mmalign_jax.losses.parts import CHOSEN_OTHER_IMAGE, Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, nll_weight: float = 0.0, view: str = "gaussian_blur(6)") -> Terms:
    return Pair(beta, lose=CHOSEN_OTHER_IMAGE) + nll_weight * Likelihood()
