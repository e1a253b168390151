"""Readers of every kind of file, and of a judge's answers, are given damaged input made by rules:
each is read or refused in one line that a user can act on; never a traceback, a hang, a flood.

`make test` tries some hundreds of each, `make test-faults` 20,000 and more in all and 60 through
the command line. FAULTS_SEED (0) draws them; an input that fails is printed.
"""

import contextlib
import gzip
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys

import convert
import pytest
from conftest import ROOT, read_lines

import collapse
import dpo
import evaluate
import feedback
import model
import rlaif
from tokens import load_tokenizer

SEED = int(os.environ.get("FAULTS_SEED", 0))
HANG_S, FLOOD_BYTES = 10, 2 * 2**30
REFUSED = (ValueError, OSError)  # what model.py's readers raise


# --- what is read ---------------------------------------------------------------------------------

PROMPT, OTHER = "How do I fix a bike?", "My cousin sold my lamp. I feel sad. TL;DR:"
RANKING = {"prompt": PROMPT, "responses": [" Oil it.", " No.", " Buy tools."], "scores": [3, 1, 1]}
LINES = {
    "demonstrations": {"prompt": PROMPT, "response": " Oil it.", "task": "benign"},
    "comparisons": {"prompt": OTHER, "chosen": " Yes.", "rejected": " No.", "margin": 1.5}
    | {"label": 0.8, "policy": ["runs/sft", "runs/dpo"]},
    "rankings": RANKING | {"kind": "open", "annotator": "a"},
    "samples": {"prompt": OTHER, "responses": [" He sold it.", " No."], "policy": "runs/sft"},
    "prompts": {"prompt": PROMPT, "reference": " Oil it.", "unsafe": False, "task": "benign"},
}


def silent(*_):
    pass


def lines_readers(tokenizer):
    """{name: (kind of line, function of a path that reads it all)}."""
    names = {"runs/sft", "runs/dpo"}
    return {
        "demonstrations": (
            "demonstrations",
            lambda path: feedback.read_demonstrations(path, tokenizer, 64, "drop", silent),
        ),
        "prompts": ("prompts", lambda path: feedback.read_prompts(path, tokenizer, 64, silent)),
        "prompts with references": (
            "prompts",
            lambda path: feedback.read_prompts(path, tokenizer, 64, silent, reference=str),
        ),
        "comparisons": (
            "comparisons",
            lambda path: feedback.read_examples(path, tokenizer, 64, "cut", silent),
        ),
        "rankings": (
            "rankings",
            lambda path: feedback.read_examples(path, tokenizer, 64, "drop", silent),
        ),
        "preferences": ("rankings", lambda path: list(feedback.read_preferences(path))),
        "rlaif samples": ("samples", lambda path: rlaif.read_samples([path], 0)),
        "rlaif two samples": ("samples", lambda path: rlaif.read_samples([path, path], 0)),
        "collapse rankings": (
            "rankings",
            lambda path: collapse.read_rankings(path, tokenizer, 64, False, 2),
        ),
        "evaluate comparisons": ("comparisons", lambda path: evaluate.read_labelled(path, names)),
        **{f"convert check {kind}": (kind, convert.check) for kind in LINES},
    }


SOURCES = {
    "hh": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
    },
    "tldr": {"info": {"post": "A post.", "title": "T", "subreddit": "r"}, "choice": 1}
    | {"summaries": [{"text": " one", "policy": "a"}, {"text": " two", "policy": "b"}]},
    "alpaca": {"instruction": "Say hi.", "input": "", "output": "Hi."},
    "ultrafeedback": {"instruction": "Say hi.", "completions": []},
    "chat": {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]}
    | {"rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "B"}]},
    "best": RANKING,
}


# --- rules ----------------------------------------------------------------------------------------

ODD_BYTES = [
    b"\xff",
    b"\xed\xa0\x80",
    b"\0",
    b"\r",
    b"\n",
    b"[",
    b"{",
    b'"',
    b"\\",
    b"\xef\xbb\xbf",
]
ODD_TEXTS = ["", " ", "\0", "\ud800", "\ufeff", "<|endoftext|>", "é" * 50, "a" * 3000, "\n\n", "{}"]


