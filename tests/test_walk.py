"""README's walk with one's own data, followed word for word, on a thousand lines of HH-RLHF."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_lines, run_script

import ppo
import reward
import sft

# In the place of GPT-2, of its settings and of hours: a tiny model, one step.
TINY = {
    sft: "--steps 1 --batch_size 4 --max_new_tokens 8 --num_prompts 2 --micro_batch_size 0",
    reward: "--steps 1 --batch_size 2 --max_new_tokens 8 --num_prompts 8",
    ppo: "--steps 1 --batch_size 8 --minibatch_size 8 --max_new_tokens 8 --num_prompts 2",
}


def commands(begin):
    """README's commands on own data that begin so."""
    text = (ROOT / "README.md").read_text().split("## Your own data and models")[1]
    text = re.sub(r"\\\n\s*", "", text.split("\n## ")[0])
    return re.findall(rf"^    ({begin}.*)$", text, re.M)


@pytest.fixture(scope="module")
def walk(shared, tmp_path_factory):
    """A folder in which README's conversion was done, and what it printed."""
    here = tmp_path_factory.mktemp("walk")
    convert, check = commands("python data/convert.py")
    source = here / convert.split()[3]
    source.parent.mkdir(parents=True)
    shutil.copy(next((shared / "data").glob("hh-rlhf*")), source)
    printed = []
    for command in (convert, check):
        words = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}/data"
        command = command.replace("python data", words)
        done = subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return here, printed


def test_make_finds_what_was_written(walk):
    """All files whose names the Makefile has, good, and no prompt on two sides of the split."""
    here, (converted, checked) = walk
    assert "read 1000, wrote 997 to mine, dropped 3" in converted
    makefile, (make,) = (ROOT / "Makefile").read_text(), commands("make")
    assert " DATA=mine " in make
    for name in re.findall(r"(\w+)=", make):
        assert f"$({name})" in makefile or name == "nproc_per_node", name
    names = {path.name for path in (here / "mine").iterdir()}
    wanted = set(re.findall(r"\$\(DATA\)/(\w+\.jsonl)", makefile))
    assert len(wanted) == 7 and names - wanted == {
        "demonstrations_test.jsonl",
        "rankings_test.jsonl",
    }
    prompts = {}
    for name in names:
        side = re.search("train|validation|test|$", name)[0] or "train"
        prompts.setdefault(side, {})[name] = {x["prompt"] for x in read_lines(here / "mine" / name)}
        kind = name.split("_")[0].removesuffix(".jsonl").replace("rankings", "comparisons")
        assert re.search(rf"^mine/{name}: {kind}, \d+ lines, all good$", checked, re.M)
    for some in prompts.values():
        assert len(set(map(frozenset, some.values()))) == 1
    sides = {side: set.union(*some.values()) for side, some in prompts.items()}
    assert len(set.union(*sides.values())) == sum(map(len, sides.values())) == 997
    assert all(30 < len(sides[side]) < 70 for side in ("validation", "test"))


def test_the_stages_run_on_it(walk, policy_run, monkeypatch):
    here, _ = walk
    shutil.copytree(policy_run, here / "gpt2")
    found = commands("torchrun")
    assert len(found) == len(TINY)
    for script, command in zip(TINY, found, strict=True):
        command = re.sub(r" (mine|runs|gpt2)/", rf" {here}/\1/", command)
        name, *words = shlex.split(command)[2:]
        assert name == f"{script.__name__}.py"
        flags = [*words, *TINY[script].split(), "--device", "cpu"]
        assert run_script(script, monkeypatch, *flags) == 0
        assert Path(words[words.index("--out_dir") + 1], "report.json").exists()
