"""Prints a Markdown table over the runs of a sweep: mean and range over the seeds, one line a method.

    python launch/table.py --runs runs/sweeps/objectives
"""

from pathlib import Path

from absl import flags

from mmalign_jax import cli
from mmalign_jax.errors import UserError
from mmalign_jax.report.table import markdown, read_runs

NAMES = ("CHAIR_i", "CHAIR_s", "Object recall", "Words per caption", "POPE accuracy", "POPE yes-ratio")


def main() -> int:
    options = flags.FLAGS
    if not options.runs:
        raise UserError("--runs: give the directory that holds the runs' directories")
    runs = read_runs(Path(options.runs))
    for group in dict.fromkeys(group for run in runs for group, _ in run.scores):
        print(f"{group}\n\n{markdown(runs, group, NAMES, percent=[name for name in NAMES if name != 'Words per caption'])}\n")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("runs", None, "directory that holds the runs' directories")
    cli.run_plain(main)
