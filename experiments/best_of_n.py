"""Best of n: the simplest policy that a reward model makes.

Claim: the best of n samples by a reward model rivals policies that were trained, at a KL of at most
log n - (n - 1)/n (Nakano et al. 2021, WebGPT, arXiv:2112.09332; Stiennon et al. 2020,
arXiv:2009.01325).

What to look for: the score (left) rises by construction; gold (right) rises with it as long as the
reward model is right, and bends before the score does.

    python experiments/best_of_n.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import GOLD, best_of_rows, by_seed, curves, experiment, reward_model


def runs(seed):
    flags = f"{GOLD} --policies E/sft-{seed} --proxy E/reward-12000-{seed} --num_samples 1"
    command = f"evaluate.py {flags} --best_of_n 16 --seed {seed}"
    return reward_model(seed) | {f"best-of-n-{seed}": command}


def results(lab):
    found = best_of_rows(lab, "E/best-of-n-*")
    table = {}
    for n in (1, 2, 4, 8, 16):
        table[f"gold, best of {n}"] = [rows[n - 1]["gold"] for rows in found]
    for n in (2, 4, 8, 16):
        table[f"gold over n = 1, best of {n}"] = [rows[n - 1]["gold_gain"] for rows in found]
    by_seed(lab, "best_of_n", table)
    title = "Best of n by a reward model, which scores SFT's samples with mean 0 and std 1"
    curves(lab, "best_of_n_curve", {"best of n": found}, "n", ["proxy", "gold"], title)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
