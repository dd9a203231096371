"""How alike two answers are: the measures of BDHS's acceptance test."""

from collections.abc import Callable, Sequence

import numpy as np

from mmalign_jax.config import PairsConfig
from mmalign_jax.hf.text_encoder import TextEncoder
from mmalign_jax.pairs.ngrams import ngram_cosine

Measure = Callable[[Sequence[tuple[str, str]]], list[float]]  # a number for each pair of texts, 1 for the same text


def measure_of(config: PairsConfig) -> Measure:
    """The measure that `config.similarity` names, with the encoder of `config.encoder` where it takes one.

    Raises:
      UserError, DataError: see `TextEncoder.load`.
    """
    if config.similarity == "encoder":
        return EncoderCosine(TextEncoder.load(config.encoder))
    return lambda pairs: [ngram_cosine(a, b) for a, b in pairs]


class EncoderCosine:
    """Cosine of two texts' vectors, the paper's phi (arXiv 2407.02477 takes all-mpnet-base-v2)."""

    def __init__(self, encoder: TextEncoder):
        self._encoder = encoder

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        vectors = dict(zip(texts, self._encoder(texts), strict=True))
        return [float(np.dot(vectors[a], vectors[b])) for a, b in pairs]
