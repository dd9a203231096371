"""Compiles a config's training step for a TPU topology on any host, and reads the memory it needs. No TPU, no weights, no data."""

import dataclasses
import importlib.util
import time

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmalign_jax import losses
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config
from mmalign_jax.errors import UserError
from mmalign_jax.hf.adapters import with_adapter
from mmalign_jax.losses import Need
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.implementation import Attention
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.params import abstract_params, param_shardings
from mmalign_jax.models.tree import split
from mmalign_jax.pairs import views
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.memory import GIB, ROOM, candidates, fitting
from mmalign_jax.training.optimizer import make_optimizer, make_schedule
from mmalign_jax.training.reference import Reference
from mmalign_jax.training.step import make_train_step
from mmalign_jax.training.trainable import Trainable, check_features
from mmalign_jax.types import PairBatch, Sampled, TrainState

# HBM of one JAX device, in bytes (a tpu7x chip is two devices)
HBM = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "tpu7x": 96 * GIB}

PROMPT_TOKENS, ANSWER_TOKENS = 128, 352  # assumed where the config sets no limit: text of a prompt, one answer


@dataclasses.dataclass(frozen=True)
class AotReport:
    """Bytes a device. `aliased_bytes` of the outputs take the place of the donated state; `remat_tried` as `Fitting.tried`."""

    topology: str
    devices: int
    prefix_slots: int
    answer_slots: int
    attention: str
    remat: str
    remat_tried: dict[str, int | None]
    hbm_bytes_per_device: int
    hbm_limit_bytes: int
    fits: bool
    argument_bytes: int
    temp_bytes: int
    aliased_bytes: int
    state_bytes: int
    compile_s: float


