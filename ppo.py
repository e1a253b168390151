"""Proximal policy optimisation for language: stage 3 of RLHF.

Objective, for prompts x and responses y sampled from the policy (Ziegler et al., arXiv:1909.08593):

    maximise  E[ score(x, y) - beta * KL(policy(. | x), reference(. | x)) ]

The KL is paid token by token: r_t = -beta (log pi(a_t) - log pi_ref(a_t)), and the score is added
at the last token. A value network says what to expect before each token; advantages are by GAE
(arXiv:1506.02438); the update is PPO's clipped one (arXiv:1707.06347, eq. 7). Four models: the
policy and the value network learn, the reference (the policy as it was) and the reward don't.

One iteration is a rollout, its scores, advantages, a few epochs of minibatches: see `main`.

Its relatives are flags: advantages of whole responses, without a value network, by a moving mean
(`--advantage reinforce`), by the other responses to the prompt (rloo) or the mean and spread of all
(grpo); a KL to the old policy in the place of clipping (`--surrogate kl`); the likelihood of
demonstrations beside the reward (`--ptx_coef`, PPO-ptx).

Simplified against the papers: one optimiser step size for all weights of a network, no buffer of
older rollouts. Every variant's ratio is a token's, and its loss the mean over all tokens of a
minibatch; of the sources, RLOO's ratio is a response's and GRPO's means are a response's.

    python ppo.py --gold data/toy.py                    # the embedded task, against runs/reward
    python ppo.py --reward data/toy.py --out_dir runs/ppo-gold       # a reward of your own
    python ppo.py --advantage rloo --num_samples 4 --no-whiten_advantages --out_dir runs/rloo
    torchrun --nproc_per_node=8 ppo.py --init runs/sft --reward runs/reward --prompts p.jsonl \
        --validation held.jsonl --lr 3e-6 --value_lr 1e-5 --batch_size 512 --minibatch_size 64 \
        --micro_batch_size 8 --max_new_tokens 128
"""

import argparse
import copy
import dataclasses
import datetime
import gc
import gzip
import hashlib
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import typing
import zlib
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
    check_space,
    check_tokenizer,
    encode,
    entropy,
    generate,
    last_tokens,
    load_config,
    load_model,
    load_tokenizer,
    pad,
    predicts,
    read_json,
    save_model,
    text_of,
    token_logprobs,
    tokenizer_hash,
    weight_files,
    whole_file,
    write_json,
)

STATISTICS = ("reward_mean", "reward_std", "score_transform")
# How far a token's probability may be from itself in two forwards, as a share of it: sums round
# otherwise among other rows. Measured: 4e-6 in float32 on the embedded task, 1.5e-5 with logits
# near -100; 0.013 in float16, 0.11 in bfloat16. The bugs that are looked for change it far more.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}
# What is summed over the tokens of all updates of an iteration, and logged as means a token.
SUMMED = ("policy_loss", "value_loss", "clip_fraction", "update_kl", "entropy")
WIN_RATE = ("eval_win_rate", "eval_win_rate_low", "eval_win_rate_high")


