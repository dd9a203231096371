"""A few shapes instead of one: fewer empty slots, every row as often as before, and a sequence that may be entered anywhere."""

import collections
import itertools

import numpy as np
import pytest
from helpers.rows import LetterProcessor, record

from mmalign_jax.config import DataConfig
from mmalign_jax.data.buckets import Bucket, TrainingOrder, split
from mmalign_jax.data.layout import RowLayout, RowSize
from mmalign_jax.data.loader import make_loader
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.types import record_key

PROCESSOR = LetterProcessor()
RECORDS = [record(f"r{n}", prompt="x" * (3 + 40 * (n % 3 == 0)), chosen="y" * (2 + n % 5)) for n in range(24)]


def planned(buckets):
    return plan_rows(RECORDS, PROCESSOR, DataConfig(buckets=buckets), answers=2)


def layout_of(sizes):
    return RowLayout(max(s.prefix for s in sizes), max(s.longest for s in sizes), 2, 1, (4, 6))


def size(prefix, answer):
    return RowSize(prefix, 1, (4, 6), 0, (answer, answer), (0, 0))


@pytest.mark.parametrize("seed", range(4))
def test_no_cut_of_the_sorted_rows_is_better_than_the_split(seed):
    random = np.random.default_rng(seed)
    sizes = [size(*map(int, random.integers(1, [100, 30]))) for _ in range(9)]
    ordered = sorted(sizes, key=lambda s: s.prefix + 2 * s.longest)

    def slots(groups):
        return sum(len(group) * layout_of(group).tokens for group in groups)

    for most in (1, 2, 3):
        found = split(sizes, 2, most, layout_of)
        assert sorted(np.concatenate([bucket.members for bucket in found]).tolist()) == list(range(9)) and len(found) <= most
        cuts = [c for count in range(most) for c in itertools.combinations(range(1, 9), count)]
        best = min(slots([ordered[i:j] for i, j in zip((0, *c), (*c, 9), strict=True)]) for c in cuts)
        assert slots([[sizes[n] for n in bucket.members] for bucket in found]) <= best


def test_long_prompts_and_long_answers_need_not_share():
    # sorted by their 110 to 140 slots they stand one between the other
    sizes = [size(100 + 4 * n, 5) for n in range(4)] + [size(10 + 4 * n, 51) for n in range(4)]
    for seed in (0, 1):
        order = np.random.default_rng(seed).permutation(8)
        found = split([sizes[n] for n in order], 2, 2, layout_of)
        assert sorted(sorted(order[bucket.members].tolist()) for bucket in found) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert sorted((bucket.layout.prefix_slots, bucket.layout.answer_slots) for bucket in found) == [(22, 51), (112, 5)]


def test_a_large_set_is_split_at_once():
    random = np.random.default_rng(0)
    sizes = [size(*map(int, row)) for row in np.exp(random.uniform(np.log(50), np.log(500), (4000, 2)))]
    empty = {}
    for most in (1, 4, 8):
        found = split(sizes, 2, most, layout_of)
        slots = [len(bucket.members) * bucket.layout.tokens for bucket in found]
        empty[most] = sum(bucket.padding_fraction * many for bucket, many in zip(found, slots, strict=True)) / sum(slots)
        assert sorted(np.concatenate([bucket.members for bucket in found]).tolist()) == list(range(4000)) and len(found) == most
    # cut by cost alone, eight leave 40 % empty
    assert empty[1] > 0.5 and empty[4] < 0.45 and empty[8] < 0.33


def test_buckets_leave_less_empty():
    one, two = planned(1), planned(2)
    assert len(one.buckets) == 1 and len(two.buckets) == 2
    assert one.buckets[0].layout == one.layout == two.layout
    assert two.padding_fraction < one.padding_fraction - 0.2
    assert sorted(len(bucket.members) for bucket in two.buckets) == [8, 16]


