"""What a computation is made of."""

import math
from collections.abc import Iterator

import jax


def equations(jaxpr) -> Iterator:
    """All equations of a jaxpr, those of loops and calls in it, too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from equations(inner)


def product_flops(jaxpr) -> int:
    """FLOPs of all matrix products and convolutions, those of loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        name, (out, *_) = equation.primitive.name, (*equation.outvars, None)
        inside = sum(map(product_flops, _inner(equation)))
        assert name not in ("while", "cond") or not inside, f"how often the products of {name} are computed is not known"
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * out.aval.size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            total += 2 * out.aval.size * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        total += equation.params.get("length", 1) * inside
    return total


def _inner(equation) -> list:
    """The jaxprs in an equation."""
    held = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    return [getattr(inner, "jaxpr", inner) for inner in held if hasattr(inner, "eqns") or hasattr(inner, "jaxpr")]
