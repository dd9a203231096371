"""Objectives by name."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from mmalign_jax.errors import UserError
from mmalign_jax.losses.dpo import dpo
from mmalign_jax.losses.mdpo import mdpo
from mmalign_jax.losses.sft import sft
from mmalign_jax.losses.simpo import simpo
from mmalign_jax.losses.terms import Metrics, PerPair
from mmalign_jax.types import BranchStats


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with its hyper-parameters, and what it needs to be given. It is static: close over it, do not pass it through jit.

    Args:
      name: its name in a config.
      function: the equation, `(stats, **hyperparameters) -> (loss of each pair, metrics)`.
      needs_reference: reads `stats.reference`.
      needs_other_image: reads `stats.policy_other_image` (and `stats.reference_other_image` when it needs a reference).
      answers: it reads the first so many answers of a row.
      hyperparameters: every hyper-parameter of the function.
    """

    name: str
    function: Callable[..., tuple[PerPair, Metrics]]
    needs_reference: bool
    needs_other_image: bool
    answers: int
    hyperparameters: Mapping[str, float] = dataclasses.field(hash=False)

    def __call__(self, stats: BranchStats) -> tuple[PerPair, Metrics]:
        """Losses `[B]` and metrics (means over the batch) in float32. No gradient reaches the reference or the metrics.

        Raises:
          ValueError: `stats` lacks what the objective needs.
        """
        if stats.policy.shape[-1] < self.answers:
            raise ValueError(f"{self.name} needs {self.answers} answers a row, got {stats.policy.shape[-1]}")
        needed = {
            "reference": self.needs_reference,
            "policy_other_image": self.needs_other_image,
            "reference_other_image": self.needs_other_image and self.needs_reference,
        }
        if missing := [name for name, need in needed.items() if need and getattr(stats, name) is None]:
            raise ValueError(f"{self.name} needs {', '.join(missing)}, which the statistics lack")
        return self.function(stats, **self.hyperparameters)


def _default(function: Callable, *, needs_reference: bool, needs_other_image: bool, answers: int) -> Objective:
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return Objective(function.__name__, function, needs_reference, needs_other_image, answers, MappingProxyType(defaults))


_OBJECTIVES: Mapping[str, Objective] = {
    "dpo": _default(dpo, needs_reference=True, needs_other_image=False, answers=2),
    "mdpo": _default(mdpo, needs_reference=True, needs_other_image=True, answers=2),
    "sft": _default(sft, needs_reference=False, needs_other_image=False, answers=1),
    "simpo": _default(simpo, needs_reference=False, needs_other_image=False, answers=2),
}

# Where a value is allowed, for the hyper-parameters that not every number suits.
_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda x: x > 0, "above 0"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "at least 0 and below 0.5"),
    "image_weight": (lambda x: x >= 0, "at least 0"),
    "anchor_weight": (lambda x: x >= 0, "at least 0"),
    "nll_weight": (lambda x: x >= 0, "at least 0"),
    "length_norm": (lambda x: x >= 0, "at least 0"),
}


def names() -> tuple[str, ...]:
    return tuple(_OBJECTIVES)


def hyperparameters(name: str) -> dict[str, float]:
    """The hyper-parameters of an objective with their defaults.

    Raises:
      UserError: there is no such objective.
    """
    return dict(_find(name).hyperparameters)


def build(name: str, **hyperparameters: float) -> Objective:
    """The objective `name`; hyper-parameters that are not given keep their defaults.

    Raises:
      UserError: no such objective or hyper-parameter, or a value out of range; the message names it.
    """
    default = _find(name)
    for key, value in hyperparameters.items():
        _check(name, key, value, default.hyperparameters)
    return dataclasses.replace(default, hyperparameters=MappingProxyType({**default.hyperparameters, **hyperparameters}))


def _find(name: str) -> Objective:
    if not isinstance(name, str) or name not in _OBJECTIVES:
        raise UserError(f"config.objective.name: no objective {name!r}.{_nearest(str(name), names())} Known: {', '.join(names())}")
    return _OBJECTIVES[name]


def _check(name: str, key: str, value: float, known: Mapping[str, float]) -> None:
    where = f"config.objective.{key}"
    if key not in known:
        raise UserError(f"{where}: {name} has no such setting.{_nearest(key, known)} Known: {', '.join(known) or 'none'}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {value!r}")
    allowed, wanted = _RANGES.get(key, (lambda x: True, ""))
    if not allowed(value):
        raise UserError(f"{where}: {value} is out of range, must be {wanted}")


def _nearest(key: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(key, list(known), n=1)
    return f" Did you mean {match[0]}?" if match else ""
