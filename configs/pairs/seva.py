"""SeVa (arXiv 2404.10501): the model's answer to a picture over its answer to the picture under noise; nobody judges.

    python launch/make_pairs.py --config configs/pairs/seva.py --model DIR --data SET --out PAIRS
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "samples.py")
    config.samples.sources = ("policy", "diffusion(500)")
    config.samples.count = 1
    config.samples.scorers = ()
    config.samples.selector = "by_source"
    config.samples.gap = 0.0
    return config
