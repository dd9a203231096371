"""Compares a model directory here and in transformers: weights, pixels, logits, answer log-probs, greedy text. Needs torch.

    python launch/verify.py --model MODEL_DIR

Exit code 0 only when all numbers are equal (float32, up to rounding); else 1, and a line that names what differs first.
"""

import os

# without torch this command says so itself, in one line
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402

from mmalign_jax import cli  # noqa: E402
from mmalign_jax.errors import UserError  # noqa: E402
from mmalign_jax.verify.compare import verify  # noqa: E402


def main() -> int:
    if not flags.FLAGS.model:
        raise UserError("--model: give the Hugging Face directory of the model")
    return verify(Path(flags.FLAGS.model))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face directory of the model")
    cli.run_plain(main)
