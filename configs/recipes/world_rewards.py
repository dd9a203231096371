"""The built-in world's model, aligned with answers of its own: what they say is checked against what the pictures show."""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "world.py")
    config.pairs.maker = "samples"
    config.pairs.when = "online"
    config.samples.count = 8
    config.samples.max_tokens = 64
    config.samples.scorers = ("objects", "yes_no", "missing_end")
    config.objective.name = "grpo"
    config.optimizer.learning_rate = 3e-5
    config.train.batch_size = 16
    config.train.steps = 150
    return config
