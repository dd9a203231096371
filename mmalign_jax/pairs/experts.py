"""Scorers that are more than a rule, opened from their settings: a judge behind an endpoint, a reward model, CLIP, a critic of single claims."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmalign_jax.config import Config
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs.claims import Claims
from mmalign_jax.pairs.clip_score import ClipScorer
from mmalign_jax.pairs.judge import Answer, Judge, Prompt
from mmalign_jax.pairs.judge.settings import asks_of, check_asked, question_of
from mmalign_jax.pairs.reward_model import RewardModel
from mmalign_jax.pairs.scorers import Expert, Scorers, reference_text
from mmalign_jax.types import PreferenceRecord


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
            experts[name] = Judged(Judge(asks_of(config, policy, prompt.read, replies), prompt, both_orders=config.judge.both_orders), prompt)
        elif name == "reward_model":
            model = RewardModel.read(config.samples.reward_model, policy.mesh, config.model.compute_dtype, limits=config.data)
            experts[name] = Model(model.scores)
        elif name == "clip":
            clip = ClipScorer.read(config.samples.clip, limits=config.data)
            experts[name] = Model(clip.scores, clip.check)
        else:
            critic = Pretrained.read(Path(config.samples.critic), policy.mesh, config.model.compute_dtype) if config.samples.critic else policy
            experts[name] = Claims(critic, config.samples.claim, limits=config.data)
    return dataclasses.replace(scorers, experts=experts)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A chat model's verdicts: of a prompt that asks for a score, its share of the scale; of a comparison, the mean share of the other
    answers to the prompt that an answer wins against, a tie being half."""

    judge: Judge
    prompt: Prompt

    @property
    def counts(self) -> Mapping[str, int]:
        return self.judge.counts.metrics("judge")

    def check(self, record: PreferenceRecord) -> None:
        if "{reference}" in self.prompt.text and not reference_text(record):
            raise UserError(f"config.judge.prompt: it shows the true answer, and record {record.id} has none")

    def __call__(self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[str]]) -> list[list[float | None]]:
        compares = self.prompt.kind == "compare"
        asked: list[Answer] = []
        for record, texts in zip(records, answers, strict=True):
            shared = {"question": question_of(record), "reference": reference_text(record), "pictures": record.media}
            sides = itertools.combinations(texts, 2) if compares else ((text, "") for text in texts)
            asked += [Answer(first=first, second=second, **shared) for first, second in sides]
        verdicts = iter([verdict.value for verdict in self.judge(asked)])
        if compares:
            return [_won(len(texts), {pair: next(verdicts) for pair in itertools.combinations(range(len(texts)), 2)}) for texts in answers]
        low, high = self.prompt.scale
        return [[None if (value := next(verdicts)) is None else (value - low) / (high - low) for _ in texts] for texts in answers]


def _won(count: int, first_wins: Mapping[tuple[int, int], float | None]) -> list[float | None]:
    """The share of its comparisons that each answer wins, of those with a verdict; None without any."""
    out: list[float | None] = []
    for one in range(count):
        known = {pair: value for pair, value in first_wins.items() if one in pair and value is not None}
        shares = [value if first == one else 1 - value for (first, _), value in known.items()]
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
