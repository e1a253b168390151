"""run.py: flags, processes, the run's directory, exact resuming, logs, JSON Lines. And the scripts
as files: nothing stands in two of them, and each can be copied out."""

import ast
import dataclasses
import gzip
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import torch
from conftest import (
    ROOT, at_call, metrics, read_lines, run_script, sft_flags, terminate_at, weights,
)  # fmt: skip
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from torch import nn

import run as module
import sft
from model import load_config
from run import (
    ProcessFlags, Run, RunFlags, TrainingFlags, adam, flags, groups_of_flags, guarded, read_jsonl,
    schedule,
)  # fmt: skip

# --- flags ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(TrainingFlags):
    data: Annotated[str, "lines to learn from"] = "a.jsonl"
    rewards: Annotated[tuple[str, ...], "what pays"] = ("x", "y")
    out_dir: Annotated[str, "run directory"] = "runs/it"
    method: Annotated[Literal["one", "two", "three"], "the way"] = "one"
    share: Annotated[float, "part of 100%", "[0, 1)"] = 0.5
    upper: Annotated[float, "bound", "(0, 1]"] = 0.5
    weights: Annotated[tuple[float, ...], "of each", "method=two|three"] = ()
    grade: Annotated[tuple[int, ...], "levels", "[1, inf)"] = (1, 2)
    floor: Annotated[float | None, "least score; none: no such thing", "(-inf, inf)"] = -1.0
    online: Annotated[str, "judge; empty: none"] = ""
    rounds: Annotated[int, "rounds", "[1, inf)", "online"] = 3
    passes: Annotated[int, "passes", "not online"] = 2
    refresh: Annotated[bool, "anew in each round", "online", "method=two"] = False
    group_std: Annotated[bool, "divide", "method=two"] = True
    lr: Annotated[float, "peak rate (papers: 1e-5)"] = 1e-2


DOC = "Learns.\n\nObjective: 100% of it.\n\n    python it.py --data b.jsonl\n"


@pytest.fixture
def parsed(monkeypatch, capsys):
    """parsed(words, ...): the Config, or what was said and the exit status."""

    def parse(*words, command="", positional="", config=Config):
        monkeypatch.setattr(sys, "argv", ["/there/it.py", *map(str, words)])
        try:
            return flags(config, DOC, command, positional)
        except SystemExit as ended:
            said = capsys.readouterr()
            return said.out + said.err, ended.code

    return parse


def test_flags_are_read_by_their_types(parsed):
    assert parsed() == Config()
    cfg = parsed(
        *"--data b --rewards p,q,,r --method two --share 0 --upper 1 --weights 1,2.5".split(),
        *"--floor none --refresh --no-group_std --online j --seed 3 --lr 2e-3 --grade 3".split(),
    )
    assert cfg.data == "b" and cfg.rewards == ("p", "q", "r") and cfg.method == "two"
    assert cfg.share == 0.0 and cfg.upper == 1.0 and cfg.weights == (1.0, 2.5)
    assert cfg.floor is None and cfg.refresh and not cfg.group_std and cfg.grade == (3,)
    assert cfg.seed == 3 and cfg.lr == 2e-3 and cfg.batch_size == TrainingFlags.batch_size
    assert parsed("--floor", "-3.5").floor == -3.5 and parsed("--rewards", "").rewards == ()
    assert parsed("--dtype", "").dtype == "" and parsed("--dtype", "float16").dtype == "float16"
    # A flag that is as it was left needs nothing.
    assert parsed("--method", "three", "--group_std").method == "three"
    assert parsed("sub", "--seed", 1, command="sub").seed == 1
    assert parsed("p", "q", "--seed", 1, positional="rewards").rewards == ("p", "q")
    assert parsed("--seed", 1, positional="rewards").rewards == ("x", "y")
    assert parsed("--method=two").method == "two"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--share 1", "--share: expected a number in [0, 1), got 1"),
        ("--share -0.1", "--share: expected a number in [0, 1), got -0.1"),
        ("--share nan", "--share: expected a number in [0, 1), got nan"),
        ("--upper 0", "--upper: expected a number in (0, 1], got 0"),
        ("--upper 1.01", "--upper: expected a number in (0, 1], got 1.01"),
        ("--lr -1", "--lr: expected a number in [0, inf), got -1"),
        ("--lr inf", "--lr: expected a number in [0, inf), got inf"),
        ("--batch_size 0", "--batch_size: expected a number in [1, inf), got 0"),
        ("--grade 2,0", "--grade: expected a number in [1, inf), got 0"),
        ("--method two --weights 1,-1", "--weights: expected a number in [0, inf), got -1"),
        ("--floor inf", "--floor: expected a number in (-inf, inf), got inf"),
        ("--floor nan", "--floor: expected a number in (-inf, inf), got nan"),
        ("--floor low", "argument --floor: invalid number_or_none value: 'low'"),
        ("--weights x", "argument --weights: invalid list of floats by commas value: 'x'"),
        ("--seed 1.5", "argument --seed: invalid int value: '1.5'"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--method four", "argument --method: invalid choice: 'four' (choose from"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--weights 1", "--weights: only with --method two|three"),
        ("--no-group_std", "--group_std: only with --method two"),
        ("--rounds 4", "--rounds: only with --online"),
        ("--passes 1 --online j", "--passes: only without --online"),
        ("--refresh --online j", "--refresh: only with --method two"),
        ("--refresh --method two", "--refresh: only with --online"),
        ("--batch 3", "unrecognized arguments: --batch 3"),  # nothing is guessed
        ("more", "unrecognized arguments: more"),
        ("--data", "argument --data: expected one argument"),
        ("--no-data x", "unrecognized arguments: --no-data x"),
    ],
)
def test_bad_flags_are_refused_in_a_line(parsed, words, message):
    said, status = parsed(*words.split())
    assert status == 2 and said.startswith(f"it.py: {message}"), said
    assert said.endswith(" (--help explains all flags)\n") and said.count("\n") == 1


def test_what_is_refused_is_one_line_however_long(capsys):
    with pytest.raises(SystemExit) as ended:
        module.refuse("a\nb\rc " + "x" * 9000)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("a b c xx")
    assert said.count("\n") == 1 and len(said) == 2001


def test_help_has_every_flag_in_its_group(parsed):
    text, status = parsed("--help")
    assert status == 0 and DOC in text and text.startswith("usage: it.py [--flag value ...]\n")
    parts = re.split(r"^(data|algorithm|optimiser|run):\n", text, flags=re.M)
    shown = {
        parts[i]: re.findall(r"^  --(\w+)", parts[i + 1], re.M) for i in range(1, len(parts), 2)
    }
    own = [field for field in vars(Config) if field in Config.__annotations__]
    assert shown["data"] == own[:3] == ["data", "rewards", "out_dir"]
    assert shown["algorithm"] == [name for name in own[3:] if name != "lr"]
    assert shown["optimiser"] == list(TrainingFlags.__annotations__)
    assert shown["run"] == [*ProcessFlags.__annotations__, *RunFlags.__annotations__]
    assert groups_of_flags(Config) == shown
    flat = " ".join(text.split())
    for line in (
        "--data X lines to learn from (default: a.jsonl)",
        "--rewards X,X what pays (default: x,y)",
        "--method {one,two,three} the way (default: one)",
        "--share X part of 100% (default: 0.5); in [0, 1)",
        "--weights X,X of each (default: ''); only with --method two|three",
        "--floor X least score; none: no such thing (default: -1.0); in (-inf, inf)",
        "--passes X passes (default: 2); only without --online",
        "--refresh, --no-refresh anew in each round (default: False); only with --online; only "
        "with --method two",
        "--lr X peak rate (papers: 1e-5) (default: 0.01)",
        "--dtype {float32,bfloat16,float16,float64} empty: bfloat16 on cuda",
    ):
        assert line in flat, line
    text, _ = parsed("sub", "--help", command="sub", positional="rewards")
    assert text.startswith("usage: it.py sub [rewards ...] [--flag value ...]\n")
    assert "as --rewards" in text


