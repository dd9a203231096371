"""How well texts go with pictures: the cosine of their vectors by a CLIP or SigLIP directory."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh
from jaxtyping import Float32, UInt8

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.errors import UserError
from mmalign_jax.hf.files import read_json
from mmalign_jax.hf.image_text_files import TextIds, names, read_sizes
from mmalign_jax.hf.import_ import load_tree
from mmalign_jax.hf.pictures import as_tiles, load_image_processor, normalisation
from mmalign_jax.models.image_text import ImageTextConfig, picture_vectors, text_vectors

# Rows and tokens of one pass, which it is compiled for. A tower that sees padding always takes all its positions.
_PICTURES, _TEXTS, _SHORT = (1, 8), (8, 64), 32

_BETWEEN = re.compile(r"(?<=\S)\s+(?=\S)")

_encode_pictures = functools.partial(jax.jit, static_argnums=0)(picture_vectors)
_encode_texts = functools.partial(jax.jit, static_argnums=0)(text_vectors)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTextEncoder:
    """Pictures and texts to vectors of length 1, on the first device of this process, whatever mesh is set where it is called.

    A vector is a function of its picture or text alone. A text is never cut: `pieces` cuts it where the caller can see it.
    """

    config: ImageTextConfig
    params: dict
    _ids: TextIds
    _images: Any
    _mesh: Mesh

    @classmethod
    def load(cls, directory: str | Path) -> "ImageTextEncoder":
        """Reads the encoder of a directory: `config.json`, safetensors, `tokenizer.json`, `tokenizer_config.json`, the image processor.

        Raises:
          UserError: it is not an image-text encoder of a kind that is known here, or its files do not fit each other.
          DataError: a file is damaged.
        """
        directory = Path(directory)
        values = read_json(directory / "config.json")
        config = read_sizes(values, ((0.0,) * 3, (1.0,) * 3), str(directory / "config.json"))
        images = load_image_processor(directory)
        mean, std = normalisation(images)
        config = dataclasses.replace(config, pixel_mean=mean, pixel_std=std)
        ids, mesh = TextIds.read(directory, config, values), mesh_lib.make_mesh(devices=jax.local_devices()[:1])
        with jax.set_mesh(mesh):
            encoder = cls(config, load_tree(directory, names(config)), ids, images, mesh)
        encoder._tile(PIL.Image.new("RGB", (3, 2)))  # a size that does not fit the model shows here and not in the first picture
        return encoder

    @property
    def max_tokens(self) -> int:
        """Longest text, in tokens with those at its ends."""
        return self.config.positions

    def fits(self, text: str) -> bool:
        return len(self._ids(text)) <= self.max_tokens

    def pieces(self, text: str) -> list[str]:
        """The text, without white space around it, where it fits; else its halves, and their halves, until all fit.

        It is cut at the white space that is nearest the middle; a word that does not fit is cut within.
        """
        text = text.strip()
        if self.fits(text):
            return [text]
        middle = len(text) // 2
        if middle == 0:
            raise UserError(f"the text {text!r} takes more than the {self.max_tokens} tokens of the image-text encoder, and is one character")
        spaces = [found.start() for found in _BETWEEN.finditer(text)]
        cut = min(spaces, key=lambda place: abs(place - middle), default=middle)
        return [piece for half in (text[:cut], text[cut:].lstrip()) for piece in self.pieces(half)]

    def pictures(self, pictures: Iterable[PIL.Image.Image]) -> Float32[np.ndarray, "n D"]:
        """A vector for each picture. They are taken a few at a time, so an iterator need not hold them all."""
        out = [np.zeros((0, self.config.width), np.float32)]
        waiting = iter(pictures)
        while tiles := [self._tile(picture) for picture in itertools.islice(waiting, _PICTURES[-1])]:
            rows = next(count for count in _PICTURES if count >= len(tiles))
            filled = np.stack([*tiles, *[np.zeros_like(tiles[0])] * (rows - len(tiles))])
            with jax.set_mesh(self._mesh):
                out.append(np.asarray(_encode_pictures(self.config, self.params, filled))[: len(tiles)])
        return np.concatenate(out)

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n D"]:
        """A vector for each text.

        Raises:
          UserError: a text is longer than `max_tokens`.
        """
        ids = [self._ids(text) for text in texts]
        for text, found in zip(texts, ids, strict=True):
            if len(found) > self.max_tokens:
                raise UserError(f"a text takes {len(found)} tokens, the image-text encoder has positions for {self.max_tokens}: {text[:80]!r}")
        out = np.zeros((len(texts), self.config.width), np.float32)
        order = sorted(range(len(texts)), key=lambda index: len(ids[index]))  # texts of like length pass together
        rows = next((count for count in _TEXTS if count >= len(order)), _TEXTS[-1])
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            short = self.config.text.causal and len(ids[chosen[-1]]) <= _SHORT
            slots = min(_SHORT, self.max_tokens) if short else self.max_tokens
            tokens, last = np.full((rows, slots), self._ids.pad_id, np.int32), np.full(rows, slots - 1, np.int32)
            for row, index in enumerate(chosen):
                tokens[row, : len(ids[index])] = ids[index]
                if self.config.text.causal:
                    last[row] = len(ids[index]) - 1
            with jax.set_mesh(self._mesh):
                out[chosen] = np.asarray(_encode_texts(self.config, self.params, tokens, last))[: len(chosen)]
        return out

    def similarity(self, pictures: Sequence[PIL.Image.Image], texts: Sequence[str]) -> Float32[np.ndarray, " n"]:
        """The cosine of each picture with the text of its place. A picture or text that comes again is encoded once.

        Raises:
          UserError: a text is longer than `max_tokens`.
        """
        if len(pictures) != len(texts):
            raise ValueError(f"{len(pictures)} pictures for {len(texts)} texts")
        shown = {id(picture): picture for picture in pictures}
        said = list(dict.fromkeys(texts))
        picture_place, text_place = {key: n for n, key in enumerate(shown)}, {text: n for n, text in enumerate(said)}
        of_pictures = self.pictures(shown.values())[[picture_place[id(picture)] for picture in pictures]]
        of_texts = self.texts(said)[[text_place[text] for text in texts]]
        return np.sum(of_pictures * of_texts, axis=-1)

    def _tile(self, picture: PIL.Image.Image) -> UInt8[np.ndarray, "Y W 3"]:
        made = self._images.preprocess(picture, do_convert_rgb=True, do_rescale=False, do_normalize=False)
        return as_tiles(made, (self.config.vision.image_size,) * 2)[0]
