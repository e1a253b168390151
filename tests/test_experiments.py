"""experiments/: what is run anew and what is not, statistics against oracles, command lines that
the scripts accept, and every table and figure, from runs that are made up."""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_jsonl

NAMES = sorted(path.stem for path in ROOT.glob("experiments/*.py") if path.stem != "common")


def load(name):
    """An experiment as a module; some have the name of a script."""
    path = ROOT / f"experiments/{name}.py"
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def experiments_can_be_imported():
    sys.path.append(str(ROOT / "experiments"))
    yield
    sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(scope="module")
def common(experiments_can_be_imported):
    import common

    return common


@pytest.fixture
def lab(common, tmp_path):
    (tmp_path / "figures").mkdir()
    return common.Lab(str(tmp_path), (0, 1), 2, False)


# --- statistics -----------------------------------------------------------------------------------


def test_over_seeds(common):
    """Three seeds have 2 degrees of freedom; the interval covers the mean in 95%."""
    values = [0.7, 0.72, 0.77]
    half = 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    mean = np.mean(values)
    assert common.over_seeds(values) == pytest.approx([mean, mean - half, mean + half])
    assert common.over_seeds([[v, 0, 9] for v in values]) == common.over_seeds(values)
    assert common.over_seeds([0.5]) == [0.5, None, None]
    for count in (3, 12):  # in the table of Student's t, and beyond it
        draws = np.random.default_rng(0).normal(size=(4000, count))
        covered = [low <= 0 <= high for _, low, high in map(common.over_seeds, draws)]
        assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_differences_are_paired_by_seed(common):
    groups = {"a": [{"x": 1.0}, {"x": 5.0}], "b": [{"x": [1.5, 1, 2]}, {"x": 5.7}]}
    groups |= {"c": [{"y": 1}, {"y": 2}]}
    table, over = common.columns_of(groups, ["x", "y"])
    half = 12.706 * 0.1  # Student's t for two seeds, 0.5 and 0.7 more
    assert over["b"]["x"] == pytest.approx([0.6, 0.6 - half, 0.6 + half])
    assert table["b"]["x"][0] == pytest.approx(3.6) and over["a"]["x"] == [0, 0, 0]
    assert table["c"] == {"y": pytest.approx([1.5, 1.5 - 6.353, 1.5 + 6.353])} and not over["c"]


def test_least_squares(common):
    """Against numpy's polynomial fit and its covariance."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 5, 30)
    y = 2 - 0.5 * x + rng.normal(0, 0.3, 30)
    found, errors = common.least_squares(np.stack([np.ones(30), x], 1), y)
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    assert found == pytest.approx([intercept, slope])
    assert errors == pytest.approx(np.sqrt(np.diag(covariance))[::-1])
    with pytest.raises(ValueError, match="2 runs do not determine 2"):
        common.least_squares([[1, 2], [1, 3]], [1, 2])
    with pytest.raises(ValueError, match="do not determine"):
        common.least_squares([[1, 2], [1, 2], [1, 2]], [1, 2, 3])


def test_the_laws_of_over_optimisation(common):
    """methods.md C8's numbers."""
    points = list(zip([0.5, 1, 1.5, 2], [0.28, 0.5, 0.66, 0.74], strict=True))
    law = common.gao_law(points, best_of=True)
    assert law == pytest.approx((0.631871, 0.130323), abs=1e-6)
    law = common.gao_law(points, best_of=False)
    assert law == pytest.approx((0.491466, 0.164026), abs=1e-6)
    exact = [(d, d * (0.9 - 0.3 * math.log(d))) for d in (0.3, 1, 2.2, 3)]
    assert common.gao_law(exact, best_of=False) == pytest.approx((0.9, 0.3), abs=1e-9)
    for points in ([(1.0, 0.5), (1.1, 0.6), (1.2, 0.55)], [(1, 2), (3, 4)], []):
        with pytest.raises(ValueError, match="do not tell a from b"):
            common.gao_law(points, best_of=False)


# --- reading runs ---------------------------------------------------------------------------------


