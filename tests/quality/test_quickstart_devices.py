"""The quickstart's training step computes the same on one device and on eight."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers.commands import ROOT

from mmalign_jax import config, config_files, losses
from mmalign_jax.data.device import to_device
from mmalign_jax.data.loader import make_loader
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.params import param_shardings
from mmalign_jax.scenes import splits
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.optimizer import make_optimizer, make_schedule
from mmalign_jax.training.step import init_state, make_train_step
from mmalign_jax.training.trainable import Trainable
from mmalign_jax.types import Preference, Response

STEPS = 3
QUICKSTART = config.from_mapping(config_files.load(ROOT / "configs" / "quickstart.py"))


def pairs(count):
    """Pictures of the alignment split, each described, with the description of another picture as the rejected answer."""
    captions = [record for record in splits.records(QUICKSTART.scenes.seed, "align", count) if record.id.endswith("/caption")]
    for record, other in itertools.pairwise([*captions, captions[0]]):
        responses = (record.responses[0], Response(other.responses[0].text))
        if responses[0].text != responses[1].text:
            yield dataclasses.replace(record, responses=responses, prefs=(Preference(0, 1),))


@pytest.fixture(scope="module")
def batches():
    """The batches of the first steps, as the loader makes them."""
    c, path = QUICKSTART, QUICKSTART.model.path
    processor = load_processor(path, read_config(path))
    records = list(pairs(48))
    plan = plan_rows(records, processor, c.data, answers=losses.build(c.objective.name, **c.objective.hyperparameters).answers)
    options = {"batch_size": c.train.batch_size, "accumulate": c.train.accumulate, "seed": c.train.seed, "workers": 0}
    return list(itertools.islice(make_loader(records, processor, plan, **options), STEPS))


def metrics_on(mesh, batches):
    """The metrics of the first steps on a mesh, in float32."""
    c, path = QUICKSTART, QUICKSTART.model.path
    sizes = read_config(path)
    processor = load_processor(path, sizes)
    model = Mllm(sizes, processor.mean, processor.std, "float32", remat=c.model.remat)
    loss = LossFunction(model, losses.build(c.objective.name, **c.objective.hyperparameters))
    optimizer = make_optimizer(c.optimizer, c.train.steps)
    read = lambda: Trainable.of(c, sizes).split(load_params(path, sizes, param_shardings(sizes, mesh)))  # noqa: E731
    with jax.set_mesh(mesh):
        state, reference = init_state(*read(), optimizer, c.train.seed), read()[0] if loss.reads_reference else None
        placed = [to_device(batch, mesh) for batch in batches]
        step = make_train_step(loss, optimizer, make_schedule(c.optimizer, c.train.steps))
        step = step.lower(state, reference, placed[0]).compile(compiler_options={"xla_backend_optimization_level": 0})
        found = []
        for batch in placed:
            state, metrics = step(state, reference, batch)
            found.append(jax.device_get(metrics))
    sharded = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    assert bool(sharded) == (mesh.size > 1)
    return found


@pytest.mark.nightly
def test_one_device_and_eight(batches):
    one, eight = metrics_on(make_mesh(devices=jax.devices()[:1]), batches), metrics_on(make_mesh(), batches)
    assert len(jax.devices()) == 8
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], atol=1e-5)
        for name in a.keys() - {"rewards/accuracies", "displacement_rate"}:  # they count signs, at step 0 those of rounding errors
            # sums of about fifty log-probs, and squares of gradients
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert len({float(metrics["loss"]) for metrics in one}) == STEPS  # the parameters move, and the batches are not the same
