"""The alignment tax: what a policy forgets of its demonstrations, and what PPO-ptx keeps.

Claim: RLHF forgets what was learnt before; mixing the likelihood of those data into PPO (PPO-ptx)
keeps it, at nearly the same reward (Ouyang et al. 2022, InstructGPT, arXiv:2203.02155, figure 29).

What to look for: on the left the loss on held-out demonstrations rises under PPO, most without a KL
penalty, and stays low under PPO-ptx; on the right, what gold that costs. The word below the table
says whether it costs any.

    python experiments/tax.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import ALONG, curves, evaluations, experiment, free, held, start

PTX = "--ptx_coef 1 --ptx_data data/toy/demonstrations.jsonl"


def runs(seed):
    ptx = {f"ptx-{seed}": f"ppo.py {start(seed)} {ALONG} {PTX}"}
    return held(seed) | free(seed) | ptx


def results(lab):
    names = {"PPO": "held-12000", "PPO, no KL": "free-12000", "PPO-ptx": "ptx"}
    groups = {label: evaluations(lab, f"E/{name}-*") for label, name in names.items()}
    curves(lab, "tax", groups, "step", ["nll", "gold"], "What the policy forgets", over="PPO")


if __name__ == "__main__":
    experiment(__doc__, runs, results)
