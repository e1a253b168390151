"""Reward collapse: the same rewards for every prompt, whatever was asked.

Claim: a reward model that learns rankings of n responses until it interpolates them gives all
prompts the same rewards by rank, those that maximise the sum of U(r_i - r_j) over the pairs; a
utility U for each kind of prompt prevents it (Song et al. 2023, arXiv:2305.17608).

What to look for: with one utility the curves of open- and closed-ended prompts lie on each other
and on the crosses of the theory (first row); W1, the distance between the kinds, falls as accuracy
rises (third and fourth). By kind (last column) one is a line, the other a step. Held out, where
nothing is interpolated, rewards stay between. A table of its own has the theory, for n = 8, 50 and
1,000.

    python experiments/collapse.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

import subprocess
import sys

import numpy as np
from common import evaluations, experiment, feedback, pyplot, reports, rows, save

UTILITIES = "inverse_power", "log", "linear", "log_sigmoid:0.25"
RUNS = {
    f"collapse-{u.replace(':', '_')}": f"--open_utility {u} --closed_utility {u}" for u in UTILITIES
}
RUNS |= {
    "prompt_aware": "",  # inverse_power where many answers are good, linear where few
    "smoothed": "--closed_utility inverse_power --label_smoothing 0.1",
    "noisy": "--closed_utility inverse_power --label_noise 0.25",
}
DRAWN = [*list(RUNS)[:3], "prompt_aware"]
PANELS = "reward at the end (mean, std)", "mean reward of each rank", "W1, the kinds", "accuracy"
# Of the kinds' lines: colour, dashes, and markers, which are hollow and of two sizes.
KINDS = {"open": ("k", "--", "o", 5), "closed": ("0.6", "-", "s", 9)}


def runs(seed):
    start = f"collapse.py --init E/sft-{seed} --seed {seed}"
    return feedback(seed) | {f"{name}-{seed}": f"{start} {more}" for name, more in RUNS.items()}


def results(lab):
    optimum = ["collapse.py", "optimum", "--out", f"{lab.out}/figures/optimal_rewards"]
    subprocess.run([sys.executable, *optimum], check=True)
    groups = {}
    for name in RUNS:
        logs = [evaluations(lab, f"E/{name}-*", x) for x in ("train_", "eval_")]
        found = zip(reports(lab, f"E/{name}-*"), *logs, strict=True)
        groups[name.removeprefix("collapse-")] = [numbers(*seed) for seed in found]
    columns = list(groups["log"][0])
    rows(lab, "collapse", groups, columns, "Reward collapse, by utility", differences=False)
    plt = pyplot()
    if plt:
        size = (3.6 * len(DRAWN), 10)
        figure, panels = plt.subplots(4, len(DRAWN), figsize=size, sharey="row")
        for column, name in zip(panels.T, DRAWN, strict=True):
            draw(lab, column, name)
        for panel, text in zip(panels[:, 0], PANELS, strict=True):
            panel.set_ylabel(text, fontsize=9)
        title = "Reward collapse; training prompts, and dotted: held out"
        save(lab, "collapse_utilities", figure, title, legend=panels[0][0])


def numbers(report, train, held_out):
    """{column: number} of a run at its end, and early: where held-out accuracy is best."""
    for line in (*train, *held_out):
        line["accuracy"] = float(np.mean([line[f"{kind}_accuracy"] for kind in KINDS]))
    early = max(held_out, key=lambda line: line["accuracy"])
    gap = np.subtract(report["open_optimum"], report["closed_optimum"])
    return {
        "W1": train[-1]["w1"],
        "theory's W1": float(np.abs(gap).mean()),
        "deviation, at most": max(train[-1][f"{kind}_deviation"] for kind in KINDS),
        "accuracy": train[-1]["accuracy"],
        "held out: W1": held_out[-1]["w1"],
        "held out: accuracy": held_out[-1]["accuracy"],
        "early: step": early["step"],
        "early: W1": next(line["w1"] for line in train if line["step"] == early["step"]),
        "early: held out: accuracy": early["accuracy"],
    }


def draw(lab, column, name):
    """A column of panels: a run's rewards at the end, and what they were along it."""
    report = reports(lab, f"E/{name}-*")[0]
    logs = {x: evaluations(lab, f"E/{name}-*", f"{x}_")[0] for x in ("train", "eval")}
    steps = [line["step"] for line in logs["train"]]
    ranks = range(1, len(report["open_optimum"]) + 1)
    for kind, (colour, dash, marker, size) in KINDS.items():
        look = {"color": colour, "marker": marker, "markersize": size, "fillstyle": "none"}
        ends = report[f"train_{kind}"], report[f"train_{kind}_std"]
        column[0].errorbar(ranks, *ends, capsize=2, linestyle=dash, label=kind, **look)
        column[0].plot(ranks, report[f"{kind}_optimum"], "kx", markersize=4)
        column[0].plot(ranks, report[f"eval_{kind}"], ":", color=colour)
        column[1].plot(steps, [line[kind] for line in logs["train"]], dash, color=colour)
    for x, style in (("train", "-"), ("eval", ":")):
        column[2].plot(steps, [line["w1"] for line in logs[x]], style, color="k")
        for kind, (colour, *_) in KINDS.items():
            accuracy = [line[f"{kind}_accuracy"] for line in logs[x]]
            column[3].plot(steps, accuracy, style, color=colour)
    for panel in column:
        panel.set_xlabel("step" if panel is not column[0] else "rank (x: optimum)", fontsize=8)
        panel.grid(alpha=0.3)
    column[0].set_title(name.removeprefix("collapse-").replace("_", " "), fontsize=10)


if __name__ == "__main__":
    experiment(__doc__, runs, results)
