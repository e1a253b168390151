"""Direct preference optimisation: preferences to policy, without a reward model or sampling.

Objective, for a chosen response y_w and a rejected one y_l to a prompt x (Rafailov et al.,
arXiv:2305.18290 eq. 7), pi being the policy and pi_ref the reference, where it starts:

    minimise  -E[ log sigmoid(beta h) ],  h = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)

It is the Bradley-Terry likelihood of the preferences under the reward beta log pi/pi_ref, whose
optimal policy at KL coefficient beta is pi itself. Relatives, by --loss: ipo, hinge, robust,
plackett_luce (whole rankings), cpl (no reference). --label_smoothing makes dpo conservative DPO;
comparisons with a `label` (AI feedback) are learnt as probabilities. With --online JUDGE the policy
samples, the judge ranks, and the policy learns from that, round by round.

Simplified against the paper: a ranking's pairs are one batch element; AdamW, not RMSprop.

    python dpo.py --gold data/toy.py                   # the embedded task, runs/feedback's rankings
    python dpo.py --online runs/reward --out_dir runs/online      # samples of its own, judged
    torchrun --nproc_per_node=8 dpo.py --init runs/sft --data pairs.jsonl --validation held.jsonl \
        --prompts held.jsonl --max_new_tokens 128 --beta 0.1 --lr 5e-7 --warmup 150 \
        --batch_size 64 --micro_batch_size 4 --out_dir runs/hh
"""

import argparse
import copy
import dataclasses
import datetime
import gc
import gzip
import hashlib
import importlib.util
import itertools
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
from array import array
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from model import (
    batches_of_groups,
    check_space,
    check_tokenizer,
    encode,
    generate,
    group_by_prompt,
    groups_of,
    last_tokens,
    load_config,
    load_model,
    load_tokenizer,
    masks_of_responses,
    pad,
    pad_beside,
    predicts,
    read_json,
    row_lengths,
    save_model,
    text_of,
    token_logprobs,
    tokenizer_hash,
    weight_files,
    whole_file,
    write_json,
)

