"""What padding costs with buckets, and what rows of several pairs would save at most, by the FLOP formula.

    python -m mmalign_jax.benchmark.packing

Lengths are drawn, nothing is computed. The step is DPO with a live reference and a frozen tower. A row of several pairs is counted in its
favour: every pair takes its own tokens and sees only itself, pictures, logits and bookkeeping are without padding, the fit is the best over the
whole set, and what is empty costs the decoder's linears alone. What `data.packed` leaves beside that is computed as a run does it, for so many pairs
on each of so many devices: shapes, dealing and fit are those of training, and slots and products are counted as they are computed.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmalign_jax.data.buckets import split
from mmalign_jax.data.layout import RowLayout, RowSize
from mmalign_jax.data.packing import TRIED_PAIRS, TRIED_STEPS, Chosen, PackedShape, choose, deal
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.presets import preset
from mmalign_jax.report.console import format_table
from mmalign_jax.training.flops import Work, step_flops
from mmalign_jax.training.packed import packed_flops
from mmalign_jax.types import PairBatch

PAIRS, BUCKETS = 4096, (1, 4, 8)  # of a set; most buckets that are tried
SPLITS = ((8, 8), (64, 1))  # pairs of a device and part of a step, and how many devices there are
SLOTS = (4096, 8192, 16384)  # of a row of several pairs; the best of these counts
_TEMPLATE = 20  # tokens around a prompt
_MULTIPLE = 8  # as `data.plan` rounds


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A set's lengths: for each pair, drawn from a generator, its tokens before the answers, tiles, and the answers' tokens."""

    name: str
    model: str
    draw: Callable[[np.random.Generator], tuple[int, int, tuple[int, int]]]

    def sizes(self, count: int, seed: int) -> list[RowSize]:
        random = np.random.default_rng(seed)
        drawn = (self.draw(random) for _ in range(count))
        return [RowSize(prefix, tiles, (336, 336), 0, answers, (0, 0)) for prefix, tiles, answers in drawn]


def _answers(random: np.random.Generator, median: float, spread: float = 0.4) -> tuple[int, int]:
    """Two answers to one prompt are more alike than answers to two prompts."""
    common = np.log(median) + spread * random.standard_normal()
    first, second = np.exp(common + 0.15 * random.standard_normal(2))
    return max(2, round(first)), max(2, round(second))


def _llava(random: np.random.Generator, median: float = 90.0) -> tuple[int, int, tuple[int, int]]:
    return 576 + _TEMPLATE + int(random.integers(10, 61)), 1, _answers(random, median)


def _any_resolution(random: np.random.Generator) -> tuple[int, int, tuple[int, int]]:
    return int(random.integers(2304, 2881)) + _TEMPLATE + int(random.integers(10, 61)), 5, _answers(random, 90.0)


def _text(random: np.random.Generator) -> tuple[int, int, tuple[int, int]]:
    return _TEMPLATE + int(np.exp(random.uniform(np.log(50), np.log(500)))), 0, _answers(random, np.exp(random.uniform(np.log(50), np.log(500))))


def _short_and_long(random: np.random.Generator) -> tuple[int, int, tuple[int, int]]:
    return _llava(random, 5.0 if random.random() < 0.5 else 150.0)


def _pictures_and_text(random: np.random.Generator) -> tuple[int, int, tuple[int, int]]:
    return (_llava if random.random() < 0.5 else _text)(random)


SETS = (
    Lengths("576 image tokens, answers about 90", "llava-1.5-7b", _llava),
    Lengths("576, half of the answers about 5, half about 150", "llava-1.5-7b", _short_and_long),
    Lengths("2,304 to 2,880, answers about 90", "llava-1.6-vicuna-7b", _any_resolution),
    Lengths("576 or none, half each", "llava-1.5-7b", _pictures_and_text),
    Lengths("text alone, 50 to 500 a part", "llava-1.5-7b", _text),
)


@dataclasses.dataclass(frozen=True)
class Found:
    """Of a set, by number of buckets: the share of slots that is empty, and FLOPs relative to no padding.

    `packed` is that of rows of `slots` slots with several pairs, `ours` of those that training makes, by how pairs are split.
    """

    empty: dict[int, float]
    flops: dict[int, float]
    slots: int
    packed_empty: float
    packed: float
    ours: dict[tuple[int, int], tuple[float, float]]  # (share that is empty, FLOPs)

    def saved(self, buckets: int) -> float:
        """Share of the FLOPs with so many buckets that rows of several pairs would save at most."""
        return 1.0 - self.packed / self.flops[buckets]


