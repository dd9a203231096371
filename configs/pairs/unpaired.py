"""Single answers of the model, each desirable or undesirable by what it scores; they train `kto_unpaired`."""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).parent / "samples.py")
    config.samples.gap = 0.0
    config.samples.selector = "unpaired(by=mean)"  # or "unpaired(0.5)", by a threshold
    return config