@dataclasses.dataclass(frozen=True)
class Config:
    prompts: Annotated[str, "prompts to respond to"] = "data/toy/prompts_train.jsonl"
    validation: Annotated[str, "held-out prompts; empty: none"] = (
        "data/toy/prompts_validation.jsonl"
    )
    init: Annotated[str, "policy to start from, and the reference: a run directory"] = "runs/sft"
    reward: Annotated[str, "reward models and Python files with score(...), by commas"] = (
        "runs/reward"
    )
    reward_weights: Annotated[str, "weight of each, by commas; empty: equal ones"] = ""
    combine: Annotated[
        str,
        "of several rewards: mean; min (Coste et al. 2023); or llama2: of helpful,safe, the safe "
        "one's raw score where a prompt is `unsafe` or its sigmoid is below 0.15, else the other's",
    ] = "mean"
    shaping: Annotated[
        str,
        "of scores, to learn from: none; clip (to --score_clip); whiten (mean 0, std 1 over a "
        "batch; Llama 2); par (sigmoid of the score less that of the prompt's `reference`)",
    ] = "none"
    score_clip: Annotated[float, "largest score under --shaping clip, either way"] = 1.0
    value_init: Annotated[
        str,
        "reward model that the value network starts as; policy: --init's trunk under a head of 0; "
        "random: no trunk's; empty: the first reward model of --reward, else policy",
    ] = ""
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) is the truth"] = ""
    out_dir: Annotated[str, "run directory"] = "runs/ppo"
    beta: Annotated[float, "KL coefficient (Stiennon et al.: 0.05; InstructGPT: 0.02)"] = 0.2
    kl_target: Annotated[float, "nats a sequence that beta is steered to; 0: beta is fixed"] = 0.0
    kl_horizon: Annotated[int, "episodes in which beta can change by a fifth (Ziegler et al.)"] = (
        10000
    )
    kl_estimator: Annotated[str, "of the penalty: k1 (the log-ratio), k2 or k3"] = "k1"
    stop_kl: Annotated[
        float,
        "mean nats a token from the old policy in an epoch, after which no other follows; 0: off",
    ] = 0.0
    missing_eos_score: Annotated[
        str,
        "if a response did not end, the smaller of this and the batch's lowest; none: its own",
    ] = "-1"
    advantage: Annotated[
        str,
        "gae, by a value network; or without one, of whole responses: reinforce, rloo, grpo",
    ] = "gae"
    num_samples: Annotated[
        int, "responses to each prompt of an iteration (rloo: 2 to 4; grpo: 64)"
    ] = 1
    baseline_decay: Annotated[float, "of reinforce's moving mean return, an iteration"] = 0.9
    group_std: Annotated[bool, "grpo divides by the std over a prompt's responses"] = True
    kl_in_loss: Annotated[
        bool, "beta's KL stands in the loss, not in the rewards (GRPO: with --kl_estimator k3)"
    ] = False
    whiten_rewards: Annotated[
        bool, "rewards of std 1 over a batch, their mean kept (Ziegler et al.)"
    ] = False
    whiten_advantages: Annotated[
        bool, "advantages of mean 0 and std 1 over a batch (PPO; RLOO and GRPO: not)"
    ] = True
    surrogate: Annotated[
        str, "clip, or kl: the ratio unclipped, and KL from the old policy at a steered price"
    ] = "clip"
    step_kl_target: Annotated[
        float, "mean nats a token of an iteration's last epoch, which that price is steered to"
    ] = 0.01
    gamma: Annotated[float, "discount a token (all sources: 1)"] = 1.0
    lam: Annotated[float, "GAE's lambda (all sources: 0.95)"] = 0.95
    clip: Annotated[float, "largest change of a ratio that is rewarded (sources: 0.2)"] = 0.2
    value_clip: Annotated[float, "largest change of a value that is rewarded (sources: 0.2)"] = 0.2
    entropy_coef: Annotated[float, "bonus a nat of entropy, a token (sources: 0)"] = 0.0
    ptx_coef: Annotated[
        float, "weight of demonstrations' nats a token in the policy's loss (InstructGPT: 27.8)"
    ] = 0.0
    ptx_data: Annotated[str, "those demonstrations; pre-training text: an empty prompt"] = ""
    ptx_batch_size: Annotated[int, "of them an update (InstructGPT: 8 an episode)"] = 32
    ptx_validation: Annotated[
        str, "held-out demonstrations, whose nats a token each evaluation tells; empty: none"
    ] = ""
    trainable_layers: Annotated[
        int, "blocks of the policy that learn, the last ones, and the final norm; 0: everything"
    ] = 0
    steps: Annotated[int, "iterations, each of batch_size episodes"] = 50
    batch_size: Annotated[int, "episodes an iteration, over all ranks (sources: 512)"] = 128
    minibatch_size: Annotated[
        int, "episodes an update, over all ranks, about: all updates are alike (InstructGPT: 64)"
    ] = 32
    micro_batch_size: Annotated[int, "episodes a forward on one rank; 0: all of its share"] = 0
    update_epochs: Annotated[int, "passes over a rollout (Stiennon: 4; InstructGPT: 1)"] = 2
    lr: Annotated[float, "the policy's peak learning rate (sources: 1e-6 to 1.5e-5)"] = 3e-4
    value_lr: Annotated[float, "the value network's (sources: 1.65e-6 to 1.5e-5)"] = 5e-4
    warmup: Annotated[int, "iterations of linear warm-up (InstructGPT: 10)"] = 2
    final_lr: Annotated[float, "last rate over peak rate, by a cosine"] = 0.1
    adam_beta2: Annotated[float, "Adam's second-moment decay (Llama 2: 0.95)"] = 0.95
    adam_eps: Annotated[float, "Adam's epsilon (OpenAI 2019, Llama 2: 1e-5)"] = 1e-5
    weight_decay: Annotated[float, "AdamW's, on matrices (Llama 2: 0.1)"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm, of each network"] = 1.0
    temperature: Annotated[float, "of sampling, and of every log-probability"] = 1.0
    max_new_tokens: Annotated[int, "longest response, tokens"] = 48
    num_prompts: Annotated[int, "held-out prompts in the last evaluation; others: a quarter"] = 1000
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
    eval_every: Annotated[int, "iterations between evaluations; 0: only at the end"] = 10
    save_every: Annotated[int, "iterations between checkpoints; 0: only at the end"] = 10
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


# --- mathematics ----------------------------------------------------------------------------------


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Estimates of KL(policy, reference) from tokens that the policy drew, (B, T), nats a token.

    k1 = log p - log q, p the policy: unbiased, signed. k2 = k1^2 / 2: biased, never below 0.
    k3 = q/p - 1 - log(q/p): unbiased, never below 0. Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = ref_logprobs - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return log_ratio.exp() - 1 - log_ratio
    raise ValueError(f"kl estimator {kind}: expected k1, k2 or k3")


def token_rewards(scores, logprobs, ref_logprobs, mask, beta, kind="k1"):
    """r_t = -beta KL_t, and the score at each row's last response token, (B, T); 0 elsewhere.

    scores (B,); logprobs, ref_logprobs, mask (B, T). arXiv:1909.08593 eq. 2.
    """
    rewards = -beta * kl_estimate(logprobs, ref_logprobs, kind) * mask
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.bool() * columns).argmax(1, keepdim=True)  # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (arXiv:1506.02438 eq. 16) -> advantages, returns (B, T).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + V_t;
    the value after the last response token is 0. All (B, T), 0 outside the mask.
    """
    inside = mask.to(values.dtype)
    values = values * inside  # a pad's value must not be bootstrapped from
    advantages, carried = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(carried)
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = (delta + gamma * lam * carried) * inside[:, t]
        advantages[:, t] = carried
    return advantages, (advantages + values) * inside


def reinforce_advantages(returns, baseline):
    """R - b, (B,): b must not know these responses. Williams 1992."""
    return returns - baseline


def rloo_advantages(returns, num_samples):
    """R_i - mean of the other responses' to its prompt, (B,), a prompt's being adjacent. REINFORCE
    leave-one-out, arXiv:2402.14740."""
    groups = returns.view(-1, num_samples)  # (prompts, K)
    others = (groups.sum(1, keepdim=True) - groups) / (num_samples - 1)
    return (groups - others).flatten()


def grpo_advantages(returns, num_samples, divide_by_std=True):
    """(R_i - mean) / std over the responses to its prompt, (B,), a prompt's being adjacent; where
    they are alike, about 0. arXiv:2402.03300 section 4.1.2; without the division 2503.20783."""
    groups = returns.view(-1, num_samples)  # (prompts, K)
    advantages = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / groups.std(1, keepdim=True, correction=0).clamp(min=1e-4)
    return advantages.flatten()


def whiten(x, mask, shift_mean=True, all_reduce=None):
    """(x - mean) / sqrt(var + 1e-8) over the mask, (B, T), 0 outside it; var is the biased one.

    shift_mean False adds the mean back, so that the scale alone changes. all_reduce: sums a tensor
    over the ranks; without it the statistics are of this rank's part alone.
    """
    inside = mask.to(x.dtype)

    def total(values):
        values = torch.stack(values)
        return values if all_reduce is None else all_reduce(values)

    count, first = total([inside.sum(), (x * inside).sum()])
    mean = first / count
    (second,) = total([((x - mean) ** 2 * inside).sum()])
    white = (x - mean) / (second / count + 1e-8).sqrt()
    return (white if shift_mean else white + mean) * inside


def policy_loss(new_logprobs, logprobs, advantages, clip):
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), (B, T). arXiv:1707.06347 eq. 7."""
    ratio = (new_logprobs - logprobs).exp()  # 1 in the first minibatch: main checks it
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def kl_penalty_loss(new_logprobs, logprobs, advantages, coef):
    """-A ratio + coef KL(old policy, new), (B, T), the ratio unclipped. arXiv:1707.06347 eq. 8.

    The KL is k3 of the sampled tokens. They are the old policy's, so not only its mean but also its
    gradient's is that of the KL.
    """
    kl = kl_estimate(logprobs, new_logprobs, "k3")
    return -advantages * (new_logprobs - logprobs).exp() + coef * kl


