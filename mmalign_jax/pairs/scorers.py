"""What an answer is worth. Scorers by name, added up: `("objects", "yes_no", "missing_end(-1)")`.

Every one has a weight as its first argument.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from mmalign_jax.errors import UserError
from mmalign_jax.mentions import Mentions
from mmalign_jax.pairs.calls import Choice, Number, Table, Value
from mmalign_jax.pairs.selectors import Candidate
from mmalign_jax.types import PreferenceRecord


@dataclasses.dataclass(frozen=True)
class Truth:
    """What rules look answers up in.

    Args:
      mentions: which things a text names; None where no table is at hand.
      max_tokens: most tokens of an answer.
      pattern: what a whole answer is to look like; None where nobody says.
    """

    mentions: Mentions | None = None
    max_tokens: int = 0
    pattern: re.Pattern[str] | None = None


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


@runtime_checkable
class Expert(Protocol):
    """Judges answers by more than a rule: a model, or somebody who is asked. It has something to say of every record."""

    def check(self, record: PreferenceRecord) -> None:
        """Raises UserError where it cannot judge answers to a record."""

    def __call__(self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """What each of the answers to each record is worth; None where there was no verdict in the end."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How the judging went so far, by the names of metrics."""


@dataclasses.dataclass(frozen=True)
class ExpertKind:
    """A kind of scorer that is an expert, who is opened when answers are to be scored: see `experts`."""

    name: str
    description: str
    arguments: tuple[Number | Choice, ...]


@dataclasses.dataclass(frozen=True)
class Scored:
    """The weighted sum of an answer's scores, None where one of them is missing, and each of them by the scorer's name, unweighted."""

    total: float | None
    parts: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Scorers:
    """Scorers with their weights and arguments; made by `parse`. Those that are experts must be given before answers are scored."""

    parts: tuple[tuple[str, float, Mapping[str, Value]], ...]
    truth: Truth
    experts: Mapping[str, Expert] = dataclasses.field(default_factory=dict)

    @property
    def expected(self) -> tuple[str, ...]:
        """Names of the experts among them."""
        return tuple(name for name, _, _ in self.parts if isinstance(_KINDS[name], ExpertKind))

    def arguments(self, name: str) -> Mapping[str, Value]:
        """What a scorer among them was given beside its weight."""
        return next(arguments for part, _, arguments in self.parts if part == name)

    @property
    def counts(self) -> dict[str, int]:
        """How the experts' judging went so far, by the names of metrics."""
        return {name: count for expert in self.experts.values() for name, count in expert.counts.items()}

    def __call__(
        self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[Candidate]], readable: Callable[[str], bool] = bool
    ) -> list[list[Scored]]:
        """What each of the answers to each record is worth; `check` has found nothing wrong with the records.

        Args:
          readable: whether an expert can be shown a text; there is no verdict on others.
        """
        verdicts = {name: _of_readable(self.experts[name], records, answers, readable) for name in self.expected}
        out = []
        for number, (record, each) in enumerate(zip(records, answers, strict=True)):
            of_record = {name: found[number] for name, found in verdicts.items()}
            out.append([self._score(record, one, {name: found[at] for name, found in of_record.items()}) for at, one in enumerate(each)])
        return out

    def _score(self, record: PreferenceRecord, answer: Candidate, verdicts: Mapping[str, float | None]) -> Scored:
        total, parts = 0.0, {}
        for name, weight, arguments in self.parts:
            kind = _KINDS[name]
            if isinstance(kind, ExpertKind):
                if (verdict := verdicts[name]) is None:
                    total = None
                    continue
                parts[name] = verdict
            elif kind.knows is None or kind.knows(record):
                parts[name] = kind.function(record, answer, self.truth, **arguments)
            else:
                continue
            total = None if total is None else total + weight * parts[name]
        return Scored(total, parts)

    def check(self, record: PreferenceRecord) -> None:
        """Raises UserError where none of the scorers says what is true of a record, or one cannot read what the record says."""
        names = [name for name, _, _ in self.parts]
        rules = {name: kind for name in names if isinstance(kind := _KINDS[name], Rule)}
        known = [name for name, rule in rules.items() if rule.knows is not None and rule.knows(record)]
        if names and not known and not self.expected:
            raise UserError(f"config.samples.scorers: none of {', '.join(names)} says what is true of record {record.id}")
        if "objects" in known:
            try:
                shown(record, self.truth.mentions)
            except UserError as error:
                raise UserError(f"record {record.id}: {error}") from error
        for expert in self.experts.values():
            expert.check(record)


