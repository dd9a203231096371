"""The built-in world's model, trained on answers of its own: reinforcement learning, online and mixed pairs.

    python launch/sweep.py --config configs/sweeps/loops.py --run --keep_going
    python launch/table.py --runs runs/sweeps/loops
"""

base = "../recipes/world_rewards.py"
GROUPS = ("grpo", "dapo", "rloo")
SHARED = {"report.gallery": 0, "checkpoint.every": 50, "monitor.every": 0}


def sweep():
    for seed in range(3):
        own = SHARED | {"train.seed": seed, "samples.seed": seed, "eval.before": False}
        for name in GROUPS:
            # all start from the same model: one of them measures it
            yield {"objective.name": name, **own, "eval.before": name == "grpo" and seed == 0}
        yield {"objective.name": "ppo", "train.updates": 4, "optimizer.score_head_learning_rate": 1e-3, **own}
        yield {"objective.name": "dpo", **own}
        yield {"objective.name": "dpo", "samples.offline_share": 0.5, "samples.offline_pairs": "bdhs", **own}
        yield {"objective.name": "dpo", "rounds.count": 3, "pairs.when": "offline", **own}