@dataclasses.dataclass(frozen=True)
class Middle(TrainingFlags):
    """As PolicyFlags is: between the flags of all and a script's."""

    prompts: Annotated[str, ""] = ""
    out_dir: Annotated[str, ""] = ""
    steps: Annotated[int, ""] = 1
    lr: Annotated[float, ""] = 1.0


@dataclasses.dataclass(frozen=True)
class Last(Middle):
    value_init: Annotated[str, ""] = ""
    out_dir: Annotated[str, ""] = ""
    gamma: Annotated[float, ""] = 1.0
    steps: Annotated[int, ""] = 2


def test_a_scripts_own_flags_come_first():
    groups = groups_of_flags(Last)
    assert groups["data"] == ["prompts", "out_dir", "value_init"]
    assert groups["algorithm"] == ["gamma", "steps"] and "lr" in groups["optimiser"]


# --- processes and precision ----------------------------------------------------------------------


def new(out="", **settings):
    return Run(Config(**{"out_dir": str(out), "device": "cpu"} | settings))


def test_devices_and_precisions(capsys):
    for dtype, expected, mixed, scales in [
        ("", torch.float32, False, False),
        ("bfloat16", torch.bfloat16, True, False),
        ("float16", torch.float16, True, True),
        ("float64", torch.float64, False, False),
    ]:
        run = new(dtype=dtype)
        assert run.dtype == expected and run.mixed == mixed and run.scaler.is_enabled() == scales
        assert run.precision == (torch.float64 if dtype == "float64" else torch.float32)
        with run.autocast:
            assert torch.is_autocast_enabled("cpu") == mixed
        assert (run.rank, run.world, run.device.type) == (0, 1, "cpu")
    names = [(name, "expected cpu, cuda or mps") for name in ("gpu", "cuda:x", "cpu:1:")]
    if not torch.cuda.is_available():
        assert new(device="").device.type == "cpu"
        names += [(name, "there is no such CUDA device here") for name in ("cuda", "cuda:99")]
    if not torch.backends.mps.is_available():
        names += [("mps", "there is no such device here")]
    for name, message in names:
        with pytest.raises(SystemExit) as ended:
            new(device=name)
        assert ended.value.code == 2 and message in capsys.readouterr().err
    # Sampling on the CPU is by the model itself, in eval mode.
    net = nn.Linear(2, 2)
    assert new(dtype="bfloat16").sampler(net) is net and not net.training


def test_a_gpu_without_its_driver_is_said(monkeypatch, capsys):
    """A torch for CUDA that finds none trains on the CPU, and says so, once."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert new(device="").device.type == new().device.type == "cpu"
    assert capsys.readouterr().err.count("built for CUDA 12.8, but finds no GPU or no driver") == 1
    monkeypatch.setenv("RANK", "1")
    new(device="")
    assert not capsys.readouterr().err


def test_an_apple_gpu_is_let_through(monkeypatch, capsys):
    """In float32 and one process; sums are then in float32 too, as it has no float64."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    run = new(device="mps")
    assert (run.device.type, run.dtype, run.wide) == ("mps", torch.float32, torch.float32)
    for settings, world in (({"dtype": "bfloat16"}, "1"), ({}, "2")):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(SystemExit):
            new(device="mps", **settings)
        assert "--device mps: expected one process, in float32" in capsys.readouterr().err


OF_RANKS = """
def main():
    cfg = run.TrainingFlags(device='cpu', timeout_s=60)
    r = run.Run(cfg)
    n = r.rank
    found = {'rank': [n, r.world], 'sum': r.sum([n, 0.1]), 'dict': r.sum({'b': 1, 'a': n})}
    found['tensor'] = r.sum_tensor(torch.tensor([n, 2.5])).tolist()
    found['gather'] = r.gather([{'text': 'é' * 50 * n, 'of': n}] * n)
    r.count(x=n, y=1)
    r.count(x=1)
    found['counted'] = [r.counted()[0], r.counted()[0]]
    model = r.parallel(torch.nn.Linear(1, 1, bias=False))
    torch.nn.init.ones_(model.module.weight)
    synced = []  # lines 1 to 4 on three ranks, in micro-batches of one: the mean's gradient
    lines = [1.0, 2.0, 3.0, 4.0]
    for rows, weight in r.micro_batches(lines[n::3], 2, 1, filler=9.0):
        loss = model(torch.tensor([rows])).sum()
        (loss * weight * r.world / 4).backward()
        synced.append([rows, weight, model.require_backward_grad_sync])
    found['synced'] = synced
    found['gradient'] = model.module.weight.grad.item()
    r.say('only once')
    os.write(1, b'found ' + json.dumps(found).encode() + b'\\n')
import json
run.guarded(main)
"""


def test_what_ranks_tell_each_other():
    done = on_ranks("run", OF_RANKS, 3)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line[6:] for line in done.stdout.splitlines() if line.startswith("found ")]
    found = sorted(map(json.loads, lines), key=lambda rank: rank["rank"])
    assert [rank["rank"] for rank in found] == [[0, 3], [1, 3], [2, 3]]
    for rank in found:
        assert rank["sum"] == pytest.approx([3, 0.3]) and rank["dict"] == {"b": 3, "a": 3}
        assert rank["tensor"] == [3, 7.5]
        assert rank["gather"] == [{"text": "é" * 50 * n, "of": n} for n in (1, 2, 2)]
        assert rank["counted"] == [{"x": 6, "y": 3}, {}] and rank["gradient"] == 2.5
    assert [rank["synced"] for rank in found] == [
        [[[1.0], 1.0, False], [[4.0], 1.0, True]],
        [[[2.0], 1.0, False], [[9.0], 0.0, True]],
        [[[3.0], 1.0, False], [[9.0], 0.0, True]],
    ]
    assert done.stdout.count("only once") == 1


def test_one_rank_goes_on_alone(tmp_path):
    """After `leave` the first waits for no other: here until the other has ended."""
    code = (
        "import time\n"
        "def main():\n"
        "    r = run.Run(run.TrainingFlags(device='cpu', timeout_s=60))\n"
        "    r.leave()\n"
        f"    path = {str(tmp_path / 'gone')!r}\n"
        "    if r.rank == 1:\n"
        "        open(path, 'w').close()\n"
        "    while not os.path.exists(path):\n"
        "        time.sleep(0.01)\n"
        "run.guarded(main)\n"
    )
    done = on_ranks("run", code)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_process_alone():
    run = new()
    assert run.sum([1, 2]) == [1, 2] and run.sum({"b": 1, "a": 2}) == {"b": 1, "a": 2}
    assert run.gather([1, "é"]) == [1, "é"] and run.parallel(net := nn.Linear(1, 1)) is net
    run.count(loss=1.5, cells=2)
    run.count(loss=1)
    run.last -= 10
    sums, seconds = run.counted()
    assert sums == {"loss": 2.5, "cells": 2} and 10 <= seconds < 60
    assert run.counted()[0] == {} and run.counted()[1] < 9


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_every_line_is_in_one_micro_batch_on_any_number_of_ranks(count):
    for world, size in itertools.product((1, 2, 3), (0, 1, 2, 100)):
        shares = []
        for rank in range(world):
            run, model = new(), SimpleNamespace()
            run.wrapped = [model]
            mine, most = list(range(count))[rank::world], math.ceil(count / world)
            share = run.micro_batches(mine, most, size, filler="x")
            shares.append(
                [(rows, weight, model.require_backward_grad_sync) for rows, weight in share]
            )
        assert len({len(share) for share in shares}) == 1  # forwards alike on all ranks
        rows = [line for share in shares for some, weight, _ in share if weight for line in some]
        assert sorted(rows) == list(range(count))
        for share in shares:
            assert [sync for *_, sync in share] == [False] * (len(share) - 1) + [True]
            assert all(weight == 1.0 or some == ["x"] for some, weight, _ in share)
            assert not size or all(len(some) <= size for some, *_ in share)


