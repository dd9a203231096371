"""The SFT model that ships with the package: small, able to see, and a hallucinator by habit."""

from importlib import resources
from pathlib import Path

import jax
import pytest

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import ScenesConfig
from mmalign_jax.evaluation import world
from mmalign_jax.evaluation.generate import Generator
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.models.mllm import Mllm

pytestmark = pytest.mark.optimised

MODEL = Path(str(resources.files("mmalign_jax") / "assets" / "scenes_sft"))


@pytest.fixture(scope="module")
def scores() -> dict:
    sizes = read_config(MODEL)
    processor = load_processor(MODEL, sizes)
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    generate = Generator(Mllm(sizes, processor.mean, processor.std), processor, mesh, batch_size=64, max_new_tokens=64)
    with jax.set_mesh(mesh):
        params = load_params(MODEL, sizes)
        return world.measure(world.make_tests(ScenesConfig(test=64), ("pope", "chair")), lambda records: generate(params, records))


def test_it_is_small():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 4_000_000


def test_it_sees_what_usual_pictures_show(scores):
    assert scores["test"]["chair"]["recall"]["value"] >= 0.9
    assert scores["test"]["pope"]["mean"]["accuracy"]["value"] >= 0.6


def test_it_hallucinates_where_the_habit_is_broken(scores):
    usual, broken = (scores[split]["chair"]["chair_i"]["value"] for split in ("test", "counterfactual"))
    assert broken > 3 * usual and broken > 0.1
