"""Diversity: does RLHF narrow what a policy says?

Claim: RLHF narrows what a policy says, to a prompt and over prompts, and more than SFT does (Kirk
et al. 2023, arXiv:2310.06452).

What to look for: all measures fall from SFT downwards. "To a prompt" is over the four responses to
one; the others are over all responses, and compare policies with equally many. Entropy in the
second figure is that of a response by the policy's own probabilities.

    python experiments/diversity.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import BEST, DPO_BETA, against, chosen, dpo_at, experiment, held, policies, rows

METHODS = {"SFT": "sft", "SFT on chosen": "chosen", "PPO": f"held-{BEST}"}
METHODS |= {"DPO": f"dpo-{DPO_BETA}"}
BEST_OF = "E/sft-*@best_of=4:E/reward-12000-*"


def runs(seed):
    names = [f"E/{name}-{seed}" for name in list(METHODS.values())[1:]]
    names.append(BEST_OF.replace("*", str(seed)))
    flags = "--num_prompts 500 --num_samples 4 --best_of_samples 4 --bootstrap 200"
    found = chosen(seed) | held(seed) | dpo_at(seed, DPO_BETA)
    return found | {f"diversity-{seed}": against(seed, names, flags)}


def results(lab):
    groups = {x: policies(lab, "E/diversity-*", f"E/{name}-*") for x, name in METHODS.items()}
    columns = ["entropy", "kl", "gold"]
    rows(lab, "entropy", groups, columns, "Entropy of a response", differences=False)
    groups["best of 4"] = policies(lab, "E/diversity-*", BEST_OF)
    columns = ["distinct_2_a_prompt", "different_a_prompt", "entropy_2_a_prompt"]
    columns += ["distinct_1", "distinct_2", "entropy_2"]
    title = "Diversity at temperature 1: of four responses to a prompt, and of all"
    rows(lab, "diversity", groups, columns, title, differences=False)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
