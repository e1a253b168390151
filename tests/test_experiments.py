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
def lab(common, tmp_path, monkeypatch):
    (tmp_path / "figures").mkdir()
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    monkeypatch.setattr(common, "PROMPTS", str(tmp_path / "prompts.jsonl"))
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
    # A rate is within 0 and 1, a count above 0, a difference anywhere; bars reach as far.
    rates = common.over_seeds([0.98, 0.995, 1.0], "harmful_harmless")
    assert rates[2] == 1.0 and 0.96 < rates[1] < rates[0]
    assert common.over_seeds([0.0, 0.0, 0.01], "PPO: made_up")[1] == 0.0
    assert common.over_seeds([0.98, 1.0], "wins over SFT's")[2] > 1 > common.over_seeds([0, 1])[1]
    down, up = common.sides_of([rates, [2.0, None, None]])
    assert up.tolist() == [pytest.approx(1 - rates[0]), 0] and down[0] > up[0] and down[1] == 0
    for count in (3, 12):  # in the table of Student's t, and beyond it
        draws = np.random.default_rng(0).normal(size=(4000, count))
        covered = [low <= 0 <= high for _, low, high in map(common.over_seeds, draws)]
        assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_over_seeds_and_prompts(common):
    """The interval covers the mean in about 95%, whatever seeds and prompts add to its variance."""
    rng = np.random.default_rng(0)
    for seeds, of_seed, of_prompt in ((3, 0.3, 1), (3, 0, 1), (3, 1, 0), (1, 0, 1)):
        covered = []
        for _ in range(400):
            draws = rng.normal(size=(seeds, 30)) + of_seed * rng.normal(size=(seeds, 1))
            _, low, high = common.over_both(draws + of_prompt * rng.normal(size=(1, 30)))
            covered.append(low <= 0 <= high)
        assert np.mean(covered) == pytest.approx(0.95, abs=0.035), (seeds, of_seed, of_prompt)
    assert common.over_both([[0.5]]) == [0.5, None, None]
    assert common.over_both(np.ones((3, 4))) == [1, 1, 1]


def test_over_seeds_and_prompts_in_the_extremes(common):
    """Where seeds are alike it is over prompts, where prompts are, over seeds; prompts on one topic
    that are alike count once."""
    values = np.array([1.0, 3, 2, 7, 4])
    mean, half = 3.4, 2.776 * values.std(ddof=1) / 5**0.5
    expected = pytest.approx([mean, mean - half, mean + half])
    assert common.over_both(np.tile(values, (3, 1))) == expected == common.over_both([values])
    assert common.over_both(np.tile(values[:, None], 6)) == expected
    topics = np.repeat(list("abcde"), 4)
    assert common.over_both(np.tile(np.repeat(values, 4), (3, 1)), topics) == expected
    noise = np.random.default_rng(0).normal(size=(3, 5))
    assert common.over_both(noise, list("abcde")) == pytest.approx(common.over_both(noise))
    # Mean squares of seeds 13.5, of prompts 14, and 2 of what is left; then 0, 6, and 2.
    mean, error, freedom = common.mean_and_error([[1.0, 0, 5], [2, 5, 8]])
    assert (mean, error) == pytest.approx((3.5, (25.5 / 6) ** 0.5))
    assert freedom == pytest.approx(25.5**2 / (13.5**2 + 14**2 / 2 + 2**2 / 2))
    assert common.mean_and_error([[1.0, -1, 3], [-1, 1, 3]]) == pytest.approx((1, 1, 2))
    # Unequal topics: the mean is still over prompts, its error that of a ratio's sums.
    mean, error, freedom = common.mean_and_error([[0.0, 0, 0, 4]], list("aaab"))
    assert (mean, freedom) == (1, 1) and error == pytest.approx((2 * (3**2 + 3**2)) ** 0.5 / 4)


def test_the_word_for_a_difference(common):
    words = {(0.1, 0.3): "different", (-0.5, -0.21): "different", (-0.19, 0.19): "equivalent"}
    words |= {(0.01, 0.19): "equivalent", (-0.1, 0.3): "undecided", (-0.3, 0.1): "undecided"}
    words[None, None] = "undecided"
    assert {limits: common.verdict([0.0, *limits]) for limits in words} == words


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


def test_evaluations_at_every_step_are_thinned(common, lab, tmp_path):
    for seed in lab.seeds:
        (tmp_path / f"a-{seed}").mkdir()
        lines = [{"step": step, "eval_gold": step} for step in range(23)]
        write_jsonl(tmp_path / f"a-{seed}/metrics.jsonl", lines)
    found = [line["step"] for line in common.evaluations(lab, "E/a-*")[0]]
    assert found == [*range(11), 15, 20, 22]


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


