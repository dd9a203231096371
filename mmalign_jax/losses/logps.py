"""Log-probs of packed answers, a chunk of positions at a time: logits `[B, T, V]` never exist."""

import dataclasses
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import mesh
from mmalign_jax.types import FIRST_ANSWER, PREFIX


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Of the tokens of packed answers; 0 off the answers. What was not asked for is None."""

    logps: Float[Array, "B K R"]  # nats
    mask: Bool[Array, "B K R"]  # which slots hold an answer token
    collision: Float[Array, "B K R"] | None = None  # log sum_v pi(v)^2
    entropy: Float[Array, "B K R"] | None = None  # nats
    kl: Float[Array, "B K R"] | None = None  # KL(reference || policy), nats
    reference: Float[Array, "B K R"] | None = None  # with `kl`: log-probs by the reference, nats
    argmax: Int[Array, "B K R"] | None = None  # the likeliest token


STATISTICS = ("collision", "entropy", "kl", "argmax")


def answer_logps(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    role: Int[Array, "B T"],
    *,
    prefix_slots: int,
    answer_slots: int,
    softcap: float | None = None,
    chunk: int = 128,
) -> tuple[Float[Array, "B K R"], Bool[Array, "B K R"]]:
    """`answer_statistics` with log-probs alone: (log-probs in nats, which slots hold an answer token)."""
    slots = {"prefix_slots": prefix_slots, "answer_slots": answer_slots, "softcap": softcap, "chunk": chunk}
    stats = answer_statistics(hidden, head, tokens, role, **slots)
    return stats.logps, stats.mask


def answer_statistics(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    role: Int[Array, "B T"],
    *,
    prefix_slots: int,
    answer_slots: int,
    softcap: float | None = None,
    chunk: int = 128,
    wanted: Collection[str] = (),
    reference: tuple[Float[Array, "B T _D"], Float[Array, "_D V"]] | None = None,
    allowed: Bool[Array, " V"] | Bool[np.ndarray, " V"] | None = None,
    segment: Int[Array, "B T"] | None = None,
    segments: int = 1,
) -> TokenStats:
    """Log-probs of the answer tokens of packed rows `[prefix | answer 1 | ... | answer K]` (`types.PairBatch`), and more of the same logits.

    The first token of every answer is predicted by the row's last prefix token, each later one by the token before it in its answer.
    A row that has answer tokens must have a prefix token. Logits, log-softmax and results are float32, whatever the inputs are; the
    backward pass computes the logits of each of several chunks again, so that only one `[B, chunk, V]` exists at a time (two with `kl`).

    Under a mesh the batch stays sharded and so does the vocabulary. Give `head` as it is at rest, `[embed, vocab]`, cast to the compute
    type: it is gathered here, and its gradient is reduced over the batch once, not once a chunk.

    Args:
      hidden: last hidden states. Values at slots that predict nothing are not read, not even NaNs.
      head: output kernel.
      prefix_slots: P.
      answer_slots: R.
      softcap: logits become softcap * tanh(logits / softcap) (arXiv 2408.00118); None leaves them.
      chunk: most positions of a row whose logits exist at one time.
      wanted: which of `STATISTICS` to compute.
      reference: the reference's hidden states and output kernel, for `kl`, of any width; cut off from differentiation.
      allowed: the tokens among which `argmax` is the likeliest; None for all.
      segment: of rows with several pairs, the number of each token's, -1 off all of them: each pair's answers follow its own prefix. None: one pair.
      segments: most pairs of a row.

    Raises:
      ValueError: the slots do not make up the row, an unknown statistic is wanted, or `kl` is without a reference.
    """
    answers, left_over = divmod(hidden.shape[1] - prefix_slots, answer_slots)
    if left_over or answers < 1:
        raise ValueError(f"{hidden.shape[1]} slots are not {prefix_slots} for the prefix and a multiple of {answer_slots} for the answers")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if unknown := set(wanted) - set(STATISTICS):
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {', '.join(STATISTICS)}")
    if "kl" in wanted and reference is None:
        raise ValueError("kl needs the reference's hidden states and output kernel")
    rows, slots = hidden.shape[0], answers * answer_slots
    with jax.named_scope("answer_logps"):
        answer_role = FIRST_ANSWER + jnp.arange(slots) // answer_slots
        mask = role[:, prefix_slots:] == answer_role

        def predicting(states: Float[Array, "B T D"]) -> Float[Array, "B KR D"]:
            if segment is None:
                found = _predicting(states, role, prefix_slots, answers)
            else:
                found = jnp.take_along_axis(states, _predictors(role, segment, segments, prefix_slots, answer_slots)[..., None], axis=1)
            return jnp.where(mask[..., None], found, 0)

        heads, states = (_gathered(head),), (predicting(hidden),)
        if "kl" in wanted:
            theirs = jax.lax.stop_gradient(reference)
            heads, states = (*heads, _gathered(theirs[1])), (*states, predicting(theirs[0]))
        found = _chunked(states, heads, tokens[:, prefix_slots:], chunk, softcap, frozenset(wanted), allowed)
        # after the selection, so that a gradient of exactly 0 goes to slots off the answers
        found = {name: jnp.where(mask, value, 0).reshape(rows, answers, answer_slots) for name, value in found.items()}
    return TokenStats(mask=mask.reshape(rows, answers, answer_slots), **found)


def sums(
    logps: Float[Array, "B K R"], mask: Bool[Array, "B K R"], weight: Float[Array, "B K R"] | None = None
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Weighted log-prob sums (nats) and lengths of the answers, float32.

    The length is the total weight, so that sum / length is the weighted mean; with weights of 0 and 1 it counts scored tokens.
    """
    weight = mask.astype(jnp.float32) if weight is None else jnp.where(mask, weight.astype(jnp.float32), 0.0)
    return jnp.sum(logps.astype(jnp.float32) * weight, axis=-1), jnp.sum(weight, axis=-1)