def a_run_along_training(folder, lift):
    """A run as ppo.py leaves it, whose gold follows Gao's law with a = 1.5, b = 0.5."""
    lines = [{"step": 0, "eval_kl": -0.01, "eval_gold": 1.0, "eval_proxy": 0.0}]
    for step in (1, 2, 3, 4):
        lines.append({"step": step, "score": 0.5, "kl": 9.0})  # of a rollout: no evaluation
        d = lift * step
        found = {"eval_kl": d**2, "eval_gold": 1 + d * (1.5 - 0.5 * math.log(d))}
        lines += [{"step": step, "eval_proxy": d} | found, {"step": step, "eval_nll": None}]
    folder.mkdir()
    write_jsonl(folder / "metrics.jsonl", lines)


def test_curves(common, lab, tmp_path):
    for seed, lift in [(0, 1.0), (1, 1.2)]:
        a_run_along_training(tmp_path / f"a-{seed}", lift)
        rows = [
            {"n": n, "kl": n - 1.0, "gold": [n, 0, 9], "proxy": [2, 1, 3]} for n in (1, 2, 3, 5)
        ]
        (tmp_path / f"best-{seed}").mkdir()
        (tmp_path / f"best-{seed}/report.json").write_text(json.dumps({"best_of_n": rows}))
    found = common.evaluations(lab, "E/a-*")
    assert [line["step"] for line in found[0]] == [0, 1, 2, 3, 4]
    assert found[0][0]["sqrt_kl"] == 0  # an estimate below 0
    assert found[1][2] == {
        "step": 2,
        "proxy": 2.4,
        "kl": 2.4**2,
        "gold": 1 + 2.4 * (1.5 - 0.5 * math.log(2.4)),
        "sqrt_kl": pytest.approx(2.4),
    }
    found[1].pop()  # a seed that was evaluated at fewer steps
    groups = {"one": found, "best of n": common.best_of_rows(lab, "E/best-*")}
    common.curves(lab, "c", groups, "sqrt_kl", ["proxy", "gold"], "", fit="gold")
    result = json.loads((tmp_path / "figures/c.json").read_text())
    assert result["one"]["steps"] == [0, 1, 2, 3]
    assert [v[0] for v in result["one"]["proxy"]] == pytest.approx([0, 1.1, 2.2, 3.3])
    half = 12.706 * 0.1  # Student's t for two seeds, 0.2 apart
    assert result["one"]["proxy"][1][1:] == pytest.approx([1.1 - half, 1.1 + half])
    law = result["one"]["law"]
    assert law["a"][0] == pytest.approx(1.5) and law["b"][0] == pytest.approx(0.5)
    assert result["best of n"]["gold"] == [[n, n, n] for n in (1, 2, 3, 5)]
    text = (tmp_path / "figures/c.md").read_text()
    assert "one: gold gained = d (a - b log d): a 1.500 [1.500, 1.500], b 0.500" in text
    assert "best of n: gold gained = d (a - b d)" in text
    assert (tmp_path / "figures/c.png").exists() == (
        importlib.util.find_spec("matplotlib") is not None
    )


def test_numbers_of_a_policy(common):
    report = an_evaluation(["sft", "ppo"])
    report["parts_by_task"] = {
        "made_up": {"all": {"sft": {"mean": [0.5, 0, 1]}, "ppo": {"mean": [0.1, 0, 1]}}},
        "harmless": {"harmful": {"sft": {"mean": [0.2, 0, 1]}}, "all": {}},
    }
    report["by_task"]["gold"] = {
        "benign": {
            "ppo": {"score": [2, 1, 3], "over_first": [0.5, 0, 1]},
            "sft": {"score": 1, "over_first": 0},
        }
    }
    found = common.policy_numbers(report, "ppo")
    assert found["made_up"] == [0.1, 0, 1] and "harmful_harmless" not in found
    assert found["benign_gold"] == [2, 1, 3] and found["benign_over"] == [0.5, 0, 1]
    assert found["wins"] == [0.7, 0.6, 0.8] and found["gold"] == [2.0, 1.0, 3.0]
    assert found["sqrt_kl"] == pytest.approx(2**0.5) and found["distinct_2"] == 0.3
    assert common.policy_numbers(report, "sft")["wins"] == 0.5
    report["policies"]["ppo"]["kl"] = None  # a greedy best of n has none
    assert not {"kl", "sqrt_kl"} & set(common.policy_numbers(report, "ppo"))


