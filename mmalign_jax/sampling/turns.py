"""Lanes that take turns: a row works on one of its lanes at a time, and a row that has none left makes room for another.

The same tokens as `decode_lanes`, for lanes of unlike lengths (sentences that stop after two tokens or after forty). There every lane costs
as much as the longest of the batch. Here a row starts its next lane where one stops, so it holds the tail of one lane, and `advance` stops
when a few rows are done: their places are given to rows that were just begun (`begin`, `put`), as in continuous batching (Orca, OSDI 2022).
When nothing waits, `pick` leaves out what is done.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.models.decoder import KeyValues
from mmalign_jax.models.mllm import LaneView, Mllm, Prefill
from mmalign_jax.sampling.decode import DecodeOptions, LaneStart, Marks
from mmalign_jax.types import PairBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneTokens:
    """What the lanes wrote: tokens up to and including the stop token, 0 behind."""

    tokens: Int[Array, "B S X"]
    lengths: Int[Array, "B S"]
    stopped: Bool[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turns:
    """Rows on their way.

    Args:
      lane: that a row works on; S: it is done.
      token, at: the last token written there, and its number in the lane.
      first: the first token of each lane.
      following: the lane that comes behind each; S: none.
      allowed, positions: what lanes see of their rows, see `LaneView`.
      position, turning: of the first token of each lane, see `Mllm.lane_view`.
      cache: of the rows.
      tail: of the lanes at work.
    """

    lane: Int[Array, " B"]
    token: Int[Array, " B"]
    at: Int[Array, " B"]
    written: LaneTokens
    first: Int[Array, "B S"]
    following: Int[Array, "B S"]
    keys: Array
    allowed: Bool[Array, "B S T"]
    positions: Int[Array, "B T"]
    position: Int[Array, "B S"]
    turning: Int[Array, "B S"]
    cache: KeyValues
    tail: KeyValues

    @property
    def slots(self) -> int:
        """T, of a row's cache."""
        return self.positions.shape[1]

    @property
    def busy(self) -> Bool[Array, " B"]:
        """Which rows have something to do."""
        return self.lane < self.first.shape[1]


def begin(
    model: Mllm,
    params: dict,
    prefill: Prefill,
    batch: PairBatch,
    start: LaneStart,
    keys: Array,
    options: DecodeOptions,
    visible: Bool[Array, "B T"] | None = None,
) -> Turns:
    """Rows of which every active lane has its first token. Arguments as of `decode_lanes`.

    Raises:
      ValueError: stop strings are given, which only `decode_lanes` knows.
    """
    if options.stop_strings is not None:
        raise ValueError("lanes that take turns know no stop strings")
    lanes = start.slot.shape[1]
    view, position, turning = model.lane_view(batch, start.slot, visible)
    marks = Marks.of(options, model.config.decoder.vocab_size)

    hidden = jax.vmap(lambda values, slot: values[slot])(prefill.hidden, start.slot)
    first = marks.draw(model.logits(params, hidden), keys, jnp.zeros_like(start.slot), options)
    ends = marks.stop(first) & start.active
    goes_on = start.active & ~ends & (options.max_new_tokens > 1)
    # the next lane that goes on, from the last lane back
    following, behind = [], jnp.zeros_like(first[:, 0]) + lanes
    for lane in reversed(range(lanes)):
        following.insert(0, behind)
        behind = jnp.where(goes_on[:, lane], lane, behind)
    tokens = jnp.where(jnp.arange(options.max_new_tokens) == 0, (first * start.active)[..., None], 0)
    return Turns(
        lane=behind,
        token=_lane_of(first, behind),
        at=jnp.zeros_like(behind),
        written=LaneTokens(tokens, start.active.astype(jnp.int32), ends),
        first=first,
        following=jnp.stack(following, axis=1),
        keys=keys,
        allowed=view.allowed,
        positions=view.positions,
        position=position,
        turning=turning,
        cache=prefill.cache,
        tail=model.empty_tail(prefill.cache, 1, options.max_new_tokens),
    )


