"""What an answer is worth. Scorers by name, added up: `("objects", "yes_no", "missing_end(-1)")`.

Every one has a weight as its first argument.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence

from mmalign_jax.errors import UserError
from mmalign_jax.mentions import Mentions
from mmalign_jax.pairs.calls import Number, Table, Value
from mmalign_jax.pairs.selectors import Candidate
from mmalign_jax.types import PreferenceRecord


@dataclasses.dataclass(frozen=True)
class Truth:
    """What rules look answers up in.

    Args:
      mentions: which things a text names; None where no table is at hand.
      max_tokens: most tokens of an answer.
    """

    mentions: Mentions | None = None
    max_tokens: int = 0


Score = Callable[..., float]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A kind of scorer that is a rule: `(record, candidate, truth, **arguments) -> score`.

    Args:
      arguments: the first is its weight.
      knows: the records of which it says what is true; others are not scored by it. None: it looks at the form of answers to all.
    """

    name: str
    function: Score
    arguments: tuple[Number, ...]
    knows: Callable[[PreferenceRecord], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """The weighted sum of an answer's scores, and each of them by the scorer's name, unweighted."""

    total: float
    parts: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Scorers:
    """Scorers with their weights and arguments; made by `parse`."""

    rules: tuple[tuple[str, float, Mapping[str, Value]], ...]
    truth: Truth

    def __call__(self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[Candidate]]) -> list[list[Scored]]:
        """What each of the answers to each record is worth; `check` has found nothing wrong with the records."""
        return [[self._score(record, one) for one in each] for record, each in zip(records, answers, strict=True)]

    def _score(self, record: PreferenceRecord, answer: Candidate) -> Scored:
        total, parts = 0.0, {}
        for name, weight, arguments in self.rules:
            rule = _RULES[name]
            if rule.knows is None or rule.knows(record):
                parts[name] = rule.function(record, answer, self.truth, **arguments)
                total += weight * parts[name]
        return Scored(total, parts)

    def check(self, record: PreferenceRecord) -> None:
        """Raises UserError where none of the scorers says what is true of a record, or one cannot read what the record says."""
        known = [name for name, _, _ in self.rules if _RULES[name].knows is not None and _RULES[name].knows(record)]
        if not known:
            raise UserError(f"config.samples.scorers: none of {', '.join(name for name, _, _ in self.rules)} says what is true of record {record.id}")
        if "objects" in known:
            try:
                _shown(record, self.truth)
            except UserError as error:
                raise UserError(f"record {record.id}: {error}") from error


def parse(texts: Sequence[str], truth: Truth, where: str = "config.samples.scorers") -> Scorers:
    """Reads scorers, such as ("objects", "missing_end(-8)").

    Raises:
      UserError: there is none, one comes twice, or see `calls.Table.read`.
    """
    if not texts:
        raise UserError(f"{where}: answers that are samples need a scorer. Known: {', '.join(names())}")
    rules: dict[str, tuple[str, float, Mapping[str, Value]]] = {}
    for text in texts:
        name, values = _TABLE.read(text, where)
        if name in rules:
            raise UserError(f"{where}: {name} comes twice")
        weight = values.pop("weight")
        rules[name] = (name, float(weight), values)
    if "objects" in rules and truth.mentions is None:
        raise UserError("config.samples.synonyms: the scorer objects looks words up in a table; give a JSON file: kind -> words that name it")
    return Scorers(tuple(rules.values()), truth)


def names() -> tuple[str, ...]:
    return tuple(_RULES)


def summary(name: str) -> str:
    """The first line of a scorer's description."""
    return (inspect.getdoc(_RULES[name].function) or "").splitlines()[0]


def _reference(record: PreferenceRecord) -> str:
    return record.responses[record.prefs[0].win if record.prefs else 0].text if record.responses else ""


def _first_word(text: str) -> str:
    words = "".join(char if char.isalnum() else " " for char in text.lower()).split()
    return words[0] if words else ""


def _asks_yes_no(record: PreferenceRecord) -> bool:
    return _first_word(_reference(record)) in ("yes", "no")


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!?").rstrip()


def exact(record: PreferenceRecord, answer: Candidate, truth: Truth) -> float:
    """1 for the reference, however it is cased and spaced, with a full stop or without; else 0."""
    return float(_plain(answer.text) == _plain(_reference(record)))


def yes_no(record: PreferenceRecord, answer: Candidate, truth: Truth) -> float:
    """1 where the answer begins with the reference's yes or no; else 0."""
    return float(_first_word(answer.text) == _first_word(_reference(record)))


def objects(record: PreferenceRecord, answer: Candidate, truth: Truth, wrong: float) -> float:
    """(things named that are there - `wrong` times mentions of things that are not) / things there: recall less hallucination.

    What is there is the record's `meta["objects"]`: names, or mappings with a `kind`.
    """
    there = _shown(record, truth)
    named = [mention.kind for mention in truth.mentions(answer.text)]
    return (len(there & set(named)) - wrong * sum(kind not in there for kind in named)) / max(len(there), 1)


def _shown(record: PreferenceRecord, truth: Truth) -> set[str]:
    """The kinds of `meta["objects"]`.

    Raises:
      UserError: it is of another form, or names what the table does not know.
    """
    listed = record.meta["objects"]
    names = [one.get("kind") if isinstance(one, Mapping) else one for one in listed] if isinstance(listed, (list, tuple)) else [None]
    if not all(isinstance(name, str) for name in names):
        raise UserError('meta["objects"] is a list of names, or of mappings with a "kind"')
    return {truth.mentions.kind(name) for name in names}


def length(record: PreferenceRecord, answer: Candidate, truth: Truth) -> float:
    """How much of the tokens that there are an answer takes (Fact-RLHF, arXiv 2309.14525, takes 10 of it off)."""
    return answer.tokens / truth.max_tokens


def missing_end(record: PreferenceRecord, answer: Candidate, truth: Truth) -> float:
    """1 for an answer that ran out of tokens; else 0."""
    return float(not answer.finished)


def overlong(record: PreferenceRecord, answer: Candidate, truth: Truth, buffer: int) -> float:
    """0, and in the last `buffer` tokens before the limit linearly down to -1 (DAPO, arXiv 2503.14476, equation 13)."""
    return min(0.0, max(-1.0, (truth.max_tokens - buffer - answer.tokens) / buffer))


def _has_objects(record: PreferenceRecord) -> bool:
    """Lists what a picture shows, and asks for more than a yes or no, whose answer may name what is not there."""
    return "objects" in record.meta and not _asks_yes_no(record)


def _weight(usual: float) -> Number:
    return Number("weight", usual, low=-1e6, high=1e6)


_RULES = {
    rule.name: rule
    for rule in (
        Rule("exact", exact, (_weight(1.0),), lambda record: bool(_reference(record))),
        Rule("yes_no", yes_no, (_weight(1.0),), _asks_yes_no),
        Rule("objects", objects, (_weight(1.0), Number("wrong", 1.0, low=0.0, high=1e6)), _has_objects),
        Rule("length", length, (_weight(-1.0),)),
        Rule("missing_end", missing_end, (_weight(-1.0),)),
        Rule("overlong", overlong, (_weight(1.0), Number("buffer", 32, low=1, high=1_000_000))),
    )
}
_TABLE = Table("scorer", _RULES, "objects or missing_end(-8)")
