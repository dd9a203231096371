"""Prompts -> answers to them, of the policy and of other sources, and what each is worth."""

import dataclasses
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from mmalign_jax.config import Config
from mmalign_jax.data.layout import RowLayout, lay_out_pictures, tokenize
from mmalign_jax.data.plan import Records, RowPlan, plan_rows
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.hf.processor import Processor
from mmalign_jax.mentions import Mentions, read_synonyms
from mmalign_jax.pairs import experts, sources
from mmalign_jax.pairs.bdhs import check_one_process
from mmalign_jax.pairs.own_answers import Own, Prompt
from mmalign_jax.pairs.scorers import Scored, Scorers, Truth, parse
from mmalign_jax.pairs.selectors import Candidate
from mmalign_jax.pairs.selectors import parse as parse_selector
from mmalign_jax.pairs.sources import Edit, Source
from mmalign_jax.scenes import language
from mmalign_jax.types import PreferenceRecord


@dataclasses.dataclass(frozen=True)
class Answered:
    """A prompt with the answers to it and what each is worth."""

    prompt: Prompt
    answers: Sequence[Own]
    scored: Sequence[Scored]
    without: Sequence[str] = ()  # sources that had no answer to it

    def candidates(self) -> list[Candidate]:
        return [_candidate(one, scored.total) for one, scored in zip(self.answers, self.scored, strict=True)]


def _candidate(answer: Own, score: float | None) -> Candidate:
    return Candidate(answer.text, answer.source, score, answer.finished, len(answer.tokens))


@dataclasses.dataclass(frozen=True)
class Answerer:
    """Records -> answers to them, scored."""

    processor: Processor
    sources: tuple[Source, ...]
    scorers: Scorers
    layout: RowLayout

    def __call__(self, params: dict, records: Sequence[PreferenceRecord], draw: int) -> list[Answered]:
        """In order; a record's answers in the order of the sources.

        Raises:
          DataError, UserError: a prompt cannot be laid out, or its answers cannot be scored.
        """
        prompts = []
        limits = {"max_pixels": self.layout.max_pixels, "max_bytes": self.layout.max_bytes}
        for record in records:
            row = tokenize(record, None, self.processor, 0, **limits)
            prompts.append(Prompt(record, row, lay_out_pictures(record, self.processor, self.layout, row)))
        of_sources = [source(params, prompts, draw) for source in self.sources]
        by_record = list(zip(*of_sources, strict=True))
        answers = [[one for each in of_record for one in each] for of_record in by_record]
        scored = self.scorers(records, [[_candidate(one, None) for one in each] for each in answers], self.processor.readable)
        without = [[source.name for source, each in zip(self.sources, of_record, strict=True) if not each] for of_record in by_record]
        return [Answered(*one) for one in zip(prompts, answers, scored, without, strict=True)]


    @property
    def counts(self) -> dict[str, int]:
        """How those who were asked answered so far, by the names of metrics."""
        edits = {name: count for source in self.sources if isinstance(source, Edit) for name, count in source.editor.counts.items()}
        return self.scorers.counts | edits


def plan_answers(
    policy: Pretrained, records: Records, config: Config, *, answers: int, rows: int, replies: Path
) -> tuple[Answerer, RowPlan]:
    """An answerer for the prompts of records that fit the limits of `config.data`, and which these are.

    Args:
      answers: K of the plan: what rows hold beside answers of the policy.
      rows: prompts of a device batch.
      replies: file of what chat models reply, unless `config.judge.replies` names one.

    Raises:
      DataError: a row that does not fit, see `plan_rows`.
      UserError: several processes, scorers that are wrong or know nothing of a record, or answers that may come to more positions than the
        model has.
    """
    check_one_process()
    samples, processor = config.samples, policy.processor
    plan = plan_rows(records, processor, config.data, answers=answers)
    prompts = dataclasses.replace(plan.layout, answers=0)
    if (longest := prompts.prefix_slots + samples.max_tokens) > prompts.max_positions:
        raise UserError(
            f"config.samples.max_tokens: with prompts of {prompts.prefix_slots} tokens answers may come to {longest} positions, the model was made "
            f"for {prompts.max_positions}"
        )
    scorers = experts.with_experts(scorers_of(config), policy, config, replies)
    for index in dict.fromkeys(plan.items[:, 0].tolist()):
        scorers.check(records[index])
    opened = sources.open_sources(sources.parse(samples.sources), policy, config, prompts, rows, mentions_of(config), replies)
    return Answerer(processor, opened, scorers, prompts), plan


