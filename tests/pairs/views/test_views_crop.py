import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from helpers.tiny import quick_jit

from mmalign_jax import mesh, types
from mmalign_jax.pairs import views

B, M, Y, W = 8, 2, 24, 32
SEED = jax.random.key(3)
RECORDS = jnp.array([types.record_key(f"row {i}") for i in range(B)], jnp.uint32)


def pictures(rows=B):
    return jnp.array(np.random.default_rng(0).integers(0, 256, (rows, M, Y, W, 3)), jnp.uint8)


random_resized_crop = quick_jit(views.random_resized_crop)
resized_crop = quick_jit(views.resized_crop)
row_keys = quick_jit(views.row_keys)


def crops(images, records=RECORDS, epoch=0, seed=SEED):
    return random_resized_crop(images, row_keys(seed, records, epoch))


def assert_same_views(got, expected):
    """The same boxes; a pixel half-way between two levels may be rounded to either, as programs of other shapes add in another order."""
    got, expected = (np.asarray(x).astype(int) for x in (got, expected))
    np.testing.assert_allclose(got, expected, atol=1)
    assert np.mean(got != expected) < 5e-3


def boxes(count, height, width, scale=(0.01, 0.20), ratio=(3 / 4, 4 / 3)):
    keys = jax.random.split(SEED, count)
    return np.asarray(quick_jit(jax.vmap(lambda key: views.crop_box(key, height, width, scale, ratio)))(keys)).T


def test_drawn_from_seed_record_and_epoch_alone():
    images = pictures()
    first = crops(images)
    assert first.shape == images.shape and first.dtype == jnp.uint8
    np.testing.assert_array_equal(first, crops(images))
    order = jnp.array([5, 2, 7])
    assert_same_views(crops(images[order], RECORDS[order]), first[order])
    for other in (crops(images, epoch=1), crops(images, seed=jax.random.key(4)), crops(images, RECORDS[::-1])):
        assert all(np.any(a != b) for a, b in zip(first, other, strict=True))


def test_rows_and_images_of_a_row_have_their_own_boxes():
    same = jnp.broadcast_to(pictures(1)[:, :1], (B, M, Y, W, 3))
    out = np.asarray(crops(same)).reshape(B * M, -1)
    assert len(np.unique(out, axis=0)) == B * M


def test_row_keys_take_a_traced_step():
    keys = quick_jit(lambda step: views.row_keys(SEED, RECORDS, step))(jnp.int32(7))
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(views.row_keys(SEED, RECORDS, 7)))
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == B


def test_a_coordinate_ramp_shows_one_to_twenty_per_cent():
    size = 200
    y, x = jnp.meshgrid(jnp.arange(size, dtype=jnp.float32), jnp.arange(size, dtype=jnp.float32), indexing="ij")
    ramp = jnp.broadcast_to(jnp.stack([y, x, y * 0], axis=-1), (32, 1, size, size, 3))
    out = np.asarray(random_resized_crop(ramp, jax.random.split(SEED, 32)))[:, 0]
    assert out.dtype == np.float32
    # the first and the last pixel of a crop keep their values
    h, w = (out[:, -1, -1, i] - out[:, 0, 0, i] + 1 for i in (0, 1))
    area, aspect = h * w / size**2, w / h
    slack = 1.5 / np.minimum(h, w)  # sides are whole pixels
    assert np.all(area >= 0.01 * (1 - slack)) and np.all(area <= 0.20 * (1 + slack)), area
    assert np.all(aspect >= 3 / 4 * (1 - slack)) and np.all(aspect <= 4 / 3 * (1 + slack)), aspect
    assert out[..., :2].min() >= 0 and out[..., :2].max() <= size - 1


