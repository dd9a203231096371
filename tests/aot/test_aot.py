"""Training steps compiled for TPU slices on a host without a TPU."""

import json

import jax
import pytest
from helpers.checkpoints import tiny_llava
from helpers.commands import ROOT, launch

from mmalign_jax import config, config_files, losses
from mmalign_jax.errors import UserError
from mmalign_jax.hf.adapters import with_adapter
from mmalign_jax.hf.import_ import read_config
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.config import Lora
from mmalign_jax.models.params import abstract_params
from mmalign_jax.models.presets import preset
from mmalign_jax.training import aot
from mmalign_jax.training.aot import compile_step
from mmalign_jax.training.optimizer import make_optimizer
from mmalign_jax.training.reference import Reference
from mmalign_jax.training.trainable import Trainable

pytestmark = pytest.mark.optimised

# libtpu lends its compiler only: it must not look for a TPU, and other test processes may hold it too
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

# names that people script against
KEYS = {"hbm_bytes_per_device", "hbm_limit_bytes", "fits", "argument_bytes", "temp_bytes", "aliased_bytes", "state_bytes", "compile_s"}


@pytest.fixture(scope="module", autouse=True)
def no_tpu():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        patch.delenv("XLA_FLAGS", raising=False)  # libtpu ends the process when it does not know a flag of the CPU's
        yield


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Widths of whole TPU tiles, so that the compiler pads next to nothing and bytes can be compared."""
    text = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 1}
    return read_config(tiny_llava(tmp_path_factory.mktemp("model"), text=text, vision=vision))


def settings(**changes):
    values = {"train.batch_size": 16, "data.prefix_tokens": 32, "data.answer_tokens": 16, "model.remat": "block", **changes}
    return config.from_mapping(config_files.load(ROOT / "configs" / "base.py", values))


def check(report):
    """What must hold of every report of bytes a device."""
    assert report.hbm_bytes_per_device == pytest.approx(report.argument_bytes + report.temp_bytes, rel=0.01)
    assert report.fits == (report.hbm_bytes_per_device <= report.hbm_limit_bytes)
    assert report.aliased_bytes >= report.state_bytes > 0  # the new state takes the place of the old one, all of it
    assert report.argument_bytes >= report.state_bytes


@pytest.mark.nightly
def test_the_7b_step_fits_a_v5e_64():
    words = ["--config", "configs/llava15_7b_dpo.py", "--topology", "v5e:8x8", "--json"]
    done = launch("launch/aot_check.py", *words, timeout=600, quick=False, **QUIET)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found.keys() >= KEYS
    report = aot.AotReport(**found)
    check(report)
    assert (report.topology, report.devices) == ("v5e:8x8", 64)
    assert report.fits and report.hbm_bytes_per_device <= 16e9
    # 6.7e9 parameters train in float32 with a float32 and a bfloat16 moment, over 64 devices
    assert report.state_bytes == pytest.approx(6.76e9 * (4 + 4 + 2) / 64 + 0.3e9 * 2 / 64, rel=0.02)


@pytest.fixture(scope="module")
def replicated(sizes):
    return compile_step(settings(**{"mesh.data": 8, "mesh.fsdp": 1}), sizes, "v5e:2x4")


def test_the_whole_state_is_donated(replicated):
    check(replicated)
    assert (replicated.topology, replicated.devices, replicated.prefix_slots, replicated.answer_slots) == ("v5e:2x4", 8, 32, 16)
    assert replicated.fits and replicated.hbm_limit_bytes == 16 * 2**30
    assert (replicated.attention, replicated.remat, list(replicated.remat_tried)) == ("splash", "block", ["block"])
    # little padding: one moment that is not given away would show
    assert replicated.aliased_bytes < 1.2 * replicated.state_bytes


@pytest.mark.nightly
def test_the_state_is_sharded_and_the_first_moment_may_be_small(replicated, sizes):
    sharded = compile_step(settings(**{"optimizer.moment_dtype": "bfloat16"}), sizes, "v5e:2x4", slices=1)
    check(sharded)
    # trainable parameters and two moments in float32 there, 4 + 4 + 2 bytes on an eighth here; norms are small, and the frozen tower is sharded too
    assert replicated.state_bytes / sharded.state_bytes == pytest.approx(8 * 12 / 10, rel=0.1)
    assert sharded.argument_bytes < replicated.argument_bytes / 2


@pytest.mark.nightly
def test_the_remat_is_chosen_for_the_topology(sizes):
    changes = {"model.remat": "auto", "train.batch_size": 64, "data.prefix_tokens": 256, "data.answer_tokens": 128}
    roomy, tight = (compile_step(settings(**changes, **{"model.memory_gib": gib}), sizes, "v5e:2x4") for gib in (0.0, 1e-6))
    assert (roomy.remat, list(roomy.remat_tried)) == ("dots", ["dots"])
    assert list(tight.remat_tried) == ["dots", "block"] and tight.fits
    assert tight.remat_tried["dots"] == roomy.hbm_bytes_per_device
    assert (tight.hbm_bytes_per_device, tight.remat) == min((needed, name) for name, needed in tight.remat_tried.items())


def test_a_long_prefix_is_full_of_tiles():
    mesh, sizes = make_mesh(), preset("llava-1.6-mistral-7b")
    objective, live = losses.build("dpo"), Reference("live", lambda path: True)
    tiles = lambda **changes: aot._abstract_batch(settings(**changes), sizes, mesh, objective, live).images.shape[2]  # noqa: E731
    assert tiles(**{"data.prefix_tokens": 3072}) == 5 and tiles(**{"data.prefix_tokens": 704}) == 1
    with pytest.raises(UserError, match="config.data.prefix_tokens: say how long"):
        tiles(**{"data.prefix_tokens": 0})
    with pytest.raises(UserError, match="config.data.packed: how many slots .* follows from the data, which is not read here"):
        tiles(**{"data.packed": True})


def test_rows_with_the_towers_features_have_no_pixels():
    mesh, sizes = make_mesh(), preset("llava-1.5-7b")
    objective, live = losses.build("dpo"), Reference("live", lambda path: True)
    batch = aot._abstract_batch(settings(**{"features.cache": "somewhere"}), sizes, mesh, objective, live)
    assert batch.images is None and batch.features.shape == (1, 16, 576, 1024) and batch.features.dtype == "bfloat16"


def test_features_of_a_tower_with_an_adapters_factors_are_refused(sizes, monkeypatch):
    monkeypatch.setattr(aot, "_devices", lambda *_: jax.devices())
    monkeypatch.setattr(aot, "with_adapter", lambda config, sizes: sizes.with_lora({"vision_tower": Lora(2, 4.0, ("query",))}))
    with pytest.raises(UserError, match="config.model.adapter: the adapter has factors in the vision tower"):
        compile_step(settings(**{"features.cache": "somewhere"}), sizes, "v5e:2x4")


@pytest.mark.nightly
def test_lora_keeps_the_base_once_and_trains_the_factors(replicated, sizes):
    """The state is the base in bfloat16, and factors of two layers and rank 8 with two moments; the reference is no copy."""
    lora = compile_step(settings(**{"lora.rank": 8, "mesh.data": 8, "mesh.fsdp": 1}), sizes, "v5e:2x4")
    check(lora)
    base = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(sizes)))
    # inputs and outputs of query, key, value, out, gate, up and down
    factors = 2 * 8 * ((128 + 256) + 2 * (128 + 128) + (256 + 128) + 3 * (128 + 256))
    assert lora.state_bytes == pytest.approx(2 * base + 12 * factors, rel=0.01)
    assert lora.argument_bytes - lora.state_bytes < 0.1 * base < replicated.argument_bytes - replicated.state_bytes


def test_an_older_policy_that_makes_pairs_is_counted(sizes):
    """It is a float32 copy of what trains, with LoRA of the factors alone."""

    def state(**changes):
        c = settings(**{"lora.rank": 8, "pairs.maker": "bdhs", "pairs.when": "online", **changes})
        some, objective = with_adapter(c, sizes), losses.build("dpo")
        kind, optimizer = Reference.of(c, Trainable.of(c, some), objective), make_optimizer(c.optimizer, c.train.steps)
        return aot._abstract_arguments(c, some, make_mesh(), optimizer, objective, kind)[0]

    now, old = state(), state(**{"pairs.every": 4})
    assert now.sampler == {} and old.sampler == now.params == old.params
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(old.sampler))
    assert sum(leaf.size for leaf in jax.tree.leaves(old.sampler)) < 0.1 * sum(leaf.size for leaf in jax.tree.leaves(old.frozen))


@pytest.mark.parametrize("topology, message", [("h100:8", "is not known; give a chip and its grid"), ("v5e:3x7x2", "such as v5e:8x8")])
def test_an_unknown_topology_is_named(sizes, topology, message):
    with pytest.raises(UserError, match=f"--topology: .*{topology}") as caught:
        compile_step(settings(), sizes, topology)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mesh_that_the_topology_does_not_have(sizes):
    with pytest.raises(UserError, match="config.mesh: .* does not multiply to the 8 devices"):
        compile_step(settings(**{"mesh.data": 3, "mesh.fsdp": 5}), sizes, "v5e:2x4")
