"""How fast this package is beside a straightforward implementation, both measured here, in turn, in processes of their own.

    python launch/benchmark.py --workload bdhs --against transformers --out bdhs.json
    python launch/benchmark.py --workload bdhs --model MODEL_DIR --records 16

Workload `bdhs` makes rejected answers (`mmalign_jax.benchmark.bdhs`). Without `--model` it takes a LLaVA of 63 million random weights with 576
image tokens, which it writes first. Both sides have the same options, printed with the results. `--against transformers` needs torch.
"""

import importlib.util
import tempfile
from pathlib import Path

from absl import flags

from mmalign_jax import cli
from mmalign_jax.benchmark import bdhs
from mmalign_jax.benchmark.model import write_model
from mmalign_jax.benchmark.workload import Options, Workload, make_items
from mmalign_jax.errors import UserError
from mmalign_jax.files import write_json
from mmalign_jax.hf.import_ import read_config
from mmalign_jax.report.console import Console


def main() -> int:
    """Measures, prints the table, and writes the JSON file where one is asked for."""
    options, console = flags.FLAGS, Console()
    if "transformers" in options.against and importlib.util.find_spec("torch") is None:
        raise UserError("--against: the other side runs on torch, which is not installed here: pip install torch")
    if options.out:
        Path(options.out).resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        if options.model:
            model = Path(options.model).resolve()
            read_config(model)
        else:
            with console.phase("Writing a model with random weights"):
                model = write_model(directory / "model", seed=options.seed)
            console.line(f"Model: {bdhs.RANDOM_MODEL}")
        settings = Options(
            rho_th=options.rho_th, n_iter=options.n_iter, eps=options.eps, temperature=options.temperature, seed=options.seed,
            max_sentence_tokens=options.max_sentence_tokens, max_answer_tokens=options.max_answer_tokens,
        )  # fmt: skip
        console.line(f"Records: {bdhs.RECORDS}")
        console.line(f"Options of both sides: {settings}")
        workload = Workload(str(model), settings, make_items(directory, options.records, options.seed), options.batch)
        plan = bdhs.Plan(options.rounds, options.records, options.against_records)
        report = bdhs.measure(workload, directory, plan, options.against, console)
    console.table(*bdhs.table(report))
    console.line(f"{report['date']}, {report['machine']['cores']} cores, load {report['load_before_and_after']}")
    for name, side in report["sides"].items():
        console.line(f"{name}: " + ", ".join(f"{package} {version}" for package, version in side["versions"].items()))
    if options.out:
        write_json(Path(options.out), report)
        console.line(f"Everything: {options.out}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "bdhs", ["bdhs"], "what is measured")
    flags.DEFINE_string("model", None, "Hugging Face directory of a LLaVA; none: one with random weights")
    flags.DEFINE_multi_enum("against", [], [name for name in bdhs.MODULES if name != bdhs.OURS], "the other side; may be left out")
    flags.DEFINE_string("out", None, "JSON file to write")
    flags.DEFINE_integer("batch", 16, "rows of a device batch, ours", lower_bound=1)
    flags.DEFINE_integer("records", 64, "records of a round, ours", lower_bound=1)
    flags.DEFINE_integer("against_records", 8, "records of a round of the other side", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "rounds of each side", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of model, records and draws", lower_bound=0)
    flags.DEFINE_float("rho_th", 0.95, "probability that an image token is hidden", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_float("eps", 0.65, "a rejected answer is accepted below this similarity", lower_bound=0.0)
    flags.DEFINE_integer("n_iter", 5, "most attempts", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "of the draws", lower_bound=0.0)
    flags.DEFINE_integer("max_sentence_tokens", 64, "most tokens behind a split", lower_bound=1)
    flags.DEFINE_integer("max_answer_tokens", 64, "most tokens of an unguided answer", lower_bound=1)
    cli.run_plain(main)
