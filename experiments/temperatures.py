"""Win rate against sampling temperature: who depends on being sampled greedily?

Claim: DPO keeps its win rate at temperatures at which PPO loses its own (Rafailov et al. 2023,
arXiv:2305.18290, figure 2 on the right).

What to look for: all lines fall to the right; the claim is that DPO's falls less than PPO's: in
gold, what it keeps more from temperature 0 to 1 stands in a table. Each policy is judged against
SFT sampled at temperature 1.

    python experiments/temperatures.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import (
    BEST, DPO_BETA, against, chosen, dpo_at, experiment, gains, golds, held, points, policies,
)  # fmt: skip

TEMPERATURES = 0, 0.25, 0.5, 0.75, 1
METHODS = {"SFT": "sft", "SFT on chosen": "chosen", "PPO": f"held-{BEST}"}
METHODS |= {"DPO": f"dpo-{DPO_BETA}"}
BEST_OF = "E/sft-*@temperature={}@best_of=4:E/reward-12000-*"  # greedy samples are all the same


def runs(seed):
    names = []
    for t in TEMPERATURES:
        names += [f"E/{name}-{seed}@temperature={t}" for name in METHODS.values()]
        names += [BEST_OF.format(t).replace("*", str(seed))] if t else []
    flags = "--num_prompts 500 --num_samples 1 --bootstrap 200"
    found = chosen(seed) | held(seed) | dpo_at(seed, DPO_BETA)
    return found | {f"temperatures-{seed}": against(seed, names, flags)}


def results(lab):
    groups = {}
    for t in TEMPERATURES:
        for label, name in METHODS.items():
            policy = f"E/{name}-*@temperature={t}"
            groups[f"{label}:{t}"] = policies(lab, "E/temperatures-*", policy)
    for t in TEMPERATURES[1:]:
        groups[f"best of 4:{t}"] = policies(lab, "E/temperatures-*", BEST_OF.format(t))
    title = "Against SFT sampled at temperature 1"
    points(lab, "temperatures", groups, "label", ["wins", "gold"], title, "sampling temperature")

    def lost(method):
        cold, warm = (f"E/{METHODS[method]}-*@temperature={t}" for t in (0, 1))
        return golds(lab, "E/temperatures-*", cold) - golds(lab, "E/temperatures-*", warm)

    gains(lab, "temperatures_gains", {"DPO keeps more than PPO": lost("PPO") - lost("DPO")})


if __name__ == "__main__":
    experiment(__doc__, runs, results)
