"""This package's training step as a side of the step benchmark.

    python -m mmalign_jax.benchmark.step_ours DIRECTORY [naive | unshared | features]

serves it (see `child`): with `naive`, two rows a pair, each with its own images (`separate_rows`), with `unshared`, images that several pairs
show once for each of them, with `features`, the tower's features read from DIRECTORY/features, and everything else the same.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmalign_jax import losses
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.benchmark.child import peak_bytes, serve
from mmalign_jax.benchmark.pairs import Pair, PairWorkload
from mmalign_jax.benchmark.separate_rows import SeparateRows, apart
from mmalign_jax.config import DataConfig, OptimizerConfig
from mmalign_jax.data.device import to_device
from mmalign_jax.data.loader import Loader, make_loader
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.report.console import Console
from mmalign_jax.training.flops import Work, step_flops
from mmalign_jax.training.kept_features import KeptFeatures
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.optimizer import make_optimizer, make_schedule
from mmalign_jax.training.step import init_state, make_train_step
from mmalign_jax.training.trainable import Trainable
from mmalign_jax.types import Media, Part, Preference, PreferenceRecord, Response, Turn

_FROZEN = ("vision_tower",)
_MATRIX = 2048  # rows and columns of the product by which the machine's rate is measured


def record_of(number: int, pair: Pair) -> PreferenceRecord:
    media = tuple(Media("image", Path(picture).read_bytes()) for picture in pair.pictures)
    parts = (*(Part(media=index) for index in range(len(media))), Part(text=pair.prompt))
    return PreferenceRecord(str(number), media, (Turn("user", parts),), (Response(pair.chosen), Response(pair.rejected)), (Preference(0, 1),))


def matrix_rate() -> float:
    """FLOP/s of a product of two float32 matrices, the median of several."""
    square = jnp.ones((_MATRIX, _MATRIX), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        product(square, square).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * _MATRIX**3 / statistics.median(seconds)


def loader_of(workload: PairWorkload, policy: Pretrained, *, shared: bool = False, features: Path | None = None) -> Loader:
    """Batches as a training run has them: read, decoded and laid out beside the step.

    Args:
      features: directory of the tower's features, which are made first.
    """
    records = [record_of(number, pair) for number, pair in enumerate(workload.pairs)]
    plan = plan_rows(records, policy.processor, DataConfig(), answers=2)
    options = {"devices": mesh_lib.batch_divisor(policy.mesh) if shared else 0, "order": "by_image"}
    if features is not None:
        make = KeptFeatures(features, policy, policy.model.dtype, workload.shape.batch, DataConfig().workers, Console(enabled=False))
        options["features"] = make(records, plan)
    return make_loader(records, policy.processor, plan, batch_size=workload.shape.batch, **options)


def runner(workload: PairWorkload, form: str = "", directory: Path | None = None) -> tuple[dict, Callable[[dict], dict]]:
    """What the side says of itself, and what answers requests `{"steps": n}` and `{"batches": n}`. The model is loaded.

    Args:
      form: "", "naive", "unshared" or "features".
      directory: receives features.
    """
    naive = form == "naive"
    objective = losses.build(workload.objective, beta=workload.beta)
    objective = dataclasses.replace(objective, reference_free=workload.reference == "none")
    policy = Pretrained.read(Path(workload.model), mesh_lib.make_mesh(), "auto")
    loader = loader_of(workload, policy, shared=form in ("", "features"), features=directory / "features" if form == "features" else None)
    loss = (SeparateRows if naive else LossFunction)(policy.model, objective)
    rule, settings = Trainable(frozenset(_FROZEN)), OptimizerConfig(learning_rate=workload.learning_rate, schedule="constant")
    optimizer, live = make_optimizer(settings, 1 << 20), loss.reads_reference
    step = make_train_step(loss, optimizer, make_schedule(settings, 1 << 20))
    with jax.set_mesh(policy.mesh):
        wanted = lambda path: not rule.trains(path) or (live and rule.in_reference(path))  # noqa: E731
        reference, frozen = rule.split(policy.params(policy.model.dtype, wanted))
        state = init_state(policy.params("float32", rule.trains), frozen, optimizer, seed=0, objective=objective)

    def batch():
        rows = next(loader)
        return apart(rows) if naive else rows

    def answer(request: dict) -> dict:
        """Measures the loader alone, or steps."""
        nonlocal state
        if "batches" in request:
            started = time.perf_counter()
            for _ in range(request["batches"]):
                rows = batch()
            shown = rows.tokens.shape[1] * rows.images.shape[2]
            return {"images_per_s": request["batches"] * shown / (time.perf_counter() - started)}
        seconds, waits, first = [], [], None
        with jax.set_mesh(policy.mesh):
            for _ in range(request["steps"]):
                started = time.perf_counter()
                rows = batch()
                waits.append(time.perf_counter() - started)
                state, metrics = step(state, reference if live else None, to_device(rows, policy.mesh))
                metrics = jax.device_get(metrics)
                seconds.append(time.perf_counter() - started)
                first = first or {name: float(value) for name, value in metrics.items()}
        device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        chosen = first.get("logps/chosen")
        return {
            "seconds": seconds, "input_wait": waits, "peak_bytes": peak_bytes(), "device_peak_bytes": device, "loss": first["loss"],
            "logps_chosen": chosen, "matrix_flops_per_s": matrix_rate(),
        }  # fmt: skip

    rows = batch()
    ready = {
        "tokens_of_a_row": int(np.max(np.sum(rows.role > 0, axis=-1))),
        "slots": int(rows.tokens.size),
        "flops": step_flops(policy.sizes, rows, work=Work.of(objective, live_reference=live), freeze=_FROZEN),
        "device": jax.devices()[0].device_kind,
        "dtype": policy.model.dtype,
    }
    return ready, answer


def main() -> None:
    # transformers, of which the tokenizer is, loads torch wherever it is installed; this side does without
    sys.modules |= dict.fromkeys(("torch", "torchvision"))
    imported = peak_bytes()
    directory, form = Path(sys.argv[1]), "".join(sys.argv[2:])
    ready, answer = runner(PairWorkload.read(directory), form, directory)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    serve(ready | {"imported_bytes": imported, "versions": versions}, answer)


if __name__ == "__main__":
    main()
