"""Lanes that take turns: a row works on one of its lanes at a time, and rows that have none left are not computed.

The same samples as `decode_lanes`, for lanes of unlike lengths (sentences that stop after two tokens or after forty). There every lane costs
as much as the longest of the batch. Here a row starts its next lane where one stops, so rows are busy for as long as their lanes are
together, which differs less; and when half of the rows are done, the other half goes on alone. A row holds the tail of one lane.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.models.mllm import LaneView, Mllm, Prefill
from mmalign_jax.sampling.decode import DecodeOptions, LaneStart, Marks
from mmalign_jax.types import PairBatch

_FEWEST = 4  # rows; a step of fewer takes no less time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneTokens:
    """What the lanes wrote: tokens up to and including the stop token, 0 behind."""

    tokens: Int[Array, "B S X"]
    lengths: Int[Array, "B S"]
    stopped: Bool[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Lanes:
    """What is known of a row's lanes before the first step: first token, the lane that comes behind each, and where each starts."""

    first: Int[Array, "B S"]
    following: Int[Array, "B S"]
    keys: Array
    allowed: Bool[Array, "B S T"]
    position: Int[Array, "B S"]
    turning: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where each row is: its lane (S: it is done), the last token written, and that token's number in its lane."""

    lane: Int[Array, " B"]
    token: Int[Array, " B"]
    at: Int[Array, " B"]
    written: LaneTokens


def decode_in_turn(
    model: Mllm,
    params: dict,
    prefill: Prefill,
    batch: PairBatch,
    start: LaneStart,
    keys: Array,
    options: DecodeOptions,
    visible: Bool[Array, "B T"] | None = None,
) -> LaneTokens:
    """What every active lane writes until it stops or its tail is full. Arguments as of `decode_lanes`.

    Raises:
      ValueError: stop strings are given, which only `decode_lanes` knows.
    """
    if options.stop_strings is not None:
        raise ValueError("lanes that take turns know no stop strings")
    rows, lanes = start.slot.shape
    view, position, turning = model.lane_view(batch, start.slot, visible)
    marks = Marks.of(options, model.config.decoder.vocab_size)

    def first_of(slot: Int[Array, " B"], keys: Array) -> Int[Array, " B"]:
        hidden = _at(prefill.hidden, slot)[:, None]
        return marks.draw(model.logits(params, hidden), keys[:, None], jnp.zeros_like(slot)[:, None], options)[:, 0]

    # a lane after the other: the logits of all of them at once are the largest array of all
    first = jnp.stack([first_of(start.slot[:, lane], keys[:, lane]) for lane in range(lanes)], axis=1)
    ends = marks.stop(first) & start.active
    goes_on = start.active & ~ends & (options.max_new_tokens > 1)
    # the next lane that goes on, from the last lane back
    following, behind = [], jnp.zeros_like(first[:, 0]) + lanes
    for lane in reversed(range(lanes)):
        following.insert(0, behind)
        behind = jnp.where(goes_on[:, lane], lane, behind)
    tokens = jnp.where(jnp.arange(options.max_new_tokens) == 0, (first * start.active)[..., None], 0)
    state = _State(behind, _lane_of(first, behind), jnp.zeros_like(behind), LaneTokens(tokens, start.active.astype(jnp.int32), ends))
    known = _Lanes(first, jnp.stack(following, axis=1), keys, view.allowed, position, turning)
    cache, positions = prefill.cache, view.positions
    tail = model.empty_tail(cache, 1, options.max_new_tokens)
    order, sizes = jnp.arange(rows), _sizes(rows)
    for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
        if size < rows:
            # those with work come first; what is behind `size` is done
            new = jnp.argsort(_whole(state.lane) >= lanes, stable=True)
            order, state, known, positions = jax.tree.map(functools.partial(_pick, index=new), (order, state, known, positions))
            cache, tail = jax.tree.map(functools.partial(_pick, index=new[:size], axis=cache.row_axis), (cache, tail))
        head = jax.tree.map(functools.partial(_pick, index=jnp.arange(size)), (state, known, positions)) if size < rows else (state, known, positions)
        few, tail = _run(model, params, marks, options, cache, tail, *head, smaller=smaller)
        state = few if size == rows else jax.tree.map(_over, state, few)
    return state.written if len(sizes) == 1 else jax.tree.map(functools.partial(_pick, index=jnp.argsort(order)), state.written)


