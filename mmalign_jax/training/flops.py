"""Model FLOPs of a training step from the formulas of the field: the compiler's own counts are wrong under scan."""

import dataclasses
import math
from collections.abc import Collection

import jax

from mmalign_jax.losses import Need, Objective
from mmalign_jax.models.attention import Regions
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.pairs import views
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
      reference: the reference is computed, too, for everything that the policy is, but for what is blind or said.
      other_answers: answers under a corrupted image, with gradient.
      blind_answers: answers under black images, without gradient.
      blind_reference: the reference computes these, too.
      said: what the policy finds likeliest under a corrupted image in the place of the chosen answer, and its log-probs under the row's own.
      tower_gradients: passes of the tower with a gradient of the pixels, for a picture of each row.
      more_answers: further answers of every row behind the same prefix.
      vocabulary: log-probs are read at all.
    """

    reference: bool = False
    other_answers: int = 0
    blind_answers: int = 0
    blind_reference: bool = False
    said: bool = False
    tower_gradients: int = 0
    more_answers: int = 0
    vocabulary: bool = True

    @classmethod
    def of(cls, objective: Objective, *, live_reference: bool) -> "Work":
        needs, view = objective.needs, objective.view
        said = Need.SELF_REJECTED in needs
        corruptions = (Need.OTHER_IMAGE in needs) + said  # each makes its own
        return cls(
            reference=live_reference,
            other_answers=objective.other_answers,
            blind_answers=objective.answers if Need.NO_IMAGE in needs else 0,
            blind_reference=live_reference and objective.blind_reference,
            said=said,
            tower_gradients=corruptions * views.parse(view, "the objective's view").tower_gradients if view else 0,
            more_answers=int(Need.MISMATCHED in needs),
            vocabulary=objective.reads_logps,
        )


def step_flops(config: MllmConfig, batch: PairBatch, *, work: Work, freeze: Collection[str]) -> float:
    """FLOPs of one step over all rows, those of another data set, too; recomputation not counted: 2 N a token forward, 4 N backward, plus attention.

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

    def head(answers: int) -> float:
        return answers * batch.answer_slots * c.width * c.vocab_size if work.vocabulary else 0

    def decoder(answers: int, passes: int) -> float:
        slots = batch.prefix_slots + answers * batch.answer_slots
        attention = 2 * c.layers * regions.products(answers) * c.heads * c.head_width
        return passes * (slots * c.layers * layer + attention + head(answers))

    tower = _tower(config, batch)
    # the features of a tower of which nothing trains serve policy and reference
    trains = "vision_tower" in training
    of_tower = 2 + (4 if "vision_tower" not in freeze else 2) + theirs if trains else 2
    total = rows * decoder(batch.answers + work.more_answers, passes) + (0 if held else pictures * of_tower * tower)
    if work.other_answers:
        total += rows * (decoder(work.other_answers, passes) + of_tower * tower)
    if work.blind_answers:
        beside = theirs if work.blind_reference else 0
        total += rows * decoder(work.blind_answers, 2 + beside) + pictures * (2 + beside * trains) * tower
    if work.said:
        total += rows * (decoder(1, 2) + 2 * tower + passes * head(1))
    total += rows * work.tower_gradients * 4 * tower
    if batch.auxiliary is not None:
        total += step_flops(config, batch.auxiliary, work=Work(), freeze=freeze)
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
