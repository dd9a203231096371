"""Verdicts on many answers at a time: asked at once, again where something failed, kept on disk, counted, none lost and none asked twice."""

import collections
import concurrent.futures
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import requests

from mmalign_jax.pairs.judge.endpoint import Endpoint, NoReplyError
from mmalign_jax.pairs.judge.prompts import Prompt
from mmalign_jax.pairs.judge.replies import Replies, key_of
from mmalign_jax.types import Media

_LONGEST_WAIT_S = 60.0


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


@dataclasses.dataclass
class Counts:
    """How the asking went: replies from the server and from disk, failures that were asked again by reason, and questions without verdict."""

    asked: int = 0
    kept: int = 0
    failures: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    lost: int = 0


class Judge:
    """A prompt asked of an endpoint.

    Args:
      replies: those that are there are not asked for again. Only replies with a verdict are kept.
      attempts: most times that one question is asked.
      backoff_s: wait behind the first failure; it doubles with each, and is drawn between half of it and all of it.
      workers: questions in flight.
      both_orders: comparisons are asked in both orders, since judges prefer places (arXiv 2306.05685).
      sleep: for tests.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        prompt: Prompt,
        replies: Replies,
        *,
        attempts: int = 5,
        backoff_s: float = 1.0,
        workers: int = 16,
        both_orders: bool = True,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._endpoint, self._prompt, self._replies = endpoint, prompt, replies
        self._attempts, self._backoff_s, self._workers, self._sleep = attempts, backoff_s, workers, sleep
        self._both_orders = both_orders and prompt.kind == "compare"
        self.counts = Counts()
        self._lock, self._local = threading.Lock(), threading.local()

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict for each, in order. What fails in the end has none, and says why; the same call later asks for it again.

        Raises:
          UserError: the server refuses requests for good (key, model, address).
        """
        wanted = [self._bodies(answer) for answer in answers]
        bodies = {key: body for pair in wanted for key, body in pair}
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            asked = {key: pool.submit(self._ask, key, body) for key, body in bodies.items()}
            try:
                found = {key: future.result() for key, future in asked.items()}
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [self._verdict([found[key] for key, _ in pair]) for pair in wanted]

    def _bodies(self, answer: Answer) -> list[tuple[str, dict[str, Any]]]:
        """The requests for one answer, by key: one, or one for each order."""
        shared = {"question": answer.question, "reference": answer.reference}
        if self._prompt.kind == "score":
            texts = [self._prompt.fill(answer=answer.first, **shared)]
        else:
            orders = [(answer.first, answer.second), (answer.second, answer.first)][: 1 + self._both_orders]
            texts = [self._prompt.fill(first=first, second=second, **shared) for first, second in orders]
        bodies = [self._endpoint.body(text, answer.pictures) for text in texts]
        return [(key_of(body), body) for body in bodies]

    def _ask(self, key: str, body: Mapping[str, Any]) -> tuple[str, str]:
        """A reply with a verdict and "", or the last reply there was and why it has none."""
        if (known := self._replies.get(key)) is not None and self._prompt.read(known) is not None:
            with self._lock:
                self.counts.kept += 1
            return known, ""
        draw, text, reason = random.Random(key), "", ""
        for attempt in range(self._attempts):
            wait = None
            try:
                text = self._endpoint.ask(self._session(), body)
                reason = "" if self._prompt.read(text) is not None else "no verdict in the reply"
            except NoReplyError as error:
                reason, wait = error.reason, error.wait_s
            with self._lock:
                self.counts.asked += 1
                self.counts.failures.update([reason] if reason else [])
            if not reason:
                self._replies.put(key, text)
                return text, ""
            if attempt + 1 < self._attempts:
                step = self._backoff_s * 2**attempt * (0.5 + draw.random() / 2) if wait is None else wait
                self._sleep(min(step, _LONGEST_WAIT_S))
        with self._lock:
            self.counts.lost += 1
        return text, f"{reason}, {self._attempts} times"

    def _verdict(self, replies: Sequence[tuple[str, str]]) -> Verdict:
        texts = tuple(text for text, _ in replies)
        if problem := next((problem for _, problem in replies if problem), ""):
            return Verdict(None, problem, texts)
        values = [self._prompt.read(text) for text in texts]
        if self._prompt.kind == "compare":
            of_order = ({"first": 1.0, "tie": 0.5, "second": 0.0}, {"first": 0.0, "tie": 0.5, "second": 1.0})
            values = [of_order[order][value] for order, value in enumerate(values)]
        return Verdict(sum(values) / len(values), "", texts)

    def _session(self) -> requests.Session:
        """One a thread: a session is not made for several."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        return self._local.session
