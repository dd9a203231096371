"""Which records are worked on together, with attempts that take no time."""

import random

import pytest

from mmalign_jax.pairs.schedule import Schedule, Work


def works(contexts):
    return (Work(order, None, None, None, contexts=("context",) * count) for order, count in enumerate(contexts))


def run(contexts, rows, unguided_rows, iterations, accepted):
    """Passes of (works that start, works that waited, rows at work) until all is done; `accepted(work)` ends one early.

    In a pass one of the rows at work ends, or a quarter of all do: as when steps are taken until so many are done.
    """
    at_once = -(-rows // 4)
    places = rows + 4 * at_once
    schedule, finished, passes, held = Schedule(works(contexts), rows, unguided_rows, at_once, places), set(), [], 0
    queue, busy = [], []  # one entry a row

    def ended(work):
        if accepted(work) or work.iteration == iterations:
            schedule.done(work)
            finished.add(work.order)
            return []
        work.iteration += 1
        if work.iteration == iterations:
            work.contexts = ()
        return [work] * len(work.contexts)

    taken = set()
    for _ in range(100_000):
        if not schedule.going:
            break
        admitted = schedule.admit(rows - len(busy) - len(queue))
        for work in admitted:
            assert 0 <= work.place < places and schedule.at(work.place) is work and work.order not in taken
            taken.add(work.order)
        queue += [work for work in admitted for _ in work.contexts]
        room = rows - len(busy)
        busy, queue = busy + queue[:room], queue[room:]
        passes.append((len(admitted), [], len(busy)))
        waiting = schedule.waiting()
        assert busy or waiting, "nothing would ever happen"
        done, busy = busy[:at_once], busy[at_once:]
        for work in dict.fromkeys(done):
            if work not in busy and work not in queue:
                queue += ended(work)
        for work in waiting:
            queue += ended(work)
        passes[-1] = (passes[-1][0], waiting, passes[-1][2])
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


def test_steps_and_batches_are_full():
    """At the paper's rates: three of four accepted at once, nine of ten before the last iteration."""
    draw = random.Random(0)
    passes, _ = run([1] * 4000, 64, 16, 5, lambda work: draw.random() < (0.74 if work.iteration == 1 else 0.27))
    middle = [(admitted, waiting, busy) for admitted, waiting, busy in passes if busy][2:-60]
    assert sum(busy for *_, busy in middle) / len(middle) > 0.97 * 64
    # pictures are encoded sixteen together
    assert {admitted % 16 for admitted, *_ in middle} == {0}
    unguided = [len(waiting) for _, waiting, _ in middle if waiting]
    assert unguided and all(count % 16 == 0 for count in unguided)
