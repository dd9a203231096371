"""Encoded bytes -> RGB picture, with every size checked from the header before anything is decoded."""

import io
import struct
import zlib

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from mmalign_jax.data.bad_rows import Place

# A strip of 1 x 10^7 pixels passes a limit on pixels, and explodes when its short side is resized to the tower's size.
MAX_ASPECT = 200

MAX_PIXELS = 64_000_000
MAX_BYTES = 64_000_000

_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF; these values exchange width and height
_FORMATS = "JPEG, PNG, WEBP, GIF, BMP"
# The plugins are called directly: `Image.open` tries every installed plugin, and its own bomb check is a process-wide setting.
_PLUGINS = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"GIF87a": GifImagePlugin.GifImageFile,
    b"GIF89a": GifImagePlugin.GifImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
}
# What Pillow's plugins raise on damaged data (the first four are those that Image.open catches, too).
_DAMAGE = (
    SyntaxError, IndexError, TypeError, struct.error, OSError, EOFError, ValueError, KeyError, OverflowError, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, file: str, row: str) -> Image.Image:
    """Decodes one still picture to RGB, upright by its EXIF orientation.

    Transparent pixels are laid on white (what a viewer shows; the colour hidden under alpha 0 is arbitrary). Gray is copied to
    three channels, 16-bit gray keeps its upper 8 bits, palettes and CMYK go through Pillow's conversion without colour profiles.

    Args:
      data: encoded bytes: JPEG, PNG, WEBP, GIF or BMP.
      max_pixels: limit on width x height, checked before decoding.
      max_bytes: limit on `len(data)`.
      file, row: named in errors.

    Raises:
      BadRow (a DataError): missing, too large, of another format, animated, truncated or corrupt.
    """
    place = Place(file, row)
    _check_bytes(data, max_bytes, place)
    try:
        image = _open(data, max_pixels, place)
        _check_size(image.size, max_pixels, place)
        animated = getattr(image, "is_animated", False)
        if not animated:
            image.load()
            image = _to_rgb(ImageOps.exif_transpose(image))
    except _DAMAGE as error:
        problem = f"the image is truncated or corrupt ({error})"
        raise place.bad("unreadable_image", problem, "Replace the image or remove the row.") from error
    if animated:
        raise place.bad("unreadable_image", "the image is animated", "Give one still frame.")
    return image


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, file: str, row: str) -> tuple[int, int]:
    """Height and width of the upright picture, from its header; nothing is decoded.

    Raises:
      BadRow (a DataError): see `decode_image`, as far as the header shows it.
    """
    place = Place(file, row)
    _check_bytes(data, max_bytes, place)
    try:
        image = _open(data, max_pixels, place)
        _check_size(image.size, max_pixels, place)
        turned = _has_exif(data) and image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
    except _DAMAGE as error:
        problem = f"the image is truncated or corrupt ({error})"
        raise place.bad("unreadable_image", problem, "Replace the image or remove the row.") from error
    return image.size if turned else image.size[::-1]


def _has_exif(data: bytes) -> bool:
    """Whether there may be EXIF data. Pillow decodes a whole PNG to find out, since they may stand behind the pixels."""
    png = data.startswith(b"\x89PNG")
    return not png or any(mark in data for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp"))


def _open(data: bytes, max_pixels: int, place: Place) -> Image.Image:
    stream = io.BytesIO(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        # Pillow's WebP plugin allocates the whole canvas while it opens the file, so the size is read here first.
        _check_size(_webp_size(data), max_pixels, place)
        return WebPImagePlugin.WebPImageFile(stream)
    for magic, plugin in _PLUGINS.items():
        if data.startswith(magic):
            return plugin(stream)
    raise place.bad("unreadable_image", f"the bytes are not an image of a supported format ({_FORMATS})", "Convert it to JPEG or PNG.")


def _check_bytes(data: bytes, max_bytes: int, place: Place) -> None:
    if not data:
        raise place.bad("missing_image", "the image has no bytes", "Give the row its image or remove the row.")
    if len(data) > max_bytes:
        raise place.bad(
            "image_too_large",
            f"the image has {len(data)} bytes, over the limit of {max_bytes}",
            "Shrink the image or raise config.data.max_image_bytes.",
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from a WebP header (RFC 9649, section 2.5 to 2.7)."""
    chunk = data[12:16]
    if chunk == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L" and len(data) >= 25 and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    if chunk == b"VP8 " and len(data) >= 30 and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("bad WebP header")


def _check_size(size: tuple[int, int], max_pixels: int, place: Place) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise place.bad("unreadable_image", f"the image is {width} x {height}", "Replace the image or remove the row.")
    if width * height > max_pixels:
        raise place.bad(
            "image_too_large",
            f"the image is {width} x {height}, over the limit of {max_pixels} pixels",
            "Shrink the image or raise config.data.max_image_pixels.",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        problem = f"the image is {width} x {height}, longer than {MAX_ASPECT}:1"
        raise place.bad("image_too_large", problem, "Crop the image or remove the row.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion clips it at 255
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