def _predicting(hidden: Float[Array, "B T D"], role: Int[Array, "B T"], prefix_slots: int, answers: int) -> Float[Array, "B KR D"]:
    """For each answer slot the hidden state that predicts its token."""
    rows, _, width = hidden.shape
    last = jnp.max(jnp.where(role == PREFIX, jnp.arange(role.shape[1]), 0), axis=1)
    last_prefix = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    # the shardings are named, because a reshape of a single row forgets that it is split by the batch axes
    branches = mesh.reshape(hidden[:, prefix_slots:], (rows, answers, -1, width), "batch", None, None, None)
    first = jnp.broadcast_to(last_prefix[:, None], (rows, answers, 1, width))
    return mesh.reshape(jnp.concatenate([first, branches[:, :, :-1]], axis=2), (rows, -1, width), "batch", None, None)


def _predictors(
    role: Int[Array, "B T"], segment: Int[Array, "B T"], segments: int, prefix_slots: int, answer_slots: int
) -> Int[Array, "B KR"]:
    """For each answer slot of rows with several pairs, the slot whose state predicts its token."""
    slots = jnp.arange(role.shape[1])
    own = (segment[:, None] == jnp.arange(segments)[:, None]) & (role == PREFIX)[:, None]
    last = jnp.max(jnp.where(own, slots, 0), axis=-1)
    here, before = segment[:, prefix_slots:], segment[:, prefix_slots - 1 : -1]
    begins = (here != before) | ((slots[prefix_slots:] - prefix_slots) % answer_slots == 0)
    return jnp.where(begins, jnp.take_along_axis(last, jnp.maximum(here, 0), axis=1), slots[prefix_slots:] - 1)


def _gathered(head: Float[Array, "D V"]) -> Float[Array, "D V"]:
    """The kernel with `embed` gathered. "Reduced" over the batch axes: its gradient stays a sum of local parts until it leaves the scan."""
    if not mesh.active():
        return head
    spec = PartitionSpec(*mesh.spec(None, "vocab"), reduced=frozenset(mesh.RULES["batch"]))
    return jax.sharding.reshard(head, spec)


def _chunked(
    hidden: tuple[Float[Array, "B S _D"], ...],
    heads: tuple[Float[Array, "_D V"], ...],
    labels: Int[Array, "B S"],
    chunk: int,
    softcap: float | None,
    wanted: frozenset[str],
    allowed: Array | np.ndarray | None,
) -> dict[str, Array]:
    rows, slots, _ = hidden[0].shape
    chunks = math.ceil(slots / chunk)
    size = math.ceil(slots / chunks)  # even chunks: fewer than `chunks` slots of padding

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * size - slots)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(mesh.reshape(x, (rows, chunks, size, *x.shape[2:]), "batch", *(None,) * x.ndim), 1, 0)

    def body(_: None, some: tuple[tuple[Array, ...], Array]) -> tuple[None, dict[str, Array]]:
        return None, _of_chunk(*some, heads, softcap, wanted, allowed)

    # one chunk's logits exist in the backward pass anyway; prevent_cse only matters outside of a scan
    body = body if chunks == 1 else jax.checkpoint(body, prevent_cse=False)
    _, found = jax.lax.scan(body, None, (jax.tree.map(split, hidden), split(labels)))
    return {name: mesh.reshape(jnp.moveaxis(value, 0, 1), (rows, chunks * size), "batch", None)[:, :slots] for name, value in found.items()}


def _of_chunk(
    hidden: tuple[Float[Array, "B S _D"], ...],
    labels: Int[Array, "B S"],
    heads: tuple[Float[Array, "_D V"], ...],
    softcap: float | None,
    wanted: frozenset[str],
    allowed: Array | np.ndarray | None,
) -> dict[str, Array]:
    logits = _logits(hidden[0], heads[0], softcap)
    total = jax.nn.logsumexp(logits, axis=-1)
    # a selection and not a lookup: the vocabulary may be sharded
    is_label = labels[..., None] == jnp.arange(logits.shape[-1])
    out = {"logps": jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1) - total}
    if "collision" in wanted:
        out["collision"] = jax.nn.logsumexp(2 * logits, axis=-1) - 2 * total
    if "entropy" in wanted:
        out["entropy"] = total - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    if "kl" in wanted:
        theirs = _logits(hidden[1], heads[1], softcap)
        their_total = jax.nn.logsumexp(theirs, axis=-1)
        out["reference"] = jnp.sum(jnp.where(is_label, theirs, 0.0), axis=-1) - their_total
        gap = (theirs - logits) - (their_total - total)[..., None]
        out["kl"] = jnp.sum(jax.nn.softmax(theirs, axis=-1) * gap, axis=-1)
    if "argmax" in wanted:
        choices = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
        out["argmax"] = jnp.argmax(choices, axis=-1)  # of a sharded vocabulary: the largest of each share's largest
    return out


def _logits(hidden: Float[Array, "B S D"], head: Float[Array, "D V"], softcap: float | None) -> Float[Array, "B S V"]:
    logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
