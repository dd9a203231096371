"""The few layers that every tower and decoder is made of, on `self.param`, so that shardings are ours.

Weights rest sharded over `fsdp`. A layer casts its weight to the compute type while it is still sharded and gathers it then,
so that the gather moves 2 bytes a weight on accelerators and only one layer is whole at a time.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from mmalign_jax import mesh
from mmalign_jax.models.config import LORA_A, LORA_B, Lora

Init = Callable[..., Array]
_INIT = nn.initializers.normal(0.02)  # only for shapes: weights always come from a checkpoint directory


def gathered(weight: Array, dtype: jnp.dtype, *axes: str | None) -> Array:
    """The weight in its compute type, whole along `fsdp`, still split along `tensor`."""
    return mesh.constrain(weight.astype(dtype), *(None if axis == "embed" else axis for axis in axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(equation: str, out_axes: tuple[str | None, ...], kernel_axes: tuple[str | None, ...], x: Array, kernel: Array) -> Array:
    """`einsum(equation, x, kernel)`, over one axis.

    The kernel's gradient is the product of `x` and the result's, in the order in which a CPU has to transpose the smaller of the two: by
    itself it would transpose what is behind an activation, and compute that once more for it.
    """
    return jnp.einsum(equation, x, kernel, out_sharding=mesh.out_sharding(*out_axes))


def _product_forward(equation: str, out_axes: tuple, kernel_axes: tuple, x: CustomVJPPrimal, kernel: CustomVJPPrimal) -> tuple[Array, tuple]:
    # nothing is kept for a gradient that nobody asks for: a frozen kernel's needs the input, and would hold it
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    # the product itself, which remat policies know, and not `_product`, which they do not
    return jnp.einsum(equation, x.value, kernel.value, out_sharding=mesh.out_sharding(*out_axes)), kept


def _product_backward(equation: str, out_axes: tuple, kernel_axes: tuple, kept: tuple, y: Array) -> tuple[Array | None, Array | None]:
    (x, kernel), (given, result) = kept, equation.split("->")
    of_x, of_kernel = given.split(",")
    rows, to_x, to_kernel = len(of_x) - 1, None, None
    if kernel is not None:
        to_x = jnp.einsum(f"{result},{of_kernel}->{of_x}", y, kernel, out_sharding=mesh.out_sharding(*out_axes[:rows], kernel_axes[0]))
    if x is not None:
        if x.shape[-1] <= math.prod(y.shape[rows:]):
            to_kernel = jnp.einsum(f"{of_x},{result}->{of_kernel}", x, y, out_sharding=mesh.out_sharding(*kernel_axes))
        else:
            turned = f"{of_kernel[1:]}{of_kernel[0]}"
            of_turned = jnp.einsum(f"{result},{of_x}->{turned}", y, x, out_sharding=mesh.out_sharding(*kernel_axes[1:], kernel_axes[0]))
            # XLA would make one product of product and transposition, and transpose `x` again
            of_turned = jax.lax.platform_dependent(of_turned, cpu=jax.lax.optimization_barrier, default=lambda gradient: gradient)
            to_kernel = jnp.moveaxis(of_turned, -1, 0)
    return to_x, to_kernel


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class Linear(nn.Module):
    """`einsum(equation, x, kernel) + bias`, and low-rank factors besides where `lora` wants them for a linear of this name.

    `kernel_axes` name the kernel's dimensions, `out_axes` the result's.
    """

    equation: str
    shape: tuple[int, ...]
    kernel_axes: tuple[str | None, ...]
    out_axes: tuple[str | None, ...]
    bias_shape: tuple[int, ...] = ()
    bias_axes: tuple[str | None, ...] = ()
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = gathered(self.param("kernel", _INIT, self.shape), x.dtype, *self.kernel_axes)
        y = self._product(x, kernel)
        if self.lora is not None and self.lora.adapts(self.name):
            y = y + self._low_rank(x, self.lora)
        if self.bias_shape:
            bias = self.param("bias", nn.initializers.zeros, self.bias_shape)
            y = y + gathered(bias, x.dtype, *self.bias_axes)
        return y

    def _product(self, x: Array, kernel: Array) -> Array:
        given, result = self.equation.split("->")
        inputs = [letter for letter in given.split(",")[1] if letter not in result]
        equation = self.equation
        if len(inputs) > 1:
            # as one axis: einsum would sum over them in another order, for which a CPU rewrites the kernel at every product
            rows = x.ndim - len(inputs)
            size = math.prod(kernel.shape[: len(inputs)])  # named, since there may be no rows to tell it from
            x = mesh.reshape(x, (*x.shape[:rows], size), *self.out_axes[:rows], self.kernel_axes[0])
            kernel = mesh.reshape(kernel, (size, *kernel.shape[len(inputs) :]), self.kernel_axes[0], *(None,) * (kernel.ndim - len(inputs)))
            equation = equation.replace("".join(inputs), inputs[0])
        axes = tuple(None if axis == "embed" else axis for axis in (self.kernel_axes[0], *self.kernel_axes[len(inputs) :]))
        return _product(equation, self.out_axes, axes, x, kernel)

    def _low_rank(self, x: Array, lora: Lora) -> Array:
        """scale (x A) B, with A `[*ins, R]` and B `[R, *outs]` where the kernel is `[*ins, *outs]`."""
        given, result = self.equation.split("->")
        letters, kernel = given.split(",")
        count = sum(letter not in result for letter in kernel)
        rows = "".join(letter for letter in letters if letter in result)
        row_axes = (self.out_axes[result.index(letter)] for letter in rows)
        first = self.param(LORA_A, _INIT, (*self.shape[:count], lora.rank))
        second = self.param(LORA_B, nn.initializers.zeros, (lora.rank, *self.shape[count:]))
        first = gathered(first, x.dtype, *self.kernel_axes[:count], None)
        second = gathered(second, x.dtype, None, *self.kernel_axes[count:])
        low = jnp.einsum(f"{letters},{kernel[:count]}R->{rows}R", x, first, out_sharding=mesh.out_sharding(*row_axes, None))
        return jnp.einsum(f"{rows}R,R{kernel[count:]}->{result}", low * lora.scale, second, out_sharding=mesh.out_sharding(*self.out_axes))


class Embed(nn.Module):
    """Rows of a table by id. The table is gathered whole: a lookup in a table split by rows would reshard silently."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        table = self.param("embedding", _INIT, (self.rows, self.width))
        table = mesh.constrain(table.astype(dtype), None, None)
        return table.at[ids].get(out_sharding=mesh.out_sharding("batch", None, None), mode="clip")


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 (arXiv 1910.07467), over the last axis or, with `axes=2`, the last two together.

    Llama casts before it multiplies by the scale; Gemma (`offset`) multiplies by 1 + scale in float32 and casts then.
    """

    eps: float
    offset: bool = False
    axes: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", init, x.shape[-self.axes :])
        x32 = x.astype(jnp.float32)
        square = jnp.mean(x32 * x32, axis=tuple(range(-self.axes, 0)), keepdims=True)
        normed = x32 * jax.lax.rsqrt(square + self.eps)
        if self.offset:
            return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * scale + bias).astype(x.dtype)


def softcap(x: Float[Array, "*b"], cap: float | None) -> Float[Array, "*b"]:
    """cap * tanh(x / cap), or `x` without a cap (arXiv 2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def activation(name: str) -> Callable[[Array], Array]:
    """The activation that a Hugging Face config calls `name`.

    Raises:
      ValueError: a name that no supported checkpoint uses.
    """
    table = {
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu": jax.nn.relu,
    }
    if name not in table:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(table)}")
    return table[name]