def test_clipping(capsys):
    net = nn.Linear(2, 1, bias=False)
    run = new(clip_norm=1.0)
    optimizer = adam(net, 0.1, run.cfg)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    assert run.clip(optimizer, net) == 5 and net.weight.grad.norm().item() == pytest.approx(1)
    net.weight.grad = torch.tensor([[0.3, 0.4]])
    assert run.clip(optimizer, net) == pytest.approx(0.5)
    assert net.weight.grad.norm().item() == pytest.approx(0.5)
    for bad, word in ((math.nan, "nan"), (math.inf, "inf")):
        net.weight.grad = torch.tensor([[bad, 0.0]])
        with pytest.raises(SystemExit) as ended:
            run.clip(optimizer, net, lines=range(4, 20))
        said = capsys.readouterr().err
        assert ended.value.code == 1 and said.count("\n") == 1
        assert f"step 0: the gradient's norm is {word} on lines 5, 6, 7, 8, 9, 10, 11, 12, " in said
        assert "stopped before the update; the last checkpoint is as it was" in said
    # float16: the scaler skips the step, until its scale can't fall any more.
    run = new(dtype="float16")
    run.scaler.scale(torch.ones(1))
    net.weight.grad = torch.tensor([[math.inf, 0.0]])
    assert run.clip(optimizer, net) == math.inf
    before = net.weight.clone()
    run.scaler.step(optimizer)
    assert torch.equal(net.weight, before)
    run.scaler.update(1.0)
    net.weight.grad = torch.tensor([[math.inf, 0.0]])
    with pytest.raises(SystemExit):
        run.clip(optimizer, net)


def test_adam_decays_the_matrices_that_learn():
    net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    net[0].weight.requires_grad_(False)
    cfg = Config(weight_decay=0.1, adam_beta2=0.9, adam_eps=1e-5)
    matrices, others = adam(net, 0.3, cfg).param_groups
    assert [id(p) for p in matrices["params"]] == [id(net[1].weight)]
    assert {id(p) for p in others["params"]} == {
        id(p) for p in (net[1].bias, net[2].weight, net[2].bias)
    }
    assert matrices["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    for group in (matrices, others):
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.9, 0.9), 1e-5)


def test_the_schedule():
    cfg = Config(warmup=4, final_lr=0.1)
    rates = [schedule(step, 24, cfg) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.11
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert schedule(0, 0, Config(warmup=0)) == 1.0  # nothing to divide by
    assert schedule(14, 24, cfg, 2e-3) == pytest.approx(2e-3 * rates[14])


def test_progress_is_said_now_and_then(capsys):
    run = new()
    run.progress("judged", 3, 9)
    assert capsys.readouterr().out == ""
    run.spoken -= 31
    run.progress("judged", 4, 9)
    run.progress("judged", 5, 9)
    assert capsys.readouterr().out == "  judged: 4 of 9\n"
    run.total, run.saved = 9, 9
    run.save_or_stop()  # in each step, and in each part of one
    run.spoken -= 31
    run.save_or_stop()
    run.spoken -= 31
    list(run.micro_batches([1, 2, 3], 3, 2, 1))
    assert capsys.readouterr().out == "  steps: 0 of 9\n  rows of an update: 0 of 3\n"
    run.spoken -= 31
    run.say("a line")
    run.progress("judged", 6, 9)
    assert capsys.readouterr().out == "a line\n"


def test_the_time_that_is_left(monkeypatch):
    run = new()
    run.started, run.total, run.step = 0.0, 100, 50
    for now, left in ((0.4, "0:00 left"), (59.6, "1:00 left"), (90.2, "1:30 left")):
        monkeypatch.setattr(module.time, "time", lambda now=now: now)
        assert run.left() == left


def test_a_warm_up_that_does_not_end_is_told(capsys):
    for warmup, told in ((5, False), (6, True)):
        run = new(warmup=warmup)
        run.total = 5
        run.resume({}, {})
        assert (f"warning: --warmup {warmup}: the learning" in capsys.readouterr().out) == told


def test_printing_ends_no_run():
    """On a terminal, or in a log, of an encoding that lacks a character."""
    code = "import run; run.guarded(lambda: print('caf\xe9 \u4f60'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    how = {"cwd": ROOT, "env": environment, "capture_output": True}
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.returncode == 0 and done.stdout == b"caf\\xe9 \\u4f60\n"


def test_how_a_script_ends(monkeypatch, capsys):
    def ends(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as ended:
            guarded(main)
        return ended.value.code

    assert ends(OSError("there: no room")) == "there: no room"
    assert ends(KeyboardInterrupt()) == 130
    assert "interrupted; what was saved stays" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="of its own"):
        ends(RuntimeError("of its own"))
    said = []
    store = SimpleNamespace(set=lambda *words: said.append(words))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module, "stores", [store])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    store.check = lambda keys: keys == ["waiting 1"]
    message = ends(RuntimeError("[gloo] Connection closed by peer"))
    assert message.startswith("rank 1: no answer within --timeout_s from rank 0, 2, or it is gone;")
    assert said == [("waiting 1", "")] and "Connection closed by peer" in message
    store.check = lambda keys: True
    assert "rank 1: ranks can not reach each other" in ends(RuntimeError("gloo: no route"))


# --- the directory --------------------------------------------------------------------------------


def opened(out, inputs=(), total=None, free=(), **settings):
    run = new(out, **settings)
    return run.open(inputs, total, free), run


def refused(capsys, *args, **settings):
    with pytest.raises(SystemExit) as ended:
        opened(*args, **settings)
    said = capsys.readouterr()
    assert ended.value.code in (0, 2) and (said.out + said.err).count("\n") == 1
    return said.out + said.err


def test_a_new_directory_holds_what_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "sft.py"), "--seed", "3"])
    (tmp_path / "model").mkdir()
    for name, text in [
        ("data.jsonl", "1"),
        ("model/model.safetensors", "2"),
        ("model/config.json", "3"),
    ]:
        (tmp_path / name).write_text(text)
    (tmp_path / "policy").mkdir()  # a folder that is called as a flag's value is no model
    inputs = [tmp_path / "data.jsonl", "", tmp_path / "model", tmp_path / "policy", "random"]
    inputs = list(map(str, inputs))
    resumes, _ = opened(tmp_path / "a/run", inputs, 9, seed=3)
    assert not resumes
    out = tmp_path / "a/run"
    assert {path.name for path in out.iterdir()} == {
        *("args.json", "script.py", "tokens.py", "model.py", "run.py", "feedback.py")
    }
    assert (out / "script.py").read_bytes() == (ROOT / "sft.py").read_bytes()
    for name in ("tokens.py", "model.py", "run.py", "feedback.py"):
        assert (out / name).read_bytes() == (ROOT / name).read_bytes()
    args = json.loads((out / "args.json").read_text())
    assert args["command"] == sys.argv and args["versions"]["torch"] == torch.__version__
    settings = args["settings"]
    assert settings["seed"] == 3 and settings["rewards"] == ["x", "y"] and settings["world"] == 1
    free = {"out_dir", "resume", "overwrite", "timeout_s", "checkpoint_activations"}
    assert not free & set(settings) and list(args["inputs"]) == inputs
    files = {path: x for found in args["inputs"].values() for path, x in found.items()}
    expected = ("data.jsonl", "model/model.safetensors", "model/config.json")
    assert list(files) == [str(tmp_path / name) for name in expected]
    assert files[inputs[0]] == module.sha256(tmp_path / "data.jsonl")


