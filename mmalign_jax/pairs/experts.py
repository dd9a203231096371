"""Scorers that are more than a rule, opened from their settings: a judge behind an endpoint, a reward model, CLIP, a critic of single claims, the
policy's attention."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmalign_jax.config import Config, JudgeConfig
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs.attention_ratio import AttentionRatio
from mmalign_jax.pairs.claims import Claims
from mmalign_jax.pairs.clip_score import ClipScorer
from mmalign_jax.pairs.judge import Answer, Judge, Prompt
from mmalign_jax.pairs.judge.settings import asks_of, check_asked, question_of
from mmalign_jax.pairs.reward_model import RewardModel
from mmalign_jax.pairs.scorers import Expert, Scorers, reference_text
from mmalign_jax.types import PreferenceRecord

_TELLING = 8  # so many replies without one verdict are no accident


def check_settings(scorers: Scorers, config: Config) -> None:
    """Raises UserError for experts whose settings are missing or wrong, and for settings of experts that are not asked."""
    if "judge" in scorers.expected:
        check_asked(config.judge, "the scorer judge")
        if Prompt.load(config.judge.prompt).kind == "edit":
            raise UserError(f"config.judge.prompt: {config.judge.prompt} edits answers and gives no verdict on them; choose another one")
    for name in ("reward_model", "clip"):
        if (name in scorers.expected) != bool(getattr(config.samples, name)):
            raise UserError(f"config.samples.{name}: a directory goes with the scorer {name}, and only with it")
    if "claims" in scorers.expected and "{claim}" not in config.samples.claim:
        raise UserError("config.samples.claim: the question has {claim} where the sentence stands")
    if config.samples.critic and "claims" not in scorers.expected:
        raise UserError("config.samples.critic: a model goes with the scorer claims, and only with it")


def with_experts(scorers: Scorers, policy: Pretrained, config: Config, replies: Path) -> Scorers:
    """The scorers with their experts, who load their models now.

    Args:
      replies: file of the judge's replies, unless `config.judge.replies` names one.

    Raises:
      UserError: see `check_settings`; or a directory holds no such model.
    """
    check_settings(scorers, config)
    experts: dict[str, Expert] = {}
    for name in scorers.expected:
        if name == "judge":
            prompt = Prompt.load(config.judge.prompt)
            judge = Judge(asks_of(config, policy, prompt.read, replies), prompt, both_orders=config.judge.both_orders)
            experts[name] = Judged(judge, prompt, config.judge)
        elif name == "reward_model":
            model = RewardModel.read(config.samples.reward_model, policy.mesh, config.model.compute_dtype, limits=config.data)
            experts[name] = Model(model.scores)
        elif name == "clip":
            clip = ClipScorer.read(config.samples.clip, limits=config.data)
            experts[name] = Model(clip.scores, clip.check)
        elif name == "claims":
            critic = Pretrained.read(Path(config.samples.critic), policy.mesh, config.model.compute_dtype) if config.samples.critic else policy
            experts[name] = Claims(critic, config.samples.claim, limits=config.data)
        elif name == "attention":
            given = scorers.arguments(name)
            asked = (given["two"], given["three"], given["more"])
            experts[name] = AttentionRatio(policy, layer=given["layer"], per=given["per"], asked=asked, limits=config.data)
    return dataclasses.replace(scorers, experts=experts)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A chat model's verdicts: of a prompt that asks for a score, its share of the scale; of a comparison, the mean share of the other
    answers to the prompt that an answer wins against, a tie being half."""

    judge: Judge
    prompt: Prompt
    config: JudgeConfig

    @property
    def counts(self) -> Mapping[str, int]:
        return self.judge.counts.metrics("judge")

    def check(self, record: PreferenceRecord) -> None:
        if "{reference}" in self.prompt.text and not reference_text(record):
            raise UserError(f"config.judge.prompt: it shows the true answer, and record {record.id} has none")

    def __call__(self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[str]]) -> list[list[float | None]]:
        compares = self.prompt.kind == "compare"
        distinct = [list(dict.fromkeys(texts)) for texts in answers]
        asked: list[Answer] = []
        for record, texts in zip(records, distinct, strict=True):
            shared = {"question": question_of(record), "reference": reference_text(record), "pictures": record.media}
            sides = itertools.combinations(texts, 2) if compares else ((text, "") for text in texts)
            asked += [Answer(first=first, second=second, **shared) for first, second in sides]
        found = self.judge(asked)
        if len(found) >= _TELLING and all(verdict.value is None for verdict in found):
            raise UserError(
                f"config.judge.prompt: not one of {len(found)} replies has a verdict in the form that {self.config.prompt} asks for; the last is "
                f"{found[-1].replies[-1][:200]!r}"
            )
        verdicts = iter([verdict.value for verdict in found])
        if compares:
            first_wins = [{pair: next(verdicts) for pair in itertools.combinations(texts, 2)} for texts in distinct]
            return [_won(texts, known) for texts, known in zip(answers, first_wins, strict=True)]
        low, high = self.prompt.scale
        of_text = [{text: next(verdicts) for text in texts} for texts in distinct]
        share = lambda value: None if value is None else (value - low) / (high - low)  # noqa: E731
        return [[share(known[text]) for text in texts] for texts, known in zip(answers, of_text, strict=True)]


def _won(texts: Sequence[str], first_wins: Mapping[tuple[str, str], float | None]) -> list[float | None]:
    """The share of the others that each answer wins against, of those with a verdict; None without any. Equal texts are even."""

    def share(one: str, other: str) -> float | None:
        if one == other:
            return 0.5
        if (one, other) in first_wins:
            return first_wins[one, other]
        return None if (value := first_wins[other, one]) is None else 1 - value

    out: list[float | None] = []
    for number, one in enumerate(texts):
        shares = [value for at, other in enumerate(texts) if at != number and (value := share(one, other)) is not None]
        out.append(sum(shares) / len(shares) if shares else None)
    return out


def _of_all(record: PreferenceRecord) -> None:
    """Any record will do."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that scores whole answers, and which records it can score them of."""

    scores: Callable[[Sequence[PreferenceRecord], Sequence[Sequence[str]]], list[list[float]]]
    check: Callable[[PreferenceRecord], None] = _of_all
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[str]]) -> list[list[float | None]]:
        return [list(each) for each in self.scores(records, answers)]