# --- running commands -----------------------------------------------------------------------------

# Does what scripts do to their folders: keeps its command, settings with the sums of what it read,
# and sources; refuses; fails. Each start is a line of `started`.
STUB = """import hashlib, json, pathlib, shutil, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out_dir") + 1])
with open("started", "a") as file:
    file.write(" ".join(sys.argv) + "\\n")
if "--resume" in words and (out / "refuse").exists():
    sys.exit(2)
out.mkdir(exist_ok=True, parents=True)
inputs = [w for w in words if pathlib.Path(w).is_file()]
sums = {f"sha256 of {w}": hashlib.sha256(open(w, "rb").read()).hexdigest() for w in inputs}
args = {"command": sys.argv, "settings": {"seed": 0} | sums}
(out / "args.json").write_text(json.dumps(args))
for name in ("script.py", "model.py", "run.py", "feedback.py"):
    shutil.copy(sys.argv[0] if name == "script.py" else name, out / name)
if "--fail" in words:
    print("what went wrong")
    sys.exit(1)
time.sleep(float(words[words.index("--sleep") + 1]) if "--sleep" in words else 0)
(out / "lines.jsonl").write_text(" ".join(w for w in words if w[0] != "-") + "\\n")
(out / "report.json").write_text("{}")
"""


@pytest.fixture
def place(common, tmp_path, monkeypatch):
    """A folder with a script of few lines, in which commands run; -> what was started since."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "do.py").write_text(STUB)
    for name in ("model.py", "run.py", "feedback.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "started").touch()

    def started():
        found = (tmp_path / "started").read_text().split("\n")[:-1]
        (tmp_path / "started").write_text("")
        return [(re.search(r"--out_dir E/(\S+)", x)[1], x.rsplit(" ", 1)[1][2:]) for x in found]

    return started


COMMANDS = {
    "last-0": "do.py --data E/part-0.jsonl --judges E/first-0,E/second-0",
    "part-0.jsonl": "head -n 1 E/first-0/lines.jsonl > E/part-0.jsonl",
    "second-0": "do.py --init E/first-0 --sleep 0.3",
    "first-0": "do.py --data data.txt",
}


def test_what_is_run_and_what_is_not(common, place, tmp_path):
    """Each command once, after what it names; then what its code, command or data have changed for,
    and what that changes."""
    (tmp_path / "data.txt").write_text("1")
    lab = common.Lab("E", (0,), 2, False)
    (tmp_path / "E").mkdir()

    def make(**other):
        common.make(lab, COMMANDS | other)
        return place()

    assert make() == [("first-0", "overwrite"), ("second-0", "overwrite"), ("last-0", "overwrite")]
    assert make() == []
    (tmp_path / "E/second-0/report.json").unlink()  # unfinished, as it was begun
    assert make() == [("second-0", "resume")] and make() == []
    (tmp_path / "E/second-0/report.json").unlink()
    (tmp_path / "E/second-0/refuse").touch()  # what can't go on begins anew
    assert make() == [("second-0", "resume"), ("second-0", "overwrite")] and make() == []
    changed = {"second-0": "do.py --init E/first-0 --beta 0.1"}
    assert make(**changed) == [("second-0", "overwrite")]
    (tmp_path / "data.txt").write_text("2")  # other data, of which the part is made too
    assert make(**changed) == [("first-0", "overwrite")]
    (tmp_path / "E/first-0/lines.jsonl").write_text("others\n")
    os.utime(tmp_path / "E/part-0.jsonl", (0, 0))
    assert make(**changed) == [("last-0", "overwrite")]  # another part
    assert (tmp_path / "E/part-0.jsonl").read_text() == "others\n"
    for name in ("run.py", "do.py"):  # other code: everything, in order
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# more\n")
        assert [run for run, _ in make(**changed)] == ["first-0", "second-0", "last-0"]
    assert make(**changed) == []


def test_a_command_that_fails(common, place, tmp_path, capsys):
    """Its last words are said, the others are stopped and begun again, half a file goes."""
    lab = common.Lab("E", (0,), 3, False)
    (tmp_path / "E").mkdir()
    commands = {"slow-0": "do.py --sleep 30", "bad-0": "do.py --fail"}
    with pytest.raises(SystemExit, match="bad-0: exit status 1; all it said"):
        common.make(lab, commands)
    assert "what went wrong" in capsys.readouterr().err
    assert not (tmp_path / "E/slow-0/report.json").exists()
    with pytest.raises(SystemExit, match=r"part\.jsonl: exit status 1"):
        common.make(lab, {"part.jsonl": "head -n 1 E/none > E/part.jsonl"})
    assert not (tmp_path / "E/part.jsonl").exists()


def test_a_launcher_before_the_script(common, place, tmp_path):
    """`experiments/ablations.py ppo.py FLAGS` is kept as the command of ppo.py that it runs."""
    launcher = tmp_path / "experiments/patched.py"
    launcher.parent.mkdir()
    launcher.write_text("import sys; sys.argv.pop(0); exec(open(sys.argv[0]).read())")
    lab = common.Lab("E", (0,), 1, False)
    for expected in ([("top-0", "overwrite")], []):
        common.make(lab, {"top-0": "experiments/patched.py do.py --seed 1"})
        assert place() == expected


def test_a_tenth(common):
    assert common.tenth("ppo.py --steps 30 --beta 0 --eval_every 5") == (
        "ppo.py --steps 3 --beta 0 --eval_every 1 --num_prompts 100"
    )
    assert common.tenth("sft.py --eval_every 0").endswith(
        "--eval_every 0 --epochs 0.1 --num_prompts 100"
    )
    assert common.tenth("head -n 1500 a > b") == "head -n 150 a > b"
    assert common.tenth("rlaif.py agree --seed 1") == "rlaif.py agree --seed 1"


def test_an_experiment_from_its_command_line(tmp_path):
    """tax.py with stubs for all scripts; then again, nothing but the figure."""
    stub = STUB.replace('"{}")', '"{}")\nlog = [{"step": s, "eval_nll": s + 1, "eval_gold": 2, ')
    stub += '"eval_kl": s} for s in range(3)]\n'
    stub += '(out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\\n" for x in log))\n'
    stub += '(out / "rankings.jsonl").write_text("{}\\n" * 3)\n'
    for name in ("sft", "annotate", "reward", "ppo", "model", "run", "feedback"):
        (tmp_path / f"{name}.py").write_text(stub)
    (tmp_path / "data").mkdir()
    task = "import os; os.mkdir('data/toy'); open('data/toy/bpe.tiktoken', 'w')"
    (tmp_path / "data/toy.py").write_text(task)
    (tmp_path / "experiments").mkdir()
    for name in ("tax", "common"):
        shutil.copy(ROOT / f"experiments/{name}.py", tmp_path / "experiments")
    command = [sys.executable, "experiments/tax.py", "--seeds", "1", "--jobs", "2", "--out", "E"]
    for count in (7, 0):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("--out_dir") == count
    assert "| PPO | 1.00 | 1.00 at 0 | 3.00 | 2.00 | 2.00 at 0 | 2.00 |" in done.stdout
    assert (tmp_path / "E/figures/tax.json").exists()
    done = subprocess.run([*command[:3], "x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--seeds x: expected numbers by commas" in done.stderr


# --- the experiments ------------------------------------------------------------------------------


def configs():
    """{script, or script and sub-command: the class of its flags}."""
    import annotate
    import collapse
    import dpo
    import evaluate
    import grpo
    import ppo
    import reward
    import rlaif
    import sft

    found = {"reward.py score": reward.ScoreConfig, "evaluate.py check": evaluate.CheckConfig}
    found |= {f"rlaif.py {name}": getattr(rlaif, f"{name.title()}Config") for name in RLAIF}
    found |= {"evaluate.py table": evaluate.TableConfig}
    for module in (sft, annotate, reward, ppo, grpo, dpo, collapse, evaluate):
        found[f"{module.__name__}.py"] = module.Config
    return found


RLAIF = ("label", "agree", "revise", "direct")


def check_flags(line, known, monkeypatch):
    """Parses a command line as its script does."""
    import run

    words = shlex.split(line)
    script = next(n for n, word in enumerate(words) if f"{word}" in known or word == "rlaif.py")
    words = words[script:]
    command = words[1] if len(words) > 1 and f"{words[0]} {words[1]}" in known else ""
    monkeypatch.setattr(sys, "argv", words)
    try:
        return run.flags(known[f"{words[0]} {command}".strip()], "", command)
    except SystemExit:
        pytest.fail(line)


def test_scripts_accept_all_commands(common, monkeypatch):
    """Also a tenth of them; a name is one run in all experiments; what is named is made."""
    known, every = configs(), {}
    for name in NAMES:
        commands = load(name).runs(7)
        assert len(load(name).__doc__.splitlines()) >= 8
        for run, command in commands.items():
            assert every.setdefault(run, command) == command, run
            for text in (command, common.tenth(command)):
                if not text.startswith(("head", "sed", "data/convert.py")):
                    out = "" if run.endswith(".jsonl") else f" --out_dir E/{run}"
                    check_flags(text + out, known, monkeypatch)
            named = set(re.findall(r"(?<![\w/])E/([\w.+-]+)", command)) - {"cache", run}
            assert named <= set(commands), (run, named - set(commands))
            assert "-7" in run
    assert len(every) > 70
    for script, whole in common.WHOLE.items():
        config = known[script]()
        for flag, value in whole.items():  # 0 is all, there
            assert value == (getattr(config, flag) or value), (script, flag)


def test_the_makefile_gives_flags_that_there_are(monkeypatch):
    environment = os.environ | {"MAKEFLAGS": ""}
    command = ["make", "-n", "VENV=none", "RUNS=none/runs", "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    known, scripts = configs(), []
    for line in done.stdout.replace("\\\n", " ").splitlines():
        found = re.match(r"none/bin/python (\w+\.py .*)", line)
        if found and not found[1].startswith("data/"):
            check_flags(found[1], known, monkeypatch)
            scripts.append(found[1].split()[0])
    stages = "sft annotate annotate reward ppo dpo evaluate evaluate".split()
    assert sorted(scripts) == sorted(f"{stage}.py" for stage in stages)


def an_evaluation(policies, lift=0.0):
    """An evaluation's report: gold 1, 2, ... of the policies in order."""
    first, parts = policies[0], ("harmless", "helpful", "refused", "made_up")
    report = {"policies": {}, "win_rate": {"gold": {}}, "by_task": {"gold": {}}}
    report["parts_by_task"] = {p: {t: {} for t in ("all", "benign", "harmful")} for p in parts}
    report["by_task"]["gold"] = {t: {} for t in ("summary", "benign", "harmful", "open", "closed")}
    names = ["distinct_1", "distinct_2", "entropy_2", "training_seconds"]
    names += ["distinct_2_a_prompt", "entropy_2_a_prompt", "different_a_prompt"]
    for n, name in enumerate(policies, 1):
        value = [n + lift, n - 1.0, n + 1.0]
        report["policies"][name] = {
            "kl": value,
            "entropy": value,
            "tokens": value,
            "kl_is_bound": False,
        }
        report["policies"][name] |= dict.fromkeys(names, 0.3)
        report["policies"][name]["scores"] = {"gold": value, "data/bleu.py": value}
        report["win_rate"]["gold"][name] = {} if name == first else {first: [0.7, 0.6, 0.8]}
        for table in report["by_task"]["gold"].values():
            table[name] = {"score": value, "over_first": value}
        for tasks in report["parts_by_task"].values():
            for table in tasks.values():
                table[name] = {"mean": [0.5, 0.4, 0.6], "over_first": None}
    rows = [{"n": n, "kl": math.log(n), "proxy": [n, n, n]} for n in range(1, 33)]
    report["best_of_n"] = [row | {"gold": row["proxy"], "gold_gain": row["proxy"]} for row in rows]
    return report


