"""Makes preference pairs with BDHS: the model itself, with most image tokens hidden, writes a rejected answer to every reference.

    python launch/make_pairs.py --config configs/pairs/bdhs.py --model DIR --data SET --out PAIRS
    python launch/train.py --config ... --config.data.path=PAIRS --workdir W

SET is anything that training reads: a published set, whose chosen answers are the references, or prepared records. PAIRS becomes a set of
prepared records with `statistics.json` beside them. The same command again finds that it is done.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags

from mmalign_jax import cli, run_files
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config
from mmalign_jax.data import builder
from mmalign_jax.data.plan import Records, RowPlan, plan_rows
from mmalign_jax.data.sources.source import Source, fingerprint
from mmalign_jax.errors import UserError
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.params import param_shardings
from mmalign_jax.pairs.bdhs import BdhsSampler, Statistics, make_pairs, reference_of
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.report.console import Console
from mmalign_jax.types import PreferenceRecord

STATISTICS = "statistics.json"
_NO_MATTER = ("maker", "when", "batch_size")  # settings of config.pairs on which no pair depends


@dataclasses.dataclass(frozen=True)
class References:
    """The records with nothing but the answer that pairs are made from."""

    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> PreferenceRecord:
        record = self.records[index]
        return dataclasses.replace(record, responses=(reference_of(record),), prefs=())


def main(config: Config) -> int:
    """Imports the set, makes the pairs and writes them."""
    options = flags.FLAGS
    if not (options.model and options.data and options.out):
        raise UserError("--model, --data and --out: give all three; --help describes them")
    if config.pairs.maker != "bdhs":
        raise UserError(f"config.pairs.maker: {config.pairs.maker!r} makes no pairs; use configs/pairs/bdhs.py")
    if config.data.on_long_row == "shorten_answer":
        raise UserError("config.data.on_long_row: pairs are made from whole references; use error or drop")
    model, out = Path(options.model), Path(options.out).resolve()
    if out == Path(options.data).resolve():
        raise UserError("--out: is the directory of --data; name another one")
    console = Console()
    data = dataclasses.replace(config.data, path=options.data)
    with console.phase("Reading the data set") as progress:
        imported = builder.obtain(data, out.with_name(f"{out.name}.imported"), progress=progress)
    console.line(f"{imported.count} records of {options.data}" + (f"; skipped {dict(imported.skipped)}" if imported.skipped else ""))
    maker = _Maker(dataclasses.replace(config, data=data), model, References(builder.open_records(imported.dir)), console)
    prepared = builder.prepare(data, Source("BDHS", maker.identity(imported.fingerprint), maker.rows), out)
    if not prepared.reused:
        run_files.write_json(out / STATISTICS, maker.summary)
    elif not (out / STATISTICS).is_file():
        console.line(f"{out} holds these pairs already: {prepared.count}")
        return 0
    _print(run_files.read_json(out / STATISTICS), console)
    console.line(f"{'Made before' if prepared.reused else 'Written'}: {prepared.count} pairs in {out}")
    return 0


class _Maker:
    """Makes the rows when `builder.prepare` asks for them, which it does not when they are there."""

    def __init__(self, config: Config, model: Path, references: References, console: Console):
        self._config, self._path, self._references, self._console = config, model, references, console
        dtype = config.model.compute_dtype
        self._dtype = dtype if dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self._sizes = read_config(model)
        self.summary: dict = {}

    def identity(self, data: str) -> str:
        """Changes when the pairs would: with the model's files, the data, the settings, and the type that is computed in."""
        files = sorted(file for file in self._path.iterdir() if file.is_file())
        settings = {key: value for key, value in dataclasses.asdict(self._config.pairs).items() if key not in _NO_MATTER}
        limits = {name: getattr(self._config.data, name) for name in ("on_long_row", "prefix_tokens", "answer_tokens")}
        return json.dumps([fingerprint("bdhs", files), data, settings, limits, self._dtype], sort_keys=True)

    def rows(self) -> Iterator[PreferenceRecord]:
        """The pairs, in the order of the references."""
        config, statistics = self._config, Statistics()
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        processor = load_processor(self._path, self._sizes)
        plan = plan_rows(self._references, processor, config.data, answers=1)
        chosen = [int(index) for index, _ in plan.items]
        lanes = max(len(split_sentences(self._references[index].responses[0].text)) for index in chosen)
        with self._console.phase("Loading the model"):
            params = load_params(self._path, self._sizes, param_shardings(self._sizes, mesh), self._dtype)
        model = Mllm(self._sizes, processor.mean, processor.std, self._dtype)
        sampler = BdhsSampler(model, processor, mesh, config.pairs, plan.layout, lanes)
        with self._console.phase("Making pairs") as progress:
            for made, statistics in make_pairs(sampler, params, map(self._references.__getitem__, chosen), config.pairs):
                progress(statistics.records, len(chosen))
                yield from made
        if not statistics.pairs:
            raise UserError(f"--data: no pair came out of {statistics.records} records; each rejected answer is its reference, or unusable")
        self.summary = _summary(statistics, plan)


def _summary(statistics: Statistics, plan: RowPlan) -> dict:
    left_out: Sequence[dict] = [dataclasses.asdict(row) for row in plan.left_out]
    return {**dataclasses.asdict(statistics), "left_out": left_out}


def _print(summary: dict, console: Console) -> None:
    names = ("records", "pairs", "unchanged", "unusable", "unfinished")
    cells = [(name, str(summary[name])) for name in names] + [("records left out", str(len(summary["left_out"])))]
    cells += [(f"ended in iteration {number}", str(count)) for number, count in summary["by_iteration"].items()]
    console.table(cells, ("BDHS", "count"))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "directory of a Hugging Face model, the policy")
    flags.DEFINE_string("data", None, "the set with the reference answers: a published set, or prepared records")
    flags.DEFINE_string("out", None, "directory that receives the pairs as prepared records")
    cli.run_with_config(main)
