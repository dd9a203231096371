"""Writes a checkpoint of a run as a Hugging Face directory.

    python launch/export.py --workdir runs/quickstart --out exported [--step 100] [--adapter | --verify]

With --verify it then compares what it wrote with transformers, as launch/verify.py does, and exits with 1 when a number differs.
"""

import os

# transformers is used for tokenizer and processor only, but by --verify, which says itself what it needs
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402

from mmalign_jax import cli  # noqa: E402
from mmalign_jax.errors import UserError  # noqa: E402
from mmalign_jax.run_export import export_step  # noqa: E402
from mmalign_jax.verify.compare import require_torch, verify  # noqa: E402


def main() -> int:
    options = flags.FLAGS
    if not options.workdir or not options.out:
        raise UserError("--workdir and --out: give the run's directory and the directory to write")
    if options.verify and options.adapter:
        raise UserError("--verify: compares whole models; without --adapter the factors are merged, and the result is compared")
    if options.verify:
        require_torch()  # before the work
    print(export_step(Path(options.workdir), options.step, Path(options.out), adapter=options.adapter))
    return verify(Path(options.out)) if options.verify else 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_string("out", None, "directory that receives the model")
    flags.DEFINE_integer("step", None, "step of the checkpoint; the newest when not given")
    flags.DEFINE_boolean("adapter", False, "write LoRA's factors in PEFT's form instead of merging them into the weights")
    flags.DEFINE_boolean("verify", False, "compare the written model with transformers (needs torch)")
    cli.run_plain(main)
