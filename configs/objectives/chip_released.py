"""CHiP as its code runs it: text gap, image gap and token KL in one logit, with segment weights in both gaps."""

from mmalign_jax.losses.parts import ImageGap, Pair, Score, SequenceKl, Terms, Weighted


def objective(*, beta: float = 0.1, alpha: float = 0.1, changed_weight: float = 4.0, view: str = "diffusion(500)") -> Terms:
    return 1.0 * Pair(beta, score=Score(Weighted(changed_weight, mean=False)), inside=(ImageGap(), SequenceKl(alpha)))
