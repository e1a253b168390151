"""Score against KL: what methods make of the same distance from where they start.

Claim: DPO has the highest reward at every KL (Rafailov et al. 2023, arXiv:2305.18290, figure 2).

What to look for: lines that rise to the right, a point a beta (best-of-n: an n); the higher line is
the better method at that KL. Bars are intervals over seeds. Best-of-n's KL is at most what is
drawn.

    python experiments/frontier.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import (
    against, best_of, best_of_rows, chosen, dpo_at, experiment, points, policies, ppo_at,
)  # fmt: skip

BETAS = 0, 0.05, 0.1, 0.2, 0.5  # PPO's default is 0.2; 0 is too far off to be drawn
DPO_BETAS = 0.1, 0.3, 1  # DPO's default is 0.3


def runs(seed):
    found = chosen(seed) | best_of(seed)
    for beta in BETAS:
        found |= ppo_at(seed, beta)
    for beta in DPO_BETAS:
        found |= dpo_at(seed, beta)
    names = ["chosen", *(f"ppo-{b}" for b in BETAS), *(f"dpo-{b}" for b in DPO_BETAS)]
    return found | {f"frontier-{seed}": against(seed, [f"E/{name}-{seed}" for name in names])}


def results(lab):
    def of(name):
        return policies(lab, "E/frontier-*", f"E/{name}-*")

    groups = {f"PPO:{beta}": of(f"ppo-{beta}") for beta in BETAS[1:]}
    groups |= {f"DPO:{beta}": of(f"dpo-{beta}") for beta in DPO_BETAS}
    curve = best_of_rows(lab, "E/best-of-12000-*")
    for n in (2, 4, 8, 16):
        groups[f"best of n (KL at most):{n}"] = [rows[n - 1] for rows in curve]
    groups |= {"SFT on chosen": of("chosen"), "SFT": of("sft")}
    title = "Score against KL; labels are beta, or n"
    points(lab, "frontier", groups, "sqrt_kl", ["gold"], title)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
