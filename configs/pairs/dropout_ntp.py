"""DropoutNTP of MPO (arXiv 2411.10442): the reference over an answer that begins with half of it and goes on without the picture.

    python launch/make_pairs.py --config configs/pairs/dropout_ntp.py --model DIR --data SET --out PAIRS
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "samples.py")
    config.samples.sources = ("continued(0.5)",)
    config.samples.count = 1
    config.samples.scorers = ()
    config.samples.selector = "reference_against_own"
    config.samples.gap = 0.0
    return config
