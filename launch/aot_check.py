"""Proves that a config fits a TPU slice, without a TPU: compiles its training step for the topology and prints the memory it needs.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python launch/aot_check.py --config configs/llava15_7b_dpo.py --topology v5e:8x8 --json

With `--config.model.remat=auto` it says which remat fits. Exit code 0 when it fits, 1 when it does not, 2 for a mistake in config or flags,
and where the compiler itself gives up for want of memory.
"""

import dataclasses
import json
import os

# libtpu is asked for its compiler only: it must not look for a TPU
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags

from mmalign_jax import cli
from mmalign_jax.config import Config
from mmalign_jax.errors import UserError
from mmalign_jax.hf.import_ import read_config
from mmalign_jax.models.presets import preset
from mmalign_jax.training.aot import AotReport, compile_step
from mmalign_jax.training.memory import GIB


def main(config: Config) -> int:
    options = flags.FLAGS
    if config.model.path:
        sizes = read_config(config.model.path)
    elif config.model.preset:
        sizes = preset(config.model.preset)
    else:
        raise UserError("config.model.path: give a model directory, or a known model's name as config.model.preset")
    report = compile_step(config, sizes, options.topology, options.slices)
    print(json.dumps(dataclasses.asdict(report)) if options.json else _text(report))
    return 0 if report.fits else 1


def _text(report: AotReport) -> str:
    gib = lambda size: f"{size / GIB:8.2f} GiB"  # noqa: E731
    verdict = "fits" if report.fits else "DOES NOT FIT"
    return (
        f"{report.topology}, {report.devices} devices, {report.prefix_slots} prefix and {report.answer_slots} answer slots: {verdict}\n"
        f"  attention by {report.attention}, remat {report.remat}{_others(report)}\n"
        f"  needed per device {gib(report.hbm_bytes_per_device)}  of {gib(report.hbm_limit_bytes)}\n"
        f"  arguments         {gib(report.argument_bytes)}  (state {gib(report.state_bytes)}, reused for the new state {gib(report.aliased_bytes)})\n"
        f"  temporaries       {gib(report.temp_bytes)}\n"
        f"  compiled in {report.compile_s:.0f} s"
    )


def _others(report: AotReport) -> str:
    """What other remats of remat=auto would need."""
    others = {name: size for name, size in report.remat_tried.items() if name != report.remat}
    words = ", ".join(f"{name}: " + ("too much to compile" if size is None else f"{size / GIB:.2f} GiB") for name, size in others.items())
    return f" ({words})" if words else ""


if __name__ == "__main__":
    flags.DEFINE_string("topology", "v5e:8x8", "chip and grid of one slice, such as v5e:8x8")
    flags.DEFINE_integer("slices", 1, "number of slices", lower_bound=1)
    flags.DEFINE_bool("json", False, "print one JSON object")
    cli.run_with_config(main)
