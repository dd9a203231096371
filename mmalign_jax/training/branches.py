"""Rows -> the statistics that an objective declares. Nothing else is computed."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import losses, mesh
from mmalign_jax.losses import AnswerLogps, TokenStats
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.packed_pairs import answer_sums
from mmalign_jax.types import FIRST_ANSWER, PAD, PREFIX, PairBatch


@dataclasses.dataclass(frozen=True)
class Side:
    """Policy or reference: a model and its whole parameter tree."""

    model: Mllm
    params: dict

    def tower(self, batch: PairBatch) -> Float[Array, "I F Z"]:
        """Tower features of the rows' pictures: computed, unless the rows bring them."""
        return self.model.tower(self.params, batch.images, batch.patches) if batch.features is None else batch.features

    def blind(self, batch: PairBatch) -> PairBatch:
        """The rows with black pictures. Where rows bring features, those of black pictures are computed."""
        if batch.features is None:
            return batch.with_images(jnp.zeros_like(batch.images))
        return dataclasses.replace(batch, features=self.model.tower_of_black(self.params, batch.features, batch.patches))

    def hidden(self, tower: Float[Array, "I F Z"], batch: PairBatch) -> Float[Array, "B T D"]:
        """Last hidden states of packed rows, from the tower's features of their images."""
        return self.model.hidden(self.params, self.model.project(self.params, tower), batch)

    def head(self) -> Float[Array, "D V"]:
        return self.model.head(self.params).astype(self.model.dtype)

    def tokens(
        self,
        hidden: Float[Array, "B T D"],
        batch: PairBatch,
        wanted: tuple[str, ...] = (),
        reference: tuple[Array, Array] | None = None,
    ) -> TokenStats:
        """Statistics of the batch's answer tokens, given the rows' hidden states."""
        slots = {"prefix_slots": batch.prefix_slots, "answer_slots": batch.answer_slots, "softcap": self.model.config.decoder.final_softcap}
        if batch.place is not None:
            slots |= {"segment": batch.segment, "segments": batch.place.shape[-1]}
        return losses.answer_statistics(hidden, self.head(), batch.tokens, batch.role, **slots, wanted=wanted, reference=reference)

    def fixed(self) -> "Side":
        return dataclasses.replace(self, params=jax.lax.stop_gradient(self.params))


def lengths_alone(batch: PairBatch) -> AnswerLogps:
    """The answers of an objective that reads no log-probs."""
    return AnswerLogps(None, answer_sums(batch.by_answer(batch.token_weight), batch))


def weighted(values: Float[Array, "C K R"], batch: PairBatch) -> Float[Array, "B K"]:
    """Sums of values of tokens under the batch's token weights, by pair."""
    return answer_sums(values * batch.by_answer(batch.token_weight), batch)


def answer_logps(
    policy: Float[Array, "B K R"], reference: Float[Array, "B K R"] | None, batch: PairBatch, *, by_token: bool = False
) -> AnswerLogps:
    """Sums of token log-probs under the batch's token weights; the tokens themselves where an objective reads them, of rows of one pair."""
    if batch.place is not None:
        theirs = None if reference is None else weighted(reference, batch)
        return AnswerLogps(weighted(policy, batch), lengths_alone(batch).lengths, theirs)
    weight = batch.by_answer(batch.token_weight)
    mask = weight > 0
    sums, lengths = losses.sums(policy, mask, weight)
    theirs = None if reference is None else losses.sums(reference, mask, weight)[0]
    if not by_token:
        return AnswerLogps(sums, lengths, theirs)
    changed = None if batch.changed is None else batch.by_answer(batch.changed)
    return AnswerLogps(sums, lengths, theirs, policy, reference, weight, changed)


def branch_logps(side: Side, tower: Float[Array, "I F Z"], batch: PairBatch) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Sums of the log-probs of every answer of packed rows, and the answers' lengths."""
    logps = answer_logps(side.tokens(side.hidden(tower, batch), batch).logps, None, batch)
    return logps.policy, logps.lengths


def with_answer(
    batch: PairBatch, tokens: Int[Array, "*A B R"], scored: Bool[Array, "*A B R"], weight: Float[Array, "*A B R"]
) -> PairBatch:
    """The rows with one more answer behind their own images and prompt, as the last one: its prefix costs nothing.

    Args:
      tokens: R may be any number of slots if the rows have no answer so far.
      scored: which of them are there.
    """
    p, r = batch.prefix_slots, tokens.shape[-1]
    offset, last = jnp.arange(r), FIRST_ANSWER + (batch.answers if batch.tokens.shape[-1] > p else 0)
    prefix = batch.role[..., :p] == PREFIX
    # every answer goes on where the prefix ends
    start = jnp.max(jnp.where(prefix, batch.positions[..., :p], -1), axis=-1, keepdims=True) + 1

    def behind(values: Array, filler: Array) -> Array:
        return jnp.concatenate([values, filler.astype(values.dtype)], axis=-1)

    more = {
        "tokens": behind(batch.tokens, jnp.where(scored, tokens, 0)),
        "role": behind(batch.role, jnp.where(scored, last, PAD)),
        "positions": behind(batch.positions, jnp.where(scored, start + offset, 0)),
        "image_index": behind(batch.image_index, jnp.full_like(tokens, -1)),
        "token_weight": behind(batch.token_weight, weight),
    }
    if batch.mrope is not None:
        turning = jnp.max(jnp.where(prefix[..., None, :], batch.mrope[..., :p], -1), axis=(-2, -1), keepdims=True) + 1 + offset
        turning = jnp.broadcast_to(turning, (*batch.mrope.shape[:-1], r))
        more["mrope"] = behind(batch.mrope, jnp.where(scored[..., None, :], turning, 0))
    if batch.changed is not None:
        more["changed"] = behind(batch.changed, jnp.zeros_like(scored))
    return dataclasses.replace(batch, answer_slots=r, **more)


def prompts(batch: PairBatch) -> PairBatch:
    """The rows without their answers."""
    return batch.first_answers(0)


def with_mismatched(batch: PairBatch) -> PairBatch:
    """The rows `[*A, B]` with the chosen answer of the next row, of the whole step, as their last one (KTO's partner).

    Where the next row is of the same record, the answer is left empty: it is not another prompt's.
    """
    p, r = batch.prefix_slots, batch.answer_slots

    def next_row(values: Array) -> Array:
        # rows are sharded, and these arrays are small: everyone looks at all of them
        axes = (None,) * (values.ndim - 2) + ("batch", None)
        chosen = mesh.constrain(values[..., p : p + r], *(None,) * values.ndim)
        rolled = jnp.roll(chosen.reshape(-1, r), -1, axis=0).reshape(chosen.shape)
        return mesh.constrain(rolled, *axes)

    keys = mesh.constrain(batch.record_key, *(None,) * batch.record_key.ndim)
    foreign = jnp.roll(keys.reshape(-1), -1).reshape(keys.shape) != keys
    foreign = mesh.constrain(foreign, *(None,) * (keys.ndim - 1), "batch")[..., None]
    scored = (next_row(batch.role) == FIRST_ANSWER) & foreign
    return with_answer(batch, next_row(batch.tokens), scored, jnp.where(foreign, next_row(batch.token_weight), 0.0))
