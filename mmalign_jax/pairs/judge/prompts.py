"""What a judge is asked, and how its reply is read: a TOML file each, the package's own in `assets/prompts`.

    kind = "compare"                      # which of two answers is better; "score": how good one is; or "edit": another version of one
    text = '''... {question} ... {first} ... {second} ... {reference} ...'''
    # compare: one of these groups matches; score: (?P<score>...); edit: (?P<text>...)
    verdict = '''\\[\\[(?P<first>A)|(?P<second>B)|(?P<tie>C)\\]\\]'''
    scale = [0, 10]                       # score: least and most
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from mmalign_jax.errors import UserError

FIELDS = {"compare": ("question", "first", "second", "reference"), "score": ("question", "answer", "reference"), "edit": ("question", "answer")}
_GROUPS = {"compare": {"first", "second", "tie"}, "score": {"score"}, "edit": {"text"}}
_PLACE = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with places for what is judged, and the pattern of its verdict. The last match in a reply counts."""

    kind: str
    text: str
    verdict: re.Pattern[str]
    scale: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def load(cls, name: str) -> "Prompt":
        """A prompt of the package by name, or a TOML file by path.

        Raises:
          UserError: there is none, or it is not a prompt; the message says why.
        """
        own = resources.files("mmalign_jax") / "assets" / "prompts" / f"{name}.toml"
        file = own if re.fullmatch(r"\w+", name) and own.is_file() else Path(name)
        if not file.is_file():
            raise UserError(f"{name}: no prompt of that name, and no file; the package has {', '.join(names())}")
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not TOML ({error})") from error
        return cls._checked(values, str(file))

    @classmethod
    def _checked(cls, values: Mapping, where: str) -> "Prompt":
        kind, text, pattern = values.get("kind"), values.get("text"), values.get("verdict")
        if unknown := sorted(values.keys() - {"kind", "text", "verdict", "scale"}):
            raise UserError(f"{where}: {unknown[0]} is nothing that a prompt has")
        if kind not in FIELDS or not isinstance(text, str) or not isinstance(pattern, str):
            raise UserError(f'{where}: a prompt has kind ("compare", "score" or "edit"), text and verdict')
        if odd := sorted(set(_PLACE.findall(text)) - set(FIELDS[kind])):
            raise UserError(f"{where}: {{{odd[0]}}} has no value; the text of kind {kind} may hold {', '.join(FIELDS[kind])}")
        try:
            verdict = re.compile(pattern, re.IGNORECASE | (re.DOTALL if kind == "edit" else 0))
        except re.error as error:
            raise UserError(f"{where}: verdict is no regular expression ({error})") from error
        groups = set(verdict.groupindex)
        if not groups or not groups <= _GROUPS[kind]:
            raise UserError(f"{where}: verdict needs named groups among {', '.join(sorted(_GROUPS[kind]))}")
        scale = values.get("scale", [0.0, 1.0])
        numbers = isinstance(scale, list) and len(scale) == 2 and all(isinstance(end, (int, float)) for end in scale)
        if not numbers or not scale[0] < scale[1]:
            raise UserError(f"{where}: scale is two numbers that rise, such as [0, 10], got {scale!r}")
        low, high = scale
        return cls(kind, text, verdict, (float(low), float(high)))

    def fill(self, **values: str) -> str:
        """The text with its places filled, in one pass: what stands in an answer is never taken for a place."""
        return _PLACE.sub(lambda match: values[match[1]], self.text)

    def read(self, reply: str) -> str | float | None:
        """The verdict of a reply: "first", "second", "tie", a score or a text; None when there is none, or a score off the scale."""
        found = list(self.verdict.finditer(reply))
        if not found:
            return None
        if self.kind == "compare":
            return found[-1].lastgroup
        if self.kind == "edit":
            return found[-1]["text"] or None
        try:
            score = float(found[-1]["score"])
        except ValueError:
            return None
        return score if self.scale[0] <= score <= self.scale[1] else None


def names() -> list[str]:
    """The package's own prompts."""
    return sorted(file.name.removesuffix(".toml") for file in (resources.files("mmalign_jax") / "assets" / "prompts").iterdir())
