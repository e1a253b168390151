"""The Makefile, with a stand-in for Python that keeps runs as run.py does and computes nothing."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT
from test_experiments import check_flags, configs

SCRIPTS = "sft annotate reward ppo dpo evaluate tokens model run feedback".split()
DATA = "demonstrations demonstrations_validation prompts_train prompts_validation prompts_test "
DATA = (DATA + "rankings rankings_validation").split()
STAGES = "sft feedback feedback_validation reward ppo dpo evaluation".split()

# A folder keeps its settings (the words, and what the files and runs among them hold) and its
# sources; a run of other settings is refused, a finished one left. `log` says what happened.
# Nothing is imported that would take longer than all the rest.
STAND_IN = r"""
import os, sys, zlib
from os.path import exists, isfile
def write(path, text, how="w"):
    with open(path, how) as file:
        file.write(text)
script, *words = sys.argv[1:]
if script == "data/toy.py":
    sys.exit(write("data/toy/bpe.tiktoken", ""))
if words[0] in ("table", "check"):
    sys.exit(print("tables again" if words[0] == "table" else "checked"))
how, out = words.pop(), words.pop()
stage = out.rsplit("/", 1)[1]
named = " ".join(words).translate(dict.fromkeys(map(ord, ",:@="), " ")).split()
inputs = [name + "/model" * (not isfile(name)) for name in named]
settings = str(words + [open(path).read() for path in inputs if isfile(path)])
if how == "--resume":
    if open(f"{out}/args.json").read() != settings:
        sys.exit(2)
    if exists(f"{out}/report.json"):
        sys.exit(write("log", f"{stage} is finished\n", "a"))
else:
    for name in os.listdir(out) if exists(out) else ():
        os.remove(f"{out}/{name}")
    os.makedirs(out, exist_ok=True)
    write(f"{out}/args.json", settings)
    for name in ("script.py", "tokens.py", "model.py", "run.py", "feedback.py"):
        write(f"{out}/{name}", open(script if name == "script.py" else name).read())
if stage == os.environ.get("KILLED"):
    write("log", f"{stage} is killed\n", "a")
    sys.exit(137)
write(f"{out}/rankings.jsonl", "")
write(f"{out}/model", str(zlib.crc32((settings + open(script).read()).encode())))
write(f"{out}/report.json", '{\n  "seconds": 1.5,\n  "policies": {\n    "seconds": 9.0\n  }\n}\n')
write("log", f"{stage} {'goes on' if how == '--resume' else 'is made'}\n", "a")
"""


def run_make(folder, *words, killed=""):
    """-> what happened to which stage, and what make said."""
    (folder / "log").write_text("")
    environment = os.environ | {"MAKEFLAGS": "", "KILLED": killed}
    command = ["make", "--no-print-directory", "VENV=none", "JOBS=1", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert (done.returncode == 0) == (not killed), done.stdout + done.stderr
    lines = (folder / "log").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines], done.stdout


def made(*stages):
    return [(stage, "is made") for stage in stages]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which everything is made; what was said."""
    folder = tmp_path_factory.mktemp("make")
    for path in ["data/toy", "none/bin"]:
        (folder / path).mkdir(parents=True)
    for name in ["data/toy", *SCRIPTS]:
        (folder / f"{name}.py").write_text(f"# {name}\n")
    for name in [
        "requirements.txt",
        "none/installed",
        *(f"data/toy/{name}.jsonl" for name in DATA),
    ]:
        (folder / name).touch()
    (folder / "none/bin/python").write_text(f"#!{os.path.realpath(sys.executable)} -S\n{STAND_IN}")
    (folder / "none/bin/python").chmod(0o755)
    shutil.copyfile(ROOT / "Makefile", folder / "Makefile")
    happened, said = run_make(folder)
    assert happened == made(*STAGES)
    return folder, said


@pytest.fixture
def make(finished, tmp_path):
    """make(*words), in a copy of that folder."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return partial(run_make, tmp_path)


def test_stages_tell_what_they_do_and_how_long(finished, make):
    said = finished[1]
    for stage in STAGES:
        # Before its command.
        assert re.search(
            rf"^runs/{stage}: .*: about \d+ s with data/toy.*\nnone/bin/python ", said, re.M
        )
        assert f"\n{stage} took 1.5 s\n" in said
    assert "tables again" not in said and "a tenth" not in said
    happened, said = make("check")
    assert happened == []
    assert "tables again" in said and "sft took 1.5 s" in said and said.endswith("checked\n")


def test_stages_that_do_not_need_each_other_run_side_by_side(make, tmp_path):
    """Each on one thread; a model of one's own has the machine to itself."""
    shutil.rmtree(tmp_path / "runs")
    happened, said = make("JOBS=2")
    assert sorted(happened) == sorted(made(*STAGES))
    assert said.index("runs/dpo: ") < said.index("runs/ppo: ")  # it does not wait for the reward
    without = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MAKEFLAGS")}
    how = {"cwd": tmp_path, "env": without, "capture_output": True, "text": True}
    for words in ("DATA=mine", "LAUNCH=torchrun"):
        lines = subprocess.run(["make", "-pn", words], **how)
        flags = re.search("^MAKEFLAGS = (.*)$", lines.stdout, re.M)[1]
        assert "-j" not in flags and "OMP_NUM_THREADS = 1" not in lines.stdout


