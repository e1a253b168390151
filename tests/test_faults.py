"""What survives what: faults planted in every script that trains, and what must come of them.

    make test-faults             # the whole matrix: every fault in every script, many times
    make test-faults QUICK=1     # few times each

`make test` has most of them once, without the mark, here and in the tests of the scripts.
FAULTS_SEED (0) draws moments, places and damage. What was tried, survived and lost is printed.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, gradient, metrics, policy_of_arms, read_lines, weights, write_jsonl
from ranks import on_ranks

from feedback import add_scalar_head
from model import load_model, save_model
from run import sha256

matrix = pytest.mark.faults
QUICK = bool(os.environ.get("QUICK"))
SEED = int(os.environ.get("FAULTS_SEED", 0))
SIZES = "--n_layer 1 --n_embd 32 --n_head 2 --initializer_range 0.1 --max_length 96"

# {script: its flags beside --out_dir}; {data} is the fixture's folder. A few seconds each.
COMMANDS = {
    "sft": f"--data {{data}}/demonstrations.jsonl --validation {{data}}/held_demonstrations.jsonl "
    f"--prompts {{data}}/held.jsonl --tokenizer {{data}}/bpe.tiktoken {SIZES} --steps 150 "
    "--dropout 0.1 --eval_every 40 --save_every 15 --log_every 5",
    "reward": "--data {data}/rankings.jsonl --validation {data}/held_rankings.jsonl "
    "--prompts {data}/prompts.jsonl --init {data}/policy --num_prompts 64 --epochs 3 "
    "--batch_size 8 --save_every 10 --eval_every 20 --max_new_tokens 8",
    "ppo": "--prompts {data}/prompts.jsonl --validation {data}/held.jsonl --init {data}/policy "
    "--reward {data}/reward --max_new_tokens 8 --num_prompts 32 --steps 40 --batch_size 32 "
    "--minibatch_size 8 --kl_target 0.5 --save_every 4 --eval_every 10",
    "grpo": "--prompts {data}/prompts.jsonl --validation {data}/held.jsonl --init {data}/policy "
    "--reward {data}/reward --max_new_tokens 8 --num_prompts 32 --steps 40 --batch_size 32 "
    "--minibatch_size 8 --advantage reinforce --num_samples 2 --save_every 4 --eval_every 10",
    "dpo": "--data {data}/rankings.jsonl --validation {data}/held_rankings.jsonl "
    "--cache {data}/cache --prompts {data}/held.jsonl --init {data}/policy --num_prompts 32 "
    "--epochs 6 --batch_size 8 --save_every 10 --eval_every 40 --max_new_tokens 8",
    "dpo --online": "--online {data}/reward --train_prompts {data}/prompts.jsonl --rounds 12 "
    "--round_prompts 40 --batch_size 8 --save_every 7 --eval_every 20 --init {data}/policy "
    "--validation {data}/held_rankings.jsonl --cache {data}/cache --prompts {data}/held.jsonl "
    "--num_prompts 32 --max_new_tokens 8",
    "rlaif direct": "direct --prompts {data}/prompts.jsonl --validation {data}/held.jsonl "
    "--init {data}/policy --judge {data}/policy --template {data}/template.txt --steps 60 "
    "--batch_size 32 --max_new_tokens 8 --num_prompts 32 --save_every 6 --eval_every 20",
    "collapse": "--data {data}/kinds.jsonl --validation {data}/held_kinds.jsonl --init "
    "{data}/policy --prompts {data}/prompts.jsonl --num_prompts 64 --epochs 12 --batch_size 8 "
    "--save_every 10 --eval_every 20 --max_new_tokens 8",
}
# The same in six steps or so, checkpoints at every other: for faults that are tried at each place.
FEW = {
    "sft": "--data {data}/few.jsonl --steps 6 --batch_size 8 --save_every 2 --eval_every 3 "
    "--log_every 1 --num_prompts 8 --max_new_tokens 8",
    "reward": "--data {data}/few_rankings.jsonl --epochs 2 --batch_size 4 --num_prompts 16 "
    "--save_every 2 --eval_every 3 --log_every 1",
    "ppo": "--steps 6 --batch_size 8 --minibatch_size 4 --num_prompts 8 --save_every 2 "
    "--eval_every 3",
    "grpo": "--steps 6 --batch_size 8 --minibatch_size 4 --num_prompts 8 --save_every 2 "
    "--eval_every 3",
    "dpo": "--data {data}/few_rankings.jsonl --epochs 2 --batch_size 4 --num_prompts 8 "
    "--save_every 2 --eval_every 3 --log_every 1",
    "dpo --online": "--rounds 3 --round_prompts 8 --batch_size 4 --num_prompts 8 --save_every 2 "
    "--eval_every 3 --log_every 1",
    "rlaif direct": "--steps 6 --batch_size 8 --num_prompts 8 --save_every 2 --eval_every 3",
    "collapse": "--epochs 3 --batch_size 16 --num_prompts 16 --save_every 2 --eval_every 3 "
    "--log_every 1",
}
# Functions that a script calls in each phase, and the call at which the fault comes.
PHASES = {
    "sft": {"rollout": ("respond", 2), "evaluation": ("held_out_loss", 2)},
    "reward": {"rollout": ("ended_rows", 1), "evaluation": ("score_examples", 2)},
    "ppo": {"rollout": ("sample_step", 4), "evaluation": ("respond", 3)},
    "grpo": {"rollout": ("sample_step", 4), "evaluation": ("respond", 3)},
    "dpo": {"rollout": ("respond", 2), "evaluation": ("pair_numbers", 5)},
    "dpo --online": {"rollout": ("sample_rollout", 3), "evaluation": ("pair_numbers", 5)},
    "rlaif direct": {"rollout": ("sample_step", 4), "evaluation": ("respond", 3)},
    "collapse": {"rollout": ("ended_rows", 1), "evaluation": ("score_examples", 2)},
}
LOSSES = {
    "sft": "weighted_nll",
    "reward": "ranking_loss",
    "ppo": "policy_loss",
    "grpo": "clipped_loss",
    "dpo": "preference_loss",
    "dpo --online": "preference_loss",
    "rlaif direct": "reinforce",
    "collapse": "prompt_aware_loss",
}
SCRIPTS = list(COMMANDS)


def module_of(script):
    return script.split()[0]


def argv_of(script, data, out, *more, few=True):
    """The command: later flags overrule earlier ones."""
    flags = COMMANDS[script] + (f" {FEW[script]}" if few else "")
    flags = flags.format(data=data).split()
    return [f"{module_of(script)}.py", *flags, "--device", "cpu", "--out_dir", str(out), *more]


def code_of(script, argv, fault=""):
    """What a rank runs: the script, as its command does, after a fault was planted in it."""
    name = module_of(script)
    planted = fault.replace("SCRIPT", name)
    begin = f"import run, signal, time\n{planted}\nsys.argv = {argv!r}\n"
    return f"{begin}run.guarded({name}.main)\n"


def at_call(function, call, what, rank=0):
    """A fault: `what` runs just before that call of SCRIPT.function, on one rank."""
    return (
        f"real_{function}, calls_{function} = SCRIPT.{function}, []\n"
        f"def {function}(*args, **kwargs):\n"
        f"    calls_{function}.append(1)\n"
        f"    if len(calls_{function}) == {call} and os.environ.get('RANK', '0') == '{rank}':\n"
        f"        {what}\n"
        f"    return real_{function}(*args, **kwargs)\n"
        f"SCRIPT.{function} = {function}\n"
    )


def at_step(step, what, rank=0):
    """A fault: `what` runs once, as that step (from 1) sets its learning rate, on one rank."""
    return (
        "real_schedule, reached = SCRIPT.schedule, []\n"
        "def schedule(step, *args):\n"
        f"    if step == {step - 1} and not reached and os.environ.get('RANK', '0') == '{rank}':\n"
        "        reached.append(1)\n"
        f"        {what}\n"
        "    return real_schedule(step, *args)\n"
        "SCRIPT.schedule = schedule\n"
    )


def at_save(number, what, rank=0):
    """A fault: `what` runs just before a run's checkpoint of that number is written."""
    return (
        "real_save, saves = run.Run.save, []\n"
        "def save(self):\n"
        "    saves.extend([1] * (self.step > self.saved))\n"
        f"    late = len(saves) == {number} and self.step > self.saved\n"
        f"    if late and os.environ.get('RANK', '0') == '{rank}':\n"
        f"        {what}\n"
        "    return real_save(self)\n"
        "run.Run.save = save\n"
    )