def test_resume_refuses_another_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "sft.py")])
    data, out = str(tmp_path / "data.jsonl"), tmp_path / "run"
    Path(data).write_text("1")
    out.mkdir()
    (out / ".args.json.77.tmp").touch()  # of a run that was killed in its first moments: not in use
    assert opened(out, [data])[0] is False
    assert f"{out}: in use; --resume goes on with its run, --overwrite" in refused(
        capsys, out, [data]
    )
    again = {"resume": True}
    assert opened(out, [data], timeout_s=9, checkpoint_activations=True, **again)[0] is True
    said = refused(capsys, out, [data], lr=0.5, weights=(1.0,), **again)
    assert f"{out}: can't resume with other settings: lr: 0.01 -> 0.5; weights: [] -> [1.0]" in said
    Path(data).write_text("2")
    assert "settings: inputs: others, or with other contents" in refused(
        capsys, out, [data], **again
    )
    assert "settings: inputs: others" in refused(capsys, out, [], **again)
    Path(data).write_text("1")
    args = json.loads((out / "args.json").read_text())
    args["settings"]["world"] = 2
    (out / "args.json").write_text(json.dumps(args))
    assert "world: 2 -> 1" in refused(capsys, out, [data], **again)
    for text in ("{", "[1]", '{"settings": 3}', '{"settings": {}, "inputs": {"a": 3}}'):
        (out / "args.json").write_text(text)
        assert "args.json: damaged, or of another version: nothing can" in refused(
            capsys, out, **again
        )
    args["settings"]["world"] = 1
    (out / "args.json").write_text(json.dumps(args))
    (out / "report.json").write_text("{}")
    assert refused(capsys, out, [data], **again) == f"{out}: this run is finished\n"
    # Without a checkpoint a run with a number of steps begins anew, in a new folder.
    (out / "report.json").unlink()
    (out / "metrics.jsonl").write_text("{}\n")
    resumes, run = opened(out, [data], total=9, **again)
    assert not resumes and run.checkpoint is None and not (out / "metrics.jsonl").exists()
    for name in ("checkpoint-4", "checkpoint-10", "checkpoint-x"):
        (out / name).mkdir()
    resumes, run = opened(out, [data], total=9, **again)
    assert resumes and run.checkpoint == out / "checkpoint-10"


def test_contents_are_compared_and_not_how_they_are_spelled(tmp_path, monkeypatch, capsys):
    """Of out_dir, of files and run directories, alone, among several and within a value."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "sft.py")])
    (tmp_path / "model").mkdir()
    for name in ("d.jsonl", "e.jsonl", "model/model.safetensors", "model/config.json"):
        Path(name).write_text(name)

    def settings(data="d.jsonl", model="model", **more):
        flags = {"data": data, "rewards": (model, f"{model}@temperature=0:{data}")}
        return {"inputs": [data, model, f"./{data}"]} | flags | more  # twice, spelled otherwise

    assert opened("run/a", **settings())[0] is False
    shutil.copytree("run/a", "moved")
    os.symlink("moved", "link")
    shutil.copytree("model", "copy")
    for out in ("run/a", "./run/a/", str(tmp_path / "run/a"), "moved", "link"):
        assert opened(out, **settings(resume=True))[0] is True
    shutil.copy("d.jsonl", "same.jsonl")
    for data, model in (("./d.jsonl", "model/"), ("same.jsonl", str(tmp_path / "copy"))):
        assert opened("run/a", **settings(data, model, resume=True))[0] is True
    said = refused(capsys, "run/a", **settings("e.jsonl", resume=True))
    assert (
        "data: 'd.jsonl' -> 'e.jsonl'; rewards: ['model', 'model@temperature=0:d.jsonl'] ->" in said
    )
    Path("d.jsonl").write_text("others")
    said = refused(capsys, "run/a", **settings(resume=True))
    assert "data: 'd.jsonl' has other contents; rewards: [" in said
    swapped = {"data": "e.jsonl", "rewards": ("d.jsonl", "x")}
    opened(
        "run/b",
        ["d.jsonl", "e.jsonl"],
        **swapped | {"data": "d.jsonl", "rewards": ("e.jsonl", "x")},
    )
    assert "data: 'd.jsonl' -> 'e.jsonl'" in refused(
        capsys, "run/b", ["e.jsonl", "d.jsonl"], resume=True, **swapped
    )


def test_a_folder_is_used_where_it_is(tmp_path, monkeypatch, capsys):
    """A link, the folder that one is in, one with a disk's lost+found, one whose parent can't be
    written (here: its inode stays): emptied in place."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "sft.py")])
    (tmp_path / "disk/lost+found").mkdir(parents=True)
    os.symlink(tmp_path / "disk", tmp_path / "link")
    os.symlink(tmp_path / "not/there/yet", tmp_path / "dangling")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (tmp_path / "link", Path("."), tmp_path / "dangling"):
        assert opened(out)[0] is False
        inode = out.stat().st_ino
        (out / "checkpoint-3").mkdir()
        os.symlink(tmp_path / "here", out / "a_link")
        assert "in use" in refused(capsys, out)
        assert opened(out, overwrite=True)[0] is False
        assert sorted(path.name for path in out.iterdir() if path.name != "lost+found") == [
            *("args.json", "feedback.py", "model.py", "run.py", "script.py", "tokens.py")
        ]
        assert out.stat().st_ino == inode
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/lost+found").exists()
    assert (tmp_path / "not/there/yet/args.json").exists()


def test_a_refusal_before_the_first_step_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "sft.py")])
    (tmp_path / "theirs").mkdir()

    def refuses(out, after=lambda run: None):
        monkeypatch.setattr(module, "made", [])
        after(opened(out)[1])
        with pytest.raises(SystemExit):
            module.refuse("no")
        assert capsys.readouterr().err.endswith("no\n")
        return out.exists()

    assert not refuses(tmp_path / "a/run") and not refuses(tmp_path / "a/run")
    assert refuses(tmp_path / "b", lambda run: run.log("metrics", {"loss": 1}))
    assert refuses(tmp_path / "theirs") and not list((tmp_path / "theirs").iterdir())


def test_a_refusal_is_told_once(monkeypatch, capsys):
    """Of all ranks by the first that refuses; before they have met, by each machine's first."""

    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)

    def tells(rank, store=None):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setattr(module, "stores", [store] if store else [])
        with pytest.raises(SystemExit):
            module.refuse("no")
        return capsys.readouterr().err == "no\n"

    assert [tells(rank) for rank in (0, 1, 3)] == [True, False, False]
    assert waited == [10, 10]  # as torchrun ends all when one ends
    count = itertools.count(1)
    store = SimpleNamespace(add=lambda key, n: next(count))
    assert [tells(rank, store) for rank in (1, 0, 3)] == [True, False, False]

    def gone(key, n):
        raise RuntimeError("Connection reset by peer")

    assert tells(1, SimpleNamespace(add=gone))


def test_what_a_script_lets_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "sft.py")])
    opened(tmp_path / "run", free=["method"])
    assert opened(tmp_path / "run", free=["method"], method="two", resume=True)[0] is True


