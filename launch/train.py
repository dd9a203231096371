"""Aligns a multimodal model: data, measurement, pairs, training, measurement, export and report, in one directory.

    python launch/train.py --config configs/quickstart.py --workdir runs/quickstart [--config.train.steps=100 ...]

The same command goes on where a run was stopped or killed.
"""

from mmalign_jax import cli, rounds

if __name__ == "__main__":
    cli.run(rounds.run)
