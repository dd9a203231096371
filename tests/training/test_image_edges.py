"""Image edges work: pixels move the loss, policy and reference see the same corrupted picture, and gradients are where they should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import tiny_llava
from helpers.tiny import FROZEN_TOWER, MIXED, Tiny, batch_of, quick_jit

from mmalign_jax import losses
from mmalign_jax.losses import Need
from mmalign_jax.pairs import views
from mmalign_jax.training.loss import LossFunction

TEXT_ROW = 2  # of MIXED
KEY = jax.random.key(5)
EDGES = {
    "mdpo": {"image_weight": 1.0, "anchor_weight": 0.0},
    "chip": {"segment_weight": 0.0},
    "adpo": {"likelihood_weight": 0.0},
    "image_dpo": {},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.load(tiny_llava(tmp_path_factory.mktemp("tiny"), layout="memory"))


@pytest.fixture(scope="module")
def reference(tiny):
    return jax.tree.map(lambda x: x * np.float32(1.02), tiny.params)


@pytest.fixture(scope="module")
def batch(tiny):
    rows = batch_of(MIXED, tiny.processor)
    return dataclasses.replace(rows, changed=rows.role > 1)


@dataclasses.dataclass
class Edge:
    """An objective with a picture edge: statistics and their gradients, compiled once."""

    tiny: Tiny
    reference: dict
    name: str

    def __post_init__(self):
        self.loss = LossFunction(self.tiny.model, losses.build(self.name, **EDGES[self.name]))
        self._statistics = quick_jit(lambda batch: self.loss.statistics(self.tiny.params, {}, self.reference, batch, KEY))

        def edge(params, batch, row):
            stats = self.loss.statistics(params, {}, self.reference, batch, KEY)
            ours, other = stats.answers, stats.other_image
            # the part of the pair's logit that depends on the corrupted picture
            gap = (ours.policy - ours.reference)[:, 0] - (other.policy - other.reference)[:, 0]
            return gap[row]

        self._gradient = quick_jit(jax.grad(edge))

    def statistics(self, batch):
        return jax.device_get(self._statistics(batch))

    def gradient(self, batch, row):
        return jax.device_get(self._gradient(self.tiny.params, batch, row))


@pytest.fixture(scope="module", params=["mdpo", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("chip", "adpo"))])
def edge(request, tiny, reference):
    return Edge(tiny, reference, request.param)


def test_the_corrupted_picture_is_another_one_and_rows_of_text_have_none(edge, batch):
    assert Need.OTHER_IMAGE in edge.loss.objective.needs
    stats = edge.statistics(batch)
    moved = np.abs(stats.other_image.policy[:, 0] - stats.answers.policy[:, 0])
    assert np.all(np.delete(moved, TEXT_ROW) > 1e-3)
    np.testing.assert_allclose(moved[TEXT_ROW], 0, atol=1e-4)


def test_pixels_move_the_edge_of_their_own_row_alone(edge, batch):
    before = edge.statistics(batch)
    changed = edge.statistics(batch.with_images(batch.images.at[0].set(255 - batch.images[0])))
    moved = np.abs(changed.other_image.policy - before.other_image.policy)
    assert np.all(moved[0] > 1e-3)
    np.testing.assert_allclose(moved[1:], 0, atol=1e-4)
    loss = [np.asarray(edge.loss.objective(jax.tree.map(jnp.asarray, stats))[0]) for stats in (before, changed)]
    assert abs(loss[1][0] - loss[0][0]) > 1e-5 and np.all(np.abs(loss[1] - loss[0])[1:] < 1e-5)


def test_the_edges_gradient_is_where_it_should_be(edge, batch):
    """With a picture every part gets one. Without, both sides of the edge are the same numbers: nothing is learnt from it."""
    with_picture, without = edge.gradient(batch, 0), edge.gradient(batch, TEXT_ROW)
    for part in ("vision_tower", "projector", "decoder"):
        size = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(with_picture[part]))
        nothing = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(without[part]))
        assert size > 1.0 and nothing < 1e-3 * size, part
    assert sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(without["vision_tower"])) == 0


def test_policy_and_reference_see_the_same_picture(tiny, batch):
    """The same tree on both sides: log-ratios are zero under the corrupted picture, too, which they are not with two draws."""
    loss = LossFunction(tiny.model, losses.build("mdpo"))
    run = quick_jit(lambda key: loss.statistics(tiny.params, {}, tiny.params, batch, key).other_image)
    for key in (KEY, jax.random.key(6)):
        other = run(key)
        np.testing.assert_allclose(other.policy, other.reference, atol=2e-4)
        if key is KEY:
            first = other.policy
    assert np.all(np.delete(np.abs(first - other.policy), TEXT_ROW) > 1e-4)


@pytest.mark.nightly
def test_the_view_is_that_of_the_objective(tiny, batch):
    """Log-probs under the corrupted picture are those of a batch that was corrupted outside."""
    loss = LossFunction(tiny.model, losses.build("image_dpo", view="pixelate(9)"))
    run = quick_jit(lambda batch: loss.statistics(tiny.params, {}, tiny.params, batch, KEY))
    view = views.parse("pixelate(9)")
    corrupted = view.apply(batch.images, views.row_keys(KEY, batch.record_key, 0))
    assert np.any(np.asarray(corrupted) != np.asarray(batch.images))
    outside = quick_jit(lambda images: loss.statistics(tiny.params, {}, tiny.params, batch.with_images(images), KEY))(corrupted)
    np.testing.assert_allclose(run(batch).other_image.policy, outside.answers.policy[:, :1], rtol=1e-5)


@pytest.mark.nightly
def test_adversarial_pixels_carry_no_gradient_and_move_the_features(tiny, reference, batch):
    """AdPO's gradient is that of the same pixels given from outside: nothing flows through the search for them."""
    objective = losses.build("adpo")
    loss = LossFunction(tiny.model, objective)
    view = views.parse(objective.view)
    own = batch.first_answers(2)

    @quick_jit
    def search(params):
        tower = lambda images: tiny.model.tower(params, images, None)  # noqa: E731
        keys = views.row_keys(KEY, own.record_key, 0)
        target = tiny.model.tower(reference, own.images, None)
        images = own.images.astype(jnp.float32) if view.float_pixels else own.images
        return view.apply(images, keys, features=tower, target=target)

    found = search(tiny.params)
    assert 0 < np.abs(np.asarray(found) - np.asarray(own.images, np.float32)).max() <= 2 + 1e-4
    fixed = dataclasses.replace(loss, objective=losses.build("adpo", view="other_image"))
    given = dataclasses.replace(batch, other_images=found)
    grads = [
        quick_jit(lambda params, some, function=function: jax.grad(lambda p: function(p, {}, reference, some, KEY)[0])(params))(tiny.params, some)
        for function, some in ((loss, batch), (fixed, given))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3), *grads)
    assert all(np.abs(np.asarray(leaf)).sum() > 0 for leaf in jax.tree.leaves(grads[0]["projector"]))


@pytest.mark.nightly
def test_a_frozen_tower_is_attacked_and_not_trained(tiny, batch):
    params, frozen = FROZEN_TOWER.split(tiny.params)
    loss = LossFunction(tiny.model, losses.build("adpo"))
    value, grads = quick_jit(jax.value_and_grad(lambda p: loss(p, frozen, params, batch, KEY)[0]))(params)
    assert np.isfinite(value) and "vision_tower" not in grads
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(grads)))
