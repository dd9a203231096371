"""How well answers go with the pictures of their record, by an image-text encoder: what CLIP-DPO ranks answers by (arXiv 2408.10433)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Float

from mmalign_jax.config import DataConfig
from mmalign_jax.data.bad_rows import Place, place_of
from mmalign_jax.data.images import decode_image
from mmalign_jax.errors import UserError
from mmalign_jax.hf.image_text import ImageTextEncoder
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.types import PreferenceRecord


class ClipScorer:
    """The score of an answer is the mean over its sentences of the cosine with the record's picture: encoders take short texts only.

    With several pictures in the prompt (the frames of a video among them) the cosine is the mean over them. A sentence that is longer than
    the encoder's positions is cut at words, and counts as the mean of its pieces. A score is a function of the record's pictures and of the
    answer's text alone.
    """

    def __init__(self, encoder: ImageTextEncoder, *, limits: DataConfig | None = None):
        """
        Args:
          limits: the bounds on images are read of it.
        """
        limits = limits or DataConfig()
        self.encoder = encoder
        self._limits = {"max_pixels": limits.max_image_pixels, "max_bytes": limits.max_image_bytes}

    @classmethod
    def read(cls, directory: str | Path, *, limits: DataConfig | None = None) -> "ClipScorer":
        """The scorer of a CLIP or SigLIP directory.

        Raises:
          UserError, DataError: see `ImageTextEncoder.load`.
        """
        return cls(ImageTextEncoder.load(directory), limits=limits)

    def check(self, record: PreferenceRecord) -> None:
        """Raises UserError where a record's prompt shows no picture."""
        if not _shown(record):
            raise UserError(f"record {record.id}: its prompt shows no picture, so no answer to it has a similarity with one")

    def scores(self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """The scores of each record's answers, in order, between -1 and 1. Responses of the records are not read.

        Args:
          answers: any number of texts a record, none included.

        Raises:
          UserError: a record whose prompt shows no picture.
          BadRow (a DataError): a picture that cannot be decoded within the limits.
        """
        if len(records) != len(answers):
            raise ValueError(f"{len(records)} records, and answers for {len(answers)}")
        asked = [(record, texts) for record, texts in zip(records, answers, strict=True) if len(texts)]
        first: dict[bytes, Place] = {}
        for record, _ in asked:
            self.check(record)
            for picture in _shown(record):
                first.setdefault(picture, place_of(record))
        of_pictures = dict(zip(first, self.encoder.pictures(self._decoded(first)), strict=True))
        cut = {text: self._sentences(text) for _, texts in asked for text in texts}
        pieces = list(dict.fromkeys(piece for sentences in cut.values() for sentence in sentences for piece in sentence))
        of_pieces = dict(zip(pieces, self.encoder.texts(pieces), strict=True))
        of_texts = {text: _mean([_mean([of_pieces[piece] for piece in sentence]) for sentence in cut[text]]) for text in cut}
        out: list[list[float]] = []
        for record, texts in zip(records, answers, strict=True):
            # a mean of cosines is the product of the means of the vectors
            shown = _mean([of_pictures[picture] for picture in _shown(record)]) if len(texts) else 0.0
            out.append([float(shown @ of_texts[text]) for text in texts])
        return out

    def _sentences(self, text: str) -> list[list[str]]:
        """The sentences of an answer, each as pieces that the encoder takes. An answer without any is the empty text."""
        spans = split_sentences(text) or [(0, 0)]
        return [self.encoder.pieces(text[start:end]) for start, end in spans]

    def _decoded(self, pictures: Mapping[bytes, Place]) -> Iterator[PIL.Image.Image]:
        for data, place in pictures.items():
            yield decode_image(data, file=place.file, row=place.row, **self._limits)


def _shown(record: PreferenceRecord) -> list[bytes]:
    """The encoded pictures that the prompt shows, in order."""
    media = [part.media for turn in record.turns for part in turn.parts if part.media is not None]
    return [picture for index in media for picture in record.media[index].pictures]


def _mean(vectors: Sequence[Float[np.ndarray, " D"]]) -> Float[np.ndarray, " D"]:
    return np.mean(np.asarray(vectors, np.float64), axis=0)
