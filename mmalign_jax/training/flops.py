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
      drawn: log-probs of the policy that drew the rows.
      updates: of the policy on the same rows.
      vocabulary: log-probs are read at all.
    """

    reference: bool = False
    other_answers: int = 0
    blind_answers: int = 0
    blind_reference: bool = False
    said: bool = False
    tower_gradients: int = 0
    more_answers: int = 0
    drawn: bool = False
    updates: int = 1
    vocabulary: bool = True

    @classmethod
    def of(cls, objective: Objective, *, live_reference: bool, updates: int = 1, older_policy: bool = False) -> "Work":
        """Args: older_policy: another than the step's drew the rows, where they are samples."""
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
            drawn=Need.SAMPLED in needs and (updates > 1 or older_policy),
            updates=updates,
            vocabulary=objective.reads_logps,
        )


@dataclasses.dataclass(frozen=True)
class _Products:
    """Multiplications and additions of a forward pass: with weights, and of queries, keys and values with one another."""

    linears: float
    attention: float

    def flops(self, forward: int, backward: int, weights: bool) -> float:
        """Of so many passes, so many of which have a gradient: that of the inputs, and, where the weights train, theirs."""
        return 2 * forward * (self.linears + self.attention) + backward * ((4 if weights else 2) * self.linears + 4 * self.attention)


def step_flops(config: MllmConfig, batch: PairBatch, *, work: Work, freeze: Collection[str]) -> float:
    """FLOPs of one step over all rows, those of another data set, too; recomputation not counted: 2 N a token forward, 4 N backward, plus attention.

    Rows count, of however many pairs. Pictures that rows share count once; under a view, each row has its own. Where rows bring the tower's
    features, only black pictures count, one tile of each. Slots are counted as they are computed, padding too, and so are products of queries
    and keys. Frozen weights need no gradient of their own, only carry that of what trains in and below them. Of several updates on the same rows,
    what the policy does not change counts once: the reference, and the features of a tower that does not train. Low-rank factors themselves are
    not counted: about 2 rank / width of their linears.

    Args:
      freeze: parts whose own weights do not train. `config.lora` says which have factors that do.
    """
    c = config.decoder
    rows = batch.tokens.size // batch.tokens.shape[-1]
    held = batch.images is None
    pictures = math.prod(batch.features.shape[:-2] if held else batch.images.shape[:-4])
    layer = 2 * c.width * c.head_width * (c.heads + c.kv_heads) + 3 * c.width * c.mlp_width
    training = {"vision_tower", "projector", "decoder"} - set(freeze) | set(config.lora)
    n, theirs, trains = work.updates, int(work.reference), "vision_tower" in training
    ours = n if training else 0
    regions = Regions(batch.prefix_slots, batch.answer_slots, c.bidirectional == "none", batch.longest)

    def head(answers: int) -> float:
        return answers * batch.answer_slots * c.width * c.vocab_size if work.vocabulary else 0

    def decoder(answers: int, forward: int, backward: int) -> float:
        slots = batch.prefix_slots + answers * batch.answer_slots
        products = _Products(slots * c.layers * layer + head(answers), 2 * c.layers * regions.products(answers) * c.heads * c.head_width)
        return products.flops(forward, backward, "decoder" not in freeze)

    tower = _tower(config, batch)

    def see(forward: int, backward: int = 0) -> float:
        """A tower of which nothing trains is computed once for policy, reference and all updates."""
        return tower.flops(forward, backward, "vision_tower" not in freeze) if trains else tower.flops(1, 0, False)

    total = rows * decoder(batch.answers + work.more_answers, n + theirs + work.drawn, ours)
    total += 0 if held else pictures * see(n + theirs + work.drawn, n)
    if work.other_answers:
        total += rows * (decoder(work.other_answers, n + theirs, ours) + see(n + theirs, n))
    if work.blind_answers:
        passes = n + theirs * work.blind_reference
        total += rows * decoder(work.blind_answers, passes, 0) + pictures * see(passes)
    if work.said:
        total += rows * (decoder(1, n, 0) + see(n) + _Products(head(1), 0).flops(n + theirs, ours, "decoder" not in freeze))
    steps = work.tower_gradients * (n if trains else 1)
    total += rows * tower.flops(steps, steps, False)
    if batch.auxiliary is not None:
        total += step_flops(config, batch.auxiliary, work=Work(updates=n), freeze=freeze)
    return float(total)


def _tower(config: MllmConfig, batch: PairBatch) -> _Products:
    """Of one row's pictures; of one black tile where rows bring features."""
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
    of_pixels = patches * 3 * v.frames_per_patch * v.patch_size**2 * v.width
    layers = tiles * config.used_vision_layers
    return _Products(layers * tokens * layer + tiles * of_pixels, layers * tokens * 2 * seen * v.width)


def mfu(flops: float, seconds: float) -> float | None:
    """Model FLOPs utilisation over all devices; None on a device whose peak is not known."""
    peak = PEAK.get(jax.devices()[0].device_kind)
    return None if peak is None else flops / seconds / (peak * jax.device_count())