def adaptive_coefficient(coef, kl, target):
    """Half where kl < target / 1.5, twice where kl > 1.5 target. arXiv:1707.06347 section 4."""
    return coef / 2 if kl < target / 1.5 else coef * 2 if kl > target * 1.5 else coef


def value_loss(new_values, values, returns, clip):
    """max((V - G)^2, (V_clipped - G)^2) / 2, (B, T), V_clipped within `clip` of the old value."""
    clipped = values + (new_values - values).clamp(-clip, clip)
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)


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


def adaptive_beta(beta, kl, target, batch_size, horizon):
    """beta (1 + e batch_size / horizon), e = clip(kl / target - 1, -0.2, 0.2); kl, target in nats a
    sequence. arXiv:1909.08593 section 2.2, with their code's step."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * batch_size / horizon)


def helpful_or_safe(helpful, safe, unsafe, threshold=0.15):
    """Llama 2's reward (arXiv:2307.09288 section 3.2.3) of two heads' raw outputs, (B,): the safe
    one's where the prompt is unsafe or sigmoid(safe) < threshold, else the helpful one's. Raw
    outputs are the logits of the scores, which is what it whitens."""
    decides = unsafe.logical_or(safe.sigmoid() < threshold)
    return torch.where(decides, safe, helpful)


def par_scores(scores, reference_scores):
    """mean_m sigmoid(score - reference score_m), (B,): preference as reward, arXiv:2502.18770.

    scores (B,); reference_scores (M, B).
    """
    return (scores - reference_scores).sigmoid().mean(0)


def combine_scores(scores, weights, combine):
    """Several rewards' scores (rewards, B) -> (B,): their weighted mean, or the least of them."""
    if combine == "min":
        return scores.min(0).values
    weights = torch.tensor(weights, dtype=scores.dtype, device=scores.device)
    return (weights[:, None] * scores).sum(0) / weights.sum()


# --- data and rewards -----------------------------------------------------------------------------


def split_names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def read_numbers(flag, text):
    """Numbers of at least 0, by commas."""
    try:
        numbers = [float(number) for number in split_names(text)]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number < math.inf for number in numbers):
        refuse(f"{flag} {text}: expected numbers of at least 0, by commas")
    return numbers


def read_prompts(path):
    """The lines of a prompts file, `task` being a string where there is one."""
    prompts = []
    for where, record in read_jsonl(path, {"prompt": True}):
        if not isinstance(record.get("task", ""), str):
            refuse(f"{where}: task: expected a string, got {json.dumps(record['task'])[:40]}")
        prompts.append(record)
    return prompts


def check_field(path, field, kind, default=None):
    """Ends the script unless `field` is a `kind` on all lines of a prompts file."""
    for where, line in read_jsonl(path, {"prompt": True}):
        if not isinstance(line.get(field, default), kind):
            found = json.dumps(line[field])[:40] if field in line else "none"
            refuse(f"{where}: {field}: expected a {kind.__name__}, got {found}")


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


def load_reward_model(directory, device="cpu"):
    """-> model, tokenizer, statistics {reward_mean, reward_std, score_transform} for `normalised`.

    Raises ValueError or OSError, in one line: no scalar head, statistics that are missing or no
    numbers (they are never guessed: other code relies on mean 0 and std 1), another tokenizer.
    """
    config, model = load_config(directory), load_model(directory, device)
    tokenizer = load_tokenizer(directory)
    check_tokenizer(tokenizer, directory, config)
    if model.score is None:
        raise ValueError(f"{directory}: a language model, not a reward model: it has no score head")
    statistics = {name: config.get(name) for name in STATISTICS}
    mean, std, transform = statistics.values()
    numbers = all(type(x) in (int, float) and math.isfinite(x) for x in (mean, std))
    if not numbers or not std > 0 or transform not in ("identity", "sigmoid"):
        raise ValueError(
            f"{directory}: config.json: {statistics}: its scores were never normalised, and can't "
            f"be used; reward.py --init {directory} --normalise_with POLICY --epochs 0 --data FILE "
            f"--out_dir NEW does it"
        )
    return model, tokenizer, statistics


def normalised(raw, statistics):
    """(transform(raw) - mean) / std, raw a tensor of the head's outputs."""
    mean, std, transform = (statistics[name] for name in STATISTICS)
    return ((torch.sigmoid(raw) if transform == "sigmoid" else raw) - mean) / std


def add_scalar_head(policy):
    """A language model's trunk under a new scalar head, drawn from the default generator."""
    model = GPT(policy.config, scalar_head=True)
    model.load_state_dict(policy.state_dict() | {"score.weight": model.score.weight.detach()})
    return model


