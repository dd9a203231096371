"""Adversarial pictures by projected gradient ascent (AdPO)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from mmalign_jax import mesh
from mmalign_jax.pairs.views.keys import draw_grid
from mmalign_jax.pairs.views.source import Source


def pgd(source: Source, eps: float = 2.0, steps: int = 10) -> Float32[Array, "B M Y W 3"]:
    """x + argmax_d || phi(x + d) - phi_org(x) ||^2 over || d ||_inf <= eps (AdPO, arXiv 2504.01735: eps 2 of 255 levels, 10 steps).

    `steps` steps of 2.5 eps / steps along the sign of the gradient, from a random start in the ball (at d = 0 the gradient vanishes where
    phi = phi_org), each projected to the ball and to pixels in 0..255. The paper's eps = 2/255 is `eps` = 2 here. AdPO does not say how
    long its steps are; 2.5 eps / steps is Madry et al.'s (1706.06083).

    phi is `source.features`, phi_org(x) is `source.target`, or phi(x) when there is none. The result is a constant: no gradient flows
    into the pixels, nor into what `features` closes over. Where a gradient is nothing but rounding, its sign, and so a step, may differ
    between meshes and compilers.
    """
    start = jax.lax.stop_gradient(source.pixels)
    # Parameters that are being differentiated become arguments here, and constants. Otherwise the loop, and in it the tower's gradient,
    # would be differentiated only to be thrown away, which attention kernels refuse: they have no second derivative.
    features, closed_over = jax.closure_convert(source.features, start)
    closed_over = jax.lax.stop_gradient(closed_over)
    target = jax.lax.stop_gradient(features(start, *closed_over) if source.target is None else source.target)

    def distance(pixels: Float32[Array, "B M Y W 3"]) -> Float32[Array, ""]:
        # rows do not see each other, so the gradient of the sum is each row's own
        return jnp.sum(jnp.square(features(pixels, *closed_over).astype(jnp.float32) - target.astype(jnp.float32)))

    def project(change: Float32[Array, "B M Y W 3"]) -> Float32[Array, "B M Y W 3"]:
        change = jnp.clip(start + jnp.clip(change, -eps, eps), 0, 255) - start
        return jnp.where(source.inside, change, 0.0)

    def step(_, change: Float32[Array, "B M Y W 3"]) -> Float32[Array, "B M Y W 3"]:
        return project(change + 2.5 * eps / steps * jnp.sign(jax.grad(distance)(start + change)))

    uniform = functools.partial(jax.random.uniform, minval=-eps, maxval=eps)
    first = project(draw_grid(uniform, source.keys, source.size[0], source.size[1], 3))
    change = jax.lax.fori_loop(0, steps, step, mesh.constrain(first, "batch", *[None] * 4))
    return jax.lax.stop_gradient(start + change)
