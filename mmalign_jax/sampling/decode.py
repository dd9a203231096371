"""Decode lanes: many continuations of one row, all reading the row's cache, each owning only a short tail.

A lane starts behind any slot of its row. Plain generation is one lane behind the prompt; a group is G lanes there; BDHS is one lane
a sentence, each behind its split of the clean answer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from mmalign_jax import mesh
from mmalign_jax.models.mllm import Mllm, Prefill
from mmalign_jax.sampling.draw import draw
from mmalign_jax.sampling.stop_strings import StopStrings
from mmalign_jax.types import PREFIX, PairBatch


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """Static choices of a decode. Temperature 0 is greedy.

    Args:
      max_new_tokens: X, slots of a lane's tail.
      temperature: divides the logits before drawing.
      top_k: draws from the so many likeliest tokens (arXiv 1805.04833), and those that are as likely as the last of them; 0: from all.
      top_p: draws from the smallest set of tokens that holds this much probability (arXiv 1904.09751), of what `top_k` leaves.
      stop_ids: a lane ends with the first of these (end of sequence; for BDHS also the tokens that end a sentence).
      banned_ids: never generated (image and other special tokens).
      stop_strings: a lane also ends with the token that completes one of them; see `stop_strings.automaton`.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()
    stop_strings: StopStrings | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneStart:
    """Where lanes begin: behind slot `slot` of their row. Inactive lanes generate nothing."""

    slot: Int[Array, "B S"]
    active: Bool[Array, "B S"]

    @classmethod
    def behind_prefix(cls, role: Int[Array, "B T"], lanes: int = 1) -> "LaneStart":
        """`lanes` lanes behind every row's prefix; rows without a prefix (padding of a batch) are inactive."""
        slot = jnp.max(jnp.where(role == PREFIX, jnp.arange(role.shape[1]), -1), axis=1, keepdims=True)
        slot = jnp.broadcast_to(slot, (role.shape[0], lanes))
        return cls(jnp.maximum(slot, 0), slot >= 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """What the lanes wrote: tokens up to and including the stop token, 0 behind.

    Log-probs are the model's own, as a teacher-forced pass gives them: temperature, top-p and banned tokens do not enter.
    """

    tokens: Int[Array, "B S X"]
    lengths: Int[Array, "B S"]
    logps: Float[Array, "B S X"]
    stopped: Bool[Array, "B S"]


def lane_keys(key: Array, record_key: UInt[Array, " B"], draw: Int[Array, " B"], lanes: int) -> Array:
    """One random key a lane `[B S]`, from (seed, record, draw, lane) alone, so that a result depends on nothing else."""
    # broadcast by hand: batching fold_in over rows and lanes apart mixes shardings when there is one row
    record_key, draw = (jnp.broadcast_to(value[:, None], (value.shape[0], lanes)) for value in (record_key, draw))
    lane = jnp.zeros_like(draw) + jnp.arange(lanes)
    fold = lambda record, number, lane: functools.reduce(jax.random.fold_in, (record, number, lane), key)  # noqa: E731
    return jax.vmap(jax.vmap(fold))(record_key, draw, lane)


def decode_lanes(
    model: Mllm,
    params: dict,
    prefill: Prefill,
    batch: PairBatch,
    start: LaneStart,
    keys: Array,
    options: DecodeOptions,
    visible: Bool[Array, "B T"] | None = None,
) -> Samples:
    """Continues every active lane until it stops or its tail is full.

    Args:
      prefill: hidden states and cache of the rows, made under the same `visible`.
      batch: the rows.
      start: where lanes begin.
      keys: one key a lane `[B S]`, see `lane_keys`.
      visible: slots that lanes may see at all; the prefill must have been made under the same choice.
    """
    rows, lanes = start.slot.shape
    view, first_position, first_turning = model.lane_view(batch, start.slot, visible)
    marks = Marks.of(options, model.config.decoder.vocab_size)

    def body(carry):
        step, hidden, tail, tokens, logps, lengths, done, stopped, read = carry
        logits = model.logits(params, hidden)
        chosen = marks.draw(logits, keys, step, options)
        here = (jnp.arange(options.max_new_tokens) == step) & ~done[..., None]
        tokens = jnp.where(here, chosen[..., None], tokens)
        logps = jnp.where(here, _logp(logits, chosen)[..., None], logps)
        lengths = lengths + ~done
        ends = marks.stop(chosen)
        if options.stop_strings is not None:
            read, complete = options.stop_strings.step(read, chosen)
            ends |= complete
        stopped |= ends & ~done
        done |= stopped
        where = (first_position + step, first_turning + step)
        hidden, tail = model.decode_step(params, prefill.cache, tail, chosen, *where, view, step)
        return step + 1, hidden, tail, tokens, logps, lengths, done, stopped, read

    # not take_along_axis, which cannot tell the sharding of one lane of one row
    hidden = jax.vmap(lambda values, slot: values[slot])(prefill.hidden, start.slot)
    zeros = jnp.zeros_like(start.slot)
    blank = jnp.broadcast_to(zeros[..., None], (rows, lanes, options.max_new_tokens))
    carry = (
        jnp.int32(0), hidden, model.empty_tail(prefill.cache, lanes, options.max_new_tokens),
        blank, blank.astype(jnp.float32), zeros, ~start.active, zeros.astype(bool), zeros,
    )  # fmt: skip
    carry = jax.lax.while_loop(lambda c: (c[0] < options.max_new_tokens) & ~jnp.all(c[6]), body, carry)
    return Samples(tokens=carry[3], lengths=carry[5], logps=carry[4], stopped=carry[7])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marks:
    """Which tokens end a lane, and which are never written."""

    stops: Bool[Array, " V"]
    banned: Bool[Array, " V"]

    @classmethod
    def of(cls, options: DecodeOptions, vocabulary: int) -> "Marks":
        none = jnp.zeros(vocabulary, bool)
        return cls(*(none.at[jnp.array(ids, jnp.int32)].set(True) for ids in (options.stop_ids, options.banned_ids)))

    def stop(self, tokens: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Whether a token ends its lane."""
        sharding = jax.typeof(tokens).sharding if mesh.active() else None
        return self.stops.at[tokens].get(out_sharding=sharding)

    def draw(
        self, logits: Float[Array, "B S V"], keys: Array, step: Int[Array, ""] | Int[Array, "B S"], options: DecodeOptions
    ) -> Int[Array, "B S"]:
        """A token of each lane, drawn under its key (`lane_keys`) for the token's number in the lane, `step`."""
        chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        return draw(jnp.where(self.banned, -jnp.inf, logits), keys, step, **chosen)


def _logp(logits: Float[Array, "B S V"], chosen: Int[Array, "B S"]) -> Float[Array, "B S"]:
    label = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    return label - jax.nn.logsumexp(logits, axis=-1)
