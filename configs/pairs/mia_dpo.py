"""MIA-DPO (arXiv 2410.17637): on prompts of several pictures, the reference over an answer of the model that looks at the wrong one.

    python launch/make_pairs.py --config configs/pairs/mia_dpo.py --model DIR --data SET --out PAIRS

Records say which picture they ask about (`target_image`, from 0). Thresholds and layer are those of the released code, whose models have 32 layers;
"attention" alone reads all layers. Its filter by perplexity is not there.
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "samples.py")
    config.samples.count = 1
    config.samples.scorers = ("attention(layer=16,two=0.8,three=0.7,more=0.6)",)
    config.samples.selector = "reference_against_own(ceiling=0)"
    config.samples.gap = 0.0
    return config
