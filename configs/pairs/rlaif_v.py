"""RLAIF-V's divide and conquer (arXiv 2405.17220): of the model's own answers, those with fewer sentences that a model denies are better.

    python launch/make_pairs.py --config configs/pairs/rlaif_v.py --model DIR --data SET --out PAIRS --config.samples.critic=CRITIC_DIR

Without a critic the model is its own.
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "samples.py")
    config.samples.count = 10
    config.samples.temperature = 0.7
    config.samples.scorers = ("claims",)
    config.samples.selector = "all_pairs(2)"
    return config