def same(out, other):
    """Whether two finished runs left the same weights, logs and samples, clocks aside."""

    def steps(run):
        lines = metrics(run)
        return [{k: v for k, v in line.items() if not k.endswith("_share")} for line in lines]

    logs = ("samples.jsonl", "rounds.jsonl")
    return (
        weights(out) == weights(other)
        and steps(out) == steps(other)
        and all((out / x).is_file() == (other / x).is_file() for x in logs)
        and all(
            (out / x).read_bytes() == (other / x).read_bytes() for x in logs if (out / x).is_file()
        )
    )


def checkpoints(out):
    """{name of a checkpoint: {file: contents}}."""
    return {
        folder.name: {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in sorted(out.glob("checkpoint-*"))
    }


def tell(capsys, text):
    with capsys.disabled():
        print(f"\n{text} (seed {SEED})", flush=True)


@pytest.fixture(scope="module")
def data(toy_data, policy_run, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, source, count in [
        ("demonstrations.jsonl", "demonstrations.jsonl", 2000),
        ("few.jsonl", "demonstrations.jsonl", 21),
        ("held_demonstrations.jsonl", "demonstrations_validation.jsonl", 64),
        ("rankings.jsonl", "rankings.jsonl", 200),
        ("few_rankings.jsonl", "rankings.jsonl", 11),
        ("held_rankings.jsonl", "rankings_validation.jsonl", 32),
        ("kinds.jsonl", "rankings_kinds.jsonl", 32),
        ("held_kinds.jsonl", "rankings_kinds_validation.jsonl", 8),
        ("prompts.jsonl", "prompts_train.jsonl", 300),
        ("held.jsonl", "prompts_validation.jsonl", 32),
    ]:
        write_jsonl(folder / name, read_lines(toy_data / source)[:count])
    (folder / "bpe.tiktoken").write_bytes((toy_data / "bpe.tiktoken").read_bytes())
    ratings = json.dumps([f" {i}" for i in range(1, 11)])
    text = f"--- rate\n{{prompt}} {{response}} Mark:\n--- ratings\n{ratings}\n"
    (folder / "template.txt").write_text(text)
    policy = load_model(policy_run)
    save_model(folder / "policy", policy, tokenizer, {"stage": "sft"})
    statistics = {"reward_mean": 0.1, "reward_std": 1.2, "score_transform": "identity"}
    save_model(folder / "reward", add_scalar_head(policy), tokenizer, statistics)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """whole(script, ranks): the run in few steps that nothing interrupted."""
    made = {}

    def run(script, ranks=1):
        if (script, ranks) not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            done = on_ranks(module_of(script), code_of(script, argv_of(script, data, out)), ranks)
            assert done.returncode == 0, done.stderr[-3000:]
            made[script, ranks] = out
        return made[script, ranks]

    return run


def go_on(script, data, out, ranks=1):
    """The same command once more, with --resume."""
    argv = argv_of(script, data, out, "--resume")
    done = on_ranks(module_of(script), code_of(script, argv), ranks)
    assert done.returncode == 0, done.stderr[-3000:]


# --- kill -9 --------------------------------------------------------------------------------------


def start(script, data, out, more=""):
    flags = argv_of(script, data, out, *more.split(), "--resume", few=False)
    return subprocess.Popen(
        [sys.executable, str(ROOT / flags[0]), *flags[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@matrix
@pytest.mark.parametrize("script", SCRIPTS)
def test_kill_at_random_moments(script, data, tmp_path, capsys):
    """kill -9 at a random moment of the run, then --resume: weights and metrics of the end are
    those of the uninterrupted run, bit for bit."""
    rng, repeats = random.Random(f"{SEED} {script}"), 1 if QUICK else 20
    began = time.monotonic()
    process = start(script, data, tmp_path / "whole")
    assert process.wait(600) == 0, process.stderr.read()
    seconds = time.monotonic() - began
    killed = survived = 0
    for repeat in range(repeats):
        out = tmp_path / str(repeat)
        process = start(script, data, out)
        try:
            process.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            process = start(script, data, out)
        assert process.wait(600) == 0, process.stderr.read()
        survived += same(out, tmp_path / "whole")
    tell(
        capsys,
        f"{script}: a run of {seconds:.1f} s, {repeats} tried, {killed} killed in the run, "
        f"{survived} survived bit-identical, {repeats - survived} lost",
    )
    assert survived == repeats


# Every operation on files within a save is a place to die at: before it, or just after.
IN_THE_SAVE = """
done, saves, inside = [], [], []
def numbered(module, name):
    real = getattr(module, name)
    def counted(*args, **kwargs):
        if inside:
            done.append(1)
            if (len(saves), len(done), 'before') == DIE:
                os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if inside and (len(saves), len(done), 'after') == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(module, name, counted)
import pathlib, shutil
for module, name in [(os, 'replace'), (os, 'fsync'), (shutil, 'rmtree'), (pathlib.Path, 'mkdir')]:
    numbered(module, name)
numbered(run, 'save_file')
real_save = run.Run.save
def save(self):
    if self.step <= self.saved:
        return real_save(self)
    saves.append(1)
    inside.append(1)
    done.clear()
    real_save(self)
    if TELL:
        os.write(1, b'operations %d\\n' % len(done))
    inside.clear()
run.Run.save = save
"""


def killed_in_the_save(script, data, out, die):
    fault = IN_THE_SAVE.replace("DIE", repr(die)).replace("TELL", repr(die is None))
    return on_ranks(module_of(script), code_of(script, argv_of(script, data, out), fault), 1)


def kills_in_the_save(script, data, whole, tmp_path, repeats):
    """-> how many of `repeats` kills within a save survived: what stands there is whole, and the
    end is bit-identical."""
    rng = random.Random(f"{SEED} save {script}")
    done = killed_in_the_save(script, data, tmp_path / "counted", None)
    counts = [int(n.split()[0]) for n in done.stdout.split("operations ")[1:]]
    assert done.returncode == 0 and len(counts) >= 3 and min(counts) >= 8, done.stderr[-2000:]
    places = [
        (save, operation, side)
        for save, count in enumerate(counts, 1)
        for operation in range(1, count + 1)
        for side in ("before", "after")
    ]
    survived = 0
    for repeat in range(repeats):
        out, die = tmp_path / str(repeat), rng.choice(places)
        done = killed_in_the_save(script, data, out, die)
        assert done.returncode == -signal.SIGKILL, (die, done.stderr[-2000:])
        go_on(script, data, out)
        survived += same(out, whole(script))
    return survived


@matrix
@pytest.mark.parametrize("script", SCRIPTS)
def test_kill_within_the_save(script, data, whole, tmp_path, capsys):
    repeats = 1 if QUICK else 50
    survived = kills_in_the_save(script, data, whole, tmp_path, repeats)
    tell(
        capsys,
        f"{script}: {repeats} killed within a save, {survived} survived bit-identical, "
        f"{repeats - survived} lost",
    )
    assert survived == repeats


def test_a_kill_within_the_save(data, whole, tmp_path):
    assert kills_in_the_save("ppo", data, whole, tmp_path, 1) == 1


DIE_ONCE = "os.path.exists(DIED) or (open(DIED, 'w').close(), os.kill(os.getpid(), signal.SIGKILL))"


def restarts(script, data, out, died):
    """torchrun --max-restarts 1, one of its two ranks dying in the middle."""
    fault = at_step(4, DIE_ONCE.replace("DIED", repr(str(died))), rank=1)
    driver = out.with_suffix(".py")
    paths = f"import os, sys, torch\nsys.path[:0] = [{str(ROOT)!r}]\n"
    argv = argv_of(script, data, out, "--resume", "--timeout_s", "30")
    driver.write_text(f"{paths}import {module_of(script)}\n{code_of(script, argv, fault)}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, "--max-restarts=1", str(driver)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@matrix
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_rank_dies_under_max_restarts(script, data, whole, tmp_path, capsys):
    done = restarts(script, data, tmp_path / "run", tmp_path / "died")
    assert done.returncode == 0 and (tmp_path / "died").exists(), done.stderr[-3000:]
    survived = same(tmp_path / "run", whole(script, 2))
    tell(capsys, f"{script}: 1 rank died and was started again, {int(survived)} bit-identical")
    assert survived


def test_a_rank_dies_once(data, whole, tmp_path):
    done = restarts("ppo", data, tmp_path / "run", tmp_path / "died")
    assert done.returncode == 0 and (tmp_path / "died").exists(), done.stderr[-3000:]
    assert same(tmp_path / "run", whole("ppo", 2))


# --- the disk -------------------------------------------------------------------------------------

# The limit on a file's size stands for the disk: what goes beyond it fails as on a full one.
FULL = "import resource\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + at_save(
    "SAVE", "resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES,) * 2)"
)


def full_disks(script, data, whole, tmp_path, repeats):
    rng, survived = random.Random(f"{SEED} disk {script}"), 0
    for repeat in range(repeats):
        out, save = tmp_path / str(repeat), rng.choice([1, 2, 3])
        fault = FULL.replace("SAVE", str(save)).replace("BYTES", str(rng.randrange(1_000, 20_000)))
        done = on_ranks(module_of(script), code_of(script, argv_of(script, data, out), fault), 1)
        assert done.returncode == 1, (done.returncode, done.stderr[-2000:])
        assert done.stderr.count("\n") == 1 and "could not be written" in done.stderr, done.stderr
        assert str(out) in done.stderr
        left = checkpoints(out)
        before = 2 * save - (4 if script == "rlaif direct" else 2)  # that one saves at step 0 too
        assert list(left) == ([f"checkpoint-{before}"] if save > 1 else []), left.keys()
        go_on(script, data, out)
        survived += same(out, whole(script))
    return survived


@matrix
@pytest.mark.parametrize("script", SCRIPTS)
def test_full_disks(script, data, whole, tmp_path, capsys):
    repeats = 1 if QUICK else 20
    survived = full_disks(script, data, whole, tmp_path, repeats)
    tell(
        capsys,
        f"{script}: {repeats} full disks in a save, {survived} survived bit-identical, "
        f"{repeats - survived} lost",
    )
    assert survived == repeats


def test_a_full_disk(data, whole, tmp_path):
    assert full_disks("ppo", data, whole, tmp_path, 1) == 1


def test_space_is_checked_before_a_save(data, whole, tmp_path):
    """What can't fit is not begun: one line says what is needed and what is free."""
    fault = (
        "from collections import namedtuple\nimport shutil\n"
        "usage = namedtuple('usage', 'total used free')\n"
        + at_save(2, "shutil.disk_usage = lambda path: usage(9, 9, 1000)")
    )
    argv = argv_of("ppo", data, tmp_path / "run")
    done = on_ranks("ppo", code_of("ppo", argv, fault), 1)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert (
        "run/checkpoint-4: not written: 0.0" in done.stderr and "GiB that are free" in done.stderr
    )
    assert list(checkpoints(tmp_path / "run")) == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    go_on("ppo", data, tmp_path / "run")
    assert same(tmp_path / "run", whole("ppo"))


# --- damaged, tampered and foreign checkpoints ----------------------------------------------------

# A run goes on from its checkpoint after the script was offered many damaged copies of it.
DAMAGED = """
import contextlib, io, json, random
real_read = run.Run.read_checkpoint
def read_checkpoint(self, path):
    rng, counts = random.Random(DRAW), {'tried': 0, 'refused': 0}
    files = sorted(path.iterdir())
    for repeat in range(2 * REPEATS):
        file = files[repeat % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        if repeat < REPEATS:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(whole.strip())):]
        file.write_bytes(damaged)
        said = io.StringIO()
        counts['tried'] += 1
        try:
            with contextlib.redirect_stderr(said):
                real_read(self, path)
        except SystemExit as ended:
            named = file.name in said.getvalue() or file.name == 'sha256.json'
            one_line = said.getvalue().count('\\n') == 1 and str(path) in said.getvalue()
            counts['refused'] += ended.code == 2 and named and one_line
        file.write_bytes(whole)
    os.write(1, f'counts {json.dumps(counts)}\\n'.encode())
    return real_read(self, path)
run.Run.read_checkpoint = read_checkpoint
"""


def interrupted(script, data, out):
    """A run that was killed in its fourth step, and left a checkpoint."""
    fault = at_step(4, "os.kill(os.getpid(), signal.SIGKILL)")
    argv = argv_of(script, data, out)
    done = on_ranks(module_of(script), code_of(script, argv, fault), 1)
    assert done.returncode == -signal.SIGKILL and checkpoints(out), done.stderr[-2000:]


def damaged_checkpoints(script, data, whole, out, repeats):
    """-> {"tried", "refused"} of `repeats` flipped bits and as many truncations."""
    interrupted(script, data, out)
    fault = DAMAGED.replace("REPEATS", str(repeats)).replace("DRAW", repr(f"{SEED} {script}"))
    argv = argv_of(script, data, out, "--resume")
    done = on_ranks(module_of(script), code_of(script, argv, fault), 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(out, whole(script))
    return json.loads(done.stdout.split("counts ")[1].splitlines()[0])


@matrix
@pytest.mark.parametrize("script", SCRIPTS)
def test_damaged_checkpoints(script, data, whole, tmp_path, capsys):
    counts = damaged_checkpoints(script, data, whole, tmp_path / "run", 20 if QUICK else 200)
    tell(capsys, f"{script}: {counts['tried']} damaged checkpoints, {counts['refused']} refused")
    assert counts["tried"] == counts["refused"]


def test_a_damaged_checkpoint(data, whole, tmp_path):
    counts = damaged_checkpoints("ppo", data, whole, tmp_path / "run", 6)
    assert counts == {"tried": 12, "refused": 12}


def refusals_of_checkpoints(script, data, out, *chosen):
    """Damage with its sha256 put right, and what belongs to others; those named, or all.
    -> what was said."""
    interrupted(script, data, out)
    (folder,) = out.glob("checkpoint-*")
    kept = out.with_name("kept")
    shutil.copytree(folder, kept)

    def rehash():
        names = ("tensors.safetensors", "state.json")
        hashes = {name: sha256(folder / name) for name in names}
        (folder / "sha256.json").write_text(json.dumps(hashes))

    def of_another_model():
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "tensors.safetensors")
        name = next(name for name in tensors if name.endswith("wte.weight"))
        tensors[name] = tensors[name][:-1].contiguous()
        save_file(tensors, folder / "tensors.safetensors")
        rehash()

    def of_another_script():
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {"script": "other.py"}))
        rehash()

    def with_a_pickle():
        (folder / "optimizer.pt").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch /tmp/x'\ntR.")

    def no_tensors():
        (folder / "tensors.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n.")
        rehash()

    said = {}
    for change in (of_another_model, of_another_script, with_a_pickle, no_tensors):
        if chosen and change.__name__ not in chosen:
            continue
        change()
        argv = argv_of(script, data, out, "--resume")
        done = on_ranks(module_of(script), code_of(script, argv), 1)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        said[change.__name__] = done.stderr
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    return said


@matrix
@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_of_others(script, data, whole, tmp_path, capsys):
    out = tmp_path / "run"
    few = ("with_a_pickle", "of_another_script", "no_tensors") if QUICK else ()
    said = refusals_of_checkpoints(script, data, out, *few)
    assert "optimizer.pt: a file that no script of ours wrote" in said["with_a_pickle"]
    assert "of other.py" in said["of_another_script"]
    assert "tensors.safetensors" in said["no_tensors"]
    assert QUICK or "tensors.safetensors" in said["of_another_model"]
    go_on(script, data, out)
    assert same(out, whole(script))
    tell(capsys, f"{script}: {len(said)} checkpoints of others, {len(said)} refused by name")


def test_a_foreign_checkpoint(data, tmp_path):
    said = refusals_of_checkpoints("ppo", data, tmp_path / "run", "with_a_pickle", "no_tensors")
    assert "optimizer.pt: a file that no script of ours wrote" in said["with_a_pickle"]
    assert "tensors.safetensors" in said["no_tensors"]


# --- signals and ranks ----------------------------------------------------------------------------


def terms_one_rank(script, phase, data, out):
    """SIGTERM to the second of two ranks in a phase; both must stop together."""
    term = "os.kill(os.getpid(), signal.SIGTERM)"
    if phase == "update":
        fault = at_step(3, term, rank=1)
    elif phase == "save":
        fault = at_save(1, term, rank=1)
    else:
        fault = at_call(*PHASES[script][phase], term, rank=1)
    argv = argv_of(script, data, out, "--timeout_s", "60")
    done = on_ranks(module_of(script), code_of(script, argv, fault))
    assert done.returncode == 1 and "stopped by SIGTERM" in done.stdout, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert not (out / "report.json").exists()


@matrix
@pytest.mark.parametrize(
    ("script", "phase"),
    [
        (script, phase)
        for i, script in enumerate(SCRIPTS)
        for j, phase in enumerate(["rollout", "update", "evaluation", "save"])
        if not QUICK or i % 4 == j  # in few: a phase each
    ],
)
def test_sigterm_to_one_rank(script, phase, data, whole, tmp_path, capsys):
    terms_one_rank(script, phase, data, tmp_path / "run")
    argv = argv_of(script, data, tmp_path / "run", "--timeout_s", "60", "--resume")
    done = on_ranks(module_of(script), code_of(script, argv))
    assert done.returncode == 0, done.stderr[-3000:]
    survived = same(tmp_path / "run", whole(script, 2))
    tell(
        capsys, f"{script}: SIGTERM to one rank in {phase}, {int(survived)} survived bit-identical"
    )
    assert survived


def test_sigterm_to_one_rank_of_ppo(data, whole, tmp_path):
    terms_one_rank("ppo", "rollout", data, tmp_path / "run")
    go_on("ppo", data, tmp_path / "run", 2)
    assert same(tmp_path / "run", whole("ppo", 2))


def nan_on_one_rank(script, data, out):
    """The loss of one rank's micro-batch is NaN: all ranks end before the update, in one line that
    names the step, and the checkpoint before it is as it was."""
    fault = (
        f"real_loss, calls_loss = SCRIPT.{LOSSES[script]}, []\n"
        "def poisoned(*args, **kwargs):\n"
        "    found = real_loss(*args, **kwargs)\n"
        "    calls_loss.append(torch.is_grad_enabled())\n"
        f"    late = sum(calls_loss) > {8 if script in ('ppo', 'grpo') else 4} and calls_loss[-1]\n"
        "    if not late or os.environ['RANK'] != '1':\n"
        "        return found\n"
        "    bad = float('nan')\n"
        "    return (found[0] * bad, *found[1:]) if isinstance(found, tuple) else found * bad\n"
        f"SCRIPT.{LOSSES[script]} = poisoned\n"
    )
    done = on_ranks(module_of(script), code_of(script, argv_of(script, data, out), fault))
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "nan" in done.stderr, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1 and "stopped before the update" in done.stderr, done.stderr
    assert re.match(r"step \d+: the gradient's norm is nan", done.stderr), done.stderr
    assert checkpoints(out) and not (out / "report.json").exists()


@matrix
@pytest.mark.parametrize("script", SCRIPTS)
def test_nan_on_one_rank(script, data, whole, tmp_path, capsys):
    nan_on_one_rank(script, data, tmp_path / "run")
    go_on(script, data, tmp_path / "run", 2)
    survived = same(tmp_path / "run", whole(script, 2))
    tell(capsys, f"{script}: NaN on one rank, {int(survived)} survived bit-identical")
    assert survived


def test_nan_on_one_rank_of_ppo(data, tmp_path):
    nan_on_one_rank("ppo", data, tmp_path / "run")


# The rank waits for the signal that the job's end brings, as a hung disk would for ever.
STUCK = "(signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.pause())"


def stuck_rank(script, data, out):
    fault = at_step(4, STUCK, rank=1)
    argv = argv_of(script, data, out, "--timeout_s", "10")
    done = on_ranks(module_of(script), code_of(script, argv, fault))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "rank 0: no answer within --timeout_s from rank 1, or it is gone" in done.stderr
    assert checkpoints(out)


@matrix
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stuck_rank_is_named(script, data, whole, tmp_path, capsys):
    out = tmp_path / "run"
    stuck_rank(script, data, out)
    argv = argv_of(script, data, out, "--timeout_s", "600", "--resume")
    done = on_ranks(module_of(script), code_of(script, argv))
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(out, whole(script, 2))
    tell(capsys, f"{script}: a stuck rank, 1 job ended and named it, 1 survived bit-identical")


def test_a_stuck_rank(data, tmp_path):
    stuck_rank("ppo", data, tmp_path / "run")


def test_an_overflow_on_one_rank_skips_the_step_on_all(data, tmp_path):
    """float16: the second rank's gradient overflows in one update; both skip it, both halve the
    scale, and their weights stay the same."""
    fault = (
        "real_loss, calls_loss, scales = SCRIPT.policy_loss, [], []\n"
        "def overflows(*args):\n"
        "    calls_loss.append(1)\n"
        "    big = len(calls_loss) == 3 and os.environ['RANK'] == '1'\n"
        "    return real_loss(*args) * (1e38 if big else 1)\n"
        "SCRIPT.policy_loss = overflows\n"
        "real_update = torch.amp.GradScaler.update\n"
        "def update(self):\n"
        "    real_update(self)\n"
        "    scales.append(self.get_scale())\n"
        "torch.amp.GradScaler.update = update\n"
        "real_finish = run.Run.finish\n"
        "def finish(self, report):\n"
        "    total = sum(p.double().sum().item() for m in self.modules.values()\n"
        "                for p in m.parameters())\n"
        "    print('ended', [a / b for a, b in zip(scales, scales[1:])], total, flush=True)\n"
        "    real_finish(self, report)\n"
        "run.Run.finish = finish\n"
    )
    argv = argv_of("ppo", data, tmp_path / "run", "--dtype", "float16", "--validation", "")
    done = on_ranks("ppo", code_of("ppo", argv, fault))
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert len(told) == 2 and told[0] == told[1], told
    _, third, *later = json.loads(told[0].removeprefix("ended ").rsplit(" ", 1)[0])
    assert third == 2 and set(later) == {1}, told  # the first may overflow by itself


@matrix
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_twice_the_same(script, ranks, data, whole, tmp_path, capsys):
    """The same command, twice: the same weights, metrics and samples, and but for clocks, memory
    and names the same report."""
    done = on_ranks(
        module_of(script), code_of(script, argv_of(script, data, tmp_path / "run")), ranks
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(tmp_path / "run", whole(script, ranks))
    reports = []
    for out in (tmp_path / "run", whole(script, ranks)):
        report = json.loads((out / "report.json").read_text())
        clocks = ("seconds", "memory", "per_s")
        reports.append({k: v for k, v in report.items() if not any(c in k for c in clocks)})
    assert reports[0] == reports[1]
    tell(capsys, f"{script} on {ranks} ranks, twice: identical")


def test_ppo_twice_the_same(data, whole, tmp_path):
    done = on_ranks("ppo", code_of("ppo", argv_of("ppo", data, tmp_path / "run")))
    assert done.returncode == 0 and same(tmp_path / "run", whole("ppo", 2)), done.stderr[-2000:]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@matrix
@pytest.mark.parametrize("script", ["sft", "reward", "dpo", "collapse"])
def test_two_agents_take_the_same_gradient(script, data, tmp_path, capsys):
    """A job of two nodes in small: two torchrun agents on loopback with 1 + 1 and 2 + 1 ranks take
    the first step of one process, to 1e-12, on lines that no number of ranks divides."""
    steps = "--epochs 1" if script != "sft" else "--steps 1"
    more = [*steps.split(), "--dtype", "float64", "--batch_size", "64", "--save_every", "1"]
    more += ["--eval_every", "0", "--validation", "", "--device", "cpu"]
    more += ["--dropout", "0"] * (script == "sft") + ["--cache", ""] * (script == "dpo")
    more += ["--prompts", ""] * (script in ("sft", "dpo"))
    more += ["--data", f"{data}/few.jsonl"] * (script == "sft")
    keep = "import shutil\nshutil.rmtree = lambda *args, **kwargs: None"
    for name, nodes in [("one", ()), ("two", (1, 1)), ("three", (2, 1))]:
        out, agents = tmp_path / name, []
        code = code_of(script, argv_of(script, data, out, *more), keep)
        if not nodes:
            done = on_ranks(module_of(script), code, 1)
            assert done.returncode == 0, done.stderr[-3000:]
            continue
        driver, port = tmp_path / f"{name}.py", free_port()
        paths = f"import os, sys, torch\nsys.path[:0] = [{str(ROOT)!r}]\n"
        driver.write_text(f"{paths}import {module_of(script)}\n{code}")
        for node, count in enumerate(nodes):
            command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(nodes)}"]
            command += [f"--nproc_per_node={count}", f"--node_rank={node}"]
            command += ["--master_addr=localhost", f"--master_port={port}"]
            agents.append(
                subprocess.Popen(
                    [*command, str(driver)],
                    stderr=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
        try:
            for agent in agents:
                error = agent.communicate(timeout=300)[1]
                assert agent.returncode == 0, error[-3000:]
        finally:
            for agent in agents:
                agent.kill()
    expected, found = gradient(tmp_path / "one"), []
    for name in ("two", "three"):
        found.append(((gradient(tmp_path / name) - expected).norm() / expected.norm()).item())
    tell(capsys, f"{script}: 2 and 3 ranks of two agents, gradients off by {found}")
    assert max(found) < 1e-12


@matrix
def test_memory_is_flat(tokenizer, tmp_path, capsys):
    """2,000 iterations of PPO in small: what is resident after the first 200 stays within 5%, and
    no descriptor is left open."""
    policy_of_arms(tmp_path / "policy", tokenizer)
    (tmp_path / "arms.py").write_text(
        "def score(prompt, response, **fields): return len(response) / 8\n"
    )
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Which?"}])
    steps = 400 if QUICK else 2000
    argv = ["ppo.py", "--init", tmp_path / "policy", "--reward", tmp_path / "arms.py"]
    argv += ["--validation", "", "--prompts", tmp_path / "prompts.jsonl", "--max_new_tokens", 2]
    argv += ["--device", "cpu", "--steps", steps, "--batch_size", 4, "--minibatch_size", 2]
    argv += ["--save_every", 50, "--out_dir", tmp_path / "run"]
    seen = (
        "real_rate = SCRIPT.schedule\n"
        "def schedule(step, *rest):\n"
        "    if step % 200 == 199:\n"
        "        pages = int(open('/proc/self/statm').read().split()[1])\n"
        "        files = len(os.listdir('/proc/self/fd'))\n"
        "        os.write(1, b'seen %d %d\\n' % (pages, files))\n"
        "    return real_rate(step, *rest)\n"
        "SCRIPT.schedule = schedule\n"
    )
    done = on_ranks("ppo", code_of("ppo", list(map(str, argv)), seen), 1, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("seen")]
    pages, files = ([int(row[i]) for row in rows] for i in (0, 1))
    mib = [round(n * os.sysconf("SC_PAGE_SIZE") / 2**20) for n in pages]
    tell(capsys, f"ppo, {steps} iterations: resident {mib} MiB, {files} descriptors")
    assert max(pages) <= 1.05 * pages[0] and max(files) == files[0]


@matrix
@pytest.mark.parametrize("script", SCRIPTS[:1] if QUICK else SCRIPTS)
def test_compiled_models_are_the_same(script, data, tmp_path):
    """--compile: sums have another order, and that is all, where nothing is dropped (dropout, when
    compiled, draws its own numbers). Outputs are compared, not weights: those without effect, the
    biases of keys, have rounding errors for gradients, which Adam scales to whole steps."""
    few = "--steps 2" if "online" not in script else "--rounds 1"
    few += " --dropout 0" * (script == "sft")
    runs = []
    for name in ("compiled", "plain"):
        more = f"{few} --eval_every 0 --save_every 0" + " --compile" * (name == "compiled")
        process = start(script, data, tmp_path / name, more)
        assert process.wait(900) == 0, process.stderr.read()
        model = load_model(tmp_path / name)
        runs.append(model(torch.arange(64).view(2, 32)))
    assert torch.allclose(*runs, atol=1e-3)


@matrix
@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpointed_activations_are_the_same(script, data, whole, tmp_path):
    """--checkpoint_activations: less memory, the same weights, bit for bit; a run that stopped for
    want of memory goes on with it."""
    argv = argv_of(script, data, tmp_path / "run", "--checkpoint_activations")
    done = on_ranks(module_of(script), code_of(script, argv), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(tmp_path / "run", whole(script, 2))
    interrupted(script, data, tmp_path / "stopped")
    argv = argv_of(script, data, tmp_path / "stopped", "--resume", "--checkpoint_activations")
    done = on_ranks(module_of(script), code_of(script, argv), 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(tmp_path / "stopped", whole(script))
