"""The versions and devices that a run had, for its report."""

import platform
from importlib import metadata

import jax

_PACKAGES = ("mmalign_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def environment() -> dict[str, str]:
    """Names and versions: Python, the packages that decide the numbers, and the devices of all processes."""
    out = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    out |= {name: metadata.version(name) for name in _PACKAGES}
    kinds = sorted({device.device_kind for device in jax.devices()})
    return out | {"devices": f"{jax.device_count()} x {', '.join(kinds)}", "processes": str(jax.process_count())}
