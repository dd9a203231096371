"""Verdicts on answers: which of two is better, or how good one is."""

import dataclasses
from collections.abc import Sequence

from mmalign_jax.pairs.judge.asker import Asks, Counts, Question
from mmalign_jax.pairs.judge.prompts import Prompt
from mmalign_jax.types import Media


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is judged: a question about pictures, and one answer to it, or two.

    Args:
      reference: what is known to be true, for prompts that show it.
    """

    question: str
    first: str
    second: str = ""
    reference: str = ""
    pictures: tuple[Media, ...] = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says.

    Args:
      value: of a comparison 1.0 for the first, 0.0 for the second and 0.5 for a tie, the mean of both orders; of a score the score.
        None when there is no verdict.
      problem: why there is none, "" when there is one.
      replies: the judge's own words, one for each order.
    """

    value: float | None
    problem: str
    replies: tuple[str, ...]


class Judge:
    """A prompt that somebody is asked.

    Args:
      asks: who; with `prompt.read`, so that only replies with a verdict are of use.
      both_orders: comparisons are asked in both orders, since judges prefer places (arXiv 2306.05685).
    """

    def __init__(self, asks: Asks, prompt: Prompt, *, both_orders: bool = True):
        self._asks, self._prompt = asks, prompt
        self._both_orders = both_orders and prompt.kind == "compare"

    @property
    def counts(self) -> Counts:
        return self._asks.counts

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict for each, in order. What fails in the end has none, and says why; the same call later asks for it again.

        Raises:
          UserError: a server refuses requests for good (key, model, address).
        """
        questions = [self._questions(answer) for answer in answers]
        replies = iter(self._asks([one for each in questions for one in each]))
        return [self._verdict([next(replies) for _ in each]) for each in questions]

    def _questions(self, answer: Answer) -> list[Question]:
        """One, or one for each order."""
        shared = {"question": answer.question, "reference": answer.reference}
        if self._prompt.kind == "score":
            texts = [self._prompt.fill(answer=answer.first, **shared)]
        else:
            orders = [(answer.first, answer.second), (answer.second, answer.first)][: 1 + self._both_orders]
            texts = [self._prompt.fill(first=first, second=second, **shared) for first, second in orders]
        return [Question(text, answer.pictures) for text in texts]

    def _verdict(self, replies: Sequence[tuple[str, str]]) -> Verdict:
        texts = tuple(text for text, _ in replies)
        if problem := next((problem for _, problem in replies if problem), ""):
            return Verdict(None, problem, texts)
        values = [self._prompt.read(text) for text in texts]
        if self._prompt.kind == "compare":
            of_order = ({"first": 1.0, "tie": 0.5, "second": 0.0}, {"first": 0.0, "tie": 0.5, "second": 1.0})
            values = [of_order[order][value] for order, value in enumerate(values)]
        return Verdict(sum(values) / len(values), "", texts)