def _of_readable(
    expert: Expert, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[Candidate]], readable: Callable[[str], bool]
) -> list[list[float | None]]:
    kept = [[readable(one.text) for one in each] for each in answers]
    shown_texts = [[one.text for one, is_kept in zip(*both, strict=True) if is_kept] for both in zip(answers, kept, strict=True)]
    found = [iter(each) for each in expert(records, shown_texts)]
    return [[next(each) if is_kept else None for is_kept in of_record] for each, of_record in zip(found, kept, strict=True)]


def parse(texts: Sequence[str], truth: Truth, where: str = "config.samples.scorers") -> Scorers:
    """Reads scorers, such as ("objects", "missing_end(-8)").

    Raises:
      UserError: one comes twice or lacks what it looks up, or see `calls.Table.read`.
    """
    parts: dict[str, tuple[str, float, Mapping[str, Value]]] = {}
    for text in texts:
        name, values = _TABLE.read(text, where)
        if name in parts:
            raise UserError(f"{where}: {name} comes twice")
        weight = values.pop("weight")
        parts[name] = (name, float(weight), values)
    if "objects" in parts and truth.mentions is None:
        raise UserError("config.samples.synonyms: the scorer objects looks words up in a table; give a JSON file: kind -> words that name it")
    if ("format" in parts) != (truth.pattern is not None):
        raise UserError("config.samples.pattern: a regular expression goes with the scorer format, and only with it")
    return Scorers(tuple(parts.values()), truth)


def read_names(texts: Sequence[str], where: str = "config.samples.scorers") -> tuple[str, ...]:
    """The names of the scorers that are written. Raises UserError: see `calls.Table.read`."""
    return tuple(_TABLE.read(text, where)[0] for text in texts)


def names() -> tuple[str, ...]:
    return tuple(_KINDS)


def summary(name: str) -> str:
    """The first line of a scorer's description."""
    kind = _KINDS[name]
    return kind.description if isinstance(kind, ExpertKind) else (inspect.getdoc(kind.function) or "").splitlines()[0]


def reference_text(record: PreferenceRecord) -> str:
    """The answer that the set holds as true, "" where it has none."""
    return record.reference.text if record.reference else ""


def _first_word(text: str) -> str:
    words = "".join(char if char.isalnum() else " " for char in text.lower()).split()
    return words[0] if words else ""


def _asks_yes_no(record: PreferenceRecord) -> bool:
    return _first_word(reference_text(record)) in ("yes", "no")


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!?").rstrip()


def exact(record: PreferenceRecord, answer: Candidate, truth: Truth) -> float:
    """1 for the reference, however it is cased and spaced, with a full stop or without; else 0."""
    return float(_plain(answer.text) == _plain(reference_text(record)))


def yes_no(record: PreferenceRecord, answer: Candidate, truth: Truth) -> float:
    """1 where the answer begins with the reference's yes or no; else 0."""
    return float(_first_word(answer.text) == _first_word(reference_text(record)))


def objects(record: PreferenceRecord, answer: Candidate, truth: Truth, wrong: float) -> float:
    """(things named that are there - `wrong` times mentions of things that are not) / things there: recall less hallucination.

    What is there is the record's `meta["objects"]`: names, or mappings with a `kind`.
    """
    there = shown(record, truth.mentions)
    named = [mention.kind for mention in truth.mentions(answer.text)]
    return (len(there & set(named)) - wrong * sum(kind not in there for kind in named)) / max(len(there), 1)


