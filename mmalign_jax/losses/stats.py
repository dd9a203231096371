"""What an objective reads: log-probs of a row's answers, under the row's own images and under others."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mmalign_jax.types import Sampled

_OPEN = ("nll", "auxiliary_nll", "kl", "scores", "values")

PerPair = Float[Array | np.ndarray, " B"]
PerToken = Float[Array | np.ndarray, "B R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnswerLogps:
    """Log-probs of K answers of each row under one choice of images. Answer 0 is the chosen one, answer 1 the rejected one."""

    policy: Float[Array, "B K"] | None  # sums over an answer's tokens, nats; None: the objective reads no log-probs
    lengths: Float[Array, "B K"]  # tokens (total token weight)
    reference: Float[Array, "B K"] | None = None
    policy_tokens: Float[Array, "B K R"] | None = None  # the same by token, 0 off the answer
    reference_tokens: Float[Array, "B K R"] | None = None
    token_weight: Float[Array, "B K R"] | None = None  # 0 off the answer
    changed: Bool[Array, "B K R"] | None = None  # tokens that differ from the row's other answer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BranchStats:
    """Everything that terms may read of a batch. A field that the objective did not declare is None (`terms.Need`)."""

    answers: AnswerLogps
    other_image: AnswerLogps | None = None  # the first answers again, under a corrupted image
    no_image: AnswerLogps | None = None  # the answers under black images; no gradient flows into it
    mismatched: AnswerLogps | None = None  # K = 1: another row's chosen answer behind this row's prompt; no gradient
    self_rejected: AnswerLogps | None = None  # K = 1: what the policy says, token by token, in place of the chosen answer under a corrupted image
    margin: Float[Array, " B"] | None = None  # how much better the chosen answer is, by whoever scored the two
    weight: Float[Array, " B"] | None = None  # of the pair in the loss
    nll: Float[Array, " B"] | None = None  # mean NLL a token of the chosen answer, where it is not that of `answers`
    auxiliary_nll: Float[Array, " B"] | None = None  # mean NLL a token of a row of another data set
    sampled: Sampled | None = None  # of answers that are samples
    desirable: Bool[Array, " B"] | None = None  # the label of a row's only answer
    rewards: Float[Array, "B K"] | None = None  # of answers that are ranked by them
    collision: Float[Array, "B K"] | None = None  # sum over tokens of log sum_v pi(v)^2
    kl: Float[Array, "B K"] | None = None  # sum over tokens of KL(reference || policy), whole vocabulary
    scores: Float[Array, "B K"] | None = None  # by the score head at each answer's end token
    values: Float[Array, "B K R"] | None = None  # by the score head at the state before each token, 0 off the answer
    state: Mapping[str, Float[Array, ""]] | None = None  # before this step; None: at the beginning
    epoch: Int[Array, ""] | None = None
    key: Key[Array, ""] | None = None  # of the step, for objectives that draw a sample of the batch

    @classmethod
    def pair(
        cls,
        policy_chosen: PerPair,
        policy_rejected: PerPair,
        chosen_len: PerPair,
        rejected_len: PerPair,
        reference_chosen: PerPair | None = None,
        reference_rejected: PerPair | None = None,
        *,
        policy_chosen_other_image: PerPair | None = None,
        reference_chosen_other_image: PerPair | None = None,
        policy_rejected_other_image: PerPair | None = None,
        reference_rejected_other_image: PerPair | None = None,
        policy_chosen_other_image_tokens: PerToken | None = None,
        reference_chosen_other_image_tokens: PerToken | None = None,
        policy_chosen_no_image: PerPair | None = None,
        policy_rejected_no_image: PerPair | None = None,
        reference_chosen_no_image: PerPair | None = None,
        reference_rejected_no_image: PerPair | None = None,
        policy_mismatched: PerPair | None = None,
        reference_mismatched: PerPair | None = None,
        policy_self_rejected: PerPair | None = None,
        reference_self_rejected: PerPair | None = None,
        policy_chosen_tokens: PerToken | None = None,
        policy_rejected_tokens: PerToken | None = None,
        reference_chosen_tokens: PerToken | None = None,
        reference_rejected_tokens: PerToken | None = None,
        chosen_changed: Bool[Array | np.ndarray, "B R"] | None = None,
        rejected_changed: Bool[Array | np.ndarray, "B R"] | None = None,
        chosen_collision: PerPair | None = None,
        rejected_collision: PerPair | None = None,
        chosen_kl: PerPair | None = None,
        rejected_kl: PerPair | None = None,
        margin: PerPair | None = None,
        weight: PerPair | None = None,
        chosen_score: PerPair | None = None,
        rejected_score: PerPair | None = None,
        nll: PerPair | None = None,
        auxiliary_nll: PerPair | None = None,
        state: Mapping[str, Float[Array, ""]] | None = None,
        epoch: Int[Array, ""] | None = None,
    ) -> "BranchStats":
        """The record for chosen/rejected pairs, from plain arrays.

        Args:
          policy_*, reference_*: log-prob sums `[B]` in nats; `*_tokens`: by token `[B, R]`, filled up with zeros behind the answer.
          chosen_len, rejected_len: tokens `[B]`.
          *_other_image, *_no_image: of the same answer under a corrupted, or without an, image.
          *_changed: tokens that differ between the two answers, `[B, R]`.
          *_collision, *_kl: sums over tokens of log sum_v pi(v)^2, and of KL(reference || policy).
          *_score: of the answer, by the score head.

        Raises:
          ValueError: of two arrays that belong together one is missing.
        """

        def both(chosen: Array | None, rejected: Array | None, what: str) -> Array | None:
            if (chosen is None) != (rejected is None):
                raise ValueError(f"give {what} of both the chosen and the rejected answer, or of neither")
            return None if chosen is None else jnp.stack([jnp.asarray(chosen), jnp.asarray(rejected)], axis=1)

        def some(chosen: Array | None, rejected: Array | None = None) -> Array | None:
            if chosen is None and rejected is not None:
                raise ValueError("what is given of the rejected answer under the other image is wanted of the chosen one, too")
            given = [jnp.asarray(x) for x in (chosen, rejected) if x is not None]
            return jnp.stack(given, axis=1) if given else None

        lengths = both(chosen_len, rejected_len, "the length")
        changed = both(chosen_changed, rejected_changed, "the changed tokens")

        def branch(policy: Array | None, reference: Array | None, tokens: Array | None = None, theirs: Array | None = None):
            if policy is None:
                return None
            count = policy.shape[1]
            if reference is not None and reference.shape[1] != count:
                raise ValueError("give the reference's log-probs under the other image of the same answers as the policy's")

            def all_answers(values: Array | None) -> Array | None:
                return None if values is None else jnp.pad(values, ((0, 0), (0, count - values.shape[1]), (0, 0)))

            inside = None if tokens is None else (jnp.arange(tokens.shape[-1]) < lengths[:, :count, None]).astype(tokens.dtype)
            return AnswerLogps(
                policy,
                lengths[:, :count],
                reference,
                all_answers(tokens),
                all_answers(theirs),
                inside,
                None if changed is None else changed[:, :count],
            )

        tokens = both(policy_chosen_tokens, policy_rejected_tokens, "the policy's log-probs by token")
        theirs = both(reference_chosen_tokens, reference_rejected_tokens, "the reference's log-probs by token")
        policy = both(policy_chosen, policy_rejected, "the policy's log-prob")
        other = some(policy_chosen_other_image, policy_rejected_other_image)
        return cls(
            answers=branch(policy, both(reference_chosen, reference_rejected, "the reference's log-prob"), tokens, theirs),
            other_image=branch(
                other,
                some(reference_chosen_other_image, reference_rejected_other_image),
                some(policy_chosen_other_image_tokens),
                some(reference_chosen_other_image_tokens),
            ),
            no_image=branch(
                both(policy_chosen_no_image, policy_rejected_no_image, "the log-prob without image"),
                both(reference_chosen_no_image, reference_rejected_no_image, "the reference's log-prob without image"),
            ),
            mismatched=branch(some(policy_mismatched), some(reference_mismatched)),
            self_rejected=branch(some(policy_self_rejected), some(reference_self_rejected)),
            margin=margin,
            weight=weight,
            nll=nll,
            auxiliary_nll=auxiliary_nll,
            collision=both(chosen_collision, rejected_collision, "the collision"),
            kl=both(chosen_kl, rejected_kl, "the KL divergence"),
            scores=both(chosen_score, rejected_score, "the score"),
            state=state,
            epoch=epoch,
        )

    def as_float32(self) -> "BranchStats":
        """The statistics in float32 at least, everything that is not the policy's cut off from differentiation.

        Log-ratios are small differences of large sums: sums that arrive in bfloat16 have lost their signal already, but nothing more is
        lost here. float64 is left as it is.
        """

        def read(x: Array) -> Array:
            x = jnp.asarray(x)
            return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

        def fixed(tree):
            return jax.tree.map(lambda x: jax.lax.stop_gradient(read(x)), tree)

        def learning(logps: AnswerLogps | None) -> AnswerLogps | None:
            if logps is None:
                return None
            theirs = {name: None if (x := getattr(logps, name)) is None else read(x) for name in ("policy", "policy_tokens")}
            return dataclasses.replace(fixed(dataclasses.replace(logps, **dict.fromkeys(theirs))), **theirs)

        own = ("answers", "other_image", "self_rejected")
        # what terms may differentiate though it is no log-prob of an answer
        open_ = {name: None if getattr(self, name) is None else read(getattr(self, name)) for name in _OPEN}
        out = fixed(dataclasses.replace(self, key=None, **dict.fromkeys(own[1:]), **dict.fromkeys(open_)))
        return dataclasses.replace(out, key=self.key, **{name: learning(getattr(self, name)) for name in own}, **open_)
