"""Writes a checkpoint of a run as a Hugging Face directory.

    python launch/export.py --workdir runs/quickstart --out exported [--step 100] [--adapter]
"""

from pathlib import Path

from absl import flags

from mmalign_jax import cli
from mmalign_jax.errors import UserError
from mmalign_jax.run_export import export_step


def main() -> int:
    options = flags.FLAGS
    if not options.workdir or not options.out:
        raise UserError("--workdir and --out: give the run's directory and the directory to write")
    print(export_step(Path(options.workdir), options.step, Path(options.out), adapter=options.adapter))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_string("out", None, "directory that receives the model")
    flags.DEFINE_integer("step", None, "step of the checkpoint; the newest when not given")
    flags.DEFINE_boolean("adapter", False, "write LoRA's factors in PEFT's form instead of merging them into the weights")
    cli.run_plain(main)
