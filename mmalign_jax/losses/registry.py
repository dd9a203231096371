"""Objectives by name: each is a file of `configs/objectives`, which the package holds as `losses/objectives`.

A file defines `objective(*, hyper-parameter=default, ...)` that returns terms. Its name is the objective's.
"""

import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType

from mmalign_jax.errors import UserError, did_you_mean
from mmalign_jax.losses import objectives, policy_gradient, policy_terms
from mmalign_jax.losses.objective import Objective, Value
from mmalign_jax.losses.terms import Term, Terms

# As TRL calls them
ALIASES: Mapping[str, str] = {
    "sigmoid": "dpo", "exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "sppo_hard": "sppo", "aot_pair": "aot_unpaired",
}  # fmt: skip

# Where a value is allowed, for the hyper-parameters that not every number suits.
_POSITIVE: tuple[Callable[[float], bool], str] = (lambda x: x > 0, "above 0")
_NOT_NEGATIVE: tuple[Callable[[float], bool], str] = (lambda x: x >= 0, "at least 0")
_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "beta": _POSITIVE,
    "tau": _POSITIVE,
    "label_smoothing": (lambda x: 0 <= x < 0.5, "at least 0 and below 0.5"),
    "rho": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "momentum": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "changed_weight": _NOT_NEGATIVE,
    "clip_low": _NOT_NEGATIVE,
    "clip_high": _NOT_NEGATIVE,
    "cap": _POSITIVE,
    "clip": _POSITIVE,
    "kl_in_reward": _NOT_NEGATIVE,
    "guidance": _NOT_NEGATIVE,
    "length_norm": _NOT_NEGATIVE,
    "centering": _NOT_NEGATIVE,
    "beta_by_epoch": _POSITIVE,
    # where one objective is stricter than others
    "ppo.gamma": (lambda x: 0 <= x <= 1, "in 0 .. 1"),
    "ppo.lam": (lambda x: 0 <= x <= 1, "in 0 .. 1"),
    "exo.label_smoothing": (lambda x: 0 < x < 0.5, "above 0 and below 0.5"),
    "f_dpo.alpha": (lambda x: x != 1, "another number than 1"),
    "alpha_po.alpha": (lambda x: x != 0, "another number than 0"),
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "divergence": ("reverse_kl", "forward_kl", "js", "alpha"),
    "estimate": ("k1", "k1_clamped", "k3"),
    "kind": policy_gradient.KINDS,
    "level": policy_gradient.LEVELS,
    "advantage": policy_terms.ADVANTAGES,
}


def names() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(objectives.__path__)))


def hyperparameters(name: str) -> dict[str, Value]:
    """The hyper-parameters of an objective with their defaults.

    Raises:
      UserError: there is no such objective.
    """
    parameters = inspect.signature(_find(name)).parameters.values()
    return {p.name: p.default for p in parameters}


def build(name: str, **hyperparameters: Value) -> Objective:
    """The objective `name`; hyper-parameters that are not given keep their defaults.

    Raises:
      UserError: no such objective or hyper-parameter, or a value out of range; the message names it.
    """
    function = _find(name)
    known = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    values = known | {key: _checked(name, key, value, known) for key, value in hyperparameters.items()}
    return _assembled(function, ALIASES.get(name, name), tuple(values.items()))


def summary(name: str) -> str:
    """The first line of the objective's file: what it is and where it is from."""
    return (inspect.getdoc(inspect.getmodule(_find(name))) or "").splitlines()[0]


@functools.cache
def _assembled(function: Callable[..., Term | Terms], name: str, values: tuple[tuple[str, Value], ...]) -> Objective:
    """Equal hyper-parameters give one and the same objective, so that what closes over it is compiled once. Links are functions, which
    are equal only to themselves."""
    terms = function(**dict(values))
    terms = 1.0 * terms if isinstance(terms, Term) else terms
    if not isinstance(terms, Terms) or not terms.weighted:
        raise UserError(f"config.objective.name: all terms of {name} have weight 0 with these hyper-parameters")
    return Objective(name, terms, MappingProxyType(dict(values)))


def _find(name: str) -> Callable[..., Term | Terms]:
    stem = ALIASES.get(name, name) if isinstance(name, str) else name
    if stem not in names():
        raise UserError(f"config.objective.name: no objective {name!r}.{did_you_mean(str(name), [*names(), *ALIASES])} Known: {', '.join(names())}")
    return importlib.import_module(f"{objectives.__name__}.{stem}").objective


def _checked(name: str, key: str, value: Value, known: Mapping[str, Value]) -> Value:
    where = f"config.objective.{key}"
    if key not in known:
        raise UserError(f"{where}: {name} has no such setting.{did_you_mean(key, known)} Known: {', '.join(known) or 'none'}")
    wanted = type(known[key])
    if wanted is tuple and isinstance(value, (tuple, list)):
        return tuple(_in_range(name, key, item) for item in value)
    if wanted in (str, bool, tuple):
        if not isinstance(value, wanted):
            raise UserError(f"{where}: expected {wanted.__name__}, got {value!r}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, _CHOICES[key]))}")
        return value
    return _in_range(name, key, value)


def _in_range(name: str, key: str, value: Value) -> float:
    where = f"config.objective.{key}"
    value = _number(where, value)
    usual = _RANGES.get(key, _NOT_NEGATIVE if key.endswith("_weight") else (lambda x: True, ""))
    allowed, words = _RANGES.get(f"{ALIASES.get(name, name)}.{key}", usual)
    if not allowed(value):
        raise UserError(f"{where}: {value} is out of range, must be {words}")
    return value


def _number(where: str, value: Value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {value!r}")
    return value
