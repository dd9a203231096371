"""The versions and devices that a run had, for its report."""

import platform
from importlib import metadata

import jax

import mmalign_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def environment() -> dict[str, str]:
    """Names and versions: Python, the packages that decide the numbers, and the devices of all processes."""
    out = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    out["mmalign_jax"] = mmalign_jax.__version__  # also where it runs from a clone that is not installed
    out |= {name: metadata.version(name) for name in _PACKAGES}
    kinds = sorted({device.device_kind for device in jax.devices()})
    return out | {"devices": f"{jax.device_count()} x {', '.join(kinds)}", "processes": str(jax.process_count())}
