"""A model that is asked about each sentence of an answer whether it is true (RLAIF-V, arXiv 2405.17220: divide and conquer)."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import DataConfig
from mmalign_jax.data.layout import RowTokens, lay_out, tokenize
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.rows import batches, layout_of
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.types import PREFIX, PairBatch, Part, PreferenceRecord, Turn

_YES, _NO = ("Yes", "yes"), ("No", "no")


class Claims:
    """Scores an answer by minus the number of its sentences that the model denies: P(no) > P(yes) for the first token of its reply.

    RLAIF-V turns sentences into questions with a language model first; here a question is made of them by `question`, so a sentence that says
    several things is one claim. An answer of more, longer sentences risks more, as in the paper; the scorer `objects` rewards what is right.
    """

    counts: ClassVar[Mapping[str, int]] = {}

    def __init__(self, critic: Pretrained, question: str, *, batch_size: int = 32, limits: DataConfig | None = None):
        """
        Args:
          question: with {claim} where the sentence stands.
          batch_size: questions at a time.
          limits: the bounds on images are read of it.

        Raises:
          UserError: the tokenizer cannot write yes or no, does not tell them apart by their first tokens, or cannot read the question.
        """
        limits = limits or DataConfig()
        self._critic, self._question = critic, question
        self._limits = {"max_pixels": limits.max_image_pixels, "max_bytes": limits.max_image_bytes}
        self._rows = mesh_lib.batch_rows(critic.mesh, batch_size)
        with jax.set_mesh(critic.mesh):
            self._params = critic.params(critic.model.dtype)
        affirms, denies = (_first_tokens(critic, words) for words in (_YES, _NO))
        if (affirms & denies).any():
            raise UserError(f"{critic.path}: its tokenizer begins yes and no with the same token, so the scorer claims cannot tell them apart")
        try:
            critic.processor.prompt_ids((Turn("user", (Part(text=question.replace("{claim}", "").strip() or "?"),)),), ())
        except UserError as error:
            raise UserError(f"config.samples.claim: {critic.path} cannot read the question ({error})") from error
        self._run = jax.jit(functools.partial(_denied, critic.model, affirms, denies))

    def check(self, record: PreferenceRecord) -> None:
        """Raises UserError for a record without a picture, of which nothing can be claimed."""
        if not record.media:
            raise UserError(f"config.samples.scorers: claims are about pictures, and record {record.id} has none")

    def __call__(self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[str]]) -> list[list[float | None]]:
        asked: dict[tuple[int, str], int] = {}
        sentences = [[[text[start:stop].strip() for start, stop in split_sentences(text)] for text in texts] for texts in answers]
        for number, texts in enumerate(sentences):
            for claim in (claim for claims in texts for claim in claims if claim):
                asked.setdefault((number, claim), len(asked))
        denied = self._denies([self._about(records[number], claim) for number, claim in asked])
        score = lambda number, claims: _minus_denied([denied[asked[number, claim]] for claim in claims if claim])  # noqa: E731
        return [[score(number, claims) for claims in texts] for number, texts in enumerate(sentences)]

    def _about(self, record: PreferenceRecord, claim: str) -> PreferenceRecord:
        pictures = tuple(Part(media=index) for index in range(len(record.media)))
        question = Part(text=self._question.replace("{claim}", claim))
        return dataclasses.replace(record, turns=(Turn("user", (*pictures, question)),), responses=(), prefs=(), prefix="")

    def _denies(self, asked: Sequence[PreferenceRecord]) -> list[bool | None]:
        """Whether each question is denied; None for one that is longer than the critic's positions."""
        processor, out = self._critic.processor, []
        all_rows: list[RowTokens] = [tokenize(one, None, processor, 0, **self._limits) for one in asked]
        fits = [row.size.prefix <= processor.traits.max_positions for row in all_rows]
        questions = [one for one, fit in zip(asked, fits, strict=True) if fit]
        rows = [row for row, fit in zip(all_rows, fits, strict=True) if fit]
        if not rows:
            return [None] * len(asked)
        layout = layout_of(rows, processor, self._limits)
        lay = lambda number: lay_out(questions[number], None, processor, layout, rows[number])  # noqa: E731
        for numbers, batch in batches(len(questions), lay, layout, self._critic.mesh, self._rows):
            with jax.set_mesh(self._critic.mesh):
                out += np.asarray(jax.device_get(self._run(self._params, batch)))[: len(numbers)].tolist()
        known = iter(out)
        return [next(known) if fit else None for fit in fits]


def _minus_denied(denied: Sequence[bool | None]) -> float | None:
    return None if None in denied else -float(sum(denied))


def _first_tokens(critic: Pretrained, words: Sequence[str]) -> Bool[np.ndarray, " V"]:
    """Which tokens begin one of the words as an answer. A tokenizer of whole words may know one spelling alone."""
    out = np.zeros(critic.sizes.decoder.vocab_size, bool)
    for word in words:
        try:
            ids, _ = critic.processor.answer_ids(word)
        except UserError:
            continue
        out[ids[0]] = True
    if not out.any():
        raise UserError(f"{critic.path}: its tokenizer cannot write {' or '.join(words)}, so the scorer claims cannot ask it")
    return out


def _denied(model: Mllm, affirms: np.ndarray, denies: np.ndarray, params: dict, batch: PairBatch) -> Bool[Array, " B"]:
    hidden = model.hidden(params, model.encode_images(params, batch.images, batch.patches), batch)
    last = jnp.max(jnp.where(batch.role == PREFIX, jnp.arange(batch.role.shape[1]), 0), axis=1)
    logits = model.logits(params, jax.vmap(lambda states, at: states[at])(hidden, last))
    return _mass(logits, denies) > _mass(logits, affirms)


def _mass(logits: Float[Array, "B V"], some: np.ndarray) -> Float[Array, " B"]:
    return jax.nn.logsumexp(jnp.where(some, logits, -jnp.inf), axis=-1)
