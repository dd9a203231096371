"""A reward model of the built-in world: it learns to score true captions above those that BDHS makes of them, and is measured on held-out pairs.

    python launch/train.py --config configs/reward_model.py --workdir runs/reward_model

`runs/reward_model/export` then holds the model and its head; `mmalign_jax.pairs.reward_model.RewardModel` scores answers with it.
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "recipes" / "world.py")
    config.objective.name = "reward_model"
    config.scenes.align = 1600
    config.data.holdout = 0.2
    config.data.buckets = 3
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 400
    config.eval.benchmarks = ()  # it scores answers and says none
    config.eval.holdout_every = 100
    return config
