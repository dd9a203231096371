"""POVID, stage 2 (arXiv 2402.11411): DPO, and the chosen answer against what the policy says, token by token, under a noisy image."""

from mmalign_jax.losses.parts import SELF_REJECTED, Likelihood, Pair, Terms


def objective(
    *, beta: float = 0.1, self_weight: float = 0.5, pair_weight: float = 0.5, nll_weight: float = 0.0, view: str = "diffusion(500)"
) -> Terms:
    return pair_weight * Pair(beta) + self_weight * Pair(beta, lose=SELF_REJECTED) + nll_weight * Likelihood()
