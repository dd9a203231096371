"""Prompts -> the policy's answers to them, and what each is worth."""

import dataclasses
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
from mmalign_jax.pairs.bdhs import check_one_process
from mmalign_jax.pairs.own_answers import Own, OwnAnswers, Prompt
from mmalign_jax.pairs.scorers import Scored, Scorers, Truth, parse
from mmalign_jax.pairs.selectors import Candidate
from mmalign_jax.scenes import language
from mmalign_jax.types import PreferenceRecord

OWN = "policy"  # the source of an answer that is a sample


@dataclasses.dataclass(frozen=True)
class Answered:
    """A prompt with the policy's answers and what each is worth."""

    prompt: Prompt
    answers: Sequence[Own]
    scored: Sequence[Scored]

    def candidates(self) -> list[Candidate]:
        both = zip(self.answers, self.scored, strict=True)
        return [Candidate(one.text, OWN, scored.total, one.finished, len(one.tokens)) for one, scored in both]


@dataclasses.dataclass(frozen=True)
class Answerer:
    """Records -> what the policy answers to them, scored."""

    processor: Processor
    sampler: OwnAnswers
    scorers: Scorers
    layout: RowLayout

    def __call__(self, params: dict, records: Sequence[PreferenceRecord], draw: int) -> list[Answered]:
        """In order; see `OwnAnswers`.

        Raises:
          DataError, UserError: a prompt cannot be laid out, or its answers cannot be scored.
        """
        prompts = []
        limits = {"max_pixels": self.layout.max_pixels, "max_bytes": self.layout.max_bytes}
        for record in records:
            row = tokenize(record, None, self.processor, 0, **limits)
            prompts.append(Prompt(record, row, lay_out_pictures(record, self.processor, self.layout, row)))
        answers = self.sampler(params, prompts, draw)
        unscored = [[Candidate(one.text, OWN, None, one.finished, len(one.tokens)) for one in each] for each in answers]
        scored = self.scorers(records, unscored)
        return [Answered(*one) for one in zip(prompts, answers, scored, strict=True)]


def plan_answers(policy: Pretrained, records: Records, config: Config, *, answers: int, rows: int) -> tuple[Answerer, RowPlan]:
    """An answerer for the prompts of records that fit the limits of `config.data`, and which these are.

    Args:
      answers: K of the plan: what rows hold beside answers of the policy.
      rows: prompts of a device batch.

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
    scorers = scorers_of(config)
    for index in dict.fromkeys(plan.items[:, 0].tolist()):
        scorers.check(records[index])
    sampler = OwnAnswers(policy.model, processor, policy.mesh, samples, prompts, rows)
    return Answerer(processor, sampler, scorers, prompts), plan


def scorers_of(config: Config) -> Scorers:
    """What `config.samples` says that an answer is worth.

    Raises:
      UserError: a scorer is written wrongly, or lacks its table.
    """
    return parse(config.samples.scorers, Truth(_mentions(config), config.samples.max_tokens))


def _mentions(config: Config) -> Mentions | None:
    """The table in which the scorer of objects looks words up."""
    if config.samples.synonyms:
        return Mentions(read_synonyms(Path(config.samples.synonyms)))
    return Mentions(language.synonyms()) if config.data.format == "scenes" else None


def summary(answered: Sequence[Answered]) -> dict[str, float]:
    """Means over the answers: `samples/score`, `samples/score_NAME` of each scorer where it says something, `samples/length` (tokens),
    `samples/finished`."""
    scored = [scored for each in answered for scored in each.scored]
    if not scored:
        return {}
    answers = [one for each in answered for one in each.answers]
    totals: dict[str, list[float]] = {"samples/score": [one.total for one in scored]}
    for one in scored:
        for name, value in one.parts.items():
            totals.setdefault(f"samples/score_{name}", []).append(value)
    out = {name: statistics.fmean(values) for name, values in totals.items()}
    return out | {
        "samples/length": statistics.fmean(len(one.tokens) for one in answers),
        "samples/finished": statistics.fmean(one.finished for one in answers),
    }
