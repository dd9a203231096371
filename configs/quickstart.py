"""Minutes on a laptop: the built-in world's model, which hallucinates by habit, is aligned with pairs that BDHS makes from itself.

    python launch/train.py --config configs/quickstart.py --workdir runs/quickstart
"""

from importlib import resources
from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).with_name("base.py"))
    config.model.path = str(resources.files("mmalign_jax") / "assets" / "scenes_sft")
    config.data.format = "scenes"
    config.pairs.maker = "bdhs"
    config.scenes.align = 300
    config.scenes.test = 100
    config.objective.name = "dpo"
    config.objective.nll_weight = 1.0  # plain DPO forgets objects; see the table in README.md
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_fraction = 0.1
    config.train.batch_size = 32
    config.train.steps = 100
    config.eval.benchmarks = ("pope", "chair")
    return config