def compile_step(config: Config, sizes: MllmConfig, topology: str, slices: int = 1) -> AotReport:
    """Compiles the step of `config` for `slices` slices of `topology` (such as "v5e:8x8").

    Raises:
      UserError: unknown topology, no TPU compiler here, a mesh that the topology does not have, or no room for the step.
    """
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=_devices(topology, slices))
    mesh_lib.check_batch(mesh, config.train.batch_size // config.train.accumulate)
    sizes = dataclasses.replace(with_adapter(config, sizes), score_head=config.objective.score_head)
    check_features(config, sizes)
    objective = losses.build(config.objective.name, **config.objective.hyperparameters)
    optimizer = make_optimizer(config.optimizer, config.train.steps, config.train.updates)
    kind = Reference.of(config, Trainable.of(config, sizes), objective)
    state, reference, batch = _abstract_arguments(config, sizes, mesh, optimizer, objective, kind)
    dtype = mesh_lib.compute_dtype(config.model.compute_dtype, "tpu")
    attention = Attention(config.model.attention, "tpu")
    model = Mllm(sizes, (0.5,) * 3, (0.5,) * 3, dtype, attention=attention)
    loss = LossFunction(model, dataclasses.replace(objective, reference_free=kind.free), config.train.redraw_views == "epoch")
    schedule = make_schedule(config.optimizer, config.train.steps)
    options = {"follow": kind.follow, "updates": config.train.updates}
    step = lambda remat: make_train_step(loss.with_remat(remat), optimizer, schedule, **options)  # noqa: E731
    start = time.monotonic()
    limit = HBM[topology.split(":")[0]]
    room = int(config.model.memory_gib * GIB or ROOM * limit)
    with jax.set_mesh(mesh):
        found = fitting(lambda remat: step(remat).lower(state, reference, batch), candidates(config.model.remat), room)
    return AotReport(
        topology=topology if slices == 1 else f"{slices} x {topology}",
        devices=mesh.size,
        prefix_slots=batch.prefix_slots,
        answer_slots=batch.answer_slots,
        attention=model.attention_of(batch.prefix_slots, batch.answer_slots),
        remat=found.remat,
        remat_tried=found.tried,
        hbm_bytes_per_device=found.needs.total,
        hbm_limit_bytes=limit,
        fits=found.needs.total <= limit,
        argument_bytes=found.needs.arguments,
        temp_bytes=found.needs.temporaries,
        aliased_bytes=found.needs.aliased,
        state_bytes=sum(_bytes_per_device(leaf) for leaf in jax.tree.leaves(state)),
        compile_s=round(time.monotonic() - start, 1),
    )


def _devices(topology: str, slices: int) -> list[jax.Device]:
    from jax.experimental import topologies

    if topology.split(":")[0] not in HBM:
        raise UserError(f"--topology: {topology!r} is not known; give a chip and its grid, such as v5e:8x8, with a chip of {', '.join(HBM)}")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
    except (ValueError, RuntimeError, NotImplementedError) as error:
        found = " ".join(str(error).split())[:200]
        mend = "give a chip and its grid, such as v5e:8x8" if importlib.util.find_spec("libtpu") else "`pip install libtpu` brings the compiler"
        raise UserError(f"--topology: cannot compile for {topology!r} here ({found}); {mend}") from error


def _abstract_arguments(
    config: Config,
    sizes: MllmConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    objective: losses.Objective,
    kind: Reference,
) -> tuple[TrainState, dict | None, PairBatch]:
    """State, reference and batch as shapes with shardings; nothing is allocated, and nothing here may run under the mesh."""
    whole = NamedSharding(mesh, P())
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    shapes, shardings = abstract_params(sizes), param_shardings(sizes, mesh)
    rule = Trainable.of(config, sizes)
    params, frozen = rule.split(jax.tree.map(placed, shapes, shardings))
    kept = mesh_lib.compute_dtype(config.model.compute_dtype, "tpu") if config.model.reference_dtype == "auto" else config.model.reference_dtype
    in_kept = lambda leaf, dtype=kept: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)  # noqa: E731
    frozen, reference = jax.tree.map(in_kept, frozen), jax.tree.map(in_kept, split(params, kind.copied)[0])
    moments = optax.tree.map_params(
        optimizer,
        lambda leaf, param: placed(leaf, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: placed(leaf, whole),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    carried = jax.tree.map(lambda leaf: placed(leaf, whole), jax.eval_shape(objective.initial_state))
    moving = jax.tree.map(lambda leaf: in_kept(leaf, "float32"), reference) if kind.follow else {}
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = TrainState(step, params, frozen, moments, placed(key, whole), carried, moving, params if config.pairs.every > 1 else {})
    return state, reference if kind.kind in ("live", "adapter_off") else None, _abstract_batch(config, sizes, mesh, objective, kind)


def _abstract_batch(config: Config, sizes: MllmConfig, mesh: Mesh, objective: losses.Objective, kind: Reference) -> PairBatch:
    if config.data.packed:
        raise UserError(
            "config.data.packed: how many slots rows of several pairs have follows from the data, which is not read here; check with "
            "config.data.packed=False, a pair a row"
        )
    if not sizes.vision.image_size:
        raise UserError("config.model: models that take pictures of any size cannot be checked here yet; LLaVA and other models of tiles can")
    if not config.data.prefix_tokens and (sizes.connector.newline or sizes.connector.kind.startswith("shuffle")):
        raise UserError("config.data.prefix_tokens: say how long a prefix may be; what a picture takes in this model depends on its size")
    prefix = config.data.prefix_tokens or sizes.image_tokens + PROMPT_TOKENS
    answer = config.data.answer_tokens or ANSWER_TOKENS
    lead = (config.train.accumulate, config.train.batch_size // config.train.accumulate)
    side = sizes.vision.image_size
    # as many tiles as the prefix has room for beside a prompt
    tiles = max(1, (prefix - PROMPT_TOKENS) // sizes.image_tokens)

    def array(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        axes = (None, "batch") + (None,) * len(shape)
        return jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=mesh_lib.sharding(mesh, *axes))

    kept = jnp.dtype(mesh_lib.compute_dtype(config.model.compute_dtype, "tpu")) if config.features.cache else None
    sampled, cached = Need.SAMPLED in objective.needs, kind.kind == "cached"
    # what `samples` draws, unless the rows are those of a set with limits of their own
    answers = config.samples.count if sampled or objective.reads == "groups" else objective.answers
    answer = config.samples.max_tokens if sampled else answer
    row = (prefix + answers * answer,)
    other = "other_images" in views.parse(objective.view).needs if objective.view else False
    batch = PairBatch(
        tokens=array(row, jnp.int32),
        role=array(row, jnp.int8),
        positions=array(row, jnp.int32),
        images=None if kept else array((tiles, side, side, 3), jnp.uint8),
        image_index=array(row, jnp.int32),
        token_weight=array(row, jnp.float32),
        record_key=array((), jnp.uint32),
        margin=array((), jnp.float32),
        prefix_slots=prefix,
        answer_slots=answer,
        weight=array((), jnp.float32),
        desirable=array((), jnp.bool_) if objective.reads == "labels" else None,
        rewards=array((answers,), jnp.float32) if objective.reads == "groups" else None,
        changed=array(row, jnp.bool_) if Need.CHANGED in objective.needs else None,
        other_images=array((tiles, side, side, 3), jnp.uint8) if other else None,
        reference_logps=array(row, jnp.float32) if cached else None,
        reference_other_logps=array((objective.other_answers * answer,), jnp.float32) if cached and objective.other_answers else None,
        features=array((tiles * sizes.tower_tile, sizes.tower_width), kept) if kept else None,
        sampled=Sampled(*(array(shape, jnp.float32) for shape in ((answers,), (), ()))) if sampled else None,
    )
    one_answer = {"changed": None, "other_images": None, "reference_logps": None, "reference_other_logps": None}
    auxiliary = dataclasses.replace(batch.first_answers(1), **one_answer) if Need.AUXILIARY in objective.needs else None
    return dataclasses.replace(batch, auxiliary=auxiliary)


def _bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for dimension in shape:
        size *= dimension
    return size
