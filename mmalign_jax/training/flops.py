"""Model FLOPs of a training step from the formulas of the field: the compiler's own counts are wrong under scan."""

import dataclasses
import math
from collections.abc import Collection

import jax

from mmalign_jax.losses import Need, Objective
from mmalign_jax.models.attention import Regions
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.types import PairBatch

# Peak dense bf16 FLOP/s of one JAX device, by `device_kind`, as the makers state them
PEAK = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12,
    "TPU v6e": 918e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step computes beside the policy's pass over its rows.

    Args:
      reference: the reference is computed, too, for everything that the policy is.
      other_answers: answers under a corrupted image, with gradient.
      blind_answers: answers under other images, without gradient.
      more_answers: further answers of every row behind the same prefix.
      vocabulary: log-probs are read at all.
    """

    reference: bool = False
    other_answers: int = 0
    blind_answers: int = 0
    more_answers: int = 0
    vocabulary: bool = True

    @classmethod
    def of(cls, objective: Objective, *, live_reference: bool) -> "Work":
        needs = objective.needs
        blind = objective.answers if Need.NO_IMAGE in needs else 0
        return cls(
            reference=live_reference,
            other_answers=objective.other_answers,
            blind_answers=blind + (Need.SELF_REJECTED in needs),
            more_answers=int(Need.MISMATCHED in needs),
            vocabulary=objective.reads_logps,
        )


def step_flops(config: MllmConfig, batch: PairBatch, *, work: Work, freeze: Collection[str]) -> float:
    """FLOPs of one step over all rows, recomputation not counted: 2 N a token forward, 4 N backward, plus attention.

    Rows count, of however many pairs. Pictures that rows share count once; under a view, each row has its own. Where rows bring the tower's
    features, only black pictures count, one tile of each. Slots are counted as they are computed, padding too, and so are products of queries
    and keys. Frozen weights need no gradient of their own, only carry that of what trains in and below them. Low-rank factors themselves are not
    counted: about 2 rank / width of their linears.

    Args:
      freeze: parts whose own weights do not train. `config.lora` says which have factors that do.
    """
    c = config.decoder
    rows = batch.tokens.size // batch.tokens.shape[-1]
    held = batch.images is None
    pictures = math.prod(batch.features.shape[:-2] if held else batch.images.shape[:-4])
    layer = 2 * c.width * c.head_width * (c.heads + c.kv_heads) + 3 * c.width * c.mlp_width
    training = {"vision_tower", "projector", "decoder"} - set(freeze) | set(config.lora)
    backward = 4 if "decoder" not in freeze else 2 if training else 0
    theirs = 2 if work.reference else 0
    passes = 2 + backward + theirs

    regions = Regions(batch.prefix_slots, batch.answer_slots, c.bidirectional == "none", batch.longest)

    def decoder(answers: int, passes: int) -> float:
        slots = batch.prefix_slots + answers * batch.answer_slots
        attention = 2 * c.layers * regions.products(answers) * c.heads * c.head_width
        head = answers * batch.answer_slots * c.width * c.vocab_size if work.vocabulary else 0
        return passes * (slots * c.layers * layer + attention + head)

    tower = _tower(config, batch)
    # the features of a tower of which nothing trains serve policy and reference
    if "vision_tower" in training:
        of_tower = 2 + (4 if "vision_tower" not in freeze else 2) + theirs
    else:
        of_tower = 2
    more = work.more_answers
    total = rows * decoder(batch.answers + more, passes) + (0 if held else pictures * of_tower * tower)
    others = ((work.other_answers, passes, rows * of_tower), (work.blind_answers, 2 + theirs, pictures * 2))
    for answers, times, tower_times in others:
        if answers:
            total += rows * decoder(answers, times) + tower_times * tower
    return float(total)


def _tower(config: MllmConfig, batch: PairBatch) -> float:
    """Products of the tower's pass over one row's pictures; over one black tile where rows bring features."""
    v = config.vision
    if batch.patches is None:
        patches, tiles = v.patches, 1 if batch.images is None else batch.images.shape[-4]
        tokens = seen = patches + int(v.class_token)
    else:
        patches = tokens = seen = batch.patches.segment.shape[-1]
        tiles = 1
        if v.window:
            # the layers that see whole pictures, and those that see a window
            full = len(v.full_layers) / v.layers
            seen = full * tokens + (1 - full) * v.window_slots
    layer = 4 * v.width * v.width + (3 if v.gated else 2) * v.width * v.mlp_width
    tower = tokens * config.used_vision_layers * (layer + 2 * seen * v.width)
    tower += patches * 3 * v.frames_per_patch * v.patch_size**2 * v.width
    return tiles * tower


def mfu(flops: float, seconds: float) -> float | None:
    """Model FLOPs utilisation over all devices; None on a device whose peak is not known."""
    peak = PEAK.get(jax.devices()[0].device_kind)
    return None if peak is None else flops / seconds / (peak * jax.device_count())
