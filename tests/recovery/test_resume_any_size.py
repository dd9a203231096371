"""A run on pictures of any size, whose steps have rows of two shapes, is killed and started again: the same parameters, bit for bit."""

import random
import time

import pytest
from helpers.families import all_cases
from helpers.rows import photo_bytes, rlaif_row, write_parquet
from helpers.runs import finish, same_result, start, steps_done, wait_for

STEPS = 12
PICTURES = ("astronaut", "coffee", "chelsea", "rocket", "cat", "astronaut")


@pytest.mark.nightly
def test_kill_9_between_rows_of_two_shapes(tmp_path):
    rows = []
    for number, picture in enumerate(PICTURES):
        image = {"bytes": photo_bytes(picture, (16 + 10 * number, 20 + 6 * number)), "path": f"{number}.jpg"}
        rows.append(rlaif_row(number, image=image, chosen="There is a red cat.", rejected="A dog and two birds."))
    settings = {
        "model.path": all_cases()["qwen2_5_vl"].write(tmp_path / "base", 2), "data.path": write_parquet(tmp_path / "rows.parquet", rows),
        "data.format": "rlaif_v", "data.buckets": 2, "objective.name": "mdpo", "train.steps": STEPS, "train.batch_size": 4,
        "train.accumulate": 2, "train.log_every": 1, "checkpoint.every": 3, "optimizer.learning_rate": 1e-3, "report.gallery": 0,
        "report.tensorboard": False,
    }  # fmt: skip
    output = finish(start(tmp_path / "whole", "configs/base.py", settings))
    assert "has rows of a shape that is new" in output

    seed = time.time_ns()
    print(f"random moment from seed {seed}")  # shown when the test fails
    workdir, at = tmp_path / "killed", random.Random(seed).randrange(4, STEPS)
    process = start(workdir, "configs/base.py", settings)
    wait_for(lambda: steps_done(workdir) >= at, process)
    time.sleep(random.Random(seed + 1).random() * 0.3)
    process.kill()
    process.communicate()
    output = finish(start(workdir, "configs/base.py", settings))
    assert "Going on from the checkpoint of step" in output or steps_done(workdir) == STEPS
    same_result(workdir, tmp_path / "whole", STEPS)
