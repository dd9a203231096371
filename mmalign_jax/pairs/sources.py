"""Where answers to a prompt come from. Sources by name: `("policy", "diffusion(500)")`; the name of a view stands for answers under it.

Every source is called with the policy's parameters, prompts and the number of a draw, and gives a list of answers for each prompt.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mmalign_jax.config import Config, JudgeConfig
from mmalign_jax.data.layout import RowLayout, RowTokens, lay_out_pictures, tokenize
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.hf.processor import Processor
from mmalign_jax.mentions import Mentions
from mmalign_jax.pairs import judge, views
from mmalign_jax.pairs.calls import Call, Choice, Number, Table, Value, written
from mmalign_jax.pairs.judge.editor import Editor
from mmalign_jax.pairs.judge.settings import asks_of, check_asked
from mmalign_jax.pairs.own_answers import OWN, Own, OwnAnswers, Prompt
from mmalign_jax.pairs.rows import layout_of
from mmalign_jax.pairs.scorers import reference_text, shown
from mmalign_jax.pairs.sentences import swap_yes_no
from mmalign_jax.pairs.teacher_forced import WHERE, TeacherForced
from mmalign_jax.pairs.views.parsing import TABLE as VIEW_TABLE
from mmalign_jax.pairs.views.table import BY_NAME as VIEWS
from mmalign_jax.types import PreferenceRecord, record_key


@runtime_checkable
class Source(Protocol):
    """Gives answers to prompts, in order; each a function of (seed, record, draw), and of the policy where it writes them.

    Raises:
      DataError, UserError: a record lacks what its answers are made from.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, params: dict, prompts: Sequence[Prompt], draw: int) -> list[list[Own]]: ...


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of source that is not a view.

    Args:
      online: whether it can be asked between the steps of a run.
      drawn: whether the policy draws its answers, `count` of them to a prompt; otherwise there is one, or the set's own number.
    """

    name: str
    description: str
    arguments: tuple[Number | Choice | Call, ...] = ()
    online: bool = False
    drawn: bool = False


@dataclasses.dataclass(frozen=True)
class Named:
    """A source as it was written: its name and arguments."""

    name: str
    arguments: Mapping[str, Value]

    @property
    def view(self) -> views.View | None:
        """What its answers see, where it is a view."""
        return views.View(self.name, tuple(self.arguments.items())) if self.name in VIEWS else None

    @property
    def seen(self) -> views.View | None:
        """What the policy sees in the place of the pictures, where that is a view."""
        return views.parse(self.arguments["view"]) if self.name == "argmax" else self.view

    @property
    def online(self) -> bool:
        return self.view is not None or _KINDS[self.name].online

    def most(self, count: int) -> int:
        """Answers to a prompt, where `count` are drawn; of the set's own at least so many."""
        if self.view is not None or _KINDS[self.name].drawn:
            return count
        return 2 if self.name == "dataset" else 1

    def __str__(self) -> str:
        return written(self.name, self.arguments)


def parse(texts: Sequence[str], where: str = "config.samples.sources") -> tuple[Named, ...]:
    """Reads sources.

    Raises:
      UserError: there is none, one comes twice, a view needs more than a picture, or see `calls.Table.read`.
    """
    if not texts:
        raise UserError(f"{where}: answers come from somewhere. Known: {', '.join(_TABLE.kinds)}")
    out = []
    for text in texts:
        named = Named(*_TABLE.read(text, where))
        if named in out:
            raise UserError(f"{where}: {text} comes twice")
        if named.seen is not None and named.seen.needs:
            raise UserError(f"{where}: {named.seen.name} needs {', '.join(sorted(named.seen.needs))}, which are not at hand when answers are drawn")
        out.append(named)
    return tuple(out)


def names() -> tuple[str, ...]:
    """All but the views."""
    return tuple(_KINDS)


def summary(name: str) -> str:
    return _KINDS[name].description


def check_settings(named: Sequence[Named], config: Config, processor: Processor, mentions: Mentions | None) -> None:
    """Raises UserError for a source that lacks its settings, or that this model cannot be asked for."""
    for one in named:
        if one.name == "edit":
            edit_prompt(config.judge)
        if one.name == "swap" and mentions is None:
            raise UserError("config.samples.synonyms: the source swap looks words up in a table; give a JSON file: kind -> words that name it")
        if one.name == "continued" and processor.traits.prefix_attends:
            raise UserError("config.samples.sources: this model's prompt sees all of itself, so a reference cannot be continued behind it")


