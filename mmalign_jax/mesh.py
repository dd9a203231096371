"""Devices -> mesh, and the one table from logical axes to mesh axes.

The mesh has three axes, `data` (replicas, spans slices), `fsdp` (parameters sharded, gathered a layer at a time) and `tensor`
(heads and MLP columns). It runs in JAX's explicit sharding mode: every array's type carries its sharding, so a wrong or silent
reshard is an error at trace time.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmalign_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Weights: `embed` is sharded by fsdp at rest and gathered when used.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh over all devices. One size may be -1: it takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"config.mesh: only one of {', '.join(AXES)} may be -1, got {sizes}")
    if any(size == 0 for size in sizes.values()):
        raise UserError(f"config.mesh: a size of 0 makes no mesh, got {sizes}")
    if free:
        sizes[free[0]] = len(devices) // math.prod(size for size in sizes.values() if size != -1)
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != len(devices):
        raise UserError(f"config.mesh: {sizes} does not multiply to the {len(devices)} devices there are")
    grid = _device_grid(tuple(sizes[name] for name in AXES), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _device_grid(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Orders the devices so that neighbours in the mesh are neighbours in the machine; slices lie along `data`."""
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(f"config.mesh.data: {shape[0]} must be a multiple of the {slices} slices, because only `data` spans slices")
    inner = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices=devices, allow_split_physical_axes=True)


def spec(*axes: str | None) -> P:
    """The partition spec of an array whose dimensions have these logical names.

    Raises:
      ValueError: an axis is unknown, or two dimensions would use one mesh axis.
    """
    used: list[str] = []
    out = []
    for axis in axes:
        if axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; mesh.RULES has {sorted(k for k in RULES if k)}")
        mesh_axes = RULES[axis]
        if clash := set(mesh_axes) & set(used):
            raise ValueError(f"axes {axes} use mesh axis {sorted(clash)} twice")
        used.extend(mesh_axes)
        out.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return P(*out)


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*axes))


def active() -> bool:
    """Whether code runs under a mesh. Without one (a unit test on plain arrays), sharding requests are left out."""
    return not jax.sharding.get_abstract_mesh().empty


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Gives `x` the sharding of these logical axes: a reshard where it differs, nothing where it does not."""
    return jax.sharding.reshard(x, spec(*axes)) if active() else x


def out_sharding(*axes: str | None) -> P | None:
    """The `out_sharding=` argument for an operation whose result has these logical axes."""
    return spec(*axes) if active() else None


def reshape(x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """`x.reshape(shape)` whose result has these logical axes; explicit sharding wants them named where it cannot tell."""
    return jax.numpy.reshape(x, shape, out_sharding=out_sharding(*axes))


def platform(mesh: Mesh) -> str:
    """What the mesh' devices are: "cpu", "tpu", "cuda" or "rocm"."""
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def compute_dtype(setting: str, platform: str) -> str:
    """The type that a setting asks for on a platform ("cpu", "gpu", "tpu"): "auto" is float32 on CPU and bfloat16 on accelerators."""
    if setting != "auto":
        return setting
    return "float32" if platform == "cpu" else "bfloat16"


def check_batch(mesh: Mesh, rows: int) -> None:
    """Raises UserError when `rows` rows cannot be split over the mesh."""
    if rows % batch_divisor(mesh):
        raise UserError(
            f"config.train.batch_size: {rows} rows (batch_size / accumulate) cannot be split over data x fsdp = {batch_divisor(mesh)} devices"
        )


def batch_rows(mesh: Mesh, rows: int) -> int:
    """The fewest rows that are at least `rows` and can be split over the mesh."""
    return -(-rows // batch_divisor(mesh)) * batch_divisor(mesh)


def batch_divisor(mesh: Mesh) -> int:
    """A batch must be a multiple of this number to be split over the mesh."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
