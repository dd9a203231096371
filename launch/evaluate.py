"""Measures how much a model hallucinates, and writes scores and answers to a JSON file.

    python launch/evaluate.py --model exported --benchmark world --data scenes --out scores.json [--compare initial_model]
    python launch/evaluate.py --model llava-7b --benchmark pope --data coco_pope_random.json --images val2014 --out pope.json
    python launch/evaluate.py --model llava-7b --benchmark chair --data objects.jsonl --images val2014 --synonyms words.json --out c.json

`world` is the built-in world's CHAIR and POPE. `--compare` measures a second model, usually the one that `--model` was trained from; the
table then shows the change from it to `--model`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mmalign_jax import cli
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import ScenesConfig
from mmalign_jax.errors import UserError
from mmalign_jax.evaluation import world
from mmalign_jax.evaluation.benchmark import Benchmark, measure, rows
from mmalign_jax.evaluation.files import chair_benchmark, pope_benchmark
from mmalign_jax.evaluation.generate import Generator
from mmalign_jax.files import write_json
from mmalign_jax.hf.import_ import read_config
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.report.console import Console
from mmalign_jax.report.environment import environment
from mmalign_jax.report.records import score_cells

SCENES = "scenes"  # as --data: the built-in world
_SCENES_TOKENS, _FILES_TOKENS = 64, 512


def main() -> int:
    """Measures one model or two, writes the JSON file and prints the table."""
    options = flags.FLAGS
    if not (options.model and options.benchmark and options.data and options.out):
        raise UserError("--model, --benchmark, --data and --out: give all four; --help describes them")
    console, out = Console(), Path(options.out)
    models = [Path(model) for model in (options.model, options.compare) if model]
    for model in models:
        read_config(model)  # a mistake in the second path is not found after the first one's hour
    if out.is_dir():
        raise UserError(f"--out: {out} is a directory; name the JSON file")
    out.parent.mkdir(parents=True, exist_ok=True)
    tests = _tests(options)
    decoding = {
        "method": "greedy",
        "max_new_tokens": options.max_new_tokens or (_SCENES_TOKENS if options.data == SCENES else _FILES_TOKENS),
        "batch_size": options.batch_size,
        "compute_dtype": mesh_lib.compute_dtype(options.compute_dtype, jax.default_backend()),
    }
    results = [_measure(model, tests, decoding, console) for model in models]
    written: dict[str, Any] = {
        "benchmark": options.benchmark,
        "data": options.data,
        "settings": {name: getattr(options, name) for name in ("images", "synonyms", "prompt", "question_suffix", "pictures", "seed")},
        "decoding": decoding,
        "environment": environment(),
        "model": options.model,
        "results": results[0],
    }
    if options.compare:
        written |= {"compare": {"model": options.compare, "results": results[1]}}
    write_json(out, written)

    lines = rows(results[1] if options.compare else None, results[0])
    for group in dict.fromkeys(row.group for row in lines):
        cells = [score_cells(row) for row in lines if row.group == group]
        if options.compare:
            console.table(cells, (group, "--compare", "--model", "change"))
        else:
            console.table([(name, after) for name, _, after, _ in cells], (group, "score"))
    console.line(f"Scores and answers: {out}")
    return 0


def _tests(options) -> Sequence[Benchmark]:
    if options.data == SCENES:
        scenes = ScenesConfig(seed=options.seed, test=options.pictures)
        return world.make_tests(scenes, ("chair", "pope") if options.benchmark == "world" else (options.benchmark,))
    if options.benchmark == "world":
        raise UserError(f"--data: the benchmark world has no files; say --data {SCENES}")
    if not options.images or not Path(options.images).is_dir():
        raise UserError(f"--images: give the directory of the benchmark's images, got {options.images!r}")
    data, images = Path(options.data), Path(options.images)
    if options.benchmark == "pope":
        return (pope_benchmark(data, images, suffix=options.question_suffix),)
    if not options.synonyms:
        raise UserError("--synonyms: CHAIR needs the table of the words that name each object, as a JSON object kind -> terms")
    return (chair_benchmark(data, images, Path(options.synonyms), prompt=options.prompt),)


def _measure(path: Path, tests: Sequence[Benchmark], decoding: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Loads a model, spread over all devices, and measures it."""
    policy = Pretrained.read(path, mesh_lib.make_mesh(), decoding["compute_dtype"])
    limits = {name: decoding[name] for name in ("batch_size", "max_new_tokens")}
    generator = Generator(policy.model, policy.processor, policy.mesh, **limits)
    with console.phase(f"Measuring {path}") as progress, jax.set_mesh(policy.mesh):
        params = policy.params(policy.model.dtype)
        return measure(tests, lambda records: generator(params, records, lambda done: progress(done, len(records))))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face directory of the model")
    flags.DEFINE_enum("benchmark", None, ["pope", "chair", "world"], "what is measured")
    flags.DEFINE_string("data", None, f"POPE's json lines, or a directory of them; CHAIR's json lines; or {SCENES}, the built-in world")
    flags.DEFINE_string("out", None, "JSON file to write")
    flags.DEFINE_string("compare", None, "directory of a second model")
    flags.DEFINE_string("images", None, "directory of the images that the data names")
    flags.DEFINE_string("synonyms", None, "CHAIR: JSON object, kind -> terms that name it")
    flags.DEFINE_string("prompt", "Please describe this image in detail.", "CHAIR: what the model is asked")
    flags.DEFINE_string("question_suffix", "", "POPE: text behind every question")
    flags.DEFINE_integer("pictures", ScenesConfig.test, f"--data {SCENES}: pictures of each of the two splits", lower_bound=1)
    flags.DEFINE_integer("seed", ScenesConfig.seed, f"--data {SCENES}: seed of the pictures", lower_bound=0)
    flags.DEFINE_integer("batch_size", 64, "answers made at a time", lower_bound=1)
    tokens = f"longest answer; longer ones are cut and counted; {_SCENES_TOKENS} for {SCENES} and {_FILES_TOKENS} for files when not given"
    flags.DEFINE_integer("max_new_tokens", None, tokens, lower_bound=1)
    flags.DEFINE_enum("compute_dtype", "auto", ["auto", "float32", "bfloat16"], "auto: float32 on CPU and bfloat16 on accelerators")
    cli.run_plain(main)
