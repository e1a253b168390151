"""Figures and tables over several runs. (Head to head, best-of-n and learning curves: to come.)

`scaling` is figure 6 of Stiennon et al. 2020 (arXiv:2009.01325) in small: a reward model's held-out
accuracy against the number of comparisons and the size of the model, with the slopes of

    accuracy = a + b log2(comparisons) + c log2(parameters)

by least squares, and their standard errors. `margins` is table 28 of Llama 2 (arXiv:2307.09288):
accuracy by how much better the better response is, for losses without and with margins.

    python evaluate.py scaling --runs runs/scaling/a,runs/scaling/b --out runs/figures/scaling
    python evaluate.py margins --runs runs/reward,runs/small,runs/large --out runs/figures/margins
"""

import argparse
import dataclasses
import math
import sys
import typing
from pathlib import Path
from typing import Annotated

import numpy as np

from model import read_json, whole_file, write_json

# Student's t for 95% and 1, 2, ... degrees of freedom: a few seeds are all that there are.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    runs: Annotated[str, "finished reward.py runs, by commas"] = ""
    out: Annotated[str, "writes OUT.json, OUT.md and, with matplotlib, OUT.png"] = (
        "runs/figures/reward_scaling"
    )


@dataclasses.dataclass(frozen=True)
class MarginsConfig:
    runs: Annotated[str, "finished reward.py runs, by commas"] = ""
    out: Annotated[str, "writes OUT.json and OUT.md"] = "runs/figures/reward_margins"


# --- from the plumbing of the training scripts (tests/test_copies.py) -----------------------------


def refuse(message):
    """Ends the script for bad input: one line, exit status 2."""
    print(message, file=sys.stderr, flush=True)
    sys.exit(2)


def parse_config(config_class, doc, command=""):
    """`config_class` from the command line; its annotations are the flags' help.

    `command`: the sub-command that stands before the flags; "": the script's main job.
    """
    form = argparse.RawDescriptionHelpFormatter
    name = f"{Path(sys.argv[0]).name} {command}".strip()
    parser = argparse.ArgumentParser(name, None, doc, formatter_class=form, allow_abbrev=False)
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind, text = hints[field.name].__origin__, hints[field.name].__metadata__[0]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        text = f"{text} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **how)
    cfg = config_class(**vars(parser.parse_args(sys.argv[2:] if command else None)))
    for name, value in vars(cfg).items():
        if type(value) in (int, float) and not 0 <= value < math.inf:
            parser.error(f"--{name}: expected a number of at least 0, got {value}")
    dtype = getattr(cfg, "dtype", "")
    if dtype not in ("", "float32", "bfloat16", "float16", "float64"):
        parser.error(f"--dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    return cfg


def split_names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


# --- reading runs ---------------------------------------------------------------------------------


def read_runs(names):
    """[(args, report)] of finished runs of reward.py."""
    runs = []
    for name in split_names(names):
        try:
            args = read_json(Path(name) / "args.json").get("settings", {})
            report = read_json(Path(name) / "report.json")
        except (OSError, ValueError) as error:
            refuse(f"{name}: not a finished run: {error}")
        if "labels" not in report or "epoch_pairs" not in report:
            refuse(f"{name}: report.json: not of reward.py, or without held-out data")
        runs.append((args, report))
    if not runs:
        refuse("--runs: expected run directories, by commas")
    return runs


# --- mathematics ----------------------------------------------------------------------------------


def least_squares(columns, y):
    """y = columns @ coefficients + noise of one variance. -> coefficients, their standard errors.

    columns (n, k), y (n,), n > k. Raises ValueError when the columns do not tell them apart.
    """
    columns, y = np.asarray(columns, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n, k = columns.shape
    if n <= k or np.linalg.matrix_rank(columns) < k:
        raise ValueError(f"{n} runs do not determine {k} coefficients")
    coefficients = np.linalg.lstsq(columns, y, rcond=None)[0]
    variance = ((y - columns @ coefficients) ** 2).sum() / (n - k)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(columns.T @ columns)))
    return coefficients, errors


