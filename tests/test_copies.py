"""Copies don't drift, files can be copied out, and README's index of equations is true."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_script
from mutations import MUTATIONS, mutated

SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if path.name != "model.py"]
BEGIN = "# --- plumbing: the same text in every script (tests/test_copies.py) ---\n"
END = "# --- end of plumbing ---\n"
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {"numpy", "torch", "tiktoken", "safetensors", "matplotlib"}


def functions(path):
    """{name: source} of a file's top-level functions."""
    text = path.read_text()
    return {
        node.name: ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


def test_the_plumbing_is_the_same_text():
    blocks = {}
    for path in SCRIPTS:
        text = path.read_text()
        if BEGIN in text:
            assert text.count(BEGIN) == text.count(END) == 1
            blocks[path.name] = text[text.index(BEGIN) : text.index(END)]
    assert "sft.py" in blocks and len(set(blocks.values())) == 1


def test_functions_of_one_name_are_the_same_text():
    seen = {}
    for path in [ROOT / "model.py", *SCRIPTS, *sorted((ROOT / "data").glob("*.py"))]:
        for name, source in functions(path).items():
            if name not in ("main", "score", "explain"):  # what rewards of one's own define
                assert seen.setdefault(name, (path.name, source))[1] == source, (
                    f"{name} differs in {seen[name][0]} and {path.name}"
                )


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_scripts_import_model_and_nothing_else_of_ours():
    for path in SCRIPTS:
        assert set(imports(path)) <= STANDARD | ALLOWED | {"model"}, path.name
    assert set(imports(ROOT / "model.py")) <= STANDARD | ALLOWED
    for path in (ROOT / "data").glob("*.py"):
        assert set(imports(path)) <= STANDARD | {"numpy"}, path.name


def test_nothing_is_pickled():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        found = re.findall(
            r"torch\.(?:save|load)\(|pickle\.|(?<!\.)\beval\(|\bexec\(", path.read_text()
        )
        assert found == [], path.name


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_a_script_runs_elsewhere_with_model_alone(script, tmp_path, toy_data):
    """Copied into an empty folder with model.py, a script shows its help; sft.py trains."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (script, "model.py"):
        shutil.copy(ROOT / name, elsewhere)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    commands = [["--help"]]
    if script == "sft.py":
        lines = (toy_data / "demonstrations.jsonl").read_text().splitlines(keepends=True)
        (elsewhere / "mine.jsonl").write_text("".join(lines[:20]))
        shutil.copy(toy_data / "bpe.tiktoken", elsewhere)
        flags = "--data mine.jsonl --validation mine.jsonl --prompts= --tokenizer bpe.tiktoken"
        commands.append([*flags.split(), *"--n_embd 16 --n_layer 1 --steps 2".split()])
    for flags in commands:
        command = [sys.executable, script, *flags]
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    if script == "sft.py":
        assert (elsewhere / "runs/sft/report.json").exists()


def test_readme_points_from_equations_to_their_lines():
    """Rows of README's index, `| ... | `file.py:123` | `the line` |`: that line is there."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\|.*\| `([\w/]+\.py):(\d+)` \| `(.*)` \|$", text, re.M)
    assert len(rows) >= 10
    for name, number, code in rows:
        line = (ROOT / name).read_text().splitlines()[int(number) - 1]
        assert code in line, f"README says {name}:{number} is {code!r}; it is {line.strip()!r}"


def test_readme_names_real_files_and_flags(monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    help_of = {}
    for line in re.findall(r"(?:python|torchrun)[^\n`]*?(\w+\.py)((?:[^\n`\\]|\\\n)*)", text):
        script, flags = line
        if not (ROOT / script).exists():
            continue
        command = re.findall(r"^ ([a-z]+)\b", flags)  # a sub-command, or none
        if (script, *command) not in help_of:
            module = importlib.import_module(script.removesuffix(".py"))
            assert run_script(module, monkeypatch, *command, "--help") == 0
            help_of[script, *command] = capsys.readouterr().out
        for flag in re.findall(r"(--\w+)", flags):
            assert flag in help_of[script, *command], f"README gives {script} {flag}"


def test_planted_bugs_still_fit_the_sources():
    """tests/mutations.py rewrites text that stands in its file exactly once."""
    for script, mutations in MUTATIONS.items():
        assert len({name for name, *_ in mutations}) == len(mutations), script
        for mutation in mutations:
            assert mutated(*mutation)


def test_readme_names_the_tests_of_faults():
    """Each line of "What survives what" ends in the names of tests that there are."""
    text = (ROOT / "README.md").read_text()
    rows = text[text.index("## What survives what") :].split("\n## ")[0].splitlines()
    rows = [row for row in rows if row.startswith("| ") and "`test_" in row]
    known = {name for path in ROOT.glob("tests/test_*.py") for name in functions(path)}
    assert len(rows) == 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1])
        assert named and set(named) <= known, row
