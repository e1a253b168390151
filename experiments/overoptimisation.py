"""Over-optimisation: what a reward model's score is worth, the longer one goes after it.

Claims: without a KL penalty the reward model's score goes on rising while the true one rises and
falls (Stiennon et al. 2020, arXiv:2009.01325, figure 5). With d the square root of the KL, gold
gains d (a - b d) by best-of-n and d (a - b log d) by RL; more data for the reward model gives a
higher peak, later: a grows, b hardly moves (Gao et al. 2022, arXiv:2210.10760).

What to look for: on the left all lines rise; on the right those of beta 0 fall below where they
began, and those of the default beta stay where they are best. The second figure is the same without
beta 0. The table has each line's best, its end, and the fitted a and b; thin lines are seeds, or
laws. The second has where each seed's best is, evaluated at each of the first 10 iterations, then
at every fifth, and what a nat costs in raw score, which at one beta differs by reward model.

    python experiments/overoptimisation.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

import numpy as np
from common import (
    LINES, PPO_BETA, best_of, best_of_rows, by_seed, curves, evaluations, experiment, free, held,
    number, prices,
)  # fmt: skip


def runs(seed):
    """Reward models from 1,500, 4,000 and 12,000 prompts; against each PPO without a KL
    penalty and as by default, and best-of-n."""
    found = {}
    for lines in LINES:
        found |= free(seed, lines) | held(seed, lines) | best_of(seed, lines)
    return found


def results(lab):
    gone = {f"beta 0, {n} prompts": evaluations(lab, f"E/free-{n}-*") for n in LINES}
    near = {f"beta {PPO_BETA}, {n} prompts": evaluations(lab, f"E/held-{n}-*") for n in LINES}
    near |= {f"best of n, {n} prompts": best_of_rows(lab, f"E/best-of-{n}-*") for n in LINES}
    how = {"x": "sqrt_kl", "y": ["proxy", "gold"], "fit": "gold"}
    how["y_labels"] = ["reward model's score (std of SFT)", "gold score (points)"]
    title = "Over-optimisation of reward models of three sizes of data"
    curves(lab, "overoptimisation", gone | near, title=title, **how)
    curves(lab, "overoptimisation_near", near, title="The same near the start", **how)
    table, (few, *_, many) = {}, LINES
    for (label, seeds), n in zip(gone.items(), LINES, strict=True):
        best = [max(lines, key=lambda line: number(line["gold"])) for lines in seeds]
        for column in ("step", "kl", "gold"):
            table[f"{label}, at its best: {column}"] = [line[column] for line in best]
        table[f"beta {PPO_BETA}, {n} prompts: price of KL"] = prices(lab, f"E/held-{n}-*")
    higher = f"best gold, {many} prompts over {few}"
    ends = (table[f"beta 0, {n} prompts, at its best: gold"] for n in (many, few))
    table[higher] = np.subtract(*ends).tolist()
    by_seed(lab, "overoptimisation_best", table, 3, differences=[higher])


if __name__ == "__main__":
    experiment(__doc__, runs, results)
