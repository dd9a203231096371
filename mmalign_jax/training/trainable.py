"""Which leaves of the parameter tree train, which stay as they are, and what of them the reference needs copies of."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from mmalign_jax.config import PARTS, Config
from mmalign_jax.errors import UserError
from mmalign_jax.models.config import LORA_A, LORA_B, MllmConfig
from mmalign_jax.models.lora import is_factor
from mmalign_jax.models.score_head import PART as SCORE_HEAD
from mmalign_jax.models.tree import LeafPath, split


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The rule by which a run divides the tree.

    Args:
      frozen: parts whose own weights stay. Low-rank factors always train.
      adapter_off: the factors began by adding nothing, so the model without them is the reference and they need no copy.
      output: the decoder's output kernel trains with the decoder; not where no log-probs are read, so that nothing reaches it.
    """

    frozen: frozenset[str]
    adapter_off: bool = True
    output: bool = True

    @classmethod
    def of(cls, config: Config, sizes: MllmConfig) -> "Trainable":
        """The rule of a config: `model.freeze`, and where there are low-rank factors the part's own weights stay, too. A score head trains.

        Raises:
          UserError: nothing would train, or a part has a learning rate of its own and is not there or does not train.
        """
        freeze = config.model.freeze
        if freeze == ("auto",):
            freeze = PARTS if sizes.lora else ("vision_tower",)
        rule = cls(frozenset(freeze) | frozenset(sizes.lora), adapter_off=not config.model.adapter, output=config.objective.reads_logps)
        training = (set(PARTS) - rule.frozen) | set(sizes.lora) | ({SCORE_HEAD} if sizes.score_head else set())
        if not training:
            raise UserError("config.model.freeze: all parts are frozen, nothing would train")
        if config.optimizer.score_head_learning_rate and not sizes.score_head:
            raise UserError(f"config.optimizer.score_head_learning_rate: {config.objective.name} gives the model no score head; leave it 0")
        for part in PARTS:
            if config.optimizer.rates[part] and part not in training:
                raise UserError(f"config.optimizer.{part}_learning_rate: the {part} does not train; see config.model.freeze")
        return rule

    def trains(self, path: LeafPath) -> bool:
        return is_factor(path) or (path[0] not in self.frozen and (self.output or path[:2] != ("decoder", "head")))

    def in_reference(self, path: LeafPath) -> bool:
        """Whether the reference has a copy of its own of this leaf; it shares the frozen ones, and scores nothing."""
        return self.trains(path) and path[0] != SCORE_HEAD and not (self.adapter_off and is_factor(path))

    @property
    def only_new_factors(self) -> bool:
        """Nothing that a reference has trains, but low-rank factors that began by adding nothing: the model without them is the reference."""
        return self.adapter_off and self.frozen == frozenset(PARTS)

    def untouched(self, sizes: MllmConfig) -> list[str]:
        """Parts of which nothing trains."""
        return [part for part in PARTS if part in self.frozen and part not in sizes.lora]

    def split(self, params: dict) -> tuple[dict, dict]:
        """(trainable, frozen)."""
        return split(params, self.trains)


def check_features(config: Config, sizes: MllmConfig) -> None:
    """Refuses features of a tower in which factors of an adapter train; `sizes` are those with the adapter.

    Raises:
      UserError: `config.features.cache` is asked for, and there are such.
    """
    if config.features.cache and "vision_tower" in sizes.lora:
        raise UserError(
            "config.model.adapter: the adapter has factors in the vision tower, which train, so its features cannot be kept; leave "
            "config.features.cache empty"
        )


def unreached(grads: dict, params: dict) -> dict[str, Bool[Array, ""]]:
    """Name of every trainable leaf -> whether its gradient is zero in all places though it need not be.

    While B is zero, A's gradient is zero: that is how low-rank factors begin. And scores that are only compared with each other leave the
    head's bias where it is.
    """
    out = {}
    _unreached(grads, params, "", out)
    return out


def _unreached(grads: dict, params: dict, above: str, out: dict[str, Any]) -> None:
    for key, grad in grads.items():
        if isinstance(grad, dict):
            _unreached(grad, params[key], f"{above}{key}/", out)
        else:
            silent = jnp.all(grad == 0)
            out[above + key] = silent & jnp.any(params[LORA_B] != 0) if key == LORA_A else silent & (above + key != f"{SCORE_HEAD}/bias")


def describe(rule: Trainable, sizes: MllmConfig) -> str:
    """What trains, for a reader."""
    texts = []
    for part in PARTS:
        if part in sizes.lora:
            texts.append(f"{part} (low-rank factors of rank {sizes.lora[part].rank} beside {', '.join(sizes.lora[part].targets)})")
        elif part not in rule.frozen:
            texts.append(part if rule.output or part != "decoder" or sizes.decoder.tied_head else "decoder (without its output kernel)")
    return ", ".join(texts + ([SCORE_HEAD] if sizes.score_head else []))
