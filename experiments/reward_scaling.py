"""Reward models: does more data help, and does a larger model?

Claim: held-out accuracy rises with each doubling of the data, by about 1.1 points, and of the
model, by about 1.8 (Stiennon et al. 2020, arXiv:2009.01325, figure 6).

What to look for: agreement with gold, and with held-out labels, against the number of comparisons,
a line a size of model. Below the table stand the slopes of a fit to all runs, in points a doubling.

    python experiments/reward_scaling.py [--quick] [--seeds 0,1,2] [--jobs N] [--out FOLDER]
"""

import math

from common import (
    LINES, SFT, experiment, half_of, interval_text, judging, least_squares, markdown, over_seeds,
    pyplot, reports, reward_model, save, write,
)  # fmt: skip

SIZES = {"small": "--n_layer 2 --n_embd 64", "large": "--n_layer 4 --n_embd 192"}
SCALES = "epoch_pairs", "parameters"
JUDGES = {"gold_accuracy": "gold", "labels_accuracy": "held-out labels"}


def runs(seed):
    """All sizes learn the same feedback, and are normalised on the same policy's samples."""
    found = {}
    for size, flags in SIZES.items():
        found[f"sft-{size}-{seed}"] = f"{SFT} {flags} --seed {seed}"
    for lines in LINES:
        found |= reward_model(seed, lines)  # the middle size
        for size in SIZES:
            command = judging(seed, f"E/rankings-{lines}-{seed}.jsonl", f"sft-{size}")
            found[f"reward-{size}-{lines}-{seed}"] = f"{command} --normalise_with E/sft-{seed}"
    return found


def results(lab):
    cells, every, slopes = {}, [], {}
    for size in ("small-", "", "large-"):
        for n in LINES:
            seeds = reports(lab, f"E/reward-{size}{n}-*")
            found = {k: over_seeds([r[k] for r in seeds]) for k in (*JUDGES, *SCALES)}
            cells.setdefault(f"{found['parameters'][0] / 1e6:.2f}M", []).append(found)
            every += seeds
    table = [["parameters", "comparisons", *(f"agreement with {x}" for x in JUDGES.values())]]
    for size, line in cells.items():
        for found in line:
            texts = [interval_text(found[judge], 3) for judge in JUDGES]
            table.append([size, f"{found['epoch_pairs'][0]:.0f}", *texts])
    lines, scales = [*markdown(table), ""], [[1, *(math.log2(r[k]) for k in SCALES)] for r in every]
    for judge, name in JUDGES.items():
        slope, error = least_squares(scales, [report[judge] for report in every])
        slopes[judge] = {"slopes": slope.tolist(), "standard errors": error.tolist()}
        data, model = (f"{100 * slope[i]:+.2f} (error {100 * error[i]:.2f})" for i in (1, 2))
        lines.append(f"Agreement with {name}, points a doubling: data {data}, model {model}.")
    write(lab, "reward_scaling", {"cells": cells, "slopes": slopes}, lines)
    plt = pyplot()
    if plt:
        draw(lab, plt, cells)


def draw(lab, plt, cells):
    figure, panels = plt.subplots(1, len(JUDGES), figsize=(5 * len(JUDGES), 4))
    for panel, (judge, name) in zip(panels, JUDGES.items(), strict=True):
        for n, (size, line) in enumerate(cells.items()):
            x, y = ([found[k][0] for found in line] for k in ("epoch_pairs", judge))
            bars = [half_of(found[judge]) for found in line]
            label = f"{size} parameters"
            panel.errorbar(x, y, bars, marker="osD"[n], capsize=3, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("comparisons trained on")
        panel.set_ylabel(f"agreement with {name}")
        panel.grid(alpha=0.3)
    save(lab, "reward_scaling", figure, "Reward models: data and size", legend=panels[0])


if __name__ == "__main__":
    experiment(__doc__, runs, results)