def test_boxes_lie_inside_and_have_the_distribution_of_torchvision():
    height, width = 336, 300
    top, left, h, w = boxes(20_000, height, width)
    assert top.min() >= 0 and left.min() >= 0 and np.all(top + h <= height) and np.all(left + w <= width)
    assert np.any(top + h == height) and np.any(left == 0)
    share, log_ratio = h * w / (height * width), np.log(w / h)
    grid = np.linspace(0, 1, 11)[1:-1]
    np.testing.assert_allclose(np.quantile(share, grid), 0.01 + 0.19 * grid, atol=4e-3)
    np.testing.assert_allclose(np.quantile(log_ratio, grid), np.log(4 / 3) * (2 * grid - 1), atol=0.015)
    np.testing.assert_allclose(np.mean(top / (height - h)), 0.5, atol=0.01)
    np.testing.assert_allclose(np.mean(left / (width - w)), 0.5, atol=0.01)


def test_draws_that_do_not_fit_are_drawn_again():
    # half of the draws are too wide for this strip
    top, left, h, w = boxes(2000, 20, 200, scale=(0.1, 0.9), ratio=(2.0, 12.0))
    assert np.all(h <= 20) and np.all(w <= 200) and np.all(top + h <= 20) and np.all(left + w <= 200)
    assert len(np.unique(h)) > 5 and len(np.unique(top)) > 5


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(30, 300, (0, 130, 30, 40)), (300, 30, (130, 0, 40, 30)), (30, 30, (0, 0, 30, 30))],
)
def test_the_central_crop_when_no_draw_fits(height, width, expected):
    # an area of several images never fits
    drawn = boxes(3, height, width, scale=(12.0, 13.0))
    np.testing.assert_array_equal(drawn.T, [expected] * 3)


@pytest.mark.parametrize("box", [(3, 5, 6, 7), (0, 0, 1, 1), (23, 31, 1, 1), (0, 0, Y, W), (10, 0, 14, 4), (1, 20, 5, 12)])
def test_equals_cropping_and_resizing_with_pillow(box):
    images = pictures(1)
    out = np.asarray(resized_crop(images, jnp.broadcast_to(jnp.array(box), (1, M, 4))))
    top, left, h, w = box
    for m in range(M):
        picture = PIL.Image.fromarray(np.asarray(images[0, m])).crop((left, top, left + w, top + h))
        expected = np.asarray(picture.resize((W, Y), PIL.Image.Resampling.BILINEAR))
        # Pillow rounds to whole numbers between its two passes
        np.testing.assert_allclose(out[0, m].astype(int), expected.astype(int), atol=1)
        assert np.mean(out[0, m] != expected) < 0.25


def test_no_pixel_outside_of_the_box_is_read():
    images = jnp.full((1, 1, Y, W, 3), 1e6).at[:, :, 4:9, 6:12].set(1.0)
    np.testing.assert_allclose(resized_crop(images, jnp.array([[[4, 6, 5, 6]]])), 1.0, atol=1e-5)


def test_same_views_on_one_and_on_eight_devices():
    images = pictures()
    expected = crops(images)
    grid = mesh.make_mesh(data=2, fsdp=4)
    with jax.set_mesh(grid):
        sharded = jax.device_put(images, mesh.sharding(grid, "batch", *[None] * 4))
        records = jax.device_put(RECORDS, mesh.sharding(grid, "batch"))
        out = quick_jit(lambda x, r: views.random_resized_crop(x, views.row_keys(SEED, r, 0)))(sharded, records)
        assert jax.typeof(out).sharding.spec == mesh.spec("batch", *[None] * 4)
    assert_same_views(out, expected)


def test_a_picture_in_the_corner_of_its_canvas_is_cropped_as_it_is_alone():
    picture = pictures(1)
    canvas = jnp.zeros((1, M, Y + 13, W + 7, 3), jnp.uint8).at[:, :, :Y, :W].set(picture)
    extent = jnp.broadcast_to(jnp.array([Y, W]), (1, M, 2))
    keys = views.row_keys(SEED, RECORDS[:1], 0)
    alone, within = random_resized_crop(picture, keys), random_resized_crop(canvas, keys, extent=extent)
    np.testing.assert_array_equal(within[:, :, :Y, :W], alone)
    assert not within[:, :, Y:].any() and not within[:, :, :, W:].any()
    # a canvas without a picture has none afterwards
    empty = random_resized_crop(jnp.zeros_like(canvas), keys, extent=jnp.zeros_like(extent))
    assert not empty.any()