def test_somebodys_folder_is_never_deleted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "sft.py")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for how in ("overwrite", "resume"):
        assert "in use" in refused(capsys, tmp_path / "mine", **{how: True})
    assert (tmp_path / "mine/thesis.txt").exists()
    # A run's folder goes, and what is needed in it is named before.
    opened(tmp_path / "run")
    (tmp_path / "run/model.safetensors").write_text("2")
    (tmp_path / "run/config.json").write_text("3")
    os.symlink(tmp_path / "run", tmp_path / "link")
    for name in (tmp_path / "run", tmp_path / "link"):
        said = refused(capsys, tmp_path / "run", [name], overwrite=True)
        assert f"{name}/model.safetensors: is in --out_dir, which --overwrite would delete" in said
    assert (tmp_path / "run/config.json").exists()
    assert opened(tmp_path / "run", overwrite=True)[0] is False
    assert not (tmp_path / "run/config.json").exists()


def test_a_kill_while_a_folder_is_emptied(tmp_path, monkeypatch):
    """It is no finished run then, and still a run's folder, which --overwrite may empty."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "sft.py")])
    opened(tmp_path / "run")
    for name in ("report.json", "config.json", "zeta.json"):
        (tmp_path / "run" / name).write_text("{}")
    real = Path.unlink

    def killed(path, **how):
        if path.name == "config.json":
            raise Dies
        real(path, **how)

    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr(Path, "unlink", killed)
        opened(tmp_path / "run", overwrite=True)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"args.json", "config.json"} <= left and "report.json" not in left
    assert opened(tmp_path / "run", overwrite=True)[0] is False
    assert not (tmp_path / "run/config.json").exists()


# --- checkpoints, in a loop in small --------------------------------------------------------------


class Dies(BaseException):
    pass


def loop(out, total=8, die=None, inside=lambda run: None, scale=1.0, **settings):
    """Learns with dropout, in whatever precision; -> its run and its network. `die`: Dies in that
    step; inside(run): what happens in each one."""
    settings = {"save_every": 3, "eval_every": 2, "log_every": 3} | settings
    run = new(out, **settings)
    run.open([], total)
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = adam(net, 0.1, run.cfg)
    now = run.resume({"net": net}, {"net": optimizer}, seen=0, first=None)
    while True:
        run.save_or_stop()
        if run.evaluation_due():
            run.log_evaluation({"weight": net[0].weight.sum().item()})
            run.log("samples", {"step": run.step, "text": "é"})
        if run.step == total:
            break
        if run.step == die:
            raise Dies
        inside(run)
        with run.autocast:
            loss = net(torch.ones(5, 3)).square().mean() * scale
        run.scaler.scale(loss).backward()
        norm = run.clip(optimizer, net)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        now.seen += run.step
        now.first = now.first or {"loss": loss.item()}
        run.count(loss=loss.item())
        run.step += 1
        if run.due(run.cfg.log_every):
            record = {"loss": run.counted()[0]["loss"], "norm": norm, "seen": now.seen}
            run.log("metrics", record | now.first, record)
    run.finish({"seen": now.seen})
    return run, net


def logs(out):
    return metrics(out), (out / "samples.jsonl").read_bytes()


def test_what_is_no_number_goes_through_a_checkpoint(tmp_path):
    """A sum and a state that float16 made NaN: null on the disk, NaN again when it goes on."""

    def overflows(run):
        run.count(loss=math.nan)
        run.state.first = {"loss": math.nan}

    with pytest.raises(Dies):
        loop(tmp_path / "run", die=2, inside=overflows, save_every=1)
    known = json.loads((tmp_path / "run/checkpoint-2/state.json").read_text(), parse_constant=int)
    assert known["window"] == {"loss": None} and known["state"]["first"] == {"loss": None}
    run, _ = loop(tmp_path / "run", resume=True, save_every=1)
    assert math.isnan(run.state.first["loss"]) and (tmp_path / "run/report.json").exists()


@pytest.fixture
def as_sft(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "sft.py")])


def test_a_loop_that_died_anywhere_ends_as_if_it_had_not(tmp_path, as_sft, capsys):
    run, whole = loop(tmp_path / "whole")
    printed = capsys.readouterr().out
    assert "parameters that learn: net 0.00M; cpu, torch.float32, 1 rank(s); 8 steps\n" in printed
    assert re.search(r"^step 3/8  loss \S+  norm \S+  seen 3  \d+:\d\d left$", printed, re.M)
    assert re.search(r"^step 0/8  held out: weight \S+  $", printed, re.M)
    assert re.search(rf"^{tmp_path / 'whole'}: finished in \d+ s$", printed, re.M)
    assert [line["step"] for line in metrics(tmp_path / "whole")] == [0, 2, 3, 4, 6, 6, 8, 8]
    assert ["eval_weight" in line for line in metrics(tmp_path / "whole")] == [
        *(True, True, False, True, False, True, False, True)
    ]
    report = json.loads((tmp_path / "whole/report.json").read_text())
    assert report.keys() == {"step", "seconds", "seen", "peak_memory_gib"}
    assert report["step"] == 8 and report["seen"] == 28 and report["peak_memory_gib"] > 0.05
    assert not list((tmp_path / "whole").glob("*checkpoint*"))
    for die in range(8):
        out = tmp_path / str(die)
        with pytest.raises(Dies):
            loop(out, die=die)
        kept = [f"checkpoint-{die // 3 * 3}"] if die >= 3 else []
        assert [path.name for path in out.glob("*checkpoint*")] == kept
        # Twice: dead again in the step after.
        if die < 7:
            with pytest.raises(Dies):
                loop(out, die=die + 1, resume=True)
        run, net = loop(out, resume=True)
        last = (die if die == 7 else die + 1) // 3 * 3
        assert run.first == last
        assert all(map(torch.equal, net.parameters(), whole.parameters()))
        assert logs(out) == logs(tmp_path / "whole")
        assert (f"resumed at step {last} from" in capsys.readouterr().out) == (last > 0)


@pytest.mark.parametrize("step", [0, 1, 3, 7])
def test_a_loop_that_is_told_to_stop_loses_nothing(tmp_path, as_sft, capsys, step):
    """SIGTERM in a step: that one is done, and saved; what was evaluated is not evaluated again."""
    _, whole = loop(tmp_path / "whole")
    steps = []

    def told(run):
        steps.append(run.step)
        if run.step == step and not run.first:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        loop(tmp_path / "run", inside=told)
    assert ended.value.code == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM at step {step + 1}; --resume" in capsys.readouterr().out
    assert (tmp_path / f"run/checkpoint-{step + 1}").exists()
    module.stop_signals.clear()
    _, net = loop(tmp_path / "run", inside=told, resume=True)
    assert steps == list(range(8))
    assert all(map(torch.equal, net.parameters(), whole.parameters()))
    assert logs(tmp_path / "run") == logs(tmp_path / "whole")


def test_seconds_and_the_scaler_go_on(tmp_path, as_sft):
    """float16 with too large a loss: steps are skipped until the scale has fallen; it stays so."""
    scales = []

    def late(run):
        scales.append(run.scaler.get_scale())
        run.started -= 100

    _, whole = loop(tmp_path / "whole", dtype="float16", scale=1e3, inside=late)
    assert scales[0] == 65536 and scales[-1] < 65536
    assert metrics(tmp_path / "whole")[2]["norm"] is None  # JSON has no infinity
    first = scales[:]
    with pytest.raises(Dies):
        loop(tmp_path / "run", dtype="float16", scale=1e3, die=5, inside=late)
    run, net = loop(tmp_path / "run", dtype="float16", scale=1e3, inside=late, resume=True)
    assert scales[8:11] + scales[13:] == first and run.earlier == pytest.approx(300, abs=60)
    assert all(map(torch.equal, net.parameters(), whole.parameters()))
    seconds = [line["seconds"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert seconds == sorted(seconds) and seconds[-1] > 790


def test_a_resumed_run_lets_go_of_its_checkpoint(tmp_path, as_sft):
    """Its tensors are copies: a mapped file keeps its room on the disk when it is deleted."""
    with pytest.raises(Dies):
        loop(tmp_path / "run", die=4)

    def wiped(run):
        module, optimizer = run.modules["net"], run.optimizers["net"]
        values = [p.detach() for p in module.parameters()]
        values += [x for state in optimizer.state.values() for x in state.values()]
        before = [x.clone() for x in values]
        path = run.checkpoint / "tensors.safetensors"
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert len(values) > 10 and all(map(torch.equal, values, before))
        raise Dies

    with pytest.raises(Dies):
        loop(tmp_path / "run", resume=True, inside=wiped)


def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(tmp_path, as_sft, monkeypatch, capsys):
    out = tmp_path / "run"
    with pytest.raises(Dies):
        loop(out, die=4)
    folder = out / "checkpoint-3"
    shutil.copytree(folder, tmp_path / "kept")

    def said():
        with pytest.raises(SystemExit) as ended:
            loop(out, resume=True)
        message = capsys.readouterr().err
        assert ended.value.code == 2 and message.count("\n") == 1 and str(folder) in message
        assert message.endswith("; this checkpoint can't be resumed\n")
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)
        return message

    names = ("tensors.safetensors", "state.json", "sha256.json")
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        for damaged in (bytes(flipped), whole[: len(whole) // 2], b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert name in said() or name == "sha256.json"

    def rehash():
        hashes = {name: module.sha256(folder / name) for name in names[:2]}
        (folder / names[2]).write_text(json.dumps(hashes))

    # Its hashes put right, and what belongs to others.
    (folder / "optimizer.pt").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch /tmp/x'\ntR.")
    assert "optimizer.pt: a file that no script of ours wrote" in said()
    (folder / names[0]).write_bytes(b"\x80\x04cposix\nsystem\n.")
    rehash()
    assert f"{names[0]}: " in said()
    tensors = load_file(folder / names[0])
    for change in (
        {"net.0.weight": torch.zeros(2, 3)},
        {"net.9.weight": torch.zeros(2, 3)},
    ):
        save_file(tensors | change, folder / names[0])
        rehash()
        assert f"{names[0]}: of another model than this run's" in said()
    save_file({k: v for k, v in tensors.items() if k != "net.0.bias"}, folder / names[0])
    rehash()
    assert "of another model" in said()
    state = json.loads((folder / names[1]).read_text())
    for change, message in [
        ({"script": "ppo.py"}, "of ppo.py, or of fewer ranks"),
        ({"rng": []}, "of sft.py, or of fewer ranks"),
    ]:
        (folder / names[1]).write_text(json.dumps(state | change))
        rehash()
        assert message in said()
    loop(out, resume=True)


def test_a_save_that_fails_leaves_the_one_before(tmp_path, as_sft, monkeypatch):
    """A full disk in the midst of a save, and one that has no room from the start."""
    out = tmp_path / "run"
    real = module.write_json

    def full(path, contents):
        if path.name == "state.json" and contents["step"] == 6:
            raise OSError(28, f"{path}: could not be written: No space left on device")
        real(path, contents)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="could not be written"):
        patch.setattr(module, "write_json", full)
        loop(out)
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-3"]
    usage = namedtuple("usage", "total used free")(9, 9, 100)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"checkpoint-6: not written"):
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        loop(out, resume=True)
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-3"]
    (out / ".checkpoint.tmp").mkdir()  # what a kill leaves
    (out / ".checkpoint.tmp/tensors.safetensors").touch()
    _, net = loop(out, resume=True)
    _, whole = loop(tmp_path / "whole")
    assert all(map(torch.equal, net.parameters(), whole.parameters()))


def test_saves_are_at_the_end_alone_if_told_so(tmp_path, as_sft):
    loop(tmp_path / "run", save_every=0, eval_every=0)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 6, 8, 8]
    assert "eval_weight" in metrics(tmp_path / "run")[-1]


# --- a script that is cut short -------------------------------------------------------------------

LONG = ["--epochs", 2, "--batch_size", 8, "--save_every", 4, "--eval_every", 5, "--log_every", 3]
LONG += ["--dropout", 0.1]


@pytest.fixture(scope="module")
def uninterrupted(sft_data, tmp_path_factory):
    """12 steps with dropout, in one go."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run_script(sft, patch, *sft_flags(sft_data, out, *LONG)) == 0
    return out


