"""Every kind of picture becomes RGB; every kind of damage, and every size that is too large, is one clear error."""

import io
import struct
import zlib

import numpy as np
import pytest
from helpers.rows import encoded, photo_bytes
from PIL import Image

from mmalign_jax.data.bad_rows import BadRow
from mmalign_jax.data.images import decode_image, image_size


def decode(data, **limits):
    return decode_image(data, file="set.parquet", row="7", **limits)


def refused(data, reason, **limits):
    with pytest.raises(BadRow, match="set.parquet, row 7: ") as caught:
        decode(data, **limits)
    assert caught.value.reason == reason and caught.value.mend
    return str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats(kind):
    image = decode(encoded((250, 0, 0), kind=kind))
    assert image.mode == "RGB" and image.size == (12, 8)
    np.testing.assert_allclose(np.asarray(image)[0, 0], (250, 0, 0), atol=6)


def test_a_photograph():
    assert np.asarray(decode(photo_bytes())).std() > 30


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(size=(12, 8), exif=exif)).size == (8, 12)


def test_transparent_pixels_become_white():
    assert decode(encoded((255, 0, 0, 0), kind="PNG", mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded((255, 0, 0, 128), kind="PNG", mode="RGBA")).getpixel((0, 0)) == (255, 127, 127)
    assert decode(encoded((10, 0), kind="PNG", mode="LA")).getpixel((0, 0)) == (255, 255, 255)


def test_other_modes():
    assert decode(encoded(99, kind="PNG", mode="L")).getpixel((0, 0)) == (99, 99, 99)
    assert decode(encoded(200 * 256, kind="PNG", mode="I;16")).getpixel((0, 0)) == (200, 200, 200)
    cyan = decode(encoded((255, 0, 0, 0), mode="CMYK")).getpixel((0, 0))
    assert cyan[0] < 40 and cyan[1] > 200 and cyan[2] > 200
    palette = io.BytesIO()
    Image.new("RGB", (4, 4), (0, 128, 0)).quantize(4).save(palette, "PNG")
    assert decode(palette.getvalue()).getpixel((0, 0)) == (0, 128, 0)


def test_missing():
    refused(b"", "missing_image")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    out = io.BytesIO()
    noise.save(out, kind)
    whole = out.getvalue()
    for length in (3, 12, 20, len(whole) // 2, len(whole) * 9 // 10):
        refused(whole[:length], "unreadable_image")


def test_corrupt_and_foreign_bytes():
    png = bytearray(encoded(kind="PNG"))
    png[45] ^= 0xFF
    assert "corrupt" in refused(bytes(png), "unreadable_image")
    assert "supported format" in refused(b"<svg xmlns='x'/>", "unreadable_image")
    tiff = encoded(kind="TIFF")
    refused(tiff, "unreadable_image")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated(kind):
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (c, 0, 0)) for c in (0, 120, 250)]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    assert "animated" in refused(out.getvalue(), "unreadable_image")


def png_of(width, height):
    """A small file whose header promises any size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_by_their_header():
    assert "over the limit of 64000000 pixels" in refused(png_of(60_000, 60_000), "image_too_large")
    webp = bytearray(encoded(kind="WEBP", lossless=True))
    at = webp.index(b"VP8L") + 9
    webp[at : at + 4] = (16382 | (16382 << 14)).to_bytes(4, "little")
    assert "16383 x 16383" in refused(bytes(webp), "image_too_large")
    lossy = bytearray(encoded(kind="WEBP"))
    at = lossy.index(b"\x9d\x01\x2a") + 3
    lossy[at : at + 4] = struct.pack("<HH", 16383, 16383)
    assert "16383 x 16383" in refused(bytes(lossy), "image_too_large")


def test_limits_of_the_caller():
    data = encoded(size=(20, 10))
    assert decode(data, max_pixels=200).size == (20, 10)
    refused(data, "image_too_large", max_pixels=199)
    assert "max_image_bytes" in refused(data, "image_too_large", max_bytes=len(data) - 1)
    assert "200:1" in refused(encoded(size=(402, 2)), "image_too_large")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8, 9, 65535])
def test_the_size_from_the_header_is_that_of_the_decoded_picture(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(size=(12, 8), kind=kind, exif=exif)
    width, height = decode(data).size
    assert image_size(data, file="f", row="r") == (height, width)
    assert (height > width) == (orientation in (5, 6, 7, 8))


def test_a_size_is_read_without_decoding():
    whole = encoded(size=(300, 200), kind="PNG")
    # pixels that cannot be decoded are not looked at; a size that is refused is
    assert image_size(whole[:60], file="f", row="r") == (200, 300)
    with pytest.raises(BadRow, match="over the limit of 100 pixels"):
        image_size(whole, max_pixels=100, file="f", row="r")
