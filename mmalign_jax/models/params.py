"""The parameter tree before it has values: shapes, and the sharding of every leaf."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.errors import UserError
from mmalign_jax.models.attention import Regions
from mmalign_jax.models.config import LORA_A, LORA_B, MllmConfig, VisionConfig
from mmalign_jax.models.connector import Connector
from mmalign_jax.models.decoder import Decoder, Masks
from mmalign_jax.models.score_head import PART, abstract_head
from mmalign_jax.models.vision import VisionTower
from mmalign_jax.types import Patches

# (parent, leaf) -> logical axes, without the leading layer axis of stacked leaves. What is not here is small and replicated.
_AXES: dict[tuple[str, str], tuple[str | None, ...]] = {
    ("patch", "kernel"): (None, "embed"),
    ("qkv", "kernel"): ("embed", None, "heads", None),
    ("linear", "kernel"): ("embed", None),
    ("query", "kernel"): ("embed", "heads", None),
    ("key", "kernel"): ("embed", "kv_heads", None),
    ("value", "kernel"): ("embed", "kv_heads", None),
    ("out", "kernel"): ("heads", None, "embed"),
    ("gate", "kernel"): ("embed", "mlp"),
    ("up", "kernel"): ("embed", "mlp"),
    ("down", "kernel"): ("mlp", "embed"),
    ("fc1", "kernel"): ("embed", "mlp"),
    ("fc2", "kernel"): ("mlp", "embed"),
    ("embed", "embedding"): ("vocab", "embed"),
    ("head", "kernel"): ("embed", "vocab"),
}


def abstract_params(config: MllmConfig, dtype: str = "float32") -> dict:
    """The tree of `ShapeDtypeStruct`s of a model; nothing is computed. A score head is float32, whatever the others are."""

    def build(key: jax.Array) -> dict:
        v, width = config.vision, config.decoder.width
        tower, connector, decoder = VisionTower(config, "none"), Connector(config), Decoder(config.decoder)
        pixels, patches = (jnp.zeros((1, 1, v.image_size, v.image_size, 3)), None) if v.image_size else _one_window(v)
        features, tower_params = tower.init_with_output(key, pixels, patches)
        inputs, ids = jnp.zeros((1, 1, width)), jnp.zeros((1, 1), jnp.int32)

        def everything(module):
            module.embed_tokens(ids, jnp.dtype(dtype))
            return module(inputs, ids, Masks(jnp.ones((1, 1, 1), bool), None, Regions(1, 1, causal=True)))

        return {
            "vision_tower": tower_params["params"],
            "projector": connector.init(key, features)["params"],
            "decoder": decoder.init(key, method=everything)["params"],
        }

    # outside any mesh: one-row shapes do not divide over devices
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        shapes = jax.eval_shape(build, jax.eval_shape(lambda: jax.random.key(0)))
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)
    return tree | ({PART: abstract_head(config)} if config.score_head else {})


def _one_window(vision: VisionConfig) -> tuple[jax.Array, Patches]:
    slots = vision.window_slots if vision.window else vision.merge**2
    pair = jnp.zeros((1, slots, 2), jnp.int32)
    patches = Patches(jnp.zeros((1, slots, vision.frames_per_patch), jnp.int32), pair, pair, pair[..., 0], pair[:, :1])
    return jnp.zeros((1, slots, vision.frames_per_patch * vision.patch_size**2, 3)), patches


def param_shardings(config: MllmConfig, mesh: Mesh) -> dict:
    """The sharding of every leaf. A dimension that its mesh axes do not divide stays whole.

    Raises:
      UserError: heads, a width or the vocabulary cannot be split over the `tensor` axis.
    """
    tensor = mesh.shape["tensor"]
    c, v = config.decoder, config.vision
    split = {
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "intermediate_size": c.mlp_width, "hidden_size": c.width,
        "vocab_size": c.vocab_size, "vision num_attention_heads": v.heads, "vision intermediate_size": v.mlp_width,
    }  # fmt: skip
    for name, size in split.items():
        if size % tensor:
            raise UserError(f"config.mesh.tensor: {tensor} does not divide the model's {name} = {size}")

    def leaf(path, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        names = tuple(key.key for key in path)
        axes = _axes(*names[-2:])
        axes = (None,) * (len(shape.shape) - len(axes)) + axes
        wanted = mesh_lib.spec(*axes)
        fits = [axis if size % _ways(mesh, axis) == 0 else None for size, axis in zip(shape.shape, wanted, strict=True)]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def _axes(parent: str, leaf: str) -> tuple[str | None, ...]:
    """Logical axes of a leaf. Low-rank factors have those of the kernel's inputs or outputs; where `fsdp` has no part in these, it splits
    the rank.
    """
    if leaf not in (LORA_A, LORA_B):
        return _AXES.get((parent, leaf), ())
    kernel, inputs = _AXES.get((parent, "kernel"), ()), 2 if parent == "out" else 1
    side = kernel[:inputs] if leaf == LORA_A else kernel[inputs:]
    rank = None if "embed" in side else "embed"
    return (*side, rank) if leaf == LORA_A else (rank, *side)


def _ways(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)
