"""Checkpoints: parameters, optimizer, random key and the position in the data, saved together or not at all (orbax)."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mmalign_jax.config import CheckpointConfig
from mmalign_jax.errors import UserError
from mmalign_jax.types import TrainState


class Checkpoints:
    """The checkpoints of one run. Frozen parameters are not in them: they are those of the base model."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        # a write that did not finish leaves a directory that orbax does not count as a checkpoint
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True, cleanup_tmp_directories=True)
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_names=("state", "position"))

    @property
    def latest(self) -> int | None:
        """The step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Copies the state to the host and writes it in the background.

        Args:
          position: where the loader stands, as JSON values.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(_saved(state)), position=ocp.args.JsonSave(position))
        self._manager.save(int(state.step), args=args)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, in the shardings of `like` and with its frozen parameters, and the loader's position.

        Raises:
          UserError: the checkpoint is of a model of other sizes, or cannot be read.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _saved(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(self.latest, args=args)
        except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
            where, reason = self._directory / str(self.latest), " ".join(str(error).split())[:300]
            raise UserError(f"{where}: the checkpoint cannot be read ({reason}); remove it or use a new --workdir") from error
        state = restored["state"]
        key = jax.random.wrap_key_data(state["key"])
        return TrainState(state["step"], state["params"], like.frozen, state["opt_state"], key), restored["position"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def restore_params(directory: Path, step: int | None, like: dict) -> dict:
    """Only the trainable parameters of a checkpoint, in the shardings of `like`.

    Args:
      step: which checkpoint; None: the newest.

    Raises:
      UserError: there is no such checkpoint.
    """
    with ocp.CheckpointManager(directory.absolute(), item_names=("state", "position")) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{directory}: no checkpoint of step {step}; there are {steps or 'none'}")
        step = steps[-1] if step is None else step
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": like})
        part = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True)
        args = ocp.args.Composite(state=part)
        return manager.restore(step, args=args)["state"]["params"]


def _saved(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state, "key": jax.random.key_data(state.key)}
