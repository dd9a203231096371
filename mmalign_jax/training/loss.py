"""Policy parameters and rows -> loss: the statistics that the objective declares, then the objective."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmalign_jax import losses, mesh
from mmalign_jax.losses import AnswerLogps, BranchStats, Need
from mmalign_jax.models import score_head
from mmalign_jax.models.lora import is_factor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.shared_pictures import of_rows, with_own_pictures
from mmalign_jax.models.tree import split, union
from mmalign_jax.pairs import views
from mmalign_jax.training.branches import Side, answer_logps, lengths_alone, weighted, with_mismatched
from mmalign_jax.training.corrupted import corrupted
from mmalign_jax.types import PairBatch

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moment:
    """Where training stands: what else a loss depends on beside parameters and rows."""

    step: Int[Array, ""]
    epoch: Int[Array, ""]
    objective: dict  # the objective's state

    @classmethod
    def first(cls, objective: losses.Objective) -> "Moment":
        return cls(jnp.int32(0), jnp.int32(0), objective.initial_state())


@dataclasses.dataclass(frozen=True)
class LossFunction:
    """Policy parameters and a batch -> loss. Only what the objective declares is computed.

    Where nothing of the vision tower trains, its features are computed once and shared by policy and reference. A reference whose tree
    has no low-rank factors is the model with its adapter off.

    Args:
      redraw_views: a corrupted image is drawn anew in every epoch; otherwise it is a function of seed, record and view alone.
    """

    model: Mllm
    objective: losses.Objective
    redraw_views: bool = False

    def with_remat(self, remat: str) -> "LossFunction":
        return dataclasses.replace(self, model=dataclasses.replace(self.model, remat=remat))

    @property
    def reads_reference(self) -> bool:
        """Whether reference log-probs must come from somewhere."""
        return Need.REFERENCE in self.objective.needs and not self.objective.reference_free

    @property
    def view(self) -> views.View | None:
        return views.parse(self.objective.view, "config.objective.view") if self.objective.view else None

    def __call__(
        self, params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array, moment: Moment | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean loss over the rows, and metrics. Arguments as of `statistics`."""
        per_pair, metrics = self.objective(self.statistics(params, frozen, reference, batch, key, moment))
        return jnp.mean(per_pair), metrics

    def prepared(self, batch: PairBatch) -> PairBatch:
        """The rows `[*A, B]` of a step with what takes all of them to make.

        Raises:
          ValueError: rows of several pairs do not have what the objective reads.
        """
        if batch.place is not None and self.objective.alone:
            reads = " and ".join(self.objective.alone)
            raise ValueError(f"{self.objective.name} reads {reads}, which rows of several pairs do not have")
        own = batch.answers == self.objective.answers
        return with_mismatched(batch) if Need.MISMATCHED in self.objective.needs and own else batch

    def with_drawn(self, params: dict, frozen: dict, batch: PairBatch) -> PairBatch:
        """The rows `[A, B]` of samples with log-probs, and values where the objective reads them, by the policy that drew them.

        Not the sampler's log-probs: in bfloat16 they are others, and the first update's ratios would not be 1.
        """
        side = Side(self.model, union(params, frozen))

        def of(some: PairBatch) -> tuple[Array, Array | None]:
            hidden = side.hidden(side.tower(some), some)
            values = None
            if Need.VALUES in self.objective.needs:
                values = score_head.before_tokens(side.model.scores(side.params, hidden), some)
            return side.tokens(hidden, some).logps, values

        logps, values = jax.lax.map(of, batch)
        return dataclasses.replace(batch, sampled=dataclasses.replace(batch.sampled, logps=logps, values=values))

    def statistics(
        self, params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array, moment: Moment | None = None
    ) -> BranchStats:
        """What the objective reads of the rows `[B]`. Where it goes by all rows of a step, these come in their order without packing.

        Args:
          params: the policy's trainable leaves. frozen: its other leaves, the reference's too.
          reference: the reference's own copies of trainable leaves (`trainable.Trainable`); None when the objective needs none, or when
            the batch brings its log-probs.
          key: of the run; views are drawn from it and the rows' record keys, once for policy and reference.
          moment: None: at the beginning.

        Raises:
          ValueError: as of `prepared`.
        """
        moment = Moment.first(self.objective) if moment is None else moment
        batch, needs = self.prepared(batch), self.objective.needs
        run = _Pass(self, params, frozen, reference, batch, key, moment)
        answers, mismatched, more = run.answers()
        own = {"margin": batch.margin, "weight": batch.weight, "sampled": batch.sampled}
        own |= {"desirable": batch.desirable, "rewards": batch.rewards}
        stats = BranchStats(answers, mismatched=mismatched, state=moment.objective, **own, **more)
        stats = dataclasses.replace(stats, epoch=moment.epoch, key=jax.random.fold_in(key, moment.step) if Need.BATCH in needs else None)
        if {Need.SCORES, Need.VALUES} & needs:
            stats = dataclasses.replace(stats, **run.scores())
        if Need.OTHER_IMAGE in needs:
            stats = dataclasses.replace(stats, other_image=run.other_image())
        if Need.NO_IMAGE in needs:
            stats = dataclasses.replace(stats, no_image=run.no_image())
        if Need.SELF_REJECTED in needs:
            stats = dataclasses.replace(stats, self_rejected=run.self_rejected())
        if Need.AUXILIARY in needs:
            stats = dataclasses.replace(stats, auxiliary_nll=run.auxiliary())
        # sorts and rolls over rows want them all; so few numbers cost nothing
        return _everywhere(stats, batch.turn) if Need.BATCH in needs else stats


