"""The built-in world under every objective, each at its own defaults: the table of docs/objectives.md.

    python launch/sweep.py --config configs/sweeps/every_objective.py --run && python launch/table.py --runs runs/sweeps/every_objective
"""

from mmalign_jax import losses

base = "../recipes/world.py"

# What a method asks of the rest of a run
METHODS = {
    "adpo": {"model.freeze": ("projector", "decoder")},
    "sentinel": {"pairs.per_sentence": True},
}
SEEDS = (0,)


def sweep():
    for seed in SEEDS:
        for name in losses.names():
            run = {"train.steps": 300, "train.seed": seed, "pairs.seed": seed, "eval.before": False, "report.gallery": 0, "checkpoint.every": 300}
            yield {"objective.name": name} | METHODS.get(name, {}) | run
