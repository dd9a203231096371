"""From tower features to decoder inputs: one small module a kind (`ConnectorConfig.kind`)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax import mesh
from mmalign_jax.models.config import ConnectorConfig, MllmConfig
from mmalign_jax.models.layers import LayerNorm, Linear, RMSNorm, activation

_ROWS = ("batch", None)


class Connector(nn.Module):
    """Features `[B F' Z]` of the tower to image features `[B F U]`, the ones that tokens point at."""

    config: MllmConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B G Z"]) -> Float[Array, "B F U"]:
        c, width = self.config.connector, self.config.decoder.width
        if c.frame_pool:
            x = _with_frames(self.config, x)
        match c.kind:
            case "mlp":
                x = _mlp(c, width, width, x)
            case "linear":
                x = _linear(c, width, x)
            case "shuffle":
                x = _linear(c, width, _squares(self.config, x))
            case "shuffle_mlp":
                x = _mlp(c, width, width, _norm(c, "norm")(_squares(self.config, x)))
            case "pool":
                x = _linear(c, width, RMSNorm(c.norm_eps, offset=True, name="norm")(_pooled(self.config, x)))
            case "merger":
                x = self._merge(x)
            case _:
                raise ValueError(f"unknown connector {c.kind!r}")
        if c.newline:
            newline = self.param("newline", nn.initializers.normal(0.02), (width,)).astype(x.dtype)
            newline = mesh.constrain(jnp.broadcast_to(newline, (x.shape[0], 1, width)), *_ROWS, None)
            x = jnp.concatenate([newline, x], axis=1)
        return x

    def _merge(self, x: Float[Array, "B Q Z"]) -> Float[Array, "B F U"]:
        """Side by side what comes of the tower's output and of each of its taps."""
        features, *taps = jnp.split(x, self.config.feature_parts, axis=-1)
        merged = [_Merger(self.config, False, name="merger")(features)]
        merged += [_Merger(self.config, True, name=f"tap{number}")(tap) for number, tap in enumerate(taps)]
        return jnp.concatenate(merged, axis=-1)


class _Merger(nn.Module):
    """Squares of patches, which come one behind the other, to one feature each."""

    config: MllmConfig
    norm_squares: bool  # the merger of the tower's output normalises patches, those of its taps whole squares

    @nn.compact
    def __call__(self, x: Float[Array, "B Q Z"]) -> Float[Array, "B F D"]:
        c, (rows, slots, width) = self.config.connector, x.shape
        norm = _norm(c, "norm")
        x = x if self.norm_squares else norm(x)
        x = mesh.reshape(x, (rows, slots // c.scale**2, width * c.scale**2), *_ROWS, None)
        x = norm(x) if self.norm_squares else x
        return _mlp(c, x.shape[-1], self.config.decoder.width, x)


def _norm(c: ConnectorConfig, name: str) -> nn.Module:
    return RMSNorm(c.norm_eps, name=name) if c.norm == "rms" else LayerNorm(c.norm_eps, name=name)


def _linear(c: ConnectorConfig, width: int, x: Float[Array, "B F Z"]) -> Float[Array, "B F D"]:
    kernel, bias_shape = (x.shape[-1], width), (width,) if c.bias else ()
    return Linear("bfz,zd->bfd", kernel, ("embed", None), (*_ROWS, None), bias_shape, (None,), c.lora, name="linear")(x)


def _mlp(c: ConnectorConfig, inner: int, width: int, x: Float[Array, "B F Z"]) -> Float[Array, "B F D"]:
    inner_bias, outer_bias = ((inner,), (width,)) if c.bias else ((), ())
    kernel = (x.shape[-1], inner)
    x = Linear("bfz,zd->bfd", kernel, ("embed", "mlp"), (*_ROWS, "mlp"), inner_bias, ("mlp",), c.lora, name="fc1")(x)
    x = activation(c.activation)(x)
    return Linear("bfd,de->bfe", (inner, width), ("mlp", "embed"), (*_ROWS, None), outer_bias, (None,), c.lora, name="fc2")(x)


def _grid(config: MllmConfig, x: Float[Array, "B F Z"], scale: int) -> Float[Array, "B M i s j s Z"]:
    """The patches of square tiles, in squares of `scale` x `scale`."""
    side = config.vision.image_size // config.vision.patch_size
    rows, _, width = x.shape
    shape = (rows, -1, side // scale, scale, side // scale, scale, width)
    shape = (rows, x.shape[1] // side**2, *shape[2:])
    return mesh.reshape(x, shape, "batch", *(None,) * 6)


def _squares(config: MllmConfig, x: Float[Array, "B G Z"]) -> Float[Array, "B F Y"]:
    """Pixel shuffle: each square of patches becomes one feature, its patches side by side, row by row."""
    grid = _grid(config, x, config.connector.scale).transpose(0, 1, 2, 4, 3, 5, 6)
    rows, tiles, down, across, scale, _, width = grid.shape
    return mesh.reshape(grid, (rows, tiles * down * across, scale * scale * width), *_ROWS, None)


def _pooled(config: MllmConfig, x: Float[Array, "B G Z"]) -> Float[Array, "B F Z"]:
    """The average of each square of patches."""
    pooled = jnp.mean(_grid(config, x, config.connector.scale).astype(jnp.float32), axis=(3, 5)).astype(x.dtype)
    rows, tiles, down, across, width = pooled.shape
    return mesh.reshape(pooled, (rows, tiles * down * across, width), *_ROWS, None)


def _with_frames(config: MllmConfig, x: Float[Array, "B G Z"]) -> Float[Array, "B F Z"]:
    """Every tile's features, and behind them the same pooled by squares, as a frame of a video takes them.

    Which tiles are frames differs from row to row, and shapes do not: so every tile gives both. With squares of 2 x 2 the linears behind
    this see a quarter more features of pictures and five times those of frames; next to the tower, that is 2 and 7 parts in a hundred.
    """
    grid = _grid(config, x, config.connector.frame_scale)
    match config.connector.frame_pool:
        case "average":
            pooled = jnp.mean(grid.astype(jnp.float32), axis=(3, 5)).astype(x.dtype)
        case "max":
            pooled = jnp.max(grid, axis=(3, 5))
        case other:
            raise ValueError(f"unknown pooling of frames {other!r}")
    rows, tiles, *_, width = grid.shape
    both = [mesh.reshape(part, (rows, tiles, -1, width), *_ROWS, None) for part in (x, pooled)]
    return mesh.reshape(jnp.concatenate(both, axis=2), (rows, tiles * config.tile_features, width), *_ROWS, None)