def orders(counts, batch_size=4):
    ends = np.cumsum([0, *counts])
    buckets = [Bucket(None, np.arange(start, stop), 0.0) for start, stop in zip(ends[:-1], ends[1:], strict=True)]
    return TrainingOrder(buckets, batch_size, seed=3), ends


def test_steps_are_of_one_bucket_and_rows_come_equally_often():
    order, ends = orders([3, 10, 7])
    period = [order[position] for position in range(20 * 4)]
    steps = np.array(period).reshape(-1, 4)
    bucket = np.searchsorted(ends, steps, side="right") - 1
    assert np.all(bucket == bucket[:, :1])
    assert set(collections.Counter(period).values()) == {4}
    # spread evenly: no bucket waits for more than its turn
    for number, count in enumerate([3, 10, 7]):
        at = np.flatnonzero(bucket[:, 0] == number)
        assert np.diff(at).max() <= np.ceil(20 / count) + 1
    assert [order[80 + n] for n in range(80)] != period
    assert order[10**9] in range(20)


def test_one_bucket_is_a_shuffle_an_epoch():
    order, _ = orders([10])
    epochs = np.array([order[n] for n in range(40)]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist()) and len({tuple(e) for e in epochs.tolist()}) == 4


def test_batches_have_the_shapes_of_their_buckets_and_go_on_after_a_restore():
    plan = planned(2)

    def loader(**settings):
        return make_loader(RECORDS, PROCESSOR, plan, batch_size=4, seed=3, workers=2, **settings)

    whole = loader()
    batches = [next(whole) for _ in range(24)]
    shapes = {batch.tokens.shape for batch in batches}
    assert shapes == {(1, 4, bucket.layout.tokens) for bucket in plan.buckets}
    keys = collections.Counter(np.concatenate([batch.record_key.ravel() for batch in batches]).tolist())
    assert keys == {record_key(row.id): 4 for row in RECORDS}
    first = loader()
    for _ in range(7):
        next(first)
    again = loader()
    again.set_state(first.get_state())
    halves = [loader(process_index=index, process_count=2) for index in range(2)]
    for number, batch in enumerate(batches):
        if number >= 7:
            np.testing.assert_array_equal(next(again).tokens, batch.tokens)
        mine = [next(half).tokens for half in halves]
        np.testing.assert_array_equal(np.concatenate(mine, axis=1), batch.tokens)


def test_what_buckets_of_photographs_of_any_size_waste():
    """Run with -s to see the table that README quotes: sizes as Qwen2.5-VL's processor resizes them, sides drawn from 256 to 1,024 pixels."""
    random = np.random.default_rng(0)
    tokens = []
    for _ in range(2000):
        height, width = np.exp(random.uniform(np.log(256), np.log(1024), 2))
        rows, columns = round(height / 28), round(width / 28)
        windows = -(-rows // 4) * -(-columns // 4)  # of 4 x 4 squares of 2 x 2 patches
        words, answers = random.integers(20, 80), random.integers(20, 200, 2)
        tokens.append(RowSize(rows * columns + int(words), 1, (rows * 28, columns * 28), windows * 64, tuple(map(int, answers)), (0, 0)))

    def layout(sizes):
        slots = max(s.patch_slots for s in sizes)
        up = lambda value: -(-value // 8) * 8  # noqa: E731
        return RowLayout(up(max(s.prefix for s in sizes)), up(max(s.longest for s in sizes)), 2, 1, (4, 6), slots)

    waste = {}
    for most in (1, 2, 4, 8):
        found = split(tokens, 2, most, layout)
        total = sum(len(b.members) * (b.layout.tokens + b.layout.patch_slots) for b in found)
        waste[most] = sum(b.padding_fraction * len(b.members) * (b.layout.tokens + b.layout.patch_slots) for b in found) / total
    print(" ".join(f"{most} shapes: {share:.0%} empty" for most, share in waste.items()))
    assert waste[1] > 0.6 and waste[4] < 0.35 and waste[8] < waste[4] < waste[2] < waste[1]