def shown(record: PreferenceRecord, mentions: Mentions) -> set[str]:
    """The kinds of `meta["objects"]`, what a record's picture shows.

    Raises:
      UserError: it is of another form, or names what the table does not know.
    """
    listed = record.meta["objects"]
    names = [one.get("kind") if isinstance(one, Mapping) else one for one in listed] if isinstance(listed, (list, tuple)) else [None]
    if not all(isinstance(name, str) for name in names):
        raise UserError('meta["objects"] is a list of names, or of mappings with a "kind"')
    return {mentions.kind(name) for name in names}


def length(record: PreferenceRecord, answer: Candidate, truth: Truth) -> float:
    """How much of the tokens that there are an answer takes (Fact-RLHF, arXiv 2309.14525, takes 10 of it off)."""
    return answer.tokens / truth.max_tokens


def missing_end(record: PreferenceRecord, answer: Candidate, truth: Truth) -> float:
    """1 for an answer that ran out of tokens; else 0."""
    return float(not answer.finished)


def overlong(record: PreferenceRecord, answer: Candidate, truth: Truth, buffer: int) -> float:
    """0, and in the last `buffer` tokens before the limit linearly down to -1 (DAPO, arXiv 2503.14476, equation 13)."""
    return min(0.0, max(-1.0, (truth.max_tokens - buffer - answer.tokens) / buffer))


def format(record: PreferenceRecord, answer: Candidate, truth: Truth) -> float:  # noqa: A001 - the field's word for it
    """1 where the whole answer matches `config.samples.pattern`; else 0."""
    return float(truth.pattern.fullmatch(answer.text) is not None)


def _has_objects(record: PreferenceRecord) -> bool:
    """Lists what a picture shows, and asks for more than a yes or no, whose answer may name what is not there."""
    return "objects" in record.meta and not _asks_yes_no(record)


def _weight(usual: float) -> Number:
    return Number("weight", usual, low=-1e6, high=1e6)


_KINDS: dict[str, Rule | ExpertKind] = {
    kind.name: kind
    for kind in (
        Rule("exact", exact, (_weight(1.0),), lambda record: bool(reference_text(record))),
        Rule("yes_no", yes_no, (_weight(1.0),), _asks_yes_no),
        Rule("objects", objects, (_weight(1.0), Number("wrong", 1.0, low=0.0, high=1e6)), _has_objects),
        Rule("format", format, (_weight(1.0),)),
        Rule("length", length, (_weight(-1.0),)),
        Rule("missing_end", missing_end, (_weight(-1.0),)),
        Rule("overlong", overlong, (_weight(1.0), Number("buffer", 32, low=1, high=1_000_000))),
        ExpertKind("judge", "What the chat model of `config.judge` says: the share of its scale, or of comparisons won.", (_weight(1.0),)),
        ExpertKind("reward_model", "The score of the reward model in the directory `config.samples.reward_model`.", (_weight(1.0),)),
        ExpertKind("clip", "The cosine of its sentences with the pictures, by the encoder in `config.samples.clip` (CLIP-DPO).", (_weight(1.0),)),
        ExpertKind(
            "claims",
            "Minus the number of sentences that a model, asked `config.samples.claim`, denies rather than affirms (RLAIF-V, arXiv 2405.17220).",
            (_weight(1.0),),
        ),
        ExpertKind(
            "attention",
            "How much of its attention to pictures goes to the one that is asked about (`meta[\"target_image\"]`, from 0), less what MIA-DPO (arXiv "
            "2410.17637) asks of prompts with `two`, `three` or `more` pictures: at most 0 where it looks elsewhere.",
            (
                _weight(1.0),
                Number("layer", -1, low=-1, high=10_000),
                Choice("per", "image", ("image", "token")),
                *(Number(name, asked, low=0.0, high=1.0) for name, asked in (("two", 0.8), ("three", 0.7), ("more", 0.6))),
            ),
        ),
    )
}
_TABLE = Table("scorer", _KINDS, "objects or missing_end(-8)")
