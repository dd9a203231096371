"""The set's references against themselves with one kind of thing exchanged for another that they do not name, by a table of words.

    python launch/make_pairs.py --config configs/pairs/swap.py --model DIR --data SET --out PAIRS --config.samples.synonyms=TABLE.json
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "samples.py")
    config.samples.sources = ("swap",)
    config.samples.count = 1
    config.samples.scorers = ()
    config.samples.selector = "reference_against_own"
    config.samples.gap = 0.0
    return config