def analyse(
    sizes: Sequence[RowSize],
    model: MllmConfig,
    buckets: Sequence[int] = BUCKETS,
    slots: Sequence[int] = SLOTS,
    splits: Sequence[tuple[int, int]] = (),
) -> Found:
    """Args: slots: of a row of several pairs; those that hold the longest pair are tried. splits: see `SPLITS`."""

    @functools.cache
    def flops(prefix: int, answer: int, tiles: int) -> float:
        return step_flops(model, _row(prefix, answer, tiles), work=Work(reference=True), freeze=("vision_tower",))

    # what an answer costs depends on its own length alone, so two of unlike lengths cost the mean of two pairs
    alone = sum(flops(size.prefix, answer, size.images) / 2 for size in sizes for answer in size.answers)
    empty, relative = {}, {}
    for most in buckets:
        found = split(sizes, 2, most, _layout)
        empty[most] = sum(len(bucket.members) * bucket.padding_fraction for bucket in found) / len(sizes)
        by_layout = ((len(b.members), b.layout) for b in found)
        relative[most] = sum(count * flops(layout.prefix_slots, layout.answer_slots, layout.images) for count, layout in by_layout) / alone
    lengths = [size.prefix + sum(size.answers) for size in sizes]
    unused = {room: best_fit(lengths, room) for room in slots if room >= max(lengths)}
    best = min(unused, key=lambda room: sum(unused[room]))
    of_slot = flops(2, 1, 0) - flops(1, 1, 0)
    ours = {}
    for pairs, devices in splits:
        found = packed(sizes, model, pairs, devices)
        ours[pairs, devices] = found.empty, found.mean / (alone / len(sizes) * pairs)
    return Found(empty, relative, best, sum(unused[best]) / (len(unused[best]) * best), 1.0 + sum(unused[best]) * of_slot / alone, ours)


def packed(sizes: Sequence[RowSize], model: MllmConfig, pairs: int, devices: int) -> Chosen:
    """What training makes of steps of `pairs` pairs on each of `devices` devices, every epoch in another order."""
    lengths, tiles = np.array([(size.prefix, *size.answers) for size in sizes]), np.array([size.images for size in sizes])
    batch, random = pairs * devices, np.random.default_rng(0)
    steps = max(1, min(TRIED_STEPS, TRIED_PAIRS // batch))
    order = np.concatenate([random.permutation(len(sizes)) for _ in range(-(-steps * batch // len(sizes)))])
    dealt = np.stack([numbers[deal(lengths[numbers], devices)] for numbers in order[: steps * batch].reshape(steps, batch)])
    layout = _layout(sizes)
    alone = (layout.prefix_slots, layout.answer_slots)
    last = PackedShape(pairs, *alone, max(1, pairs * layout.images), alone)
    flops = functools.partial(packed_flops, model, answers=2, work=Work(reference=True), freeze=("vision_tower",))
    return choose(lengths[dealt], tiles[dealt].sum(axis=-1).max(axis=-1), last, flops)


def best_fit(lengths: Sequence[int], slots: int) -> list[int]:
    """Slots that stay empty in each row when pairs, the longest first, go where they leave the least (best-fit decreasing)."""
    rows: list[int] = []  # what is empty, in order
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rows, length)
        room = rows.pop(place) if place < len(rows) else slots
        bisect.insort(rows, room - length)
    return rows


def _layout(rows: Sequence[RowSize]) -> RowLayout:
    up = lambda longest: -(-longest // _MULTIPLE) * _MULTIPLE  # noqa: E731
    prefix, answer = up(max(row.prefix for row in rows)), up(max(row.longest for row in rows))
    return RowLayout(prefix, answer, 2, max(row.images for row in rows), (336, 336))


def _row(prefix: int, answer: int, tiles: int) -> PairBatch:
    """A row of two answers as shapes: what the formula reads of it."""
    slots = jax.ShapeDtypeStruct((1, 1, prefix + 2 * answer), jnp.int32)
    images, one = jax.ShapeDtypeStruct((1, 1, tiles, 336, 336, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 1), jnp.float32)
    return PairBatch(slots, slots, slots, images, slots, slots, one, one, prefix_slots=prefix, answer_slots=answer)


def main() -> None:
    """Prints the table."""
    rows = []
    for lengths in SETS:
        found = analyse(lengths.sizes(PAIRS, seed=0), preset(lengths.model), splits=SPLITS)
        cells = [f"{found.empty[most]:.0%}, {found.flops[most]:.2f}" for most in BUCKETS]
        saved = [f"{found.saved(most):.0%}" for most in BUCKETS]
        ours = [f"{empty:.0%}, {flops:.2f}" for empty, flops in found.ours.values()]
        rows.append((lengths.name, *cells, f"{found.packed_empty:.0%}, {found.packed:.2f} ({found.slots})", *saved, *ours))
    columns = [f"{most} bucket{'s' * (most > 1)}" for most in BUCKETS]
    print("Share of slots that is empty, FLOPs relative to no padding; FLOPs that rows of several pairs would save at most; and data.packed")
    saves, splits = (f"saves of {most}" for most in BUCKETS), (f"packed, {pairs} x {devices}" for pairs, devices in SPLITS)
    print(format_table(rows, ("image tokens", *columns, "several pairs", *saves, *splits)))


if __name__ == "__main__":
    main()
