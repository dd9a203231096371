"""Every view against an implementation that is not ours: scipy, Pillow, torch, colorsys, or plain numpy."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import torch
from helpers.tiny import quick_jit

from mmalign_jax import types
from mmalign_jax.pairs import views
from mmalign_jax.pairs.views import colour
from mmalign_jax.pairs.views.diffusion import strength

B, M, Y, W = 2, 2, 26, 40
EXTENT = np.array([[[26, 40], [11, 17]], [[20, 9], [1, 5]]])
OTHER_EXTENT = np.array([[[26, 40], [26, 40]], [[13, 30], [0, 0]]])
PLACES = [(b, m) for b in range(B) for m in range(M)]
IMAGES, OTHERS = (np.random.default_rng(seed).integers(0, 256, (B, M, Y, W, 3)).astype(np.float32) for seed in (0, 1))
RECORDS = jnp.array([types.record_key(name) for name in "ab"], jnp.uint32)
SEED = jax.random.key(0)
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@functools.cache
def program(text):
    view = views.parse(text)

    def run(images, extent, records, seed, other):
        return view.apply(images, views.row_keys(seed, records, 0), extent=extent, pixel_mean=MEAN, pixel_std=STD, **other)

    return quick_jit(run)


def apply(text, images=IMAGES, extent=EXTENT, others=None, records=RECORDS, seed=SEED):
    """The view of float pixels, as a numpy array."""
    other = {} if others is None else {"other_images": jnp.asarray(others), "other_extent": jnp.asarray(OTHER_EXTENT)}
    return np.asarray(program(text)(jnp.asarray(images), None if extent is None else jnp.asarray(extent), records, seed, other))


def picture(images, place, extent=EXTENT):
    height, width = extent[place]
    return np.asarray(images[place][:height, :width])


def resized(pixels, height, width):
    """By Pillow, in float32 and without rounding between the passes."""
    channels = [PIL.Image.fromarray(np.ascontiguousarray(pixels[..., c])).resize((width, height), PIL.Image.Resampling.BILINEAR) for c in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


@pytest.mark.parametrize("sigma", [0.6, 6.0])
def test_gaussian_blur_is_scipys(sigma):
    out = apply(f"gaussian_blur({sigma})")
    for place in PLACES:
        expected = scipy.ndimage.gaussian_filter(picture(IMAGES, place), (sigma, sigma, 0), mode="nearest", truncate=4.0)
        np.testing.assert_allclose(picture(out, place), expected, atol=1e-3)


@pytest.mark.parametrize("block", [4, 64])
def test_pixelate_is_the_mean_of_blocks(block):
    out = apply(f"pixelate({block})")
    for place in PLACES:
        expected = picture(IMAGES, place).copy()
        for top in range(0, expected.shape[0], block):
            for left in range(0, expected.shape[1], block):
                cell = expected[top : top + block, left : left + block]
                cell[...] = cell.mean(axis=(0, 1))
        np.testing.assert_allclose(picture(out, place), expected, atol=1e-3)


@pytest.mark.parametrize("side", [4, 10])
def test_low_resolution_is_resizing_twice_with_pillow(side):
    out = apply(f"low_resolution({side})")
    for place in PLACES:
        own = picture(IMAGES, place)
        height, width = own.shape[:2]
        short = min(height, width)
        small = [int(min(side, short) * length / short) for length in (height, width)]
        np.testing.assert_allclose(picture(out, place), resized(resized(own, *small), height, width), atol=2e-3)
        if short <= side:
            np.testing.assert_allclose(picture(out, place), own, atol=1e-4)


def test_other_image_has_the_size_of_the_rows_own():
    out = apply("other_image", others=OTHERS)
    for place in PLACES:
        other = picture(OTHERS, place, OTHER_EXTENT)
        height, width = EXTENT[place]
        expected = resized(other, height, width) if other.size else np.zeros((height, width, 3))
        np.testing.assert_allclose(picture(out, place), expected, atol=2e-3)
    np.testing.assert_array_equal(out[0, 0], OTHERS[0, 0])


def test_black_is_zero():
    out = apply("black")
    for place in PLACES:
        assert not picture(out, place).any()


def test_a_grid_shows_the_picture_in_one_cell_and_the_other_in_three():
    cells = set()
    for seed in range(6):
        out = apply("collage(grid)", others=OTHERS, seed=jax.random.key(seed))
        for place in PLACES[:3]:
            height, width = EXTENT[place]
            own, other = picture(IMAGES, place), resized(picture(OTHERS, place, OTHER_EXTENT), height, width)
            down, across = ((0, -(-height // 2), height), (0, -(-width // 2), width))
            shows = []
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                cell = picture(out, place)[down[i] : down[i + 1], across[j] : across[j + 1]]
                is_own, is_other = (np.allclose(cell, resized(pixels, *cell.shape[:2]), atol=5e-3) for pixels in (own, other))
                assert is_own != is_other
                shows.append(is_own)
            assert sum(shows) == 1
            cells.add(shows.index(True))
    assert cells == {0, 1, 2, 3}


def test_a_picture_in_the_picture_has_seven_tenths_of_its_sides():
    corners = set()
    for seed in range(4):
        out = apply("collage(pip)", others=OTHERS, seed=jax.random.key(seed))
        for place in PLACES[:3]:
            height, width = EXTENT[place]
            inset = resized(picture(IMAGES, place), round(0.7 * height), round(0.7 * width))
            ground = resized(picture(OTHERS, place, OTHER_EXTENT), height, width)
            rows, columns = np.nonzero(np.abs(picture(out, place) - ground).max(axis=-1) > 5e-3)
            top, left = rows.min(), columns.min()
            assert (rows.max() - top + 1, columns.max() - left + 1) == inset.shape[:2]
            got = picture(out, place)[top : top + inset.shape[0], left : left + inset.shape[1]]
            np.testing.assert_allclose(got, inset, atol=5e-3)
            corners.add((top, left))
    assert len(corners) > 6


def test_the_schedule_of_the_noise():
    # written once more, in torch and float32 as in the releases
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - betas, dim=0)
    for t, signal, noise in ((500, 0.863, 0.505), (600, 0.734, 0.679), (700, 0.593, 0.805), (800, 0.467, 0.884), (999, 0.285, 0.959)):
        np.testing.assert_allclose(strength(t), (signal, noise), atol=6e-4)
        np.testing.assert_allclose(strength(t), (kept[t].sqrt(), (1 - kept[t]).sqrt()), rtol=2e-4)


@pytest.mark.parametrize(("text", "mean", "std"), [("diffusion(500)", MEAN, STD), ("diffusion(800,pixel)", (0, 0, 0), (1, 1, 1))])
def test_noise_is_normal_in_the_space_it_is_added_in(text, mean, std):
    out = apply(text, extent=None)
    signal, noise = strength(int("".join(filter(str.isdigit, text))))
    before, after = ((images / 255 - np.array(mean)) / np.array(std) for images in (IMAGES.astype(np.float64), out.astype(np.float64)))
    eps = (after - signal * before) / noise
    assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.02, (eps.mean(), eps.std())
    # neither neighbours, nor channels, nor images, nor rows share noise
    lines, columns = (eps[:, :, 1:], eps[:, :, :-1]), (eps[:, :, :, 1:], eps[:, :, :, :-1])
    for a, b in (lines, columns, (eps[..., 0], eps[..., 1]), (eps[0], eps[1]), (eps[:, 0], eps[:, 1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06
    assert out.min() < 0 and out.max() > 255, "float noise is not clipped"


def grey_of(pixels):
    return pixels @ np.array([0.2989, 0.587, 0.114], np.float32)


def test_colours_change_as_in_torchvision():
    factor = np.array([[0.3, 1.7], [1.2, 0.0]], np.float32)
    source = views.view.Source(jnp.asarray(IMAGES), jnp.asarray(EXTENT), keys=None)
    adjusted = {
        "brightness": quick_jit(colour.adjust_brightness)(source.pixels, factor),
        "contrast": quick_jit(lambda pixels, factor: colour.adjust_contrast(pixels, factor, source))(source.pixels, factor),
        "saturation": quick_jit(colour.adjust_saturation)(source.pixels, factor),
        "hue": quick_jit(colour.adjust_hue)(source.pixels, factor - 0.9),
    }
    for place in PLACES:
        own, f = picture(IMAGES, place), factor[place]
        turned = [colorsys.hsv_to_rgb((h + f - 0.9) % 1, s, v) for h, s, v in (colorsys.rgb_to_hsv(*rgb) for rgb in own.reshape(-1, 3) / 255)]
        expected = {
            "brightness": f * own,
            "contrast": f * own + (1 - f) * grey_of(own).mean(),
            "saturation": f * own + (1 - f) * grey_of(own)[..., None],
            "hue": 255 * np.array(turned).reshape(own.shape),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(picture(adjusted[name], place), np.clip(value, 0, 255), atol=5e-3, err_msg=name)


def test_hue_of_greys_and_of_pure_colours():
    levels = np.array([[0, 0, 0], [255, 255, 255], [90, 90, 90], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.float32)
    out = quick_jit(colour.adjust_hue)(jnp.asarray(levels)[None, None, None], jnp.full((1, 1), 1 / 3))[0, 0, 0]
    np.testing.assert_allclose(out, levels[:, [2, 0, 1]], atol=1e-3)


def test_factors_of_the_jitter_are_uniform():
    grey = np.full((500, 1, 1, 1, 3), 100.0, np.float32)
    records = jnp.arange(500, dtype=jnp.uint32)
    factor = np.sort(apply("colour_jitter(0.5,0,0,0)", grey, None, records=records)[:, 0, 0, 0, 0] / 100)
    np.testing.assert_allclose(factor, np.linspace(0.5, 1.5, 500), atol=0.08)
    darkest = apply("colour_jitter(1.5,0,0,0)", grey, None, records=records) / 100
    assert darkest.min() >= 0 and darkest.max() <= 2.5 and darkest.max() > 2.4 and darkest.min() < 0.1
    # of one grey, contrast, saturation and hue leave what brightness made
    all_four = np.sort(apply("colour_jitter(0.5,0.4,0.4,0.4)", grey, None, records=records)[:, 0, 0, 0, 0] / 100)
    np.testing.assert_allclose(all_four, factor, atol=1e-3)


@pytest.mark.parametrize(("p", "patch"), [(0.3, 4), (1.0, 4), (0.5, 7)])
def test_patch_mask_hides_exactly_the_share(p, patch):
    out = apply(f"patch_mask({p},{patch})")
    for place in PLACES:
        own, got = picture(IMAGES, place), picture(out, place)
        mean, hidden = own.mean(axis=(0, 1)), []
        for top in range(0, own.shape[0], patch):
            for left in range(0, own.shape[1], patch):
                here = np.s_[top : top + patch, left : left + patch]
                covered = np.allclose(got[here], mean, atol=1e-3)
                assert covered or np.array_equal(got[here], own[here])
                hidden.append(covered)
        assert abs(sum(hidden) - p * len(hidden)) <= 0.5, (sum(hidden), len(hidden))
