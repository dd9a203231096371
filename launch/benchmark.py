"""How fast this package is beside others, all measured here, in turn, in processes of their own.

    python launch/benchmark.py --workload step --against trl --against self:naive --out step.json
    python launch/benchmark.py --workload step --side 336 --images 4 --against self:naive
    python launch/benchmark.py --workload bdhs --against transformers --out bdhs.json
    python launch/benchmark.py --workload bdhs --model MODEL_DIR --records 16

Workload `step` trains on pairs (`mmalign_jax.benchmark.step`): DPO with a live reference and a frozen tower, beside TRL's `DPOTrainer`, and
beside this package's own step with a row for each answer (`self:naive`), with the pictures that several pairs show once for each of them
(`self:unshared`), or with the tower's features read from disk (`self:features`). Workload `bdhs` makes rejected answers
(`mmalign_jax.benchmark.bdhs`), beside a straightforward implementation on `generate` of transformers. Without `--model` the model is a LLaVA of
63 million random weights, which is written first. Other sides need the extra `bench`.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from mmalign_jax import cli
from mmalign_jax.benchmark import bdhs, step, words
from mmalign_jax.benchmark.model import hf_config, write_model
from mmalign_jax.benchmark.pairs import PairWorkload, Shape, make_pairs
from mmalign_jax.benchmark.workload import Options, Workload, make_items
from mmalign_jax.errors import UserError
from mmalign_jax.files import write_json
from mmalign_jax.hf.import_ import read_config
from mmalign_jax.report.console import Console

_AGAINST = {"bdhs": ("transformers",), "step": (step.TRL, step.NAIVE, step.UNSHARED, step.FEATURES)}
_NEEDS = {"transformers": "torch", step.TRL: "trl"}


def main() -> int:
    """Measures, prints the table, and writes the JSON file where one is asked for."""
    options, console = flags.FLAGS, Console()
    for name in options.against:
        if name not in _AGAINST[options.workload]:
            raise UserError(f"--against: workload {options.workload} has {', '.join(_AGAINST[options.workload])} beside ours, not {name}")
        if name in _NEEDS and importlib.util.find_spec(_NEEDS[name]) is None:
            raise UserError(f"--against: {name} needs {_NEEDS[name]}, which is not installed here: pip install 'mmalign_jax[bench]'")
    if options.out:
        Path(options.out).resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        if options.model:
            model = Path(options.model).resolve()
            read_config(model)
        else:
            with console.phase("Writing a model with random weights"):
                config = hf_config(336 if options.workload == "bdhs" else options.side, options.small, options.large_tower)
                model = write_model(directory / "model", config, seed=options.seed)
        measured = {"bdhs": _bdhs, "step": _step}[options.workload]
        report, table = measured(model, directory, console)
    console.table(*table)
    console.line(f"{report['date']}, {report['machine']['cores']} cores, load {report['load_before_and_after']}")
    for name, side in report["sides"].items():
        console.line(f"{name}: " + ", ".join(f"{package} {version}" for package, version in side["versions"].items()))
    if options.out:
        write_json(Path(options.out), report)
        console.line(f"Everything: {options.out}")
    return 0


def _bdhs(model: Path, directory: Path, console: Console) -> tuple[dict[str, Any], tuple]:
    options = flags.FLAGS
    if not options.model:
        console.line(f"Model: {bdhs.RANDOM_MODEL}")
    settings = Options(
        rho_th=options.rho_th, n_iter=options.n_iter, eps=options.eps, temperature=options.temperature, seed=options.seed,
        max_sentence_tokens=options.max_sentence_tokens, max_answer_tokens=options.max_answer_tokens,
    )  # fmt: skip
    console.line(f"Records: {bdhs.RECORDS}")
    console.line(f"Options of both sides: {settings}")
    workload = Workload(str(model), settings, make_items(directory, options.records, options.seed), options.batch or 16)
    plan = bdhs.Plan(options.rounds, options.records, options.against_records)
    report = bdhs.measure(workload, directory, plan, options.against, console)
    return report, bdhs.table(report)


def _step(model: Path, directory: Path, console: Console) -> tuple[dict[str, Any], tuple]:
    options = flags.FLAGS
    shape = Shape(options.batch or 4, options.images, options.side, options.prompt_words, options.answer_words, options.pairs_of_image)
    console.line(f"{shape}; pictures of {options.photographs or 'noise'}, random words, every step on the same pairs")
    known = {"objective": options.objective, "beta": options.beta, "reference": options.reference}
    photographs = sorted(Path(options.photographs).resolve().glob("*.jp*g")) if options.photographs else []
    if options.photographs and not photographs:
        raise UserError(f"--photographs: {options.photographs} holds no JPEG files")
    # of a model with the benchmark's kind of tokenizer these are the words that it knows
    pairs = make_pairs(directory, shape, options.seed, min(words.VOCABULARY, read_config(model).decoder.vocab_size), photographs)
    workload = PairWorkload(str(model), shape, pairs, **known)
    run = {"rounds": options.rounds, "steps": options.steps, "platform": options.platform}
    report = step.measure(workload, directory, options.against, console, **run)
    return report, step.table(report)


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "step", ["step", "bdhs"], "what is measured")
    flags.DEFINE_string("model", None, "Hugging Face directory of a LLaVA; none: one with random weights")
    flags.DEFINE_multi_enum("against", [], sorted({name for names in _AGAINST.values() for name in names}), "another side; may be left out")
    flags.DEFINE_string("out", None, "JSON file to write")
    flags.DEFINE_integer("batch", None, "step: pairs of a step, 4; bdhs: rows of a device batch of ours, 16", lower_bound=1)
    flags.DEFINE_integer("records", 64, "records of a round, ours", lower_bound=1)
    flags.DEFINE_integer("against_records", 8, "records of a round of the other side", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "rounds of each side", lower_bound=1)
    flags.DEFINE_integer("steps", 3, "step: of a side in a round", lower_bound=1)
    flags.DEFINE_integer("side", 224, "step: pixels of a picture, wide and high", lower_bound=1)
    flags.DEFINE_bool("small", False, "a model of 9 million random weights")
    flags.DEFINE_bool("large_tower", False, "a model whose tower has 38 million random weights in the place of 5")
    flags.DEFINE_string("photographs", None, "step: directory of JPEG files to show in the place of noise")
    flags.DEFINE_integer("images", 1, "step: pictures of a prompt", lower_bound=1)
    flags.DEFINE_integer("pairs_of_image", 1, "step: pairs that show the same pictures", lower_bound=1)
    flags.DEFINE_integer("prompt_words", 20, "step: of a prompt", lower_bound=1)
    flags.DEFINE_integer("answer_words", 63, "step: of an answer, which ends with one token more", lower_bound=1)
    flags.DEFINE_string("objective", "dpo", "step: name in the registry")
    flags.DEFINE_float("beta", 0.1, "step: of the objective", lower_bound=0.0)
    flags.DEFINE_enum("reference", "live", ["live", "none"], "step: none for an objective without")
    flags.DEFINE_string("platform", "cpu", "step: of jax; empty: the best there is")
    flags.DEFINE_integer("seed", 0, "of model, records and draws", lower_bound=0)
    flags.DEFINE_float("rho_th", 0.95, "probability that an image token is hidden", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_float("eps", 0.65, "a rejected answer is accepted below this similarity", lower_bound=0.0)
    flags.DEFINE_integer("n_iter", 5, "most attempts", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "of the draws", lower_bound=0.0)
    flags.DEFINE_integer("max_sentence_tokens", 64, "most tokens behind a split", lower_bound=1)
    flags.DEFINE_integer("max_answer_tokens", 64, "most tokens of an unguided answer", lower_bound=1)
    cli.run_plain(main)
