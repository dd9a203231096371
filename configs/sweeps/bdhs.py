"""BDHS in its variants on the built-in world, with the quickstart's training: how rejected answers come about is all that differs.

    python launch/make_pairs.py --config configs/pairs/swap.py --model mmalign_jax/assets/scenes_sft --data scenes \\
        --config.scenes.align=300 --out runs/edited
    python launch/sweep.py --config configs/sweeps/bdhs.py --run --keep_going --jobs 2
    python launch/table.py --runs runs/sweeps/bdhs

A picture has 16 image tokens: with rho_th = 0.75 four of them stay on average, with the default of 0.99 most masks hide them all.
docs/bdhs.md has the table.
"""

base = "../quickstart.py"

OFFLINE = {"pairs.rho_th": 0.75}
VARIANTS = {
    "offline": {},
    "online": {"pairs.when": "online"},
    "noise": {"pairs.rho_th": 0.0, "pairs.noise_steps": 500},
    "unguided": {"pairs.guided": False},
    "hidden 0.99": {"pairs.rho_th": 0.99},
    "blind": {"pairs.rho_th": 1.0},
    "per sentence": {"pairs.per_sentence": True},
    "union with edited answers": {"pairs.gamma": 0.5, "data.format": "records", "data.path": "runs/edited"},
}


def sweep():
    for seed in range(3):
        for name, variant in VARIANTS.items():
            # all start from the same model: one of them measures it
            own = {"train.seed": seed, "pairs.seed": seed, "report.gallery": 0, "monitor.every": 0, "eval.before": name == "offline" and seed == 0}
            yield OFFLINE | variant | own