def made_up(folder, name, command):
    """What a command leaves that experiments read."""
    words, seed = shlex.split(command), int(name.removesuffix(".jsonl").rsplit("-", 1)[1])
    lift = 0.1 * seed
    if name.endswith(".jsonl"):
        line = {"kind": "open", "scores": [lift, 1.0]}
        write_jsonl(folder / name, [line, line | {"kind": "closed"}])
        return
    (folder / name).mkdir()
    lines = [
        {
            "step": s,
            "eval_kl": s**2 + lift,
            "eval_gold": 3 - s + lift,
            "eval_proxy": s,
            "eval_nll": s,
        }
        for s in range(4)
    ]
    if "evaluate.py" in words:
        policies = words[words.index("--policies") + 1].replace("E/", f"{folder}/").split(",")
        report = an_evaluation(policies, lift)
        line = {"prompt": "p", "reference": "a b c d e", "responses": ["a b c d e"]}
        for number in range(len(policies)):
            write_jsonl(folder / name / f"samples-{number}.jsonl", [line])
    elif "reward.py" in words:
        size = 10**6 * (2 if "small" in name else 3)
        report = {
            "epoch_pairs": int(re.search(r"-(\d+)-\d+$|$", name)[1] or 1000),
            "parameters": size,
        }
        report |= {"ece": 0.1, "bimodality": 0.4, "labels_accuracy": 0.6 + lift}
        report |= {f"gold_{task}accuracy": 0.7 + lift for task in ("", *TASKS)}
        report |= {f"labels_{task}accuracy": 0.6 + lift for task in ("", *TASKS)}
        report |= {f"grade_{g}_accuracy": 0.5 + g / 10 for g in range(4)}
    elif "collapse.py" in words:
        rewards = {"w1": 0.1 + lift}
        for kind in ("open", "closed"):
            rewards |= {kind: [0.9, 0.5, 0.1], f"{kind}_std": [0.1] * 3, f"{kind}_accuracy": 0.8}
            rewards |= {f"{kind}_deviation": 0.1}
        report = {f"{x}_{k}": v for x in ("train", "eval") for k, v in rewards.items()}
        lines = [{"step": s} | report for s in range(3)]
        report |= {"open_optimum": [1.0, 0.5, 0.0], "closed_optimum": [1.0, 1.0, 0.0]}
    else:
        rate = {"all": {"rate": [0.7, 0.6, 0.8]}, "one_order": {"rate": [0.6, 0.5, 0.7]}}
        rate |= {"position_bias": {"same": 0.3}}
        report = {"labels": 100, "judges": {"E/judge": {"base": rate, "base CoT": rate}}}
        report["by_revision"] = {str(n): {"harmless": 0.2 * n} for n in range(5)}
    write_jsonl(folder / name / "metrics.jsonl", lines)
    (folder / name / "report.json").write_text(json.dumps(report))


TASKS = ("summary_", "benign_", "harmful_")


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_figures(name, lab, tmp_path, monkeypatch, capsys):
    """Of every experiment, from runs in two seeds that are made up."""
    module = load(name)
    monkeypatch.chdir(ROOT)
    if name == "collapse":  # its theory is a command of collapse.py's, tested there
        monkeypatch.setattr(module.subprocess, "run", lambda *args, **more: None)
    for seed in lab.seeds:
        for run, command in module.runs(seed).items():
            made_up(tmp_path, run, command)
    module.results(lab)
    said = capsys.readouterr().out
    drawn = {path.stem for path in tmp_path.glob("figures/*.png")}
    if importlib.util.find_spec("matplotlib"):
        assert name in drawn or f"{name}_curve" in drawn
    tables = {path.stem for path in tmp_path.glob("figures/*.md")}
    assert name in tables and f"{name}.json" in {
        path.name for path in tmp_path.glob("figures/*.json")
    }
    assert "nan" not in said
