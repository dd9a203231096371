"""Which of a record's answers become rows, above all pairs: selectors and filters. Pure functions of answers with scores; they draw nothing."""

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from mmalign_jax.errors import UserError
from mmalign_jax.pairs.calls import Choice, Number, Table, Value
from mmalign_jax.types import FORMS, Group, Label, Preference

_ANY = 1e9  # above all scores
REFERENCE = "reference"  # the source of an answer that is true by itself


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An answer that may become a side of a pair.

    Args:
      source: who wrote it; `REFERENCE` for what the set holds as true.
      score: how good it is, higher is better; None when the scorer had no verdict.
      finished: whether it ended by itself, and did not run out of tokens.
      tokens: how long it is; 0 where that is not known.
    """

    text: str
    source: str
    score: float | None = None
    finished: bool = True
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of a record, as indices of its candidates, and why others were refused: reason -> count. A selector makes rows of one form."""

    pairs: tuple[Preference, ...] = ()
    refused: Mapping[str, int] = dataclasses.field(default_factory=dict)
    labels: tuple[Label, ...] = ()
    groups: tuple[Group, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.pairs) + len(self.labels) + len(self.groups)


Edge = tuple[int, int, float]  # win, lose, margin
_Select = Callable[..., list[Edge]] | Callable[..., Selection]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of selector: `(candidates, **arguments) -> edges`. What it leaves out without an edge is no refusal.

    One that makes other rows than pairs (`makes`, of `types.FORMS`) is `(candidates, filters, asked, **arguments) -> Selection`.
    """

    name: str
    function: _Select
    arguments: tuple[Number | Choice, ...] = ()
    compares: bool = True
    makes: str = "prefs"


@dataclasses.dataclass(frozen=True)
class Selector:
    """A selector with its arguments; made by `parse`."""

    name: str
    arguments: tuple[tuple[str, Value], ...] = ()

    @property
    def reads_reference(self) -> bool:
        return self.name == "reference_against_own"

    @property
    def compares(self) -> bool:
        """Whether scores decide; otherwise answers need none that differ."""
        return _BY_NAME[self.name].compares

    @property
    def makes(self) -> str:
        """The field of a record that its rows go to, of `types.FORMS`."""
        return _BY_NAME[self.name].makes

    @property
    def rows_in_words(self) -> str:
        return FORMS[self.makes]

    @property
    def least(self) -> int:
        """How many answers a record must have to give a row."""
        arguments = dict(self.arguments)
        if self.name == "group":
            return max(2, arguments["size"])
        return 1 if self.name == "unpaired" and arguments["by"] == "threshold" else 2

    @property
    def reads_scores(self) -> bool:
        """Whether scores say which answers are taken."""
        return self.compares or dict(self.arguments).get("ceiling", _ANY) < _ANY

    def __call__(self, candidates: Sequence[Candidate], filters: "Filters", asked: int = 0) -> Selection:
        """The rows that the selector makes and the filters let through, in order.

        Args:
          asked: how many answers were asked for, of which the candidates are those that can be used; 0: as many as there are.
        """
        refused: collections.Counter[str] = collections.Counter()
        known = [index for index, one in enumerate(candidates) if one.score is not None or one.source == REFERENCE]
        if len(known) < len(candidates):
            refused["no verdict"] = len(candidates) - len(known)
        if self.makes != "prefs":
            known = [index for index in known if candidates[index].score is not None]
            some = [candidates[index] for index in known]
            found = _BY_NAME[self.name].function(some, filters, asked or len(candidates), **dict(self.arguments))
            labels = tuple(dataclasses.replace(label, answer=known[label.answer]) for label in found.labels)
            groups = tuple(dataclasses.replace(group, answers=tuple(known[index] for index in group.answers)) for group in found.groups)
            return Selection(refused=dict(refused + collections.Counter(found.refused)), labels=labels, groups=groups)
        out = []
        for win, lose, margin in _BY_NAME[self.name].function([candidates[index] for index in known], **dict(self.arguments)):
            pair = Preference(known[win], known[lose], margin=margin)
            if reason := filters.refusal(candidates[pair.win], candidates[pair.lose], margin, self.compares):
                refused[reason] += 1
            else:
                out.append(pair)
        return Selection(tuple(out), dict(refused))


@dataclasses.dataclass(frozen=True)
class Filters:
    """What no pair may be.

    Args:
      gap: least difference of the scores; equal scores teach nothing, so a tie is refused also at 0.
      length_ratio: most that one answer may be as long as the other, in words, since models learn length first; 0 for no limit.
      unfinished: whether a winner may have run out of tokens.
    """

    gap: float = 0.0
    length_ratio: float = 0.0
    unfinished: bool = False

    def refusal(self, win: Candidate, lose: Candidate, margin: float, compared: bool = True) -> str:
        """Why a pair is refused, "" when it is not. Ties and gaps are those of pairs that scores decide (`compared`)."""
        if win.text.split() == lose.text.split():
            return "identical texts"
        if compared and win.score is not None and lose.score is not None:
            if margin == 0:
                return "tie"
            if margin < self.gap:
                return "gap too small"
        if not (self.unfinished or win.finished):
            return "winner is unfinished"
        return "lengths too unlike" if self.unlike(_words(win), _words(lose)) else ""

    def unlike(self, length: float, other: float) -> bool:
        """Whether one of two lengths in words is too many times the other."""
        return bool(self.length_ratio) and max(length, other) > self.length_ratio * min(length, other)


def parse(text: str, where: str = "selector") -> Selector:
    """Reads a selector, such as "best_worst" or "correct_against_incorrect(0.5,most=4)".

    Raises:
      UserError: see `calls.Table.read`; or groups of one answer are asked for.
    """
    name, values = _TABLE.read(text, where)
    if name == "group" and values["size"] == 1:
        raise UserError(f"{where}: group: one answer is ranked with nothing; size is 0 (all that are asked for) or at least 2")
    return Selector(name, tuple(values.items()))


def names() -> tuple[str, ...]:
    return tuple(_BY_NAME)


def _words(candidate: Candidate) -> int:
    return max(1, len(candidate.text.split()))


def _scored(candidates: Sequence[Candidate]) -> list[int]:
    """Indices of candidates with a score, best first, of equal ones the first."""
    return sorted((i for i, one in enumerate(candidates) if one.score is not None), key=lambda i: (-candidates[i].score, i))


def _spread(edges: list[Edge], most: int) -> list[Edge]:
    """The `most` edges with the largest margins (0: all), in which answers come up as evenly as those allow."""
    if not most or len(edges) <= most:
        return edges
    used: collections.Counter[int] = collections.Counter()
    left, out = list(edges), []
    while len(out) < most:
        best = min(left, key=lambda edge: (used[edge[0]] + used[edge[1]], -edge[2]))
        left.remove(best)
        out.append(best)
        used.update(best[:2])
    return out


def all_pairs(candidates: Sequence[Candidate], most: int = 0) -> list[Edge]:
    """Every better answer over every worse one (RLAIF-V, arXiv 2405.17220: at most two a prompt)."""
    order = _scored(candidates)
    edges = [(win, lose, candidates[win].score - candidates[lose].score) for win, lose in itertools.combinations(order, 2)]
    return _spread(edges, most)


def best_worst(candidates: Sequence[Candidate]) -> list[Edge]:
    """The best answer over the worst (OAIF, arXiv 2402.04792, with two answers; CLIP-DPO, arXiv 2408.10433)."""
    order = _scored(candidates)
    return [(order[0], order[-1], candidates[order[0]].score - candidates[order[-1]].score)] if len(order) > 1 else []


def reference_against_own(candidates: Sequence[Candidate], most: int = 0, ceiling: float = _ANY) -> list[Edge]:
    """The reference over other answers (SeVa, arXiv 2404.10501), those that score least first. Margin 0.

    Those that score more than `ceiling` are not rejected (MIA-DPO, arXiv 2410.17637).
    """
    first = next((index for index, one in enumerate(candidates) if one.source == REFERENCE), None)
    if first is None:
        return []
    own = [index for index in reversed(_scored(candidates)) if index != first and candidates[index].score <= ceiling]
    edges = [(first, index, 0.0) for index in own]
    return edges[:most] if most else edges


def by_source(candidates: Sequence[Candidate], most: int = 0) -> list[Edge]:
    """Answers of a source over those of the sources behind it (STIC, arXiv 2405.19716: true picture over corrupted). Nobody judges: margin 0."""
    order = list(dict.fromkeys(one.source for one in candidates))
    rank = [order.index(one.source) for one in candidates]
    edges = [(win, lose, 0.0) for win, lose in itertools.permutations(range(len(candidates)), 2) if rank[win] < rank[lose]]
    return _spread(edges, most)


def correct_against_incorrect(candidates: Sequence[Candidate], threshold: float = 0.5, most: int = 0) -> list[Edge]:
    """Answers that score at least `threshold` over those that score less (MPO, arXiv 2411.10442)."""
    order = _scored(candidates)
    right = [index for index in order if candidates[index].score >= threshold]
    wrong = [index for index in order if candidates[index].score < threshold]
    edges = [(win, lose, candidates[win].score - candidates[lose].score) for win in right for lose in reversed(wrong)]
    return _spread(edges, most)


def unpaired(candidates: Sequence[Candidate], filters: Filters, asked: int, threshold: float = 0.5, by: str = "threshold") -> Selection:
    """Every answer by itself (KTO, arXiv 2402.01306): desirable where it scores at least `threshold`, or more than the mean of all.

    An answer of the same words as one before it is refused; `gap` is the least distance from the threshold or the mean, which by itself is a tie;
    `length_ratio` compares with the median length.
    """
    if not candidates:
        return Selection()
    middle = threshold if by == "threshold" else statistics.fmean(one.score for one in candidates)
    usual, seen, labels = statistics.median(map(_words, candidates)), set(), []
    refused: collections.Counter[str] = collections.Counter()
    for index, one in enumerate(candidates):
        distance, words = one.score - middle, tuple(one.text.split())
        desirable = distance >= 0
        if words in seen:
            refused["identical texts"] += 1
        elif by == "mean" and math.isclose(one.score, middle, rel_tol=1e-9, abs_tol=1e-12):
            refused["tie"] += 1
        elif abs(distance) < filters.gap:
            refused["gap too small"] += 1
        elif desirable and not (filters.unfinished or one.finished):
            refused["desirable answer is unfinished"] += 1
        elif filters.unlike(_words(one), usual):
            refused["lengths too unlike"] += 1
        else:
            labels.append(Label(index, desirable))
        seen.add(words)
    return Selection(refused=dict(refused), labels=tuple(labels))


def group(candidates: Sequence[Candidate], filters: Filters, asked: int, size: int = 0) -> Selection:
    """The first `size` answers with their scores, by which they are ranked; 0: all that were asked for.

    A record that has fewer is refused, so that all groups are of one size. So is a group whose answers are all the same or have all one score,
    whose scores are less than `gap` apart, or the longest of which is too many times the shortest.
    """
    size = size or asked
    chosen = candidates[:size]
    reason, scores, lengths = "", [one.score for one in chosen], [_words(one) for one in chosen]
    if len(chosen) < max(size, 2):
        reason = "group is not whole"
    elif len({tuple(one.text.split()) for one in chosen}) == 1:
        reason = "identical texts"
    elif max(scores) == min(scores):
        reason = "tie"
    elif max(scores) - min(scores) < filters.gap:
        reason = "gap too small"
    elif filters.unlike(max(lengths), min(lengths)):
        reason = "lengths too unlike"
    return Selection(refused={reason: 1}) if reason else Selection(groups=(Group(tuple(range(size))),))


_MOST = Number("most", 0, low=0, high=10_000)
_THRESHOLD = Number("threshold", 0.5, low=-1e9, high=1e9)
_BY_NAME = {
    kind.name: kind
    for kind in (
        Kind("all_pairs", all_pairs, (_MOST,)),
        Kind("best_worst", best_worst),
        Kind("reference_against_own", reference_against_own, (_MOST, Number("ceiling", _ANY, low=-_ANY, high=_ANY)), compares=False),
        Kind("by_source", by_source, (_MOST,), compares=False),
        Kind("correct_against_incorrect", correct_against_incorrect, (_THRESHOLD, _MOST)),
        Kind("unpaired", unpaired, (_THRESHOLD, Choice("by", "threshold", ("threshold", "mean"))), makes="labels"),
        Kind("group", group, (Number("size", 0, low=0, high=1024),), makes="groups"),
    )
}
_TABLE = Table("selector", _BY_NAME, "best_worst or all_pairs(2)")
