"""The built-in world under every objective of pairs, each at its own defaults.

    python launch/sweep.py --config configs/sweeps/every_objective.py --run --keep_going --jobs 2
    python launch/table.py --runs runs/sweeps/every_objective

The pairs are made once (`pairs.cache`). docs/objectives.md has the table.
"""

from mmalign_jax import losses

base = "../recipes/world.py"

# What a method asks of the rest of a run
METHODS = {
    "adpo": {"model.freeze": ("projector", "decoder")},
    "reward_model": {"eval.benchmarks": (), "data.holdout": 0.2},
    "sentinel": {"pairs.per_sentence": True},
}
BUDGET = {"train.steps": 200, "train.batch_size": 8, "checkpoint.every": 200, "report.gallery": 0, "pairs.cache": "runs/pairs"}


def sweep():
    for name in losses.names():
        objective = losses.build(name)
        if objective.of_samples or objective.reads != "prefs":
            continue  # it learns from rewards (configs/sweeps/loops.py), or from answers that are not paired
        # all start from the same model: one of them measures it
        yield {"objective.name": name, "eval.before": name == "dpo"} | METHODS.get(name, {}) | BUDGET
