"""The train command on every family: five steps of DPO, mDPO and LoRA-DPO, with the census of gradients, and an export that loads."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.checkpoints import quiet, tensors
from helpers.commands import launch
from helpers.families import all_cases
from helpers.rows import photo_bytes, rlaif_row, write_parquet

METHODS = {"dpo": [], "mdpo": ["--config.objective.name=mdpo"], "lora": ["--config.lora.rank=4"]}
PICTURES = ("astronaut", "coffee", "chelsea", "rocket")
CASES = all_cases()


def runs():
    """All families by all methods."""
    return [pytest.param(name, method, id=f"{name}-{method}") for name in CASES for method in METHODS]


@pytest.mark.parametrize(("name", "method"), runs())
@pytest.mark.nightly
def test_five_steps(tmp_path, name, method):
    case = CASES[name]
    base = case.write(tmp_path / "base", 2)
    rows = []
    for number, picture in enumerate(PICTURES):
        image = {"bytes": photo_bytes(picture, (60 + 20 * number, 90 - 15 * number)), "path": f"{picture}.jpg"}
        answers = {"question": "What is in the picture?", "chosen": "There is a red cat.", "rejected": "A dog and two birds."}
        rows += [rlaif_row(2 * number + twin, image=image, **answers) for twin in range(2)]
    file = write_parquet(tmp_path / "rows.parquet", rows)
    done = launch(
        "launch/train.py", "--config", "configs/base.py", f"--config.model.path={base}", f"--config.data.path={file}",
        "--config.data.format=rlaif_v", "--config.train.steps=5", "--config.train.batch_size=2", "--config.train.log_every=1",
        "--config.optimizer.learning_rate=1e-3", "--config.report.gallery=0", "--config.report.tensorboard=False",
        "--config.data.order=by_image", f"--config.data.buckets={2 if method == 'dpo' else 1}", *METHODS[method], "--workdir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Rows share their pictures: those of 1 or 2 rows are encoded for the 2 rows of a device" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    # mDPO adds an image edge and an anchor, each log 2 as well
    assert lines[0]["loss"] == pytest.approx({"mdpo": 3}.get(method, 1) * math.log(2), abs=1e-4)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["rewards/margins"] != 0
    # LoRA's first factor has no gradient while the second is zero; key biases never have one
    if "WARNING: no gradient" in done.stdout:
        warned = next(line for line in done.stdout.splitlines() if "WARNING: no gradient" in line)
        named = warned.split("after it still ")[1].split(", ")
        assert all(tensor.endswith("key/bias") for tensor in named), warned

    before, after = tensors(base), tensors(tmp_path / "run/export")
    assert before.keys() == after.keys()
    moved = {tensor for tensor in before if not torch.equal(before[tensor], after[tensor])}
    assert moved
    with quiet():
        model, info = type(case.load(base)).from_pretrained(tmp_path / "run/export", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    record = case.records[0]
    with torch.no_grad():
        logits = [some.eval()(**case.inputs(base, record)).logits.numpy() for some in (case.load(base), model)]
    assert np.isfinite(logits[1]).all() and np.abs(logits[1] - logits[0]).max() > 1e-6