def check_settings(config: Config, processor: Processor, *, of_samples: bool) -> None:
    """Raises UserError for sources, scorers and selectors that are written wrongly, lack their settings, or do not go together.

    Args:
      of_samples: whether the objective learns from rewards, so that no selector is asked.
    """
    samples = config.samples
    scorers_of(config)
    named = sources.parse(samples.sources)
    sources.check_settings(named, config, processor, mentions_of(config))
    selector = parse_selector(samples.selector, "config.samples.selector")
    if config.pairs.when == "online" and (late := [one.name for one in named if not one.online]):
        raise UserError(f"config.samples.sources: {late[0]} gives answers before training (config.pairs.when = offline), not between its steps")
    if of_samples:
        return
    if selector.reads_scores and not samples.scorers:
        raise UserError(f"config.samples.scorers: {selector.name} goes by scores; say what answers are worth")
    if samples.gap and not selector.compares:
        raise UserError(f"config.samples.gap: {selector.name} does not go by scores; leave it 0")
    if config.pairs.when == "online" and selector.makes != "prefs":
        raise UserError(f"config.samples.selector: {selector.name} makes {selector.rows_in_words}, which train offline (config.pairs.when)")
    drawn = sum(one.most(samples.count) for one in named)
    if drawn + selector.reads_reference < selector.least:
        few = "one answer is compared with nothing" if drawn < 2 else f"{selector.name} takes {selector.least} answers, of {drawn} that are asked for"
        raise UserError(f"config.samples.count: {few}; draw several, or give another source")
    if selector.name == "by_source" and len(named) < 2:
        raise UserError("config.samples.sources: by_source sets answers of a source above those of another; give two")


def scorers_of(config: Config) -> Scorers:
    """What `config.samples` says that an answer is worth, without the experts.

    Raises:
      UserError: a scorer is written wrongly, or lacks its table or its other settings.
    """
    try:
        pattern = re.compile(config.samples.pattern) if config.samples.pattern else None
    except re.error as error:
        raise UserError(f"config.samples.pattern: no regular expression ({error})") from error
    scorers = parse(config.samples.scorers, Truth(mentions_of(config), config.samples.max_tokens, pattern))
    experts.check_settings(scorers, config)
    return scorers


def mentions_of(config: Config) -> Mentions | None:
    """The table in which the scorer objects and the source swap look words up."""
    if config.samples.synonyms:
        return Mentions(read_synonyms(Path(config.samples.synonyms)))
    return Mentions(language.synonyms()) if config.data.format == "scenes" else None


def summary(answered: Sequence[Answered]) -> dict[str, float]:
    """Means over the answers: `samples/score`, `samples/score_NAME` of each scorer where it says something, `samples/length` (tokens),
    `samples/finished`; `samples/no_verdict` is the share of those that somebody did not judge, where there are any."""
    scored = [scored for each in answered for scored in each.scored]
    if not scored:
        return {}
    answers = [one for each in answered for one in each.answers]
    known = [one.total for one in scored if one.total is not None]
    totals: dict[str, list[float]] = {"samples/score": known} if known else {}
    for one in scored:
        for name, value in one.parts.items():
            totals.setdefault(f"samples/score_{name}", []).append(value)
    out = {name: statistics.fmean(values) for name, values in totals.items()}
    if len(known) < len(scored):
        out["samples/no_verdict"] = 1 - len(known) / len(scored)
    return out | {
        "samples/length": statistics.fmean(len(one.tokens) for one in answers),
        "samples/finished": statistics.fmean(one.finished for one in answers),
    }
