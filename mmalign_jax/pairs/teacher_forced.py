"""What the policy finds likeliest at each token of a reference, given the reference before it: POVID's self-rejected answers, made beforehand."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from mmalign_jax import losses
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.data.layout import RowLayout, lay_out_tokens
from mmalign_jax.errors import UserError
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.own_answers import Own, Prompt
from mmalign_jax.pairs.rows import answer_slots, batches
from mmalign_jax.pairs.seen import encode_seen
from mmalign_jax.pairs.views import View
from mmalign_jax.sampling import compiler_options, lane_keys
from mmalign_jax.types import PairBatch, record_key

WHERE = ("all", "changed")


class TeacherForced:
    """One answer to each prompt, as long as its reference: the likeliest token at each place, given the picture under the view and the clean
    reference before it (POVID, arXiv 2402.11411). One pass over the reference, no decoding.

    Special tokens are not among the choices, and the answer ends where the reference ends. It is a function of (seed, record, draw) alone, and
    of the policy. Its text may be one that the tokenizer reads as other tokens, or not at all.

    Args:
      name: the answers' source.
      seed: of the view's draws.
      layout: of the prompts (K = 0).
      rows: prompts of a device batch.
      view: what the policy sees in the place of the pictures.
      where: "all": every token is the likeliest one; "changed": only where the view changes which one that is, and the reference's own elsewhere,
        which takes a second pass.
    """

    def __init__(
        self, name: str, model: Mllm, processor: Processor, mesh: Mesh, seed: int, layout: RowLayout, rows: int, view: View, where: str = "all"
    ):
        if where not in WHERE:
            raise ValueError(f"where is one of {', '.join(WHERE)}, not {where!r}")
        self.name, self._processor, self._mesh, self._layout, self._seed = name, processor, mesh, layout, seed
        self._rows = mesh_lib.batch_rows(mesh, rows)
        allowed = np.ones(model.config.decoder.vocab_size, bool)
        allowed[[token for token in (*processor.banned_ids, *processor.eos_ids) if token < len(allowed)]] = False
        self._run = jax.jit(functools.partial(_said, model, view, where, allowed), compiler_options=compiler_options(mesh))

    def __call__(self, params: dict, prompts: Sequence[Prompt], references: Sequence[str], draw: int) -> list[Own]:
        """The answer to each prompt, in order.

        Args:
          references: the whole answers that the set holds as true.
          draw: other numbers give other draws of the view.

        Raises:
          UserError: the tokenizer cannot read a reference.
          DataError: prompt and reference do not fit into the layout, or are longer than the model's positions.
        """
        rows = []
        for prompt, text in zip(prompts, references, strict=True):
            try:
                rows.append(dataclasses.replace(prompt.row, answers=(self._processor.answer_ids(text),)))
            except UserError as error:
                raise UserError(f"record {prompt.record.id}: the tokenizer cannot read its reference ({error})") from error
        if not rows:
            return []
        longest = max(row.size.longest for row in rows)
        layout = dataclasses.replace(self._layout, answers=1, answer_slots=answer_slots(longest))
        key = jax.random.fold_in(jax.random.key(self._seed), np.uint32(record_key(self.name)))

        def lay(number: int) -> dict:
            prompt = prompts[number]
            return {**lay_out_tokens(prompt.record, None, self._processor, layout, rows[number]), **prompt.pictures}

        out = []
        for numbers, batch in batches(len(rows), lay, layout, self._mesh, self._rows):
            with jax.set_mesh(self._mesh):
                said = np.asarray(jax.device_get(self._run(params, batch, key, np.int32(draw))))
            out += [self._answer(rows[number].answers[0][0], said[place]) for place, number in enumerate(numbers)]
        return out

    def _answer(self, reference: np.ndarray, said: np.ndarray) -> Own:
        tokens = np.append(said[: len(reference) - 1], reference[-1]).astype(np.int32)
        return Own(tokens, np.full(len(tokens), np.nan, np.float32), self._processor.decode(tokens), True, self.name)


def _said(
    model: Mllm, view: View, where: str, allowed: Bool[np.ndarray, " V"], params: dict, batch: PairBatch, key: Array, draw: Int[Array, ""]
) -> Int[Array, "B R"]:
    slots = {"prefix_slots": batch.prefix_slots, "answer_slots": batch.answer_slots, "softcap": model.config.decoder.final_softcap}
    head = model.head(params).astype(model.dtype)

    def likeliest(features: Array) -> Int[Array, "B R"]:
        hidden = model.hidden(params, features, batch)
        found = losses.answer_statistics(hidden, head, batch.tokens, batch.role, **slots, wanted=("argmax",), allowed=allowed)
        return found.argmax[:, 0]

    draws = jnp.zeros_like(batch.record_key, jnp.int32) + draw
    keys = lane_keys(key, batch.record_key, draws, 1)[:, 0]
    said = likeliest(encode_seen(model, view, params, batch.images, batch.patches, keys))
    if where == "all":
        return said
    clean = likeliest(model.encode_images(params, batch.images, batch.patches))
    return jnp.where(said == clean, batch.by_answer(batch.tokens)[:, 0], said)
