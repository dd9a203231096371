"""The step benchmark: that its sides compute the same, and what it reports."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.commands import launch

from mmalign_jax import losses
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.benchmark import step, step_ours
from mmalign_jax.benchmark.model import hf_config, write_model
from mmalign_jax.benchmark.pairs import PairWorkload, Shape, make_pairs
from mmalign_jax.benchmark.separate_rows import SeparateRows, apart
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.report.console import Console, format_table
from mmalign_jax.training.flops import Work, step_flops

TINY = hf_config(28) | {
    "text_config": hf_config()["text_config"]
    | {"vocab_size": 512, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    "vision_config": hf_config(28)["vision_config"]
    | {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 7},
}
SHAPE = Shape(batch=8, images=2, side=28, prompt_words=6, answer_words=9)




@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    directory = tmp_path_factory.mktemp("step")
    model = write_model(directory / "model", TINY)
    return PairWorkload(str(model), SHAPE, make_pairs(directory, SHAPE, seed=1, vocabulary=512))


@pytest.mark.nightly
def test_both_forms_of_the_step_compute_the_same(workload):
    (ready, ours), (more, naive) = (step_ours.runner(workload, form) for form in ("", "naive"))
    assert ready["tokens_of_a_row"] == more["tokens_of_a_row"] + SHAPE.answer_words + 1  # one more answer, with its end
    first, second = ours({"steps": 2}), naive({"steps": 2})
    np.testing.assert_allclose(first["logps_chosen"], second["logps_chosen"], rtol=1e-5)
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)
    # and so do their updates
    np.testing.assert_allclose(ours({"steps": 1})["logps_chosen"], naive({"steps": 1})["logps_chosen"], rtol=1e-5)
    assert 1.3 < more["flops"] / ready["flops"] < 2
    assert len(first["seconds"]) == len(first["input_wait"]) == 2 and first["matrix_flops_per_s"] > 0


@pytest.mark.nightly
def test_features_of_the_tower_make_the_same_step_of_fewer_flops(workload, tmp_path):
    (ready, ours), (less, kept) = (step_ours.runner(workload, form, tmp_path) for form in ("", "features"))
    one, other = ours({"steps": 1}), kept({"steps": 1})
    np.testing.assert_allclose(other["logps_chosen"], one["logps_chosen"], rtol=1e-5)
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5)
    assert less["flops"] < ready["flops"] and (tmp_path / "features/key.json").is_file()


def test_rows_apart(workload):
    rows = next(step_ours.loader_of(workload, Pretrained.read(Path(workload.model), mesh_lib.make_mesh())))
    parts = apart(rows)
    assert parts.tokens.shape == (1, 16, rows.prefix_slots + rows.answer_slots) and parts.answers == 1
    for row in range(8):
        for answer in range(2):
            start = rows.prefix_slots + answer * rows.answer_slots
            for name in ("tokens", "positions", "token_weight"):
                one, whole = getattr(parts, name)[0, 2 * row + answer], getattr(rows, name)[0, row]
                np.testing.assert_array_equal(one, np.concatenate([whole[: rows.prefix_slots], whole[start : start + rows.answer_slots]]))
            np.testing.assert_array_equal(parts.images[0, 2 * row + answer], rows.images[0, row])
    assert parts.role.max() == 2
    with pytest.raises(ValueError, match="auxiliary"):
        apart(dataclasses.replace(rows, auxiliary=rows))


def test_pairs_of_a_picture(workload, tmp_path):
    """Pictures once, or once for each pair: the same step, of fewer FLOPs."""
    shape = dataclasses.replace(SHAPE, pairs_of_image=4)
    twice = dataclasses.replace(workload, shape=shape, pairs=make_pairs(tmp_path, shape, seed=1, vocabulary=512))
    assert len({pair.pictures for pair in twice.pairs}) == 2 and len({pair.prompt for pair in twice.pairs}) == 8
    policy = Pretrained.read(Path(twice.model), mesh_lib.make_mesh(1, 1, 1, jax.devices()[:1]))
    shared, unshared = (next(step_ours.loader_of(twice, policy, shared=form)) for form in (True, False))
    assert shared.images.shape[:2] == (1, 2) and unshared.images.shape[:2] == (1, 8)
    work = Work.of(losses.build("dpo"), live_reference=True)
    flops = [step_flops(policy.sizes, rows, work=work, freeze=("vision_tower",)) for rows in (shared, unshared)]
    assert flops[0] < flops[1]
    with pytest.raises(ValueError, match="picture"):
        apart(shared)


def test_what_separate_rows_cannot_be():
    with pytest.raises(ValueError, match="mdpo reads"):
        SeparateRows(None, losses.build("mdpo"))


def side(name, seconds, **ready):
    timed = {"seconds": seconds, "input_wait": [0.01] * 3, "peak_bytes": 10 << 20, "device_peak_bytes": None, "matrix_flops_per_s": 1e9}
    first = timed | {"seconds": [30.0], "loss": 0.69, "logps_chosen": -100.0, "peak_bytes": 20 << 20}
    ready = {"imported_bytes": 1 << 20, "versions": {"package": "1"}, "slots": 40, "tokens_of_a_row": 10, "dtype": "float32"} | ready
    return step._Side(name, types.SimpleNamespace(ready=ready), first, [timed, timed | {"seconds": [2 * one for one in seconds]}])


def test_the_report(workload):
    ours, naive, trl = side(step.OURS, [1.0, 2.0, 3.0], flops=1e9), side(step.NAIVE, [2.0, 4.0, 5.0], flops=1.8e9), side(step.TRL, [6.0] * 3)
    against = {one.name: step._compared(ours, one) for one in (naive, trl)}
    assert against[step.NAIVE]["speed_ratio"]["median"] == 2.0 and against[step.NAIVE]["predicted_speed_ratio"] == 1.8
    assert against[step.TRL]["speed_ratio"]["median"] == 3.0 and "predicted_speed_ratio" not in against[step.TRL]
    sides = {one.name: step._side(one, workload) for one in (ours, naive, trl)}
    report = {"sides": sides, "against": against, "loader_images_per_s": 99.0}
    found = report["sides"][step.OURS]
    assert found["step_s"]["median"] == 2.5 and found["pairs_per_s"] == {"median": 3.2, "least": pytest.approx(8 / 6), "most": 8.0}
    assert found["share_of_matrix_rate"] == pytest.approx(0.4) and found["input_wait_share"] == pytest.approx(0.004)
    rows, columns = step.table(json.loads(json.dumps(report)))
    text = format_table(rows, columns)
    for wanted in ("pairs/s", "3.2 [1.33, 8]", "40.0%", "0.40%", "1.8", "40 (10)"):
        assert wanted in text, wanted
    assert all(len(row) == len(columns) == 6 for row in rows)


def test_sides_that_compute_something_else_are_refused(workload, tmp_path):
    ours, other = side(step.OURS, [1.0] * 3), side(step.TRL, [1.0] * 3)
    step._check(ours, other)
    other.first["logps_chosen"] = -100.1
    with pytest.raises(UserError, match="does not compute what"):
        step._check(ours, other)
    with pytest.raises(UserError, match="--against trl"):
        step.measure(dataclasses.replace(workload, objective="ipo"), tmp_path, [step.TRL], Console(enabled=False), rounds=1, steps=1)


@pytest.mark.nightly
def test_the_command(workload, tmp_path):
    out = tmp_path / "report.json"
    flags = {"model": workload.model, "batch": 2, "side": 28, "prompt_words": 6, "answer_words": 9, "rounds": 2, "steps": 2}
    words = ["--workload=step", "--against=self:naive", f"--out={out}", *(f"--{name}={value}" for name, value in flags.items())]
    done = launch("launch/benchmark.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["against"]["self:naive"]["speed_ratio"]["median"] > 0 and report["date"] and report["setting"]["objective"] == "dpo"
    assert done.stdout.count("pairs/s, median") == 1 and "jax 0." in done.stdout
