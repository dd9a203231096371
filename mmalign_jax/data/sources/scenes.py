"""The built-in world as a data set: nothing is read, the pictures are drawn."""

import json

from mmalign_jax.config import ScenesConfig
from mmalign_jax.data.sources.source import Source
from mmalign_jax.scenes import splits


def read(scenes: ScenesConfig, split: str) -> Source:
    """The records of a split that is trained on, "sft" or "align"."""
    pictures = {"sft": scenes.sft, "align": scenes.align}[split]
    identity = json.dumps([splits.VERSION, scenes.seed, split, pictures])
    return Source(f"scenes/{split}", identity, lambda: splits.records(scenes.seed, split, pictures))
