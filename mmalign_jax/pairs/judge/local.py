"""A model of ours in the place of an endpoint: asked in this process, a batch at a time, always with the same reply."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from mmalign_jax.config import DataConfig, JudgeConfig, SamplesConfig
from mmalign_jax.data.layout import RowTokens, lay_out_pictures, tokenize
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs.judge.asker import Counts, Question
from mmalign_jax.pairs.own_answers import OwnAnswers, Prompt
from mmalign_jax.pairs.rows import layout_of
from mmalign_jax.types import Part, PreferenceRecord, Turn

_ROWS = 32  # questions of a device batch


class LocalAsker:
    """Asks a model; its reply to a question is the likeliest one, so that asking again is of no use.

    Args:
      model: who is asked.
      read: what a reply says; None where it does not say what it was asked for.
      config: of it `max_tokens`.
      limits: the bounds on images are read of it.
    """

    def __init__(self, model: Pretrained, read: Callable[[str], Any], config: JudgeConfig, limits: DataConfig):
        self._model, self._read = model, read
        self._limits = {"max_pixels": limits.max_image_pixels, "max_bytes": limits.max_image_bytes}
        self._samples = SamplesConfig(count=1, temperature=0.0, max_tokens=config.max_tokens)
        self._own: OwnAnswers | None = None
        self.counts = Counts()
        with jax.set_mesh(model.mesh):
            self._params = model.params(model.model.dtype)

    def __call__(self, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """See `Asks`.

        Raises:
          UserError: a question and its reply may take more positions than the model has.
          DataError: a picture that cannot be read.
        """
        asked = {question: number for number, question in enumerate(dict.fromkeys(questions))}
        records = [_record(number, question) for question, number in asked.items()]
        replies = self._replies(records) if records else []
        self.counts.asked += len(replies)
        found = [(text, "" if self._read(text) is not None else "no verdict in the reply") for text in replies]
        self.counts.lost += sum(bool(problem) for _, problem in found)
        return [found[asked[question]] for question in questions]

    def _replies(self, records: Sequence[PreferenceRecord]) -> list[str]:
        processor = self._model.processor
        rows: list[RowTokens] = [tokenize(record, None, processor, 0, **self._limits) for record in records]
        layout = layout_of(rows, processor, self._limits)
        if (most := layout.prefix_slots + self._samples.max_tokens) > layout.max_positions:
            raise UserError(f"config.judge.max_tokens: a question and its reply may take {most} positions, the judge has {layout.max_positions}")
        if self._own is None:
            self._own = OwnAnswers(self._model.model, processor, self._model.mesh, self._samples, layout, _ROWS)
        prompts = [Prompt(record, row, lay_out_pictures(record, processor, layout, row)) for record, row in zip(records, rows, strict=True)]
        return [one.text for (one,) in self._own(self._params, prompts, layout=layout)]


def _record(number: int, question: Question) -> PreferenceRecord:
    pictures = tuple(Part(media=index) for index in range(len(question.pictures)))
    return PreferenceRecord(f"question {number}", question.pictures, (Turn("user", (*pictures, Part(text=question.text))),), ())
