"""Checkpoints: parameters, optimizer, random key and the position in the data, saved together or not at all (orbax)."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmalign_jax.config import CheckpointConfig
from mmalign_jax.errors import UserError
from mmalign_jax.losses import Objective
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.params import abstract_params, param_shardings
from mmalign_jax.training.step import init_state
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

    def position(self, like: TrainState) -> dict[str, Any]:
        """The loader's position in the newest checkpoint; no array is read.

        Args:
          like: see `restore`.

        Raises:
          UserError: see `restore`.
        """
        with _readable(self._newest):
            # orbax finds another shape when it has begun to read, and then leaves its own tasks behind unfinished
            metadata = ocp.StandardCheckpointHandler().metadata(self._newest / "state")
            theirs, ours = (_shapes(tree) for tree in (metadata.tree["params"], like.params))
            if differing := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
                name = differing[0]
                problem = f"{name} has shape {theirs.get(name)} there, {ours.get(name)} in this run"
                raise UserError(f"{self._newest}: the checkpoint is of another model ({problem}); use a new --workdir")
            if ("sampler" in metadata.tree) != bool(like.sampler):
                problem = "its pairs were made by an older policy, or only this run's are: config.pairs.every is 1 in one of them"
                raise UserError(f"{self._newest}: {problem}; set it as it was, or use a new --workdir")
            return self._manager.restore(self.latest, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]

    def restore(self, like: TrainState, frozen: dict) -> TrainState:
        """The newest state. Every array is read straight into its shards, on whatever mesh it was written. Ask for the `position` before.

        Args:
          like: `abstract_state`; only its shapes, types and shardings are used.
          frozen: the parameters that checkpoints do not hold.

        Raises:
          UserError: the checkpoint is of another model, of other sizes or with other parts that train, or cannot be read.
        """
        with _readable(self._newest):
            state = self._manager.restore(self.latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(_saved(like))))["state"]
        key = jax.random.wrap_key_data(state["key"])
        carried = state["objective"], state["reference"], state.get("sampler", {})
        return TrainState(state["step"], state["params"], frozen, state["opt_state"], key, *carried)

    @property
    def _newest(self) -> Path:
        return self._directory.absolute() / str(self.latest)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


@contextlib.contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Says of what goes wrong in reading which checkpoint it was."""
    try:
        yield
    except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint}: the checkpoint cannot be read ({reason}); remove it or use a new --workdir") from error


def find_step(directory: Path, step: int | None) -> int:
    """The step of a checkpoint; None asks for the newest.

    Raises:
      UserError: there is no such checkpoint.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; the run has saved no checkpoint")
    with ocp.CheckpointManager(directory.absolute(), item_names=("state", "position")) as manager:
        steps = sorted(manager.all_steps())
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{directory}: no checkpoint of step {'(newest)' if step is None else step}; there are {steps or 'none'}")
    return steps[-1] if step is None else step


def restore_params(directory: Path, step: int, like: dict) -> dict:
    """Only the trainable parameters of the checkpoint of a step (see `find_step`), in the shardings of `like`.

    Args:
      like: shapes, types and shardings of the trainable parameters, or arrays that have them.
    """
    with ocp.CheckpointManager(directory.absolute(), item_names=("state", "position")) as manager:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": like})
        part = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True)
        args = ocp.args.Composite(state=part)
        return manager.restore(step, args=args)["state"]["params"]


def abstract_policy(sizes: MllmConfig, mesh: Mesh) -> dict:
    """The policy's whole tree as shapes, types and shardings; nothing is allocated."""
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(placed, abstract_params(sizes), param_shardings(sizes, mesh))


def abstract_state(
    params: dict,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    objective: Objective | None = None,
    reference: dict | None = None,
    sampler: dict | None = None,
) -> TrainState:
    """What `init_state` makes of trainable parameters, as shapes, types and shardings. Call it under the mesh.

    Args:
      params: abstract; see `abstract_policy`. reference: likewise, where the reference follows the policy. sampler: likewise, where pairs are made
        by an older policy.
    """
    state = jax.eval_shape(lambda some, theirs: init_state(some, {}, optimizer, 0, objective, theirs), params, reference)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # moments have the spec of their parameter by explicit sharding; counters and the key have none: they are whole everywhere
        spec = P() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return dataclasses.replace(jax.tree.map(placed, state), sampler=sampler or {})


def _shapes(params: dict) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _saved(state: TrainState) -> dict[str, Any]:
    parts = {name: getattr(state, name) for name in ("step", "params", "opt_state", "objective", "reference")}
    return {**parts, "key": _key_data(state.key), **({"sampler": state.sampler} if state.sampler else {})}


def _key_data(key: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
    if isinstance(key, jax.Array):
        return jax.random.key_data(key)
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=NamedSharding(key.sharding.mesh, P()))
