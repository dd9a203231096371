"""Log-probs of packed answers, a chunk of positions at a time: logits `[B, T, V]` never exist."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import mesh
from mmalign_jax.types import FIRST_ANSWER, PREFIX


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
    """Log-probs of the answer tokens of packed rows `[prefix | answer 1 | ... | answer K]` (`types.PairBatch`).

    The first token of every answer is predicted by the row's last prefix token, each later one by the token before it in its answer.
    A row that has answer tokens must have a prefix token. Logits, log-softmax and result are float32, whatever the inputs are; the
    backward pass computes the logits of each chunk again, so that only one `[B, chunk, V]` exists at a time.

    Under a mesh the batch stays sharded and so does the vocabulary. Give `head` as it is at rest, `[embed, vocab]`, cast to the compute
    type: it is gathered here, and its gradient is reduced over the batch once, not once a chunk.

    Args:
      hidden: last hidden states. Values at slots that predict nothing are not read, not even NaNs.
      head: output kernel.
      prefix_slots: P.
      answer_slots: R.
      softcap: logits become softcap * tanh(logits / softcap) (arXiv 2408.00118); None leaves them.
      chunk: most positions of a row whose logits exist at one time.

    Returns:
      Log-probs in nats (0 off the answers), and which slots hold an answer token.

    Raises:
      ValueError: the slots do not make up the row.
    """
    answers, left_over = divmod(hidden.shape[1] - prefix_slots, answer_slots)
    if left_over or answers < 1:
        raise ValueError(f"{hidden.shape[1]} slots are not {prefix_slots} for the prefix and a multiple of {answer_slots} for the answers")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    rows, slots = hidden.shape[0], answers * answer_slots
    with jax.named_scope("answer_logps"):
        answer_role = FIRST_ANSWER + jnp.arange(slots) // answer_slots
        mask = role[:, prefix_slots:] == answer_role
        predicting = jnp.where(mask[..., None], _predicting(hidden, role, prefix_slots, answers), 0)
        logps = _chunked_logps(predicting, _gathered(head), tokens[:, prefix_slots:], chunk, softcap)
        # after the selection, so that a gradient of exactly 0 goes to slots off the answers
        logps = jnp.where(mask, logps, 0.0)
    return logps.reshape(rows, answers, answer_slots), mask.reshape(rows, answers, answer_slots)


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
    branches = hidden[:, prefix_slots:].reshape(rows, answers, -1, width)
    first = jnp.broadcast_to(last_prefix[:, None], (rows, answers, 1, width))
    return jnp.concatenate([first, branches[:, :, :-1]], axis=2).reshape(rows, -1, width)


def _gathered(head: Float[Array, "D V"]) -> Float[Array, "D V"]:
    """The kernel with `embed` gathered. "Reduced" over the batch axes: its gradient stays a sum of local parts until it leaves the scan."""
    if not mesh.active():
        return head
    spec = PartitionSpec(*mesh.spec(None, "vocab"), reduced=frozenset(mesh.RULES["batch"]))
    return jax.sharding.reshard(head, spec)


def _chunked_logps(
    hidden: Float[Array, "B S D"], head: Float[Array, "D V"], labels: Int[Array, "B S"], chunk: int, softcap: float | None
) -> Float[Array, "B S"]:
    rows, slots, _ = hidden.shape
    chunks = math.ceil(slots / chunk)
    size = math.ceil(slots / chunks)  # even chunks: fewer than `chunks` slots of padding

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * size - slots)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    def body(_: None, hidden_and_labels: tuple[Array, Array]) -> tuple[None, Array]:
        return None, _token_logps(*hidden_and_labels, head, softcap)

    # prevent_cse only matters outside of a scan
    _, logps = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, (split(hidden), split(labels)))
    return jnp.moveaxis(logps, 0, 1).reshape(rows, chunks * size)[:, :slots]


def _token_logps(
    hidden: Float[Array, "B S D"], labels: Int[Array, "B S"], head: Float[Array, "D V"], softcap: float | None
) -> Float[Array, "B S"]:
    logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    # a selection and not a lookup: the vocabulary may be sharded
    is_label = labels[..., None] == jnp.arange(head.shape[1])
    return jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
