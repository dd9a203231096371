"""Objectives on a batch that is sharded over eight devices."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.branch_stats import random_stats

from mmalign_jax import losses, mesh
from mmalign_jax.losses import Need

# Those that look at the whole batch, and one for every kind of branch and aggregator
DISTINCT = ["aot", "bco", "beta_dpo", "chip_released", "dama", "kto", "kto_unpaired", "mdpo", "pl_dpo"]


@pytest.mark.parametrize("name", DISTINCT)
def test_a_sharded_batch_gives_the_same_numbers(name):
    objective = losses.build(name)
    stats = random_stats(objective, rows=16)
    if Need.BATCH in objective.needs:
        stats = dataclasses.replace(stats, key=jax.random.key(3))

    def step(stats):
        value = lambda s: (lambda loss, metrics: (loss.sum(), (loss, metrics)))(*objective(s))  # noqa: E731
        gradient, (loss, metrics) = jax.grad(value, has_aux=True, allow_int=True)(stats)
        return loss, metrics, gradient.answers.policy, objective.next_state(stats)

    expected = jax.jit(step)(stats)
    grid = mesh.make_mesh(data=2, fsdp=4)
    with jax.set_mesh(grid):
        place = lambda x: jax.device_put(x, mesh.sharding(grid, *(["batch"] + [None] * (x.ndim - 1) if x.ndim else [])))  # noqa: E731
        found = jax.jit(step)(jax.tree.map(place, stats))
        assert jax.typeof(found[0]).sharding.spec == mesh.spec("batch")
    for own, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-6)
