"""Which of a record's answers become pairs: selectors and filters. Pure functions of answers with scores; they draw nothing."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from mmalign_jax.pairs.calls import Number, Table, Value
from mmalign_jax.types import Preference

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
    """The pairs of a record, as indices of its candidates, and why others were refused: reason -> count."""

    pairs: tuple[Preference, ...]
    refused: Mapping[str, int]


Edge = tuple[int, int, float]  # win, lose, margin
_Select = Callable[..., list[Edge]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of selector: `(candidates, **arguments) -> edges`. What it leaves out without an edge is no refusal."""

    name: str
    function: _Select
    arguments: tuple[Number, ...] = ()
    compares: bool = True


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

    def __call__(self, candidates: Sequence[Candidate], filters: "Filters") -> Selection:
        """The pairs that the selector makes and the filters let through, in order."""
        refused: collections.Counter[str] = collections.Counter()
        known = [index for index, one in enumerate(candidates) if one.score is not None or one.source == REFERENCE]
        if len(known) < len(candidates):
            refused["no verdict"] = len(candidates) - len(known)
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
        lengths = sorted(max(1, len(one.text.split())) for one in (win, lose))
        if self.length_ratio and lengths[1] > self.length_ratio * lengths[0]:
            return "lengths too unlike"
        return ""


def parse(text: str, where: str = "selector") -> Selector:
    """Reads a selector, such as "best_worst" or "correct_against_incorrect(0.5,most=4)".

    Raises:
      UserError: see `calls.Table.read`.
    """
    name, values = _TABLE.read(text, where)
    return Selector(name, tuple(values.items()))


def names() -> tuple[str, ...]:
    return tuple(_BY_NAME)


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


def reference_against_own(candidates: Sequence[Candidate], most: int = 0) -> list[Edge]:
    """The reference over other answers (SeVa, arXiv 2404.10501), those that score least first. Nobody judges: margin 0."""
    first = next((index for index, one in enumerate(candidates) if one.source == REFERENCE), None)
    if first is None:
        return []
    own = [index for index in reversed(_scored(candidates)) if index != first]
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


_MOST = Number("most", 0, low=0, high=10_000)
_BY_NAME = {
    kind.name: kind
    for kind in (
        Kind("all_pairs", all_pairs, (_MOST,)),
        Kind("best_worst", best_worst),
        Kind("reference_against_own", reference_against_own, (_MOST,), compares=False),
        Kind("by_source", by_source, (_MOST,), compares=False),
        Kind("correct_against_incorrect", correct_against_incorrect, (Number("threshold", 0.5, low=-1e9, high=1e9), _MOST)),
    )
}
_TABLE = Table("selector", _BY_NAME, "best_worst or all_pairs(2)")
