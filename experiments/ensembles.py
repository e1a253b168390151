"""Ensembles of reward models against over-optimisation.

Claim: the mean of several reward models, and more so their least, lessens over-optimisation, most
of all where labels are noisy (Coste et al. 2023, arXiv:2310.02743).

What to look for: without a KL penalty, and with a quarter of the labels turned round, gold falls
while the score rises; the claim is that it falls less, and later, under the mean or the least of
four. The least of four scores less by nature. The second figure is against iterations.

    python experiments/ensembles.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import ALONG, GOLD, curves, evaluations, experiment, judging, rankings

MEMBERS = 0, 1, 2, 3


def runs(seed):
    flip = "--flip 0.25"  # of a pair to each of 4,000 prompts
    files = f"E/rankings-4000-{seed}.jsonl E/flipped-{seed}.jsonl"
    found = rankings(seed, 4000)
    found[f"flipped-{seed}.jsonl"] = f"data/convert.py pairs {files} {flip} --seed {seed}"
    for m in MEMBERS:  # a seed is the head's, and the order's; the last --seed counts
        command = judging(seed, f"E/flipped-{seed}.jsonl")
        found[f"member-{m}-{seed}"] = f"{command} --seed {10 * seed + m}"
    members = [f"E/member-{m}-{seed}" for m in MEMBERS]
    for name, rewards, more in (
        ("single", members[:1], ""),
        ("mean", members, "--combine mean"),
        ("min", members, "--combine min"),
    ):
        flags = f"{GOLD} --init E/sft-{seed} --reward {','.join(rewards)} {more} --seed {seed}"
        found[f"{name}-{seed}"] = f"ppo.py {flags} {ALONG} --beta 0 --steps 40"
    return found


def results(lab):
    names = {"one reward model": "single", "mean of four": "mean", "least of four": "min"}
    groups = {label: evaluations(lab, f"E/{name}-*") for label, name in names.items()}
    title = "No KL penalty, a quarter of the labels turned round"
    how = {"y": ["proxy", "gold"], "over": "one reward model"}
    curves(lab, "ensembles", groups, "sqrt_kl", title=title, **how)
    curves(lab, "ensembles_steps", groups, "step", ["proxy", "gold", "kl"], title)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
