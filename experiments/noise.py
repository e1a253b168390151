"""Wrong labels: how much of the reward DPO keeps under them, and two remedies.

Claim: with a share of labels turned round, robust DPO keeps more of the reward than DPO, and than
conservative DPO (Chowdhury et al. 2024, arXiv:2403.00409).

What to look for: gold with a quarter of the labels turned round, under the three losses, and beside
it the same with labels as they are; what each has over DPO. KL says how far each has gone at the
same beta.

    python experiments/noise.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import GOLD, LATER, against, experiment, gains, golds, policies, rankings, rows

LOSSES = {
    "DPO, labels as they are": ("unflipped", ""),
    "DPO": ("dpo", ""),
    "conservative DPO": ("conservative", "--label_smoothing 0.25"),
    "robust DPO": ("robust", "--loss robust --label_smoothing 0.25"),
}


def runs(seed):
    found = rankings(seed, 4000)
    for name, flip in (("unflipped", ""), ("flipped", "--flip 0.25")):
        files = f"E/rankings-4000-{seed}.jsonl E/{name}-{seed}.jsonl"
        found[f"{name}-{seed}.jsonl"] = f"data/convert.py pairs {files} {flip} --seed {seed}"
    for name, more in LOSSES.values():
        data = f"E/{'unflipped' if name == 'unflipped' else 'flipped'}-{seed}.jsonl"
        flags = f'{GOLD} --init E/sft-{seed} --data {data} --validation "" --cache E/cache'
        found[f"noise-{name}-{seed}"] = f"dpo.py {flags} {LATER} {more} --seed {seed}"
    names = [f"E/noise-{name}-{seed}" for name, _ in LOSSES.values()]
    names += [f"{name}@temperature=0" for name in names]
    return found | {f"noise-{seed}": against(seed, names)}


def results(lab):
    groups, gold = {}, {}
    for label, (name, _) in LOSSES.items():
        gold[label] = golds(lab, "E/noise-*", f"E/noise-{name}-*")
        groups[label] = policies(lab, "E/noise-*", f"E/noise-{name}-*")
        greedy = policies(lab, "E/noise-*", f"E/noise-{name}-*@temperature=0")
        for found, other in zip(groups[label], greedy, strict=True):
            found["greedy_gold"] = other["gold"]
    columns = ["gold", "wins", "kl", "greedy_gold"]
    rows(lab, "noise", groups, columns, "A quarter of the labels turned round")
    others = [label for label in LOSSES if label != "DPO"]
    gains(lab, "noise_gains", {f"{label}, over DPO": gold[label] - gold["DPO"] for label in others})


if __name__ == "__main__":
    experiment(__doc__, runs, results)
