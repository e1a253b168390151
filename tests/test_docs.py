"""README and docs/ name what there is: files, links, commands, flags, equations, tests, sizes."""

import ast
import importlib.util
import re
import sys
from functools import cache
from itertools import dropwhile

import pytest
from conftest import ROOT, rl_flags, run_script

PAGES = [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ["", "data/", "experiments/", "tests/"]
NOT_OURS = "script.py", "mine.py", "runs/", "data/toy/"  # begin so: made later, or the reader's
TORCHRUN = {
    "nproc_per_node",
    "max-restarts",
    "standalone",
    "nnodes",
    "rdzv_backend",
    "rdzv_id",
    "rdzv_endpoint",
}
SCRIPT = re.compile(r"(?!.*pretend\.py).*\.py")  # not what runs another one
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands_of(text):
    """(script, the words that follow it) of all commands in a page."""
    for command in re.findall(r"(?:python|torchrun) ([^\n`#;]*)", re.sub(r"\\\n", "", text)):
        words = [*dropwhile(lambda word: not SCRIPT.fullmatch(word), command.split())]
        if words:
            yield words[0], words[1:]


@cache
def classes_of(path):
    """{class: (bases, its annotated fields)} of a source."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
            found[node.name] = [base.id for base in node.bases if hasattr(base, "id")], fields
    return found


@cache
def configs_of(path):
    """{sub-command, "" being none: its Config} of a script, by its calls `flags(Config, doc,
    command)` and its tables {command: (Config, ...)}."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        pairs = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "flags":
            pairs = [(node.args[2] if len(node.args) > 2 else ast.Constant(""), node.args[0])]
        elif isinstance(node, ast.Dict):
            pairs = list(zip(node.keys, node.values, strict=True))
        for key, value in pairs:
            names = [n.id for n in ast.walk(value) if isinstance(n, ast.Name)]
            if isinstance(key, ast.Constant) and [n for n in names if n.endswith("Config")]:
                found[key.value] = next(n for n in names if n.endswith("Config"))
    return found


@cache
def parsed_flags(path):
    """Flags of a script that has argparse alone."""
    return set(re.findall(r'add_argument\(\s*"--([\w-]+)"', path.read_text()))


def flags_of(script, command=""):
    """Names of the flags that a script has, after a sub-command."""
    path = ROOT / script
    if script.startswith("experiments/"):
        path = ROOT / "experiments/common.py"
    if parsed_flags(path):
        return parsed_flags(path)
    classes = {}
    for source in (ROOT / "run.py", ROOT / "feedback.py", path):
        classes |= classes_of(source)
    names, fields = [configs_of(path)[command]], set()
    while names:
        bases, own = classes[names.pop()]
        names += bases
        fields |= own
    return fields


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def slugs(text):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "code", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in slugs(path.read_text()), target


@pages
def test_files_that_are_named_are_there(page):
    for name in re.findall(r"`([\w./-]+\.(?:py|md|json|txt)|[\w/-]+/)`", page.read_text()):
        ours = name.endswith((".py", ".md")) or name.split("/")[0] in ("data", "docs", "tests")
        if ours and not name.startswith(NOT_OURS):
            known = [name] if "/" in name.rstrip("/") else [folder + name for folder in FOLDERS]
            assert any((ROOT / path).exists() for path in known), name


@pages
def test_commands_name_real_scripts_and_flags(page):
    for script, words in commands_of(page.read_text()):
        assert (ROOT / script).exists() or "NAME" in script, script
        command = ""
        if "/" not in script and script != "model.py":
            command = words[0] if words and not words[0].startswith("--") else ""
            assert command in configs_of(ROOT / script), f"{script} {command}"
        for flag in re.findall(r"(?<!\S)--(?:no-)?([\w-]+)", " ".join(words)):
            known = flags_of(script, command) | {"help"}
            assert flag in known, f"{script} {command} --{flag}"


@pages
def test_flags_named_alone_are_some_script_s(page):
    known = {"help"} | TORCHRUN
    for path in [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]:
        known |= parsed_flags(path).union(*(fields for _, fields in classes_of(path).values()))
    for flag in re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]*)", page.read_text()):
        assert flag in known, flag


