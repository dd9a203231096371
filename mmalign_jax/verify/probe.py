"""What both sides are asked: two unlike synthetic pictures, words without a picture, and one fixed answer to each."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float32, Int32, UInt8

from mmalign_jax.types import Media, Part, PreferenceRecord, Response, Turn

NEW_TOKENS = 32

# Plain words, which the closed vocabulary of the built-in world has, too.
_DESCRIBE, _ASK = "Describe the picture.", "Is there a cup in the picture?"
_SEEN, _NONE = "At the top left there is a red cup.", "No, there is no cup."


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """What one side says about one record with a prompt of n tokens and an answer of m.

    Args:
      ids: the prompt, pictures expanded.
      levels: its pictures as the tower gets them, in grey levels (not rounded): tiles, or patches in any order.
      logits: behind every token of the prompt, and of the answer but the last.
      logps: of the answer's tokens, in nats.
      greedy: what follows the prompt, `NEW_TOKENS` or up to the first end token.
      gaps: how far the runner-up's logit was behind at each of them; only transformers' side has it.
    """

    ids: Int32[np.ndarray, " n"]
    levels: Float32[np.ndarray, "k Y W 3"] | Float32[np.ndarray, "k C Y W 3"]
    logits: Float32[np.ndarray, "t V"]
    logps: Float32[np.ndarray, " m"]
    greedy: tuple[int, ...]
    gaps: tuple[float, ...] = ()

    @property
    def grey_levels(self) -> np.ndarray:
        """`levels` in whole numbers; patches flat and in an order of their own, because towers with windows have another than processors."""
        whole = np.rint(self.levels).astype(np.int32)
        if whole.ndim < 5:
            return whole
        flat = whole.reshape(len(whole), -1)
        return flat[np.lexsort(flat.T[::-1])]


def pictures() -> tuple[UInt8[np.ndarray, "Y1 W1 3"], UInt8[np.ndarray, "Y2 W2 3"]]:
    """A tall gradient, and a wide chequerboard under noise: no two places are alike, and turning or mirroring either is seen."""
    down, across = np.mgrid[0:200, 0:120]
    gradient = np.stack([down * 255 // 199, across * 255 // 119, (down + 2 * across) % 256], axis=-1)
    down, across = np.mgrid[0:90, 0:220]
    board = ((down // 15 + across // 20) % 2)[..., None] * np.array([150, 60, 110]) + across[..., None] // 4
    noise = np.random.default_rng(0).integers(0, 50, board.shape)
    return gradient.astype(np.uint8), (board + noise).astype(np.uint8)


def records() -> dict[str, PreferenceRecord]:
    """Every record that may be asked, by name. `two pictures` stands for the two others where a model takes several in one row."""
    media = tuple(Media("image", _png(picture)) for picture in pictures())
    return {
        "two pictures": _record("two pictures", media, _DESCRIBE, _SEEN),
        "first picture": _record("first picture", media[:1], _DESCRIBE, _SEEN),
        "second picture": _record("second picture", media[1:], _ASK, _NONE),
        "text": _record("text", (), _ASK, _NONE),
    }


def _record(name: str, media: Sequence[Media], prompt: str, answer: str) -> PreferenceRecord:
    parts = (*(Part(media=index) for index in range(len(media))), Part(text=prompt))
    return PreferenceRecord(name, tuple(media), (Turn("user", parts),), (Response(answer),))


def _png(picture: UInt8[np.ndarray, "Y W 3"]) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()
