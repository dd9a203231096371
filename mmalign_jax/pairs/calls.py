"""Parts by name, as users write them: "random_crop(0.01, scale_max=0.2)". Views, sources, scorers and selectors are all read here.

Nothing is evaluated. Arguments that are not given keep their defaults.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from mmalign_jax.errors import UserError, did_you_mean

_CALL = re.compile(r"\s*(\w+)\s*(?:\((.*)\)\s*)?")
_COMMA = re.compile(r",(?![^()]*\))")  # not within brackets
_NAMED = re.compile(r"(?:([^\W\d]\w*)\s*=)?\s*(.*)")

Value = int | float | str


@dataclasses.dataclass(frozen=True)
class Number:
    """An argument that is a number in low .. high, both included; its default says whether it is a whole one.

    `not_below` names another argument of the same part that may not be larger.
    """

    name: str
    default: int | float
    low: int | float
    high: int | float
    not_below: str = ""

    @property
    def allowed(self) -> str:
        whole = "a whole number" if isinstance(self.default, int) else "a number"
        return f"{whole} in {self.low:g} .. {self.high:g}"

    def read(self, text: str) -> int | float:
        """The number that `text` writes.

        Raises:
          ValueError: it is none, or out of range.
        """
        value = type(self.default)(text)
        if not (math.isfinite(value) and self.low <= value <= self.high):
            raise ValueError(f"{value} is out of range")
        return value


@dataclasses.dataclass(frozen=True)
class Choice:
    """An argument that is one of some words."""

    name: str
    default: str
    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return " or ".join(self.words)

    def read(self, text: str) -> str:
        """The word, without quotes around it.

        Raises:
          ValueError: it is not among the words.
        """
        word = text.strip("'\"")
        if word not in self.words:
            raise ValueError(f"{word!r} is not among them")
        return word


@dataclasses.dataclass(frozen=True)
class Call:
    """An argument that is a part of another table, with arguments of its own: "argmax(diffusion(500))".

    Args:
      default: as `read` writes it.
    """

    name: str
    default: str
    table: "Table"

    @property
    def allowed(self) -> str:
        return f"a {self.table.noun}"

    def read(self, text: str) -> str:
        """The part with all its arguments by name, so that equal parts are written equally.

        Raises:
          UserError: see `Table.read`.
        """
        return written(*self.table.read(text, self.name))


def written(name: str, arguments: Mapping[str, Value]) -> str:
    """A part with its arguments by name."""
    return f"{name}({','.join(f'{key}={value}' for key, value in arguments.items())})" if arguments else name


@runtime_checkable
class Kind(Protocol):
    """A kind of part: its name, and what it takes, in the order in which it may be given without names."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> Sequence[Number | Choice | Call]: ...


@dataclasses.dataclass(frozen=True)
class Table:
    """The parts of one sort that there are.

    Args:
      noun: what one is called in errors.
      kinds: by name.
      example: how one is written.
    """

    noun: str
    kinds: Mapping[str, Kind]
    example: str

    def usage(self, name: str) -> str:
        """A line that says how part `name` is written: its arguments, what they may be, and their defaults."""
        each = (f"{argument.name} ({argument.allowed}, by default {argument.default})" for argument in self.kinds[name].arguments)
        return f"{name}: " + (", ".join(each) or "no arguments")

    def read(self, text: str, where: str) -> tuple[str, dict[str, Value]]:
        """The name of a part, and every argument of it with its value.

        Args:
          where: what errors begin with, such as the setting's name.

        Raises:
          UserError: no such part or argument, a value that it does not take, or another form; the message says what is known.
        """
        call = _CALL.fullmatch(text)
        if not call:
            raise UserError(f"{where}: {text!r} is no {self.noun}. Write a name, and arguments in brackets if any, as in {self.example}")
        name, inner = call.groups()
        if name not in self.kinds:
            raise UserError(f"{where}: no {self.noun} {name!r}.{did_you_mean(name, self.kinds)} Known: {', '.join(self.kinds)}")
        kind = self.kinds[name]
        written = self._bind(kind, inner, where)
        values = {argument.name: self._value(kind, argument, written.get(argument.name), where) for argument in kind.arguments}
        for argument in kind.arguments:
            lower = isinstance(argument, Number) and argument.not_below
            if lower and values[argument.name] < values[lower]:
                above = f"{lower} = {values[lower]} is above {argument.name} = {values[argument.name]}"
                raise UserError(f"{where}: {above}. Known: {self.usage(name)}")
        return name, values

    def _bind(self, kind: Kind, inner: str | None, where: str) -> dict[str, str]:
        """Which argument is given which text."""
        known, usage = [argument.name for argument in kind.arguments], f"Known: {self.usage(kind.name)}"
        written: dict[str, str] = {}
        for place, item in enumerate(_COMMA.split(inner) if inner and inner.strip() else ()):
            key, value = _NAMED.fullmatch(item.strip()).groups()
            if key is None:
                if place >= len(known):
                    raise UserError(f"{where}: {kind.name} takes at most {len(known)} arguments. {usage}")
                if list(written) != known[:place]:
                    raise UserError(f"{where}: {kind.name}: {value!r} without a name stands behind a named argument. {usage}")
                key = known[place]
            elif key not in known:
                raise UserError(f"{where}: {kind.name} has no argument {key!r}.{did_you_mean(key, known)} {usage}")
            elif key in written:
                raise UserError(f"{where}: {kind.name}: {key} is given twice")
            written[key] = value.strip()
        return written

    def _value(self, kind: Kind, argument: Number | Choice | Call, text: str | None, where: str) -> Value:
        if text is None:
            return argument.default
        try:
            return argument.read(text)
        except UserError as error:
            raise UserError(f"{where}: {kind.name}: {error}") from error
        except ValueError:
            wrong = f"{where}: {kind.name}: {argument.name} must be {argument.allowed}, got {text!r}"
            raise UserError(f"{wrong}. Known: {self.usage(kind.name)}") from None