def over_seeds(values):
    """[mean, low, high] over seeds, by Student's t; a single seed has no interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return [mean, None, None]
    t = STUDENT[len(values) - 2] if len(values) - 2 < len(STUDENT) else 1.96
    half = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def with_interval(value):
    mean, low, high = value
    return f"{mean:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


# --- scaling --------------------------------------------------------------------------------------


def scaling(cfg):
    """evaluate.py scaling."""
    rows = []
    for args, report in read_runs(cfg.runs):
        row = {"parameters": report["parameters"], "pairs": report["epoch_pairs"]}
        row |= {"seed": args.get("seed"), "out_dir": args.get("out_dir")}
        for name in ("labels", "gold"):
            if report.get(name):
                row[name] = report[name]["all"]["model"][0]
        rows.append(row)
    judges = [name for name in ("gold", "labels") if all(name in row for row in rows)]
    cells = {}
    for row in rows:
        # Files of one length have nearly as many pairs: ties and equal responses differ by seed.
        cells.setdefault((row["parameters"], round(math.log2(row["pairs"]) * 2) / 2), []).append(
            row
        )
    result = {"runs": rows, "cells": [], "fits": {}}
    text = ["| parameters | comparisons | seeds | " + " | ".join(judges) + " |"]
    text.append("|---|---|---|" + "---|" * len(judges))
    for (parameters, _), members in sorted(cells.items()):
        pairs = float(np.mean([row["pairs"] for row in members]))
        cell = {"parameters": parameters, "pairs": pairs, "seeds": len(members)}
        cell |= {name: over_seeds([row[name] for row in members]) for name in judges}
        result["cells"].append(cell)
        values = " | ".join(with_interval(cell[name]) for name in judges)
        text.append(f"| {parameters / 1e6:.2f}M | {pairs:.0f} | {len(members)} | {values} |")
    text.append("")
    for name in judges:
        columns = [[1, math.log2(row["pairs"]), math.log2(row["parameters"])] for row in rows]
        try:
            slopes, errors = least_squares(columns, [row[name] for row in rows])
        except ValueError as error:
            text.append(f"{name}: no slopes: {error}")
            continue
        fit = {"intercept": slopes[0], "per_doubling_of_data": slopes[1]}
        fit |= {"per_doubling_of_model": slopes[2], "standard_errors": errors.tolist()}
        result["fits"][name] = {k: v if k[0] == "s" else float(v) for k, v in fit.items()}
        text.append(
            f"Agreement with {name}, points a doubling: data {100 * slopes[1]:+.2f} "
            f"(standard error {100 * errors[1]:.2f}), model {100 * slopes[2]:+.2f} "
            f"({100 * errors[2]:.2f}), over {len(rows)} runs."
        )
    write_tables(cfg.out, result, text)
    draw_scaling(cfg.out, result["cells"], judges)


def draw_scaling(out, cells, judges):
    plt = matplotlib_pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(1, len(judges), figsize=(5 * len(judges), 4), squeeze=False)
    for panel, name in zip(panels[0], judges, strict=True):
        for parameters in sorted({cell["parameters"] for cell in cells}):
            line = [cell for cell in cells if cell["parameters"] == parameters]
            x, y = [cell["pairs"] for cell in line], [cell[name][0] for cell in line]
            half = [cell[name][2] - cell[name][0] if cell[name][2] else 0.0 for cell in line]
            label = f"{parameters / 1e6:.2f}M parameters"
            panel.errorbar(x, y, yerr=half, marker="o", capsize=3, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("comparisons trained on")
        panel.set_ylabel(f"held-out agreement with {name}")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle("Reward models: data and size (mean and 95% interval over seeds)")
    figure.tight_layout()
    save_figure(figure, out)


# --- margins --------------------------------------------------------------------------------------


def margins(cfg):
    """evaluate.py margins."""
    groups = {}
    for args, report in read_runs(cfg.runs):
        groups.setdefault(args.get("margin", "none"), []).append(report)
    grades = sorted({g for members in groups.values() for r in members for g in r["by_grade"]})
    heads = [f"labels, grade {grade}" for grade in reversed(grades)]
    heads += ["labels, mean of grades", "labels, all", "gold, all", "ECE", "bimodality"]
    result, text = {"margins": {}}, ["| margin | seeds | " + " | ".join(heads) + " |"]
    text.append("|---|---|" + "---|" * len(heads))
    for setting, members in groups.items():
        by_grade = [[r["by_grade"][g]["rate"][0] for g in reversed(grades)] for r in members]
        columns = list(zip(*by_grade, strict=True))
        columns += [[float(np.mean(row)) for row in by_grade]]
        columns += [[r["labels"]["all"]["model"][0] for r in members]]
        columns += [[r["gold"]["all"]["model"][0] if r.get("gold") else math.nan for r in members]]
        columns += [[r["calibration"]["ece"] for r in members]]
        columns += [[r["bimodality"] for r in members]]
        values = [over_seeds(column) for column in columns]
        result["margins"][setting] = dict(zip(heads, values, strict=True))
        cells = " | ".join(with_interval(value) for value in values)
        text.append(f"| {setting} | {len(members)} | {cells} |")
    write_tables(cfg.out, result, text)


# --- files ----------------------------------------------------------------------------------------


def write_tables(out, result, text):
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_json(f"{out}.json", result)
    with whole_file(f"{out}.md") as temporary:
        temporary.write_text("\n".join(text) + "\n", "utf-8")
    print("\n".join(text))
    print(f"{out}.md, {out}.json")


def matplotlib_pyplot():
    """matplotlib.pyplot, drawing to files alone; None, and a line that says so, without it."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, out):
    with whole_file(f"{out}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    print(f"{out}.png")


def main():
    commands = {"scaling": (scaling, ScalingConfig), "margins": (margins, MarginsConfig)}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        print("Flags: evaluate.py scaling --help, evaluate.py margins --help")
        return
    if name not in commands:
        refuse(f"{name}: expected a command: {', '.join(commands)}")
    command, config = commands[name]
    command(parse_config(config, __doc__, name))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that can't be written
        sys.exit(f"{error}")
