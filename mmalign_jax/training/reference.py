"""Where the reference's log-probs come from: `config.reference`."""

import dataclasses
from collections.abc import Callable

from mmalign_jax.config import Config
from mmalign_jax.errors import UserError
from mmalign_jax.losses import Need, Objective
from mmalign_jax.models.tree import LeafPath
from mmalign_jax.pairs import views
from mmalign_jax.training.step import Follow
from mmalign_jax.training.trainable import Trainable


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a run has of a reference.

    Args:
      kind: live, cached, adapter_off, ema or none.
      copied: leaves of which the reference has copies of its own.
      free: all answers are equally likely under it.
      follow: how it moves, when it does.
    """

    kind: str
    copied: Callable[[LeafPath], bool]
    free: bool = False
    follow: Follow | None = None

    @classmethod
    def of(cls, config: Config, rule: Trainable, objective: Objective) -> "Reference":
        """The reference of a run.

        Raises:
          UserError: the kind does not go with the objective, with what trains, or with views that are drawn anew.
        """
        kind, reads = config.reference.kind, Need.REFERENCE in objective.needs
        if Need.MISMATCHED in objective.needs and config.train.batch_size < 2:
            raise UserError(f"config.train.batch_size: {objective.name} also scores the answers of other rows of a step; give it 2 at least")
        if not reads or kind == "none":
            _check_rules(config, objective)
        if not reads:
            if kind not in ("auto", "none"):
                raise UserError(f"config.reference.kind: {objective.name} compares with no reference; leave it at auto")
            return cls("none", _nothing)
        if kind == "none":
            if objective.of_samples:
                raise UserError(f"config.reference.kind: {objective.name} takes a divergence from the reference; set its weight to 0 to go without")
            if Need.KL in objective.needs:
                raise UserError(f"config.reference.kind: {objective.name} reads the divergence from the reference; it cannot do without one")
            return cls("none", _nothing, free=True)
        if kind == "cached":
            _check_cacheable(config, objective)
            return cls("cached", _nothing)
        if kind == "ema":
            return cls("ema", rule.trains, follow=Follow(config.reference.share, config.reference.every))
        if kind == "adapter_off" and not rule.only_new_factors:
            problem = "more than new low-rank factors trains" if config.lora.rank else "nothing is adapted (config.lora.rank)"
            raise UserError(f"config.reference.kind: adapter_off is not the SFT model here, because {problem}; use live")
        return cls("adapter_off" if rule.only_new_factors else "live", rule.in_reference)


def _check_rules(config: Config, objective: Objective) -> None:
    """Rules that would never see anything are not taken."""
    for name in ("kl_budget", "displacement"):
        if getattr(config.stop, name):
            raise UserError(f"config.stop.{name}: {objective.name} has no reference here, so the distance from it is not known; leave it out")


def _nothing(path: LeafPath) -> bool:
    return False


# What a cache of log-probs by token cannot hold, and why
_NOT_CACHEABLE = {
    Need.KL: "reads the reference's whole distribution",
    Need.MISMATCHED: "scores answers of other rows, which change with the order",
    Need.SELF_REJECTED: "scores what the policy says at that moment",
    Need.NO_IMAGE: "scores answers without their images, which the cache does not hold",
}


def _check_cacheable(config: Config, objective: Objective) -> None:
    for need, why in _NOT_CACHEABLE.items():
        if need in objective.needs:
            raise UserError(f"config.reference.kind: the log-probs cannot be cached, because {objective.name} {why}; use live")
    if config.stop.kl_budget:
        raise UserError("config.stop.kl_budget: a cached reference does not know the policy's own answers; set it to 0, or use live")
    if not objective.view:
        return
    view = views.parse(objective.view)
    if view.random and config.train.redraw_views != "never":
        raise UserError(f"config.train.redraw_views: {view} is drawn anew in every epoch, so the reference cannot be cached; set never, or use live")
    if "features" in view.needs:
        raise UserError(f"config.reference.kind: {view} depends on the policy, so the log-probs cannot be cached; use live")
