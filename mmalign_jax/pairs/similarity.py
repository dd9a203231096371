"""How alike two answers are: the measures of BDHS's acceptance test."""

import collections
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from mmalign_jax.config import PairsConfig
from mmalign_jax.hf.text_encoder import TextEncoder

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


def ngram_cosine(a: str, b: str) -> float:
    """Cosine of the counts of words and word pairs, case and punctuation aside: 1 for the same words in the same order, 0 for none shared.

    Unlike a sentence encoder it has no notion of meaning, and one changed word in a short answer already counts: with it, "similarity
    below 0.97" means "some word differs" for answers of up to 33 different words, and "a word inside differs" for up to 50.
    """
    left, right = _counts(a), _counts(b)
    if not left or not right:
        return 1.0 if left == right else 0.0
    dot = sum(count * right[gram] for gram, count in left.items())
    return dot / math.sqrt(sum(c * c for c in left.values()) * sum(c * c for c in right.values()))


def _counts(text: str) -> collections.Counter:
    words = re.findall(r"\w+", text.lower())
    return collections.Counter(words) + collections.Counter(zip(words, words[1:], strict=False))
