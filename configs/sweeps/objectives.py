"""The quickstart under every objective of this release, and plain SFT as the control; three seeds each.

    python launch/sweep.py --config configs/sweeps/objectives.py --run && python launch/table.py --runs runs/sweeps/objectives
"""

base = "../recipes/world.py"

METHODS = (
    {"objective.name": "dpo"},
    {"objective.name": "mdpo"},
    {"objective.name": "simpo"},
    {"objective.name": "dpo", "objective.nll_weight": 1.0},
    {"objective.name": "dpo", "pairs.per_sentence": True},
    {"objective.name": "sft"},
)


def sweep():
    for method in METHODS:
        for seed in range(3):
            yield method | {"train.seed": seed, "pairs.seed": seed, "eval.before": False, "report.gallery": 0}
