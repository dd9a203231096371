"""Pairs of answers that the model draws itself, the best against the worst by what they say (`config.samples.scorers`)."""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parents[1] / "base.py")
    config.pairs.maker = "samples"
    config.samples.count = 4
    config.samples.scorers = ("objects", "yes_no", "missing_end")
    config.samples.gap = 0.01
    config.data.on_long_row = "drop"
    return config
