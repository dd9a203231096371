"""Teaches the built-in world's model to describe its pictures: remakes the SFT model that ships with the package.

    python launch/train.py --config configs/scenes_sft.py --workdir runs/scenes_sft
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).with_name("base.py"))
    config.model.init = "scenes"
    config.model.freeze = ()
    config.data.format = "scenes"
    config.data.split = "sft"
    config.objective.name = "sft"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.weight_decay = 0.01
    config.optimizer.b2 = 0.98
    config.train.batch_size = 16
    config.train.steps = 3000
    config.train.log_every = 50
    config.checkpoint.every = 500
    config.eval.benchmarks = ("pope", "chair")
    config.eval.before = False
    return config
