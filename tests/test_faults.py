"""The long form of what survives what: the real scripts, as a user starts them, killed at random.

    make test-faults             # 20 moments in each script
    make test-faults QUICK=1     # 2

Not part of `make test`, whose tests inject each fault once, at chosen places. FAULTS_SEED (0) draws
the moments; what was tried and survived is printed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, metrics, read_lines, weights, write_jsonl

from model import load_model, save_model

pytestmark = pytest.mark.faults
REPEATS = 2 if os.environ.get("QUICK") else 20
SMALL = "--n_layer 1 --n_embd 32 --n_head 2 --initializer_range 0.1 --max_length 96"

# {script: its flags beside --out_dir}; {data} is the fixture's folder.
COMMANDS = {
    "sft": f"--data {{data}}/demonstrations.jsonl --validation {{data}}/held_demonstrations.jsonl "
    f"--prompts {{data}}/held.jsonl --tokenizer {{data}}/bpe.tiktoken {SMALL} --steps 150 "
    "--dropout 0.1 --eval_every 40 --save_every 15 --log_every 5",
    "reward": "--data {data}/rankings.jsonl --validation {data}/held_rankings.jsonl "
    "--prompts {data}/prompts.jsonl --init {data}/policy --num_prompts 64 --epochs 3 "
    "--batch_size 8 --save_every 10 --eval_every 20 --max_new_tokens 8",
    "ppo": "--prompts {data}/prompts.jsonl --validation {data}/held.jsonl --init {data}/policy "
    "--reward {data}/reward --max_new_tokens 8 --num_prompts 32 --steps 40 --batch_size 32 "
    "--minibatch_size 8 --kl_target 0.5 --save_every 4 --eval_every 10",
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
}


@pytest.fixture(scope="module")
def data(toy_data, policy_run, tokenizer, tmp_path_factory):
    import reward

    folder = tmp_path_factory.mktemp("data")
    for name, source, count in [
        ("demonstrations.jsonl", "demonstrations.jsonl", 2000),
        ("held_demonstrations.jsonl", "demonstrations_validation.jsonl", 64),
        ("rankings.jsonl", "rankings.jsonl", 200),
        ("held_rankings.jsonl", "rankings_validation.jsonl", 32),
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
    save_model(folder / "reward", reward.add_scalar_head(policy), tokenizer, statistics)
    return folder


def start(script, data, out, more=""):
    flags = (COMMANDS[script].format(data=data) + more).split()
    command = [sys.executable, str(ROOT / f"{script.split()[0]}.py"), *flags, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out_dir", str(out), "--resume"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("script", COMMANDS)
def test_kill_at_random_moments(script, data, tmp_path, capsys):
    """kill -9 at a random moment of the run, then --resume: weights and metrics of the end are
    those of the uninterrupted run, bit for bit."""
    seed = int(os.environ.get("FAULTS_SEED", 0))
    rng = random.Random(f"{seed} {script}")
    began = time.monotonic()
    process = start(script, data, tmp_path / "whole")
    assert process.wait(600) == 0, process.stderr.read()
    whole = time.monotonic() - began

    def steps(out):  # without what depends on the clock
        lines = metrics(out)
        return [{k: v for k, v in line.items() if not k.endswith("_share")} for line in lines]

    killed = survived = 0
    for repeat in range(REPEATS):
        out = tmp_path / str(repeat)
        process = start(script, data, out)
        try:
            process.wait(rng.uniform(0, whole))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            process = start(script, data, out)
        assert process.wait(600) == 0, process.stderr.read()
        same = weights(out) == weights(tmp_path / "whole")
        survived += same and steps(out) == steps(tmp_path / "whole")
    with capsys.disabled():
        print(
            f"\n{script}: seed {seed}, a run of {whole:.1f} s, {REPEATS} tried, {killed} killed in "
            f"the run, {survived} ended bit-identical, {REPEATS - survived} did not"
        )
    assert survived == REPEATS


@pytest.mark.skipif("QUICK" in os.environ and os.environ["QUICK"] != "", reason="minutes")
@pytest.mark.parametrize("script", COMMANDS)
def test_compiled_models_are_the_same(script, data, tmp_path):
    """--compile: sums have another order, and that is all, where nothing is dropped (dropout, when
    compiled, draws its own numbers). Outputs are compared, not weights: those without effect, the
    biases of keys, have rounding errors for gradients, which Adam scales to whole steps."""
    few = "--steps 2" if "online" not in script else "--rounds 1"
    few += " --dropout 0" * (script == "sft")
    runs = []
    for name in ("compiled", "plain"):
        more = f" {few} --eval_every 0 --save_every 0" + " --compile" * (name == "compiled")
        process = start(script, data, tmp_path / name, more)
        assert process.wait(900) == 0, process.stderr.read()
        model = load_model(tmp_path / name)
        runs.append(model(torch.arange(64).view(2, 32)))
    assert torch.allclose(*runs, atol=1e-3)
