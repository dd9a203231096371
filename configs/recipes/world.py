"""The built-in world's model, aligned with pairs that BDHS makes from itself: what configs/quickstart.py and the sweeps start from."""

from importlib import resources
from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parents[1] / "base.py")
    config.model.path = str(resources.files("mmalign_jax") / "assets" / "scenes_sft")
    config.data.format = "scenes"
    config.pairs.maker = "bdhs"
    config.scenes.align = 300
    config.scenes.test = 100
    config.objective.name = "dpo"
    config.auxiliary.format = "scenes"  # for objectives that also read the instruction data
    config.auxiliary.split = "sft"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_fraction = 0.1
    config.train.batch_size = 32
    config.train.steps = 100
    config.eval.benchmarks = ("pope", "chair")
    return config