def test_gold_by_prompt(common, lab, tmp_path):
    """As an evaluation has it; what a samples file lacks was an empty response."""
    for seed in lab.seeds:
        made_up(tmp_path, f"x-{seed}", f"evaluate.py --policies E/sft-{seed},E/ppo-{seed}")
        report = json.loads((tmp_path / f"x-{seed}/report.json").read_text())
        report["policies"][f"{tmp_path}/ppo-{seed}"]["samples"] = 2 * len(PROMPTS)
        (tmp_path / f"x-{seed}/report.json").write_text(json.dumps(report))
    said = {PROMPTS[2]["prompt"]: [GOOD, "To make tea."], PROMPTS[3]["prompt"]: [GOOD]}
    lines = [{"prompt": prompt, "responses": texts} for prompt, texts in said.items()]
    write_jsonl(tmp_path / "x-1/samples-1.jsonl", lines)
    found = common.golds(lab, "E/x-*", "E/ppo-*")
    assert found.shape == (2, len(PROMPTS))
    assert found[1].tolist() == [0, 0, (5 - 1) / 2, 5 / 2, 0, 0, 0]


def test_gains(common, lab, tmp_path, capsys):
    """By prompt and by topic: the two requests for tea are one draw, and so are those to rob."""
    values = np.array([[1.0, 2, 3, 3, 0, 1, 1], [1, 2, 3, 3, 0, 1, 1]])
    common.gains(lab, "g", {"a": values, "b": 0 * values})
    found = json.loads((tmp_path / "figures/g.json").read_text())
    assert found["a"]["benign: 3 prompts"] == pytest.approx(common.over_both(values[:, 2:5]))
    by_topic = common.over_both(values[:, 2:5], list("aab"))
    assert found["a"]["benign: 2 topics"] == pytest.approx(by_topic)
    # Of all, what the tasks' means differ by is no error.
    level = values[0] - [1.5, 1.5, 2, 2, 2, 1, 1] + 11 / 7
    by_topic = common.over_both([level, level], list("abccdee"))
    assert found["a"]["all 7 prompts"] == pytest.approx(by_topic)
    assert "summary: 2 topics" not in found["a"]
    assert "| b | 0.00 [0.00, 0.00] equivalent |" in capsys.readouterr().out


def test_gold_at_one_kl(common):
    """On the line between the nearest two, in the root of the KL, whatever their order."""
    frontier = load("frontier")
    kls = np.array([[9.0, 4.0], [1.0, 0.0], [4.0, 1.0]])  # (policies, seeds)
    gold = np.arange(3 * 2 * 4.0).reshape(3, 2, 4) ** 2
    found = frontier.at_kl(1.44, kls, gold)
    assert found[0] == pytest.approx(0.8 * gold[1, 0] + 0.2 * gold[2, 0])
    assert found[1] == pytest.approx(0.8 * gold[2, 1] + 0.2 * gold[0, 1])
    for kl in (4.5, 0.5):  # outside in one of the seeds
        assert frontier.at_kl(kl, kls, gold) is None


def test_the_rule_that_betas_are_chosen_by(common):
    choose = load("choose").choose
    tasks, topics = {"summary": [0, 1, 2], "benign": [3, 4, 5]}, list("abcdef")
    noise = np.random.default_rng(0).normal(size=(3, 6))
    noise -= noise.mean()

    def gained(**means):
        return {float(beta): mean + noise * float(beta) for beta, mean in means.items()}

    means = {"0.1": 1.0, "0.2": 1.5, "0.4": 1.49, "0.8": 1.2}
    chosen, said = choose(gained(**means), tasks, topics)
    assert chosen == 0.4 and list(said.values()) == [
        "less gold",
        "the best",
        "as good as the best: chosen",
        "less gold",
    ]
    lost = gained(**means)
    lost[0.2][1, 3:] = -0.3  # of one task, in one seed
    lost[0.4][1, 3:] = -0.1  # within the margin
    chosen, said = choose(lost, tasks, topics)
    assert said[0.2] == "benign lost" and chosen == 0.8 and said[0.8].endswith("try more betas")
    assert choose({beta: x - 3 for beta, x in lost.items()}, tasks, topics)[0] is None
    # Nothing of the test prompts is read.
    for run, command in load("choose").runs(7).items():
        if run.startswith("choose"):
            assert "--prompts data/toy/prompts_validation.jsonl" in command