def load_reward(name, tokenizer, device):
    """A --reward -> ("file", module), or ("model", model, statistics) in the policy's tokens."""
    if name.endswith(".py"):
        return "file", load_gold(name)
    try:
        model, theirs, statistics = load_reward_model(name, device)
    except (OSError, ValueError) as error:
        refuse(error)
    if tokenizer_hash(theirs) != tokenizer_hash(tokenizer):
        refuse(f"{name}: another tokenizer ({theirs.name}) than the policy's ({tokenizer.name})")
    return "model", model, statistics


def read_ptx(path, tokenizer, max_length):
    """Demonstrations -> (prompt ids, response ids), those that are too long cut, and how many."""
    lines = [line for _, line in read_jsonl(path, {"prompt": True, "response": False})]
    texts = [(line["prompt"], line["response"]) for line in lines]
    cut = [sum(map(len, encode(tokenizer, *pair, sys.maxsize))) > max_length for pair in texts]
    return [encode(tokenizer, *pair, max_length, True) for pair in texts], sum(cut)


def freeze(policy, trainable_layers):
    """Leaves the last blocks and the final norm to learn; the embeddings, which are the head, and
    the blocks before stay as they are."""
    policy.requires_grad_(False)
    for module in (*policy.h[-trainable_layers:], policy.ln_f):
        module.requires_grad_(True)


def prompts_of_step(count, batch_size, step, seed):
    """Numbers of the prompts of one iteration: whole epochs of `count` prompts in random orders run
    on from iteration to iteration."""
    begin, end = step * batch_size, (step + 1) * batch_size
    epochs = range(begin // count, (end - 1) // count + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs]
    skip = begin - epochs[0] * count
    return np.concatenate(orders)[skip : skip + batch_size].tolist()


# --- demonstrations beside the reward (PPO-ptx) ---------------------------------------------------


def demonstration_nll(model, some, device, autocast):
    """Sum of -log pi over the response tokens of demonstrations, nats, and their number."""
    tokens, mask = (x.to(device) for x in pad(*zip(*some, strict=True)))
    with autocast:
        logits = model(tokens, at=predicts(mask))  # (N, V)
    return -token_logprobs(logits, tokens, mask).sum(), mask.sum()


def add_ptx_gradient(model, ptx, update, size, cfg, scaler, autocast, device, rank, world):
    """Adds the gradient of ptx_coef times the nats a token of an update's demonstrations, a mean
    over all ranks' tokens; -> this rank's nats and tokens, (2,)."""
    lines = prompts_of_step(len(ptx), cfg.ptx_batch_size, update, cfg.seed)
    lines = sorted(lines, key=lambda i: sum(map(len, ptx[i])))
    mine = lines[rank::world]
    total = all_reduce([sum(len(ptx[i][1]) for i in mine)], device)[0]
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    shares = micro_batches(math.ceil(len(lines) / world), size)
    for rows in shares:
        some, real = mine[rows] or lines[:1], float(bool(mine[rows]))
        last = rows is shares[-1]
        with model.no_sync() if world > 1 and not last else nullcontext():
            nll, count = demonstration_nll(model, [ptx[i] for i in some], device, autocast)
            scaler.scale(nll * (cfg.ptx_coef * real * world / total)).backward()
        sums += real * torch.stack([nll.detach().double(), count])
    return sums


def held_out_nll(model, examples, size, device, autocast, rank, world):
    """Nats a token of held-out demonstrations, over all ranks."""
    mine = sorted(examples[rank::world], key=lambda example: sum(map(len, example)))
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in micro_batches(len(mine), size):
        with torch.no_grad():
            nll, count = demonstration_nll(model, mine[rows], device, autocast)
        total += torch.stack([nll.double(), count])
    nll, count = all_reduce(total.tolist(), device)
    return nll / count


# --- rollouts -------------------------------------------------------------------------------------


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


def reference_batch(lines, prompt_ids, responses, device):
    """The prompts' own responses as a batch to be scored."""
    tokens, mask = (x.to(device) for x in pad(prompt_ids, responses))
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, responses, strict=True)]
    return {"lines": lines, "tokens": tokens, "mask": mask, "lengths": lengths}


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


def scores_of(reward, batch, texts, size, autocast):
    """One reward's scores (B,), float64; of a model's, `size` rows a forward (0: all)."""
    kind, model, *statistics = reward
    if kind == "file":
        pairs = zip(batch["lines"], texts, strict=True)
        scores = [gold_score(model, line, text) for line, text in pairs]
        return batch["tokens"].new_tensor(scores, dtype=torch.float64)
    raw = []
    for tokens, mask in trimmed(batch, size):
        with torch.no_grad(), autocast:
            output = model(tokens, last_tokens(mask))  # (b,)
        raw.append(output.double())
    return normalised(torch.cat(raw), statistics[0])


def score_batch(rewards, weights, batch, texts, size, cfg, autocast):
    """Every reward's scores, combined, (B,) float64."""
    scores = [scores_of(reward, batch, texts, size, autocast) for reward in rewards]
    if cfg.combine == "llama2":
        unsafe = [line.get("unsafe", False) for line in batch["lines"]]
        return helpful_or_safe(*scores, torch.tensor(unsafe, device=scores[0].device))
    return combine_scores(torch.stack(scores), weights, cfg.combine)


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


def response_values(model, tokens, mask, statistics):
    """The value network's values, (B, T), on the scale of the scores: column t is of the state
    before token t is chosen. 0 outside the mask."""
    values = normalised(model(tokens, at=predicts(mask)), statistics)  # (N,)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


# --- evaluation -----------------------------------------------------------------------------------


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


# --- main -----------------------------------------------------------------------------------------


