"""Signs of over-optimisation that the loss does not show: what the policy says by itself, and what it says without the image.

They are measured now and then on the rows of a step before that step trains on them, so that in the first epoch the rows are new.
Sources: arXiv 2406.02900 (divergence), 2410.08847 (displacement), 2406.11839 and 2411.02712 (what the image contributes).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax import losses
from mmalign_jax.models.lora import is_factor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.packed_pairs import one_a_row
from mmalign_jax.models.tree import split, union
from mmalign_jax.sampling import DecodeOptions, LaneStart, decode_lanes, lane_keys
from mmalign_jax.training.branches import Side, prompts, with_answer
from mmalign_jax.types import PairBatch

Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Makes the measurements; `options` says how the policy's own answers are drawn (temperature 1, so that they are samples of it).

    Pairs that share a row are given rows of their own first.
    """

    model: Mllm
    options: DecodeOptions

    def jitted(self) -> Callable[[dict, dict, dict | None, PairBatch, Array], Metrics]:
        """`(params, frozen, reference, batch [A, B, ...], key) -> metrics` over the first of the batch's parts."""
        return jax.jit(lambda params, frozen, reference, batch, key: self(params, frozen, reference, jax.tree.map(lambda x: x[0], batch), key))

    def __call__(self, params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array) -> Metrics:
        """Means over the rows `[B]`.

        monitor/entropy: of a token of the chosen answer, nats.
        monitor/kl: KL(policy || reference) of a token of the chosen answer, whole vocabulary, nats.
        monitor/image_gain, image_gain_rejected: how much likelier the image makes the answer, nats a token, against black images.
        monitor/accuracies_no_image: how often the chosen answer is preferred without the image; near the accuracy with it, the preference
          was learnt from the text alone.
        monitor/accuracies_image: how often the image raises the chosen answer's score.
        monitor/length_correlation: Pearson correlation over the rows of the margin with the difference in length.
        monitor/length, monitor/ended: tokens of the policy's own answers, and how many of these ended.
        monitor/kl_on_policy: of an own answer, sum over its tokens of log policy - log reference, nats.

        Args:
          reference: the reference's own copies of trainable leaves; without one, scores are mean log-probs and no divergence is measured.
        """
        batch, policy = one_a_row(batch), Side(self.model, union(params, frozen))
        theirs = None
        if reference is not None:
            model = self.model if split(reference, is_factor)[0] else self.model.without_adapter()
            theirs = Side(model, union(reference, frozen))
        features = policy.tower(batch)
        hidden = policy.hidden(features, batch)
        out = self._with_and_without_image(policy, theirs, batch, features, hidden)
        return out | self._own_answers(policy, theirs, batch, features, key)

    def _with_and_without_image(
        self, policy: Side, theirs: Side | None, batch: PairBatch, features: Float[Array, "I F Z"], hidden: Float[Array, "B T D"]
    ) -> Metrics:
        blind = policy.blind(batch)
        weight = batch.by_answer(batch.token_weight)
        seen = policy.tokens(hidden, batch, ("entropy",))
        blind_features = policy.tower(blind)
        unseen = policy.tokens(policy.hidden(blind_features, blind), blind)
        total = lambda values: losses.sums(values, weight > 0, weight)  # noqa: E731
        (sums, lengths), (blind_sums, _) = total(seen.logps), total(unseen.logps)
        per_token = lambda values: values / jnp.maximum(lengths, 1.0)  # noqa: E731
        gain = per_token(sums - blind_sums)
        out = {"monitor/entropy": per_token(total(seen.entropy)[0])[:, 0], "monitor/image_gain": gain[:, 0]}
        score, blind_score = per_token(sums), per_token(blind_sums)
        if theirs is not None:
            their_hidden = theirs.hidden(theirs.tower(batch), batch)
            score = sums - total(theirs.tokens(their_hidden, batch).logps)[0]
            blind_score = blind_sums - total(theirs.tokens(theirs.hidden(theirs.tower(blind), blind), blind).logps)[0]
            # the roles exchanged: the statistic is KL(second || first)
            kl = theirs.tokens(their_hidden, batch, ("kl",), (hidden, policy.head())).kl
            out["monitor/kl"] = per_token(total(kl)[0])[:, 0]
        out["monitor/accuracies_image"] = score[:, 0] > blind_score[:, 0]
        if batch.answers > 1 and batch.sampled is None and batch.rewards is None:  # two that are compared, and no group
            out |= {"monitor/image_gain_rejected": gain[:, 1], "monitor/accuracies_no_image": blind_score[:, 0] > blind_score[:, 1]}
            out["monitor/length_correlation"] = _pearson(lengths[:, 0] - lengths[:, 1], score[:, 0] - score[:, 1])
        return {name: jnp.mean(value.astype(jnp.float32)) for name, value in out.items()}

    def _own_answers(self, policy: Side, theirs: Side | None, batch: PairBatch, features: Float[Array, "I F Z"], key: Array) -> Metrics:
        asked = prompts(batch)
        filled = self.model.prefill(policy.params, self.model.project(policy.params, features), asked)
        keys = lane_keys(key, asked.record_key, jnp.zeros_like(asked.record_key, jnp.int32), 1)
        samples = decode_lanes(self.model, policy.params, filled, asked, LaneStart.behind_prefix(asked.role), keys, self.options)
        tokens, lengths = samples.tokens[:, 0], samples.lengths[:, 0]
        out = {"monitor/length": lengths, "monitor/ended": samples.stopped[:, 0]}
        if theirs is not None:
            scored = jnp.arange(tokens.shape[-1]) < lengths[:, None]
            said = with_answer(asked, tokens, scored, scored.astype(jnp.float32))
            their_logps = theirs.tokens(theirs.hidden(theirs.tower(said), said), said).logps[:, 0]
            out["monitor/kl_on_policy"] = jnp.sum(jnp.where(scored, samples.logps[:, 0] - their_logps, 0.0), axis=-1)
        return {name: jnp.mean(value.astype(jnp.float32)) for name, value in out.items()}


def _pearson(a: Float[Array, " B"], b: Float[Array, " B"]) -> Float[Array, ""]:
    """0 where one of the two does not vary."""
    a, b = a - jnp.mean(a), b - jnp.mean(b)
    scale = jnp.sqrt(jnp.mean(a**2) * jnp.mean(b**2))
    return jnp.where(scale > 0, jnp.mean(a * b) / jnp.where(scale > 0, scale, 1.0), 0.0)
