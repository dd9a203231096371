"""A chat model that rewrites answers: with a mistake in them, or without those that are there."""

import dataclasses
from collections.abc import Mapping, Sequence

from mmalign_jax.pairs.judge.asker import Asks, Question
from mmalign_jax.pairs.judge.prompts import Prompt
from mmalign_jax.pairs.judge.settings import question_of
from mmalign_jax.types import PreferenceRecord


@dataclasses.dataclass(frozen=True)
class Editor:
    """Asks for another version of a record's answer. The pictures, the question and the answer are shown.

    Args:
      asks: who; with `prompt.read`.
      prompt: of kind "edit".
    """

    asks: Asks
    prompt: Prompt

    @property
    def counts(self) -> Mapping[str, int]:
        return self.asks.counts.metrics("edit")

    def __call__(self, answers: Sequence[tuple[PreferenceRecord, str]]) -> list[str | None]:
        """The new version of each record's answer; None where there was none in the end.

        Raises:
          UserError: a server refuses requests for good.
        """
        questions = [Question(self.prompt.fill(question=question_of(record), answer=answer), record.media) for record, answer in answers]
        return [None if problem else str(self.prompt.read(reply)) for reply, problem in self.asks(questions)]
