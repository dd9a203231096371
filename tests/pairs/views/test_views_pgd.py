"""Adversarial pictures against a tiny LLaVA's tower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import Tiny, quick_jit

from mmalign_jax import mesh, types
from mmalign_jax.pairs import views

B, M, SIDE = 8, 2, 28
SEED = jax.random.key(1)
RECORDS = jnp.array([types.record_key(f"row {i}") for i in range(B)], jnp.uint32)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (B, M, SIDE, SIDE, 3)), jnp.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny")))


def attack(tiny, params, images, records, text="pgd(4,5)"):
    keys = views.row_keys(SEED, records, 0)
    return views.parse(text).apply(images, keys, features=lambda pixels: tiny.model.tower(params, pixels))


@pytest.fixture(scope="module")
def attacked(tiny):
    """The adversarial pictures, and how far their features are, beside those of random noise of the same strength."""

    @quick_jit
    def run(params, images):
        far = attack(tiny, params, images, RECORDS)
        noisy = images + 4 * jnp.sign(jax.random.normal(SEED, images.shape))
        clean, *others = (tiny.model.tower(params, pixels) for pixels in (images, far, jnp.clip(noisy, 0, 255)))
        return far, [jnp.sum(jnp.square(features - clean), axis=(1, 2)) for features in others]

    return jax.device_get(run(tiny.params, IMAGES))


def test_features_move_away_within_the_ball(attacked):
    far, (distance, by_noise) = attacked
    assert far.dtype == np.float32 and far.min() >= 0 and far.max() <= 255
    change = far - np.asarray(IMAGES, np.float32)
    assert np.abs(change).max() <= 4 + 1e-4 and np.mean(np.abs(change) > 3.9) > 0.5
    assert np.all(distance > 3 * by_noise), (distance, by_noise)


def test_the_gradient_does_not_flow_out(tiny):
    """Neither into the pixels nor into the parameters."""

    def loss(params, images):
        return jnp.sum(attack(tiny, params, images, RECORDS[:1], "pgd(4,2)"))

    grads = quick_jit(jax.grad(loss, argnums=(0, 1)))(tiny.params, IMAGES[:1].astype(jnp.float32))
    assert not [leaf for leaf in jax.tree.leaves(grads) if np.any(leaf)]


@jax.custom_vjp
def kernel(pixels, weight):
    """Stands for an attention kernel: it has a gradient, and that one has none."""
    return pixels * weight


def _kernel_backward(saved, cotangent):
    shape = jax.ShapeDtypeStruct(cotangent.shape, cotangent.dtype)
    return jax.pure_callback(lambda c, w: np.asarray(c) * np.asarray(w), shape, cotangent, saved), jnp.zeros_like(saved)


kernel.defvjp(lambda pixels, weight: (pixels * weight, weight), _kernel_backward)


def test_nothing_is_differentiated_twice():
    images = jnp.full((B, M, 4, 4, 3), 9.0)

    def loss(weight):
        keys = views.row_keys(SEED, RECORDS, 0)
        return jnp.sum(views.parse("pgd(2,3)").apply(images, keys, features=lambda pixels: kernel(pixels, weight).reshape(B, -1, 3)))

    assert quick_jit(jax.grad(loss))(2.0) == 0


def test_the_same_on_eight_devices(tiny, attacked):
    grid = mesh.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(grid):
        params = tiny.sharded(grid)
        images = jax.device_put(IMAGES, mesh.sharding(grid, "batch", *[None] * 4))
        records = jax.device_put(RECORDS, mesh.sharding(grid, "batch"))
        far = quick_jit(lambda params, images, records: attack(tiny, params, images, records))(params, images, records)
        assert jax.typeof(far).sharding.spec == mesh.spec("batch", *[None] * 4)
    # where a gradient is nearly nothing its sign may turn
    off = np.abs(np.asarray(far) - attacked[0])
    assert np.mean(off > 1e-3) < 5e-3, np.mean(off > 1e-3)


def test_a_given_target_is_gone_away_from(tiny):
    """One dimension: phi(x) = mean pixel. Away from a brighter target is darker, and the other way about."""

    def run(target):
        keys = views.row_keys(SEED, RECORDS, 0)
        features = lambda pixels: jnp.mean(pixels, axis=(2, 3))  # noqa: E731
        return views.parse("pgd(3,5)").apply(jnp.full((B, M, 4, 4, 3), 100.0), keys, features=features, target=jnp.full((B, M, 3), target))

    np.testing.assert_allclose(quick_jit(run)(200.0), 97.0)
    np.testing.assert_allclose(quick_jit(run)(0.0), 103.0)
