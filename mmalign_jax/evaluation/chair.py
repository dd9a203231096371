"""CHAIR: which objects a caption names that the image does not show (Rohrbach et al. 2018, arXiv 1809.02156).

  CHAIR_i = hallucinated mentions / mentions, an object that is named twice counts twice
  CHAIR_s = captions with a hallucinated mention / captions
  recall  = objects named and shown / objects shown, each once an image

Mentions are found by a table kind -> terms that the user supplies (`mentions`); the score depends on it as much as on the captions.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from mmalign_jax.evaluation.interval import Values, ratio
from mmalign_jax.mentions import Mentions, Synonyms

# columns of `count`
_WRONG, _MENTIONS, _HAS_WRONG, _CAPTIONS, _CORRECT, _TRUE, _WORDS = range(7)


@dataclasses.dataclass(frozen=True)
class ChairScores:
    """Fractions, words a caption, and what they were counted over. A fraction of nothing is 0: without mentions, CHAIR_i is 0."""

    chair_i: float
    chair_s: float
    recall: float
    mean_words: float
    captions: int
    mentions: int
    hallucinated_mentions: int


def count(captions: Sequence[str], truths: Sequence[Collection[str]], mentions: Mentions) -> np.ndarray:
    """What each caption adds to the sums, `[captions, 7]`; `measures` makes scores of it.

    Args:
      captions: one text an image; an empty one mentions nothing and counts as a caption.
      truths: what each image shows, by any term of the table.
      mentions: the table.

    Raises:
      UserError: an object of a truth is not in the table.
    """
    rows = []
    for caption, truth in zip(captions, truths, strict=True):
        shown = {mentions.kind(name) for name in truth}
        named = [mention.kind for mention in mentions(caption)]
        wrong = sum(kind not in shown for kind in named)
        rows.append((wrong, len(named), wrong > 0, 1, len(shown & set(named)), len(shown), len(caption.split())))
    return np.asarray(rows, np.int64).reshape(-1, 7)


def measures(counts: np.ndarray) -> dict[str, Values]:
    """Sums of `count`'s rows `[*b, 7]` -> the four measures, `[*b]` each."""
    part = lambda column: counts[..., column]  # noqa: E731
    return {
        "chair_i": ratio(part(_WRONG), part(_MENTIONS)),
        "chair_s": ratio(part(_HAS_WRONG), part(_CAPTIONS)),
        "recall": ratio(part(_CORRECT), part(_TRUE)),
        "mean_words": ratio(part(_WORDS), part(_CAPTIONS)),
    }


def score(captions: Sequence[str], truths: Sequence[Collection[str]], synonyms: Synonyms) -> ChairScores:
    """CHAIR of captions, one an image. Raises UserError as `Mentions` and `count` do."""
    return summarise(count(captions, truths, Mentions(synonyms)))


def summarise(counts: np.ndarray) -> ChairScores:
    """The scores of `count`'s rows."""
    total = counts.sum(axis=0)
    values = {name: float(value) for name, value in measures(total).items()}
    return ChairScores(**values, captions=len(counts), mentions=int(total[_MENTIONS]), hallucinated_mentions=int(total[_WRONG]))


def hallucinated(caption: str, truth: Collection[str], synonyms: Synonyms) -> tuple[str, ...]:
    """The words of a caption, as they are written there, that name what the image does not show; each once."""
    mentions = Mentions(synonyms)
    shown = {mentions.kind(name) for name in truth}
    return tuple(dict.fromkeys(caption[m.start : m.stop] for m in mentions(caption) if m.kind not in shown))
