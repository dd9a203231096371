"""Terms: pure functions of branch statistics. An objective is a weighted sum of them, written as one: `Pair(beta=0.1) + 0.5 * Likelihood()`."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses import links
from mmalign_jax.losses.addends import Addend
from mmalign_jax.losses.baselines import Baseline, Constant
from mmalign_jax.losses.beta import BetaSchedule
from mmalign_jax.losses.branches import CHOSEN, REJECTED, Branch, Need
from mmalign_jax.losses.scores import Score
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.trust import Trust
from mmalign_jax.losses.whole_batch import gathered

PerPair = Float[Array, " B"]


class Term(abc.ABC):
    """Something that gives every pair a loss. `label` is its name in the metrics."""

    label: ClassVar[str] = "term"
    of_pair: ClassVar[bool] = True  # false: it reads other rows, which the pair's weight does not concern
    by_rank: ClassVar[bool] = False  # losses come sorted over the step, so that none belongs to a pair
    reads_logps: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def needs(self) -> frozenset[Need]:
        """What it must be given beside the policy's log-probs."""

    @property
    @abc.abstractmethod
    def branches(self) -> tuple[Branch, ...]:
        """The branches that it reads."""

    @abc.abstractmethod
    def __call__(self, stats: BranchStats) -> PerPair:
        """The loss of each pair."""

    def metrics(self, stats: BranchStats) -> dict[str, Float[Array, "*b"]]:
        """What it reports beside its loss: by row, or already a mean."""
        return {}

    def initial_state(self) -> dict[str, float]:
        return {}

    def next_state(self, stats: BranchStats) -> dict[str, Float[Array, ""]]:
        return {}

    def __add__(self, other: "Term | Terms") -> "Terms":
        return 1.0 * self + other

    def __mul__(self, weight: float) -> "Terms":
        return Terms(((float(weight), self),) if weight else ())

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True)
class Terms:
    """A weighted sum. What has weight 0 is left out: nothing is computed for it."""

    weighted: tuple[tuple[float, Term], ...]

    def __add__(self, other: "Term | Terms") -> "Terms":
        more = 1.0 * other if isinstance(other, Term) else other
        return Terms(self.weighted + more.weighted)

    def __mul__(self, weight: float) -> "Terms":
        return Terms(tuple((weight * own, term) for own, term in self.weighted) if weight else ())

    __rmul__ = __mul__

    def __iter__(self):
        return iter(self.weighted)


@dataclasses.dataclass(frozen=True)
class Pair(Term):
    """link(h), h = beta (s_win - s_lose + inside) - gamma + outside.

    Args:
      beta: a constant or a schedule.
      win, lose: the two branches.
      gamma: margin that h must exceed.
      inside, outside: further addends, before and after beta.
      trust: weight of each pair, not differentiated.
      name: in the metrics, where an objective has several pairs of a kind.
    """

    beta: float | BetaSchedule = 0.1
    link: links.Link = links.logistic()
    win: Branch = CHOSEN
    lose: Branch = REJECTED
    score: Score = Score()
    gamma: float = 0.0
    inside: tuple[Addend, ...] = ()
    outside: tuple[Addend, ...] = ()
    trust: Trust | None = None
    name: str = ""

    @property
    def label(self) -> str:
        """Its name, or which side of the pair differs. DPO's partition function cancels for "text" edges alone: they have the images in common."""
        if self.name or self.win.images == self.lose.images:
            return self.name or "text"
        return "image" if self.win.answer == self.lose.answer and "self" not in self.lose.images else "mixed"

    @property
    def schedule(self) -> BetaSchedule:
        return self.beta if isinstance(self.beta, BetaSchedule) else BetaSchedule(self.beta)

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.win, self.lose, *(branch for addend in (*self.inside, *self.outside) for branch in addend.branches)

    @property
    def needs(self) -> frozenset[Need]:
        parts = (self.score, self.schedule, *self.inside, *self.outside, *((self.trust,) if self.trust else ()), *self.branches)
        return frozenset().union(*(part.needs for part in parts))

    def betas(self, stats: BranchStats) -> PerPair:
        """beta of each pair."""
        return self.schedule(stats, self._gap(stats))

    def logit(self, stats: BranchStats) -> PerPair:
        """h."""
        gap = self._gap(stats)
        h = self.schedule(stats, gap) * gap - self.gamma
        return sum((addend(stats, self.score) for addend in self.outside), h)

    def __call__(self, stats: BranchStats) -> PerPair:
        loss = self.link(self.logit(stats))
        if (keep := self.schedule.keep(stats, self._gap(stats))) is not None:
            loss = loss * keep
        return loss if self.trust is None else loss * jax.lax.stop_gradient(self.trust(stats))

    def initial_state(self) -> dict[str, float]:
        return self.schedule.initial_state()

    def next_state(self, stats: BranchStats) -> dict[str, Float[Array, ""]]:
        return self.schedule.next_state(stats, self._gap(stats))

    def _gap(self, stats: BranchStats) -> PerPair:
        gap = self.score(stats, self.win) - self.score(stats, self.lose)
        return sum((addend(stats, self.score) for addend in self.inside), gap)


@dataclasses.dataclass(frozen=True)
class Transport(Term):
    """The link of batch-wise sorted log-ratios: the chosen answers' distribution above that of the rejected (AOT, arXiv 2406.05882).

    Losses come in sorted order, so that a row's loss is not its own.

    Args:
      paired: sort log pi_w - log pi_l and log ref_w - log ref_l; otherwise s_w and s_l.
    """

    beta: float = 0.1
    link: links.Link = links.logistic()
    paired: bool = True
    score: Score = Score()
    label: ClassVar[str] = "text"
    by_rank: ClassVar[bool] = True
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN, REJECTED)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.BATCH})

    def logit(self, stats: BranchStats) -> PerPair:
        policy, reference = stats.answers.policy, stats.answers.reference
        if self.paired:
            upper, lower = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
        else:
            upper, lower = (policy - reference).T
        return self.beta * (gathered(jnp.sort, upper) - gathered(jnp.sort, lower))

    def __call__(self, stats: BranchStats) -> PerPair:
        return self.link(self.logit(stats))


@dataclasses.dataclass(frozen=True)
class Point(Term):
    """link(sign (beta s - baseline)): one answer alone. With sign -1 its reward should be below the baseline."""

    beta: float = 0.1
    branch: Branch = CHOSEN
    sign: int = 1
    link: links.Link = links.logistic()
    score: Score = Score()
    baseline: Baseline = Constant()
    label: str = "anchor"

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (self.branch, *self.baseline.branches)

    @property
    def needs(self) -> frozenset[Need]:
        return self.score.needs | self.branch.needs | self.baseline.needs

    def logit(self, stats: BranchStats) -> PerPair:
        baseline = jax.lax.stop_gradient(self.baseline(stats, self.beta, self.score))
        return self.sign * (self.beta * self.score(stats, self.branch) - baseline)

    def __call__(self, stats: BranchStats) -> PerPair:
        return self.link(self.logit(stats))

    def initial_state(self) -> dict[str, float]:
        return self.baseline.initial_state()

    def next_state(self, stats: BranchStats) -> dict[str, Float[Array, ""]]:
        return self.baseline.next_state(stats, self.beta, self.score)
