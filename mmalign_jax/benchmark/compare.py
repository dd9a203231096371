"""Two sides in numbers: speed as medians over rounds, shares and means with their standard errors."""

import dataclasses
import math
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, least and largest of several rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        return f"{self.median:{form}} [{self.least:{form}}, {self.most:{form}}]"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over records, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Of one value the error is not known, and NaN."""
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), spread / math.sqrt(len(values)))

    def text(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


def z_of_means(a: Estimate, b: Estimate) -> float:
    """By how many standard errors two means differ; 0 where both are the same number without any spread."""
    error = math.hypot(a.error, b.error)
    return 0.0 if a.mean == b.mean else (a.mean - b.mean) / error if error else math.inf


def z_of_shares(hits_a: int, count_a: int, hits_b: int, count_b: int) -> float:
    """The two-proportion z with the pooled share."""
    pooled = (hits_a + hits_b) / (count_a + count_b)
    error = math.sqrt(pooled * (1 - pooled) * (1 / count_a + 1 / count_b))
    return (hits_a / count_a - hits_b / count_b) / error if error else 0.0
