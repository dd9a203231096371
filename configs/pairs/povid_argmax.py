"""POVID's noisy answers made beforehand (arXiv 2402.11411): the reference over what the model finds likeliest at each place of it, the picture
under noise. What the paper does within the step is the objective povid; its other half is edited.py.

    python launch/make_pairs.py --config configs/pairs/povid_argmax.py --model DIR --data SET --out PAIRS
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "swap.py")
    config.samples.sources = ("argmax(diffusion(500,pixel))",)
    return config