def is_as(out, other):
    return weights(out) == weights(other) and logs(out) == logs(other)


@pytest.mark.parametrize("moment", [2, 4, 5, 7, 12])
def test_kill_and_resume(sft_data, tmp_path, monkeypatch, uninterrupted, moment):
    """kill -9 before the first save, on a save, on an evaluation, in between, in the last step."""
    args = sft_flags(sft_data, tmp_path / "run", *LONG, "--resume")
    kill = at_call("sft", "schedule", 2 * moment - 1, "os.kill(os.getpid(), 9)")
    first = on_ranks("sft", f"{kill}sys.argv = {['sft.py', *args]!r}\nsft.main()\n", 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert run_script(sft, monkeypatch, *args) == 0
    assert is_as(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "where, call", [("schedule", 9), ("held_out_loss", 2), ("respond", 3), ("respond", 5)]
)
def test_sigterm_saves_and_resumes(sft_data, tmp_path, monkeypatch, uninterrupted, where, call):
    """SIGTERM in a step, in the held-out loss, in sampling, in the last one: saved there, exact
    afterwards, and no step is taken twice."""
    args, steps = sft_flags(sft_data, tmp_path / "run", *LONG, "--resume"), []
    real = sft.weighted_nll

    def counted(model, *rest):
        steps.extend([1] * model.training)
        return real(model, *rest)

    monkeypatch.setattr(sft, "weighted_nll", counted)
    with monkeypatch.context() as patch:
        terminate_at(patch, sft, where, call)
        assert run_script(sft, patch, *args) == 128 + signal.SIGTERM
    assert not (tmp_path / "run/report.json").exists() and len(steps) < 12 + (call == 5)
    assert run_script(sft, monkeypatch, *args) == 0
    assert len(steps) == 12 and is_as(tmp_path / "run", uninterrupted)


def test_ranks_stop_together_and_go_on(sft_data, tmp_path):
    """SIGTERM to the second of two ranks between two printed lines: each goes on with its own
    dropout and its own part of the sums."""

    def code(out, fault=""):
        argv = ["sft.py", *sft_flags(sft_data, out, *LONG, "--micro_batch_size", 2, "--resume")]
        return f"{fault}sys.argv = {argv!r}\nsft.guarded(sft.main)\n"

    what = "os.environ['RANK'] == '1' and os.kill(os.getpid(), 15)"
    for out, fault in [
        ("whole", ""),
        ("run", at_call("sft", "schedule", 13, what)),
        ("run", ""),
    ]:
        done = on_ranks("sft", code(tmp_path / out, fault))
        if fault:
            assert done.returncode == 1 and "stopped by SIGTERM at step 7; " in done.stdout
            assert done.stderr == "" and (tmp_path / "run/checkpoint-7").exists()
        else:
            assert done.returncode == 0, done.stderr[-3000:]
    assert is_as(tmp_path / "run", tmp_path / "whole")


def test_a_bad_gradient_on_one_rank_stops_all_before_the_update(sft_data, tmp_path):
    argv = ["sft.py", *sft_flags(sft_data, tmp_path / "run", *LONG)]
    code = (
        "real, calls, step_of = sft.weighted_nll, [], torch.optim.AdamW.step\n"
        "def poisoned(model, *args):\n"
        "    calls.extend([1] * model.training)\n"
        "    bad = len(calls) == 3 and model.training and os.environ['RANK'] == '1'\n"
        "    return real(model, *args) * (float('nan') if bad else 1)\n"
        "updates = []\n"
        "def counted(self, *args, **kwargs):\n"
        "    updates.append(1)\n"
        "    return step_of(self, *args, **kwargs)\n"
        "torch.optim.AdamW.step = counted\n"
        f"sft.weighted_nll = poisoned\nsys.argv = {argv!r}\n"
        "try:\n    sft.main()\nfinally:\n    os.write(1, b'updates %d\\n' % len(updates))\n"
    )
    done = on_ranks("sft", code)
    assert done.returncode != 0
    assert done.stdout.count("updates 2\n") == 2
    assert "step 2: the gradient's norm is nan on lines " in done.stderr


def test_a_run_holds_what_the_design_says(uninterrupted):
    assert {path.name for path in uninterrupted.iterdir()} == {
        *("args.json", "config.json", "metrics.jsonl", "model.safetensors", "report.json"),
        *("samples.jsonl", "tokenizer.json", "tokenizer_config.json"),
        *("script.py", "tokens.py", "model.py", "run.py", "feedback.py"),
    }
    assert load_config(uninterrupted)["stage"] == "sft"
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == [0, 3, 5, 6, 9, 10, 12, 12]
    assert [("eval_loss" in line) for line in lines] == [1, 0, 1, 0, 0, 1, 0, 1]
    for line in lines:
        assert math.isfinite(line.get("loss", 0)) and 0 <= line.get("padding", 0) < 0.4


# --- JSON Lines -----------------------------------------------------------------------------------

GOOD = b'{"prompt": "p", "response": "r"}\n'
MALFORMED = {
    "not JSON": (GOOD + b"{prompt: 1}\n", "2: line: not JSON"),
    "cut off": (GOOD + b'{"prompt": "p", "resp', "2: line: not JSON"),
    "two on a line": (GOOD.strip() + GOOD, "1: line: not JSON"),
    "not an object": (GOOD + b"\n \n[1, 2]\n", "4: line: expected an object, got list"),
    "missing field": (GOOD + b'{"prompt": "p"}\n', "2: response: is missing"),
    "wrong type": (
        GOOD + b'{"prompt": "p", "response": [3]}\n',
        "2: response: expected a string, got [3]",
    ),
    "null": (GOOD + b'{"prompt": null, "response": "r"}\n', "2: prompt: expected a string"),
    "NaN": (GOOD + b'{"prompt": "p", "response": "r", "x": NaN}\n', "2: line: not JSON: NaN"),
    "infinity": (GOOD + b'{"prompt": "p", "x": -Infinity}\n', "2: line: not JSON: -Infinity"),
    "empty text": (GOOD + b'{"prompt": "p", "response": " "}\n', "2: response: is empty"),
    "bad UTF-8": (GOOD + b'{"prompt": "\xff", "response": "r"}\n', "2: line: not UTF-8"),
    "surrogate": (GOOD + b'{"prompt": "\\ud800", "response": "r"}\n', "2: line: not UTF-8"),
    "deep": (GOOD + b'{"prompt": ' + b"[" * 200000 + b"\n", "2: line: not JSON"),
    "empty file": (b"", "0: file: is empty"),
    "blank lines alone": (b"\n \n", "0: file: is empty"),
    "truncated gzip": (None, "line: not a whole gzip file"),
    "damaged gzip": (None, "line: not a whole gzip file"),
    "wrong sum of gzip": (None, "line: not a whole gzip file"),
    "not gzip": (None, "line: not a whole gzip file"),
    "missing file": (None, "0: file: can't be read: No such file"),
    "a directory": (None, "0: file: can't be read: Is a directory"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_lines_are_refused(name, tmp_path, capsys):
    path = tmp_path / ("bad.jsonl.gz" if "gzip" in name else "bad.jsonl")
    lines = gzip.compress(b"".join(GOOD.replace(b'"p"', b'"%d"' % i) for i in range(9999)))
    if MALFORMED[name][0] is not None:
        path.write_bytes(MALFORMED[name][0])
    elif "gzip" in name:
        data = {
            "truncated": lines[: len(lines) // 2],
            "damaged": lines[:10] + b"\xff" * 40 + lines[50:],
            "wrong": lines[:-8] + bytes(4) + lines[-4:],
            "not": GOOD,
        }
        path.write_bytes(data[name.split()[0]])
    elif name == "a directory":
        path.mkdir()
    with pytest.raises(SystemExit) as ended:
        list(read_jsonl(path, {"prompt": True, "response": False}))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.count("\n") == 1 and message.startswith(f"{path}:")
    assert MALFORMED[name][1] in message


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + GOOD)
    assert len(list(read_jsonl(tmp_path / "a.jsonl", {"prompt": True}))) == 2


def test_json_has_no_nan(tmp_path):
    """Null in its place, wherever it stands, in all files that are written."""
    found = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "NaN", 2)}], "d": True}
    wanted = {"a": None, "b": [1.5, None, {"c": [None, "NaN", 2]}], "d": True}
    module.write_json(tmp_path / "a.json", found)
    module.write_jsonl(tmp_path / "b.jsonl", [found])
    module.append_line(tmp_path / "c.jsonl", found)
    for name in ("a.json", "b.jsonl", "c.jsonl"):
        assert json.loads((tmp_path / name).read_text(), parse_constant=int) == wanted


