"""A chat model that rewrites answers: with a mistake in them, or without those that are there."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign_jax.config import JudgeConfig
from mmalign_jax.errors import UserError
from mmalign_jax.pairs.judge.asker import Asker
from mmalign_jax.pairs.judge.prompts import Prompt
from mmalign_jax.pairs.judge.settings import asking_of, check_endpoint, endpoint_of, question_of, replies_of
from mmalign_jax.types import PreferenceRecord


@dataclasses.dataclass(frozen=True)
class Editor:
    """Asks for another version of a record's answer. It is shown the pictures, the question and the answer."""

    prompt: Prompt
    asker: Asker
    config: JudgeConfig

    @classmethod
    def of(cls, config: JudgeConfig, replies: Path) -> "Editor":
        """
        Raises:
          UserError: the endpoint is not named, or the prompt is not one that edits.
        """
        check_endpoint(config, "the source edit")
        prompt = Prompt.load(config.edit_prompt)
        if prompt.kind != "edit":
            raise UserError(f'config.judge.edit_prompt: {config.edit_prompt} gives verdicts; a prompt of kind "edit" rewrites answers')
        useful = lambda reply: bool(prompt.read(reply))  # noqa: E731
        return cls(prompt, Asker(endpoint_of(config), replies_of(config, replies), useful, asking_of(config)), config)

    @property
    def counts(self) -> Mapping[str, int]:
        return self.asker.counts.metrics("edit")

    def __call__(self, answers: Sequence[tuple[PreferenceRecord, str]]) -> list[str | None]:
        """The new version of each record's answer; None where there was none in the end.

        Raises:
          UserError: the server refuses requests for good.
        """
        endpoint = endpoint_of(self.config)
        texts = [self.prompt.fill(question=question_of(record), answer=answer) for record, answer in answers]
        bodies = [endpoint.body(text, record.media) for text, (record, _) in zip(texts, answers, strict=True)]
        return [None if problem else str(self.prompt.read(reply)) for reply, problem in self.asker(bodies)]
