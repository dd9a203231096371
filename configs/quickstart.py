"""Minutes on a laptop: the built-in world's model, which hallucinates by habit, is aligned with pairs that BDHS makes from itself.

    python launch/train.py --config configs/quickstart.py --workdir runs/quickstart
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "recipes" / "world.py")
    config.objective.name = "dpo"
    config.objective.nll_weight = 1.0  # plain DPO forgets objects; see the table in README.md
    return config
