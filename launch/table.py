"""Prints a Markdown table over the runs of a sweep: mean and range over the seeds, one line a method.

    python launch/table.py --runs runs/sweeps/objectives
    python launch/table.py --runs runs/sweeps/loops --curve samples/score --svg rewards.svg     # draws a metric, too
"""

from pathlib import Path

from absl import flags

from mmalign_jax import cli
from mmalign_jax.errors import UserError
from mmalign_jax.files import replace_text
from mmalign_jax.report.curves import read_curves, standalone
from mmalign_jax.report.table import markdown, pair_markdown, read_runs

NAMES = ("CHAIR_i", "CHAIR_s", "Object recall", "Words per caption", "POPE accuracy", "POPE yes-ratio")


def main() -> int:
    """Prints the tables of the finished runs, and draws the curve that is asked for."""
    options = flags.FLAGS
    if not options.runs:
        raise UserError("--runs: give the directory that holds the runs' directories")
    runs = read_runs(Path(options.runs))
    for group in dict.fromkeys(group for run in runs for group, _ in run.scores):
        print(f"{group}\n\n{markdown(runs, group, NAMES, percent=[name for name in NAMES if name != 'Words per caption'])}\n")
    if pairs := pair_markdown(runs):
        print(f"Pairs made before training\n\n{pairs}\n")
    if bool(options.curve) != bool(options.svg):
        raise UserError("--curve and --svg: a metric, and the file that it is drawn into; give both")
    if options.curve:
        replace_text(Path(options.svg), standalone(read_curves(Path(options.runs), options.curve)))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("runs", None, "directory that holds the runs' directories")
    flags.DEFINE_string("curve", None, "metric of the runs' metrics.jsonl to draw over the steps, such as samples/score")
    flags.DEFINE_string("svg", None, "file for it")
    cli.run_plain(main)
