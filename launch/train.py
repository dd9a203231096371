"""Aligns a multimodal model: data, measurement, pairs, training, measurement, export and report, in one directory.

    python launch/train.py --config configs/quickstart.py --workdir runs/quickstart [--config.train.steps=100 ...]

The same command goes on where a run was stopped or killed.
"""

import os

# transformers is used for tokenizer and processor only; its advice to install PyTorch would alarm
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from mmalign_jax import cli, pipeline  # noqa: E402

if __name__ == "__main__":
    cli.run(pipeline.run)
