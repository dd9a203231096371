"""BDHS with the paper's settings (arXiv 2407.02477), for models with about 2,880 image tokens such as LLaVA-1.6.

With 576 image tokens (LLaVA-1.5), --config.pairs.rho_th=0.95 leaves as many of them visible. The paper measures similarity with a sentence
encoder: --config.pairs.similarity=encoder --config.pairs.encoder=DIR, DIR being all-mpnet-base-v2; the default counts words.

    python launch/make_pairs.py --config configs/pairs/bdhs.py --model DIR --data SET --out PAIRS
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parents[1] / "base.py")
    config.pairs.maker = "bdhs"
    config.pairs.rho_th = 0.99
    config.pairs.n_iter = 5
    config.pairs.eps = 0.97
    return config
