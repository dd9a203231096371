"""How a side of the BDHS benchmark is asked: for the results of some items, with seconds and memory.

Attempts are numbered on, so that a record that comes again has draws of its own. Nothing here imports jax or torch.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from mmalign_jax.benchmark.child import Child, peak_bytes, serve
from mmalign_jax.benchmark.workload import Numbered, Result, Workload


def serve_items(
    workload: Workload, imported_bytes: int, versions: Mapping[str, str], run: Callable[[Sequence[Numbered]], list[Result]]
) -> None:
    """Answers requests `{"start": i, "count": n}` until standard input ends.

    Args:
      imported_bytes: peak memory behind the imports, before anything was loaded.
      run: makes the results of some items.
    """

    def answer(request: dict) -> dict:
        items = workload.pick(request["start"], request["count"])
        started, cpu = time.perf_counter(), time.process_time()
        results = run(items)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes(), "results": [dataclasses.asdict(one) for one in results]}

    serve({"imported_bytes": imported_bytes, "versions": dict(versions), "options": dataclasses.asdict(workload.options)}, answer)


@dataclasses.dataclass(frozen=True)
class Timed:
    """An answer: seconds of work, those of all its threads, peak memory of the child up to then, and the results."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    results: tuple[Result, ...]

    @classmethod
    def ask(cls, child: Child, start: int, count: int) -> "Timed":
        answer = child({"start": start, "count": count})
        return cls(answer["seconds"], answer["cpu_seconds"], answer["peak_bytes"], tuple(Result(**one) for one in answer["results"]))
