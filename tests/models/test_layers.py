"""Linears: their gradients beside those of a plain product, and what they keep for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax.models.layers import Linear

pytestmark = pytest.mark.optimised

SHAPES = {
    "wider": ("btd,df->btf", (2, 3, 8), (8, 20), ("embed", "mlp")),
    "narrower": ("btf,fd->btd", (2, 3, 20), (20, 8), ("mlp", "embed")),
    "to heads": ("btd,dhe->bthe", (2, 3, 8), (8, 4, 5), ("embed", "heads", None)),
    "from heads": ("bthe,hed->btd", (2, 3, 4, 5), (4, 5, 8), ("heads", None, "embed")),
}


def arrays(name):
    equation, given, shape, axes = SHAPES[name]
    random = np.random.default_rng(0)
    x, kernel = (jnp.array(random.normal(size=size), jnp.float32) for size in (given, shape))
    (_, of_kernel), result = equation.split("->")[0].split(","), equation.split("->")[1]
    out = ("batch", None, *(axis for axis, letter in zip(axes, of_kernel, strict=True) if letter in result))
    layer = Linear(equation, shape, axes, out)
    return equation, x, kernel, lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_a_plain_product(name):
    equation, x, kernel, ours = arrays(name)
    plain = lambda x, kernel: jnp.einsum(equation, x, kernel)  # noqa: E731
    found, wanted = (jax.jit(jax.grad(lambda x, k, f=f: jnp.sum(jnp.sin(f(x, k))), argnums=(0, 1)))(x, kernel) for f in (ours, plain))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_a_frozen_kernel_keeps_no_input(name):
    _, x, kernel, ours = arrays(name)
    kept = lambda f, *args: sorted(leaf.size for leaf in jax.tree.leaves(jax.vjp(f, *args)[1]) if leaf.size > 1)  # noqa: E731
    assert kept(lambda x: ours(x, kernel), x) == [kernel.size]
    assert kept(lambda kernel: ours(x, kernel), kernel) == [x.size]
    assert kept(ours, x, kernel) == sorted([x.size, kernel.size])


@pytest.mark.parametrize(("name", "product"), [("wider", "8,20"), ("narrower", "8,20")])
def test_a_cpu_transposes_the_smaller_factor_of_a_kernels_gradient(name, product):
    """The gradient of a kernel `[20, 8]` is computed as `[8, 20]`: XLA would make the transposition behind it a part of the product."""
    _, x, kernel, ours = arrays(name)
    loss = lambda x, kernel: jnp.sum(jnp.sin(ours(jnp.tanh(x), kernel)))  # noqa: E731
    text = jax.jit(jax.grad(loss, argnums=1)).lower(x, kernel).compile().as_text()
    of_kernel = [line for line in text.splitlines() if " dot(" in line and "transpose(jvp" in line]
    assert [re.search(r"= f32\[(.*?)\]", line)[1] for line in of_kernel] == [product]
