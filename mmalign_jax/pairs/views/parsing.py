"""What a user writes for a view -> `View`."""

import difflib
import re
from collections.abc import Iterable

from mmalign_jax.errors import UserError
from mmalign_jax.pairs.views.table import BY_NAME, Choice, Kind, Number, Value
from mmalign_jax.pairs.views.view import View

_CALL = re.compile(r"\s*(\w+)\s*(?:\((.*)\)\s*)?")
_NAMED = re.compile(r"(?:([^\W\d]\w*)\s*=)?\s*(.*)")


def names() -> tuple[str, ...]:
    return tuple(BY_NAME)


def usage(name: str) -> str:
    """A line that says how view `name` is written: its arguments, what they may be, and their defaults."""
    each = (f"{argument.name} ({argument.allowed}, by default {argument.default})" for argument in BY_NAME[name].arguments)
    return f"{name}: " + (", ".join(each) or "no arguments")


def parse(text: str, where: str = "view") -> View:
    """Reads a view: a name, and its arguments in brackets, by place or by name, as in "random_crop(0.01, scale_max=0.2)".

    Nothing is evaluated. Arguments that are not given keep their defaults.

    Args:
      where: what errors begin with, such as the setting's name.

    Raises:
      UserError: no such view or argument, a value that it does not take, or another form; the message says what is known.
    """
    call = _CALL.fullmatch(text)
    if not call:
        raise UserError(f"{where}: {text!r} is no view. Write a name, and arguments in brackets if any, as in diffusion(500)")
    name, inner = call.groups()
    if name not in BY_NAME:
        raise UserError(f"{where}: no view {name!r}.{_nearest(name, names())} Known: {', '.join(names())}")
    kind = BY_NAME[name]
    written = _bind(kind, inner, where)
    values = {argument.name: _value(kind, argument, written.get(argument.name), where) for argument in kind.arguments}
    for argument in kind.arguments:
        lower = isinstance(argument, Number) and argument.not_below
        if lower and values[argument.name] < values[lower]:
            raise UserError(f"{where}: {lower} = {values[lower]} is above {argument.name} = {values[argument.name]}. {_help(name)}")
    return View(name, tuple(values.items()))


def _bind(kind: Kind, inner: str | None, where: str) -> dict[str, str]:
    """Which argument is given which text."""
    known = [argument.name for argument in kind.arguments]
    written: dict[str, str] = {}
    for place, item in enumerate(inner.split(",") if inner and inner.strip() else ()):
        key, value = _NAMED.fullmatch(item.strip()).groups()
        if key is None:
            if place >= len(known):
                raise UserError(f"{where}: {kind.name} takes at most {len(known)} arguments. {_help(kind.name)}")
            if list(written) != known[:place]:
                raise UserError(f"{where}: {kind.name}: {value!r} without a name stands behind a named argument. {_help(kind.name)}")
            key = known[place]
        elif key not in known:
            raise UserError(f"{where}: {kind.name} has no argument {key!r}.{_nearest(key, known)} {_help(kind.name)}")
        elif key in written:
            raise UserError(f"{where}: {kind.name}: {key} is given twice")
        written[key] = value.strip()
    return written


def _value(kind: Kind, argument: Number | Choice, text: str | None, where: str) -> Value:
    if text is None:
        return argument.default
    try:
        return argument.read(text)
    except ValueError:
        raise UserError(f"{where}: {kind.name}: {argument.name} must be {argument.allowed}, got {text!r}. {_help(kind.name)}") from None


def _help(name: str) -> str:
    return f"Known: {usage(name)}"


def _nearest(key: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(key, list(known), n=1)
    return f" Did you mean {match[0]}?" if match else ""
