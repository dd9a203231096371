"""How functions that decode are compiled."""

from jax.sharding import Mesh

# XLA's library of fused products on CPUs (YNN) orders a kernel anew before every product. Beside a whole row that is nothing; a decode step,
# which multiplies a few rows with every weight once, takes half as long again for it. The empty text leaves no product to that library.
_OF_PLATFORM = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for a function that decodes on the devices of `mesh`; None where the compiler's own are best."""
    return _OF_PLATFORM.get(mesh.devices.flat[0].platform)
