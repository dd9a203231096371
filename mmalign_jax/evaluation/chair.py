"""CHAIR: which objects a caption names that the image does not show (Rohrbach et al. 2018, arXiv 1809.02156).

  CHAIR_i = hallucinated mentions / mentions, an object that is named twice counts twice
  CHAIR_s = captions with a hallucinated mention / captions
  recall  = objects named and shown / objects shown, each once an image

Mentions are found by a table kind -> terms that the user supplies; the score depends on it as much as on the captions. Where the
original makes every word of a caption singular, here every term of the table gets its plural, which leaves "glass" and "bus" alone.
Its hand-written exceptions are terms, too: with "baby bird" under bird, "baby" under person and "toilet seat" under toilet the longer
term wins.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mmalign_jax.errors import UserError
from mmalign_jax.evaluation.interval import Values, ratio

Synonyms = Mapping[str, Sequence[str]]

_WORD = re.compile(r"[^\W_]+")
_IRREGULAR = {"child": "children", "foot": "feet", "goose": "geese", "mouse": "mice", "ox": "oxen", "person": "people", "tooth": "teeth"}

# columns of `count`
_WRONG, _MENTIONS, _HAS_WRONG, _CAPTIONS, _CORRECT, _TRUE, _WORDS = range(7)


@dataclasses.dataclass(frozen=True)
class Mention:
    """A place in a text that names an object: `text[start:stop]`."""

    kind: str
    start: int
    stop: int


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


class Mentions:
    """Finds the mentions of a table's kinds in texts.

    Case, punctuation and hyphens do not matter. Terms may have several words; at every word the longest term wins, and its words
    are not looked at again. A kind's own name is a term of it.

    Raises:
      UserError: a term belongs to two kinds, or has no word in it.
    """

    def __init__(self, synonyms: Synonyms):
        self._kinds: dict[tuple[str, ...], str] = {}
        for kind, terms in synonyms.items():
            for term in (kind, *terms):
                words = _words(term)
                if not words:
                    raise UserError(f"synonyms: {kind!r} has the term {term!r}, which has no word in it")
                if (other := self._kinds.setdefault(words, kind)) != kind:
                    raise UserError(f"synonyms: {term!r} is a term of {other!r} and of {kind!r}; leave it with one of them")
        for words, kind in tuple(self._kinds.items()):
            for plural in _plurals(words[-1]):
                self._kinds.setdefault((*words[:-1], plural), kind)  # what the table says itself stands above a rule
        self._longest = max(map(len, self._kinds), default=0)

    def __call__(self, text: str) -> tuple[Mention, ...]:
        """The mentions in their order."""
        found = list(_WORD.finditer(text))
        words = [match[0].lower() for match in found]
        out, at = [], 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                if kind := self._kinds.get(tuple(words[at : at + length])):
                    out.append(Mention(kind, found[at].start(), found[at + length - 1].end()))
                    at += length
                    break
            else:
                at += 1
        return tuple(out)

    def kind(self, name: str) -> str:
        """The kind that a truth's object name stands for.

        Raises:
          UserError: the table does not know the name.
        """
        if (kind := self._kinds.get(_words(name))) is None:
            raise UserError(f"synonyms: the object {name!r} is in no row of the table; add it")
        return kind


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


def _words(term: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(term.lower()))


def _plurals(word: str) -> tuple[str, ...]:
    """Regular plurals, with a form too many where the spelling does not decide ("roofs", "rooves")."""
    if word in _IRREGULAR:
        return (_IRREGULAR[word], word + "s")
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (word + "es",)
    if re.search(r"[^aeiou]y$", word):
        return (word[:-1] + "ies",)
    extra = []
    if word.endswith("o"):
        extra.append(word + "es")
    if word.endswith("man"):
        extra.append(word[:-2] + "en")
    if re.search(r"[^f]fe?$", word):
        extra.append(re.sub(r"fe?$", "ves", word))
    return (word + "s", *extra)
