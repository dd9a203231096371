"""Objectives against their papers' formulas, written down once more with numpy in float64, on random and on extreme pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax import losses
from mmalign_jax.losses import BranchStats

SLOTS = 6


def pairs(rows: int = 300) -> dict[str, np.ndarray]:
    """Pairs of unequal length; in the last third log-probs are so far apart that links saturate, or both answers are the same."""
    rng = np.random.default_rng(0)
    d = {}
    spread = np.where(np.arange(rows) < 200, 1.0, 300.0)[:, None]
    for side in "wl":
        d[f"n_{side}"] = rng.integers(1, SLOTS + 1, size=rows)
        inside = np.arange(SLOTS) < d[f"n_{side}"][:, None]
        d[f"changed_{side}"] = inside & (rng.random(inside.shape) < 0.4)
        for who in ("lp", "ref"):
            d[f"{who}_{side}_t"] = np.where(inside, -(rng.exponential(1.0, size=inside.shape) + 1e-3) * spread, 0.0)
        d[f"collision_{side}"] = -rng.exponential(2.0, size=rows)
        d[f"kl_{side}"] = rng.exponential(3.0, size=rows)
    for key in ("n", "changed", "lp", "ref"):
        own, theirs = (f"{key}_w", f"{key}_l") if key in ("n", "changed") else (f"{key}_w_t", f"{key}_l_t")
        d[theirs][-5:] = d[own][-5:]
    for side in "wl":
        for who in ("lp", "ref"):
            d[f"{who}_{side}"] = d[f"{who}_{side}_t"].sum(-1)
    for name in ("other", "null_w", "null_l", "mismatched", "self"):
        d[f"lp_{name}"], d[f"ref_{name}"] = -rng.exponential(5.0, size=(2, rows))
    d["margin"] = rng.normal(size=rows) * 2
    d["aux"] = rng.exponential(size=rows)
    return d


D = pairs()
W, L = D["lp_w"] - D["ref_w"], D["lp_l"] - D["ref_l"]  # s_w, s_l
GAP = W - L
AVG_W, AVG_L = D["lp_w"] / D["n_w"], D["lp_l"] / D["n_l"]
REF_AVG_W, REF_AVG_L = D["ref_w"] / D["n_w"], D["ref_l"] / D["n_l"]
NLL = -AVG_W


def ls(x):
    return -np.logaddexp(0.0, -x)


def sig(x):
    return np.exp(ls(x))


def exp80(x):
    return np.exp(np.minimum(x, 80.0))


def aot(upper, lower):
    return -ls(0.01 * (np.sort(upper) - np.sort(lower)))


def bco(beta):
    baseline = np.mean(beta * np.concatenate([W, L]))
    return -ls(beta * W - baseline) - ls(-(beta * L - baseline))


def kto():
    z = max(0.0, np.mean(D["lp_mismatched"] - D["ref_mismatched"]))
    return 1 - sig(0.1 * (W - z)) + 1 - sig(0.1 * (z - L))


def log_odds(a):
    return a - np.log(-np.expm1(a))


def weighted(changed, mean):
    def score(side):
        weight = (np.arange(SLOTS) < D[f"n_{side}"][:, None]) * np.where(D[f"changed_{side}"], changed, 1.0)
        total = ((D[f"lp_{side}_t"] - D[f"ref_{side}_t"]) * weight).sum(-1)
        return total / weight.sum(-1) if mean else total

    return score("w") - score("l")


def length_desensitized(alpha):
    public = np.minimum(D["n_w"], D["n_l"])[:, None]
    weight = np.where(np.arange(SLOTS) < public, 1.0, alpha)
    return ((D["lp_w_t"] - D["ref_w_t"] - D["lp_l_t"] + D["ref_l_t"]) * weight).sum(-1)


def exo(h, eps):
    return sig(h) * (ls(h) - np.log(1 - eps)) + sig(-h) * (ls(-h) - np.log(eps))


def discopop(h, tau):
    c = sig(h / tau)
    return -(1 - c) * ls(h) + np.exp(ls(h / tau) - h)


def wpo(cap):
    weight = np.exp((D["lp_w"] - D["collision_w"]) / D["n_w"] + (D["lp_l"] - D["collision_l"]) / D["n_l"])
    return (np.minimum(weight, 1) if cap else weight) * -ls(0.01 * GAP)


def guided(g):
    own = lambda side: (1 + g) * D[f"lp_{side}"] - g * D[f"lp_null_{side}"] - D[f"ref_{side}"]  # noqa: E731
    return own("w") - own("l")


def alpha_reward(mean, alpha=0.25):
    return (1 - exp80(-alpha * mean)) / alpha


OTHER, SELF = D["lp_other"] - D["ref_other"], D["lp_self"] - D["ref_self"]
DPO = -ls(0.1 * GAP)
KL_GAP = D["kl_l"] - D["kl_w"]
CASES = [
    ("dpo", {}, DPO),
    ("dpo", {"label_smoothing": 0.2}, -0.8 * ls(0.1 * GAP) - 0.2 * ls(-0.1 * GAP)),
    ("dpo", {"nll_weight": 0.7}, DPO + 0.7 * NLL),
    ("robust", {}, (-0.9 * ls(0.1 * GAP) + 0.1 * ls(-0.1 * GAP)) / 0.8),
    ("hinge", {}, np.maximum(0, 1 - 0.1 * GAP)),
    ("ipo", {}, (W / D["n_w"] - L / D["n_l"] - 1 / 0.2) ** 2),
    ("ipo", {"length_normalized": False, "beta": 0.3}, (GAP - 1 / 0.6) ** 2),
    ("exo_pair", {}, exo(0.1 * GAP, 1e-3)),
    ("nca_pair", {}, -ls(0.01 * W) - 0.5 * ls(-0.01 * W) - 0.5 * ls(-0.01 * L)),
    ("bco_pair", {}, bco(0.01)),
    ("sppo_hard", {}, (W - 500) ** 2 + (L + 500) ** 2),
    ("aot", {}, aot(D["lp_w"] - D["lp_l"], D["ref_w"] - D["ref_l"])),
    ("aot_unpaired", {}, aot(W, L)),
    ("apo_zero", {}, 1 - sig(0.1 * W) + sig(0.1 * L)),
    ("apo_down", {}, sig(0.1 * W) + 1 - sig(0.1 * GAP)),
    ("discopop", {}, discopop(0.05 * GAP, 0.05)),
    ("discopop", {"tau": 1.0}, discopop(0.05 * GAP, 1.0)),
    ("sigmoid_norm", {}, -ls(5 * (W / D["n_w"] - L / D["n_l"]))),
    ("f_dpo", {}, -ls(0.1 * (ls(W) - ls(L)))),
    ("f_dpo", {"divergence": "forward_kl"}, -ls(0.1 * (-exp80(-W) + exp80(-L)))),
    ("f_dpo", {"divergence": "alpha", "alpha": 0.3}, -ls(0.1 * (exp80(-0.7 * W) - exp80(-0.7 * L)) / -0.7)),
    ("wpo", {}, wpo(True)),
    ("wpo", {"capped": False}, wpo(False)),
    ("ld_dpo", {}, -ls(0.1 * length_desensitized(0.5))),
    ("ld_dpo", {"alpha": 0.0}, -ls(0.1 * length_desensitized(0.0))),
    ("ld_dpo", {"alpha": 1.0}, DPO),
    ("dpop", {}, -ls(0.1 * (GAP - 5 * np.maximum(0, -W)))),
    ("r_dpo", {}, -ls(0.1 * GAP + 0.01 * (D["n_w"] - D["n_l"]))),
    ("tdpo", {}, -ls(0.1 * (GAP - 0.5 * KL_GAP))),
    ("simpo", {}, -ls(2 * (AVG_W - AVG_L) - 0.5)),
    ("alpha_po", {}, -ls(2.5 * (alpha_reward(AVG_W) - alpha_reward(AVG_L)) - 0.1)),
    ("cpo", {}, -ls(0.1 * (D["lp_w"] - D["lp_l"])) + NLL),
    ("slic", {}, np.maximum(0, 1 - (D["lp_w"] - D["lp_l"])) + 0.1 * NLL),
    ("orpo", {}, NLL - 0.1 * ls(log_odds(AVG_W) - log_odds(AVG_L))),
    ("kto", {}, kto()),
    ("mpo", {}, 0.8 * DPO + 0.2 * bco(0.1) + NLL),
    ("mdpo", {"delta": 0.2}, DPO - ls(0.1 * (W - OTHER)) - ls(0.1 * W - 0.2)),
    ("image_dpo", {}, -ls(0.1 * (W - OTHER))),
    ("opa_dpo", {}, DPO - 0.2 * ls(0.1 * (W - OTHER)) - ls(0.1 * W)),
    ("povid", {}, 0.5 * DPO - 0.5 * ls(0.1 * (W - SELF))),
    ("stic", {}, DPO - D["lp_w"] / 1024),
    ("ha_dpo", {}, DPO + 0.5 * D["aux"]),
    ("sft", {}, NLL),
    ("sft", {"length_norm": 64.0}, -D["lp_w"] / 64),
    ("ddpo", {}, -ls(0.5 * weighted(5.0, True))),
    ("ddpo_released", {}, -ls(0.1 * weighted(1.1, False))),
    ("mm_dpo", {}, -ls(0.1 * (1 + 0.5 * (1 - np.exp(-0.5 * np.maximum(D["margin"], 0)))) * GAP)),
    ("v_dpo", {"guidance": 0.0}, DPO),
    ("v_dpo", {}, -ls(0.1 * guided(0.5))),
    ("v_dpo", {"bias_weight": 0.5}, -ls(0.1 * guided(0.5)) - 0.5 * ls(0.1 * (W - D["lp_null_w"] + D["ref_null_w"]))),
    ("chip", {}, -ls(0.1 * (GAP - 0.1 * KL_GAP)) - ls(0.1 * (W - OTHER)) - ls(0.1 * weighted(4.0, False))),
]


def statistics() -> BranchStats:
    sides = {"w": "chosen", "l": "rejected"}
    whose = {"lp": "policy", "ref": "reference"}
    both = [(who, side, f"{whose[who]}_{sides[side]}") for who in whose for side in sides]
    return BranchStats.pair(
        *(jnp.array(D[key], jnp.float64) for key in ("lp_w", "lp_l", "n_w", "n_l", "ref_w", "ref_l")),
        **{f"{name}_tokens": jnp.array(D[f"{who}_{side}_t"]) for who, side, name in both},
        **{f"{name}_no_image": jnp.array(D[f"{who}_null_{side}"]) for who, side, name in both},
        **{f"{sides[side]}_{what}": jnp.array(D[f"{what}_{side}"]) for side in sides for what in ("changed", "collision", "kl")},
        **{f"{whose[who]}_chosen_other_image": jnp.array(D[f"{who}_other"]) for who in whose},
        **{f"{whose[who]}_{what}": jnp.array(D[f"{who}_{key}"]) for who in whose for what, key in (("mismatched",) * 2, ("self_rejected", "self"))},
        margin=jnp.array(D["margin"]),
        auxiliary_nll=jnp.array(D["aux"]),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "expected"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_equals_the_paper_s_formula(name, settings, expected):
    assert np.isfinite(expected).all()
    with jax.enable_x64(True):
        loss, _ = losses.build(name, **settings)(statistics())
    assert loss.dtype == np.float64
    np.testing.assert_allclose(loss, expected, rtol=1e-9, atol=1e-12)
