"""What every view keeps to: types, sizes, draws by record, canvases, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny import quick_jit

from mmalign_jax import mesh, types
from mmalign_jax.pairs import views
from mmalign_jax.pairs.views.keys import view_keys

B, M, Y, W = 8, 2, 22, 30
TEXTS = (
    "identity", "black", "other_image", "random_crop", "diffusion(500)", "gaussian_blur(1.5)", "pixelate(5)",
    "low_resolution(7)", "colour_jitter(0.4,0.4,0.4,0.3)", "patch_mask(0.3,4)", "collage", "collage(pip)", "pgd(4,3)",
)  # fmt: skip
VIEWS = {text: views.parse(text) for text in TEXTS}
RANDOM = [text for text, view in VIEWS.items() if view.random]
SEED = jax.random.key(3)
RECORDS = jnp.array([types.record_key(f"row {i}") for i in range(B)], jnp.uint32)
STATISTICS = {"pixel_mean": (0.48, 0.46, 0.41), "pixel_std": (0.27, 0.26, 0.28)}


def pictures(seed, rows=B, height=Y, width=W):
    return np.random.default_rng(seed).integers(0, 256, (rows, M, height, width, 3), np.uint8)


IMAGES, OTHERS = pictures(0), pictures(1)


def features(images):
    """Means of quarters, bent: a small tower that sees all of the first 20 x 28 pixels."""
    rows = images.shape[0]
    quarters = mesh.reshape(images[:, :, :20, :28], (rows, M, 2, 10, 2, 14, 3), "batch", *[None] * 6).mean(axis=(3, 5)) / 255
    return mesh.reshape(jnp.sin(3 * quarters), (rows, M * 4, 3), "batch", None, None)


@quick_jit
def program(images, others, records, extent, seed):
    """All views at once, which is quicker to compile than a program each."""
    keys = views.row_keys(seed, records, 0)
    given = {"extent": extent, "other_images": others, "features": features, **STATISTICS}
    return {text: view.apply(images, keys, **given) for text, view in VIEWS.items()}


def everything(images, others, records, extent=None, seed=SEED):
    """Of float32 pixels: neither rounded nor clipped."""
    return program(jnp.asarray(images, jnp.float32), jnp.asarray(others, jnp.float32), records, extent, seed)


@pytest.fixture(scope="module")
def exact():
    return jax.device_get(everything(IMAGES, OTHERS, RECORDS))


def close(got, expected, text):
    """Equal to what the order of sums allows. The sign of a gradient of nearly nothing may turn."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    if text.startswith("pgd"):
        assert np.mean(np.abs(got - expected) > 1e-3) < 2e-3
    else:
        np.testing.assert_allclose(got, expected, atol=2e-3)


@pytest.mark.parametrize("text", TEXTS)
def test_every_view_but_identity_changes_every_picture(exact, text):
    out = exact[text]
    assert out.shape == IMAGES.shape and np.all(np.isfinite(out))
    changed = np.mean(out.reshape(B * M, -1) != IMAGES.reshape(B * M, -1), axis=-1)
    assert np.all(changed == 0) if text == "identity" else np.all(changed > 0.1), changed


@pytest.mark.parametrize("type_", [jnp.uint8, jnp.bfloat16, jnp.float32])
def test_types(type_):
    images = jax.ShapeDtypeStruct(IMAGES.shape, type_)
    for text, out in jax.eval_shape(program, images, images, RECORDS, None, SEED).items():
        expected = jnp.uint8 if type_ == jnp.uint8 and not text.startswith("pgd") else jnp.float32
        assert (out.shape, out.dtype) == (IMAGES.shape, expected), text


def test_uint8_is_rounded_and_clipped_and_draws_the_same(exact):
    for text in ("diffusion(500)", "random_crop"):
        out = quick_jit(lambda images, text=text: VIEWS[text].apply(images, views.row_keys(SEED, RECORDS, 0), **STATISTICS))(jnp.asarray(IMAGES))
        assert out.dtype == jnp.uint8
        np.testing.assert_allclose(out, np.clip(exact[text], 0, 255), atol=0.5 + 1e-3)


