"""The best of the model's own answers against the worst, by the scores of a chat model behind an OpenAI-compatible endpoint.

    python launch/make_pairs.py --config configs/pairs/judged.py --model DIR --data SET --out PAIRS \\
        --config.judge.url=http://127.0.0.1:8000/v1 --config.judge.model=NAME

--config.judge.prompt=compare asks for comparisons, in both orders; sima shows the true answer (SIMA, arXiv 2405.15973).
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "samples.py")
    config.samples.scorers = ("judge",)
    return config
