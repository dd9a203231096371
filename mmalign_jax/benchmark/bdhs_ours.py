"""This package's side of the BDHS benchmark; `python -m mmalign_jax.benchmark.bdhs_ours DIRECTORY` serves it (see `items`)."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.benchmark.child import peak_bytes
from mmalign_jax.benchmark.items import serve_items
from mmalign_jax.benchmark.workload import Item, Numbered, Result, Workload, result
from mmalign_jax.config import DataConfig, PairsConfig
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs.bdhs import BdhsSampler
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.types import Media, Part, PreferenceRecord, Response, Turn


def record_of(item: Item) -> PreferenceRecord:
    parts = (Part(media=0), Part(text=item.prompt))
    return PreferenceRecord(item.id, (Media("image", Path(item.picture).read_bytes()),), (Turn("user", parts),), (Response(item.answer),), ())


def runner(workload: Workload) -> Callable[[Sequence[Numbered]], list[Result]]:
    """A function that makes the rejected answers of some items, the model loaded."""
    options = dataclasses.asdict(workload.options)
    config = PairsConfig(maker="bdhs", batch_size=workload.batch_size, **options)
    policy = Pretrained.read(Path(workload.model), mesh_lib.make_mesh(), "float32")
    layout = plan_rows([record_of(item) for item in workload.items], policy.processor, DataConfig(), answers=1).layout
    lanes = max(len(split_sentences(item.answer)) for item in workload.items)
    sampler = BdhsSampler(policy.model, policy.processor, policy.mesh, config, layout, lanes)
    params = policy.params()

    def run(asked: Sequence[Numbered]) -> list[Result]:
        records = (dataclasses.replace(record_of(one.item), id=f"{one.item.id}/{one.number}") for one in asked)
        outcomes = sampler(params, records)
        return [result(one.item, o.rejected, o.iteration, o.similarity, config.eps) for one, o in zip(asked, outcomes, strict=True)]

    return run


def main() -> None:
    # transformers, of which the tokenizer is, loads torch wherever it is installed; this side does without
    sys.modules |= dict.fromkeys(("torch", "torchvision"))
    imported = peak_bytes()
    workload = Workload.read(Path(sys.argv[1]))
    serve_items(workload, imported, {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}, runner(workload))


if __name__ == "__main__":
    main()
