import json
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.report.metrics import MetricsWriter, read_metrics


def steps(workdir):
    return [line["step"] for line in read_metrics(workdir)]


def test_one_json_object_a_step_at_once_on_disk(tmp_path):
    with MetricsWriter(tmp_path / "run", False, "", {}) as writer:
        writer.write(10, {"loss": jnp.float32(0.5), "pairs": np.int64(3), "rewards/margins": 1})
        text = (tmp_path / "run" / "metrics.jsonl").read_text()  # before close: a killed run keeps what it logged
    assert json.loads(text) == {"step": 10, "loss": 0.5, "pairs": 3, "rewards/margins": 1}


def test_values_that_are_not_finite_are_null_and_named(tmp_path):
    with MetricsWriter(tmp_path, False, "", {}) as writer:
        writer.write(1, {"loss": float("nan"), "a": float("-inf"), "b": 1.0})
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "loss": None, "a": None, "b": 1.0, "nonfinite": {"loss": "nan", "a": "-inf"}}


def test_resume_has_each_step_once(tmp_path):
    with MetricsWriter(tmp_path, False, "", {}) as writer:
        for step in (2, 4, 6, 8):
            writer.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # killed in the middle of a line
    with MetricsWriter(tmp_path, False, "", {}) as writer:
        assert steps(tmp_path) == [2, 4, 6, 8]
        with pytest.raises(ValueError, match="step 6 comes after step 8"):
            writer.write(6, {"loss": 2.0})
        writer.truncate_after(5)
        assert steps(tmp_path) == [2, 4]
        writer.write(6, {"loss": 2.0})
        writer.truncate_after(6)
        writer.write(8, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0)]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_truncation_is_one_replacement(tmp_path, monkeypatch):
    """A crash while lines are dropped leaves the old file whole."""
    writer = MetricsWriter(tmp_path, False, "", {})
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})

    def crash(*_):
        raise OSError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="crash"):
            writer.truncate_after(1)
    writer.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_a_foreign_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n')
    with pytest.raises(DataError, match="metrics.jsonl, row 2: not a JSON object with a step"):
        MetricsWriter(tmp_path, False, "", {})


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", True, "project", {}, enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.truncate_after(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:::torch")
def test_event_files_hold_the_scalars_and_hide_what_was_taken_back(tmp_path):
    with MetricsWriter(tmp_path, True, "", {}) as writer:
        writer.write(1, {"loss": 0.25})
        writer.write(2, {"loss": 0.125})
    with MetricsWriter(tmp_path, True, "", {}) as writer:
        writer.truncate_after(1)
        writer.write(2, {"loss": 0.5})
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    seen, starts = [], []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # TFRecord: length u64, its checksum u32, the record, its checksum u32
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            starts += [event.step] if event.session_log.status == SessionLog.START else []
    assert sorted(seen) == [(1, "loss", 0.25), (2, "loss", 0.125), (2, "loss", 0.5)] and sorted(starts) == [1, 2]


def test_wandb_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.report.wandb: W&B is not installed: pip install \"mmalign_jax\[wandb\]\""):
        MetricsWriter(tmp_path, False, "project", {})


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def __init__(self, identity):
            self.id = identity or "abc"

        def log(self, values, step):
            calls.append((self.id, step, values))

        def finish(self):
            calls.append("finish")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda id, **_: calls.append(("init", id)) or Run(id)))
    for step in (1, 2):
        with MetricsWriter(tmp_path, False, "project", {}) as writer:
            writer.write(step, {"loss": 0.5})
    assert calls == [("init", None), ("abc", 1, {"loss": 0.5}), "finish", ("init", "abc"), ("abc", 2, {"loss": 0.5}), "finish"]
