"""Judges: models that say which of two answers is better, or how good one is, behind an OpenAI-compatible endpoint."""

from mmalign_jax.pairs.judge.asker import Asker, Asking, Asks, Counts, Question
from mmalign_jax.pairs.judge.endpoint import Endpoint
from mmalign_jax.pairs.judge.judge import Answer, Judge, Verdict
from mmalign_jax.pairs.judge.prompts import Prompt
from mmalign_jax.pairs.judge.replies import Replies

__all__ = ["Answer", "Asker", "Asking", "Asks", "Counts", "Endpoint", "Judge", "Prompt", "Question", "Replies", "Verdict"]
