"""Where two models part: the first stage of a prompt's way through them at which they differ by more than rounding."""

import math
from typing import Any

import numpy as np

from mmalign_jax.types import PREFIX, PairBatch, PreferenceRecord
from mmalign_jax.verify.ours import Ours
from mmalign_jax.verify.probe import Row

# Two float32 programs that do the same in another order of summation differ by rounding, which grows with the numbers themselves: logits
# of 1 and of 30 are not equally exact. Measured: at most 3e-6 of the largest logit, on SmolLM2 (30 layers, logits up to 38) as on tiny
# models of all families; the limit is ten times that. What is wrong is farther off: bfloat16 by 4e-3, one activation for another by 1e-4.
RELATIVE = 3e-5


def scale(values: np.ndarray) -> float:
    """What differences are measured by: the largest number, or 1."""
    return max(1.0, float(np.abs(values).max(initial=0)))


def largest_difference(mine: np.ndarray, other: np.ndarray) -> float:
    """NaN for unlike shapes."""
    return float(np.abs(mine - other).max(initial=0)) if mine.shape == other.shape else math.nan


def first_stage(ours: Ours, theirs: Any, record: PreferenceRecord, inputs: Any, mine: Row, other: Row) -> str:
    """Names the first stage that differs: pixels, tower, projector, embeddings, a layer, the final norm, the head, or what follows the prompt.

    Args:
      theirs, inputs: a `theirs.Theirs`, and what it makes of the record's prompt.
      mine, other: what the two sides said about the record.
    """
    if not np.array_equal(mine.ids, other.ids):
        return "the prompt's tokens differ, so nothing behind them was compared"
    if not np.array_equal(mine.grey_levels, other.grey_levels):
        return "the pixels differ first"
    batch, stages = ours.batch({record.id: record}), theirs.stages(inputs)
    on_image = batch.image_index[0][batch.role[0] == PREFIX] >= 0
    embedded, count, layers = ours.inputs(batch), len(mine.ids), len(stages.inputs) - 1
    if not _near(embedded[on_image], stages.inputs[0][on_image]):
        return _tower_or_projector(ours, batch, stages.features)
    if not _near(embedded, stages.inputs[0]):
        return "the embeddings of the words differ first"

    def behind(layer: int) -> bool:
        return _near(ours.hidden(batch, layer), ours.final_norm(stages.inputs[layer]))

    if not behind(layers):
        good, bad = 0, layers  # a difference does not heal, so halving finds where it begins
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if behind(middle) else (good, middle)
        return f"decoder layer {bad - 1} (of 0 to {layers - 1}) differs first; what goes into it is equal"
    if not _near(ours.hidden(batch, layers), stages.normed):
        return "the final norm differs first; what goes into it is equal"
    if not _near(mine.logits[:count], other.logits[:count]):
        return "the output head differs first; what goes into it is equal"
    return "the prompt is equal at every stage; what differs is behind it (cache, positions or masks of the answer)"


def _tower_or_projector(ours: Ours, batch: PairBatch, features: np.ndarray | None) -> str:
    mine = ours.tower(batch)
    if batch.patches is not None:
        mine = mine[batch.patches.segment[0] >= 0]
    # the tower's own features come first, those of its taps behind
    mine = mine[:, : ours.config.vision.width * len(ours.config.feature_layers)]
    if features is None or features.size != mine.size:
        return "image features differ first (vision tower or projector)"
    # sorted, because towers with windows have another order of patches, and some models shuffle features before their projector
    if _near(np.sort(mine, axis=None), np.sort(features, axis=None)):
        return "the projector differs first; what goes into it is equal"
    return "the vision tower's output differs first"


def _near(mine: np.ndarray, other: np.ndarray) -> bool:
    return largest_difference(mine, other) <= RELATIVE * scale(other)
