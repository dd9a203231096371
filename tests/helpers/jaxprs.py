"""What a computation is made of."""

from collections.abc import Iterator

import jax


def equations(jaxpr) -> Iterator:
    """All equations of a jaxpr, those of loops and calls in it, too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))