def advance(model: Mllm, params: dict, options: DecodeOptions, turns: Turns, busy: Int[Array, ""] | int) -> Turns:
    """Steps until no more than `busy` rows have something to do."""
    marks = Marks.of(options, model.config.decoder.vocab_size)
    lanes = turns.first.shape[1]

    def step(turns: Turns) -> Turns:
        of_lane = functools.partial(_lane_of, lane=turns.lane)
        view = LaneView(of_lane(turns.allowed)[:, None], turns.positions)
        place = (of_lane(turns.position) + turns.at)[:, None], (of_lane(turns.turning) + turns.at)[:, None]
        hidden, tail = model.decode_step(params, turns.cache, turns.tail, turns.token[:, None], *place, view, turns.at)
        at = turns.at + 1
        chosen = marks.draw(model.logits(params, hidden), of_lane(turns.keys)[:, None], at[:, None], options)[:, 0]
        here = (jnp.arange(lanes) == turns.lane[:, None]) & turns.busy[:, None]
        stopped = marks.stop(chosen) & turns.busy
        old = turns.written
        slot = here[..., None] & (jnp.arange(options.max_new_tokens) == at[:, None])[:, None]
        written = LaneTokens(
            tokens=jnp.where(slot, chosen[:, None, None], old.tokens), lengths=old.lengths + here, stopped=old.stopped | (here & stopped[:, None])
        )
        over = stopped | (at + 1 == options.max_new_tokens)
        lane = jnp.where(over & turns.busy, of_lane(turns.following), turns.lane)
        token = jnp.where(over, _lane_of(turns.first, lane), chosen)
        return dataclasses.replace(turns, lane=lane, token=token, at=jnp.where(over, 0, at), written=written, tail=tail)

    # what the loop only reads is no part of what it carries
    fixed = {name: getattr(turns, name) for name in ("cache", "allowed", "positions", "keys", "first", "following", "position", "turning")}
    moving = ("lane", "token", "at", "written", "tail")

    def body(carry: dict) -> dict:
        new = step(Turns(**fixed, **carry))
        return {name: getattr(new, name) for name in moving}

    carry = {name: getattr(turns, name) for name in moving}
    return Turns(**fixed, **jax.lax.while_loop(lambda carry: jnp.sum(carry["lane"] < lanes) > busy, body, carry))


def pick(turns: Turns, index: Int[Array, " N"]) -> Turns:
    """The rows `index`, each as it is. Those that are picked for no more than their place are done with `idle`."""
    return _over_rows(lambda x, axis: _rows_of(x, index, axis), turns)


def idle(turns: Turns) -> Turns:
    """The same places with nothing to do."""
    return dataclasses.replace(turns, lane=jnp.zeros_like(turns.lane) + turns.first.shape[1])


def wider(turns: Turns, slots: int) -> Turns:
    """With caches of at least `slots` slots; nobody looks at the new ones."""
    more = max(slots - turns.slots, 0)

    def pad(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, more if number == axis else 0) for number in range(x.ndim)]) if more else x

    axis = turns.cache.row_axis + 2
    cache = jax.tree.map(lambda x: pad(x, axis), turns.cache)
    return dataclasses.replace(turns, cache=cache, allowed=pad(turns.allowed, 2), positions=pad(turns.positions, 1))


def put(turns: Turns, new: Turns, source: Int[Array, " B"]) -> Turns:
    """`turns` with row `source[b]` of `new` in place b where that is not negative. T of `new` is no larger."""
    picked = pick(wider(new, turns.slots), jnp.maximum(source, 0))
    axes = _over_rows(lambda x, axis: axis, turns)

    def choose(axis: int, old: Array, one: Array) -> Array:
        here = jnp.expand_dims(source >= 0, tuple(number for number in range(old.ndim) if number != axis))
        return jnp.where(here, one, old)

    return jax.tree.map(choose, axes, turns, picked)


def _over_rows(function, turns: Turns) -> Turns:
    """`function(leaf, axis of its rows)` of every leaf."""
    of = lambda tree, axis: jax.tree.map(lambda leaf: function(leaf, axis), tree)  # noqa: E731
    rows = of(dataclasses.replace(turns, cache=None, tail=None), 0)
    return dataclasses.replace(rows, cache=of(turns.cache, turns.cache.row_axis), tail=of(turns.tail, turns.tail.row_axis))


def _rows_of(x: Array, index: Int[Array, " N"], axis: int) -> Array:
    sharding = jax.typeof(x).sharding.spec if mesh_lib.active() else None
    return x.at[(slice(None),) * axis + (index,)].get(out_sharding=sharding)


def _at(values: Array, index: Int[Array, " B"]) -> Array:
    """`values[b, index[b]]`."""
    # not take_along_axis, which cannot tell the sharding of one lane of one row
    return jax.vmap(lambda one, at: one[at])(values, index)


def _lane_of(values: Array, lane: Int[Array, " B"]) -> Array:
    """`values[b, lane[b]]`; of a row that is done, its last lane's."""
    return _at(values, jnp.minimum(lane, values.shape[1] - 1))