class _Pass:
    """Policy and reference over one batch; what several statistics share is computed once."""

    def __init__(
        self, loss: LossFunction, params: dict, frozen: dict, reference: dict | None, batch: PairBatch, key: Array, moment: Moment
    ):
        self.loss, self.needs, self.batch, self.key, self.moment = loss, loss.objective.needs, batch, key, moment
        self.policy = Side(loss.model, union(params, frozen))
        self.tower_fixed = "vision_tower" not in params
        self.by_token = Need.TOKENS in self.needs
        self.reference = None
        if loss.reads_reference and reference is not None:
            theirs = union(reference, frozen)
            model = loss.model if split(reference, is_factor)[0] else loss.model.without_adapter()
            self.reference = Side(model, theirs).fixed()
        elif loss.reads_reference and batch.reference_logps is None:
            raise TypeError(f"{loss.objective.name} needs a reference: its parameters, or its log-probs in the batch")
        with jax.named_scope("policy"):
            self.features = self._features(self.policy, batch)
            self.hidden = self.policy.hidden(self.features, batch)
        if self.reference is not None:
            with jax.named_scope("reference"):
                self.their_features = self._theirs(batch, self.features)
                self.their_hidden = self.reference.hidden(self.their_features, batch)

    def answers(self) -> tuple[AnswerLogps, AnswerLogps | None, dict[str, Array]]:
        """The answers under the row's own images, the one that is another row's, and by name what else is read of the same logits."""
        if not self.loss.objective.reads_logps:
            return lengths_alone(self.batch), None, {}
        wanted = tuple(name for need, name in ((Need.COLLISION, "collision"), (Need.KL, "kl")) if need in self.needs)
        pair = (self.their_hidden, self.reference.head()) if "kl" in wanted else None
        tokens = self.policy.tokens(self.hidden, self.batch, wanted, pair)
        theirs = None
        if tokens.reference is not None:
            theirs = tokens.reference
        elif self.reference is not None:
            theirs = self.reference.tokens(self.their_hidden, self.batch).logps
        elif self.loss.reads_reference:
            theirs = self.batch.by_answer(self.batch.reference_logps)
        elif Need.REFERENCE in self.needs:
            theirs = jnp.zeros_like(tokens.logps)
        answers = answer_logps(tokens.logps, theirs, self.batch, by_token=self.by_token)
        more = {name: weighted(getattr(tokens, name), self.batch) for name in wanted}
        if Need.MISMATCHED not in self.needs:
            return answers, None, more
        count = self.batch.answers - 1
        own, last = (jax.tree.map(lambda x, part=part: x[:, part], answers) for part in (slice(count), slice(count, None)))
        return own, jax.lax.stop_gradient(last), {name: value[:, :count] for name, value in more.items()}

    def scores(self) -> dict[str, Array]:
        """What the score head says of the row's own answers: at their ends, before each of their tokens."""
        count = self.loss.objective.answers if Need.MISMATCHED in self.needs else self.batch.answers
        by_slot = self.policy.model.scores(self.policy.params, self.hidden)
        readings = ((Need.SCORES, score_head.at_ends), (Need.VALUES, score_head.before_tokens))
        return {need.value: read(by_slot, self.batch)[:, :count] for need, read in readings if need in self.needs}

    def other_image(self) -> AnswerLogps:
        other = self._corrupted(self.loss.objective.other_answers)
        with jax.named_scope("policy_other_image"):
            features = self._features(self.policy, other)
            tokens = self.policy.tokens(self.policy.hidden(features, other), other).logps
        theirs = None
        if self.reference is not None:
            with jax.named_scope("reference_other_image"):
                theirs = self.reference.tokens(self.reference.hidden(self._theirs(other, features), other), other).logps
        elif self.loss.reads_reference:
            theirs = self.batch.reference_other_logps.reshape(tokens.shape)
        elif Need.REFERENCE in self.needs:
            theirs = jnp.zeros_like(tokens)
        return answer_logps(tokens, theirs, other, by_token=self.by_token)

    def no_image(self) -> AnswerLogps:
        """The answers under black images: what the policy would say blindly."""
        policy = self.policy.fixed()
        blind = policy.blind(self._own_answers(self.loss.objective.answers))
        with jax.named_scope("policy_no_image"):
            features = self._features(policy, blind)
            tokens = policy.tokens(policy.hidden(features, blind), blind).logps
        theirs = jnp.zeros_like(tokens)
        if self.reference is not None:
            with jax.named_scope("reference_no_image"):
                theirs = self.reference.tokens(self.reference.hidden(self._theirs(blind, features), blind), blind).logps
        return jax.lax.stop_gradient(answer_logps(tokens, theirs, blind, by_token=self.by_token))

    def self_rejected(self) -> AnswerLogps:
        """What the policy finds likeliest at each token of the chosen answer under the corrupted image, scored under the row's own image
        in the chosen answer's place (POVID). The reference scores the same tokens."""
        chosen, corrupted, policy = self._own_answers(1), self._corrupted(1), self.policy.fixed()
        with jax.named_scope("policy_self_rejected"):
            features = self._features(policy, corrupted)
            said = policy.tokens(policy.hidden(features, corrupted), corrupted, ("argmax",)).argmax[:, 0]
        stop = chosen.tokens.shape[-1]
        tokens = jnp.concatenate([chosen.tokens[:, : chosen.prefix_slots], said.astype(chosen.tokens.dtype)], axis=1)
        relabelled = dataclasses.replace(chosen, tokens=tokens)
        ours = self.policy.tokens(self.hidden[:, :stop], relabelled).logps
        theirs = self.reference.tokens(self.their_hidden[:, :stop], relabelled).logps if self.reference is not None else jnp.zeros_like(ours)
        return answer_logps(ours, theirs, relabelled, by_token=self.by_token)

    def auxiliary(self) -> Float[Array, " B"]:
        """Mean negative log-likelihood a token of the other data set's rows."""
        rows = self.batch.auxiliary
        if rows is None:
            raise TypeError(f"{self.loss.objective.name} needs rows of another data set (config.auxiliary)")
        with jax.named_scope("policy_auxiliary"):
            tokens = self.policy.tokens(self.policy.hidden(self._features(self.policy, rows), rows), rows).logps
        logps = answer_logps(tokens, None, rows)
        return (-logps.policy / jnp.maximum(logps.lengths, 1.0))[:, 0]

    def _own_answers(self, count: int) -> PairBatch:
        return self.batch.first_answers(count)

    def _features(self, side: Side, batch: PairBatch) -> Float[Array, "I F Z"]:
        features = side.tower(batch)
        return jax.lax.stop_gradient(features) if self.tower_fixed else features

    def _theirs(self, batch: PairBatch, ours: Float[Array, "I F Z"]) -> Float[Array, "I F Z"]:
        """The reference's features: the policy's own where the tower does not train."""
        return ours if self.tower_fixed else self.reference.tower(batch)

    def _corrupted(self, answers: int) -> PairBatch:
        """The first answers under the objective's view of the images; the same for policy and reference."""
        view, batch, features, target = self.loss.view, with_own_pictures(self._own_answers(answers)), None, None
        if "features" in view.needs:
            features = self._tower_of(self.policy.fixed(), batch)
            # away from where the tower began
            target = self.features if self.reference is None else self.their_features
            target = jax.lax.stop_gradient(of_rows(target, self.batch.picture))
        epoch = self.moment.epoch if self.loss.redraw_views else 0
        return corrupted(view, self.loss.model, batch, self.key, epoch, features=features, target=target)

    @staticmethod
    def _tower_of(side: Side, batch: PairBatch) -> Callable[[Array], Array]:
        return lambda images: side.tower(batch.with_images(images))


def _everywhere(stats: BranchStats, turn: Int[Array, " B"] | None) -> BranchStats:
    """All rows on all devices, in the order of their turns: a draw or a weight by place is that of the same row without packing."""
    stats, turn = jax.tree.map(lambda x: x if x.ndim == 0 else mesh.constrain(x, *(None,) * x.ndim), (stats, turn))
    if turn is None:
        return stats
    order = jnp.argsort(turn)
    return jax.tree.map(lambda x: x if x.ndim == 0 else x[order], stats)
