"""CLIP-DPO (arXiv 2408.10433): the model's own answers by their similarity with the picture; pairs of unlike length are left out.

    python launch/make_pairs.py --config configs/pairs/clip_dpo.py --model DIR --data SET --out PAIRS --config.samples.clip=CLIP_DIR
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "samples.py")
    config.samples.scorers = ("clip",)
    config.samples.length_ratio = 1.5
    return config
