"""Score against KL: what methods make of the same distance from where they start.

Claims: DPO has the highest reward at every KL (Rafailov et al. 2023, arXiv:2305.18290, figure 2).
What limits PPO is its reward model, and at every KL (Gao et al. 2022, arXiv:2210.10760).

What to look for: lines that rise to the right, a point a beta (best-of-n: an n); the higher line is
the better method at that KL. Bars are intervals over seeds. The tables have gold at four KLs, seed
by seed on the straight line in the root of the KL between the two policies next to it, and what
methods have over PPO there. A KL that a method has not on both sides in every seed is left out, and
needs more betas. Best-of-n's KL is at most what is drawn: at that KL it has at least so much, while
gold rises with n. PPO on gold has as many iterations, and the same value network to begin with.

    python experiments/frontier.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

import math

import numpy as np
from common import (
    BEST, DPO_BETAS, GOLD, LATER, PPO_BETAS, against, by_seed, chosen, dpo_at, experiment, gains,
    golds, number, points, policies, ppo_at,
)  # fmt: skip

EVALUATION = "E/frontier-*"
# One more than choose.py tries, so that every seed of both has a KL on either side of 4.
PPO_AT, DPO_AT = (0.00625, *PPO_BETAS), (0.01875, *DPO_BETAS)
SETTINGS = {  # method: {label of a point: policy}; gold's std is some two of a reward model's
    "PPO": {beta: f"E/ppo-{beta}-*" for beta in PPO_AT},
    "DPO": {beta: f"E/dpo-{beta}-*" for beta in DPO_AT},
    "PPO on gold": {b: f"E/gold-{b}-*" for b in (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)},
    "best of n": {n: f"E/sft-*@best_of={n}:E/reward-{BEST}-*" for n in (2, 4, 8, 16, 32)},
}
KLS = 0.5, 1, 2, 4


def runs(seed):
    found = chosen(seed)
    for beta in PPO_AT:
        found |= ppo_at(seed, beta)
    for beta in DPO_AT:
        found |= dpo_at(seed, beta)
    flags = f"{GOLD} --init E/sft-{seed} --reward data/toy.py --seed {seed} {LATER}"
    flags += f" --value_init E/reward-{BEST}-{seed} --value_clip 1"  # gold spreads wider
    for beta in SETTINGS["PPO on gold"]:
        found[f"gold-{beta}-{seed}"] = f"ppo.py {flags} --beta {beta}"
    names = [name for some in SETTINGS.values() for name in some.values()]
    names = [name.replace("*", str(seed)) for name in ["E/chosen-*", *names]]
    return found | {f"frontier-{seed}": against(seed, names)}


def results(lab):
    groups, known, table, pairs = {}, {}, {}, {}
    for method, names in SETTINGS.items():
        found = {label: policies(lab, EVALUATION, name) for label, name in names.items()}
        groups |= {f"{method}:{label}": seeds for label, seeds in found.items()}
        kls = np.array([[number(x["kl"]) for x in seeds] for seeds in found.values()])
        gold = np.array([golds(lab, EVALUATION, name) for name in names.values()])
        known[method] = kls, gold
    for kl in KLS:
        at = {method: at_kl(kl, *found) for method, found in known.items()}
        for method in [method for method in at if at[method] is not None]:
            table[f"{method} at KL {kl}"] = at[method].mean(1).tolist()
            if method != "PPO" and at["PPO"] is not None:
                pairs[f"{method} over PPO at KL {kl}"] = at[method] - at["PPO"]
    by_seed(lab, "frontier_at_kl", table)
    gains(lab, "frontier_gains", pairs)
    for label, name in {"SFT on chosen": "E/chosen-*", "SFT": "E/sft-*"}.items():
        groups[label] = policies(lab, EVALUATION, name)
    title = "Score against KL; labels are beta, or n (whose KL is at most that)"
    points(lab, "frontier", groups, "sqrt_kl", ["gold"], title)


def at_kl(kl, kls, gold):
    """Gold by prompt, (seeds, prompts), at a KL, of policies at kls (policies, seeds) with gold
    (policies, seeds, prompts); None where in a seed the KL is not between two of them."""
    found, roots = [], np.sqrt(kls.clip(min=0))
    for seed, root in enumerate(roots.T):
        order = np.argsort(root)
        after = np.searchsorted(root[order], math.sqrt(kl))
        if not 0 < after < len(order):
            return None
        low, high = order[after - 1 : after + 1]
        share = (math.sqrt(kl) - root[low]) / (root[high] - root[low])
        found.append((1 - share) * gold[low, seed] + share * gold[high, seed])
    return np.array(found)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
