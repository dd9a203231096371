"""Image features of the records that are being worked on, on the device."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt, UInt8

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.data.device import to_device
from mmalign_jax.data.layout import RowLayout, RowTokens, lay_out_pictures
from mmalign_jax.hf.processor import Processor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.seen import encode_seen
from mmalign_jax.pairs.views import View
from mmalign_jax.sampling import compiler_options, lane_keys
from mmalign_jax.types import Patches, PreferenceRecord, record_key


class FeaturePool:
    """Image features of the records that are being worked on, on the device; each stays in its place until another takes it.

    Args:
      layout: of the pictures.
      places: how many records, a multiple of what the mesh splits.
      at_once: records that are encoded together, likewise.
      view: what is done to the pictures first, if anything.
    """

    def __init__(self, model: Mllm, processor: Processor, mesh: Mesh, layout: RowLayout, places: int, at_once: int, view: View | None):
        self._model, self._processor, self._mesh, self._layout, self._places = model, processor, mesh, layout, places
        self._view, self._at_once = view, at_once
        self._features: Array | None = None

    @property
    def features(self) -> Float[Array, "N F U"]:
        if self._features is None:
            raise ValueError("nothing is encoded yet")
        return self._features

    def put(self, params: dict, entries: Mapping[int, tuple[PreferenceRecord, RowTokens, int]], seed: int) -> None:
        """Encodes the pictures of records and puts them in the places that are named, over what was there.

        Args:
          entries: place -> record, its tokens, and the number of the attempt, which with seed and id decides what a view draws.

        Raises:
          DataError: a picture cannot be read.
        """
        places = sorted(entries)
        for start in range(0, len(places), self._at_once):
            chosen = places[start : start + self._at_once]
            rows = []
            for record, row, number in (entries[place] for place in chosen):
                drawn = {"record_key": np.uint32(record_key(record.id)), "number": np.int32(number)}
                rows.append(lay_out_pictures(record, self._processor, self._layout, row) | drawn)
            rows += [rows[-1]] * (self._at_once - len(rows))
            source = np.full(self._places, -1, np.int32)
            source[chosen] = np.arange(len(chosen))
            with jax.set_mesh(self._mesh):
                pictures: dict[str, Any] = to_device(jax.tree.map(lambda *leaves: np.stack(leaves), *rows), self._mesh, batch_axis=0)
                drawn = pictures["record_key"], pictures["number"], jax.random.key(seed)
                new = _encode(self._mesh)(self._model, self._view, params, pictures["images"], pictures.get("patches"), *drawn)
                if self._features is None:
                    shape = (self._places, *new.shape[1:])
                    self._features = jnp.zeros(shape, new.dtype, device=mesh_lib.sharding(self._mesh, "batch", None, None))
                self._features = _replace(self._features, new, to_device(source, self._mesh, batch_axis=0))


@functools.cache
def _encode(mesh: Mesh) -> Callable[..., Array]:
    # as decode steps: on a CPU pictures, too, take less time without fused products
    return jax.jit(_encoded, static_argnums=(0, 1), compiler_options=compiler_options(mesh))


def _encoded(
    model: Mllm,
    view: View | None,
    params: dict,
    images: UInt8[Array, "E M Y W 3"],
    patches: Patches | None,
    record_key: UInt[Array, " E"],
    number: Int[Array, " E"],
    key: Array,
) -> Float[Array, "E F U"]:
    return encode_seen(model, view, params, images, patches, lane_keys(key, record_key, number, 1)[:, 0])


@functools.partial(jax.jit, donate_argnames="pool")
def _replace(pool: Float[Array, "N F U"], new: Float[Array, "E F U"], source: Int[Array, " N"]) -> Float[Array, "N F U"]:
    """The pool with `new[source]` where `source` is not negative."""
    return jnp.where((source >= 0)[:, None, None], rows_of(new, jnp.maximum(source, 0)), pool)


def rows_of(values: Float[Array, "N F U"], index: Int[Array, " B"]) -> Float[Array, "B F U"]:
    return values.at[index].get(out_sharding=mesh_lib.out_sharding("batch", None, None))
