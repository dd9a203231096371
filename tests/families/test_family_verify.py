"""launch/verify.py knows no family, and compares all of them."""

import json

import pytest
import torch
from helpers.families import all_cases

from mmalign_jax.hf.families import FAMILIES
from mmalign_jax.verify.compare import compare


@pytest.mark.nightly
def test_every_family_is_compared(tmp_path):
    """One variant of each; a row of words is left out only where transformers' processor takes none."""
    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(1)
    for name, case in all_cases().items():
        if name.split(" ")[0] in seen:
            continue
        directory = case.write(tmp_path / name.replace(" ", "_"), 5)
        seen.add(name.split(" ")[0])
        seen.add(json.loads((directory / "config.json").read_text())["model_type"])
        verdict = compare(directory)
        assert verdict.equal, f"{name}: {verdict.first}; {[check.cells for check in verdict.checks]}"
        names = " ".join(check.name for check in verdict.checks)
        assert "two pictures: greedy tokens" in names and "weights" in names
        assert ("text: logits" in names) == (not verdict.skipped), verdict.skipped
        assert all("refuses it" in line for line in verdict.skipped)
    torch.set_num_threads(before)
    assert FAMILIES.keys() <= seen
