"""Many questions to an endpoint at a time: asked at once, again where something failed, kept on disk, counted, none lost and none asked twice."""

import collections
import concurrent.futures
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import requests

from mmalign_jax.errors import UserError
from mmalign_jax.pairs.judge.endpoint import Endpoint, NoReplyError
from mmalign_jax.pairs.judge.replies import Replies, key_of
from mmalign_jax.types import Media

_LONGEST_WAIT_S = 60.0
_SAYS_NOTHING = "no verdict in the reply"


@dataclasses.dataclass
class Counts:
    """How the asking went: replies from the server and from disk, failures that were asked again by reason, and questions without a reply of use."""

    asked: int = 0
    kept: int = 0
    failures: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    lost: int = 0

    def metrics(self, group: str) -> dict[str, int]:
        """The counts by the names of metrics."""
        return {f"{group}/asked": self.asked, f"{group}/kept": self.kept, f"{group}/failed": self.failures.total(), f"{group}/lost": self.lost}


@dataclasses.dataclass(frozen=True)
class Asking:
    """How an endpoint is asked.

    Args:
      attempts: most times that one question is asked.
      backoff_s: wait behind the first failure; it doubles with each, and is drawn between half of it and all of it.
      workers: questions in flight.
      insists: whether a server that fails until the last attempt is an error; a question whose replies say nothing is none.
      sleep: for tests.
    """

    attempts: int = 5
    backoff_s: float = 1.0
    workers: int = 16
    insists: bool = False
    sleep: Callable[[float], None] = time.sleep


@dataclasses.dataclass(frozen=True)
class Question:
    """A text about pictures, which stand before it."""

    text: str
    pictures: tuple[Media, ...] = ()


@runtime_checkable
class Asks(Protocol):
    """Somebody who is asked."""

    counts: Counts

    def __call__(self, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """For each question, in order, a reply of use and ""; or the last reply there was and why it is of none."""


class Asker:
    """Asks a chat model behind an endpoint; equal questions once.

    Args:
      replies: those that are there are not asked for again. Only replies of use are kept.
      read: what a reply says; None where it does not say what it was asked for.
    """

    def __init__(self, endpoint: Endpoint, replies: Replies, read: Callable[[str], Any], asking: Asking | None = None):
        self._endpoint, self._replies, self._asking = endpoint, replies, asking or Asking()
        self._useful = lambda reply: read(reply) is not None
        self.counts = Counts()
        self._lock, self._local = threading.Lock(), threading.local()

    def __call__(self, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """See `Asks`.

        Raises:
          UserError: the server refuses requests for good (key, model, address), or see `Asking.insists`.
        """
        bodies = [self._endpoint.body(one.text, one.pictures) for one in questions]
        keys = [key_of(body) for body in bodies]
        with concurrent.futures.ThreadPoolExecutor(self._asking.workers) as pool:
            asked = {key: pool.submit(self._ask, key, body) for key, body in dict(zip(keys, bodies, strict=True)).items()}
            try:
                found = {key: future.result() for key, future in asked.items()}
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        failed = [problem for _, problem in found.values() if problem and not problem.startswith(_SAYS_NOTHING)]
        if failed and self._asking.insists:
            raise UserError(
                f"config.judge.url: {self._endpoint.url} did not answer {len(failed)} of {len(found)} questions ({failed[0]}); the same command "
                "goes on when it does, replies so far are kept"
            )
        return [found[key] for key in keys]

    def _ask(self, key: str, body: Mapping[str, Any]) -> tuple[str, str]:
        if (known := self._replies.get(key)) is not None and self._useful(known):
            with self._lock:
                self.counts.kept += 1
            return known, ""
        draw, text, reason = random.Random(key), "", ""
        for attempt in range(self._asking.attempts):
            wait = None
            try:
                text = self._endpoint.ask(self._session(), body)
                reason = "" if self._useful(text) else _SAYS_NOTHING
            except NoReplyError as error:
                reason, wait = error.reason, error.wait_s
            with self._lock:
                self.counts.asked += 1
                self.counts.failures.update([reason] if reason else [])
            if not reason:
                self._replies.put(key, text)
                return text, ""
            if attempt + 1 < self._asking.attempts:
                step = self._asking.backoff_s * 2**attempt * (0.5 + draw.random() / 2) if wait is None else wait
                self._asking.sleep(min(step, _LONGEST_WAIT_S))
        with self._lock:
            self.counts.lost += 1
        return text, f"{reason}, {self._asking.attempts} times"

    def _session(self) -> requests.Session:
        """One a thread: a session is not made for several."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        return self._local.session
