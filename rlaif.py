"""AI feedback: Constitutional AI (Bai et al., arXiv:2212.08073) and RLAIF (Lee et al.,
arXiv:2309.00267).

A language model, the judge, stands where people stood. It is asked which of two responses is
better, in both orders, and the next token's probabilities are the answer:

    p(first is better) = (softmax(l_1, l_2)_1 + softmax(l'_1, l'_2)_2) / 2

l being the log-probabilities of the answers "1" and "2", l' those with the responses swapped, for a
judge prefers positions too. The soft labels train a reward model (reward.py) or a policy (dpo.py).
Or the judge rates single responses, 1 to 10, and what it expects is the reward, by REINFORCE with a
learned baseline and no reward model in between:

    score = sum_i i p(i), on [-1, 1];  Z = (1 - beta) score - beta KL;  loss = -log pi(y|x) (Z - V)

Simplified against the papers: one update a rollout, and no cleaning of the responses' ends.

    python rlaif.py label --samples runs/feedback/samples.jsonl --judge runs/judge     # preferences
    python rlaif.py agree --data comparisons.jsonl --judges runs/judge    # how good a judge is
    python rlaif.py revise --policy runs/sft --judge runs/critic --prompts prompts.jsonl     # CAI
    python rlaif.py direct --init runs/sft --judge runs/rater             # RLAIF by ratings
    torchrun --nproc_per_node=8 rlaif.py direct --init runs/sft --judge runs/rater --lr 1e-5
    python rlaif.py label --samples samples.jsonl --judge http://localhost:8000/v1 --judge_model M \
        --template data/prompts/harmless.txt --constitution data/constitution.json

Sub-commands: label, agree, revise, direct. Each has its own --help.
"""

import argparse
import copy
import dataclasses
import datetime
import gc
import gzip
import hashlib
import http.client
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import typing
import urllib.error
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from model import (
    GPT,
    at_least_float32,
    check_space,
    check_tokenizer,
    encode,
    entropy,
    generate,
    load_config,
    load_model,
    load_tokenizer,
    pad,
    predicts,
    read_json,
    save_model,
    text_of,
    token_logprobs,
    weight_files,
    whole_file,
    write_json,
)

