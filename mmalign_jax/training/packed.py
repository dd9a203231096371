"""What rows of several pairs cost, for the choice of their shapes (`data.packing`), and what is told of it before training."""

from collections.abc import Callable, Collection, Iterator

import jax
import numpy as np

from mmalign_jax.data.packing import Chosen, Cost, PackedShape
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pictures import RowTraits
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.training.flops import Work, step_flops
from mmalign_jax.types import PairBatch

LITTLE = 0.95  # of the cost of rows of one pair; above it, the log says so


def packed_flops(config: MllmConfig, shape: PackedShape, answers: int, *, work: Work, freeze: Collection[str]) -> float:
    """`step_flops` of the rows of one device and one part of a step.

    Args:
      answers: K.
    """
    side = config.vision.image_size
    slots = jax.ShapeDtypeStruct((1, shape.rows, shape.prefix_slots + answers * shape.answer_slots), np.int32)
    images, one = jax.ShapeDtypeStruct((1, 1, shape.tiles, side, side, 3), np.uint8), jax.ShapeDtypeStruct((1, shape.rows), np.float32)
    sizes = {"prefix_slots": shape.prefix_slots, "answer_slots": shape.answer_slots, "longest": shape.longest}
    return step_flops(config, PairBatch(slots, slots, slots, images, slots, slots, one, one, **sizes), work=work, freeze=freeze)


def check_packed(traits: RowTraits, pairs: int) -> None:
    """Args: pairs: of a device and part of a step.

    Raises:
      UserError: the model's rows cannot hold several pairs, or there is one alone.
    """
    if not traits.tile_features:
        raise UserError("config.data.packed: this model's pictures have any size, and their patches are those of one row; use config.data.buckets")
    if traits.mrope:
        raise UserError("config.data.packed: this model's tokens turn by time, row and column, which is not built for it; use config.data.buckets")
    if pairs == 1:
        raise UserError(
            "config.data.packed: a device has one pair of each part of a step (config.train.batch_size, config.train.accumulate), so no pairs share "
            "a row; use config.data.buckets"
        )


def cost_of(config: MllmConfig, answers: int, *, work: Work, freeze: Collection[str]) -> Cost:
    """FLOPs of a device's rows by their shape, of a model that `check_packed` lets pass."""
    return lambda shape: packed_flops(config, shape, answers, work=work, freeze=freeze)


def in_words(found: Chosen, answers: int, attention_of: Callable[[int, int, tuple[int, int]], str]) -> Iterator[str]:
    """Lines that say how full the rows are, and what they save.

    Args:
      attention_of: `Mllm.attention_of`.
    """
    one = found.shapes[-1]
    yield (
        f"{one.rows} pairs of a device share rows: {found.empty:.0%} of the slots are empty, and a step takes {found.cost:.0%} of the FLOPs of rows "
        f"of one pair ({one.prefix_slots} + {answers} x {one.answer_slots} tokens)"
    )
    if found.cost > LITTLE:
        yield "  That is little less; rows of one pair in buckets (config.data.buckets) may cost less"
    for shape, used in zip(found.shapes, found.used, strict=True):
        how = attention_of(shape.prefix_slots, shape.answer_slots, shape.longest)
        pictures = f"{shape.tiles} picture{'s' * (shape.tiles != 1)}"
        size = f"{shape.rows} row{'s' * (shape.rows != 1)} of {shape.prefix_slots} + {answers} x {shape.answer_slots} tokens, {pictures}"
        yield f"  {size}: {used:.0%} of the steps; attention by {how}"
