"""The quickstart under every objective of this release, and plain SFT as the control; three seeds each.

    python launch/sweep.py --config configs/sweeps/objectives.py --run && python launch/table.py --runs runs/sweeps/objectives
"""

base = "../quickstart.py"

METHODS = (
    {"objective.name": "dpo", "objective.nll_weight": 0.0},
    {"objective.name": "mdpo", "objective.nll_weight": 0.0},
    {"objective.name": "simpo", "objective.nll_weight": 0.0, "objective.beta": 2.0},
    {"objective.name": "dpo", "objective.nll_weight": 1.0},
    {"objective.name": "dpo", "objective.nll_weight": 0.0, "pairs.per_sentence": True},
    {"objective.name": "sft"},
)


def sweep():
    for method in METHODS:
        for seed in range(3):
            yield method | {"train.seed": seed, "pairs.seed": seed, "eval.before": False, "report.gallery": 0}
