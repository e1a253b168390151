"""Over-optimisation: what a reward model's score is worth, the longer one goes after it.

Claims: without a KL penalty the reward model's score goes on rising while the true one rises and
falls (Stiennon et al. 2020, arXiv:2009.01325, figure 5). With d the square root of the KL, gold
gains d (a - b d) by best-of-n and d (a - b log d) by RL; more data for the reward model gives a
higher peak, later: a grows, b hardly moves (Gao et al. 2022, arXiv:2210.10760).

What to look for: on the left all lines rise; on the right those of beta 0 fall below where they
began, and those of the default, 0.2, stay where they are best. The second figure is the same
without beta 0. The table has each line's best, its end, and the fitted a and b; thin lines are
seeds, or laws.

    python experiments/overoptimisation.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

from common import LINES, best_of, best_of_rows, curves, evaluations, experiment, free, held


def runs(seed):
    """Reward models from 1,500, 4,000 and 12,000 prompts; against each PPO at beta 0 and 0.2, and
    best-of-n."""
    found = {}
    for lines in LINES:
        found |= free(seed, lines) | held(seed, lines) | best_of(seed, lines)
    return found


def results(lab):
    gone = {f"beta 0, {n} prompts": evaluations(lab, f"E/free-{n}-*") for n in LINES}
    near = {f"beta 0.2, {n} prompts": evaluations(lab, f"E/held-{n}-*") for n in LINES}
    near |= {f"best of n, {n} prompts": best_of_rows(lab, f"E/best-of-{n}-*") for n in LINES}
    how = {"x": "sqrt_kl", "y": ["proxy", "gold"], "fit": "gold"}
    how["y_labels"] = ["reward model's score (std of SFT)", "gold score (points)"]
    title = "Over-optimisation of reward models of three sizes of data"
    curves(lab, "overoptimisation", gone | near, title=title, **how)
    curves(lab, "overoptimisation_near", near, title="The same near the start", **how)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