STATISTICS = ("reward_mean", "reward_std", "score_transform")
WIN_RATE = ("eval_win_rate", "eval_win_rate_low", "eval_win_rate_high")
LOGGED = ("accuracy", "margin", "weight", "chosen", "rejected")  # of every pair
LOSSES = ("dpo", "ipo", "hinge", "robust", "plackett_luce", "cpl")
# How far the first log-probability of a response may be from the reference's, as a share of it: the
# two are one, but sums round otherwise among other rows.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass(frozen=True)
class Config:
    data: Annotated[str, "rankings or comparisons; several files by commas"] = (
        "runs/feedback/rankings.jsonl"
    )
    validation: Annotated[str, "held-out rankings or comparisons; empty: none"] = (
        "runs/feedback_validation/rankings.jsonl"
    )
    init: Annotated[str, "policy to start from: a run or Hugging Face GPT-2 directory"] = "runs/sft"
    reference: Annotated[str, "policy that KL is to; empty: --init"] = ""
    online: Annotated[
        str, "judge of the policy's own samples, in the place of --data: a reward model or FILE.py"
    ] = ""
    judge_noise: Annotated[
        float, "scale of Gumbel noise on the judge's scores: people simulated (annotate.py)"
    ] = 0.0
    train_prompts: Annotated[str, "prompts of online rounds"] = "data/toy/prompts_train.jsonl"
    rounds: Annotated[int, "online rounds (RLHF Workflow: 3)"] = 20
    round_prompts: Annotated[int, "prompts a round, over all ranks"] = 256
    num_samples: Annotated[int, "responses to each, all of whose pairs are learnt"] = 2
    refresh_reference: Annotated[
        bool, "each online round's reference is the policy that begins it (RLHF Workflow)"
    ] = False
    missing_eos_score: Annotated[
        str, "online, if a response did not end, the smaller of this and the lowest; none: its own"
    ] = "-1"
    prompts: Annotated[str, "held-out prompts to sample for; empty: none"] = (
        "data/toy/prompts_validation.jsonl"
    )
    num_prompts: Annotated[int, "of them, in the last evaluation; in others a quarter"] = 1000
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) is the truth"] = ""
    out_dir: Annotated[str, "run directory"] = "runs/dpo"
    cache: Annotated[str, "directory for the reference's log-probabilities; empty: not kept"] = (
        "runs/cache"
    )
    loss: Annotated[str, "dpo, ipo, hinge, robust, plackett_luce or cpl"] = "dpo"
    beta: Annotated[
        float,
        "KL coefficient (Rafailov et al.: 0.1, summaries 0.5); cpl's alpha; ipo's tau, of sums",
    ] = 0.3
    divergence: Annotated[
        str, "from the reference: reverse_kl, forward_kl, js or alpha:A, A from 0 (reverse) to 1"
    ] = "reverse_kl"
    label_smoothing: Annotated[float, "probability that a label is wrong (dpo, robust: 0.1)"] = 0.0
    gamma: Annotated[float, "discount a token, in cpl"] = 1.0
    cpl_bias: Annotated[float, "weight of the rejected segment in cpl (Hejna et al.: 0.5)"] = 0.5
    temperature: Annotated[float, "of sampling, not of the loss"] = 1.0
    max_new_tokens: Annotated[int, "longest sampled response, tokens"] = 48
    max_length: Annotated[int, "tokens of prompt and response; 0: the model's positions"] = 0
    overlong: Annotated[str, "response over max_length: drop it, or cut its end"] = "drop"
    epochs: Annotated[float, "passes over the data (paper: 1)"] = 1.0
    steps: Annotated[int, "optimiser steps, in the place of --epochs; 0: as --epochs says"] = 0
    batch_size: Annotated[int, "prompts a step, over all ranks (paper: 64 pairs)"] = 32
    micro_batch_size: Annotated[int, "prompts a forward on one rank; 0: all of its share"] = 0
    lr: Annotated[float, "peak learning rate (paper: 1e-6, RMSprop)"] = 1e-4
    warmup: Annotated[int, "steps of linear warm-up (paper: 150)"] = 10
    final_lr: Annotated[float, "last rate over peak rate, by a cosine (paper: constant)"] = 0.1
    adam_beta2: Annotated[float, "Adam's second-moment decay"] = 0.95
    adam_eps: Annotated[float, "Adam's epsilon"] = 1e-8
    weight_decay: Annotated[float, "AdamW's, on matrices"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm (the paper's code: 10)"] = 1.0
    seed: Annotated[int, "of order and samples"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[
        str, "float32, bfloat16, float16, float64; empty: bfloat16 on cuda, else float32"
    ] = ""
    compile: Annotated[bool, "torch.compile the policy"] = False
    checkpoint_activations: Annotated[bool, "less memory: a block's computed anew in backward"] = (
        False
    )
    log_every: Annotated[int, "steps between printed lines"] = 20
    eval_every: Annotated[int, "steps between evaluations; 0: only at the end"] = 100
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 100
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


def read_examples(path, tokenizer, max_length, cut_response):
    """-> examples and counts of what was cut and dropped.

    An example: `prompt` and `responses` (token ids, best first), `pairs` [(i, j, margin, label)],
    `texts` of the responses, and `line`, the line's other fields.
    Responses that are too long, or equal to one before, are dropped, and lines without a pair.
    """
    examples, lines = [], 0
    counts = {"cut": 0, "too long": 0, "equal": 0, "lines without a pair": 0}
    for _, record, texts, pairs in read_preferences(path):
        lines += 1
        prompt, kept = encode(tokenizer, record["prompt"], None, sys.maxsize)[0], {}
        limit = max_length - 1
        for k, text in enumerate(texts):
            ids = encode(tokenizer, "", text, sys.maxsize)[1]
            if len(ids) > limit and not cut_response:
                counts["too long"] += 1
                continue
            counts["cut"] += len(ids) > limit
            ids = array("i", ids[:limit])  # 4 bytes a token; a list has 36
            if ids in kept.values():
                counts["equal"] += 1
                continue
            kept[k] = ids
        place = {k: i for i, k in enumerate(kept)}
        pairs = [(place[i], place[j], m, p) for i, j, m, p in pairs if i in place and j in place]
        if not pairs:
            counts["lines without a pair"] += 1
            continue
        # One cut for the prompt: all of a line's responses are read after the same text.
        longest = max(map(len, kept.values()))
        room = max_length - longest
        counts["cut"] += len(kept) * (len(prompt) > room)
        example = {"prompt": array("i", prompt[-room:]), "responses": list(kept.values())}
        example["pairs"] = pairs
        example["texts"] = [texts[k] for k in kept]
        others = ("responses", "chosen", "rejected")
        example["line"] = {name: value for name, value in record.items() if name not in others}
        examples.append(example)
    if not examples:
        what = ", ".join(f"{n} {name}" for name, n in counts.items())
        refuse(f"{path}:0: file: none of its {lines} lines has a pair to learn from ({what})")
    return examples, counts


def grouped_batches(lengths, batch_size, seed):
    """One epoch's batches, lists of indices: random, but of like lengths, so that few are pads.

    Shuffles, sorts by length within pools of 64 batches, and shuffles the batches. Every index
    comes once; only one batch can be smaller than batch_size.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    pool = 64 * batch_size
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    pools = [indices[np.argsort(np.asarray(lengths)[indices], kind="stable")] for indices in pools]
    order = np.concatenate(pools).tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def rank_share(batch, rank, world, micro_batch_size):
    """This rank's micro-batches of a batch: lists of indices, as many on every rank, some empty.

    Ranks take turns in a batch that is sorted by length, so that their work is alike.
    """
    largest = math.ceil(len(batch) / world)
    size = micro_batch_size or largest
    mine = batch[rank::world]
    return [mine[i : i + size] for i in range(0, largest, size)]


def collate(examples, n_embd):
    """Examples -> tokens, mask, segments (R, T), responses to a prompt beside each other where that
    is cheaper for a model of width n_embd; rows (B, K): the place of response k among all of the
    batch; keep (B, P) bool, margin and label (B, P), of the P = K-choose-2 pairs as `ranking_loss`
    has them. An example with fewer than K responses repeats its first, in no pair that is kept."""
    K = max(len(example["responses"]) for example in examples)
    number = {pair: p for p, pair in enumerate(itertools.combinations(range(K), 2))}
    groups, rows, before = [], [], 0
    keep = torch.zeros(len(examples), len(number), dtype=torch.bool)
    margin, label = (torch.full(keep.shape, x, dtype=torch.float64) for x in (0.0, 1.0))
    for b, example in enumerate(examples):
        groups += groups_of(example["prompt"], example["responses"], n_embd)
        count = len(example["responses"])
        rows.append([*range(before, before + count), *[before] * (K - count)])
        before += count
        for i, j, m, probability in example["pairs"]:
            p = number[i, j]
            keep[b, p], margin[b, p], label[b, p] = True, m, probability
    return *pad_beside(*zip(*groups, strict=True)), torch.tensor(rows), keep, margin, label


def collate_pairs(examples, n_embd):
    """`collate`, without margins, and the reference's log-probabilities of the responses (B, K)."""
    tokens, mask, segments, rows, keep, _, label = collate(examples, n_embd)
    K = rows.shape[1]  # an example with fewer repeats its first
    refs = [e["ref"] + e["ref"][:1] * (K - len(e["ref"])) for e in examples]
    return tokens, mask, segments, rows, keep, label, torch.tensor(refs, dtype=torch.float64)


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


# --- mathematics ----------------------------------------------------------------------------------


def f_derivative(log_ratio, divergence="reverse_kl"):
    """f'(u) of log u = log(pi / ref) of whole responses, any shape, without its constant; arXiv:
    2309.16240 table 1. For a policy held by D_f = E_ref f(pi / ref), it is what DPO has log u for.

        reverse_kl log u    forward_kl -1/u    js log(u / (1 + u))    alpha:A -u^-A / A, 0 < A < 1

    Below log u = -10 / A, where u^-A would overflow, it stays as it is there: no gradient.
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return F.logsigmoid(log_ratio)
    name, _, number = divergence.partition(":")
    alpha = 1.0 if name == "forward_kl" else float(number)
    return -(-alpha * log_ratio).clamp(max=10).exp() / alpha


def dpo_loss(
    chosen_logprobs,
    rejected_logprobs,
    ref_chosen_logprobs,
    ref_rejected_logprobs,
    beta,
    loss="dpo",
    label_smoothing=0.0,
    label=1.0,
    divergence="reverse_kl",
):
    """q f(h) + (1 - q) f(-h) of each pair, (B,), q being the probability that chosen is better.

    h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), each a sum over
    the response's tokens, nats (B,). f is, by `loss`:
        dpo     -log sigmoid(beta h)      arXiv:2305.18290 eq. 7
        ipo     (h - 1 / (2 beta))^2      arXiv:2310.12036 eq. 17, beta being its tau
        hinge   max(0, 1 - beta h)        arXiv:2305.10425, arXiv:2309.06657
        robust  as dpo, with a q that makes up for wrong labels, arXiv:2403.00409
    divergence: another than the reverse KL puts `f_derivative` of each log-ratio in its place.
    label: P(chosen is better), a number or (B,). label_smoothing: the probability e that a label
    is wrong; q = label (1 - e) + (1 - label) e is conservative DPO; robust takes
    q = (label - e) / (1 - 2 e), of which the loss on clean labels is the mean over wrong ones.
    """
    # The one place where the policy is held to the reference: its gradient, for dpo and label 1, is
    # -beta sigmoid(-beta h) (grad log pi(chosen) - grad log pi(rejected)). The weight sigmoid(-beta
    # h) is near 1 for pairs that the implicit reward beta log pi/ref orders wrongly, and near 0
    # for those that it has learnt; without it the language degenerates (the paper's section 4).
    chosen = f_derivative(chosen_logprobs - ref_chosen_logprobs, divergence)
    h = chosen - f_derivative(rejected_logprobs - ref_rejected_logprobs, divergence)
    q = label * (1 - label_smoothing) + (1 - label) * label_smoothing
    if loss == "robust":
        q = (label - label_smoothing) / (1 - 2 * label_smoothing)

    def f(h):
        if loss in ("dpo", "robust"):
            return -F.logsigmoid(beta * h)
        if loss == "ipo":
            return (h - 1 / (2 * beta)) ** 2
        if loss == "hinge":
            return torch.relu(1 - beta * h)
        raise ValueError(f"loss {loss}: expected dpo, ipo, hinge or robust")

    return q * f(h) + (1 - q) * f(-h)


def plackett_luce_loss(logprobs, ref_logprobs, beta, beats=None, divergence="reverse_kl"):
    """-log of the probability of each ranking under the implicit rewards r, (B,), nats.

    r = beta (logprobs - ref_logprobs), (B, K), best response first, or beta `f_derivative` of the
    log-ratios: the best is drawn first, with probability softmax(r), then the next among those
    left. arXiv:2305.18290 appendix A.3.
    beats (B, K, K) bool: whether response i (axis 1) is better than j (axis 2). None: all that
    follow. A response of a tie is drawn from itself and those that it beats.
    """
    r = beta * f_derivative(logprobs - ref_logprobs, divergence)
    if beats is None:
        beats = torch.ones(*r.shape, r.shape[1], dtype=torch.bool, device=r.device).triu(1)
    own = torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    left = r[:, None].expand(beats.shape).masked_fill(~(beats | own), -math.inf)
    return (left.logsumexp(2) - r).sum(1)


def cpl_loss(chosen_logprobs, rejected_logprobs, alpha, bias=1.0):
    """-log(e^a+ / (e^a+ + e^(bias a-))), a = alpha times the log-probability of a segment, (B,).

    Contrastive preference learning, arXiv:2310.13639: an advantage is alpha log pi, and no
    reference is needed. The log-probabilities are `discounted` sums. bias < 1 asks less of the
    rejected segment's fall.
    """
    return F.softplus(alpha * (bias * rejected_logprobs - chosen_logprobs))


def discounted(logprobs, mask, gamma):
    """sum_t gamma^t log pi(token t) over a response of each row, t counted from its first token,
    (B,). mask (B, T): the response."""
    if gamma == 1:
        return (logprobs * mask).sum(1)
    t = (mask.cumsum(1) - 1).clamp(min=0)
    return (logprobs.new_tensor(gamma) ** t * logprobs * mask).sum(1)


def logprobs_of_responses(logits, tokens, mask, segments, gamma):
    """`discounted` of each response of rows from `pad_beside`, in their order, (M,). logits (N, V),
    the model's output at `predicts(mask)`."""
    logprobs = token_logprobs(logits, tokens, mask)
    masks = masks_of_responses(mask, segments)  # (count, R, T), some empty
    found = torch.stack([discounted(logprobs, m, gamma) for m in masks], 1)  # (R, count)
    return found[masks.any(2).T]


def preference_loss(logprobs, ref_logprobs, keep, label, cfg):
    """The loss of each line, (B,): of its pairs, or of its whole ranking.

    logprobs, ref_logprobs (B, K): of the responses, best first. keep (B, P) bool: which of the
    K-choose-2 pairs count (no ties, no padding); label (B, P).
    """
    i, j = torch.triu_indices(*[logprobs.shape[1]] * 2, 1, device=logprobs.device)
    chosen, rejected = logprobs[:, i], logprobs[:, j]  # (B, P)
    if cfg.loss == "plackett_luce":
        beats = keep.new_zeros(*logprobs.shape, logprobs.shape[1])
        beats[:, i, j] = keep
        return plackett_luce_loss(logprobs, ref_logprobs, cfg.beta, beats, cfg.divergence)
    if cfg.loss == "cpl":
        losses = label * cpl_loss(chosen, rejected, cfg.beta, cfg.cpl_bias)
        losses = losses + (1 - label) * cpl_loss(rejected, chosen, cfg.beta, cfg.cpl_bias)
    else:
        references = ref_logprobs[:, i], ref_logprobs[:, j]
        how = cfg.loss, cfg.label_smoothing, label, cfg.divergence
        losses = dpo_loss(chosen, rejected, *references, cfg.beta, *how)
    return losses.masked_fill(~keep, 0.0).sum(1) / keep.sum(1)


def pair_numbers(logprobs, ref_logprobs, keep, label, cfg):
    """What is logged of a batch, as sums over its pairs: {name: number}. See `preference_loss`."""
    i, j = torch.triu_indices(*[logprobs.shape[1]] * 2, 1, device=logprobs.device)
    logprobs, label = logprobs.detach(), label[keep]
    log_ratios = logprobs - ref_logprobs
    rewards = cfg.beta * f_derivative(log_ratios, cfg.divergence)  # but for a prompt's constant
    margin = (rewards[:, i] - rewards[:, j])[keep]
    ordered = label > 0.5  # at 0.5 neither is the better one
    if cfg.loss == "cpl":
        weight = torch.sigmoid(-margin)
    else:  # |dL/dh| / beta: sigmoid(-beta h) for dpo, and for a ranking as if of its pairs
        kind = "dpo" if cfg.loss == "plackett_luce" else cfg.loss
        with torch.enable_grad():
            h = (margin / cfg.beta).requires_grad_()
            losses = dpo_loss(h, 0.0, 0.0, 0.0, cfg.beta, kind, cfg.label_smoothing, label)
            weight = torch.autograd.grad(losses.sum(), h)[0].abs() / cfg.beta
    return {
        "accuracy": (0.5 + 0.5 * margin.sign())[ordered].sum().item(),
        "margin": margin.sum().item(),
        "weight": weight.sum().item(),
        "chosen": logprobs[:, i][keep].sum().item(),
        "rejected": logprobs[:, j][keep].sum().item(),
        "pairs": float(keep.sum()),
        "ordered": float(ordered.sum()),
    }


# --- log-probabilities, samples, judges -----------------------------------------------------------


def logprobs_of_rows(model, rows, cfg, device, autocast, rank, world):
    """Sums of log-probabilities, a list of numbers, of rows of (prompt ids, response ids), from all
    ranks. None if told to stop."""
    model.eval()
    found, groups = [], group_by_prompt(rows, model.config.n_embd)
    # No gradients are kept, so more responses fit.
    batches, last_time = batches_of_groups(groups, 4 * cfg.micro_batch_size or 256), time.time()
    for begin in range(0, len(batches), world):
        if stop_requested(device):
            return None
        if rank == 0 and time.time() - last_time > 30:
            last_time = time.time()
            print(f"log-probabilities: {begin}/{len(batches)} batches", flush=True)
        for indices in batches[begin + rank : begin + rank + 1]:
            some = [groups[i] for i in indices]
            beside = pad_beside(*zip(*some, strict=True))
            tokens, mask, segments = (tensor.to(device) for tensor in beside)
            with torch.no_grad(), autocast:
                logits = model(tokens, predicts(mask), segments)
            logprobs = logprobs_of_responses(logits, tokens, mask, segments, cfg.gamma)
            parts = logprobs.split([len(responses) for _, responses in some])
            found += [(i, row.tolist()) for i, row in zip(indices, parts, strict=True)]
    return [logprob for _, row in sorted(gather(found, device)) for logprob in row]


def rows_of(examples):
    return [(e["prompt"], response) for e in examples for response in e["responses"]]


def add_reference(examples, logprobs):
    """Gives each example `ref`, its responses' log-probabilities under the reference."""
    logprobs = iter(logprobs)
    for example in examples:
        example["ref"] = list(itertools.islice(logprobs, len(example["responses"])))


def read_cache(path, count):
    """Log-probabilities that write_cache wrote, if all are there as written; else None."""
    try:
        with safe_open(path, "pt") as file:
            logprobs, known = file.get_tensor("logprobs"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    good = hashlib.sha256(logprobs.numpy().tobytes()).hexdigest() == known
    return logprobs.tolist() if good and len(logprobs) == count else None


def write_cache(path, logprobs):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor = torch.tensor(logprobs, dtype=torch.float64)
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    with whole_file(path) as temporary:
        save_file({"logprobs": tensor}, temporary, {"sha256": digest})


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


def means_of(sums):
    """Sums of `pair_numbers`, with `loss` and `prompts`, -> their means."""
    means = {name: sums[name] / max(sums["pairs"], 1) for name in LOGGED}
    means["accuracy"] = sums["accuracy"] / max(sums["ordered"], 1)
    return {"loss": sums["loss"] / max(sums["prompts"], 1)} | means


def check_reference(logprobs, ref_logprobs, limit, device):
    """Ends the run, on all ranks, unless a policy that nothing has trained is its reference: the
    first loss is then ln 2 for dpo."""
    far = ((logprobs.detach() - ref_logprobs) / ref_logprobs.clamp(max=-1)).abs().max()
    far = gather([float(far)], device)
    if not all(x <= limit for x in far):
        refuse(
            f"self-check: the untrained policy's log-probabilities are {max(far):.1e} of them off "
            f"the reference's (limit {limit:.0e}), which it is. Likely causes: dropout, a stale "
            f"cache, log-probabilities of other tokens"
        )


# --- main -----------------------------------------------------------------------------------------


def main():
    cfg = parse_config(Config, __doc__)
    if cfg.loss not in LOSSES or cfg.overlong not in ("drop", "cut"):
        refuse(f"--loss: expected {', '.join(LOSSES)}; --overlong: drop or cut")
    if cfg.label_smoothing >= 0.5 or cfg.adam_beta2 >= 1 or cfg.gamma > 1 or cfg.max_length == 1:
        refuse(
            "--label_smoothing: expected less than 0.5; --adam_beta2: less than 1; --gamma: at "
            "most 1; --max_length: 2 or more"
        )
    counts = (cfg.batch_size, cfg.max_new_tokens, cfg.log_every, cfg.rounds, cfg.round_prompts)
    if min(counts) < 1 or not min(cfg.beta, cfg.clip_norm, cfg.temperature) > 0:
        refuse(
            "--batch_size, --max_new_tokens, --log_every, --rounds, --round_prompts, --beta, "
            "--clip_norm, --temperature: expected more than 0"
        )
    if cfg.label_smoothing and cfg.loss in ("plackett_luce", "cpl"):
        refuse(f"--label_smoothing: --loss {cfg.loss} has none")
    name, _, number = cfg.divergence.partition(":")
    try:
        known = 0 < float(number) < 1 if name == "alpha" else False
    except ValueError:
        known = False
    if not known and cfg.divergence not in ("reverse_kl", "forward_kl", "js"):
        refuse(
            f"--divergence {cfg.divergence}: expected reverse_kl, forward_kl, js or alpha:A, "
            f"0 < A < 1"
        )
    if name != "reverse_kl" and cfg.loss not in ("dpo", "robust", "plackett_luce"):
        refuse(f"--divergence: --loss {cfg.loss} has none")
    if cfg.gamma < 1 and cfg.loss != "cpl":
        refuse("--gamma: only --loss cpl discounts")
    of_rounds = ("rounds", "round_prompts", "num_samples", "refresh_reference", "judge_noise")
    of_data = ("epochs", "steps")
    for name in of_data if cfg.online else of_rounds:
        if getattr(cfg, name) != getattr(Config, name):
            refuse(f"--{name}: only with{'out' if cfg.online else ''} --online")
    if cfg.online and cfg.num_samples < 2:
        refuse("--num_samples: expected 2 or more")
    if cfg.refresh_reference and cfg.loss == "cpl":
        refuse("--refresh_reference: --loss cpl has no reference")
    try:
        if cfg.missing_eos_score != "none" and not math.isfinite(float(cfg.missing_eos_score)):
            raise ValueError
    except ValueError:
        refuse(f"--missing_eos_score {cfg.missing_eos_score}: expected a number or none")
    files = split_names(cfg.data)
    if not files and not cfg.online:
        refuse("--data: expected a file")
    device, dtype, rank, world = start_process(cfg)

    # The policy; of the reference its log-probabilities are all that training needs.
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    reference_name = cfg.reference or cfg.init

    def load_policy(name):
        try:
            model, tokenizer = load_model(name), load_tokenizer(name)
            check_tokenizer(tokenizer, name, load_config(name))
        except (OSError, ValueError) as error:
            refuse(error)
        if model.score is not None:
            refuse(f"{name}: has a scalar head, no language model's")
        # In eval mode for good: dropout would make the policy differ from its reference.
        return model.eval().to(device, precision), tokenizer

    policy, tokenizer = load_policy(cfg.init)
    reference, theirs = load_policy(reference_name)
    policy.checkpoint_activations = cfg.checkpoint_activations
    reference.requires_grad_(False)
    if tokenizer_hash(theirs) != tokenizer_hash(tokenizer):
        refuse(f"--reference {cfg.reference}: another tokenizer than {cfg.init}'s")
    positions = min(policy.config.n_positions, reference.config.n_positions)
    max_length = min(cfg.max_length or positions, positions)
    referred = cfg.loss != "cpl"

    # The data, all of it on every rank, so that all agree on every batch.
    gold = load_gold(cfg.gold) if cfg.gold else None
    held_prompts = read_prompts(cfg.prompts)[: cfg.num_prompts] if cfg.prompts else []
    examples, held_out, prompts, inputs, counted = [], [], [], [], []
    cut = cfg.overlong == "cut"
    if cfg.online:
        judge_model = load_reward(cfg.online, tokenizer, device)
        if judge_model[0] == "model":
            judge_model[1].to(precision).requires_grad_(False)
            inputs += [*weight_files(Path(cfg.online)), Path(cfg.online) / "config.json"]
            positions = min(positions, judge_model[1].config.n_positions)
        else:
            inputs.append(cfg.online)
        prompts = read_prompts(cfg.train_prompts)
        inputs.append(cfg.train_prompts)
        steps_an_epoch = math.ceil(cfg.round_prompts / cfg.batch_size)
        total = cfg.rounds * steps_an_epoch
    else:
        for path in files:
            found, count = read_examples(path, tokenizer, max_length, cut)
            counted.append((path, len(found), count))
            examples += found
        steps_an_epoch = math.ceil(len(examples) / cfg.batch_size)
        total = cfg.steps or math.ceil(cfg.epochs * steps_an_epoch)
        inputs += files
    if cfg.loss == "plackett_luce" and any(p[3] < 1 for e in examples for p in e["pairs"]):
        refuse("--loss plackett_luce: a ranking has no label below 1")
    if cfg.max_new_tokens >= positions and (prompts or held_prompts):
        refuse(f"--max_new_tokens {cfg.max_new_tokens}: leaves no room in {positions} positions")
    room = positions - cfg.max_new_tokens
    prompt_ids = [encode(tokenizer, line["prompt"], None, room)[0] for line in prompts]
    held_ids = [encode(tokenizer, line["prompt"], None, room)[0] for line in held_prompts]
    whole = [encode(tokenizer, p["prompt"], None, sys.maxsize)[0] for p in prompts + held_prompts]
    shortened = sum(len(ids) > room for ids in whole)
    if cfg.validation:
        held_out, count = read_examples(cfg.validation, tokenizer, max_length, cut)
        counted.append((cfg.validation, len(held_out), count))
    inputs += [path for path in (cfg.validation, cfg.prompts, cfg.gold) if path]
    for name in sorted({cfg.init, reference_name}):
        inputs += [*weight_files(Path(name)), Path(name) / "config.json"]
    checkpoint = open_run(cfg, inputs, device, rank, world)
    out_dir = Path(cfg.out_dir)
    mixed = dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    rounded = device.type == "cuda" and mixed  # sampling is bound by reading the weights
    if rank == 0:
        size = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
        print(f"policy: {size:.2f}M parameters; {device}, {dtype}, {world} rank(s)")
        for path, number, count in counted:
            what = ", ".join(f"{n} {name}" for name, n in count.items())
            print(f"{path}: {number} lines kept; responses: {what}")
        if prompts or held_prompts:
            print(
                f"{len(prompts)} prompts to learn from, {len(held_prompts)} held out; "
                f"{shortened} lose their start"
            )
        if cfg.online:
            which = f"{reference_name}'s in all rounds: beta holds the policy near it"
            if cfg.loss == "cpl":
                which = f"none in the loss; KL is to {reference_name}"
            if cfg.refresh_reference:
                which = (
                    f"the policy that begins a round (held out: {reference_name}), so that KL to "
                    f"the start is not bounded by one beta"
                )
            print(f"{cfg.rounds} rounds of {cfg.round_prompts} prompts; the reference is {which}")
        else:
            pairs = sum(len(example["pairs"]) for example in examples)
            print(f"{pairs} pairs; {total} steps of {cfg.batch_size} prompts")
        print(
            "what to expect: both log-probabilities fall, the chosen one's too; it is the margin "
            "between them that is trained",
            flush=True,
        )

    def refer(some, path):
        """Gives examples of a file the reference's log-probabilities: computed once, kept under a
        key of all that they depend on. -> what to say of it."""
        model_files = [*weight_files(Path(reference_name)), Path(reference_name) / "config.json"]
        key = {
            "rows": [Path(path).suffix, sha256(path)],
            "reference": list(map(sha256, model_files)),
        }
        key["numbers"] = [cfg.gamma, str(dtype), device.type]
        key["tokens"] = [tokenizer_hash(tokenizer), max_length, cfg.overlong]
        key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        cache, rows = Path(cfg.cache) / f"{key}.safetensors", rows_of(some)
        known = read_cache(cache, len(rows)) if cfg.cache and rank == 0 else None
        if all_reduce([float(known is not None)], device)[0]:  # rank 0 decides for all
            add_reference(some, gather(known or [], device))
            return f"{path}: {len(rows)} log-probabilities of the reference, from {cache}"
        if cfg.cache:
            cache.parent.mkdir(parents=True, exist_ok=True)
        begun = time.time()
        logprobs = logprobs_of_rows(reference, rows, cfg, device, autocast, rank, world)
        if logprobs is None:
            sys.exit(128 + signal.SIGTERM)
        add_reference(some, logprobs)
        if cfg.cache and rank == 0:
            write_cache(cache, logprobs)
        seconds = time.time() - begun
        return f"{path}: {len(rows)} log-probabilities of the reference in {seconds:.0f} s"

    begin, everything = 0, examples + held_out
    for path, number, _ in counted if referred else ():
        said = refer(everything[begin : begin + number], path)
        begin += number
        if rank == 0:
            print(said, flush=True)
    if not referred:
        add_reference(everything, itertools.repeat(0.0))
    for example in everything:  # of many lines, as large as their tokens, and of no more use
        del example["texts"], example["line"]
    keep_reference = cfg.online and referred and not cfg.refresh_reference
    if not keep_reference:
        reference = None  # evaluation loads it again, for as long as it takes

    decayed = [p for p in policy.parameters() if p.dim() == 2]
    others = [p for p in policy.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others}],
        lr=cfg.lr,
        betas=(0.9, cfg.adam_beta2),
        eps=cfg.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step = saved_step = labels = 0
    epoch, evaluated = None, -1
    names = ("loss", "prompts", "pairs", "ordered", *LOGGED)
    window = dict.fromkeys((*names, "tokens"), 0.0)  # sums since the last printed line
    if checkpoint:
        state = load_checkpoint(checkpoint, {"policy": policy}, {"adam": optimizer}, device, rank)
        step = saved_step = state["step"]
        labels, epoch, evaluated = state["labels"], state["epoch"], state["evaluated"]
        scaler.load_state_dict(state["scaler"])
        if cfg.online:
            examples = state["round"]
        if rank == 0:
            window = dict(zip(window, state["window"], strict=True))
            print(f"resumed at step {step} from {checkpoint}", flush=True)
    # Losses go through `parallel`: DDP averages the gradients over the ranks in its backward pass.
    parallel = torch.compile(policy) if cfg.compile else policy
    if world > 1:
        parallel = DistributedDataParallel(
            parallel, device_ids=[device] if device.type == "cuda" else None
        )

    def save():
        nonlocal saved_step
        if step > saved_step:
            state = {"scaler": scaler.state_dict(), "window": all_reduce(window.values(), device)}
            # What the policy sampled in this round can't be sampled again from what it is now.
            state |= {"labels": labels, "epoch": epoch, "round": examples if cfg.online else []}
            state["evaluated"] = evaluated  # a stop in a round's sampling comes after it was logged
            save_checkpoint(cfg, step, {"policy": policy}, {"adam": optimizer}, state, device, rank)
            saved_step = step

    def stop():
        """SIGTERM: what was done is saved, and --resume goes on from here to the same weights."""
        save()
        all_reduce([0.0], device)  # when one rank ends, torchrun ends the others: let rank 0 finish
        if rank == 0:
            print(f"stopped by SIGTERM at step {step}; --resume goes on from there", flush=True)
        sys.exit(128 + signal.SIGTERM)

    many = 4 * cfg.micro_batch_size or 256  # no gradients are kept, so more fit

    def responses_of(model, to, lines, line_ids, temperature):
        """One response to each held-out prompt, from all ranks: its line with `response`, `parts`
        (kl to the model `to` in nats, proxy by the judge, gold's, eos, words), in order."""
        sampler = copy.deepcopy(model).bfloat16() if rounded else model
        settings = dataclasses.replace(cfg, temperature=temperature)
        order, found = sorted(range(len(lines)), key=lambda i: len(line_ids[i])), []
        for begin in range(0, len(lines), many * world):
            if stop_requested(device):
                stop()
            mine = order[begin : begin + many * world][rank::world]
            if not mine:
                continue
            some, ids = [lines[i] for i in mine], [line_ids[i] for i in mine]
            # Not the reference's draws: a win rate is one of independent samples.
            seed = 2 * (1_000_003 * (cfg.seed + 1) + begin * world + rank) + (model is policy)
            batch = sample_batch(sampler, some, ids, settings, tokenizer.eot_token, seed, device)
            texts, ended = texts_of(batch, tokenizer), batch["ended"].tolist()
            if temperature:  # greedy samples say nothing of the KL
                gap = response_logprobs(model, batch, many, settings, autocast)
                gap = gap - response_logprobs(to, batch, many, settings, autocast)
                gap = gap.sum(1).tolist()
            if cfg.online:
                scores = scores_of(judge_model, batch, texts, many, autocast).tolist()
            for n, i in enumerate(mine):
                parts = {"words": float(len(texts[n].split()))} | judge(gold, lines[i], texts[n])
                parts |= {"proxy": scores[n]} if cfg.online else {}
                parts |= {"eos": float(ended[n])} | ({"kl": gap[n]} if temperature else {})
                found.append(lines[i] | {"index": i, "response": texts[n], "parts": parts})
        return sorted(gather(found, device), key=lambda sample: sample["index"])

    def compare_with_reference(count, temperature, others=None):
        to = reference if reference is not None else load_policy(reference_name)[0]
        some = held_prompts[:count], held_ids[:count]
        samples = responses_of(policy, to, *some, temperature)
        return samples, others or responses_of(to, to, *some, temperature)

    def judged_round(number):
        """Samples of the policy as it is, judged: examples, each with its responses best first."""
        order = prompts_of_step(len(prompts), cfg.round_prompts, number, cfg.seed)
        mine = sorted(order[rank::world], key=lambda i: len(prompt_ids[i]))
        sampler = copy.deepcopy(policy).bfloat16() if rounded else policy
        share = math.ceil(cfg.round_prompts / world)  # of the rank with most: all look for a stop
        texts, ids, scores, ended, K = [], [], [], [], cfg.num_samples
        for begin in range(0, share, max(many // K, 1)):
            if stop_requested(device):
                stop()
            part = [i for i in mine[begin : begin + max(many // K, 1)] for _ in range(K)]
            if not part:
                continue
            some, some_ids = [prompts[i] for i in part], [prompt_ids[i] for i in part]
            seed = ((cfg.seed * 1_000_003 + number) * 4096 + rank) * 4096 + begin
            batch = sample_batch(sampler, some, some_ids, cfg, tokenizer.eot_token, seed, device)
            texts += texts_of(batch, tokenizer)
            scores += scores_of(judge_model, batch, texts[-len(part) :], many, autocast).tolist()
            ids, ended = ids + batch["responses"], ended + batch["ended"].tolist()
        noise = np.random.default_rng([cfg.seed, number, rank]).gumbel(size=len(scores))
        scores = torch.tensor(scores, dtype=torch.float64) + cfg.judge_noise * torch.tensor(noise)
        ended = torch.tensor(ended, dtype=torch.bool)
        scores = punish_missing_eos(scores, ended, len(scores), cfg, device).tolist()
        found, empty = [], sum(not text.strip() for text in texts)
        for n, i in enumerate(mine):
            responses = {}  # {text: row}; of equal ones the first, of empty ones none
            for row in range(n * K, (n + 1) * K):
                if texts[row].strip():
                    responses.setdefault(texts[row], row)
            ranked = sorted(responses.values(), key=lambda row: -scores[row])
            pairs = [
                (a, b, 0.0, 1.0)
                for a, b in itertools.combinations(range(len(ranked)), 2)
                if scores[ranked[a]] > scores[ranked[b]]
            ]
            if pairs:
                example = {"prompt": prompt_ids[i], "responses": [ids[row] for row in ranked]}
                example |= {"pairs": pairs, "line": prompts[i]}
                example["texts"] = [texts[row] for row in ranked]
                found.append(example | {"scores": [scores[row] for row in ranked]})
        counts = [sum(scores), len(scores), int(ended.sum()), empty, len(found)]
        total_score, count, finished, empty, kept = all_reduce(counts, device)
        found = gather(found, device)
        logprobs = itertools.repeat(0.0)
        if referred:
            to = policy if cfg.refresh_reference else reference
            logprobs = logprobs_of_rows(to, rows_of(found), cfg, device, autocast, rank, world)
            if logprobs is None:
                stop()
        add_reference(found, logprobs)
        if rank == 0:
            print(
                f"round {number + 1}/{cfg.rounds}  score {total_score / count:+.3f}  EOS "
                f"{finished / count:.3f}  {empty:.0f} empty  {kept:.0f} of {cfg.round_prompts} "
                f"prompts with a pair{'' if kept else ': nothing to learn in this round'}",
                flush=True,
            )
            for example in found:
                ranking = {"responses": example["texts"], "scores": example["scores"]}
                line = {k: v for k, v in example["line"].items() if k != "policy"}
                append_line(out_dir / "rounds.jsonl", {"round": number} | line | ranking)
        needed = ("prompt", "responses", "pairs", "ref")
        return [{name: example[name] for name in needed} for example in found]

    def evaluate():
        """{name: mean over the held-out pairs} of what is logged of the training pairs."""
        sums = dict.fromkeys(names, 0.0)
        lengths = row_lengths(held_out, policy.config.n_embd)
        order = sorted(range(len(held_out)), key=lengths.__getitem__)
        size = cfg.micro_batch_size or 64
        for begin in range(0, len(order), size * world):
            if stop_requested(device):
                stop()
            indices = order[begin : begin + size * world][rank::world]
            if not indices:
                continue
            some = collate_pairs([held_out[i] for i in indices], policy.config.n_embd)
            tokens, mask, segments, rows, keep, label, refs = (x.to(device) for x in some)
            with torch.no_grad(), autocast:
                logits = policy(tokens, predicts(mask), segments)
            logprobs = logprobs_of_responses(logits, tokens, mask, segments, cfg.gamma)
            logprobs, refs = logprobs[rows], refs.to(logprobs.dtype)  # (B, K)
            label = label.to(logprobs.dtype)
            losses = preference_loss(logprobs, refs, keep, label, cfg)
            numbers = pair_numbers(logprobs, refs, keep, label, cfg)
            numbers |= {"loss": losses.sum().item(), "prompts": len(indices)}
            sums = {name: sums[name] + numbers[name] for name in names}
        return means_of(dict(zip(names, all_reduce(sums.values(), device), strict=True)))

    started = last_time = time.time()
    first_step, batches, report = step, None, {}
    few, others = max(cfg.num_prompts // 4, 1), None
    while True:
        if step == total or (cfg.save_every and step % cfg.save_every == 0):
            save()
        if stop_requested(device):
            stop()

        due = step == total or (cfg.eval_every and step % cfg.eval_every == 0)
        if due and step > evaluated:
            record = {"step": step, "seconds": round(time.time() - started, 1)}
            said = []
            if held_out:
                report = evaluate()
                record |= {f"eval_{name}": value for name, value in report.items()}
                said.append(
                    f"loss {report['loss']:.4f}, accuracy {report['accuracy']:.3f}, margin "
                    f"{report['margin']:.3f}, log-probabilities chosen {report['chosen']:.1f}, "
                    f"rejected {report['rejected']:.1f}"
                )
            if held_prompts and step > 0:
                samples, others = compare_with_reference(few, cfg.temperature, others)
                found = beside(samples, others, cfg.missing_eos_score if cfg.online else "none")
                for task, table in found["policy"].items():
                    prefix = "eval" if task == "all" else f"eval_{task}"
                    record |= {f"{prefix}_{k}": v[0] for k, v in table.items() if k != "count"}
                record["eval_distinct_2"] = found["distinct_2"][0]
                said.append(f"KL {record['eval_kl']:.2f}")
                for name, wins in found["win_rate"].items():
                    record |= dict(zip(WIN_RATE, wins, strict=True))
                    said.append(f"wins {wins[0]:.3f} against the reference by {name}")
            if rank == 0 and said:
                append_line(out_dir / "metrics.jsonl", record)
                print(f"step {step}/{total}  held out: {'; '.join(said)}", flush=True)
                for sample in one_a_task(samples) if held_prompts and step > 0 else ():
                    append_line(out_dir / "samples.jsonl", {"step": step} | sample)
                    print(f"  {sample['prompt'][-160:]!r}\n    -> {sample['response']!r}")
            evaluated = step
        if step == total:
            break

        # One step: gradients of the mean over the batch's prompts, over micro-batches and ranks.
        if epoch != step // steps_an_epoch or batches is None:
            if cfg.online and epoch != step // steps_an_epoch:
                examples = judged_round(step // steps_an_epoch)
                labels += sum(len(example["pairs"]) for example in examples)
            epoch = step // steps_an_epoch
            lengths = row_lengths(examples, policy.config.n_embd)
            batches = [[]]
            if examples:
                batches = grouped_batches(lengths, cfg.batch_size, [cfg.seed, epoch])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, cfg)
        # Online, a prompt whose responses are all alike drops out, and a last batch with it.
        place = step % steps_an_epoch
        batch = batches[place] if place < len(batches) else []
        shares = rank_share(batch, rank, world, cfg.micro_batch_size) if batch else []
        for micro, indices in enumerate(shares):
            # A rank without lines left runs too, with weight 0: the others wait for its gradients.
            some = [examples[i] for i in indices or batch[:1]]
            tensors = [x.to(device) for x in collate_pairs(some, policy.config.n_embd)]
            tokens, mask, segments, rows, keep, label, refs = tensors
            last = micro == len(shares) - 1
            with parallel.no_sync() if world > 1 and not last else nullcontext():
                with autocast:  # all responses to a prompt in one row
                    logits = parallel(tokens, predicts(mask), segments)  # (N, V)
                logprobs = logprobs_of_responses(logits, tokens, mask, segments, cfg.gamma)
                logprobs, refs = logprobs[rows], refs.to(logprobs.dtype)  # (B, K)
                label = label.to(logprobs.dtype)
                losses = preference_loss(logprobs, refs, keep, label, cfg)
                loss = losses.sum() * (1.0 if indices else 0.0)
                # One mean over micro-batches and ranks; DDP averages over the ranks: undo it.
                scaler.scale(loss * world / len(batch)).backward()
            if step == 0 and referred and not cfg.reference:
                check_reference(logprobs, refs, LIMITS[dtype], device)
            if indices:
                for name, number in pair_numbers(logprobs, refs, keep, label, cfg).items():
                    window[name] += number
                window["tokens"] += sum(
                    len(e["prompt"]) + len(r) for e in some for r in e["responses"]
                )
            window["loss"] += loss.item()
            window["prompts"] += len(indices)
        norm = 0.0
        if batch:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip_norm).item()
        # The norm is of the summed gradients, the same on all ranks: all stop, or none. float16 may
        # overflow: the scaler then skips the step and halves its scale.
        if not math.isfinite(norm) and scaler.get_scale() <= 1:
            lines = ", ".join(str(i + 1) for i in batch[:8])
            if rank == 0:
                print(
                    f"step {step}: the gradient is {norm} on the batch of lines {lines}, ... (as "
                    f"numbered among those kept); stopped before the update, nothing is changed",
                    file=sys.stderr,
                    flush=True,
                )
            sys.exit(1)
        if batch:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        step += 1

        if step % cfg.log_every == 0 or step == total:
            sums = dict(zip(window, all_reduce(window.values(), device), strict=True))
            now = time.time()
            left = (now - started) / (step - first_step) * (total - step)
            record = {"step": step, "seconds": round(now - started, 1)} | means_of(sums)
            record |= {
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": norm if math.isfinite(norm) else None,
                "tokens_per_s": sums["tokens"] / (now - last_time),
            }
            if cfg.online:
                record["labels"] = labels
            last_time, window = now, dict.fromkeys(window, 0.0)
            if rank == 0:
                append_line(out_dir / "metrics.jsonl", record)
                print(
                    f"step {step}/{total}  loss {record['loss']:.4f}  accuracy "
                    f"{record['accuracy']:.3f}  margin {record['margin']:+.3f}  chosen "
                    f"{record['chosen']:.1f}  rejected {record['rejected']:.1f}  weight "
                    f"{record['weight']:.3f}  lr {record['lr']:.2e}  grad norm {norm:.2f}  "
                    f"{record['tokens_per_s']:.0f} tokens/s  "
                    f"{left // 60:.0f}:{left % 60:02.0f} left",
                    flush=True,
                )

    # The finished policy, then what it is worth on held-out prompts, sampled and greedy.
    if rank == 0:
        save_model(out_dir, policy, tokenizer, {"stage": "dpo"})
    report = {"held_out": report} if held_out else {}
    report |= {"step": step, "seconds": round(time.time() - started, 1)}
    first_epoch = sum(len(example["pairs"]) for example in examples)
    report["labels"] = labels if cfg.online else first_epoch  # pairs that somebody has judged
    report["peak_memory_gib"] = round(peak_memory(device) / 2**30, 2)
    ways = (("sampled", cfg.temperature), ("greedy", 0.0))
    for name, temperature in ways if held_prompts else ():
        samples, others = compare_with_reference(cfg.num_prompts, temperature)
        report[name] = beside(samples, others, cfg.missing_eos_score if cfg.online else "none")
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