@pages
def test_make_has_the_targets_that_are_named(page):
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"(?:^    |`)(?:\w+=\S+ )*make\b([^`\n#]*)", page.read_text(), re.M):
        for word in re.sub(r'"[^"]*"', "", line).split():
            if re.fullmatch(r"[a-z][a-z-]*", word):
                assert re.search(rf"^{word}[^=\n]*:", makefile, re.M), f"make {word}"


@cache
def functions_of(path):
    """{name, of a class's methods Class.name: source}."""
    text, found = path.read_text(), {}
    lines = text.splitlines()
    for node in ast.parse(text).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in inner:
            if isinstance(function, ast.FunctionDef):
                source = lines[function.lineno - 1 : function.end_lineno]
                found[prefix + function.name] = "\n".join(source)
    return found


def test_equations_stand_where_the_table_says():
    text = (ROOT / "docs/equations.md").read_text()
    rows = re.findall(r"\| \[`([\w/]+\.py)`\]\(.*?\) \| `([\w.]+)` \| `(.*)` \|$", text, re.M)
    assert len(rows) >= 61 and len(rows) == len(text.split("|---|\n")[1].splitlines())
    for name, function, code in rows:
        source = functions_of(ROOT / name).get(function, "")
        assert code in source, f"{name}: {function}: {code}"


def test_each_fault_has_its_test():
    """Each line of "What survives what" ends in the names of tests that there are."""
    text = (ROOT / "docs/faults.md").read_text().split("## What survives what")[1]
    rows = [row for row in text.split("\n## ")[0].splitlines() if "`test_" in row]
    known = {name for path in ROOT.glob("tests/test_*.py") for name in functions_of(path)}
    assert len(rows) >= 20
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1]))
        assert named and named <= known, named - known


def test_readme_says_how_long_the_files_are():
    """To a twentieth, so that it need not follow every edit."""
    rows = re.findall(
        r"^\| \[`([\w/]+\.py)`\]\(.*?\) \| ([\d,]+) \|", (ROOT / "README.md").read_text(), re.M
    )
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    for name, lines in rows:
        count = len((ROOT / name).read_text().splitlines())
        assert abs(int(lines.replace(",", "")) - count) <= count / 20, f"{name}: {count} lines"


def fenced(page, language):
    """The blocks of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def test_extending_works_as_it_is_written(policy_run, rl_data, tmp_path, monkeypatch):
    """The estimator is put into grpo.py as shown, which then trains by it; the snippets run in
    order, and print what they say."""
    page, source = ROOT / "docs/extending.md", (ROOT / "grpo.py").read_text()
    for hunk in fenced(page, "diff"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] == " ")
        assert source.count(before) == 1
        source = source.replace(before, "".join(line[1:] for line in lines))
    (tmp_path / "grpo.py").write_text(source)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/sft").symlink_to(policy_run)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("grpo", tmp_path / "grpo.py")
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "grpo", changed)
    spec.loader.exec_module(changed)

    names, printed = {}, 0
    for snippet in fenced(page, "python"):
        exec(snippet, names)
        for value, numbers in re.findall(r"^print\((.*)\)  # ([-\d., ]+)$", snippet, re.M):
            expected = [float(number) for number in numbers.split(",")]
            assert eval(value, names).flatten().tolist() == pytest.approx(expected)
            printed += 1
    assert printed == 3
    tokens, logprobs = names["tokens"], names["logprobs"]
    whole = names["model"](tokens).log_softmax(-1)
    inside = [len(names["prompt"]) + n for n in range(len(names["response"]))]
    expected = [whole[0, t - 1, tokens[0, t]].item() for t in inside]
    assert logprobs[0, inside].tolist() == pytest.approx(expected, abs=1e-5)
    assert logprobs.sum().item() == pytest.approx(sum(expected), abs=1e-4)

    few = ["--batch_size", 6, "--num_samples", 3, "--steps", 1, "--eval_every", 0]
    flags = rl_flags(rl_data, tmp_path / "run", "--advantage", "median", *few)
    assert run_script(changed, monkeypatch, *flags) == 0
    assert (tmp_path / "run/report.json").exists()
