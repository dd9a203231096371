"""A record's pictures and videos: what they take in a row, known from their headers, and their pixels and patches in it."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from mmalign_jax.data.bad_rows import Place
from mmalign_jax.data.images import decode_image, image_size
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pictures import Expansion, Pictures, RowTraits, Size
from mmalign_jax.types import Media, Patches


def expand(medium: Media, pictures: Pictures, place: Place, *, max_pixels: int, max_bytes: int) -> Expansion:
    """What a medium takes in a row. Its pixels are not decoded.

    Raises:
      BadRow (a DataError): a header that is damaged or a picture that is too large, where sizes matter; a medium that the model does
        not take.
    """
    if pictures.needs_size:
        found = sizes(medium, place, max_pixels=max_pixels, max_bytes=max_bytes)
    else:
        found = [(0, 0)] * len(medium.pictures)
    try:
        return pictures.expand(found, medium.times if medium.kind == "video" else None)
    except UserError as error:
        raise place.bad("malformed_row", str(error), "Change or remove the picture.") from error


def sizes(medium: Media, place: Place, *, max_pixels: int, max_bytes: int) -> list[Size]:
    """Height and width of each picture, or frame, from its header.

    Raises:
      BadRow (a DataError): a header that is damaged, or a picture that is too large.
    """
    limits = {"max_pixels": max_pixels, "max_bytes": max_bytes, "file": place.file, "row": place.row}
    return [image_size(data, **limits) for data in medium.pictures]


def pixels(
    media: Sequence[Media],
    expansions: Sequence[Expansion],
    pictures: Pictures,
    place: Place,
    *,
    tiles: int,
    canvas: tuple[int, int],
    max_pixels: int,
    max_bytes: int,
) -> np.ndarray:
    """uint8[M, Y, W, 3]: the tiles of all media in order, in the upper left corners of their canvases.

    What is not covered is zero, and no token and no patch points at it.
    """
    limits = {"max_pixels": max_pixels, "max_bytes": max_bytes, "file": place.file, "row": place.row}
    frames = ([decode_image(data, **limits) for data in medium.pictures] for medium in media)
    return pixels_of(frames, media, expansions, pictures, place, tiles=tiles, canvas=canvas)


def pixels_of(
    frames: Iterable[Sequence[Image.Image]],
    media: Sequence[Media],
    expansions: Sequence[Expansion],
    pictures: Pictures,
    place: Place,
    *,
    tiles: int,
    canvas: tuple[int, int],
) -> np.ndarray:
    """`pixels` of decoded pictures that stand for those of the media, and have their sizes."""
    out, slot = np.zeros((tiles, *canvas, 3), np.uint8), 0
    for shown, medium, planned in zip(frames, media, expansions, strict=True):
        made = pictures.pixels(shown, medium.times if medium.kind == "video" else None)
        if (len(made), *made.shape[1:3]) != (planned.tiles, *planned.canvas):
            raise AssertionError(f"{place.file}, row {place.row}: pixels {made.shape} of what was planned as {planned.tiles} x {planned.canvas}")
        out[slot : slot + len(made), : made.shape[1], : made.shape[2]] = made
        slot += len(made)
    return out


def feature_indices(expansions: Sequence[Expansion], traits: RowTraits) -> np.ndarray:
    """int32[n]: for each image token of a row, in order, the feature that lands on it."""
    out, first = [np.zeros(0, np.int32)], traits.first_feature
    for medium in expansions:
        out.append(np.where(medium.features < 0, 0, first + medium.features).astype(np.int32))
        first += medium.tiles * traits.tile_features if traits.tile_features else medium.slots // traits.merge
    return np.concatenate(out)


def patches(expansions: Sequence[Expansion], traits: RowTraits, *, slots: int, tiles: int, canvas: tuple[int, int]) -> Patches:
    """The patches of all media in order; slots behind them hold no patch."""
    index, place = np.full((slots, traits.patch_depth), -1, np.int32), np.zeros((slots, 2), np.int32)
    grid, segment = np.ones((slots, 2), np.int32), np.full(slots, -1, np.int32)
    extent = np.zeros((tiles, 2), np.int32)
    at = tile = pictures = 0
    rows, columns = (side // traits.patch_size for side in canvas)
    for medium in expansions:
        order = medium.grid.order()
        here, held = slice(at, at + len(order.segment)), order.segment >= 0
        cell = order.cell + [tile, 0, 0]
        index[here] = np.where(held[:, None], (cell[..., 0] * rows + cell[..., 1]) * columns + cell[..., 2], -1)
        place[here], grid[here] = np.maximum(order.place, 0), np.maximum(order.grid, 1)
        extent[tile : tile + medium.tiles] = medium.canvas
        segment[here] = np.where(held, order.segment + pictures, -1)
        at, tile, pictures = here.stop, tile + medium.tiles, pictures + int(order.segment.max(initial=-1)) + 1
    return Patches(index, place, grid, segment, extent)


def rotary_positions(is_image: np.ndarray, expansions: Sequence[Expansion]) -> np.ndarray:
    """int32[3, n]: time, row and column of each token of a prefix (M-RoPE, arXiv 2409.12191).

    Text counts on in all three; a run of image tokens counts from where it starts, and text goes on behind the largest of its numbers
    (section 2.1). transformers 5.23 agrees but for Qwen2.5-VL's videos whose last time is larger than their sides: there it counts the
    rest of the prompt on from the sides, among the times, and what it generates from behind the largest number.
    """
    out = np.zeros((3, len(is_image)), np.int32)
    turns = np.concatenate([np.zeros((3, 0), np.int32), *(medium.turns for medium in expansions)], axis=1)
    borders = np.flatnonzero(np.diff(is_image.astype(np.int8))) + 1
    position = taken = 0
    for run in np.split(np.arange(len(is_image)), borders):
        if not len(run):
            continue
        if is_image[run[0]]:
            out[:, run] = position + turns[:, taken : taken + len(run)]
            taken += len(run)
        else:
            out[:, run] = position + np.arange(len(run))
        position = int(out[:, run].max()) + 1
    return out
