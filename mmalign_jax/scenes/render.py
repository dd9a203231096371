"""From a scene to pixels: every kind has its own shape, drawn with small shifts, sizes and shades on a noisy light ground."""

import functools
import io
import math

import numpy as np
from PIL import Image, ImageDraw

from mmalign_jax.scenes.world import CELL, COLORS, GRID, SIZE, Scene

_FINE = 4  # shapes are drawn this many times larger, then averaged down
_SHRINK = (0.82, 1.0)
_SHIFT = 1.0  # pixels, each way
_SHADE = 18.0  # grey levels, each way
_GROUND = (218.0, 244.0)
_NOISE = 4.0  # grey levels, standard deviation


def _ring(points: int, outer: float, inner: float) -> tuple[tuple[float, float], ...]:
    turns = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    radii = [outer if i % 2 == 0 else inner for i in range(2 * points)]
    return tuple((0.5 + r * math.cos(t), 0.5 + r * math.sin(t)) for r, t in zip(radii, turns, strict=True))


# Shapes in the unit square, y down: (draw or cut, ellipse/box/polygon/line, points). Cut removes what is drawn before it.
_SHAPES = {
    "cup": (("draw", "ellipse", ((0.55, 0.3), (0.98, 0.75))), ("cut", "ellipse", ((0.66, 0.42), (0.87, 0.64))),
            ("draw", "polygon", ((0.08, 0.2), (0.76, 0.2), (0.66, 0.92), (0.18, 0.92)))),
    "spoon": (("draw", "ellipse", ((0.55, 0.04), (0.96, 0.45))), ("draw", "line", ((0.66, 0.34), (0.08, 0.92)))),
    "tree": (("draw", "polygon", ((0.5, 0.02), (0.92, 0.68), (0.08, 0.68))), ("draw", "box", ((0.4, 0.66), (0.6, 0.98)))),
    "bird": (("draw", "polygon", ((0.0, 0.2), (0.5, 0.5), (1.0, 0.2), (0.5, 0.82))), ("draw", "ellipse", ((0.38, 0.28), (0.62, 0.52)))),
    "boat": (("draw", "polygon", ((0.02, 0.62), (0.98, 0.62), (0.78, 0.94), (0.22, 0.94))),
             ("draw", "polygon", ((0.52, 0.04), (0.86, 0.54), (0.52, 0.54))), ("draw", "box", ((0.42, 0.04), (0.48, 0.62)))),
    "fish": (("draw", "ellipse", ((0.02, 0.26), (0.72, 0.76))), ("draw", "polygon", ((0.6, 0.5), (0.98, 0.2), (0.98, 0.82))),
             ("cut", "ellipse", ((0.14, 0.38), (0.28, 0.52)))),
    "table": (("draw", "box", ((0.02, 0.26), (0.98, 0.46))), ("draw", "box", ((0.1, 0.46), (0.26, 0.94))),
              ("draw", "box", ((0.74, 0.46), (0.9, 0.94)))),
    "chair": (("draw", "box", ((0.2, 0.04), (0.36, 0.96))), ("draw", "box", ((0.2, 0.5), (0.8, 0.66))),
              ("draw", "box", ((0.64, 0.5), (0.8, 0.96)))),
    "moon": (("draw", "ellipse", ((0.06, 0.06), (0.94, 0.94))), ("cut", "ellipse", ((0.38, 0.0), (1.1, 0.82)))),
    "star": (("draw", "polygon", _ring(5, 0.5, 0.2)),),
    "house": (("draw", "polygon", ((0.5, 0.04), (0.98, 0.44), (0.02, 0.44))), ("draw", "box", ((0.12, 0.44), (0.88, 0.96))),
              ("cut", "box", ((0.4, 0.6), (0.62, 0.98)))),
    "flower": tuple(("draw", "ellipse", ((0.5 + 0.27 * math.cos(t) - 0.2, 0.5 + 0.27 * math.sin(t) - 0.2),
                                         (0.5 + 0.27 * math.cos(t) + 0.2, 0.5 + 0.27 * math.sin(t) + 0.2)))
                    for t in (math.tau * i / 5 - math.pi / 2 for i in range(5))) + (("cut", "ellipse", ((0.36, 0.36), (0.64, 0.64))),),
    "cat": (("draw", "ellipse", ((0.1, 0.24), (0.9, 0.96))), ("draw", "polygon", ((0.1, 0.02), (0.46, 0.34), (0.14, 0.56))),
            ("draw", "polygon", ((0.9, 0.02), (0.54, 0.34), (0.86, 0.56))), ("cut", "ellipse", ((0.26, 0.44), (0.42, 0.6))),
            ("cut", "ellipse", ((0.58, 0.44), (0.74, 0.6)))),
    "ball": (("draw", "ellipse", ((0.06, 0.06), (0.94, 0.94))),),
    "lamp": (("draw", "polygon", ((0.32, 0.04), (0.68, 0.04), (0.92, 0.48), (0.08, 0.48))), ("draw", "box", ((0.45, 0.48), (0.55, 0.86))),
             ("draw", "box", ((0.22, 0.84), (0.78, 0.96)))),
    "clock": (("draw", "ellipse", ((0.03, 0.03), (0.97, 0.97))), ("cut", "ellipse", ((0.18, 0.18), (0.82, 0.82))),
              ("draw", "line", ((0.5, 0.22), (0.5, 0.54))), ("draw", "line", ((0.46, 0.52), (0.72, 0.52)))),
    "hat": (("draw", "box", ((0.24, 0.1), (0.76, 0.74))), ("draw", "box", ((0.0, 0.7), (1.0, 0.9))),
            ("cut", "box", ((0.24, 0.5), (0.76, 0.6)))),
    "key": (("draw", "ellipse", ((0.02, 0.28), (0.46, 0.72))), ("cut", "ellipse", ((0.14, 0.4), (0.34, 0.6))),
            ("draw", "box", ((0.44, 0.43), (0.98, 0.57))),
            ("draw", "box", ((0.68, 0.5), (0.78, 0.78))), ("draw", "box", ((0.88, 0.5), (0.98, 0.78)))),
}  # fmt: skip
_LINE = 0.13  # width of a line in the unit square


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene: uint8 `[64, 64, 3]`."""
    pixels = np.full((SIZE, SIZE, 3), rng.uniform(*_GROUND), dtype=np.float64)
    for thing in scene.objects:
        for cell in thing.cells:
            size = rng.uniform(*_SHRINK)
            shift_x, shift_y = rng.uniform(-_SHIFT, _SHIFT, size=2) / CELL
            color = np.asarray(COLORS[thing.color]) + rng.uniform(-_SHADE, _SHADE)
            coverage = _coverage(thing.kind, size, shift_x, shift_y)[..., None]
            row, column = divmod(cell, GRID)
            patch = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            patch[:] = coverage * color + (1.0 - coverage) * patch
    pixels += rng.normal(0.0, _NOISE, size=pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=1)
    return out.getvalue()


def _coverage(kind: str, size: float, shift_x: float, shift_y: float) -> np.ndarray:
    """How much of each pixel of a cell the shape covers, `[16, 16]` in 0..1; what leaves the cell is cut off."""
    side = CELL * _FINE
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    place = functools.partial(_to_canvas, side=side, size=size, shift_x=shift_x, shift_y=shift_y)
    for action, form, points in _SHAPES[kind]:
        ink, spots = (255 if action == "draw" else 0), [place(x, y) for x, y in points]
        if form == "ellipse":
            draw.ellipse(spots, fill=ink)
        elif form == "box":
            draw.rectangle(spots, fill=ink)
        elif form == "polygon":
            draw.polygon(spots, fill=ink)
        else:
            draw.line(spots, fill=ink, width=round(_LINE * size * side))
    fine = np.asarray(canvas, dtype=np.float64) / 255.0
    return fine.reshape(CELL, _FINE, CELL, _FINE).mean(axis=(1, 3))


def _to_canvas(x: float, y: float, *, side: int, size: float, shift_x: float, shift_y: float) -> tuple[float, float]:
    return side * (0.5 + (x - 0.5) * size + shift_x), side * (0.5 + (y - 0.5) * size + shift_y)
