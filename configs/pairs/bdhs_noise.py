"""BDHS with noise in the place of the mask (BDHS_noise of arXiv 2407.02477): the pictures after 500 steps of diffusion, drawn anew each time.

    python launch/make_pairs.py --config configs/pairs/bdhs_noise.py --model DIR --data SET --out PAIRS
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "bdhs.py")
    config.pairs.rho_th = 0.0
    config.pairs.noise_steps = 500
    return config
