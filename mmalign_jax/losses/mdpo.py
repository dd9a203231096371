"""Conditional preference optimization for multimodal LLMs (mDPO, Wang et al., arXiv 2406.11839, section 3)."""

from mmalign_jax.losses import terms
from mmalign_jax.types import BranchStats


def mdpo(
    stats: BranchStats,
    *,
    beta: float = 0.1,
    image_weight: float = 1.0,
    anchor_weight: float = 1.0,
    delta: float = 0.0,
    nll_weight: float = 0.0,
) -> tuple[terms.PerPair, terms.Metrics]:
    """L = - log sigmoid(beta (s(y_w | m) - s(y_l | m)))     text: DPO
           - log sigmoid(beta (s(y_w | m) - s(y_w | m')))    image: the same answer under a corrupted image m'
           - log sigmoid(beta s(y_w | m) - delta)            anchor: the chosen answer's reward stays above delta

    with s = log pi - log pi_ref, summed over tokens. Policy and reference must have seen the same m'.

    Args:
      beta: strength of the tie to the reference, per nat of the summed log-ratio.
      image_weight, anchor_weight: weights of the second and the third term.
      delta: reward that the chosen answer must exceed.
      nll_weight: weight of the chosen answer's mean negative log-likelihood a token.
    """
    stats = terms.as_float32(stats)
    rewards = beta * terms.log_ratios(stats)
    chosen = rewards[:, 0]
    other_image = beta * (stats.policy_other_image - stats.reference_other_image)
    h = chosen - rewards[:, 1]
    text, image, anchor = terms.logistic(h), terms.logistic(chosen - other_image), terms.logistic(chosen - delta)
    loss = text + image_weight * image + anchor_weight * anchor - nll_weight * terms.mean_logps(stats)[:, 0]
    own = {
        "loss/text": text,
        "loss/image": image,
        "loss/anchor": anchor,
        "logps/chosen_other_image": stats.policy_other_image,
        "rewards/chosen_other_image": other_image,
        "rewards/accuracies_image": chosen > other_image,
    }
    return loss, terms.averaged(terms.pair_metrics(stats, loss, rewards, h) | terms.drift_metrics(stats, h) | own)
