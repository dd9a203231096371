"""The 7B config as it stands, on a LLaVA directory that transformers wrote and photographs in RLAIF-V's layout."""

import io
import json
import math

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import quiet, tensors, tiny_llava
from helpers.commands import launch
from helpers.rows import rlaif_row, write_parquet
from PIL import Image
from skimage import data

PHOTOGRAPHS = {
    "astronaut": ("Who is in the picture?", "A woman in an orange suit, in front of a flag.", "A man in a black suit."),
    "coffee": ("What stands on the table?", "A cup of coffee on a saucer, with a spoon.", "A glass of red wine."),
    "chelsea": ("Which animal is this?", "A cat.", "A small brown dog that looks to the left."),
    "rocket": ("Describe this image in detail.", "A rocket stands on its launch pad in the evening. Its lights are on.", "A tree."),
    "camera": ("What does the man do?", "He looks through a camera on a tripod.", "He plays the piano."),
    "coins": ("How many coins are there?", "There are 24 coins in four rows.", "There is one coin."),
    "retina": ("What is this?", "The retina of an eye.", "A picture of the sun over the sea."),
    "immunohistochemistry": ("Is this a drawing?", "No, it is tissue under a microscope.", "Yes, it is a drawing of a flower."),
}


def jpeg(name, side):
    """The photograph as JPEG bytes, its longer side shrunk to `side`, and its size."""
    out = io.BytesIO()
    picture = Image.fromarray(getattr(data, name)())
    picture.thumbnail((side, side))
    picture.save(out, "JPEG", quality=90)
    return out.getvalue(), picture.size


def photographs(path):
    """One row a photograph; their sizes, shapes and colour modes differ."""
    rows, sizes = [], set()
    for number, (name, (question, chosen, rejected)) in enumerate(PHOTOGRAPHS.items()):
        encoded, size = jpeg(name, 200 + 40 * number)
        image = {"bytes": encoded, "path": f"{name}.jpg"}
        rows.append(rlaif_row(number, image=image, question=question, chosen=chosen, rejected=rejected, image_path=f"{name}.jpg"))
        sizes.add(size)
    assert len(sizes) == len(PHOTOGRAPHS)
    return write_parquet(path, rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    # float32: five steps at a learning rate of 5e-7 are lost in float16's rounding, in which the export would be written
    sizes = {"vision": {"image_size": 42, "patch_size": 14}, "text": {"num_hidden_layers": 1}}
    return tiny_llava(tmp_path_factory.mktemp("llava"), shards=2, **sizes)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The command's output and its directory."""
    workdir = tmp_path_factory.mktemp("runs") / "real"
    file = photographs(tmp_path_factory.mktemp("data") / "rlaif_v.parquet")
    done = launch(
        "launch/train.py", "--config", "configs/llava15_7b_dpo.py", f"--config.model.path={base}", f"--config.data.path={file}",
        "--config.train.steps=5", "--config.model.remat=auto", "--config.data.buckets=1", "--workdir", workdir,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done, workdir


def test_the_first_loss_is_log_2(run):
    lines = [json.loads(line) for line in (run[1] / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["step"], lines[-1]["step"]) == (1, 5)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) and lines[0]["zero_gradients"] == 0
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


def test_the_directory_holds_everything(run, base):
    done, workdir = run
    for name in ("metrics.jsonl", "report.html", "export", "checkpoints"):
        assert (workdir / name).exists(), name
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == 5 and config["train"]["batch_size"] == 64 and config["model"]["path"] == str(base)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary == {"objective": "dpo", "steps": 5, "stopped": "", "scores": []}
    report = (workdir / "report.html").read_text()
    assert "Loss" in report and "Traceback" not in report
    count = len(PHOTOGRAPHS)
    assert f"{count} records of {count} rows" in done.stdout and f"{count} of {count} rows" in done.stdout
    assert "Attention by blocks (config.model.attention=auto)" in done.stdout
    assert done.stdout.count("Remat dots: a step needs ") == 1  # the machine has room for a model this small
    assert "USER: <image>" in done.stdout and "1 images of up to 42 x 42 pixels" in done.stdout
    assert done.stderr == ""


def load(directory):
    with quiet():
        model, info = transformers.LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model.eval()


def test_transformers_loads_the_export(run, base):
    export = run[1] / "export"
    before, after = tensors(base), tensors(export)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("vision_tower" in name for name in moved)  # the tower is frozen
    assert {name for name in before if "vision_tower" not in name} == moved
    processor = transformers.AutoProcessor.from_pretrained(export)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which animal is this?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.fromarray(data.chelsea()), return_tensors="pt")
    with torch.no_grad():
        logits = [load(directory)(**inputs).logits.numpy() for directory in (base, export)]
    assert np.isfinite(logits[1]).all()
    change = np.abs(logits[1] - logits[0]).max()
    assert 1e-7 < change < 0.1  # five steps at a learning rate of 5e-7