@pytest.mark.parametrize("text", RANDOM)
def test_every_image_has_its_own_draw(text, same_pictures):
    assert len(np.unique(same_pictures[text].reshape(B * M, -1), axis=0)) >= (B * M - 2 if text != "collage" else 4)


@pytest.fixture(scope="module")
def same_pictures():
    """One picture for all; a collage has only four cells."""
    same = [np.broadcast_to(images[:1, :1], IMAGES.shape) for images in (IMAGES, OTHERS)]
    return jax.device_get(everything(*same, RECORDS))


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in RANDOM])
def test_a_view_that_is_not_random_is_the_same_for_all(same_pictures, text):
    assert len(np.unique(same_pictures[text].reshape(B * M, -1), axis=0)) == 1


def elsewhere(extent):
    """Four of the rows in another order, on eight devices, each picture in the corner of a larger canvas with rubbish around it."""
    order, out = np.array([5, 2, 7, 0]), []
    for images in (IMAGES, OTHERS):
        canvas = np.full((4, M, Y + 9, W + 5, 3), np.nan, np.float32)
        canvas[:, :, :Y, :W] = images[order]
        out.append(canvas)
    grid = mesh.make_mesh(data=2, fsdp=2, tensor=2)
    place = lambda x: jax.device_put(x, mesh.sharding(grid, "batch", *[None] * (x.ndim - 1)))  # noqa: E731
    with jax.set_mesh(grid):
        extent = np.broadcast_to(np.array(extent, np.int32), (4, M, 2))
        seen = everything(*map(place, out), place(RECORDS[order]), place(extent))
        assert {jax.typeof(x).sharding.spec for x in seen.values()} == {mesh.spec("batch", *[None] * 4)}
    return order, out[0], jax.device_get(seen)


@pytest.fixture(scope="module")
def in_canvases():
    return elsewhere((Y, W))


@pytest.mark.parametrize("text", TEXTS)
def test_draws_from_record_alone_and_nothing_around_a_picture_is_read_or_written(exact, in_canvases, text):
    """Neither batch, nor order, nor mesh, nor canvas matters."""
    order, _, out = in_canvases
    close(out[text][:, :, :Y, :W], exact[text][order], text)
    assert np.all(np.isnan(out[text][:, :, Y:])) and np.all(np.isnan(out[text][:, :, :, W:]))


def test_canvases_without_a_picture_stay_as_they_are():
    _, canvas, out = elsewhere((0, 0))
    for text in TEXTS:
        np.testing.assert_array_equal(out[text], canvas, err_msg=text)


def test_other_records_and_seeds_draw_otherwise(exact):
    for out in (everything(IMAGES, OTHERS, RECORDS[::-1]), everything(IMAGES, OTHERS, RECORDS, seed=jax.random.key(4))):
        for text in TEXTS:
            changed = [np.any(a != b) for a, b in zip(np.asarray(out[text]), exact[text], strict=True)]
            # two images in the same two of four cells
            assert sum(changed) >= (B - 2 if text == "collage" else B) if VIEWS[text].random else not any(changed), text


def test_two_views_share_no_draws():
    keys = views.row_keys(SEED, RECORDS, 0)
    drawn = [jax.random.key_data(view_keys(keys, name)) for name in views.names()]
    assert len(np.unique(np.concatenate([*drawn, jax.random.key_data(keys)]), axis=0)) == (len(drawn) + 1) * B


def test_one_row_on_a_mesh_is_as_among_others(exact):
    """A batch of one row is what a small machine trains on; jax cannot tell the sharding of every operation on it."""
    grid = mesh.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(grid):
        given = [jax.device_put(x[:1], mesh.sharding(grid, "batch", *[None] * (x.ndim - 1))) for x in (IMAGES, OTHERS, RECORDS)]
        for text, out in everything(*given).items():
            close(out, exact[text][:1], text)


def test_what_a_view_needs_is_asked_for():
    keys = views.row_keys(SEED, RECORDS, 0)
    for text, missing in (("other_image", "other_images"), ("collage(pip)", "other_images"), ("pgd", "features"), ("diffusion", "pixel_mean")):
        with pytest.raises(ValueError, match=missing):
            views.parse(text).apply(jnp.asarray(IMAGES), keys)
    assert views.parse("pgd").needs == {"features"} and views.parse("collage").needs == {"other_images"} and not views.parse("black").needs
