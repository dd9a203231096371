"""Rows under a corrupted view of their images: the same for policy and reference, whether that is computed beside it or long before."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.shared_pictures import with_own_pictures
from mmalign_jax.pairs import views
from mmalign_jax.pairs.seen import under
from mmalign_jax.types import PairBatch


def corrupted(
    view: views.View,
    model: Mllm,
    batch: PairBatch,
    key: Array,
    epoch: int | Int[Array, ""] = 0,
    *,
    features: Callable[[Array], Array] | None = None,
    target: Float[Array, "B F Z"] | None = None,
) -> PairBatch:
    """The rows, each with images of its own, those under the view. What is drawn depends on the key, the rows' record keys and the epoch alone.

    Args:
      model: whose normalisation of pixels the view is told.
      key: of the run.
      features, target: for views that need them, see `views.View.apply`.
    """
    batch = with_own_pictures(batch)
    keys = views.row_keys(key, batch.record_key, epoch)
    needed = {"other_images": batch.other_images, "features": features, "target": target}
    seen = under(view, model, batch.images, batch.patches, keys, **needed)
    return batch.with_images(jax.lax.stop_gradient(seen))