BLOCK = 64  # requests that a judge in this process answers at once
# How far a token's probability may be from itself in two forwards, as a share of it: sums round
# otherwise among other rows. Measured: 4e-6 in float32 on the embedded task, 1.5e-5 with logits
# near -100; 0.013 in float16, 0.11 in bfloat16. The bugs that are looked for change it far more.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}
# What an iteration's update sums over tokens or episodes.
DIRECT_SUMS = ("policy_loss", "value_loss", "entropy", "kl", "objective")
WIN_RATE = ("eval_win_rate", "eval_win_rate_low", "eval_win_rate_high")
# What must stand in the sections of a template.
FIELDS = {
    "sample": ("{prompt}", "{response_1}", "{response_2}"),
    "rate": ("{prompt}", "{response}"),
    "critique": ("{prompt}", "{response}", "{principle}"),
    "revision": ("{critique}",),
    "principle": ("{principle}",),
    "ending": (),
    "ending rationale": (),
}
EXEMPLAR = ("prompt", "response_1", "response_2", "rationale")
# What comes of JSON that is none, or none of the form that was expected.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    samples: Annotated[
        str, "prompts with responses, or rankings; by commas: one policy's each, to be compared"
    ] = "runs/feedback/samples.jsonl"
    judge: Annotated[str, "a GPT run directory, or the URL of a server, with its /v1"] = (
        "runs/judge"
    )
    judge_model: Annotated[str, "the server's name of the model"] = ""
    template: Annotated[str, "how to ask"] = "data/prompts/toy.txt"
    variant: Annotated[
        str, "base or detailed, with +cot (reasons first), +2shot, +8samples, +t0.7"
    ] = "base+cot"
    constitution: Annotated[str, "JSON list of principles, one drawn a pair; empty: none"] = ""
    clamp: Annotated[
        str, "probabilities no nearer to 0 and 1, low,high (CAI with rationales: 0.4,0.6)"
    ] = ""
    hard: Annotated[bool, "labels of 1 for the likelier, in the place of probabilities"] = False
    pairs: Annotated[int, "pairs a prompt, drawn at random; 0: all"] = 1
    mix: Annotated[str, "comparisons that are written first: people's, of helpfulness"] = ""
    num_prompts: Annotated[int, "how many prompts, from the file's start; 0: all"] = 0
    out_dir: Annotated[str, "run directory"] = "runs/labels"
    max_rationale_tokens: Annotated[int, "longest rationale (Lee et al.: 512)"] = 128
    top_logprobs: Annotated[int, "likely tokens that a server is asked for (OpenAI: 5)"] = 5
    in_flight: Annotated[int, "requests to a server at once"] = 8
    reply_s: Annotated[float, "a server's time to reply, seconds"] = 60.0
    retries: Annotated[int, "how often a request is repeated"] = 5
    backoff_s: Annotated[float, "seconds before the first repetition, doubled each time"] = 1.0
    seed: Annotated[int, "of pairs, principles and rationales"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[str, "float32, bfloat16, float16, float64; empty: float32"] = ""
    resume: Annotated[bool, "go on with out_dir's labelling, or start if none"] = False
    overwrite: Annotated[bool, "delete the run in out_dir first"] = False


@dataclasses.dataclass(frozen=True)
class ReviseConfig:
    prompts: Annotated[str, "prompts to respond to, harmful ones among them"] = (
        "data/toy/prompts_train.jsonl"
    )
    policy: Annotated[str, "helpful-only policy that responds first: a run directory"] = "runs/sft"
    judge: Annotated[str, "who criticises and revises: a run directory, or a server's URL"] = (
        "runs/critic"
    )
    judge_model: Annotated[str, "the server's name of the model"] = ""
    template: Annotated[str, "how to ask, with sections critique and revision"] = (
        "data/prompts/toy.txt"
    )
    constitution: Annotated[str, "JSON list of principles, one drawn a revision"] = (
        "data/constitution.json"
    )
    revisions: Annotated[int, "of each response, one after another (CAI: 4)"] = 1
    temperature: Annotated[float, "of responses, critiques and revisions (CAI: 1)"] = 1.0
    max_new_tokens: Annotated[int, "longest response, critique or revision, tokens"] = 48
    mix: Annotated[str, "helpful demonstrations to add; empty: none"] = ""
    mix_weight: Annotated[float, "how often these are passed over (0.5: half of them)"] = 1.0
    num_prompts: Annotated[int, "how many prompts, from the file's start; 0: all"] = 0
    gold: Annotated[str, "Python file whose score and parts are shown by revision"] = ""
    out_dir: Annotated[str, "run directory"] = "runs/revisions"
    in_flight: Annotated[int, "requests to a server at once"] = 8
    reply_s: Annotated[float, "a server's time to reply, seconds"] = 60.0
    retries: Annotated[int, "how often a request is repeated"] = 5
    backoff_s: Annotated[float, "seconds before the first repetition, doubled each time"] = 1.0
    seed: Annotated[int, "of principles and samples"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[str, "float32, bfloat16, float16, float64; empty: float32"] = ""
    resume: Annotated[bool, "go on with out_dir's revisions, or start if none"] = False
    overwrite: Annotated[bool, "delete the run in out_dir first"] = False


@dataclasses.dataclass(frozen=True)
class AgreeConfig:
    data: Annotated[str, "comparisons or rankings by people, whose order judges are held to"] = (
        "runs/feedback_validation/rankings.jsonl"
    )
    gold: Annotated[str, "Python file whose score is the truth, in the place of the order"] = ""
    judges: Annotated[str, "run directories and URLs, by commas"] = "runs/judge"
    judge_model: Annotated[str, "the server's name of the model"] = ""
    template: Annotated[str, "how to ask"] = "data/prompts/toy.txt"
    variants: Annotated[str, "see label's --variant; by commas"] = (
        "base,detailed,base+1shot,detailed+1shot,base+cot,detailed+cot"
    )
    num_prompts: Annotated[int, "how many lines, a pair of each; 0: all"] = 1000
    out_dir: Annotated[str, "run directory"] = "runs/agreement"
    max_rationale_tokens: Annotated[int, "longest rationale (Lee et al.: 512)"] = 128
    top_logprobs: Annotated[int, "likely tokens that a server is asked for (OpenAI: 5)"] = 5
    in_flight: Annotated[int, "requests to a server at once"] = 8
    reply_s: Annotated[float, "a server's time to reply, seconds"] = 60.0
    retries: Annotated[int, "how often a request is repeated"] = 5
    backoff_s: Annotated[float, "seconds before the first repetition, doubled each time"] = 1.0
    seed: Annotated[int, "of pairs and rationales"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[str, "float32, bfloat16, float16, float64; empty: float32"] = ""
    resume: Annotated[bool, "go on with out_dir's answers, or start if none"] = False
    overwrite: Annotated[bool, "delete the run in out_dir first"] = False


@dataclasses.dataclass(frozen=True)
class DirectConfig:
    prompts: Annotated[str, "prompts to respond to"] = "data/toy/prompts_train.jsonl"
    validation: Annotated[str, "held-out prompts; empty: none"] = (
        "data/toy/prompts_validation.jsonl"
    )
    init: Annotated[str, "policy to start from, and the reference: a run directory"] = "runs/sft"
    judge: Annotated[
        str, "who rates: a GPT run directory, or the URL of a server, with its /v1"
    ] = "runs/rater"
    judge_model: Annotated[str, "the server's name of the model"] = ""
    template: Annotated[str, "how to ask, with sections rate and ratings"] = "data/prompts/toy.txt"
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) is the truth"] = ""
    out_dir: Annotated[str, "run directory"] = "runs/direct"
    beta: Annotated[float, "KL coefficient (Lee et al.: 0.05)"] = 0.1
    missing_eos_score: Annotated[
        str,
        "if a response did not end, the smaller of this and the batch's lowest; none: its own",
    ] = "-1"
    steps: Annotated[int, "iterations, each of batch_size episodes and one update"] = 100
    batch_size: Annotated[int, "episodes an iteration, over all ranks (Lee et al.: 128)"] = 64
    micro_batch_size: Annotated[int, "episodes a forward on one rank; 0: all of its share"] = 0
    lr: Annotated[float, "the policy's peak learning rate (Lee et al.: 1e-5)"] = 1e-4
    value_lr: Annotated[float, "the value network's"] = 1e-3
    warmup: Annotated[int, "iterations of linear warm-up"] = 4
    final_lr: Annotated[float, "last rate over peak rate, by a cosine"] = 0.1
    adam_beta2: Annotated[float, "Adam's second-moment decay (Llama 2: 0.95)"] = 0.95
    adam_eps: Annotated[float, "Adam's epsilon (OpenAI 2019, Llama 2: 1e-5)"] = 1e-5
    weight_decay: Annotated[float, "AdamW's, on matrices (Llama 2: 0.1)"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm, of each network"] = 1.0
    temperature: Annotated[float, "of sampling, and of every log-probability (theirs: 0.9)"] = 1.0
    max_new_tokens: Annotated[int, "longest response, tokens"] = 48
    num_prompts: Annotated[int, "held-out prompts in the last evaluation; others: a quarter"] = 1000
    top_logprobs: Annotated[int, "likely tokens that a server is asked for; ten answers: 20"] = 20
    in_flight: Annotated[int, "requests to a server at once, of each rank"] = 8
    reply_s: Annotated[float, "a server's time to reply, seconds"] = 60.0
    retries: Annotated[int, "how often a request is repeated"] = 5
    backoff_s: Annotated[float, "seconds before the first repetition, doubled each time"] = 1.0
    seed: Annotated[int, "of order and samples"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[
        str, "float32, bfloat16, float16, float64; empty: bfloat16 on cuda, else float32"
    ] = ""
    compile: Annotated[bool, "torch.compile the policy and the value network"] = False
    checkpoint_activations: Annotated[bool, "less memory: a block's computed anew in backward"] = (
        False
    )
    log_every: Annotated[int, "iterations between printed lines"] = 1
    eval_every: Annotated[int, "iterations between evaluations; 0: only at the end"] = 20
    save_every: Annotated[int, "iterations between checkpoints; 0: only at the end"] = 20
    timeout_s: Annotated[int, "a collective that takes longer ends the job, seconds"] = 600
    resume: Annotated[bool, "go on from out_dir's last checkpoint, or start if none"] = False
    overwrite: Annotated[bool, "delete the run in out_dir first"] = False


# --- plumbing: the same text in every script (tests/test_copies.py) ---

stop_signals = []  # the SIGTERMs that came to this rank
stores = []  # torchrun's, where ranks leave word for each other


def refuse(message):
    """Ends the script for bad input: one line, exit status 2."""
    # What is quoted in it may be of any length, and of many lines.
    print(" ".join(f"{message}".splitlines())[:2000], file=sys.stderr, flush=True)
    sys.exit(2)


def parse_config(config_class, doc, command=""):
    """`config_class` from the command line; its annotations are the flags' help.

    `command`: the sub-command that stands before the flags; "": the script's main job.
    """
    form = argparse.RawDescriptionHelpFormatter
    name = f"{Path(sys.argv[0]).name} {command}".strip()
    parser = argparse.ArgumentParser(name, None, doc, formatter_class=form, allow_abbrev=False)
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind, text = hints[field.name].__origin__, hints[field.name].__metadata__[0]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        text = f"{text} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **how)
    cfg = config_class(**vars(parser.parse_args(sys.argv[2:] if command else None)))
    for name, value in vars(cfg).items():
        if type(value) in (int, float) and not 0 <= value < math.inf:
            parser.error(f"--{name}: expected a number of at least 0, got {value}")
    dtype = getattr(cfg, "dtype", "")
    if dtype not in ("", "float32", "bfloat16", "float16", "float64"):
        parser.error(f"--dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    return cfg


def start_process(cfg):
    """-> device, dtype, rank, world. torchrun sets the world; without it, a world of one."""
    signal.signal(signal.SIGTERM, lambda *_: stop_signals.append(1))
    name = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        refuse(f"--device {name}: expected cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            refuse(f"--device {name}: there is no such CUDA device here")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    dtype = getattr(torch, cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        limit = datetime.timedelta(seconds=cfg.timeout_s)
        store, rank, world = next(rendezvous("env://", timeout=limit))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps its store when it starts the ranks again: without a name of their own
            # they may read the addresses of those that died, and wait for them. Agents on several
            # nodes count restarts each for itself, so that there such a name would part them.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        stores.append(store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return device, dtype, rank, world


def guarded(main):
    """Runs a script's main(). A disk, an interrupt or another rank that ends it leaves one line and
    a status other than 0; what was saved stays."""
    try:
        main()
    except OSError as error:  # a full disk, a folder that can't be written
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        print("interrupted; what was saved stays", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        # gloo's errors have no type of their own; NCCL's watchdog ends a rank without one.
        if not (stores and ("gloo" in str(error) or isinstance(error, dist.DistError))):
            raise
        silent, said = silent_ranks(), " ".join(str(error).splitlines())
        why = (
            f"no answer within --timeout_s from rank {silent}, or it is gone; what was saved stays"
        )
        sys.exit(
            f"rank {os.environ['RANK']}: {why if silent else 'ranks can not reach each other'} "
            f"({said if len(said) < 400 else said[:200] + ' ... ' + said[-200:]})"
        )


def silent_ranks():
    """Those, as text, that do not say within two seconds that they have waited in vain too: with
    more than two ranks, the lost one may be among others that still wait for it."""
    try:
        stores[0].set(f"waiting {os.environ['RANK']}", "")
        time.sleep(2)
        others = range(int(os.environ["WORLD_SIZE"]))
        return ", ".join(f"{n}" for n in others if not stores[0].check([f"waiting {n}"]))
    except RuntimeError:  # without torchrun rank 0 keeps the store
        return "0"


def all_reduce(values, device):
    """A list of numbers -> their sums over the ranks."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(records, device):
    """The lists of JSON values of all ranks, one after another, on every rank."""
    if not dist.is_initialized():
        return list(records)
    data = torch.tensor(list(json.dumps(records).encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    padded = [data.new_zeros(int(max(sizes))) for _ in sizes]
    dist.all_gather(padded, torch.cat([data, data.new_zeros(len(padded[0]) - len(data))]))
    texts = [bytes(x[:n].tolist()) for x, n in zip(padded, sizes, strict=True)]
    return [record for text in texts for record in json.loads(text)]


def end_process(device):
    """The last thing that a script does. Without torchrun, nothing."""
    if dist.is_initialized():
        all_reduce([0.0], device)  # no rank leaves while another still writes
        # What is left to the interpreter's end would now and then abort the process there, by
        # gloo's threads, after all was done: garbage may still hold the group.
        gc.collect()
        dist.destroy_process_group()


def stop_requested(device):
    """Whether SIGTERM came to any rank. All ranks ask at the same places, so all stop there."""
    return all_reduce([float(len(stop_signals))], device)[0] > 0


def learning_rate(step, total, cfg):
    """The rate of step 0..total-1: linear warm-up, then a cosine from lr to lr * final_lr."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(total - cfg.warmup, 1)
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_of(cfg, inputs, world):
    """What must be the same when a run goes on: flags, number of ranks, sha256 of the inputs."""
    free = ("resume", "overwrite", "timeout_s", "checkpoint_activations")
    settings = {name: value for name, value in vars(cfg).items() if name not in free}
    for path in inputs if cfg.overwrite else ():
        if Path(cfg.out_dir).resolve() in Path(path).resolve().parents:
            refuse(f"{path}: is in --out_dir, which --overwrite would delete")
    return settings | {"world": world} | {f"sha256 of {path}": sha256(path) for path in inputs}


def may_resume(cfg, settings):
    """Whether out_dir holds a run to go on with, all of whose settings are these.

    A run goes on only with the settings, the inputs (files) and the world size that it began with:
    another order of the data would train on some examples twice and on others never.
    """
    out_dir = Path(cfg.out_dir)
    known = (out_dir / "args.json").is_file()
    # What a run that was killed in its first moments left is not in use.
    in_use = out_dir.exists() and any(path.suffix != ".tmp" for path in out_dir.iterdir())
    if in_use and not (known and (cfg.resume or cfg.overwrite)):
        refuse(f"{out_dir}: in use; --resume goes on with its run, --overwrite deletes it")
    if not (known and cfg.resume):
        return False
    try:
        old = dict(read_json(out_dir / "args.json").get("settings", {}))
    except (ValueError, TypeError, OSError) as error:
        refuse(f"{out_dir / 'args.json'}: says no settings, so nothing can be resumed: {error}")
    changed = sorted(k for k in settings.keys() | old.keys() if settings.get(k) != old.get(k))
    if changed:
        changes = [f"{name}: {old.get(name)!r} -> {settings.get(name)!r}" for name in changed]
        refuse(f"{out_dir}: can't resume with other settings: {'; '.join(changes)}")
    if (out_dir / "report.json").exists():
        print(f"{out_dir}: this run is finished", flush=True)
        sys.exit(0)
    return True


def new_run(out_dir, settings):
    """Makes out_dir anew, with args.json and the source that runs."""
    if out_dir.exists():  # renamed first: deleted half, it would look like somebody's folder
        old = out_dir.with_name(f".{out_dir.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out_dir, old)
        shutil.rmtree(old)
    out_dir.mkdir(parents=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    record = {"settings": settings, "command": sys.argv, "versions": versions}
    write_json(out_dir / "args.json", record)
    shutil.copyfile(__file__, out_dir / "script.py")


def open_run(cfg, inputs, device, rank, world):
    """Makes out_dir, or finds what to resume there: the last checkpoint's path, or None."""
    out_dir, settings = Path(cfg.out_dir), settings_of(cfg, inputs, world)
    steps = []
    if may_resume(cfg, settings):
        found = [path.name.removeprefix("checkpoint-") for path in out_dir.glob("checkpoint-*")]
        steps = [int(step) for step in found if step.isdigit()]
    all_reduce([0.0], device)  # every rank has looked; only now may rank 0 change what is there
    if rank == 0 and not steps:
        new_run(out_dir, settings)
    return out_dir / f"checkpoint-{max(steps)}" if steps else None


def append_line(path, record):
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error}") from error


def save_checkpoint(cfg, step, modules, optimizers, state, device, rank):
    """Writes checkpoint-<step>/ under another name, renames it, deletes older ones. All ranks call.

    modules, optimizers: {name: object}, equal on all ranks; state: JSON values (counters, scaler).
    The default generators of every rank, which dropout draws from, are saved too.
    """
    generators = [torch.get_rng_state()]
    if device.type == "cuda":
        generators.append(torch.cuda.get_rng_state(device))
    generators = gather([[bytes(g.tolist()).hex() for g in generators]], device)
    if rank > 0:
        return
    tensors = {}
    for name, module in modules.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{key}": value for key, value in moments.items()}
    final = Path(cfg.out_dir) / f"checkpoint-{step}"
    temporary = final.with_name(".checkpoint.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left of an earlier save
    check_space(final, tensors.values())
    temporary.mkdir()
    try:
        with whole_file(temporary / "tensors.safetensors") as path:
            save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path)
        logs = {log.name: log.stat().st_size for log in final.parent.glob("*.jsonl")}
        state = state | {"step": step, "generators": generators, "logs": logs}
        state["script"] = Path(__file__).name
        write_json(temporary / "state.json", state)
        names = ("tensors.safetensors", "state.json")
        write_json(temporary / "sha256.json", {name: sha256(temporary / name) for name in names})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for path in final.parent.glob("checkpoint-*"):
        if path != final:
            shutil.rmtree(path)


def load_checkpoint(path, modules, optimizers, device, rank):
    """Restores exactly what save_checkpoint wrote, and returns its `state`; refuses anything else.

    No pickle is ever read: a file that someone put beside ours is named, not opened.
    """
    names = ("tensors.safetensors", "state.json")
    expected = {
        f"{name}.{key}": value.shape
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    try:
        known = read_json(path / "sha256.json")
        for name in names:
            if sha256(path / name) != known.get(name):
                raise ValueError(f"{path / name}: damaged: its sha256 is not the recorded one")
        for name in sorted(file.name for file in path.iterdir()):
            if name not in (*names, "sha256.json"):
                raise ValueError(f"{path / name}: a file that no script of ours wrote")
        tensors, state = load_file(path / names[0]), read_json(path / names[1])
        script = state.get("script", "another program")
        if script != Path(__file__).name or len(state.get("generators", [])) <= rank:
            raise ValueError(f"{path / names[1]}: of {script}, or of fewer ranks")
        found = {key: x.shape for key, x in tensors.items() if key.split(".")[0] in modules}
        if found != expected:
            raise ValueError(f"{path / names[0]}: of another model than this run's")
    except SafetensorError as error:
        refuse(f"{path / names[0]}: {error}; this checkpoint can't be resumed")
    except (OSError, ValueError) as error:
        refuse(f"{error}; this checkpoint can't be resumed")
    generators = [torch.tensor(list(bytes.fromhex(g))).byte() for g in state["generators"][rank]]
    torch.set_rng_state(generators[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(generators[1], device)
    for name, module in modules.items():
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in module.state_dict()})
    for name, optimizer in optimizers.items():
        moments = {}
        for key in [key for key in tensors if key.startswith(name + ".")]:
            _, index, moment = key.split(".")
            # A copy, as load_file maps the file, whose room on the disk would not become free.
            moments.setdefault(int(index), {})[moment] = tensors[key].clone()
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    for log in path.parent.glob("*.jsonl") if rank == 0 else ():
        # What was logged after the checkpoint will be logged again.
        os.truncate(log, min(state["logs"].get(log.name, 0), log.stat().st_size))
    return state


def read_jsonl(path, texts):
    """Yields (where, record) for each line of a JSON Lines file, plain or .gz.

    `texts`: {field: whether it may be empty}, the fields that must be there and be strings. The
    first bad line ends the script: `file:line: field: what is wrong`, exit status 2.
    """
    where, number, seen = f"{path}:1", 0, 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                seen += 1
                record = json.loads(line.decode("utf-8"), parse_constant=refuse_constant)
                if not isinstance(record, dict):
                    refuse(f"{where}: line: expected an object, got {type(record).__name__}")
                for name, may_be_empty in texts.items():
                    if name not in record:
                        refuse(f"{where}: {name}: is missing")
                    if not isinstance(record[name], str):
                        found = json.dumps(record[name])[:40]
                        refuse(f"{where}: {name}: expected a string, got {found}")
                    if not may_be_empty and not record[name].strip():
                        refuse(f"{where}: {name}: is empty")
                    record[name].encode("utf-8")  # a lone surrogate is valid JSON, but no text
                yield where, record
    except UnicodeError as error:
        refuse(f"{where}: line: not UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:
        refuse(f"{where}: line: not JSON: {error}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        refuse(f"{path}:{number + 1}: line: not a whole gzip file: {error}")
    except OSError as error:
        refuse(f"{path}:0: file: can't be read: {error.strerror or error}")
    if not seen:
        refuse(f"{path}:0: file: is empty")


def refuse_constant(name):
    raise ValueError(f"{name} is not a JSON number")


# --- end of plumbing ---


# --- data -----------------------------------------------------------------------------------------


def read_responses(where, record, least=2):
    """The line's `responses`, once they and what is parallel to them have been checked."""
    responses = record.get("responses")
    if not isinstance(responses, list) or len(responses) < least:
        refuse(f"{where}: responses: expected a list of {least} or more")
    for i, response in enumerate(responses):
        if not isinstance(response, str) or not response.strip():
            refuse(f"{where}: responses: number {i + 1} is not a string with text in it")
    for name in ("scores", "policy"):
        if isinstance(record.get(name), list) and len(record[name]) != len(responses):
            refuse(f"{where}: {name}: expected {len(responses)} values, one a response")
    return responses


def read_preferences(path):
    """Yields (where, record, responses, pairs) for each line of comparisons or rankings.

    responses: best first. pairs: [(i, j, margin, label)], i before j: response i is better than
    response j with probability `label`, by `margin`. A ranking's margins are the differences of its
    `scores`, where it has them; equal scores are a tie, and no pair.
    """
    for where, record in read_jsonl(path, {"prompt": False}):
        check_task(where, record)
        if "responses" in record:
            responses = read_responses(where, record)
            known = "scores" in record
            scores = record["scores"] if known else list(range(len(responses), 0, -1))
            good = isinstance(scores, list) and all(map(is_number, scores))
            if not good or not all(a >= b for a, b in itertools.pairwise(scores)):
                refuse(f"{where}: scores: expected numbers that fall, as the best comes first")
            pairs = []
            for i, j in itertools.combinations(range(len(responses)), 2):
                if scores[i] > scores[j]:
                    pairs.append((i, j, float(scores[i] - scores[j]) if known else 0.0, 1.0))
            yield where, record, responses, pairs
            continue
        for name in ("chosen", "rejected"):
            if not isinstance(record.get(name), str) or not record[name].strip():
                refuse(f"{where}: {name}: expected a string with text in it")
        margin, label = record.get("margin", 0.0), record.get("label", 1.0)
        if not is_number(margin) or margin < 0:
            refuse(f"{where}: margin: expected a number of at least 0, got {str(margin)[:40]}")
        if not is_number(label) or not 0.5 <= label <= 1:
            refuse(f"{where}: label: expected a probability from 0.5 to 1, got {str(label)[:40]}")
        responses = [record["chosen"], record["rejected"]]
        yield where, record, responses, [(0, 1, float(margin), float(label))]


def check_task(where, record):
    if not isinstance(record.get("task", ""), str):
        refuse(f"{where}: task: expected a string, got {json.dumps(record['task'])[:40]}")


def is_number(value):
    """Whether it is a number that arithmetic stays finite with."""
    return type(value) in (int, float) and abs(value) < 1e30


def split_names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def load_gold(path):
    """A user's Python file as a module: score(prompt, response, **fields), perhaps explain(...)."""
    spec = importlib.util.spec_from_file_location(f"user_file_{Path(path).stem}", path)
    if not Path(path).is_file() or spec is None:
        refuse(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and the like look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        refuse(f"{path}: can't be run: {type(error).__name__}: {error}")
    if not callable(getattr(module, "score", None)):
        refuse(f"{path}: score: no such function; expected score(prompt, response, **fields)")
    return module


def gold_score(gold, line, response):
    """The user's score of a response to a prompt's line: a number, or the script ends."""
    fields = {name: value for name, value in line.items() if name not in ("prompt", "response")}
    try:
        score = float(gold.score(line["prompt"], response, **fields))
    except Exception as error:
        refuse(f"{gold.__file__}: score: {type(error).__name__}: {error}")
    if not math.isfinite(score):
        refuse(f"{gold.__file__}: score: {score} for {response[:40]!r} to {line['prompt'][:40]!r}")
    return score


def gold_parts(gold, line, response):
    """What gold's `explain` says of a response, {name: number}; {} when it has none."""
    if not hasattr(gold, "explain"):
        return {}
    fields = {name: value for name, value in line.items() if name not in ("prompt", "response")}
    try:
        parts = gold.explain(line["prompt"], response, **fields)
        parts = {name: float(value) for name, value in parts.items() if name != "score"}
    except Exception as error:
        refuse(f"{gold.__file__}: explain: {type(error).__name__}: {error}")
    if not all(map(math.isfinite, parts.values())):
        refuse(f"{gold.__file__}: explain: {parts} for {response[:40]!r}: not finite")
    return parts


def judge(gold, line, response):
    """{"gold": score, and the parts that explain it} of a response to a prompt's line."""
    if gold is None:
        return {}
    return {"gold": gold_score(gold, line, response)} | gold_parts(gold, line, response)


def mean_interval(values):
    """[mean, low, high]: the mean and its 95% interval, by the normal approximation.

    A single value has no interval: low and high are None.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return [mean, None, None]
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def rate_interval(hits, counts):
    """[rate, low, high]: sum(hits) / sum(counts) with its 95% interval.

    hits, counts (n,): of groups (prompts), within which pairs are not independent. It is Wilson's
    interval for as many independent pairs as would vary like the groups; for as many pairs as there
    are groups, when nothing varies. One group has no interval.
    """
    hits, counts = np.asarray(hits, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    groups, total = int((counts > 0).sum()), float(counts.sum())
    if groups == 0:
        return [None, None, None]
    rate = float(hits.sum()) / total
    if groups == 1:
        return [rate, None, None]
    variance = ((hits - rate * counts) ** 2).sum() * groups / (groups - 1) / total**2
    n = rate * (1 - rate) / variance if variance > 0 else groups
    z = 1.96
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return [rate, float(centre - half), float(centre + half)]


def grouped_rate(rows):
    """[(group, hit)] -> {"rate": [rate, low, high], "pairs": how many}."""
    groups = {}
    for group, hit in rows:
        hits, count = groups.get(group, (0.0, 0))
        groups[group] = (hits + hit, count + 1)
    values = list(groups.values())
    return {
        "rate": rate_interval([h for h, _ in values], [c for _, c in values]),
        "pairs": len(rows),
    }


def write_jsonl(path, records):
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# --- prompts to judges ----------------------------------------------------------------------------


def read_template(path):
    """The sections of a template, {name: text}: what stands between two `--- name` lines.

    The line break before the next section is not part of a text, so that `ending` can stop exactly
    where the answer's token starts. `answers` and `ratings` are JSON lists of single tokens;
    `exemplars` are JSON Lines with prompt, response_1, response_2, rationale and preferred.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        refuse(f"{path}:0: file: can't be read: {getattr(error, 'strerror', None) or error}")
    found, name = {}, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("--- "):
            name = line[4:].strip()
            if name in found:
                refuse(f"{path}:{number}: {name}: a second section of that name")
            found[name] = []
        elif not name:
            refuse(f"{path}:{number}: line: stands before the first `--- section`")
        else:
            found[name].append(line)
    sections = {name: "\n".join(lines) for name, lines in found.items()}
    for name in ("answers", "ratings"):
        try:
            sections[name] = json.loads(sections.get(name, "[]"))
        except (ValueError, RecursionError) as error:
            refuse(f"{path}:0: {name}: not JSON: {error}")
        good = isinstance(sections[name], list)
        if not good or not all(isinstance(answer, str) and answer for answer in sections[name]):
            refuse(f"{path}:0: {name}: expected a list of strings")
    exemplars = []
    for line in filter(None, sections.get("exemplars", "").splitlines()):
        try:
            exemplar = json.loads(line)
            good = type(exemplar["preferred"]) is int and exemplar["preferred"] in (1, 2)
            good &= all(isinstance(exemplar[name], str) for name in EXEMPLAR)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            refuse(f"{path}:0: exemplars: expected {', '.join(EXEMPLAR)}, preferred (1 or 2)")
        exemplars.append(exemplar)
    for name, fields in FIELDS.items():
        absent = [field for field in fields if name in sections and field not in sections[name]]
        if absent or not sections.get(name, "x").strip():
            refuse(f"{path}:0: {name}: expected text with {', '.join(fields) or 'words'} in it")
    return sections | {"exemplars": exemplars, "path": str(path)}


def section(template, name):
    if name not in template:
        refuse(f"{template['path']}:0: {name}: no such section")
    return template[name]


def filled(text, fields):
    """{name} -> the field's text, stripped; braces in the fields themselves mean nothing."""
    pattern = "|".join(re.escape("{" + name + "}") for name in fields)
    return re.sub(pattern, lambda match: fields[match[0][1:-1]].strip(), text)


def question(template, variant, fields, rationale=None):
    """The prompt that asks which of two responses is better: preamble, exemplars, sample, ending.

    fields: prompt, response_1, response_2, perhaps principle. With a variant that reasons first,
    `rationale` None asks for the rationale, and a text goes before the ending.
    """
    parts, line = [section(template, f"preamble {variant.preamble}")], template.get("break", "\n")
    if len(template["exemplars"]) < variant.exemplars:
        refuse(f"{template['path']}: has {len(template['exemplars'])} exemplars")
    shown = [(e, e["rationale"], e["preferred"]) for e in template["exemplars"]]
    for one, reason, answer in [*shown[: variant.exemplars], (fields, rationale, None)]:
        lines = [filled(section(template, "sample"), one)]
        if "principle" in one:
            lines.append(filled(section(template, "principle"), one))
        if variant.rationale:
            lines.append(section(template, "ending rationale"))
            if reason is None:
                parts.append(line.join(lines))
                break
            lines[-1] += " " + reason.strip()
        lines.append(
            section(template, "ending") + (template["answers"][answer - 1] if answer else "")
        )
        parts.append(line.join(lines))
    return template.get("joint", "\n\n").join(parts)


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a judge is asked: `base` or `detailed`, exemplars, a rationale before the answer, and how
    many of those are sampled (self-consistency, Wang et al. 2022)."""

    preamble: str = "base"
    exemplars: int = 0
    rationale: bool = False
    samples: int = 1
    temperature: float = 0.0

    def __str__(self):
        name = f"{self.preamble} {self.exemplars}-shot" + " CoT" * self.rationale
        name += f" x{self.samples}" * (self.samples > 1)
        return name + f" T={self.temperature:g}" * (self.temperature > 0)


def read_variant(text):
    """detailed+cot+2shot+8samples+t0.7 -> Variant."""
    settings = {}
    for part in text.split("+"):
        number = re.fullmatch(r"(\d+)(shot|samples)|t(\d*\.?\d+)", part)
        if part in ("base", "detailed"):
            settings["preamble"] = part
        elif part == "cot":
            settings["rationale"] = True
        elif number and number[2]:
            settings["exemplars" if number[2] == "shot" else "samples"] = int(number[1])
        elif number:
            settings["temperature"] = float(number[3])
        else:
            refuse(f"variant {text}: {part}: expected base, detailed, cot, 2shot, 4samples, t0.7")
    variant = Variant(**settings)
    if variant.exemplars > 8 or not 1 <= variant.samples <= 64:
        refuse(f"variant {text}: expected at most 8 exemplars, 1 to 64 samples")
    if variant.samples > 1 and not variant.temperature > 0:
        refuse(f"variant {text}: several samples are of rationales (cot) at a temperature (t0.7)")
    if variant.temperature > 0 and not variant.rationale:
        refuse(f"variant {text}: a temperature is of rationales (cot)")
    return variant


# --- judges ---------------------------------------------------------------------------------------


class Judge:
    """Answers requests, and remembers them in a file, so that a labelling that was stopped asks
    nothing twice.

    A request is {"prompt", "answers"}, answered by the answers' log-probabilities as next tokens,
    or {"prompt", "max_tokens", "temperature", "seed"}, answered by a text. `ask` yields lists of
    (index, answer) of requests as they come.
    """

    def __init__(self, name):
        self.name, self.asked, self.absent = name, 0, 0

    def remember(self, memory):
        """Opens the file of answers, before anything is asked."""
        self.memory, self.known = Path(memory), {}
        lines = self.memory.read_bytes() if self.memory.exists() else b""
        self.torn = bool(lines) and not lines.endswith(b"\n")  # the last one, by a kill
        for line in lines.splitlines():
            try:
                record = json.loads(line)
                self.known[record["key"]] = record["answer"]
            except UNREADABLE:
                continue  # torn: asked again
        return self

    def answers(self, requests):
        """The answers of requests, in order. None if told to stop; what was answered is kept."""
        keys = [
            hashlib.sha256(json.dumps([self.name, request]).encode()).hexdigest()
            for request in requests
        ]
        both = zip(keys, requests, strict=True)
        missing = {key: request for key, request in both if key not in self.known}
        if missing:
            missing = self.completed(missing, dict(zip(keys, requests, strict=True)))
        names, done, last_time = list(missing), 0, time.time()
        with open(self.memory, "a", encoding="utf-8") as file:
            if self.torn:
                file.write("\n")
                self.torn = False
            for found in self.ask(list(missing.values())):
                self.known |= {names[index]: answer for index, answer in found}
                # In one piece: what is left to ask after a kill is then whole blocks, too.
                records = [{"key": names[index], "answer": answer} for index, answer in found]
                file.write("".join(json.dumps(record) + "\n" for record in records))
                file.flush()
                done += len(found)
                self.asked += len(found)
                if time.time() - last_time > 30:
                    last_time = time.time()
                    print(f"{self.name.split()[0]}: {done}/{len(names)} answers", flush=True)
        return None if stop_signals else [self.known[key] for key in keys]

    def completed(self, missing, requests):
        """What has to be asked for the missing ones' sake, {key: request}."""
        return missing


class LocalJudge(Judge):
    """A GPT run directory in this process."""

    def __init__(self, directory, device, dtype):
        try:
            self.model, self.tokenizer = load_model(directory), load_tokenizer(directory)
            check_tokenizer(self.tokenizer, directory, load_config(directory))
        except (OSError, ValueError) as error:
            refuse(error)
        if self.model.score is not None:
            refuse(f"--judge {directory}: has a scalar head, no language model's")
        self.model.to(device, dtype).eval().requires_grad_(False)
        self.device = device
        digests = [sha256(path) for path in weight_files(Path(directory))]
        super().__init__(f"{directory} {' '.join(digests)} {dtype}")

    def completed(self, missing, requests):
        """Sampled texts come in blocks, each by one generator: a block is asked again as a whole,
        and so comes out as it would have."""
        keys = list(requests)
        blocks = [keys[i : i + BLOCK] for i in range(0, len(keys), BLOCK)]
        sampled = [key for key in keys if requests[key].get("temperature")]
        if not sampled:
            return missing
        return {key: requests[key] for keys in blocks if missing.keys() & set(keys) for key in keys}

    def ask(self, requests):
        order = list(range(len(requests)))
        if not (requests and requests[0].get("temperature")):  # what is too long is refused first
            order.sort(key=lambda i: -len(requests[i]["prompt"]))
        for begin in range(0, len(order), BLOCK):
            if stop_signals:
                return
            some = order[begin : begin + BLOCK]
            reply = self.next_tokens if "answers" in requests[some[0]] else self.complete
            yield list(zip(some, reply([requests[i] for i in some]), strict=True))

    def encoded(self, request, room):
        ids = self.tokenizer.encode_ordinary(request["prompt"]) or [self.tokenizer.eot_token]
        if len(ids) > room and not request.get("cut"):
            refuse(f"{self.name.split()[0]}: a question of {len(ids)} tokens; room is for {room}")
        return ids[-room:]

    def next_tokens(self, requests):
        answers = [self.tokenizer.encode_ordinary(text) for text in requests[0]["answers"]]
        for ids, text in zip(answers, requests[0]["answers"], strict=True):
            if len(ids) != 1:
                refuse(f"{self.name.split()[0]}: the answer {text!r} is {len(ids)} tokens, not one")
        rows = [self.encoded(request, self.model.config.n_positions) for request in requests]
        tokens = pad(rows, [[]] * len(rows))[0].to(self.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        at = torch.arange(tokens.shape[1], device=self.device) == last[:, None]
        with torch.no_grad():
            logprobs = at_least_float32(self.model(tokens, at=at)).log_softmax(-1)
        found = logprobs[:, [ids[0] for ids in answers]]
        if not found.isfinite().all():
            refuse(f"{self.name.split()[0]}: log-probabilities that are not finite; try --dtype")
        return found.tolist()

    def complete(self, requests):
        first, eos = requests[0], self.tokenizer.eot_token
        room = self.model.config.n_positions - first["max_tokens"]
        tokens, mask = generate(
            self.model,
            [self.encoded(request, room) for request in requests],
            first["max_tokens"],
            temperature=first["temperature"],
            eos=eos,
            generator=torch.Generator(self.device).manual_seed(first["seed"]),
        )
        rows = [row[inside].tolist() for row, inside in zip(tokens, mask, strict=True)]
        return [text_of(self.tokenizer, r[:-1] if r[-1] == eos else r) for r in rows]


class ServerJudge(Judge):
    """A server of the completions API that vLLM, llama.cpp, Ollama and others speak, at a URL that
    the user names. Its key is read from the environment: PLAINRLHF_API_KEY."""

    def __init__(self, url, cfg):
        self.url, self.cfg = url.rstrip("/") + "/completions", cfg
        self.headers, key = {}, os.environ.get("PLAINRLHF_API_KEY", "").strip()
        if key:
            if not re.fullmatch(r"[!-~]+", key):
                refuse("PLAINRLHF_API_KEY: expected one word of ASCII characters")
            self.headers["Authorization"] = f"Bearer {key}"
        super().__init__(f"{url} {cfg.judge_model}")

    def ask(self, requests):
        """When told to stop, or when an answer can't be had, waits for those in flight: they are
        paid for."""
        failed, pool = None, ThreadPoolExecutor(self.cfg.in_flight)
        pending = {pool.submit(self.one, request): i for i, request in enumerate(requests)}
        try:
            while pending:
                done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                found = []
                for future in done:
                    index = pending.pop(future)
                    try:
                        found.append((index, future.result()))
                    except JudgeError as error:
                        failed = error
                if found:
                    yield found
                if failed or stop_signals:
                    pending = {f: i for f, i in pending.items() if not f.cancel()}
        finally:  # what was answered can't be written, say: nothing more is asked
            pool.shutdown(cancel_futures=True)
        if failed and not stop_signals:
            raise failed

    def one(self, request):
        body = {"model": self.cfg.judge_model, "prompt": request["prompt"]}
        if "answers" in request:
            body |= {"max_tokens": 1, "temperature": 0, "logprobs": self.cfg.top_logprobs}
            return self.post(body, lambda reply: self.of_answers(reply, request["answers"]))
        body |= {name: request[name] for name in ("max_tokens", "temperature", "seed")}
        return self.post(body, self.of_text)

    def of_text(self, reply):
        text = reply["choices"][0]["text"]
        if not isinstance(text, str):
            raise TypeError("text is no string")
        return text

    def of_answers(self, reply, answers):
        """Log-probabilities of the answers, from a reply's most likely tokens. Where the token is
        not among them, one that differs by the spaces around it; where none is, the least of those
        that are, which the answer's own can't exceed."""
        found = reply["choices"][0]["logprobs"]
        if "top_logprobs" in found:  # {token: log-probability} of each position
            top = list(found["top_logprobs"][0].items())
        else:  # llama.cpp's newer form
            top = [(x["token"], x["logprob"]) for x in found["content"][0]["top_logprobs"]]
        if not top or not all(-1e9 < logprob < 1e-3 for _, logprob in top):
            raise ValueError("no log-probabilities")
        floor, result = min(logprob for _, logprob in top), []
        for answer in answers:
            same = [logprob for token, logprob in top if token == answer]
            same += [logprob for token, logprob in top if token.strip() == answer.strip()]
            self.absent += not same
            result.append(same[0] if same else floor)
        return result

    def post(self, body, read):
        """Sends, and reads the reply; again after what may pass: 429, 5xx, a cut connection, no
        reply in time, a reply that is not as it should be."""
        data, why = json.dumps(body).encode(), ""
        for attempt in range(self.cfg.retries + 1):
            pause = self.cfg.backoff_s * 2**attempt
            try:
                headers = {"Content-Type": "application/json"}
                request = urllib.request.Request(self.url, data, headers)
                for name, value in self.headers.items():  # not for where a redirection leads
                    request.add_unredirected_header(name, value)
                with urllib.request.urlopen(request, timeout=self.cfg.reply_s) as reply:
                    return read(json.loads(reply.read(10**7)))
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.reason}"
                if error.code != 429 and error.code < 500:
                    raise JudgeError(f"{self.url}: {why}{self.said(error)}") from None
                after = error.headers.get("Retry-After", "")
                pause = max(pause, float(after)) if after.isdecimal() else pause
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {error}"
            except UNREADABLE as error:
                why = f"a reply of another form ({type(error).__name__}: {error})"
            until = time.time() + min(pause, 60.0) * (attempt < self.cfg.retries)
            while time.time() < until and not stop_signals:
                time.sleep(0.2)
            if stop_signals:
                break
        raise JudgeError(f"{self.url}: {why}, {attempt + 1} times")

    def said(self, error):
        """The beginning of what a server says of its error."""
        try:
            return f": {error.read(300)!r}"
        except (OSError, http.client.HTTPException):
            return ""


class JudgeError(Exception):
    """A server that does not answer: what it did answer is kept, and the same command goes on."""


# --- preferences ----------------------------------------------------------------------------------


def preference(first_logprobs, second_logprobs):
    """P(the first response is better) from the answers' log-probabilities in both orders.

    first_logprobs: of (1, 2), the first response being shown as 1; second_logprobs: the first being
    shown as 2. A softmax over the two answers, turned round in the second order, and averaged:
    Lee et al., arXiv:2309.00267 section 3.1. -> p, and the probability of answer 1 in each order.
    """
    both = first_logprobs, second_logprobs
    shares = [0.5 + 0.5 * math.tanh((one - two) / 2) for one, two in both]  # the logistic function
    return (shares[0] + 1 - shares[1]) / 2, shares


def position_bias(shares):
    """[(P(answer 1), P(answer 1) with the responses swapped)] -> {"same", "first"}: the share of
    pairs whose answer is the same position in both orders, and of these the share whose answer is
    the first. arXiv:2309.00267 appendix B."""
    same = [(a > 0.5) for a, b in shares if (a > 0.5) == (b > 0.5)]
    first = sum(same) / len(same) if same else None
    return {"same": len(same) / len(shares), "first": first}


def expected_rating(logprobs):
    """sum_i i P(i) over the answers 1..n, and that on [-1, 1]. arXiv:2309.00267 section 3.2.2."""
    weights = np.exp(np.asarray(logprobs) - np.max(logprobs))
    n = len(weights)
    rating = float((np.arange(1, n + 1) * weights).sum() / weights.sum())
    return rating, 2 * (rating - 1) / (n - 1) - 1


def judge_pairs(judge, template, variant, pairs, max_tokens, seed):
    """[(p, (share, share))] of pairs: {"prompt", "first", "second"}, perhaps "principle".

    Every pair is asked in both orders; with rationales, of each order `variant.samples` are
    sampled, and the answers after them averaged. None if told to stop.
    """
    fields = []
    for pair in pairs:
        shared = {name: pair[name] for name in ("prompt", "principle") if name in pair}
        for one, two in (("first", "second"), ("second", "first")):
            fields.append(shared | {"response_1": pair[one], "response_2": pair[two]})
    answers = section(template, "answers")
    if not variant.rationale:
        requests = [
            {"prompt": question(template, variant, one), "answers": answers} for one in fields
        ]
        found = judge.answers(requests)
        each = None if found is None else [[logprobs] for logprobs in found]
    else:
        requests = [
            {
                "prompt": question(template, variant, one),
                "max_tokens": max_tokens,
                "temperature": variant.temperature,
                "seed": seed * 1_000_003 + variant.samples * i + n,
            }
            for i, one in enumerate(fields)
            for n in range(variant.samples)
        ]
        texts = judge.answers(requests)
        if texts is None:
            return None
        # A judge that went on to the answer, or to another pair, is stopped there.
        reasons = [text.split(section(template, "ending").strip())[0] for text in texts]
        requests = [
            {"prompt": question(template, variant, fields[i // variant.samples], reason)}
            | {"answers": answers}
            for i, reason in enumerate(reasons)
        ]
        found = judge.answers(requests)
        each = found and [
            found[i : i + variant.samples] for i in range(0, len(found), variant.samples)
        ]
    if each is None:
        return None
    result = []
    for n in range(len(pairs)):
        both = [preference(a, b) for a, b in zip(each[2 * n], each[2 * n + 1], strict=True)]
        p = float(np.mean([p for p, _ in both]))
        result.append((p, tuple(np.mean([shares for _, shares in both], axis=0).tolist())))
    return result


def check_question(template, variant, pair):
    """Ends the script where a template can't ask this, before anything is written or asked."""
    if len(section(template, "answers")) != 2:
        refuse(f"{template['path']}:0: answers: expected two")
    fields = pair | {"response_1": pair["first"], "response_2": pair["second"]}
    question(template, variant, fields)
    question(template, variant, fields, "x" if variant.rationale else None)


# --- label, agree ---------------------------------------------------------------------------------


def open_judge(name, cfg, device, dtype):
    return ServerJudge(name, cfg) if "://" in name else LocalJudge(name, device, dtype)


def begin(cfg):
    """One process -> device, dtype."""
    for name in ("in_flight", "max_rationale_tokens", "max_new_tokens", "top_logprobs", "reply_s"):
        if not getattr(cfg, name, 1) > 0:
            refuse(f"--{name}: expected more than 0")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        refuse("rlaif.py: runs in one process; split the file for several")
    return start_process(cfg)[0], getattr(torch, cfg.dtype or "float32")


def at_leisure(cfg):
    """cfg without how a server is spoken to, which may be another when a run goes on."""
    own = type(cfg)()
    names = ("in_flight", "reply_s", "retries", "backoff_s")
    return dataclasses.replace(cfg, **{name: getattr(own, name) for name in names})


def make_run(cfg, inputs):
    """out_dir made, or found again: its path. The last thing before the work, so that a mistake in
    the command line deletes nothing."""
    settings = settings_of(at_leisure(cfg), inputs, 1)
    if not may_resume(cfg, settings):
        new_run(Path(cfg.out_dir), settings)
    return Path(cfg.out_dir)


def judge_files(name):
    """What a resumed run must find unchanged of a judge."""
    if "://" in name:
        try:
            url = urllib.parse.urlsplit(name)
            good = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:
            good = False
        if not good:
            refuse(f"--judge {name}: expected a run directory, http://... or https://...")
        return []
    try:
        return [*weight_files(Path(name)), Path(name) / "config.json"]
    except (OSError, ValueError) as error:
        refuse(error)


def read_samples(paths, count):
    """[(line without its responses, responses, who wrote each)] of samples or rankings. Of several
    files, which are one policy's each, those of the prompts that all have."""
    files = []
    for path in paths:
        lines, seen = {}, {}
        for where, record in read_jsonl(path, {"prompt": False}):
            check_task(where, record)
            responses = read_responses(where, record, least=1 if len(paths) > 1 else 2)
            writers = record.get("policy")
            writers = writers if isinstance(writers, list) else [writers] * len(responses)
            others = ("responses", "scores", "policy", "annotator")
            line = {name: value for name, value in record.items() if name not in others}
            seen[line["prompt"]] = seen.get(line["prompt"], 0) + 1  # a prompt may come again
            lines[line["prompt"], seen[line["prompt"]]] = line, responses, writers
            if len(paths) == 1 and len(lines) == count:
                break
        files.append(lines)
    found = []
    for key, (line, responses, writers) in files[0].items():
        if all(key in lines for lines in files):
            for lines in files[1:]:
                responses, writers = responses + lines[key][1], writers + lines[key][2]
            found.append((line, responses, writers))
    return found[: count or len(found)]


def read_constitution(path):
    try:
        principles = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path}:0: file: {error}")
    good = isinstance(principles, list) and principles
    if not good or not all(isinstance(p, str) and p.strip() for p in principles):
        refuse(f"{path}:0: file: expected a list of principles, each a text")
    return principles


def draw_pairs(lines, count, principles, seed, between=False):
    """[(line number, pair)]: `count` random pairs of different responses a prompt (0: all), each
    with a principle drawn at random when there are any. between: pairs of different writers, equal
    ones too, since a tie counts where policies are compared."""
    drawn = []
    for number, (line, responses, writers) in enumerate(lines):
        rng = random.Random(f"{seed} {number}")
        pairs, seen = [], set()
        for i, j in itertools.combinations(range(len(responses)), 2):
            texts = frozenset((responses[i], responses[j]))
            if between:
                pairs += [(i, j)] * (writers[i] != writers[j])
            elif len(texts) == 2 and texts not in seen:
                seen.add(texts)
                pairs.append((i, j))
        rng.shuffle(pairs)
        for one, two in pairs[: count or len(pairs)]:
            first, second = (one, two) if rng.random() < 0.5 else (two, one)
            pair = {"prompt": line["prompt"], "first": responses[first]}
            pair |= {"second": responses[second], "writers": [writers[first], writers[second]]}
            if principles:
                pair["principle"] = principles[int(rng.random() * len(principles))]
            drawn.append((number, pair))
    return drawn


def read_clamp(text):
    bounds = split_names(text)
    try:
        low, high = (float(bound) for bound in bounds) if bounds else (0.0, 1.0)
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= 0.5 <= high <= 1:
        refuse(f"--clamp {text}: expected two numbers, at most and at least 0.5, by a comma")
    return low, high


def interrupted(judge):
    print(f"stopped; {len(judge.known)} answers are kept, --resume goes on from there", flush=True)
    sys.exit(128 + signal.SIGTERM)


def label_main(cfg):
    """Comparisons with soft labels, out_dir/comparisons.jsonl."""
    variant, (low, high) = read_variant(cfg.variant), read_clamp(cfg.clamp)
    template = read_template(cfg.template)
    principles = read_constitution(cfg.constitution) if cfg.constitution else []
    files = split_names(cfg.samples)
    if not files:
        refuse("--samples: expected a file")
    lines = read_samples(files, cfg.num_prompts)
    mixed = []
    if cfg.mix:
        mixed = [record for _, record, _, _ in read_preferences(cfg.mix)]
    inputs = [*files, cfg.template, *judge_files(cfg.judge)]
    inputs += [path for path in (cfg.constitution, cfg.mix) if path]
    device, dtype = begin(cfg)
    judge = open_judge(cfg.judge, cfg, device, dtype)
    drawn = draw_pairs(lines, cfg.pairs, principles, cfg.seed, between=len(files) > 1)
    if not drawn:
        refuse(f"{cfg.samples}:0: file: no prompt has two responses to compare")
    check_question(template, variant, drawn[0][1])
    out_dir = make_run(cfg, inputs)
    judge.remember(out_dir / "answers.jsonl")
    pairs, began = [pair for _, pair in drawn], time.time()
    print(
        f"{len(pairs)} pairs of {len(lines)} prompts, asked in both orders: {variant}", flush=True
    )
    found = judge_pairs(judge, template, variant, pairs, cfg.max_rationale_tokens, cfg.seed)
    if found is None:
        interrupted(judge)
    records = list(mixed)
    for (number, pair), (p, _) in zip(drawn, found, strict=True):
        p = min(max(p, low), high)
        better, worse = ("first", "second") if p >= 0.5 else ("second", "first")
        record = lines[number][0] | {"chosen": pair[better], "rejected": pair[worse]}
        record |= {"label": 1.0 if cfg.hard else max(p, 1 - p), "annotator": cfg.judge}
        if "principle" in pair:
            record["principle"] = pair["principle"]
        if None not in pair["writers"]:
            record["policy"] = pair["writers"][:: 1 if better == "first" else -1]
        records.append(record)
    write_jsonl(out_dir / "comparisons.jsonl", records)
    bias = position_bias([shares for _, shares in found])
    report = {"pairs": len(pairs), "position_bias": bias, "asked": judge.asked}
    report["mean_label"] = float(np.mean([r["label"] for r in records[len(mixed) :]]))
    report |= {"mixed": len(mixed), "seconds": round(time.time() - began, 1)}
    report["absent_answers"] = judge.absent
    write_json(out_dir / "report.json", report)
    print_bias(bias)
    path, seconds = out_dir / "comparisons.jsonl", report["seconds"]
    print(
        f"{path}: {len(records)} comparisons, {len(mixed)} of them mixed in; mean label "
        f"{report['mean_label']:.3f}; {judge.asked} answers in {seconds:.0f} s"
    )
    if report["absent_answers"]:
        print(
            f"{report['absent_answers']} answers not among the likely tokens got the least of these"
        )


def print_bias(bias):
    first = "" if bias["first"] is None else f", the first position in {bias['first']:.1%} of these"
    print(f"position bias: the same position in both orders in {bias['same']:.1%} of pairs{first}")


def agree_main(cfg):
    """How often judges prefer what people, or gold, prefer; by judge, variant and task."""
    variants = [read_variant(text) for text in split_names(cfg.variants)]
    judges, template = split_names(cfg.judges), read_template(cfg.template)
    if not variants or not judges:
        refuse("--variants, --judges: expected at least one")
    gold = load_gold(cfg.gold) if cfg.gold else None
    rng, rows = random.Random(cfg.seed), []
    for _, record, responses, pairs in read_preferences(cfg.data):
        if gold:
            scores = [gold_score(gold, record, response) for response in responses]
            pairs = [
                (i, j) if scores[i] > scores[j] else (j, i)
                for i, j in itertools.combinations(range(len(responses)), 2)
                if scores[i] != scores[j]
            ]
        pairs = [pair for pair in pairs if len(pair) == 2 or pair[3] > 0.5]
        if pairs:
            pair = pairs[int(rng.random() * len(pairs))]
            texts = {"better": responses[pair[0]], "worse": responses[pair[1]]}
            rows.append({"prompt": record["prompt"], "task": record.get("task", "all")} | texts)
        if cfg.num_prompts and len(rows) == cfg.num_prompts:
            break
    if not rows:
        refuse(f"{cfg.data}:0: file: no pair is ordered")
    inputs = [cfg.data, cfg.template, *(path for name in judges for path in judge_files(name))]
    device, dtype = begin(cfg)
    judges = {name: open_judge(name, cfg, device, dtype) for name in judges}
    pairs = [{"prompt": r["prompt"], "first": r["better"], "second": r["worse"]} for r in rows]
    for variant in variants:
        check_question(template, variant, pairs[0])
    out_dir = make_run(cfg, inputs + ([cfg.gold] if cfg.gold else []))
    table, chosen = {}, {}
    tasks = ["all", *dict.fromkeys(row["task"] for row in rows if row["task"] != "all")]
    for name, judge in judges.items():
        judge.remember(out_dir / "answers.jsonl")
        for variant in variants:
            found = judge_pairs(judge, template, variant, pairs, cfg.max_rationale_tokens, cfg.seed)
            if found is None:
                interrupted(judge)
            hits = [0.5 + 0.5 * float(np.sign(p - 0.5)) for p, _ in found]
            # Of one order alone, the better response being answer 1 or 2 at random.
            coin = random.Random(f"{cfg.seed} orders")
            single = [
                float(shares[0] > 0.5) if coin.random() < 0.5 else float(shares[1] < 0.5)
                for _, shares in found
            ]
            cell = {
                task: grouped_rate(
                    [(n, hit) for n, hit in enumerate(hits) if task in ("all", rows[n]["task"])]
                )
                for task in tasks
            }
            cell |= {"one_order": grouped_rate(list(enumerate(single)))}
            cell |= {"position_bias": position_bias([shares for _, shares in found])}
            table.setdefault(name, {})[str(variant)] = cell
            chosen[name, str(variant)] = [p > 0.5 for p, _ in found]
            rate, low, high = cell["all"]["rate"]
            interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            single = cell["one_order"]["rate"][0]
            said = "".join(f", {task} {cell[task]['rate'][0]:.3f}" for task in tasks[1:])
            print(
                f"{name}  {variant}: {rate:.3f}{interval}, one order {single:.3f}{said}", flush=True
            )
            print_bias(cell["position_bias"])
        if judge.absent:
            print(f"{judge.absent} answers of {name} were not among its likely tokens")
    report = {"pairs": len(rows), "judges": table}
    between = {}
    for a, b in itertools.combinations(chosen, 2):
        same = [
            (n, float(x == y)) for n, (x, y) in enumerate(zip(chosen[a], chosen[b], strict=True))
        ]
        between[f"{' '.join(a)} / {' '.join(b)}"] = grouped_rate(same)["rate"]
    write_json(out_dir / "report.json", report | {"between": between})


# --- revise: Constitutional AI's supervised stage -------------------------------------------------


def passes(records, weight, seed):
    """The records, `weight` times: whole passes, and of the last, partial one a random choice."""
    whole, part = divmod(round(weight * len(records)), len(records))
    chosen = sorted(random.Random(f"{seed} passes").sample(range(len(records)), part))
    return records * whole + [records[i] for i in chosen]


def revise_main(cfg):
    """Responses, then critiques and revisions of them, each by a principle drawn at random:
    out_dir/revisions.jsonl has all with their numbers, 0 being the response; demonstrations.jsonl
    what sft.py learns from, every revision and the helpful demonstrations."""
    if cfg.revisions < 1:
        refuse("--revisions: expected 1 or more")
    template, principles = read_template(cfg.template), read_constitution(cfg.constitution)
    for name in ("critique", "revision"):
        section(template, name)  # refused now rather than after the responses
    lines = [record for _, record in read_jsonl(cfg.prompts, {"prompt": True})]
    lines = lines[: cfg.num_prompts or len(lines)]
    helpful = []
    if cfg.mix:
        helpful = [r for _, r in read_jsonl(cfg.mix, {"prompt": True, "response": False})]
    gold = load_gold(cfg.gold) if cfg.gold else None
    inputs = [cfg.prompts, cfg.template, cfg.constitution]
    inputs += [path for path in (cfg.mix, cfg.gold) if path]
    inputs += [*judge_files(cfg.policy), *judge_files(cfg.judge)]
    device, dtype = begin(cfg)
    policy = LocalJudge(cfg.policy, device, dtype)
    critic = open_judge(cfg.judge, cfg, device, dtype)
    out_dir, began = make_run(cfg, inputs), time.time()
    policy.remember(out_dir / "responses.jsonl")
    critic.remember(out_dir / "answers.jsonl")

    def said(model, texts, number):
        """What a model goes on with after texts."""
        how = {"max_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
        how |= {"cut": True} if model is policy else {}  # prompts, from the start, as everywhere
        requests = [
            {"prompt": text} | how | {"seed": (cfg.seed * 1009 + number) * 1_000_003 + n}
            for n, text in enumerate(texts)
        ]
        found = model.answers(requests)
        if found is None:
            interrupted(model)
        return found

    responses = said(policy, [line["prompt"] for line in lines], 0)
    kept = [n for n, response in enumerate(responses) if response.strip()]
    empty = len(lines) - len(kept)
    lines, responses = [lines[n] for n in kept], [responses[n] for n in kept]
    records = [
        [line | {"response": r, "revision": 0} for line, r in zip(lines, responses, strict=True)]
    ]
    for number in range(1, cfg.revisions + 1):
        drawn = random.Random(f"{cfg.seed} principles {number}")
        asked = []
        for line, response in zip(lines, responses, strict=True):
            principle = principles[int(drawn.random() * len(principles))]
            fields = {"prompt": line["prompt"], "response": response, "principle": principle}
            asked.append((filled(section(template, "critique"), fields), principle))
        critiques = said(critic, [text for text, _ in asked], 2 * number - 1)
        revisions = said(
            critic,
            [
                text + filled(section(template, "revision"), {"critique": critique})
                for (text, _), critique in zip(asked, critiques, strict=True)
            ],
            2 * number,
        )
        records.append([])
        for n, revision in enumerate(revisions):
            if not revision.strip():  # the response before it stays, and is revised again
                empty += 1
                continue
            # As the response began: what stands between it and its prompt belongs to it.
            space = responses[n][: len(responses[n]) - len(responses[n].lstrip())]
            responses[n] = space + revision.strip()
            record = lines[n] | {"response": responses[n], "revision": number}
            records[-1].append(
                record | {"principle": asked[n][1], "critique": critiques[n].strip()}
            )
    write_jsonl(out_dir / "revisions.jsonl", [r for some in records for r in some])
    learnt = [record for some in records[1:] for record in some]
    added = passes(helpful, cfg.mix_weight, cfg.seed) if helpful else []
    write_jsonl(out_dir / "demonstrations.jsonl", learnt + added)
    report = {"prompts": len(lines), "empty": empty, "helpful": len(added), "by_revision": {}}
    for number, some in enumerate(records):
        parts = {}
        for record in some if gold else ():
            line = {
                k: v for k, v in record.items() if k not in ("revision", "principle", "critique")
            }
            for name, value in judge(gold, line, record["response"]).items():
                parts.setdefault(name, []).append(value)
        report["by_revision"][number] = {n: mean_interval(values) for n, values in parts.items()}
        shown = {n: v[0] for n, v in report["by_revision"][number].items()}
        shown = ", ".join(
            f"{n} {shown[n]:.3f}" for n in ("gold", "harmless", "helpful") if n in shown
        )
        print(f"revision {number}: {len(some)} responses{', ' if shown else ''}{shown}", flush=True)
    report["seconds"] = round(time.time() - began, 1)
    write_json(out_dir / "report.json", report)
    print(
        f"{out_dir / 'demonstrations.jsonl'}: {len(learnt)} revisions and {len(added)} helpful "
        f"demonstrations; {empty} empty ones left out"
    )


# --- direct: RLAIF without a reward model ---------------------------------------------------------


def penalised(scores, kl, beta):
    """Z = (1 - beta) score - beta KL, all (B,): what a whole response is worth, KL in nats a
    sequence. arXiv:2309.00267 appendix."""
    return (1 - beta) * scores - beta * kl


def reinforce(new_logprobs, values, worth, mask):
    """REINFORCE with a learned baseline -> policy losses, value losses, (B, T), 0 outside the mask.

    -log pi(a_t) (Z - V_t), the advantage being a constant, and (V_t - Z)^2 / 2: V_t says what the
    response will be worth, before token t. worth (B,), the others (B, T). Williams 1992.
    """
    advantages = (worth[:, None] - values).detach()
    return -advantages * new_logprobs * mask, 0.5 * (values - worth[:, None]) ** 2 * mask


def state_values(model, tokens, mask):
    """The value network's values, (B, T): column t is of the state before token t is chosen. 0
    outside the mask."""
    output = model(tokens, at=predicts(mask))  # (N,)
    return output.new_zeros(mask.shape).masked_scatter(mask, output)


def ratings(rater, template, lines, texts, device):
    """A judge's scores of responses: the ratings that it expects, on [-1, 1], (B,) float64. None if
    told to stop."""
    requests = [
        {
            "prompt": filled(section(template, "rate"), {"prompt": p["prompt"], "response": text}),
            "answers": section(template, "ratings"),
        }
        for p, text in zip(lines, texts, strict=True)
    ]
    found = rater.answers(requests)
    if found is None:
        return None
    scores = [expected_rating(logprobs)[1] for logprobs in found]
    return torch.tensor(scores, dtype=torch.float64, device=device)


# --- direct: data, rollouts and evaluation, as in ppo.py ---


def add_scalar_head(policy):
    """A language model's trunk under a new scalar head, drawn from the default generator."""
    model = GPT(policy.config, scalar_head=True)
    model.load_state_dict(policy.state_dict() | {"score.weight": model.score.weight.detach()})
    return model


def read_prompts(path):
    """The lines of a prompts file, `task` being a string where there is one."""
    prompts = []
    for where, record in read_jsonl(path, {"prompt": True}):
        if not isinstance(record.get("task", ""), str):
            refuse(f"{where}: task: expected a string, got {json.dumps(record['task'])[:40]}")
        prompts.append(record)
    return prompts


def prompts_of_step(count, batch_size, step, seed):
    """Numbers of the prompts of one iteration: whole epochs of `count` prompts in random orders run
    on from iteration to iteration."""
    begin, end = step * batch_size, (step + 1) * batch_size
    epochs = range(begin // count, (end - 1) // count + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs]
    skip = begin - epochs[0] * count
    return np.concatenate(orders)[skip : skip + batch_size].tolist()


def sample_batch(sampler, prompts, prompt_ids, cfg, eos, seed, device):
    """One response to each prompt -> {"lines", "tokens", "mask", "lengths", "responses", "ended"}:
    tokens, mask (B, T), lengths of prompt and response together, the responses' ids, ended (B,)
    bool. From the full softmax: truncated, its KL would be another distribution's."""
    generator = torch.Generator(device).manual_seed(seed)
    responses = []
    for part in micro_batches(len(prompts), 8 * cfg.micro_batch_size):  # no more cache at once
        tokens, mask = generate(
            sampler,
            prompt_ids[part],
            cfg.max_new_tokens,
            temperature=cfg.temperature,
            eos=eos,
            generator=generator,
        )
        responses += [row[inside].tolist() for row, inside in zip(tokens, mask, strict=True)]
    tokens, mask = (x.to(device) for x in pad(prompt_ids, responses))
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, responses, strict=True)]
    batch = {"lines": prompts, "tokens": tokens, "mask": mask, "lengths": lengths}
    ended = [response[-1] == eos for response in responses]
    return batch | {"responses": responses, "ended": torch.tensor(ended, device=device)}


def texts_of(batch, tokenizer):
    """The responses as text, without the EOS that ends them."""
    eos = tokenizer.eot_token
    return [text_of(tokenizer, r[:-1] if r[-1] == eos else r) for r in batch["responses"]]


def micro_batches(count, size):
    return [slice(i, i + (size or count)) for i in range(0, count, size or max(count, 1))]


def trimmed(batch, size):
    """The batch's tokens and mask, `size` rows at a time (0: all), without columns of pads."""
    for rows in micro_batches(len(batch["lengths"]), size):
        columns = slice(max(batch["lengths"][rows]))
        yield batch["tokens"][rows, columns], batch["mask"][rows, columns]


def joined(parts, batch):
    """Parts (rows, columns) of a batch as (B, T), 0 where they had no columns."""
    T = batch["tokens"].shape[1]
    return torch.cat([F.pad(part, (0, T - part.shape[1])) for part in parts])


def punish_missing_eos(scores, ended, real, cfg, device):
    """Scores (B,), where a response did not end the smaller of --missing_eos_score and the lowest
    of the `real` first scores of all ranks: going on for ever can't pay, whatever their scale."""
    if cfg.missing_eos_score == "none":
        return scores
    lowest = [float(scores[:real].min())] if real else []
    least = min([float(cfg.missing_eos_score), *gather(lowest, device)])
    return scores.masked_fill(~ended, least)


def response_logprobs(model, batch, size, cfg, autocast):
    """log pi of each response token, (B, T), at the temperature of sampling, `size` rows a
    forward (0: all)."""
    parts = []
    for tokens, mask in trimmed(batch, size):
        with torch.no_grad(), autocast:
            logits = model(tokens, at=predicts(mask))
        parts.append(token_logprobs(logits, tokens, mask, cfg.temperature))
    return joined(parts, batch)


def explained_variance(returns, values, mask, all_reduce=None):
    """1 - var(returns - values) / var(returns) over the mask, and all ranks: 1 when the values
    foresee everything, 0 when they foresee nothing. All (B, T)."""
    inside = mask.to(returns.dtype)
    sums = [inside.sum()]
    for x in (returns, returns - values):
        sums += [(x * inside).sum(), (x**2 * inside).sum()]
    sums = torch.stack(sums) if all_reduce is None else all_reduce(torch.stack(sums))
    count, first, second, missed, missed2 = sums.tolist()
    spread = second / count - (first / count) ** 2
    return 1 - (missed2 / count - (missed / count) ** 2) / spread if spread > 0 else 0.0


def summarise(samples):
    """{task: {part: [mean, low, high]}} of samples; "all" has the parts that all of them have."""
    groups, table = {"all": samples}, {}
    for task in dict.fromkeys(s["task"] for s in samples if s.get("task", "all") != "all"):
        groups[task] = [sample for sample in samples if sample.get("task") == task]
    for task, members in groups.items():
        shared = set.intersection(*(set(sample["parts"]) for sample in members))
        names = [name for name in members[0]["parts"] if name in shared]
        table[task] = {n: mean_interval([sample["parts"][n] for sample in members]) for n in names}
        table[task]["count"] = len(members)
    return table


def one_a_task(prompts):
    """The first prompt of each task."""
    return list({line.get("task", "all"): line for line in reversed(prompts)}.values())[::-1]


def print_table(name, table):
    print(f"{name}: means with 95% intervals")
    for task, parts in table.items():
        print(f"  {task} ({parts['count']} prompts)")
        for part, value in parts.items():
            if part != "count" and parts["count"] > 1:
                print("    {:<12} {:8.3f}  [{:.3f}, {:.3f}]".format(part, *value))


def distinct(texts, n):
    """Different n-grams of words over all n-grams, of all texts taken together (Li et al. 2016,
    arXiv:1510.03055); 0 when there are none."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def beside(samples, others, missing_eos_score):
    """The policy's samples beside the reference's to the same prompts: means by task, differences
    paired by prompt, win rates (ties half), each with its interval, and how various they are. In
    differences and wins by proxy, what did not end has the smaller of missing_eos_score and the
    lowest proxy of all."""
    floored = samples, others
    if missing_eos_score != "none":  # one floor for both sides, so that it decides nothing
        every = [sample["parts"]["proxy"] for sample in samples + others]
        least = {"proxy": min(float(missing_eos_score), *every)}
        floored = (
            [s if s["parts"]["eos"] else s | {"parts": s["parts"] | least} for s in side]
            for side in (samples, others)
        )
    pairs, wins = [], {}
    for ours, theirs in zip(*floored, strict=True):
        before = theirs["parts"]
        more = {name: x - before[name] for name, x in ours["parts"].items() if name in before}
        pairs.append(ours | {"parts": more})
    for part in ("proxy", "gold"):
        if part in samples[0]["parts"]:
            wins[part] = mean_interval([0.5 + 0.5 * np.sign(pair["parts"][part]) for pair in pairs])
    return {
        "policy": summarise(samples),
        "reference": summarise(others),
        "difference": summarise(pairs),
        "win_rate": wins,
        "distinct_2": [distinct([s["response"] for s in some], 2) for some in (samples, others)],
    }


def print_beside(name, report):
    """A table of the policy's samples, and what they are worth more than the reference's."""
    print_table(name, report["policy"])
    for part, (rate, low, high) in report["win_rate"].items():
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        print(f"  wins against the reference by {part}: {rate:.3f}{interval}; more, by prompt:")
        for task, table in report["difference"].items():
            if part in table and table["count"] > 1:
                print("    {:<12} {:+8.3f}  [{:+.3f}, {:+.3f}]".format(task, *table[part]))


def check_start(logprobs, ref_logprobs, limit, device):
    """Ends the run, on all ranks, unless a policy that nothing has trained is the reference."""
    far = gather([float((logprobs - ref_logprobs).abs().max())], device)
    if not all(x <= limit for x in far):
        refuse(
            f"self-check: the untrained policy is {max(far):.1e} nats a token from the reference, "
            f"which is itself. Likely causes: dropout, another precision"
        )


def check_ratio(ratio, limit, device):
    """Ends the run, on all ranks, unless every ratio of the first minibatch is 1."""
    far = gather([float((ratio - 1).abs().max())], device)
    if not all(x <= limit for x in far):
        refuse(
            f"self-check: the first minibatch's ratio is {max(far):.1e} off 1 (limit {limit:.0e}): "
            f"the update's forward is not that of the rollout's log-probabilities. Likely causes: "
            f"dropout, another temperature, positions or masks that pads shift"
        )


def warnings_of(record, before, cfg):
    """What to say, in words, of an iteration's numbers; `before`: the first iteration's."""
    found = []
    if record["kl"] < -0.1:
        found.append(
            f"KL {record['kl']:.2f} is below 0: log-probabilities are not those that sampling used "
            f"(temperature, dropout), or there are too few episodes to tell"
        )
    if record["eos"] < 0.8 * before["eos"]:
        found.append("fewer responses end than at first: is the score high for not ending?")
    if record["eos"] < 0.5:
        found.append("most responses do not end: they all score the same, and nothing is learnt")
    if record["empty"] > 0.02:
        found.append(f"{record['empty']:.1%} of the responses are empty: is silence what pays?")
    if record["tokens"] > 0.9 * cfg.max_new_tokens:
        found.append("responses are about as long as --max_new_tokens: length may be what pays")
    if record["value_loss"] > 10 * max(before["value_loss"], 0.1):
        found.append("the value loss is ten times the first: lower --value_lr")
    return found


# --- direct: the loop ---


def direct_main(cfg):
    """A policy that learns from a judge's ratings: out_dir is a run directory like ppo.py's, with
    what the judge said in answers/, a file a rank."""
    if cfg.adam_beta2 >= 1 or not cfg.temperature > 0 or cfg.beta > 1:
        refuse("--beta: expected at most 1; --adam_beta2: less; --temperature: above 0")
    counts = (cfg.batch_size, cfg.max_new_tokens, cfg.log_every, cfg.in_flight, cfg.top_logprobs)
    if min(counts) < 1 or not min(cfg.clip_norm, cfg.reply_s) > 0:
        refuse(
            "--batch_size, --max_new_tokens, --log_every, --in_flight, --top_logprobs, "
            "--clip_norm, --reply_s: expected more than 0"
        )
    try:
        if cfg.missing_eos_score != "none" and not math.isfinite(float(cfg.missing_eos_score)):
            raise ValueError
    except ValueError:
        refuse(f"--missing_eos_score {cfg.missing_eos_score}: expected a number or none")
    if cfg.gold and not cfg.validation:
        refuse("--gold: judges samples for --validation prompts, and there are none")
    template = read_template(cfg.template)
    section(template, "rate")
    if len(section(template, "ratings")) != 10:
        refuse(f"{cfg.template}:0: ratings: expected ten answers")
    device, dtype, rank, world = start_process(cfg)

    # Three models: the policy and the value network learn, the reference doesn't. All stay in eval
    # mode: with dropout the log-probabilities would not be those that sampling used.
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    try:
        policy = load_model(cfg.init)
        tokenizer = load_tokenizer(cfg.init)
        check_tokenizer(tokenizer, cfg.init, load_config(cfg.init))
    except (OSError, ValueError) as error:
        refuse(error)
    if policy.score is not None:
        refuse(f"--init {cfg.init}: has a scalar head, no language model's")
    reference = copy.deepcopy(policy).to(device, precision).requires_grad_(False)
    value_model = add_scalar_head(policy)
    torch.nn.init.zeros_(value_model.score.weight)
    for model in (policy, value_model):
        model.eval().to(device, precision)
        model.checkpoint_activations = cfg.checkpoint_activations
    positions = policy.config.n_positions
    if cfg.max_new_tokens >= positions:
        refuse(f"--max_new_tokens {cfg.max_new_tokens}: leaves no room in {positions} positions")

    # Prompts, and everything that a resumed run must find unchanged.
    prompts = read_prompts(cfg.prompts)
    held_out = read_prompts(cfg.validation) if cfg.validation else []
    gold = load_gold(cfg.gold) if cfg.gold else None
    room = positions - cfg.max_new_tokens
    ids = [encode(tokenizer, line["prompt"], None, room)[0] for line in prompts]
    cut = sum(len(encode(tokenizer, p["prompt"], None, sys.maxsize)[0]) > room for p in prompts)
    held_out_ids = [encode(tokenizer, line["prompt"], None, room)[0] for line in held_out]
    inputs = [cfg.prompts, cfg.template, *judge_files(cfg.judge)]
    inputs += [path for path in (cfg.validation, cfg.gold) if path]
    inputs += [*weight_files(Path(cfg.init)), Path(cfg.init) / "config.json"]
    rater = open_judge(cfg.judge, cfg, device, precision)
    if isinstance(rater, LocalJudge):  # now, not when such a prompt is drawn
        texts = [
            filled(template["rate"], {"prompt": line["prompt"], "response": ""})
            for line in prompts + held_out
        ]
        longest = max(map(len, rater.tokenizer.encode_ordinary_batch(texts)))
        tokens = longest + cfg.max_new_tokens
        if tokens > rater.model.config.n_positions:
            refuse(
                f"--judge {cfg.judge}: has room for {rater.model.config.n_positions} tokens; the "
                f"question of the longest prompt may take {tokens}"
            )
    checkpoint = open_run(at_leisure(cfg), inputs, device, rank, world)
    out_dir = Path(cfg.out_dir)
    if rank == 0:
        (out_dir / "answers").mkdir(exist_ok=True)
    all_reduce([0.0], device)  # the folder is there before any rank writes to it
    # Not a log, which resuming cuts off: what a judge said is kept.
    rater.remember(out_dir / "answers" / f"{rank}.jsonl")
    if rank == 0:
        sizes = [
            sum(p.numel() for p in model.parameters()) / 1e6 for model in (policy, value_model)
        ]
        print(
            f"policy {sizes[0]:.2f}M, value network {sizes[1]:.2f}M parameters; {device}, {dtype}, "
            f"{world} rank(s); {len(prompts)} prompts, {cut} cut; {cfg.steps} iterations of "
            f"{cfg.batch_size} episodes",
            flush=True,
        )

    def adam(model, lr):
        decayed = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others}]
        betas = (0.9, cfg.adam_beta2)
        return torch.optim.AdamW(
            groups, lr=lr, betas=betas, eps=cfg.adam_eps, weight_decay=0.0, fused=True
        )

    modules = {"policy": policy, "value": value_model}
    optimizers = {
        "adam_policy": adam(policy, cfg.lr),
        "adam_value": adam(value_model, cfg.value_lr),
    }
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    mixed = dtype in (torch.bfloat16, torch.float16)
    share = math.ceil(cfg.batch_size / world)  # episodes of the rank with most
    size = cfg.micro_batch_size or share
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    rounded = device.type == "cuda" and mixed  # sampling is bound by reading the weights
    step, saved_step = 0, -1
    first, evaluated = None, -1  # `first`: the first iteration's numbers, to warn by
    if checkpoint:
        state = load_checkpoint(checkpoint, modules, optimizers, device, rank)
        step = saved_step = state["step"]
        first, evaluated = state["first"], state["evaluated"]
        scaler.load_state_dict(state["scaler"])
        if rank == 0:
            print(f"resumed at iteration {step} from {checkpoint}", flush=True)
    # Losses go through these two: DDP averages the gradients over the ranks in its backward pass.
    compiled = {name: torch.compile(m) if cfg.compile else m for name, m in modules.items()}
    parallel = compiled
    if world > 1:
        where = [device] if device.type == "cuda" else None
        parallel = {n: DistributedDataParallel(m, device_ids=where) for n, m in parallel.items()}

    def save():
        nonlocal saved_step
        if step > saved_step:
            state = {"scaler": scaler.state_dict(), "first": first, "evaluated": evaluated}
            save_checkpoint(cfg, step, modules, optimizers, state, device, rank)
            saved_step = step

    def stop():
        """SIGTERM: what was done is saved, and --resume goes on from here to the same weights."""
        save()
        all_reduce([0.0], device)  # when one rank ends, torchrun ends the others: let rank 0 finish
        if rank == 0:
            print(
                f"stopped by SIGTERM at iteration {step}; --resume goes on from there", flush=True
            )
        sys.exit(128 + signal.SIGTERM)

    def sum_over_ranks(tensor):
        if world > 1:
            dist.all_reduce(tensor)
        return tensor

    def rated(lines, texts):
        """Scores (B,) of responses; all ranks end together where one can't get them."""
        try:
            scores, why = ratings(rater, template, lines, texts, device), ""
        except JudgeError as error:
            scores, why = None, str(error)
        told = gather([why] if scores is None else [], device)
        if not told:
            return scores
        failed = [text for text in told if text]
        if not failed:
            stop()
        save()
        all_reduce([0.0], device)
        if rank == 0:
            print(f"{failed[0]}; stopped at iteration {step}", file=sys.stderr)
            print(
                "--resume goes on from there, and asks nothing twice", file=sys.stderr, flush=True
            )
        sys.exit(1)

    def responses_of(model, lines, line_ids, temperature):
        """One response to each held-out prompt, from all ranks: its line with `response`, `parts`
        (proxy, kl in nats, gold and its parts, eos, words), in order."""
        sampler = copy.deepcopy(model).bfloat16() if rounded else model
        settings = dataclasses.replace(cfg, temperature=temperature)
        order = sorted(range(len(lines)), key=lambda i: len(line_ids[i]))
        rows, found = 4 * size, []  # no gradients are kept, so more fit
        for begin in range(0, len(lines), rows * world):
            if stop_requested(device):
                stop()
            mine = order[begin : begin + rows * world][rank::world]
            some = mine or order[:1]  # all ranks ask the judge, and end together where it ends
            seed = 2 * (1_000_003 * (cfg.seed + 1) + begin * world + rank) + (model is policy)
            batch = sample_batch(
                sampler,
                [lines[i] for i in some],
                [line_ids[i] for i in some],
                settings,
                tokenizer.eot_token,
                seed,
                device,
            )
            texts, ended = texts_of(batch, tokenizer), batch["ended"].tolist()
            scores = rated(batch["lines"], texts).tolist()
            if temperature:  # greedy samples say nothing of the KL
                gap = response_logprobs(model, batch, size, cfg, autocast)
                gap = gap - response_logprobs(reference, batch, size, cfg, autocast)
                gap = gap.sum(1).tolist()
            for n, i in enumerate(mine):
                parts = {"words": float(len(texts[n].split()))} | judge(gold, lines[i], texts[n])
                parts |= {"proxy": scores[n], "eos": float(ended[n])}
                parts |= {"kl": gap[n]} if temperature else {}
                found.append(lines[i] | {"index": i, "response": texts[n], "parts": parts})
        return sorted(gather(found, device), key=lambda sample: sample["index"])

    few = held_out[: max(cfg.num_prompts // 4, 1)] if held_out else []
    few_ids = held_out_ids[: len(few)]
    save()  # from now on there are answers to lose
    base = responses_of(reference, few, few_ids, cfg.temperature)
    judged = "gold" if gold else "proxy"
    started, first_step = time.time(), step
    while True:
        if step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0):
            save()
        if stop_requested(device):
            stop()
        due = step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0)
        if few and due and step > evaluated:
            samples = responses_of(policy, few, few_ids, cfg.temperature)
            if rank == 0:
                found = beside(samples, base, cfg.missing_eos_score)
                record = {"step": step, "seconds": round(time.time() - started, 1)}
                for task, table in found["policy"].items():
                    prefix = "eval" if task == "all" else f"eval_{task}"
                    record |= {f"{prefix}_{k}": v[0] for k, v in table.items() if k != "count"}
                record["eval_distinct_2"] = found["distinct_2"][0]
                wins = found["win_rate"][judged]
                record |= dict(zip(WIN_RATE, wins, strict=True))
                append_line(out_dir / "metrics.jsonl", record)
                print(
                    f"iteration {step}/{cfg.steps}  held out: wins {wins[0]:.3f} against the "
                    f"reference by {judged}, "
                    + ", ".join(
                        f"{k} {record[f'eval_{k}']:.2f}"
                        for k in ("proxy", "gold", "kl", "distinct_2")
                        if f"eval_{k}" in record
                    ),
                    flush=True,
                )
                for sample in one_a_task(samples):
                    append_line(out_dir / "samples.jsonl", {"step": step} | sample)
                    parts = sample["parts"]
                    total = penalised(parts["proxy"], parts["kl"], cfg.beta)
                    print(f"  {sample['prompt'][-160:]!r}\n    -> {sample['response']!r}")
                    print(
                        f"    score {parts['proxy']:+.2f}  KL {parts['kl']:.2f}  total {total:+.2f}"
                    )
            evaluated = step
        if step == cfg.steps:
            break

        # 1. Rollout: this rank's share of the prompts, a response to each.
        begun = time.time()
        order = prompts_of_step(len(prompts), cfg.batch_size, step, cfg.seed)
        # By length, so that rows of one forward are alike: pads cost as much as tokens.
        mine = sorted(order[rank::world], key=lambda i: len(ids[i]))
        some = mine or order[:1]  # a rank without prompts goes along, with weight 0
        sampler = copy.deepcopy(policy).bfloat16() if rounded else policy
        seed = (cfg.seed * 1_000_003 + step) * 4096 + rank
        batch = sample_batch(
            sampler,
            [prompts[i] for i in some],
            [ids[i] for i in some],
            cfg,
            tokenizer.eot_token,
            seed,
            device,
        )
        del sampler
        texts = texts_of(batch, tokenizer)
        sampled = time.time()
        if stop_requested(device):
            stop()  # nothing has changed in this iteration: it will be begun again

        # 2. The judge's scores of whole responses, and the reference's log-probabilities.
        absent = rater.absent
        scores = rated(batch["lines"], texts)
        absent = rater.absent - absent
        scores = punish_missing_eos(scores, batch["ended"], len(mine), cfg, device)
        ref_logprobs = response_logprobs(reference, batch, size, cfg, autocast)
        if step == first_step:  # by the forward that has no gradients; the update's must agree
            logprobs = response_logprobs(compiled["policy"], batch, size, cfg, autocast)
            if step == 0:
                check_start(logprobs, ref_logprobs, 1e-3 if cfg.compile else 1e-5, device)
        scored = time.time()

        # 3. One update: the responses are the present policy's, so that its gradient is unbiased.
        rate = learning_rate(step, cfg.steps, dataclasses.replace(cfg, lr=1.0))  # of the peak
        for optimizer, peak in zip(optimizers.values(), (cfg.lr, cfg.value_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * peak
        real = len(mine)
        total = all_reduce([sum(map(len, batch["responses"][:real]))], device)[0]  # tokens
        sums = torch.zeros(len(DIRECT_SUMS), dtype=torch.float64, device=device)
        worths, all_values = [], []
        micros = micro_batches(share, size)
        for number, rows in enumerate(micros):
            # A rank without episodes left runs too: the others wait for its gradients.
            weight = float(rows.start < real)
            rows = rows if weight else slice(0, 1)
            columns = slice(max(batch["lengths"][rows]))
            tokens, mask = batch["tokens"][rows, columns], batch["mask"][rows, columns]
            with ExitStack() as waiting:
                last = number == len(micros) - 1
                for model in parallel.values() if world > 1 and not last else ():
                    waiting.enter_context(model.no_sync())
                with autocast:
                    logits = parallel["policy"](tokens, at=predicts(mask))  # (N, V)
                    values = state_values(parallel["value"], tokens, mask)  # (b, columns)
                new_logprobs = token_logprobs(logits, tokens, mask, cfg.temperature)
                gap = new_logprobs.detach() - ref_logprobs[rows, columns]
                worth = penalised(scores[rows], gap.sum(1).double(), cfg.beta).to(values.dtype)
                policy_losses, value_losses = reinforce(new_logprobs, values, worth, mask)
                # One mean over micro-batches and ranks; DDP averages: undo it.
                loss = (policy_losses.sum() + value_losses.sum()) * (weight * world / total)
                scaler.scale(loss).backward()
            with torch.no_grad():
                bonus = entropy(logits / cfg.temperature).sum()
            if step == first_step:
                ratio = (new_logprobs.detach() - logprobs[rows, columns]).exp()[mask]
                check_ratio(ratio, LIMITS[dtype], device)
            numbers = [policy_losses.sum(), value_losses.sum(), bonus, gap.sum(), worth.sum()]
            sums += weight * torch.stack([x.detach().double() for x in numbers])
            if weight:
                worths.append(worth[:, None].expand_as(values) * mask)
                all_values.append(values.detach())
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        norms = {
            name: torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm).item()
            for name, model in modules.items()
        }
        # The norms are of summed gradients, the same on all ranks: all stop, or none.
        # float16 may overflow: the scaler then skips the step and halves its scale.
        finite = all(map(math.isfinite, norms.values()))
        if not finite and scaler.get_scale() <= 1:
            if rank == 0:
                print(
                    f"iteration {step}: the gradient norms are {norms}; stopped before the update; "
                    f"the last checkpoint is as it was",
                    file=sys.stderr,
                    flush=True,
                )
            sys.exit(1)
        for optimizer in optimizers.values():
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

        # 4. What happened, in numbers over all ranks.
        counted = batch["mask"] if real else torch.zeros_like(batch["mask"])
        worths, all_values = (
            joined(x, batch) if real else torch.zeros_like(ref_logprobs)
            for x in (worths, all_values)
        )
        explained = explained_variance(worths, all_values, counted, sum_over_ranks)
        counts = [real, scores[:real].sum().item(), batch["ended"][:real].sum().item()]
        counts += [sum(not text.strip() for text in texts[:real]), float(absent)]
        found = all_reduce([*counts, *sums.tolist()], device)
        episodes, score, ended, empty, absent, *summed = found
        summed = dict(zip(DIRECT_SUMS, summed, strict=True))
        done = time.time()
        step += 1
        record = {
            "step": step,
            "seconds": round(done - started, 1),
            "score": score / episodes,
            "rating": 5.5 + 4.5 * score / episodes,
            "kl": summed["kl"] / episodes,  # to the reference, nats a sequence
            "objective": summed["objective"] / episodes,
            "eos": ended / episodes,
            "empty": empty / episodes,
            "tokens": total / episodes,
            "policy_loss": summed["policy_loss"] / total,
            "value_loss": summed["value_loss"] / total,
            "entropy": summed["entropy"] / total,
            "explained_variance": explained,
            "policy_norm": norms["policy"] if finite else 0.0,
            "value_norm": norms["value"] if finite else 0.0,
            "absent": absent / (10 * episodes),  # answers not among a server's likely tokens
            "lr": rate * cfg.lr,
            "rollout_share": (sampled - begun) / (done - begun),
            "scoring_share": (scored - sampled) / (done - begun),
            "update_share": (done - scored) / (done - begun),
        }
        if first is None:
            first = {name: record[name] for name in ("eos", "value_loss")}
        if step % cfg.log_every == 0 or step == cfg.steps:
            left = (done - started) / (step - first_step) * (cfg.steps - step)
            if rank == 0:
                append_line(out_dir / "metrics.jsonl", record)
                print(
                    f"iteration {step}/{cfg.steps}  score {record['score']:+.3f} (rating "
                    f"{record['rating']:.2f})  KL {record['kl']:.2f}  EOS {record['eos']:.3f}  "
                    f"tokens {record['tokens']:.1f}  entropy {record['entropy']:.2f}  value loss "
                    f"{record['value_loss']:.3f}  explained {record['explained_variance']:.2f}  "
                    f"{left // 60:.0f}:{left % 60:02.0f} left",
                    flush=True,
                )
                for warning in warnings_of(record, first, cfg):
                    print(f"  warning: {warning}", flush=True)
                if record["absent"] > 0.5:
                    print("  warning: most ratings are not among the server's likely tokens")

    # The finished policy, then what it is worth on held-out prompts, sampled and greedy.
    if rank == 0:
        save_model(out_dir, policy, tokenizer, {"stage": "rlaif"})
    report = {"step": step, "seconds": round(time.time() - started, 1)}
    report["episodes"] = step * cfg.batch_size
    report["asked"] = all_reduce([float(rater.asked)], device)[0]
    report["peak_memory_gib"] = round(peak_memory(device) / 2**30, 2)
    some, some_ids = held_out[: cfg.num_prompts], held_out_ids[: cfg.num_prompts]
    for name, temperature in (("sampled", cfg.temperature), ("greedy", 0.0)) if some else ():
        samples = responses_of(policy, some, some_ids, temperature)
        others = responses_of(reference, some, some_ids, temperature)
        report[name] = beside(samples, others, cfg.missing_eos_score)
        if rank == 0:
            print_beside(f"{name} (temperature {temperature:g})", report[name])
    if rank == 0:
        write_json(out_dir / "report.json", report)
        for path in out_dir.glob("checkpoint-*"):
            shutil.rmtree(path)
        print(f"{out_dir}: finished in {report['seconds']:.0f} s, {report['peak_memory_gib']} GiB")
    del parallel  # DDP is part of a reference cycle and keeps the group
    end_process(device)


def peak_memory(device):
    """The most memory this process has held, bytes: on the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    commands = {
        "label": (LabelConfig, label_main),
        "agree": (AgreeConfig, agree_main),
        "revise": (ReviseConfig, revise_main),
        "direct": (DirectConfig, direct_main),
    }
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0)
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        refuse(f"rlaif.py: expected a sub-command: {', '.join(commands)}")
    config, job = commands[sys.argv[1]]
    try:
        job(parse_config(config, __doc__, sys.argv[1]))
    except JudgeError as error:
        print(f"{error}; what was answered is kept, --resume goes on", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    guarded(main)
