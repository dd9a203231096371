"""Makes preference pairs with the model itself.

    python launch/make_pairs.py --config configs/pairs/bdhs.py --model DIR --data SET --out PAIRS      # with images hidden it writes rejected answers
    python launch/make_pairs.py --config configs/pairs/samples.py --model DIR --data SET --out PAIRS   # it answers; scores select
    python launch/train.py --config ... --config.data.path=PAIRS --workdir W

SET is anything that training reads: a published set, whose chosen answers are the references, prepared records, or `scenes`, the built-in
world (config.data.split says which split, config.scenes how many pictures). PAIRS becomes a set of prepared records with
`statistics.json` beside them. The same command goes on where it was stopped or killed, and finds that it is done.
"""

import dataclasses
from pathlib import Path

from absl import flags

from mmalign_jax import cli
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config
from mmalign_jax.data import builder
from mmalign_jax.data.sources import scenes
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs.offline import OfflinePairs, make_offline
from mmalign_jax.pairs.sampled_records import SampleStatistics
from mmalign_jax.report.console import Console

SCENES = "scenes"  # as --data: the built-in world


def main(config: Config) -> int:
    """Imports the set, makes the pairs and writes them."""
    options = flags.FLAGS
    if not (options.model and options.data and options.out):
        raise UserError("--model, --data and --out: give all three; --help describes them")
    if config.pairs.maker == "none":
        raise UserError("config.pairs.maker: 'none' makes no pairs; use configs/pairs/bdhs.py or configs/pairs/samples.py")
    out, console = Path(options.out).resolve(), Console()
    if options.data == SCENES:
        data = dataclasses.replace(config.data, path="", format="scenes")
    elif out == Path(options.data).resolve():
        raise UserError("--out: is the directory of --data; name another one")
    else:
        data = dataclasses.replace(config.data, path=options.data)
    config = dataclasses.replace(config, data=data)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    policy = Pretrained.read(Path(options.model), mesh, config.model.compute_dtype)
    with console.phase("Reading the data set") as progress:
        source = scenes.read(config.scenes, data.split) if data.format == SCENES else None
        target = out.with_name(f"{out.name}.imported")
        imported = builder.obtain(data, target, source, progress=lambda read, skipped: progress(read, None))
    console.line(f"{imported.count} records of {options.data}" + (f"; skipped {dict(imported.skipped)}" if imported.skipped else ""))
    made = make_offline(policy, builder.open_records(imported.dir), config, out, console)
    _print(made, console)
    what = made.rows if made.rows == "pairs" else f"records with {made.rows}"
    console.line(f"{'Made before' if made.prepared.reused else 'Written'}: {made.prepared.count} {what} in {out}")
    return 0


def _print(made: OfflinePairs, console: Console) -> None:
    plain = dataclasses.asdict(made.statistics)
    by_iteration, refused, asked = plain.pop("by_iteration", {}), plain.pop("refused", {}), plain.pop("asked", {})
    if isinstance(made.statistics, SampleStatistics):
        plain["score"] = made.statistics.mean_score
    cells = [(made.rows if name == "pairs" else name, f"{value:g}") for name, value in plain.items()]
    cells += [("records left out", str(len(made.left_out)))]
    cells += [(f"ended in iteration {number}", str(count)) for number, count in by_iteration.items()]
    cells += [(f"refused: {reason}", str(count)) for reason, count in refused.items()]
    cells += [(name, str(count)) for name, count in asked.items()]
    console.table(cells, ("", "count"))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "directory of a Hugging Face model, the policy")
    flags.DEFINE_string("data", None, f"the set with the reference answers: a published set, prepared records, or {SCENES}, the built-in world")
    flags.DEFINE_string("out", None, "directory that receives the pairs as prepared records")
    cli.run_with_config(main)
