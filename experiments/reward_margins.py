"""Margins in the reward model's loss, by how much better people found a response.

Claim: a margin that grows with the grade of a comparison raises accuracy where the grade is high,
and large margins cost it where it is low (Touvron et al. 2023, Llama 2, arXiv:2307.09288, table
28).

What to look for: accuracy on labels by grade, of three margins, and what the margin costs: the
calibration error, and bimodality, whether scores part into two heaps.

    python experiments/reward_margins.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import experiment, judging, reports, reward_model, rows

MARGINS = {"none": "reward-12000", "small": "margin-small", "large": "margin-large"}
GRADES = "negligibly better", "slightly better", "better", "significantly better"


def runs(seed):
    """Margins by grade: small is 0, 1/3, 2/3, 1; large 0, 1, 2, 3."""
    found = reward_model(seed)
    for margin in ("small", "large"):
        command = judging(seed, f"E/rankings-12000-{seed}.jsonl")
        found[f"margin-{margin}-{seed}"] = f"{command} --margin {margin}"
    return found


def results(lab):
    names = {f"grade_{g}_accuracy": GRADES[g] for g in (3, 2, 1, 0)}
    names |= {"labels_accuracy": "all labels", "gold_accuracy": "agreement with gold"}
    names |= {"ece": "calibration error", "bimodality": "bimodality"}
    groups = {}
    for margin, name in MARGINS.items():
        groups[f"margin {margin}"] = [
            {names[k]: report[k] for k in names if k in report}
            for report in reports(lab, f"E/{name}-*")
        ]
    title = "Accuracy on labels by grade, and on gold, under three margins"
    rows(lab, "reward_margins", groups, list(names.values()), title, differences=False)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