def main():
    cfg = parse_config(Config, __doc__)
    for name, choices in {
        "combine": ("mean", "min", "llama2"),
        "shaping": ("none", "clip", "whiten", "par"),
        "advantage": ("gae", "reinforce", "rloo", "grpo"),
        "kl_estimator": ("k1", "k2", "k3"),
        "surrogate": ("clip", "kl"),
    }.items():
        if getattr(cfg, name) not in choices:
            refuse(f"--{name} {getattr(cfg, name)}: expected one of {', '.join(choices)}")
    if max(cfg.gamma, cfg.lam) > 1 or cfg.adam_beta2 >= 1 or not cfg.temperature > 0:
        refuse("--gamma, --lam: expected at most 1; --adam_beta2: less; --temperature: above 0")
    counts = (cfg.batch_size, cfg.minibatch_size, cfg.update_epochs, cfg.max_new_tokens)
    counts += (cfg.num_samples, cfg.ptx_batch_size, cfg.log_every, cfg.kl_horizon)
    if min(counts) < 1 or not min(cfg.clip_norm, cfg.step_kl_target, cfg.score_clip) > 0:
        refuse(
            "--batch_size, --minibatch_size, --update_epochs, --max_new_tokens, --num_samples, "
            "--ptx_batch_size, --log_every, --kl_horizon, --clip_norm, --step_kl_target, "
            "--score_clip: expected more than 0"
        )
    if cfg.batch_size % cfg.num_samples:
        refuse(f"--num_samples: {cfg.batch_size} episodes are no whole groups of {cfg.num_samples}")
    for needed, names in {
        "advantage=gae": ("gamma", "lam", "value_init", "value_lr", "value_clip"),
        "advantage=reinforce": ("baseline_decay",),
        "advantage=grpo": ("group_std",),
        "surrogate=clip": ("clip",),
        "surrogate=kl": ("step_kl_target",),
        "shaping=clip": ("score_clip",),
    }.items():
        name, _, value = needed.partition("=")
        for flag in names if getattr(cfg, name) != value else ():
            if getattr(cfg, flag) != getattr(Config, flag):
                refuse(f"--{flag}: only with --{name} {value}")
    if bool(cfg.ptx_data) != (cfg.ptx_coef > 0):
        refuse("--ptx_coef and --ptx_data: one is nothing without the other")
    if cfg.advantage in ("rloo", "grpo") and cfg.num_samples < 2:
        refuse(f"--advantage {cfg.advantage}: compares a prompt's responses: --num_samples 4")
    if cfg.baseline_decay >= 1:
        refuse("--baseline_decay: expected less than 1")
    if cfg.kl_in_loss and cfg.kl_estimator == "k1":
        refuse("--kl_in_loss: the gradient of k1 is 0 on average: --kl_estimator k2 or k3")
    try:
        if cfg.missing_eos_score != "none" and not math.isfinite(float(cfg.missing_eos_score)):
            raise ValueError
    except ValueError:
        refuse(f"--missing_eos_score {cfg.missing_eos_score}: expected a number or none")
    names = split_names(cfg.reward)
    weights = read_numbers("--reward_weights", cfg.reward_weights) or [1.0] * len(names)
    if cfg.combine == "min" and cfg.reward_weights:
        refuse("--reward_weights: the least of several rewards has no weights")
    if cfg.kl_target and not cfg.beta:
        refuse("--kl_target: beta is steered by factors, and from 0 they lead nowhere")
    if cfg.gold and not cfg.validation:
        refuse("--gold: judges samples for --validation prompts, and there are none")
    if cfg.kl_target and cfg.kl_horizon < cfg.batch_size:
        refuse("--kl_horizon: expected at least --batch_size, or beta could fall below 0")
    if cfg.value_init.endswith(".py"):
        refuse("--value_init: expected a reward model's run directory, policy or random")
    if cfg.combine == "llama2" and (len(names) != 2 or cfg.reward_weights):
        refuse("--combine llama2: expected two rewards, helpful,safe, without weights")
    if not names or len(weights) != len(names) or not sum(weights) > 0:
        refuse(f"--reward_weights: expected {len(names)} numbers, one a --reward, not all 0")
    device, dtype, rank, world = start_process(cfg)

    # The four models. All stay in eval mode: dropout would make the ratio differ from 1.
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
    if cfg.trainable_layers > policy.config.n_layer:
        refuse(f"--trainable_layers: --init {cfg.init} has {policy.config.n_layer}")
    if cfg.trainable_layers:
        freeze(policy, cfg.trainable_layers)
    rewards = [load_reward(name, tokenizer, device) for name in names]
    models = [name for name, reward in zip(names, rewards, strict=True) if reward[0] == "model"]
    raw = dict(zip(STATISTICS, (0.0, 1.0, "identity"), strict=True))  # scores as they are
    for n, (kind, model, *_) in enumerate(rewards):
        if kind == "model":
            model.to(precision).requires_grad_(False)
            if cfg.combine == "llama2":
                rewards[n] = kind, model, raw
    modules, statistics = {"policy": policy}, raw
    value_init = cfg.value_init or (models[0] if models else "policy")
    if cfg.advantage == "gae" and value_init in ("policy", "random"):
        torch.manual_seed(cfg.seed)
        if value_init == "policy":
            modules["value"] = add_scalar_head(policy)
        else:
            modules["value"] = GPT(policy.config, scalar_head=True)
        torch.nn.init.zeros_(modules["value"].score.weight)
    elif cfg.advantage == "gae":
        # It starts knowing what a finished response scores (Stiennon et al. 2020).
        _, modules["value"], theirs = load_reward(value_init, tokenizer, "cpu")
        statistics = raw if cfg.combine == "llama2" else theirs
    for model in modules.values():
        model.eval().to(device, precision)
        model.checkpoint_activations = cfg.checkpoint_activations
    read_by = [*modules.values(), *(reward[1] for reward in rewards if reward[0] == "model")]
    positions = min(model.config.n_positions for model in read_by)
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
    if cfg.combine == "llama2":
        for path in [cfg.prompts, *([cfg.validation] if cfg.validation else [])]:
            check_field(path, "unsafe", bool, default=False)
    reference_ids = []
    if cfg.shaping == "par":
        check_field(cfg.prompts, "reference", str)
        most = cfg.max_new_tokens + 1
        reference_ids = [encode(tokenizer, "", x["reference"], most, True)[1] for x in prompts]
    ptx, ptx_held, ptx_cut = [], [], 0
    if cfg.ptx_data:
        ptx, ptx_cut = read_ptx(cfg.ptx_data, tokenizer, policy.config.n_positions)
    if cfg.ptx_validation:
        ptx_held, _ = read_ptx(cfg.ptx_validation, tokenizer, policy.config.n_positions)
    files = (cfg.prompts, cfg.validation, cfg.ptx_data, cfg.ptx_validation)
    inputs = [path for path in files if path]
    starts = [cfg.value_init] if cfg.value_init not in ("", "policy", "random") else []
    for directory in [cfg.init, *models, *starts]:
        inputs += [*weight_files(Path(directory)), Path(directory) / "config.json"]
    inputs += [name for name in [*names, cfg.gold] if name.endswith(".py")]
    checkpoint = open_run(cfg, inputs, device, rank, world)
    out_dir = Path(cfg.out_dir)
    if rank == 0:
        sizes = {
            name: sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
            for name, model in modules.items()
        }
        print(
            "parameters that learn: "
            + ", ".join(f"{name} {size:.2f}M" for name, size in sizes.items())
            + f"; {device}, {dtype}, {world} rank(s); {len(prompts)} prompts, {cut} cut; "
            f"{cfg.steps} iterations of {cfg.batch_size} episodes"
            + (f"; {len(ptx)} demonstrations, {ptx_cut} cut" if ptx else ""),
            flush=True,
        )

    def adam(model, lr):
        learning = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in learning if p.dim() == 2]
        others = [p for p in learning if p.dim() != 2]
        groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others}]
        betas = (0.9, cfg.adam_beta2)
        return torch.optim.AdamW(
            groups, lr=lr, betas=betas, eps=cfg.adam_eps, weight_decay=0.0, fused=True
        )

    peaks = {"policy": cfg.lr, "value": cfg.value_lr}
    optimizers = {f"adam_{name}": adam(model, peaks[name]) for name, model in modules.items()}
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    mixed = dtype in (torch.bfloat16, torch.float16)
    groups = cfg.batch_size // cfg.num_samples  # prompts an iteration
    share = math.ceil(groups / world) * cfg.num_samples  # episodes of the rank with most
    minibatches = min(math.ceil(cfg.batch_size / cfg.minibatch_size), share)
    largest = math.ceil(share / minibatches)  # episodes of a minibatch on one rank
    size = cfg.micro_batch_size or largest
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    rounded = device.type == "cuda" and mixed  # sampling is bound by reading the weights
    step = saved_step = 0
    beta, first = cfg.beta, None  # `first`: the first iteration's numbers, to warn by
    baseline, step_coef = None, 1.0  # of reinforce; the price of KL to the old policy
    earlier, started = 0.0, time.time()  # seconds until the checkpoint, and since
    evaluated = -1
    if checkpoint:
        state = load_checkpoint(checkpoint, modules, optimizers, device, rank)
        step = saved_step = state["step"]
        beta, first, evaluated = state["beta"], state["first"], state["evaluated"]
        baseline, step_coef = state["baseline"], state["step_coef"]
        earlier = state["seconds"]
        scaler.load_state_dict(state["scaler"])
        if rank == 0:
            print(f"resumed at iteration {step} from {checkpoint}", flush=True)
    # Losses go through these two: DDP averages the gradients over the ranks in its backward pass.
    compiled = {name: torch.compile(m) if cfg.compile else m for name, m in modules.items()}
    parallel = compiled
    if world > 1:
        where = [device] if device.type == "cuda" else None
        parallel = {n: DistributedDataParallel(m, device_ids=where) for n, m in parallel.items()}

    def elapsed():
        return earlier + time.time() - started

    def save():
        nonlocal saved_step
        if step > saved_step:
            state = {"scaler": scaler.state_dict(), "beta": beta, "first": first}
            state |= {"baseline": baseline, "step_coef": step_coef, "seconds": elapsed()}
            state["evaluated"] = evaluated  # SIGTERM in a rollout saves after it was logged
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
            if not mine:
                continue
            some, some_ids = [lines[i] for i in mine], [line_ids[i] for i in mine]
            # Not the reference's draws: a win rate is one of independent samples.
            seed = 2 * (1_000_003 * (cfg.seed + 1) + begin * world + rank) + (model is policy)
            eos = tokenizer.eot_token
            batch = sample_batch(sampler, some, some_ids, settings, eos, seed, device)
            texts, ended = texts_of(batch, tokenizer), batch["ended"].tolist()
            scores = score_batch(rewards, weights, batch, texts, rows, cfg, autocast).tolist()
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
    base = responses_of(reference, few, few_ids, cfg.temperature)
    judged = "gold" if gold else "proxy"
    started, first_step = time.time(), step
    while True:
        if step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0):
            save()
        if stop_requested(device):
            stop()
        due = step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0)
        due = due and step > evaluated
        forgot = {}  # logged beside the samples: a SIGTERM while these are drawn logs neither
        if ptx_held and due:
            nll = held_out_nll(policy, ptx_held, 4 * size, device, autocast, rank, world)
            forgot = {"eval_nll": nll}
            if rank == 0:
                print(f"iteration {step}/{cfg.steps}  demonstrations: {nll:.4f} nats a token")
        if forgot and not few and rank == 0:
            record = {"step": step, "seconds": round(elapsed(), 1)}
            append_line(out_dir / "metrics.jsonl", record | forgot)
        if few and due:
            samples = responses_of(policy, few, few_ids, cfg.temperature)
            if rank == 0:
                found = beside(samples, base, cfg.missing_eos_score)
                record = {"step": step, "seconds": round(elapsed(), 1)} | forgot
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
                    total = parts["proxy"] - beta * parts["kl"]
                    print(f"  {sample['prompt'][-160:]!r}\n    -> {sample['response']!r}")
                    print(
                        f"    score {parts['proxy']:+.2f}  KL {parts['kl']:.2f}  total {total:+.2f}"
                    )
        if due:
            evaluated = step
        if step == cfg.steps:
            break

        # 1. Rollout: this rank's share of the prompts, num_samples responses to each.
        begun = time.time()
        order = prompts_of_step(len(prompts), groups, step, cfg.seed)
        # By length, so that rows of one forward are alike: pads cost as much as tokens.
        mine = sorted(order[rank::world], key=lambda i: len(ids[i]))
        mine = [i for i in mine for _ in range(cfg.num_samples)]
        some = mine or order[:1] * cfg.num_samples  # a rank without prompts goes along, weighing 0
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
        tokens, mask = batch["tokens"], batch["mask"]
        counted = mask if mine else torch.zeros_like(mask)
        texts = texts_of(batch, tokenizer)
        sampled = time.time()
        if stop_requested(device):
            stop()  # nothing has changed in this iteration: it will be begun again

        # 2. Scores of whole responses; log-probabilities and values of tokens, by the forward that
        #    the update will use: the sampler's own differ in their last digits.
        scores = score_batch(rewards, weights, batch, texts, size, cfg, autocast)
        if cfg.shaping == "clip":
            scores = scores.clamp(-cfg.score_clip, cfg.score_clip)
        elif cfg.shaping == "whiten":
            scores = whiten(scores, counted.any(1), all_reduce=sum_over_ranks)
        elif cfg.shaping == "par":
            responses = [reference_ids[i] for i in some]
            known = reference_batch(batch["lines"], [ids[i] for i in some], responses, device)
            there = [line["reference"] for line in batch["lines"]]
            others = score_batch(rewards, weights, known, there, size, cfg, autocast)
            scores = par_scores(scores, others[None])
        scores = punish_missing_eos(scores, batch["ended"], len(mine), cfg, device)
        logprobs = response_logprobs(compiled["policy"], batch, size, cfg, autocast)
        ref_logprobs = response_logprobs(reference, batch, size, cfg, autocast)
        values = torch.zeros_like(logprobs)
        if "value" in modules:
            parts = []
            for part, inside in trimmed(batch, size):
                with torch.no_grad(), autocast:
                    parts.append(response_values(compiled["value"], part, inside, statistics))
            values = joined(parts, batch)
        scored = time.time()

        if step == 0:
            check_start(logprobs, ref_logprobs, 1e-3 if cfg.compile else 1e-5, device)

        # 3. Rewards, advantages and returns.
        paid = 0.0 if cfg.kl_in_loss else beta
        rewarded = token_rewards(scores, logprobs, ref_logprobs, mask, paid, cfg.kl_estimator)
        if cfg.whiten_rewards:
            rewarded = whiten(rewarded, counted, shift_mean=False, all_reduce=sum_over_ranks)
        if cfg.advantage == "gae":
            advantages, returns = gae(rewarded, values, mask, cfg.gamma, cfg.lam)
        else:
            whole = rewarded.sum(1)  # (B,)
            if cfg.advantage == "reinforce":
                worth = reinforce_advantages(whole, baseline or 0.0)
            elif cfg.advantage == "rloo":
                worth = rloo_advantages(whole, cfg.num_samples)
            else:
                worth = grpo_advantages(whole, cfg.num_samples, cfg.group_std)
            # All tokens of a response have the same.
            advantages, returns = worth[:, None] * mask, whole[:, None] * mask
        if cfg.whiten_advantages:
            advantages = whiten(advantages, counted, all_reduce=sum_over_ranks)

        # 4. The update: epochs of minibatches, the old policy's numbers being constants.
        rate = learning_rate(step, cfg.steps, dataclasses.replace(cfg, lr=1.0))  # of the peak
        for name in modules:
            for group in optimizers[f"adam_{name}"].param_groups:
                group["lr"] = rate * peaks[name]
        rollout = {"tokens": tokens, "mask": mask, "logprobs": logprobs, "values": values}
        rollout |= {"ref_logprobs": ref_logprobs, "advantages": advantages, "returns": returns}
        window = torch.zeros(len(SUMMED) + 1, dtype=torch.float64, device=device)
        updates, norms = 0, dict.fromkeys(modules, 0.0)
        ptx_sum = torch.zeros(2, dtype=torch.float64, device=device)
        for epoch in range(cfg.update_epochs):
            shuffle = np.random.default_rng([cfg.seed, step, epoch, rank])
            shuffled = shuffle.permutation(len(mine)).tolist()
            before = window.clone()
            for number in range(minibatches):
                minibatch = sorted(shuffled[number::minibatches])
                total = all_reduce([sum(len(batch["responses"][i]) for i in minibatch)], device)[0]
                micros = [minibatch[i : i + size] for i in range(0, largest, size)]
                for micro, rows in enumerate(micros):
                    # A rank without episodes left runs too: the others wait for its gradients.
                    real, rows = float(bool(rows)), rows or [0]
                    columns = max(batch["lengths"][i] for i in rows)
                    old = {name: x[rows, :columns] for name, x in rollout.items()}  # (b, columns)
                    read, inside = old["tokens"], old["mask"]
                    with ExitStack() as waiting:
                        last = micro == len(micros) - 1
                        for model in parallel.values() if world > 1 and not last else ():
                            waiting.enter_context(model.no_sync())
                        with autocast:
                            logits = parallel["policy"](read, at=predicts(inside))  # (N, V)
                        new_logprobs = token_logprobs(logits, read, inside, cfg.temperature)
                        known = new_logprobs, old["logprobs"], old["advantages"]
                        if cfg.surrogate == "clip":
                            losses = policy_loss(*known, cfg.clip)
                        else:
                            losses = kl_penalty_loss(*known, step_coef)
                        if cfg.kl_in_loss:
                            known = new_logprobs, old["ref_logprobs"]
                            losses = losses + beta * kl_estimate(*known, cfg.kl_estimator)
                        policy_sum = (losses * inside).sum()
                        value_sum = torch.zeros_like(policy_sum)
                        if "value" in modules:
                            with autocast:
                                network = parallel["value"]
                                new_values = response_values(network, read, inside, statistics)
                            losses = value_loss(
                                new_values, old["values"], old["returns"], cfg.value_clip
                            )
                            value_sum = (losses * inside).sum()
                        with torch.set_grad_enabled(cfg.entropy_coef > 0):
                            tempered = logits if cfg.temperature == 1 else logits / cfg.temperature
                            bonus = entropy(tempered).sum()
                        loss = policy_sum + value_sum - cfg.entropy_coef * bonus
                        # One mean over micro-batches and ranks; DDP averages: undo it.
                        scaler.scale(loss * (real * world / total)).backward()
                    ratio = (new_logprobs - old["logprobs"]).detach().exp()[inside]
                    if updates == 0 and step == first_step:
                        check_ratio(ratio, LIMITS[dtype], device)
                    clipped = ((ratio - 1).abs() > cfg.clip).sum()
                    drift = (ratio - 1 - ratio.log()).sum()  # KL of old and new policy, by k3
                    numbers = [policy_sum, value_sum, clipped, drift, bonus, inside.sum()]
                    window += real * torch.stack([x.detach().double() for x in numbers])
                if ptx:  # the policy's gradient is the sum of both, as in InstructGPT
                    update = (step * cfg.update_epochs + epoch) * minibatches + number
                    known = update, size, cfg, scaler, autocast, device, rank, world
                    ptx_sum += add_ptx_gradient(parallel["policy"], ptx, *known)
                for optimizer in optimizers.values():
                    scaler.unscale_(optimizer)
                found = {
                    name: torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm).item()
                    for name, model in modules.items()
                }
                finite = all(map(math.isfinite, found.values()))
                # The norms are of summed gradients, the same on all ranks: all stop, or none.
                # float16 may overflow: the scaler then skips the step and halves its scale.
                if not finite and scaler.get_scale() <= 1:
                    if rank == 0:
                        print(
                            f"iteration {step}, update {updates}: the gradient norms are {found}; "
                            f"stopped before the update; the last checkpoint is as it was",
                            file=sys.stderr,
                            flush=True,
                        )
                    sys.exit(1)
                if finite:
                    norms = {name: max(norms[name], norm) for name, norm in found.items()}
                for optimizer in optimizers.values():
                    scaler.step(optimizer)
                    optimizer.zero_grad(set_to_none=True)
                scaler.update()
                updates += 1
            moved = all_reduce((window - before).tolist(), device)  # all ranks decide together
            update_kl = moved[SUMMED.index("update_kl")] / moved[-1]
            if cfg.stop_kl and update_kl > cfg.stop_kl:
                break

        # 5. What happened, in numbers over all ranks; beta for the next iteration.
        real = len(mine)
        sums = {
            "episodes": real,
            "score": scores[:real].sum().item(),
            "kl": (logprobs - ref_logprobs)[:real].sum().item(),
            "eos": batch["ended"][:real].sum().item(),
            "empty": sum(not text.strip() for text in texts[:real]),
            "tokens": sum(map(len, batch["responses"][:real])),
            "return": (rewarded * counted).sum().item(),
        }
        sums = dict(zip(sums, all_reduce(sums.values(), device), strict=True))
        *summed, trained = all_reduce(window.tolist(), device)
        episodes = sums["episodes"]
        done = time.time()
        step += 1
        record = {
            "step": step,
            "seconds": round(elapsed(), 1),
            "score": sums["score"] / episodes,
            "kl": sums["kl"] / episodes,  # to the reference, nats a sequence
            "objective": (sums["score"] - beta * sums["kl"]) / episodes,
            "beta": beta,
            "eos": sums["eos"] / episodes,
            "empty": sums["empty"] / episodes,
            "tokens": sums["tokens"] / episodes,
            # update_kl: old policy to new; it, clip_fraction and entropy are a token's
            **{name: x / trained for name, x in zip(SUMMED, summed, strict=True)},
            **{f"{name}_norm": norm for name, norm in norms.items()},
            "updates": updates,
            "lr": rate * cfg.lr,
            "rollout_share": (sampled - begun) / (done - begun),
            "scoring_share": (scored - sampled) / (done - begun),
            "update_share": (done - scored) / (done - begun),
        }
        explained = ""
        if "value" in modules:
            known = explained_variance(returns, values, counted, sum_over_ranks)
            record["explained_variance"] = known
            explained = f"  value loss {record['value_loss']:.3f}  explained {known:.2f}"
        if ptx:
            nll, count = all_reduce(ptx_sum.tolist(), device)
            record["ptx_loss"] = nll / count  # nats a token of demonstrations
        if cfg.surrogate == "kl":
            record["step_coef"] = step_coef
            step_coef = adaptive_coefficient(step_coef, update_kl, cfg.step_kl_target)
        if cfg.advantage == "reinforce":
            now, old = sums["return"] / episodes, baseline
            baseline = now if old is None else old + (1 - cfg.baseline_decay) * (now - old)
            record["baseline"] = baseline  # of the next iteration
        if first is None:
            first = {name: record[name] for name in ("eos", "value_loss")}
        if cfg.kl_target:
            beta = adaptive_beta(beta, record["kl"], cfg.kl_target, cfg.batch_size, cfg.kl_horizon)
        if step % cfg.log_every == 0 or step == cfg.steps:
            left = (done - started) / (step - first_step) * (cfg.steps - step)
            if rank == 0:
                append_line(out_dir / "metrics.jsonl", record)
                print(
                    f"iteration {step}/{cfg.steps}  score {record['score']:+.3f}  KL "
                    f"{record['kl']:.2f}  EOS {record['eos']:.3f}  tokens {record['tokens']:.1f}  "
                    f"clipped {record['clip_fraction']:.3f}  entropy {record['entropy']:.2f}"
                    f"{explained}  {left // 60:.0f}:{left % 60:02.0f} left",
                    flush=True,
                )
                for warning in warnings_of(record, first, cfg):
                    print(f"  warning: {warning}", flush=True)

    # The finished policy, then what it is worth on held-out prompts, sampled and greedy.
    if rank == 0:
        save_model(out_dir, policy, tokenizer, {"stage": "ppo"})
    report = {"step": step, "seconds": round(elapsed(), 1), "beta": beta}
    report["episodes"] = step * cfg.batch_size
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


if __name__ == "__main__":
    guarded(main)
