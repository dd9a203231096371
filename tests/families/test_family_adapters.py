"""Adapters of every family: PEFT loads every tensor of them, computes the same, and merges to the same weights."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from helpers.families import all_cases, one_a_kind
from helpers.lora import random_factors
from helpers.peft_models import merged, with_adapter
from helpers.tiny import Tiny, batch_of, prefill, quick_jit

from mmalign_jax.config import PARTS, from_mapping
from mmalign_jax.errors import UserError
from mmalign_jax.hf import adapters
from mmalign_jax.hf.export import export
from mmalign_jax.models.tree import union
from mmalign_jax.types import PREFIX

CASES = all_cases()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def everywhere(config):
    """Factors beside every linear of every part that has some."""
    lora = {}
    for part in PARTS:
        try:
            lora |= adapters.with_adapter(from_mapping({"lora": {"rank": 3, "alpha": 6, "parts": [part]}}), config).lora
        except UserError as error:
            assert part == "projector" and "has no" in str(error)  # Gemma 3's is a bare matrix
    return config.with_lora(lora)


@pytest.mark.parametrize("name", one_a_kind())
def test_peft_loads_and_merges_as_we_do(tmp_path, name):
    case = CASES[name]
    base = case.write(tmp_path / "base", 4)
    tiny = Tiny.load(base)
    sizes = everywhere(tiny.config)
    assert {"decoder", "vision_tower"} <= sizes.lora.keys()
    factors = random_factors(sizes, size=0.1)
    out = adapters.export_adapter(factors, sizes, base, tmp_path / "adapter")

    again = adapters.read_adapter(out, tiny.config)
    assert again == sizes
    read = adapters.import_adapter(out, again)
    assert jax.tree.structure(read) == jax.tree.structure(factors)
    jax.tree.map(np.testing.assert_array_equal, read, factors)

    model = dataclasses.replace(tiny.model, config=sizes)
    batch = batch_of(case.records, tiny.processor)
    run = quick_jit(lambda params: model.logits(params, prefill(model, params, batch).hidden))
    logits, roles = np.asarray(run(union(tiny.params, factors))), np.asarray(batch.role)
    adapted, plain = with_adapter(case.load(base), out), case.load(base)
    for row, record in enumerate(case.records):
        inputs = case.inputs(base, record)
        with torch.no_grad():
            expected, before = (some(**inputs).logits[0].float().numpy() for some in (adapted, plain))
        np.testing.assert_allclose(logits[row, roles[row] == PREFIX], expected, atol=1e-4, rtol=0, err_msg=record.id)
        assert np.abs(expected - before).max() > 1e-2, "the adapter is not seen"

    ours, theirs = case.load(export(factors, base, tmp_path / "merged", lora=sizes.lora)).state_dict(), merged(adapted)
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        np.testing.assert_allclose(ours[tensor].float().numpy(), value.float().numpy(), atol=1e-6, rtol=0, err_msg=tensor)
