"""Which records are worked on together, with attempts that take no time."""

import itertools
import random

import pytest

from mmalign_jax.pairs.schedule import Schedule, Work


def works(contexts):
    return (Work(order, None, None, None, contexts=("context",) * count) for order, count in enumerate(contexts))


def run(contexts, rows, unguided_rows, iterations, accepted):
    """Passes of (guided works, unguided works) until all is done; `accepted(work)` ends one early."""
    schedule, finished, passes, held = Schedule(works(contexts), rows, unguided_rows), set(), [], 0
    active = {}
    for _ in range(100_000):
        if not schedule.going:
            break
        for work in schedule.admit():
            assert work.place not in {other.place for other in active.values()} and 0 <= work.place < rows + unguided_rows
            active[work.order] = work
        now = [*schedule.guided()], [*schedule.unguided()]
        assert now[0] or now[1], "nothing would ever happen"
        passes.append(now)
        for work in itertools.chain(*now):
            if accepted(work) or work.iteration == iterations:
                schedule.done(work)
                finished.add(work.order)
                del active[work.order]
            else:
                work.iteration += 1
                if work.iteration == iterations:
                    work.contexts = ()
        oldest = min(set(range(len(contexts))) - finished, default=len(contexts))
        held = max(held, max(finished, default=0) - oldest)
    assert finished == set(range(len(contexts)))
    return passes, held


@pytest.mark.parametrize(("rows", "unguided_rows"), [(1, 1), (4, 1), (8, 2), (8, 8)])
@pytest.mark.parametrize("iterations", [1, 2, 5, 40])
def test_all_are_done_in_time_and_few_are_held(rows, unguided_rows, iterations):
    draw = random.Random(0)
    for count in (0, 1, 7, 300):
        contexts = [draw.choice((1, 1, 1, 2, 3 * rows)) for _ in range(count)]
        passes, held = run(contexts, rows, unguided_rows, iterations, lambda work: draw.random() < 0.7 and work.order != 3)
        assert held <= 10 * rows
        for guided, _ in passes:
            assert sum(len(work.contexts) for work in guided) <= rows or len(guided) <= rows


def test_batches_are_full():
    """At the paper's rates: three of four accepted at once, nine of ten before the last iteration."""
    draw = random.Random(0)
    passes, _ = run([1] * 4000, 64, 16, 5, lambda work: draw.random() < (0.74 if work.iteration == 1 else 0.27))
    guided = [len(guided) / 64 for guided, _ in passes[:-8]]
    assert sum(guided) / len(guided) > 0.97
    unguided = [len(unguided) for _, unguided in passes[:-8] if unguided]
    assert unguided and all(count % 16 == 0 for count in unguided)


def test_without_guidance_the_unguided_ones_fill_their_own_batches():
    passes, _ = run([0] * 200, 8, 8, 1, lambda work: True)
    assert [len(unguided) for _, unguided in passes][:-1] == [16] * 12
