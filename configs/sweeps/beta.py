"""DPO's tie to the reference, from loose to tight, with three seeds each."""

base = "../quickstart.py"


def sweep():
    for beta in (0.03, 0.1, 0.3):
        for seed in (0, 1, 2):
            yield {"objective.name": "dpo", "objective.beta": beta, "train.seed": seed}
