"""Pictures of any size as a row of patches (`types.Patches`): pixels, embedding, positions and masks (Qwen's towers)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from mmalign_jax import mesh
from mmalign_jax.models.config import VisionConfig
from mmalign_jax.models.layers import Linear
from mmalign_jax.types import Patches


def rotary_tables(patches: Patches, width: int, theta: float = 10_000.0) -> tuple[Float[Array, "B Q E"], Float[Array, "B Q E"]]:
    """cos and sin of rotary positions whose first half of frequencies turns with the row, the second with the column (arXiv 2409.12191)."""
    inverse = theta ** (-jnp.arange(0, width // 2, 2, dtype=jnp.float32) / (width // 2))
    angles = patches.place.astype(jnp.float32)[..., None] * inverse
    angles = jnp.concatenate([angles[..., 0, :], angles[..., 1, :]], axis=-1)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def segment_mask(patches: Patches) -> Bool[Array, "B Q Q"]:
    """A patch sees those of its own picture."""
    segment = patches.segment
    return (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, None, :]


def window_mask(patches: Patches, slots: int) -> Bool[Array, "B M 1 N"]:
    """Which slots of each window hold a patch; a window lies within one picture."""
    rows = patches.segment.shape[0]
    return mesh.reshape(patches.segment >= 0, (rows, -1, 1, slots), "batch", None, None, None)


def take_patches(
    images: UInt8[Array, "B M Y W 3"] | Float[Array, "B M Y W 3"], patches: Patches, side: int
) -> UInt8[Array, "B Q P 3"] | Float[Array, "B Q P 3"]:
    """The pixels of each patch: frame by frame, row by row. Slots without a patch are zeros."""
    rows, count, height, width, _ = images.shape
    down, across = height // side, width // side
    cut = mesh.reshape(images, (rows, count, down, side, across, side, 3), "batch", *(None,) * 6).transpose(0, 1, 2, 4, 3, 5, 6)
    cut = mesh.reshape(cut, (rows, count * down * across, side * side * 3), "batch", None, None)
    slots, frames = patches.index.shape[1:]
    index = mesh.reshape(patches.index, (rows, slots * frames, 1), "batch", None, None)
    taken = jnp.where(index >= 0, jnp.take_along_axis(cut, jnp.maximum(index, 0), axis=1), 0).astype(images.dtype)
    return mesh.reshape(taken, (rows, slots, frames * side * side, 3), "batch", None, None, None)


class PatchEmbedding(nn.Module):
    """Patches and their positions as the tower's first hidden states."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "B Q P 3"], patches: Patches) -> Float[Array, "B Q Z"]:
        v, (rows, slots, count, _) = self.config, pixels.shape
        taken = mesh.reshape(pixels, (rows, slots, count * 3), "batch", None, None)
        bias = (v.width,) if v.patch_bias else ()
        kernel = (taken.shape[-1], v.width)
        x = Linear("bqp,pw->bqw", kernel, (None, "embed"), ("batch", None, None), bias, (None,), name="patch")(taken)
        return x + self._positions(patches).astype(x.dtype) if v.positions == "interpolated" else x

    def _positions(self, patches: Patches) -> Float[Array, "B Q Z"]:
        """The square table of positions, resampled bilinearly to each picture's grid, corners on corners."""
        side, width = self.config.position_side, self.config.width
        table = self.param("positions", nn.initializers.normal(0.02), (side * side, width))
        table = mesh.constrain(table.astype(jnp.float32), None, None)
        at = patches.place * (side - 1) / jnp.maximum(patches.grid - 1, 1).astype(jnp.float32)
        low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, side - 1)
        high, share = jnp.minimum(low + 1, side - 1), at - low
        total = 0.0
        for row, row_share in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
            for column, column_share in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
                entry = table.at[row * side + column].get(out_sharding=mesh.out_sharding("batch", None, None), mode="clip")
                total = total + entry * (row_share * column_share)[..., None]
        return total
