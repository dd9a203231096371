"""This package's side of the BDHS benchmark; `python -m mmalign_jax.benchmark.bdhs_ours DIRECTORY` serves it (see `child`)."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.benchmark.child import peak_bytes, serve
from mmalign_jax.benchmark.workload import Item, Result, Workload, result
from mmalign_jax.config import DataConfig, PairsConfig
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs.bdhs import BdhsSampler
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.types import Media, Part, PreferenceRecord, Response, Turn


def record_of(item: Item) -> PreferenceRecord:
    parts = (Part(media=0), Part(text=item.prompt))
    return PreferenceRecord(item.id, (Media("image", Path(item.picture).read_bytes()),), (Turn("user", parts),), (Response(item.answer),), ())


def runner(workload: Workload) -> Callable[[Sequence[Item]], list[Result]]:
    """A function that makes the rejected answers of some items, the model loaded."""
    options = dataclasses.asdict(workload.options)
    config = PairsConfig(maker="bdhs", batch_size=workload.batch_size, **options)
    policy = Pretrained.read(Path(workload.model), mesh_lib.make_mesh(), "float32")
    layout = plan_rows([record_of(item) for item in workload.items], policy.processor, DataConfig(), answers=1).layout
    lanes = max(len(split_sentences(item.answer)) for item in workload.items)
    sampler = BdhsSampler(policy.model, policy.processor, policy.mesh, config, layout, lanes)
    params = policy.params()

    def run(items: Sequence[Item]) -> list[Result]:
        # a set that is shorter than what is asked for is gone through again, under draws of its own
        renamed = (dataclasses.replace(record_of(item), id=f"{item.id}/{number}") for number, item in enumerate(items))
        outcomes = list(sampler(params, renamed))
        return [
            result(item, one.rejected, one.iteration, one.similarity, config.eps) for item, one in zip(items, outcomes, strict=True)
        ]  # fmt: skip

    return run


def main() -> None:
    imported = peak_bytes()
    workload = Workload.read(Path(sys.argv[1]))
    serve(workload, imported, {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}, runner(workload))


if __name__ == "__main__":
    main()