def value(rng, depth=0):
    """Some JSON value."""
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([0, -1, 1, 2**31, -(2**63), 10**40, 10**400])
    if kind == 2:
        return rng.choice([0.5, -0.0, 1e-320, 1e308, -1e30, float("nan"), float("inf")])
    if kind < 6:
        return rng.choice(ODD_TEXTS)
    if kind == 6:
        return "".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randrange(12)))
    if kind == 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(ODD_TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def changed(rng, record):
    """The value with one thing in it, at any depth, that is another, missing or doubled."""
    if isinstance(record, dict) and record and rng.random() < 0.9:
        key = rng.choice(list(record))
        how = rng.randrange(4)
        if how == 0:
            return {k: v for k, v in record.items() if k != key}
        if how == 1:
            return record | {rng.choice([key, "prompt", "responses", "x", ""]): value(rng)}
        return record | {key: changed(rng, record[key])}
    if isinstance(record, list) and record and rng.random() < 0.9:
        place, how = rng.randrange(len(record)), rng.randrange(3)
        if how == 0:
            return record[:place] + record[place + 1 :]
        if how == 1:
            return [*record, record[place]]
        return [*record[:place], changed(rng, record[place]), *record[place + 1 :]]
    return value(rng)


def damaged(rng, data):
    """The bytes, cut, flipped, doubled, or with something else between them."""
    data, place = bytearray(data), rng.randrange(len(data) + 1) if data else 0
    for _ in range(rng.choice([1, 1, 1, 3])):
        how = rng.randrange(6)
        if how == 0:
            del data[place:]
        elif how == 1 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif how == 2:
            data[place:place] = rng.choice(
                [
                    b"\xff",
                    b"\xed\xa0\x80",
                    b"\0",
                    b"\r",
                    b"\n",
                    b"[",
                    b"{",
                    b'"',
                    b"\\",
                    b"\xef\xbb\xbf",
                ]
            )
        elif how == 3:
            data[place:place] = data[place : place + rng.randrange(40)]
        elif how == 4:
            del data[place : place + rng.randrange(1, 9)]
        else:
            data[place:place] = b"[" * rng.choice([10, 3000, 100_000])
    return bytes(data)


def text_of_json(rng, contents):
    """As JSON, damaged in its structure, in its bytes, or in both."""
    how = rng.randrange(3)
    if how < 2:
        for _ in range(rng.randrange(1, 3)):
            contents = changed(rng, contents)
    data = json.dumps(contents, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:  # more digits than Python reads
        data = data.replace(b"1", b"1" * 5000, 1)
    return damaged(rng, data) if how > 0 else data


def write_lines(rng, folder, record):
    lines = [json.dumps(record).encode() for _ in range(rng.randrange(3))]
    lines.insert(rng.randrange(len(lines) + 1), text_of_json(rng, record))
    data = rng.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines) + rng.choice([b"", b"\n"])
    if rng.random() < 0.1:
        path = folder / "lines.jsonl.gz"
        data = gzip.compress(data, mtime=0)
        path.write_bytes(damaged(rng, data) if rng.random() < 0.7 else data)
        return path
    path = folder / "lines.jsonl"
    path.write_bytes(data)
    return path


class TooLong(BaseException):
    """No refusal: the alarm."""


def outcome(call, given, raises=()):
    """Whether it was "read" or "refused": with exit status 2 and one line, or with an error of
    those that the reader says it raises, and that scripts give to refuse."""

    def hangs(*_):
        raise TooLong

    said, old = io.StringIO(), signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            call(given)
    except SystemExit as ended:
        assert ended.code == 2 and said.getvalue().count("\n") == 1, said.getvalue()[:500]
        return "refused"
    except raises as error:
        assert str(error)
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    return "read"


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tried(name, count, make, call, raises=()):
    """`count` inputs by `make` of a generator; -> {"read", "refused"}, each a count."""
    found, before = {"read": 0, "refused": 0}, peak_bytes()
    for number in range(count):
        rng = random.Random(f"{SEED} {name} {number}")
        given = make(rng)
        try:
            found[outcome(call, given, raises)] += 1
        except BaseException as error:
            pytest.fail(f"{name}, input {number}: {type(error).__name__}: {error}\n{shown(given)}")
    flood = peak_bytes() - before
    assert flood < FLOOD_BYTES, f"{name}: {flood / 2**30:.1f} GiB"
    return found


def shown(given):
    """The beginning of an input."""
    if isinstance(given, bytes):
        return repr(given[:600])
    files = sorted(given.glob("*")) if given.is_dir() else [given]
    return "; ".join(f"{file.name}: {file.read_bytes()[:600]!r}" for file in files)


SOME = [
    pytest.param(1, id="some"),
    pytest.param(4 if os.environ.get("QUICK") else 16, id="many", marks=pytest.mark.faults),
]


def tell(capsys, name, found):
    with capsys.disabled():
        print(f"\n{name}: {sum(found.values())} inputs: {found}", flush=True)


# --- in process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("times", SOME)
def test_json_lines(times, tmp_path, tokenizer, capsys):
    total = {"read": 0, "refused": 0}
    for name, (kind, call) in lines_readers(tokenizer).items():
        make = lambda rng, kind=kind: write_lines(rng, tmp_path, LINES[kind])  # noqa: E731
        found = tried(name, 40 * times, make, call)
        assert found["refused"] > found["read"] / 20
        total = {key: total[key] + found[key] for key in total}
    if times > 1:
        tell(capsys, "JSON Lines", total)


@pytest.mark.parametrize("times", SOME)
def test_public_formats(times, tmp_path, capsys):
    total = {"read": 0, "refused": 0}
    for name, record in SOURCES.items():

        def call(path, name=name):
            with contextlib.redirect_stdout(io.StringIO()):
                convert.convert(name, path, tmp_path / "target.jsonl")

        found = tried(name, 20 * times, lambda rng, r=record: write_lines(rng, tmp_path, r), call)
        total = {key: total[key] + found[key] for key in total}
    if times > 1:
        tell(capsys, "public formats", total)


@pytest.mark.parametrize("times", SOME)
def test_vocabularies(times, tmp_path, toy_data, tokenizer, policy_run, capsys):
    """.tiktoken files, and a run's tokenizer.json."""
    lines = (toy_data / "bpe.tiktoken").read_bytes().splitlines(keepends=True)
    small = b"".join(lines[:300])

    def a_file(rng):
        path, how = tmp_path / "bpe.tiktoken", rng.randrange(4)
        data = small
        if how == 0:
            data = b"".join(rng.sample(lines[:300], rng.randrange(301)))
        elif how == 1:
            line = rng.choice([b"YQ== 999\n", b"YQ==\n", b"!!! 1\n", b"YQ== -1\n", b"YQ== 1e3\n"])
            data = small + line
        path.write_bytes(damaged(rng, data) if how else data)
        return path

    found = tried(".tiktoken", 100 * times, a_file, load_tokenizer, REFUSED)
    contents = json.loads((policy_run / "tokenizer.json").read_text())
    ranks = dict(list(contents["model"]["vocab"].items())[:256])
    contents = {"model": {"type": "BPE", "vocab": ranks, "merges": []}}

    def a_folder(rng):
        (tmp_path / "tokenizer.json").write_bytes(text_of_json(rng, contents))
        return tmp_path

    more = tried("tokenizer.json", 40 * times, a_folder, load_tokenizer, REFUSED)
    if times > 1:
        tell(capsys, "vocabularies", {key: found[key] + more[key] for key in found})


@pytest.mark.parametrize("times", SOME)
def test_models(times, tmp_path, policy_run, capsys):
    """A reward model's config.json, and headers and bodies of its model.safetensors."""
    trained = feedback.add_scalar_head(model.load_model(policy_run))
    statistics = {"reward_mean": 0.1, "reward_std": 1.2, "score_transform": "identity"}
    model.save_model(tmp_path / "run", trained, load_tokenizer(policy_run), statistics)
    config = json.loads((tmp_path / "run/config.json").read_text())
    whole = (tmp_path / "run/model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])

    def a_config(rng):
        (tmp_path / "run/model.safetensors").write_bytes(whole)
        (tmp_path / "run/config.json").write_bytes(text_of_json(rng, config))
        return tmp_path / "run"

    def sizes(rng):
        (tmp_path / "run/model.safetensors").write_bytes(whole)
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
        odd = [0, -1, 1, 2, 3, 10**6, 2**31, 10**12, 2**62, 10**30, 1.5, True, "8", None, 1e300]
        fields = config | {rng.choice(names): rng.choice(odd) for _ in range(rng.randrange(1, 3))}
        (tmp_path / "run/config.json").write_text(json.dumps(fields))
        return tmp_path / "run"

    def a_header(rng):
        (tmp_path / "run/config.json").write_text(json.dumps(config))
        if rng.random() < 0.7:
            text = text_of_json(rng, header)
            size = len(text) if rng.random() < 0.8 else rng.choice([0, 1, 2**20, 2**40, 2**63])
            data = struct.pack("<Q", size) + text + whole[8 + length :]
        else:
            data = damaged(rng, whole[: 8 + length]) + whole[8 + length :]
        (tmp_path / "run/model.safetensors").write_bytes(data)
        return tmp_path / "run"

    total = {"read": 0, "refused": 0}
    for name, make in [("config.json", a_config), ("sizes", sizes), ("safetensors", a_header)]:
        found = tried(name, 60 * times, make, feedback.load_reward_model, REFUSED)
        total = {key: total[key] + found[key] for key in total}
    if times > 1:
        tell(capsys, "models", total)


@pytest.mark.parametrize("times", SOME)
def test_constitutions_and_prompts_to_judges(times, tmp_path, capsys):
    constitution = json.loads((ROOT / "data/constitution.json").read_text())
    templates = [path.read_bytes() for path in sorted((ROOT / "data/prompts").glob("*.txt"))]

    def a_constitution(rng):
        path = tmp_path / "constitution.json"
        path.write_bytes(text_of_json(rng, constitution))
        return path

    def a_template(rng):
        path, data = tmp_path / "template.txt", rng.choice(templates)
        if rng.random() < 0.5:
            lines = data.splitlines(keepends=True)
            lines[rng.randrange(len(lines))] = rng.choice(
                [
                    b"--- answers\n",
                    b"--- \n",
                    b'["a"]\n',
                    b"[" * 50_000 + b"\n",
                    b"{prompt}\n",
                    b"\n",
                ]
            )
            data = b"".join(lines)
        path.write_bytes(damaged(rng, data))
        return path

    found = tried("constitution", 60 * times, a_constitution, rlaif.read_constitution)
    more = tried("template", 60 * times, a_template, rlaif.read_template)
    if times > 1:
        tell(capsys, "constitutions, templates", {key: found[key] + more[key] for key in found})


class Reply(io.BytesIO):
    """What a server gives."""

    status, reason, headers = 200, "OK", {}


@pytest.mark.parametrize("times", SOME)
def test_answers_of_a_server(times, monkeypatch, capsys):
    """Damaged replies: an answer, or JudgeError, whose one line says what is wrong."""
    top = {"top_logprobs": [{" 1": -0.1, " 2": -2.4}]}
    content = {"content": [{"top_logprobs": [{"token": " 1", "logprob": -0.2}]}]}
    choices = [{"index": 0, "text": " 1", "logprobs": top}], [{"text": "", "logprobs": content}]
    cfg = rlaif.LabelConfig(judge_model="m", retries=0, backoff_s=0.0)
    judge = rlaif.ServerJudge("http://localhost:1", cfg)
    replies = []
    monkeypatch.setattr(judge.opener, "open", lambda *_, **__: Reply(replies[-1]))

    def a_reply(rng):
        return text_of_json(rng, {"choices": rng.choice(choices)})

    def ask(data):
        replies.append(data)
        request = {"prompt": "x"}
        for more in ({"answers": [" 1", " 2"]}, {"max_tokens": 3, "temperature": 0.0, "seed": 1}):
            found = judge.one(request | more)
            assert isinstance(found, str) or all(-1e9 < p <= 1e-3 for p in found), found

    found = tried("replies", 100 * times, a_reply, ask, rlaif.JudgeError)
    if times > 1:
        tell(capsys, "answers of a server", found)


@pytest.mark.parametrize("times", SOME)
def test_what_runs_left(times, tmp_path, capsys):
    """An evaluation's report.json, a run's metrics.jsonl; DPO's cache is made anew."""
    report = {"policies": {"runs/sft": {"kl": [0.5, 0.4, 0.6]}}, "difference": {}, "seconds": 6.5}
    line = {"step": 1, "eval_kl": 0.5, "eval_gold": 1.0}

    def a_report(rng):
        (tmp_path / "report.json").write_bytes(text_of_json(rng, report))
        return tmp_path / "report.json"

    def a_log(rng):
        write_lines(rng, tmp_path, line).replace(tmp_path / "metrics.jsonl")
        return tmp_path

    def a_cache(rng):
        dpo.write_cache(tmp_path / "cache.safetensors", [0.5, 1.5])
        data = (tmp_path / "cache.safetensors").read_bytes()
        (tmp_path / "cache.safetensors").write_bytes(damaged(rng, data))
        return tmp_path / "cache.safetensors"

    found = tried("reports", 40 * times, a_report, evaluate.read_report)
    more = tried("logs", 40 * times, a_log, lambda run: evaluate.read_curves([str(run)]))

    def cached(path):
        assert dpo.read_cache(path, 2) in (None, [0.5, 1.5])

    least = tried("caches", 40 * times, a_cache, cached)
    if times > 1:
        tell(capsys, "what runs left", {k: found[k] + more[k] + least[k] for k in found})


# --- through the command line ---------------------------------------------------------------------


@pytest.mark.faults
def test_on_the_command_line(tmp_path, toy_data, policy_run, capsys):
    """Bad files given to the scripts themselves: exit status 2, one line, nothing written."""
    prompts, gold = toy_data / "prompts_test.jsonl", ROOT / "data/toy.py"
    out = ["--out_dir", tmp_path / "run", "--device", "cpu"]
    commands = {
        "sft.py": ("demonstrations", ["--tokenizer", toy_data / "bpe.tiktoken", "--data"]),
        "reward.py": ("comparisons", ["--init", policy_run, "--prompts", prompts, "--data"]),
        "dpo.py": ("rankings", ["--init", policy_run, "--prompts", prompts, "--data"]),
        "ppo.py": (
            "prompts",
            ["--init", policy_run, "--reward", ROOT / "data/toy.py", "--prompts"],
        ),
        "collapse.py": ("rankings", ["--init", policy_run, "--prompts", prompts, "--data"]),
        "evaluate.py": ("prompts", ["--gold", gold, "--policies", policy_run, "--prompts"]),
    }
    readers = lines_readers(load_tokenizer(policy_run))
    names = {"sft.py": "demonstrations", "reward.py": "comparisons", "dpo.py": "rankings"}
    names |= {"ppo.py": "prompts", "collapse.py": "collapse rankings", "evaluate.py": "prompts"}
    asked = 0
    for script, (kind, flags) in commands.items():
        number = refused = 0
        while refused < 10:
            rng, number = random.Random(f"{SEED} {script} {number}"), number + 1
            path = write_lines(rng, tmp_path, LINES[kind])
            if outcome(readers[names[script]][1], path) == "read":
                continue
            command = [sys.executable, ROOT / script, *flags, path, *out]
            done = subprocess.run(list(map(str, command)), capture_output=True, timeout=60)
            said = done.stderr.decode()
            assert done.returncode == 2 and said.count("\n") == 1, (script, path.read_bytes(), said)
            assert said.startswith(f"{path}:"), said
            assert not (tmp_path / "run").exists()
            refused, asked = refused + 1, asked + 1
    tell(capsys, "on the command line", {"refused": asked})


def test_the_rules_make_what_they_should(tmp_path):
    """Good lines come through whole; the same seed makes the same damage."""
    made = [
        write_lines(random.Random(n), tmp_path, LINES["rankings"]).read_bytes() for n in range(200)
    ]
    again = [
        write_lines(random.Random(n), tmp_path, LINES["rankings"]).read_bytes() for n in range(200)
    ]
    assert made == again and len(set(made)) > 150
    (tmp_path / "good.jsonl").write_text(json.dumps(LINES["rankings"]) + "\n")
    assert read_lines(tmp_path / "good.jsonl") == [LINES["rankings"]]
    for kind, record in LINES.items():
        (tmp_path / "good.jsonl").write_text(json.dumps(record) + "\n")
        assert outcome(convert.check, tmp_path / "good.jsonl") == "read", kind