def open_sources(
    named: Sequence[Named], policy: Pretrained, config: Config, layout: RowLayout, rows: int, mentions: Mentions | None, replies: Path
) -> tuple[Source, ...]:
    """The sources, ready to be asked.

    Args:
      layout, rows: of the policy's prompts, see `OwnAnswers`.
      mentions: the table of `swap`.
      replies: file of an editor's replies, unless `config.judge.replies` names one.

    Raises:
      UserError: see `check_settings`.
    """
    check_settings(named, config, policy.processor, mentions)
    samples, processor = config.samples, policy.processor
    drawn = (policy.model, processor, policy.mesh, samples, layout, rows)
    out: list[Source] = []
    for one in named:
        if one.name == OWN or one.view is not None:
            out.append(OwnAnswers(*drawn, view=one.view))
        elif one.name == "continued":
            out.append(Continued(OwnAnswers(*drawn, source=str(one)), processor, layout, one.arguments["cut"]))
        elif one.name == "argmax":
            place = (policy.model, processor, policy.mesh, samples.seed, layout, rows)
            out.append(Argmax(TeacherForced(str(one), *place, one.seen, one.arguments["where"])))
        elif one.name == "dataset":
            out.append(Dataset(processor))
        elif one.name == "swap":
            out.append(Swap(str(one), processor, mentions, one.arguments["count"], samples.seed))
        elif one.name == "edit":
            prompt = edit_prompt(config.judge)
            out.append(Edit(processor, Editor(asks_of(config, policy, prompt.read, replies), prompt)))
    return tuple(out)


def edit_prompt(config: JudgeConfig) -> judge.Prompt:
    """What the source edit asks.

    Raises:
      UserError: nobody is named who is asked, or the prompt is not one that edits.
    """
    check_asked(config, "the source edit")
    prompt = judge.Prompt.load(config.edit_prompt)
    if prompt.kind != "edit":
        raise UserError(f'config.judge.edit_prompt: {config.edit_prompt} gives verdicts; a prompt of kind "edit" rewrites answers')
    return prompt


def _given(processor: Processor, text: str, source: str) -> Own:
    """An answer that nobody drew."""
    ids = processor.answer_ids(text)[0]
    return Own(ids, np.full(len(ids), np.nan, np.float32), text, True, source)


def _reference(record: PreferenceRecord, source: str) -> str:
    text = reference_text(record)
    if not text or record.prefix or not record.complete:
        raise UserError(f"config.samples.sources: {source} starts from a whole reference answer, which record {record.id} does not have")
    return text


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The answers that the set has, to be scored anew."""

    processor: Processor
    name: str = "dataset"

    def __call__(self, params: dict, prompts: Sequence[Prompt], draw: int) -> list[list[Own]]:
        for record in (prompt.record for prompt in prompts):
            _reference(record, "dataset")
            if unreadable := next((one.text for one in record.responses if not self.processor.readable(one.text)), None):
                raise UserError(f"record {record.id}: the tokenizer cannot read the answer {unreadable[:60]!r}")
        return [[_given(self.processor, one.text, self.name) for one in prompt.record.responses] for prompt in prompts]


@dataclasses.dataclass(frozen=True)
class Continued:
    """The reference's beginning, up to the share `cut` of its words, which the policy goes on from without the pictures."""

    own: OwnAnswers
    processor: Processor
    layout: RowLayout
    cut: float

    @property
    def name(self) -> str:
        return self.own.name

    def __call__(self, params: dict, prompts: Sequence[Prompt], draw: int) -> list[list[Own]]:
        kept = [self._beginning(prompt.record) for prompt in prompts]
        limits = {"max_pixels": self.layout.max_pixels, "max_bytes": self.layout.max_bytes}
        rows: list[RowTokens] = []
        records = [_without_pictures(prompt.record) for prompt in prompts]
        for record, ids in zip(records, kept, strict=True):
            row = tokenize(record, None, self.processor, 0, **limits)
            rows.append(dataclasses.replace(row, prefix=np.concatenate([row.prefix, ids])))
        for record, row in zip(records, rows, strict=True):
            if (longest := len(row.prefix) + self.own.max_tokens) > self.layout.max_positions:
                raise UserError(
                    f"config.samples.max_tokens: with the beginning of its reference, record {record.id} may come to {longest} positions, the "
                    f"model was made for {self.layout.max_positions}"
                )
        layout = layout_of(rows, self.processor, limits)
        blind = [Prompt(record, row, lay_out_pictures(record, self.processor, layout, row)) for record, row in zip(records, rows, strict=True)]
        drawn = self.own(params, blind, draw, layout)
        return [[self._whole(ids, one) for one in each] for ids, each in zip(kept, drawn, strict=True)]

    def _beginning(self, record: PreferenceRecord) -> np.ndarray:
        words = _reference(record, "continued").split(" ")
        text = " ".join(words[: int(self.cut * len(words))])
        return self.processor.answer_ids(text)[0][:-1] if text.strip() else np.zeros(0, np.int32)

    def _whole(self, ids: np.ndarray, one: Own) -> Own:
        tokens = np.concatenate([ids, one.tokens]).astype(np.int32)
        return Own(tokens, np.full(len(tokens), np.nan, np.float32), self.processor.decode(tokens), one.finished, self.name)