def test_a_change_makes_what_depends_on_it(make, tmp_path):
    assert make("PPO_FLAGS=--beta 0.1")[0] == made("ppo", "evaluation")
    assert make("PPO_FLAGS=--beta 0.1")[0] == []
    assert make()[0] == made("ppo", "evaluation")
    assert make("-n", "DPO_FLAGS=--beta 1")[0] == make()[0] == []  # and -n leaves no trace
    assert make("BEST_OF_N=64")[0] == made("evaluation")
    assert "--best_of_n" not in make("BEST_OF_N=0")[1]
    for script, stages in (("reward", ["reward", "ppo", "evaluation"]), ("run", STAGES)):
        with open(tmp_path / f"{script}.py", "a") as file:
            file.write("# edited\n")
        assert make("BEST_OF_N=0")[0] == made(*stages)


def test_words_that_the_shell_reads(make):
    words = "EVALUATION_FLAGS=--a 'b  \"c\\n' \"d'e\" --f \\#"
    assert make(words)[0] == made("evaluation")
    assert make(words)[0] == []
    assert make(words + "g")[0] == made("evaluation")


def test_a_run_that_was_made_by_hand_is_left(make, tmp_path):
    (tmp_path / "runs/dpo/command").unlink()
    assert make()[0] == [("dpo", "is finished"), ("evaluation", "is made")]
    (tmp_path / "runs/evaluation/command").unlink()
    happened, said = make()
    assert happened == [("evaluation", "is finished")] and "tables again" in said


@pytest.mark.parametrize("beta, then", [(1, "goes on"), (2, "is made")])
def test_an_interrupted_stage_goes_on(make, beta, then):
    assert make("PPO_FLAGS=--beta 1", killed="ppo")[0] == [("ppo", "is killed")]
    assert make(f"PPO_FLAGS=--beta {beta}")[0] == [("ppo", then), ("evaluation", "is made")]


def test_an_interrupted_stage_of_other_code_begins_anew(make, tmp_path):
    make("DPO_FLAGS=--beta 1", killed="dpo")
    (tmp_path / "dpo.py").write_text("# another\n")
    assert make("DPO_FLAGS=--beta 1")[0] == made("dpo", "evaluation")


def test_quick_has_a_folder_of_its_own(make, tmp_path):
    happened, said = make("quick")
    assert happened == made(*STAGES)
    assert "runs/quick/ppo: PPO" in said and said.count("a tenth of that") == len(STAGES)
    ppo = (tmp_path / "runs/quick/ppo/command").read_text()
    assert {"--steps", "runs/quick/reward", "runs/quick/sft"} <= {*ppo.split()}
    assert make()[0] == make("quick")[0] == []


def test_data_of_ones_own(make, tmp_path):
    (tmp_path / "data/toy").rename(tmp_path / "mine")
    assert make("DATA=mine/")[0] == made("sft", "reward", "ppo", "dpo", "evaluation")
    assert (tmp_path / "runs/own/mine/evaluation/report.json").exists()
    (tmp_path / "mine/rankings.jsonl").write_text("other\n")
    assert make("DATA=mine")[0] == made("reward", "ppo", "dpo", "evaluation")
    (tmp_path / "mine/prompts_test.jsonl").write_text("other\n")
    assert make("DATA=mine")[0] == made("evaluation")


@pytest.mark.parametrize("words", [[], ["QUICK=1", "BEST_OF_N=0"], ["QUICK=1", "DATA=mine"]])
def test_the_makefile_gives_flags_that_there_are(words, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in DATA:
        (folder / f"{name}.jsonl").touch()
    words = [word.replace("mine", str(folder)) for word in words]
    command = ["make", "-n", "VENV=none", "RUNS=none/runs", *words, "check"]
    environment = os.environ | {"MAKEFLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    known, scripts = configs(), []
    for line in done.stdout.replace("\\\n", " ").splitlines():
        found = re.match(r"none/bin/python (\w+\.py .*)", line)
        if found and not found[1].startswith("data/"):
            check_flags(found[1], known, monkeypatch)
            scripts.append(found[1].split()[0])
    stages = ["sft", "reward", "ppo", "dpo", "evaluate", "evaluate"]
    stages += ["annotate", "annotate"] if "DATA" not in "".join(words) else []
    assert sorted(scripts) == sorted(f"{stage}.py" for stage in stages)