def _sizes(rows: int) -> tuple[int, ...]:
    """How many rows are computed, stage by stage. Rows that several devices hold stay where they are."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return (rows,)
    out = [rows]
    while out[-1] // 2 >= _FEWEST:
        out.append(out[-1] // 2)
    return tuple(out)


def _run(
    model: Mllm, params: dict, marks: Marks, options: DecodeOptions, cache: Any, tail: Any, state: _State, known: _Lanes,
    positions: Int[Array, "B T"], smaller: int,
) -> tuple[_State, Any]:  # fmt: skip
    """Steps until no more than `smaller` rows have something to do."""
    lanes = known.first.shape[1]

    def going(carry: tuple[_State, Any]) -> Bool[Array, ""]:
        return jnp.sum(carry[0].lane < lanes) > smaller

    def step(carry: tuple[_State, Any]) -> tuple[_State, Any]:
        state, tail = carry
        of_lane = functools.partial(_lane_of, lane=state.lane)
        view = LaneView(of_lane(known.allowed)[:, None], positions)
        place = (of_lane(known.position) + state.at)[:, None], (of_lane(known.turning) + state.at)[:, None]
        hidden, tail = model.decode_step(params, cache, tail, state.token[:, None], *place, view, state.at)
        at, busy = state.at + 1, state.lane < lanes
        chosen = marks.draw(model.logits(params, hidden), of_lane(known.keys)[:, None], at[:, None], options)[:, 0]
        here = (jnp.arange(lanes) == state.lane[:, None]) & busy[:, None]
        stopped = marks.stop(chosen) & busy
        old = state.written
        slot = here[..., None] & (jnp.arange(options.max_new_tokens) == at[:, None])[:, None]
        written = LaneTokens(
            tokens=jnp.where(slot, chosen[:, None, None], old.tokens), lengths=old.lengths + here, stopped=old.stopped | (here & stopped[:, None])
        )
        over = stopped | (at + 1 == options.max_new_tokens)
        lane = jnp.where(over & busy, of_lane(known.following), state.lane)
        token = jnp.where(over, _lane_of(known.first, lane), chosen)
        return _State(lane, token, jnp.where(over, 0, at), written), tail

    return jax.lax.while_loop(going, step, (state, tail))


def _whole(x: Array) -> Array:
    """Not split. Only where one device holds everything, so that nothing moves."""
    return jax.sharding.reshard(x, P()) if mesh_lib.active() else x


def _pick(x: Array, index: Int[Array, " n"], axis: int = 0) -> Array:
    """The rows `index` of `x`, see `_whole`."""
    picked = jnp.take(_whole(x), index, axis=axis)
    return jax.sharding.reshard(picked, jax.typeof(x).sharding.spec) if mesh_lib.active() else picked


def _over(x: Array, first: Array) -> Array:
    """`x` with `first` in the place of its first rows, see `_whole`."""
    joined = jnp.concatenate([_whole(first), _whole(x)[first.shape[0] :]])
    return jax.sharding.reshard(joined, jax.typeof(x).sharding.spec) if mesh_lib.active() else joined


def _at(values: Array, index: Int[Array, " B"]) -> Array:
    """`values[b, index[b]]`."""
    # not take_along_axis, which cannot tell the sharding of one lane of one row
    return jax.vmap(lambda one, at: one[at])(values, index)


def _lane_of(values: Array, lane: Int[Array, " B"]) -> Array:
    """`values[b, lane[b]]`; of a row that is done, its last lane's."""
    return _at(values, jnp.minimum(lane, values.shape[1] - 1))