def _without_pictures(record: PreferenceRecord) -> PreferenceRecord:
    turns = tuple(dataclasses.replace(turn, parts=tuple(part for part in turn.parts if part.media is None)) for turn in record.turns)
    return dataclasses.replace(record, turns=turns, media=())


@dataclasses.dataclass(frozen=True)
class Argmax:
    """What the policy finds likeliest at each token of the reference, under a view of the pictures."""

    said: TeacherForced

    @property
    def name(self) -> str:
        return self.said.name

    def __call__(self, params: dict, prompts: Sequence[Prompt], draw: int) -> list[list[Own]]:
        references = [_reference(prompt.record, "argmax") for prompt in prompts]
        return [[one] for one in self.said(params, prompts, references, draw)]


@dataclasses.dataclass(frozen=True)
class Swap:
    """The reference with some of the kinds of things that it names exchanged for others, which neither it nor `meta["objects"]` names."""

    name: str
    processor: Processor
    mentions: Mentions
    count: int
    seed: int

    def __call__(self, params: dict, prompts: Sequence[Prompt], draw: int) -> list[list[Own]]:
        return [self._answers(prompt.record, draw) for prompt in prompts]

    def _answers(self, record: PreferenceRecord, draw: int) -> list[Own]:
        """One; none where the reference names nothing and begins with neither yes nor no, or where nothing could stand in its place."""
        text = _reference(record, "swap")
        found = self.mentions(text)
        there = {mention.kind for mention in found}
        turned = swap_yes_no(text)
        if "objects" in record.meta:  # what else it names, it denies
            known = shown(record, self.mentions)
            found, there = [mention for mention in found if mention.kind in known], there | known
        elif turned is not None:
            found = []  # it may deny what it names
        kinds = list(dict.fromkeys(mention.kind for mention in found))
        if not kinds:
            return [] if turned is None else [_given(self.processor, turned[0], self.name)]
        drawn = random.Random(f"{self.seed} {record_key(record.id)} {draw}")
        chosen = drawn.sample(kinds, min(self.count, len(kinds)))
        others: dict[str, str] = {}
        for kind in chosen:
            vowel = {_begins_with_vowel(text[mention.start : mention.stop]) for mention in found if mention.kind == kind}
            free = [other for other in self.mentions.kinds if other not in there and vowel == {_begins_with_vowel(other)}]
            if not free:
                return []
            there.add(other := drawn.choice(free))
            others[kind] = other
        for mention in reversed(found):  # from the back, so that places stay true
            if mention.kind in others:
                like = text[mention.start : mention.stop]
                name = self.mentions.name(others[mention.kind], like)
                text = text[: mention.start] + (name[:1].upper() + name[1:] if like[:1].isupper() else name) + text[mention.stop :]
        return [_given(self.processor, text, self.name)]


def _begins_with_vowel(word: str) -> bool:
    """Whether "an" stands before it."""
    return word[:1].lower() in "aeiou"


@dataclasses.dataclass(frozen=True)
class Edit:
    """The reference as a chat model rewrites it (`config.judge.edit_prompt`). What the tokenizer cannot read is no answer."""

    processor: Processor
    editor: Editor
    name: str = "edit"

    def __call__(self, params: dict, prompts: Sequence[Prompt], draw: int) -> list[list[Own]]:
        texts = self.editor([(prompt.record, _reference(prompt.record, "edit")) for prompt in prompts])
        return [[_given(self.processor, text, self.name)] if text is not None and self.processor.readable(text) else [] for text in texts]


_KINDS = {
    kind.name: kind
    for kind in (
        Kind(OWN, "`count` answers of the policy to the prompt and its pictures.", online=True, drawn=True),
        Kind(
            "continued",
            "`count` answers that begin as the reference, up to the share `cut` of its words, and go on without the pictures (MPO's DropoutNTP, "
            "arXiv 2411.10442).",
            (Number("cut", 0.5, low=0.0, high=0.95),),
            drawn=True,
        ),
        Kind(
            "argmax",
            "the token that the policy finds likeliest at each place of the reference, given the reference before it and the pictures under `view` "
            "(POVID, arXiv 2402.11411, made beforehand); with `where=changed` only where the view changes it.",
            (Call("view", str(views.parse("diffusion(500,pixel)")), VIEW_TABLE), Choice("where", WHERE[0], WHERE)),
        ),
        Kind("dataset", "the answers that the set has, to be scored anew."),
        Kind(
            "swap",
            "the reference with `count` of the kinds of things that it names exchanged for others that it does not name, by the table of the scorer "
            "`objects`; where it names nothing that is there, with its leading yes or no exchanged.",
            (Number("count", 1, low=1, high=1000),),
        ),
        Kind("edit", "the reference as the chat model of `config.judge` rewrites it; by default it adds a mistake."),
    )
}
_TABLE = Table("source", {**_KINDS, **VIEWS}, "policy or diffusion(500)")