def test_good_lines(tmp_path):
    text = '{"prompt": "", "response": " é", "x": [1]}\n\n{"prompt": "a\\nb", "response": "c"}'
    (tmp_path / "a.jsonl").write_text(text, "utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = tmp_path / name
        found = list(read_jsonl(path, {"prompt": True, "response": False}))
        assert [where for where, _ in found] == [f"{path}:1", f"{path}:3"]
        assert found[0][1] == {"prompt": "", "response": " é", "x": [1]}
        assert found[1][1] == {"prompt": "a\nb", "response": "c"}


def test_a_bad_line_ends_a_script_with_its_status(sft_data, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b'{"prompt": "p"}\n')
    for flag in ("--data", "--validation"):
        argv = ["sft.py", *sft_flags(sft_data, tmp_path / "run", flag, path)]
        done = on_ranks("sft", f"sys.argv = {argv!r}\nsft.guarded(sft.main)\n", 1)
        assert done.returncode == 2 and done.stderr == f"{path}:2: response: is missing\n"
    assert not (tmp_path / "run").exists()


def test_what_is_written_is_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    module.write_jsonl(path, [{"a": "é\n"}, {"b": 1}])
    assert path.read_text() == '{"a": "\\u00e9\\n"}\n{"b": 1}\n'

    def half():
        yield {"c": 1}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        module.write_jsonl(path, half())
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"] and len(read_lines(path)) == 2
    module.append_line(path, {"a": math.nan, "b": -math.inf, "c": 1.5, "d": "x"})
    assert read_lines(path)[2] == {"a": None, "b": None, "c": 1.5, "d": "x"}
    with pytest.raises(OSError, match=r"none/a.jsonl: could not be written: .*No such file"):
        module.append_line(tmp_path / "none/a.jsonl", {})


# --- the scripts as files -------------------------------------------------------------------------

OURS = ("tokens", "model", "run", "feedback")
SOURCES = sorted(ROOT.glob("*.py"))
SCRIPTS = [path for path in SOURCES if path.stem not in OURS]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
DATA = sorted((ROOT / "data").glob("*.py"))
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {"numpy", "torch", "tiktoken", "safetensors", "matplotlib"}
MOST_EQUAL_LINES = 12


def own_lines(path):
    """(number, text) of a source's lines but its imports' and blank ones."""
    text = path.read_text()
    imports = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= {*range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    return [(n, line.strip()) for n, line in lines if line.strip() and n not in imports]


def test_no_two_files_share_a_passage():
    """Of equal lines that follow each other, at most 12; what is longer has one place."""
    n, seen, shared = MOST_EQUAL_LINES + 1, {}, {}
    for path in [*SOURCES, *EXPERIMENTS]:
        lines = own_lines(path)
        for i in range(len(lines) - n + 1):
            passage = tuple(line for _, line in lines[i : i + n])
            there, line = seen.setdefault(passage, (path, lines[i][0]))
            if there != path:
                shared.setdefault((there.name, path.name), f"from lines {line} and {lines[i][0]}")
    assert not shared


def functions(path):
    """{name: source} of the functions in a file, nested ones too, but for a class's methods."""
    text, found = path.read_text(), {}
    tree, lines = ast.parse(text), text.splitlines()
    owners = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {node for owner in owners for node in owner.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node not in methods:
            found[node.name] = lines[node.lineno - 1 : node.end_lineno]
    return found


def test_a_function_stands_in_one_file():
    seen, twice = {}, []
    for path in SOURCES:
        for name in functions(path):
            if name not in ("main", "check") and seen.setdefault(name, path.name) != path.name:
                twice.append((name, seen[name], path.name))
    assert not twice
    # data/'s programs go without ours: what they share is the same text, but for a refusal, which
    # has no ranks and no run there, and what rewards of one's own define.
    sources = {name: text for path in SOURCES for name, text in functions(path).items()}
    for path in DATA:
        for name, text in functions(path).items():
            if name not in ("main", "check", "refuse", "score", "explain"):
                assert sources.setdefault(name, text) == text, (path.name, name)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_scripts_import_four_files_of_ours_and_nothing_else():
    for path in SCRIPTS:
        assert set(imports(path)) <= STANDARD | ALLOWED | set(OURS), path.name
    for i, name in enumerate(OURS):
        assert set(imports(ROOT / f"{name}.py")) <= STANDARD | ALLOWED | set(OURS[:i]), name
    for path in DATA:
        more = {"torch", "safetensors"} if path.stem == "smollm2" else set()
        assert set(imports(path)) <= STANDARD | {"numpy"} | more, path.name


def test_nothing_is_pickled():
    for path in [*SOURCES, *EXPERIMENTS, *DATA]:
        found = re.findall(
            r"torch\.(?:save|load)\(|pickle\.|(?<!\.)\beval\(|\bexec\(", path.read_text()
        )
        assert found == [], path.name


# In a fork that has imported torch: our modules are forgotten, and found where it is told.
ELSEWHERE = """
import runpy, signal
ours = [{root!r}, {root!r} + '/data', {root!r} + '/tests']
for name, known in list(sys.modules.items()):
    if os.path.dirname(getattr(known, '__file__', None) or '') in ours:
        del sys.modules[name]
sys.path[:] = [{place!r}, *(path for path in sys.path if path not in ('', *ours))]
os.chdir({folder!r})
"""


def in_a_fork(folder, place, code):
    paths = {name: str(path) for name, path in {"folder": folder, "place": place}.items()}
    return on_ranks("json", ELSEWHERE.format(root=str(ROOT), **paths) + code, 1)


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_a_script_runs_elsewhere_with_the_four_files_alone(script, tmp_path, toy_data, rl_data):
    """Copied into an empty folder, a script shows its help; sft.py and ppo.py train."""
    for name in (script, *(f"{name}.py" for name in OURS)):
        shutil.copy(ROOT / name, tmp_path)
    commands = [["--help"]]
    if script == "sft.py":
        lines = (toy_data / "demonstrations.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "mine.jsonl").write_text("".join(lines[:20]))
        shutil.copy(toy_data / "bpe.tiktoken", tmp_path)
        words = "--data mine.jsonl --validation mine.jsonl --prompts= --tokenizer bpe.tiktoken"
        commands.append([*words.split(), *"--n_embd 16 --n_layer 1 --steps 2".split()])
    if script == "ppo.py":
        (tmp_path / "mine.py").write_text("def score(prompt, response, **fields): return 1.0\n")
        words = f"--prompts {rl_data / 'prompts.jsonl'} --validation= --init {rl_data / 'policy'}"
        words += " --reward mine.py --steps 2 --batch_size 4 --max_new_tokens 4"
        commands.append(words.split())
    for words in commands:
        code = f"sys.argv = {[script, *words]!r}\nrunpy.run_path({script!r}, run_name='__main__')\n"
        done = in_a_fork(tmp_path, tmp_path, code)
        assert done.returncode == 0, done.stderr[-3000:]
        assert words != ["--help"] or script in done.stdout
    if len(commands) > 1:
        assert (tmp_path / f"runs/{Path(script).stem}/report.json").exists()
        kept = (tmp_path / f"runs/{Path(script).stem}/script.py").read_bytes()
        assert kept == (ROOT / script).read_bytes()


def test_importing_a_script_does_nothing(tmp_path):
    """It says nothing, writes nothing, takes no signal and draws no number."""
    names = [path.stem for path in SOURCES]
    code = (
        "sys.argv, sys.dont_write_bytecode = ['x', '--help'], True\n"
        "before = torch.get_rng_state(), signal.getsignal(signal.SIGTERM), dict(os.environ)\n"
        f"for name in {names!r}:\n"
        f"    assert __import__(name).__file__ == {str(ROOT)!r} + f'/{{name}}.py'\n"
        "after = torch.get_rng_state(), signal.getsignal(signal.SIGTERM), dict(os.environ)\n"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]\n"
        "assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()\n"
    )
    done = in_a_fork(tmp_path, ROOT, code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("", "", [])


def config_classes():
    """(script, class) of all flags."""
    for path in SOURCES:
        known = vars(importlib.import_module(path.stem)).values()
        classes = [cls for cls in known if isinstance(cls, type) and issubclass(cls, ProcessFlags)]
        yield from [(path.name, cls) for cls in classes if cls.__module__ == path.stem]


def test_flags_that_all_have_stand_once():
    """A script declares such a flag again only where its default or its help is another, and
    out_dir, which parts its flags into two groups."""
    found = dict(config_classes())
    assert found.keys() == {path.name for path in SOURCES} - {"model.py", "tokens.py"}
    for script, cls in config_classes():
        for name, hint in cls.__annotations__.items():
            for base in cls.__mro__[1:-1] if name != "out_dir" else ():
                same = hint == base.__annotations__.get(name)
                assert not same or getattr(cls, name) != getattr(base, name), (script, name)


def test_help_of_every_script_has_its_flags(parsed):
    for script, cls in config_classes():
        doc = importlib.import_module(script[:-3]).__doc__
        text, status = parsed("--help", config=cls)
        assert status == 0 and all(f"--{name}" in text for name in vars(cls())), script
        if script.removesuffix(".py") not in OURS:
            assert len(re.findall(rf"\b{script}\b", doc)) >= 2, script  # two commands
        # Defaults are of their types, within their bounds, and need nothing.
        assert parsed(config=cls) == cls()
