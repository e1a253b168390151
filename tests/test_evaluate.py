"""evaluate.py: fits against closed forms, tables and figures of runs."""

import json
import math

import numpy as np
import pytest
from conftest import run_script

import evaluate


def run(monkeypatch, *args):
    return run_script(evaluate, monkeypatch, *args)


def reward_run(folder, name, pairs, parameters, gold, labels, margin="none", seed=0):
    (folder / name).mkdir()
    settings = {"seed": seed, "margin": margin, "out_dir": name}
    (folder / name / "args.json").write_text(json.dumps({"settings": settings}))
    rate = {"model": [gold, None, None]}
    report = {"epoch_pairs": pairs, "parameters": parameters, "gold": {"all": rate}}
    report |= {"labels": {"all": {"model": [labels, None, None]}}, "bimodality": 0.4}
    grades = {str(g): {"rate": [labels + g / 10, None, None], "pairs": 9} for g in range(4)}
    report |= {"by_grade": grades, "calibration": {"ece": 0.01}}
    (folder / name / "report.json").write_text(json.dumps(report))
    return str(folder / name)


def test_least_squares():
    """Against numpy's polynomial fit and its covariance; in simulations the standard errors are
    the estimates' spread."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 5, 30)
    y = 2 - 0.5 * x + rng.normal(0, 0.3, 30)
    found, errors = evaluate.least_squares(np.stack([np.ones(30), x], 1), y)
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    assert found == pytest.approx([intercept, slope])
    assert errors == pytest.approx(np.sqrt(np.diag(covariance))[::-1])
    with pytest.raises(ValueError, match="2 runs do not determine 2"):
        evaluate.least_squares([[1, 2], [1, 3]], [1, 2])
    with pytest.raises(ValueError, match="do not determine"):
        evaluate.least_squares([[1, 2], [1, 2], [1, 2]], [1, 2, 3])


def test_over_seeds():
    """Three seeds have 2 degrees of freedom; the interval covers the mean in 95%."""
    values = [0.7, 0.72, 0.77]
    half = 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    mean = np.mean(values)
    assert evaluate.over_seeds(values) == pytest.approx([mean, mean - half, mean + half])
    assert evaluate.over_seeds([0.5]) == [0.5, None, None]
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    covered = [low <= 0 <= high for _, low, high in map(evaluate.over_seeds, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_scaling(tmp_path, monkeypatch, capsys):
    """Slopes that were put in come out, and the figure is drawn."""
    rng, runs = np.random.default_rng(0), []
    for parameters in (2**18, 2**20, 2**22):
        for pairs in (2**12, 2**14, 2**16):
            for seed in range(3):
                gold = 0.2 + 0.02 * math.log2(pairs) + 0.015 * math.log2(parameters)
                gold += rng.normal(0, 0.002)
                name = f"r{parameters}-{pairs}-{seed}"
                args = (pairs + 10 * seed, parameters, gold, gold - 0.1)
                runs.append(reward_run(tmp_path, name, *args, seed=seed))
    out = tmp_path / "figures/scaling"
    assert run(monkeypatch, "scaling", "--runs", ",".join(runs), "--out", out) == 0
    result = json.loads((tmp_path / "figures/scaling.json").read_text())
    fit = result["fits"]["gold"]
    assert abs(fit["per_doubling_of_data"] - 0.02) < 3 * fit["standard_errors"][1] < 0.002
    assert abs(fit["per_doubling_of_model"] - 0.015) < 3 * fit["standard_errors"][2] < 0.002
    assert len(result["cells"]) == 9 and all(cell["seeds"] == 3 for cell in result["cells"])
    table = (tmp_path / "figures/scaling.md").read_text()
    assert table.count("\n| ") == 9 and "data +2.0" in table and "model +1.5" in table
    printed = capsys.readouterr().out
    drawn = (tmp_path / "figures/scaling.png").exists()
    assert drawn or "matplotlib is not installed" in printed
    assert run(monkeypatch, "scaling", "--runs", ",".join(runs[:3]), "--out", out) == 0
    assert "no slopes: 3 runs do not determine 3" in capsys.readouterr().out


def test_margins(tmp_path, monkeypatch, capsys):
    runs = []
    for i, margin in enumerate(("none", "small", "large")):
        for seed in range(3):
            args = (100, 1000, 0.7 + 0.01 * i, 0.6 + 0.001 * seed)
            runs.append(reward_run(tmp_path, f"{margin}{seed}", *args, margin, seed))
    out = tmp_path / "margins"
    assert run(monkeypatch, "margins", "--runs", ",".join(runs), "--out", out) == 0
    lines = (tmp_path / "margins.md").read_text().splitlines()
    assert len(lines) == 5 and lines[2].startswith("| none | 3 | 0.901 [")
    result = json.loads((tmp_path / "margins.json").read_text())["margins"]
    assert result["large"]["gold, all"] == pytest.approx([0.72, 0.72, 0.72])
    assert result["small"]["labels, mean of grades"][0] == pytest.approx(0.751)


def test_bad_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "sft").mkdir()
    for name in ("args", "report"):
        (tmp_path / f"sft/{name}.json").write_text("{}")
    for args, message in [
        (["scaling", "--runs", tmp_path / "unfinished"], "unfinished: not a finished run"),
        (["margins", "--runs", tmp_path / "sft"], "report.json: not of reward.py"),
        (["scaling"], "--runs: expected run directories"),
        (["plots"], "plots: expected a command: scaling, margins"),
    ]:
        assert run(monkeypatch, *args) == 2
        assert message in capsys.readouterr().err
    assert run(monkeypatch, "--help") == 0 and "scaling" in capsys.readouterr().out
