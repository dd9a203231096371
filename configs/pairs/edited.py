"""The set's references against versions of them into which a chat model puts a mistake (POVID, arXiv 2402.11411; its other half is the view).

    python launch/make_pairs.py --config configs/pairs/edited.py --model DIR --data SET --out PAIRS \\
        --config.judge.url=http://127.0.0.1:8000/v1 --config.judge.model=NAME
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "swap.py")
    config.samples.sources = ("edit",)
    return config
