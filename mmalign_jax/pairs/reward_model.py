"""A trained reward model as a scorer: a number for every answer to a record's prompt."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import DataConfig
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.hf.score_head import FILE, has_head
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.score_head import at_ends
from mmalign_jax.pairs.rows import batches, lay_out_answers, layout_of, tokenize_answers
from mmalign_jax.types import PairBatch, PreferenceRecord


class RewardModel:
    """Scores whole answers, each at its end token. The answers of a record share its image and prompt; none sees another.

    A score is a function of the record's prompt and pictures and of the answer's text alone.
    """

    def __init__(self, policy: Pretrained, params: dict, *, batch_size: int = 32, limits: DataConfig | None = None):
        """
        Args:
          policy: of a model with a score head; `params` are its parameters.
          batch_size: records at a time.
          limits: the bounds on images are read of it.
        """
        self.policy, self.params = policy, params
        limits = limits or DataConfig()
        self._limits = {"max_pixels": limits.max_image_pixels, "max_bytes": limits.max_image_bytes}
        self._rows = mesh_lib.batch_rows(policy.mesh, batch_size)
        self._run = jax.jit(functools.partial(_scores, policy.model))

    @classmethod
    def read(cls, directory: str | Path, mesh: Mesh, compute_dtype: str = "auto", *, batch_size: int = 32, limits: DataConfig | None = None):
        """The reward model that a run exported.

        Raises:
          UserError: the directory holds no model, or one without a score head.
        """
        directory = Path(directory)
        policy = Pretrained.read(directory, mesh, compute_dtype)
        if not has_head(directory):
            raise UserError(f"{directory}: no {FILE}, so this is no reward model; train one with config.objective.name = reward_model")
        sizes = dataclasses.replace(policy.sizes, score_head=True)
        policy = dataclasses.replace(policy, sizes=sizes, model=dataclasses.replace(policy.model, config=sizes))
        with jax.set_mesh(mesh):
            params = policy.params(policy.model.dtype)
        return cls(policy, params, batch_size=batch_size, limits=limits)

    def scores(self, records: Sequence[PreferenceRecord], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """The scores of each record's answers, in order. Responses of the records are not read.

        Args:
          answers: any number of texts a record, none included.

        Raises:
          UserError: several processes.
          DataError: a row cannot be tokenised, or is longer than the model's positions.
        """
        if jax.process_count() > 1:
            raise UserError("a reward model scores in one process; score answers before the run of several processes")
        if len(records) != len(answers):
            raise ValueError(f"{len(records)} records, and answers for {len(answers)}")
        out: list[list[float]] = [[] for _ in records]
        asked = [number for number, texts in enumerate(answers) if len(texts)]
        processor = self.policy.processor
        rows = {number: tokenize_answers(records[number], answers[number], processor, self._limits) for number in asked}
        if not asked:
            return out
        layout = layout_of(list(rows.values()), processor, self._limits)
        lay = lambda at: lay_out_answers(records[asked[at]], rows[asked[at]], processor, layout)  # noqa: E731
        for places, batch in batches(len(asked), lay, layout, self.policy.mesh, self._rows):
            with jax.set_mesh(self.policy.mesh):
                found = np.asarray(jax.device_get(self._run(self.params, batch)))
            for place, scores in zip(places, found, strict=False):
                out[asked[place]] = [float(score) for score in scores[: len(answers[asked[place]])]]
        return out


def _scores(model: Mllm, params: dict, batch: PairBatch) -> Float[Array, "B K"]:
    features = model.encode_images(params, batch.images, batch.patches)
    return at_ends(model.scores(params, model.hidden(params, features, batch)), batch)