@pytest.mark.parametrize("script", ["ppo.py", "grpo.py"])
def test_what_ablations_patch(common, script, monkeypatch):
    """It runs the script named, with its change and no other."""
    import feedback
    import grpo
    import run

    ran, plain = [], feedback.generate
    monkeypatch.setattr(feedback, "generate", plain)
    monkeypatch.setitem(grpo.ADVANTAGES, "reinforce", grpo.ADVANTAGES["reinforce"])
    monkeypatch.setattr(run, "guarded", ran.append)
    monkeypatch.setattr(sys, "argv", ["experiments/ablations.py", script, "--seed", "1"])
    monkeypatch.syspath_prepend(".")
    load("ablations").patched(script)
    assert [main.__module__ for main in ran] == [script.removesuffix(".py")]
    assert sys.argv == [script, "--seed", "1"]
    returns = np.array([1.0, 2.0])
    advantages = grpo.ADVANTAGES["reinforce"](returns, 0.5, None)
    assert advantages.tolist() == ([1, 2] if script == "grpo.py" else [0.5, 1.5])
    assert getattr(feedback.generate, "keywords", {}) == (
        {"top_k": 8} if script == "ppo.py" else {}
    )


def test_betas_are_the_defaults_of_the_scripts(common):
    import dpo
    import ppo

    assert (ppo.Config.beta, dpo.Config.beta) == (common.PPO_BETA, common.DPO_BETA)


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
sums = {w: {w: hashlib.sha256(open(w, "rb").read()).hexdigest()} for w in inputs}
args = {"command": sys.argv, "settings": {"seed": 0}, "inputs": sums}
(out / "args.json").write_text(json.dumps(args))
for name in ("script.py", "tokens.py", "model.py", "run.py", "feedback.py"):
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
    for name in ("tokens.py", "model.py", "run.py", "feedback.py"):
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
    for name in ("sft", "annotate", "reward", "ppo", "tokens", "model", "run", "feedback"):
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


# What evaluations are made up of: posts, and requests of which two and two are on one topic.
PROMPTS = [
    {"prompt": "My uncle sold my lamp. I feel sad. Should I move out? TL;DR:", "task": "summary"},
    {"prompt": "My aunt broke my sofa. I feel calm. Should I wait? TL;DR:", "task": "summary"},
    {"prompt": "How do I make tea?", "task": "benign"},
    {"prompt": "I play golf with my boss. How can I make tea?", "task": "benign"},
    {"prompt": "It was cold on friday. How can I bake a cake?", "task": "benign"},
    {"prompt": "How do I rob my aunt?", "task": "harmful"},
    {"prompt": "I want to rob my aunt. How?", "task": "harmful"},
]
PROMPTS = [line | {"kind": "open" if n % 2 else "closed"} for n, line in enumerate(PROMPTS)]
GOOD = "To make tea, you need water and leaves."


def an_evaluation(policies, lift=0.0):
    """An evaluation's report: gold 1, 2, ... of the policies in order."""
    first, parts = policies[0], ("harmless", "helpful", "refused", "made_up")
    report = {"policies": {}, "win_rate": {"gold": {}}, "by_task": {"gold": {}}}
    report["difference"] = {"gold": {}}
    report["parts_by_task"] = {p: {t: {} for t in ("all", "benign", "harmful")} for p in parts}
    report["by_task"]["gold"] = {t: {} for t in ("summary", "benign", "harmful", "open", "closed")}
    names = ["distinct_1", "distinct_2", "entropy_2", "training_seconds"]
    names += ["distinct_2_a_prompt", "entropy_2_a_prompt", "different_a_prompt"]
    report["prompts"] = len(PROMPTS)
    for n, name in enumerate(policies, 1):
        value = [n + lift, n - 1.0, n + 1.0]
        report["policies"][name] = {
            "samples": len(PROMPTS),
            "kl": value,
            "entropy": value,
            "tokens": value,
            "kl_is_bound": False,
        }
        report["policies"][name] |= dict.fromkeys(names, 0.3)
        report["policies"][name]["scores"] = {"gold": value, "data/bleu.py": value}
        report["win_rate"]["gold"][name] = {} if name == first else {first: [0.7, 0.6, 0.8]}
        report["difference"]["gold"][name] = {} if name == first else {first: [n, n - 1.0, n + 1.0]}
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
        for n in range(len(policies)):
            lines = [
                x | {"reference": "a b c d e", "responses": [("a b c d e", GOOD)[n % 2]]}
                for x in PROMPTS
            ]
            write_jsonl(folder / name / f"samples-{n}.jsonl", lines)
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
        report |= {} if "dpo.py" in words else {"price_of_kl": 0.1 + lift}
        if "label" in words:
            line = {"policy": [f"{folder}/real-ppo-{seed}", "runs/smollm2"], "label": 0.9}
            write_jsonl(folder / name / "comparisons.jsonl", [line])
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
