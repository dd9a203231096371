"""Which things a text names: the table kind -> terms that CHAIR and rules of truth look up.

Where the original of CHAIR makes every word of a caption singular, here every term of the table gets its plural, which leaves "glass" and
"bus" alone. Its hand-written exceptions are terms, too: with "baby bird" under bird, "baby" under person and "toilet seat" under toilet the
longer term wins.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign_jax.errors import UserError

Synonyms = Mapping[str, Sequence[str]]

_WORD = re.compile(r"[^\W_]+")
_IRREGULAR = {"child": "children", "foot": "feet", "goose": "geese", "mouse": "mice", "ox": "oxen", "person": "people", "tooth": "teeth"}


@dataclasses.dataclass(frozen=True)
class Mention:
    """A place in a text that names an object: `text[start:stop]`."""

    kind: str
    start: int
    stop: int


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
        self._plurals: set[tuple[str, ...]] = set()
        for words, kind in tuple(self._kinds.items()):
            for plural in _plurals(words[-1]):
                self._plurals.add((*words[:-1], plural))
                self._kinds.setdefault((*words[:-1], plural), kind)  # what the table says itself stands above a rule
        self.kinds, self._synonyms = tuple(synonyms), synonyms
        self._lists_plurals = any(_words(term) in self._plurals for terms in synonyms.values() for term in terms)
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

    def name(self, kind: str, like: str) -> str:
        """What a text may call the kind in the place of `like`, which names another one: its name, in the plural where `like` is one.

        A table that lists plurals is taken at its word: a kind of it without one ("fish") has none.
        """
        if _words(like) not in self._plurals:
            return kind
        if self._lists_plurals:
            return next((term for term in self._synonyms[kind] if _words(term) in self._plurals), kind)
        last = kind.split()[-1]
        return kind[: len(kind) - len(last)] + _plurals(last)[0]

    def kind(self, name: str) -> str:
        """The kind that a truth's object name stands for.

        Raises:
          UserError: the table does not know the name.
        """
        if (kind := self._kinds.get(_words(name))) is None:
            raise UserError(f"synonyms: the object {name!r} is in no row of the table; add it")
        return kind


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


def read_synonyms(file: Path) -> dict[str, tuple[str, ...]]:
    """A table from a JSON file: kind -> list of terms.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise UserError(f'{file}: no such file; give a JSON object such as {{"cat": ["kitten", "tabby"]}}')
    try:
        table = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(table, dict) or not all(isinstance(terms, list) and all(isinstance(term, str) for term in terms) for terms in table.values()):
        raise UserError(f'{file}: not a table of synonyms; write a JSON object such as {{"cat": ["kitten", "tabby"]}}')
    return {kind: tuple(terms) for kind, terms in table.items()}
