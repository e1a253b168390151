"""Reward collapse, and the prompt-aware loss that prevents it (Song, Cai, Lee and Su,
arXiv:2305.17608).

A reward model with scores between 0 and 1 learns rankings of n responses, best first, by

    L = mean over prompts of  -1 / (n choose 2) * sum_{i < j} U(r_i - r_j),    r = sigmoid(head)

Trained until it interpolates them, every prompt's rewards r_1 >= ... >= r_n are the maximiser of

    S(r) = sum_{i < j} U(r_i - r_j),    1 >= r_1 >= ... >= r_n >= 0

which knows n and U and nothing of the prompt: a question with one right answer and one with many
get the same rewards. That is the collapse. The remedy is to choose U by the kind of the prompt:
U(x) = x makes rewards 0 or 1, for closed-ended prompts; U(x) = -1/x spreads them evenly, for
open-ended ones. A U that is infinitely steep at 0 is smoothed there by epsilon, and goes on as a
straight line below 0; trained rewards are held to the maximiser under that U. All are scaled to
U(1) - U(0) = 1, and a small penalty on the head's outputs, which falls as the learning rate does,
keeps rewards from being stuck early at 0 or 1 on the wrong side, where a sigmoid has no gradient.

Simplified against the paper: the kinds are fields of the data, and nothing has to guess them.

    python collapse.py --closed_utility inverse_power           # one U for all prompts: collapse
    python collapse.py --out_dir runs/prompt_aware              # U by kind: linear, inverse_power
    python collapse.py plot runs/collapse runs/prompt_aware     # both during their training
    python collapse.py optimum                                  # the theory: n = 8, 50, 1000
    torchrun --nproc_per_node=8 collapse.py --init runs/sft --data rankings.jsonl \\
        --validation held.jsonl --prompts prompts.jsonl --epochs 2 --lr 1e-5 --out_dir runs/aware
"""

import argparse
import copy
import dataclasses
import datetime
import gc
import gzip
import hashlib
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from model import (
    GPT,
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
    pad_beside,
    read_json,
    row_lengths,
    save_model,
    text_of,
    tokenizer_files,
    tokenizer_hash,
    weight_files,
    whole_file,
    write_json,
)

STATISTICS = ("reward_mean", "reward_std", "score_transform")
KINDS = ("open", "closed")


@dataclasses.dataclass(frozen=True)
class Config:
    data: Annotated[str, "rankings of n responses, with `kind`; several files by commas"] = (
        "data/toy/rankings_kinds.jsonl"
    )
    validation: Annotated[str, "held-out rankings of n responses; empty: none"] = (
        "data/toy/rankings_kinds_validation.jsonl"
    )
    open_utility: Annotated[
        str, "of open-ended prompts: linear, log, power, inverse_power or log_sigmoid, :PARAMETER"
    ] = "inverse_power"
    closed_utility: Annotated[str, "of closed-ended prompts"] = "linear"
    epsilon: Annotated[float, "added to differences where U is steep at 0 (their code: 0.1)"] = 0.1
    logit_penalty: Annotated[
        float, "of the mean square of the head's outputs, lest rewards get stuck; falls as lr does"
    ] = 3e-2
    num_responses: Annotated[
        int, "n: lines with more lose some in between, those with fewer are dropped; 0: line 1's"
    ] = 0
    label_smoothing: Annotated[float, "probability that a pair's order is taken to be wrong"] = 0.0
    label_noise: Annotated[float, "share of the training lines whose order is drawn by lot"] = 0.0
    init: Annotated[
        str, "trunk to start from: a run or Hugging Face GPT-2 directory; a reward model goes on"
    ] = "runs/sft"
    tokenizer: Annotated[str, "gpt2, FILE.tiktoken or directory; empty: --init's"] = ""
    normalise_with: Annotated[
        str, "policy on whose samples scores get mean 0, std 1; empty: --init; none: don't"
    ] = ""
    prompts: Annotated[str, "prompts for those samples"] = "data/toy/prompts_train.jsonl"
    num_prompts: Annotated[int, "how many of them, a sample each (Ziegler et al.: 256)"] = 1024
    max_new_tokens: Annotated[int, "longest of those samples, tokens"] = 48
    out_dir: Annotated[str, "run directory"] = "runs/collapse"
    max_length: Annotated[int, "tokens of prompt and response; 0: the model's positions"] = 0
    overlong: Annotated[str, "response over max_length: drop its line, or cut its end"] = "drop"
    epochs: Annotated[float, "passes over the data; the collapse comes when they are many"] = 80.0
    steps: Annotated[int, "optimiser steps, in the place of --epochs; 0: as --epochs says"] = 0
    batch_size: Annotated[int, "prompts a step, over all ranks (their code: 8)"] = 8
    micro_batch_size: Annotated[int, "prompts a forward on one rank; 0: all of its share"] = 0
    lr: Annotated[float, "peak learning rate (their code, DeBERTa: 1e-5)"] = 1e-3
    warmup: Annotated[int, "steps of linear warm-up (their code: 10%)"] = 20
    final_lr: Annotated[float, "last rate over peak rate, by a cosine"] = 0.01
    adam_beta2: Annotated[float, "Adam's second-moment decay"] = 0.999
    adam_eps: Annotated[float, "Adam's epsilon"] = 1e-8
    weight_decay: Annotated[float, "AdamW's, on matrices (their code: 0.01)"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm (their code: 2)"] = 2.0
    seed: Annotated[int, "of the head, order and samples"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[
        str, "float32, bfloat16, float16, float64; empty: bfloat16 on cuda, else float32"
    ] = ""
    compile: Annotated[bool, "torch.compile the model"] = False
    checkpoint_activations: Annotated[bool, "less memory: a block's computed anew in backward"] = (
        False
    )
    log_every: Annotated[int, "steps between printed lines"] = 50
    eval_every: Annotated[int, "steps between evaluations; 0: only at the end"] = 40
    eval_lines: Annotated[int, "training lines in an evaluation, from the first; 0: all"] = 512
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 200
    timeout_s: Annotated[int, "a collective that takes longer ends the job, seconds"] = 600
    resume: Annotated[bool, "go on from out_dir's last checkpoint, or start if none"] = False
    overwrite: Annotated[bool, "delete the run in out_dir first"] = False


@dataclasses.dataclass(frozen=True)
class OptimumConfig:
    utilities: Annotated[str, "NAME or NAME:PARAMETER, by commas"] = (
        "linear,log_sigmoid,log_sigmoid:0.25,power:0.5,log,inverse_power:0.5,inverse_power"
    )
    epsilon: Annotated[float, "added to differences where U is steep at 0"] = 0.0
    sizes: Annotated[str, "how many responses, by commas"] = "8,50,1000"
    out: Annotated[str, "writes OUT.json, OUT.md and, with matplotlib, OUT.png"] = (
        "runs/figures/optimal_rewards"
    )


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    runs: Annotated[str, "runs of collapse.py, by commas, or before the flags"] = (
        "runs/collapse,runs/prompt_aware"
    )
    out: Annotated[str, "writes OUT.json, OUT.md and, of six runs or fewer, OUT.png"] = (
        "runs/figures/collapse"
    )


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


def split_names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def read_rankings(path, tokenizer, max_length, cut_response, n):
    """-> examples, n, and counts of what was cut and dropped.

    An example: `prompt` and `responses` (token ids, best first, n of them: as many as the file's
    first line has, where n is 0), `kind`. The order is taken as it stands, ties in `scores` too. Of
    more than n responses, n are kept, the best and the worst among them; lines with fewer, or one
    that is too long, or two that are equal, are dropped.
    """
    examples, lines = [], 0
    counts = {"texts cut": 0, "lines with fewer": 0, "with one too long": 0, "with equal ones": 0}
    for where, record in read_jsonl(path, {"prompt": True}):
        texts, lines = read_responses(where, record), lines + 1
        n = n or len(texts)
        if record.get("kind") not in KINDS:
            refuse(f"{where}: kind: expected open or closed, got {record.get('kind')!r}")
        if len(texts) < n:
            counts["lines with fewer"] += 1
            continue
        texts = [texts[k * (len(texts) - 1) // (n - 1)] for k in range(n)]
        prompt = encode(tokenizer, record["prompt"], None, sys.maxsize)[0]
        responses = [encode(tokenizer, "", text, sys.maxsize)[1] for text in texts]
        limit = max_length - 1
        longest = max(map(len, responses))
        if longest > limit and not cut_response:
            counts["with one too long"] += 1
            continue
        responses = [array("i", ids[:limit]) for ids in responses]  # 4 bytes a token
        if len({ids.tobytes() for ids in responses}) < n:
            counts["with equal ones"] += 1
            continue
        # One cut for the prompt: all of a line's responses are read after the same text.
        room = max_length - min(longest, limit)
        counts["texts cut"] += sum(len(ids) == limit for ids in responses) * (longest > limit)
        counts["texts cut"] += len(prompt) > room
        example = {"prompt": array("i", prompt[-room:]), "responses": responses}
        examples.append(example | {"kind": record["kind"]})
    if not examples:
        what = ", ".join(f"{count} {name}" for name, count in counts.items())
        refuse(f"{path}:0: file: none of its {lines} lines can be learnt from ({what})")
    return examples, n, counts


def with_noise(examples, share, seed):
    """Examples of which a share, drawn at random, have their responses in a random order."""
    rng, noisy = np.random.default_rng([seed, 1]), list(examples)
    for i in rng.permutation(len(examples))[: round(share * len(examples))].tolist():
        order = rng.permutation(len(examples[i]["responses"]))
        noisy[i] = examples[i] | {"responses": [examples[i]["responses"][k] for k in order]}
    return noisy


def collate_rankings(examples, n_embd):
    """Examples -> tokens, mask, segments (R, T), responses to a prompt beside each other where that
    is cheaper for a model of width n_embd; closed (B,) bool."""
    groups = [g for e in examples for g in groups_of(e["prompt"], e["responses"], n_embd)]
    closed = torch.tensor([example["kind"] == "closed" for example in examples])
    return *pad_beside(*zip(*groups, strict=True)), closed


def read_utility(flag, text, epsilon):
    """NAME or NAME:PARAMETER -> `utility`, or the script ends."""
    name, _, number = text.partition(":")
    try:
        return utility(name, float(number) if number else None, epsilon)
    except (ValueError, OverflowError) as error:
        refuse(f"{flag} {text}: {error}")


def optimum_of(flag, text, n, U):
    """`optimal_rewards`, or the script ends."""
    try:
        return optimal_rewards(n, U)
    except (ValueError, RuntimeError) as error:
        refuse(f"{flag} {text}: n = {n}: {error}")


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


# --- mathematics ----------------------------------------------------------------------------------


def utility(name, parameter=None, epsilon=0.0):
    """U, an increasing concave function on tensors of reward differences x in (0, 1].

    "linear" x; "log" log x; "power" x^g with 0 < g < 1 (0.5 unless given); "inverse_power" -x^-g
    with g > 0 (1); "log_sigmoid" log sigmoid(x / s) with s > 0 (1). `parameter` is g or s.

    log, power and inverse_power are infinitely steep at 0. With epsilon > 0 they are functions of
    x + epsilon, log of 1 + x / epsilon, and go on below 0 as straight lines of the slope at 0, as
    in the authors' code, for responses that training still has in the wrong order. Without, they
    are meant for x > 0 alone. Raises ValueError: unknown name, a parameter out of its range.
    """
    g = {"power": 0.5}.get(name, 1.0) if parameter is None else float(parameter)
    if not epsilon >= 0:
        raise ValueError(f"epsilon: expected at least 0, got {epsilon}")
    if not 0 < g < math.inf or (name == "power" and g >= 1):
        raise ValueError(f"expected a parameter above 0 (power: below 1 too), got {g}")
    if name in ("linear", "log") and parameter is not None:
        raise ValueError("has no parameter")
    if name == "linear":
        return lambda x: 1.0 * x
    if name == "log_sigmoid":
        return lambda x: F.logsigmoid(x / g)
    forms = {
        "log": lambda x: torch.log(x / epsilon + 1 if epsilon else x),
        "power": lambda x: (x + epsilon) ** g,
        "inverse_power": lambda x: -((x + epsilon) ** -g),
    }
    if name not in forms:
        raise ValueError("expected linear, log, power, inverse_power or log_sigmoid")
    form = forms[name]
    if not epsilon:
        return form
    at_zero = {"log": 1, "power": g * epsilon**g, "inverse_power": g * epsilon**-g}
    slope = at_zero[name] / epsilon  # U'(0)
    # The line adds nothing above 0: slope may be 1e8, and no digits of U' are lost to it there.
    return lambda x: form(x.clamp(min=0)) - slope * F.relu(-x)


def optimal_rewards(n, utility):
    """The maximiser of sum_{i<j} U(r_i - r_j) over 1 >= r_1 >= ... >= r_n >= 0, (n,) float64, best
    first: what a reward model collapses to.

    U is concave, any function on float64 tensors with two derivatives. Then there is a maximiser
    with r_k + r_{n+1-k} = 1, and the only one if U is strictly concave and increasing; for U(x) = x
    the middle one of an odd n may lie anywhere, and is 1/2 here; if U falls at large x, what does
    not reach 0 and 1 may be shifted.

    By that symmetry only s_k = 1 - r_k = r_{n+1-k}, k up to n/2, are sought, and small ones keep
    all their digits:

        S = 2 sum_{i<j} U(s_j - s_i) + sum_{i,j} U(1 - s_i - s_j) + 2 [n odd] sum_i U(1/2 - s_i)

    Newton's method: those at 0 that the gradient holds there are left out of a step, as s_1 is
    where U increases. Where U is infinitely steep at 0 no two rewards may be equal, and a step
    closes no gap by more than nine tenths. RuntimeError if it does not converge: U is not concave,
    or too steep for float64.
    """
    if n < 2:
        raise ValueError(f"expected n of at least 2, got {n}")
    h = n // 2
    i, j = torch.triu_indices(h, h, 1)
    s = (1 - torch.cos(math.pi * torch.arange(h, dtype=torch.float64) / (n - 1))) / 2

    def derivatives(x):
        """U' and U'' at x."""
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(utility(x).sum(), x, create_graph=True)
        if not first.requires_grad:  # a straight line
            return first, torch.zeros_like(x)
        (second,) = torch.autograd.grad(first.sum(), x)
        return first.detach(), second

    def total(s):
        value = 2 * utility(s[j] - s[i]).sum() + utility(1 - s[:, None] - s).sum()
        value = (value + 2 * (n % 2) * utility(0.5 - s).sum()).item()
        return -math.inf if math.isnan(value) else value

    steep = not derivatives(torch.zeros(1, dtype=torch.float64))[0].isfinite().all()
    for _ in range(500):
        near, across = derivatives(s[j] - s[i]), derivatives(1 - s[:, None] - s)
        middle = derivatives(0.5 - s)
        slopes, curves = torch.zeros(2, h, h, dtype=torch.float64)
        slopes[i, j], curves[i, j] = near[0], -near[1]
        gradient = 2 * (slopes.sum(0) - slopes.sum(1) - across[0].sum(1) - n % 2 * middle[0])
        curves = curves + curves.T
        hessian = 2 * (torch.diag(curves.sum(1)) - curves - across[1])  # of -S
        own = -2 * across[1].sum(1) - 2 * (n % 2) * middle[1]
        hessian.diagonal().add_(own)
        free = (s > 0) | (gradient > 0)
        free = free.nonzero().squeeze(1)
        if not len(free):
            break
        # Scaled to a diagonal of 1: curvatures may be 30 orders of magnitude apart.
        part = hessian[free][:, free]
        scale = part.diagonal().clamp(min=1e-12).rsqrt()
        part = part * scale[:, None] * scale
        part.diagonal().add_(1e-13)
        factor, failed = torch.linalg.cholesky_ex(part)
        if failed:
            raise RuntimeError("the utility is not concave, or too steep for float64")
        step = torch.zeros_like(s)
        step[free] = scale * torch.cholesky_solve((scale * gradient[free])[:, None], factor)[:, 0]
        length = 1.0
        if steep:
            gaps, closing = s.diff(), -step.diff()
            closing = torch.cat([closing / gaps, 2 * step[-1:] / (1 - 2 * s[-1:])])
            length = min(1.0, 0.9 / max(closing.max().item(), 1e-300))
        before = total(s)
        while True:
            new = (s + length * step).clamp(min=0)
            rise = (gradient @ (new - s)).item()
            if total(new) >= before + 1e-4 * rise - 1e-14 * abs(before):
                break
            length /= 2
        moved, s = (new - s).abs().max().item(), new
        if moved < 1e-13:
            if step.abs().max() > 1e-8:  # a step is wanted, and none is found that rises
                raise RuntimeError("no maximiser found: the utility is too steep for float64")
            break
    else:
        raise RuntimeError(f"no maximiser found in 500 steps, the last of {moved:.1e}")
    return torch.cat([1 - s, torch.full((n % 2,), 0.5, dtype=torch.float64), s.flip(0)])


def scaled(U):
    """U / (U(1) - U(0)): the optimum is the same, and kinds with different utilities weigh alike:
    without it, those under -1 / (x + 0.1) have gradients up to a hundred times those under x, and
    the others' ranks are hardly learnt."""
    ends = U(torch.tensor([0.0, 1.0], dtype=torch.float64))
    height = (ends[1] - ends[0]).item()
    return lambda x: U(x) / height


def with_smoothing(U, smoothing):
    """The utility that is expected when a pair's order is wrong with probability `smoothing`."""
    if not smoothing:
        return U  # which need not be defined below 0
    return lambda x: (1 - smoothing) * U(x) + smoothing * U(-x)


def wasserstein(a, b):
    """The Wasserstein-1 distance of two sets of as many numbers, each (n,): the mean distance of
    the sorted ones."""
    return (a.sort().values - b.sort().values).abs().mean().item()


def beta_quantiles(a, count):
    """The quantiles of Beta(a, a) at (i + 1/2) / count, (count,) float64, ascending."""
    # With x = t^(1/a) / 2 the lower half's density in t, (1 - t^(1/a) / 2)^(a-1), is bounded.
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = (1 - t ** (1 / a) / 2) ** (a - 1)
    mass = torch.cumulative_trapezoid(density, t)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * mass / mass[-1]])
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    lower = np.interp(torch.minimum(levels, 1 - levels), mass, t ** (1 / a) / 2)
    return torch.where(levels < 0.5, torch.tensor(lower), 1 - torch.tensor(lower))


def limit_law(name, parameter=None):
    """a, where the optimal rewards under `utility(name, parameter)`, not smoothed, are distributed
    as Beta(a, a) when n grows: (1 - g) / 2 for x^g, 1/2 for log x, (1 + g) / 2 for -x^-g with g up
    to 1 (at 1 it is the uniform law). 0 for U(x) = x: half of them at 0, half at 1. None: no such
    law; a U of finite slopes leaves some at 0 and 1."""
    g = {"power": 0.5}.get(name, 1.0) if parameter is None else parameter
    if name == "inverse_power" and g > 1:
        return None
    laws = {"linear": 0.0, "power": (1 - g) / 2, "log": 0.5, "inverse_power": (1 + g) / 2}
    return laws.get(name)


def distance_to_limit(rewards, a):
    """Wasserstein-1 distance of rewards (n,) to Beta(a, a)."""
    n = len(rewards)
    each = math.ceil(200_000 / n)
    found = rewards.sort().values.repeat_interleave(each)
    if a == 0:
        law = (torch.arange(n * each) * 2 >= n * each).double()
    else:
        law = beta_quantiles(a, n * each)
    return (found - law).abs().mean().item()


def pairwise_loss(chosen_scores, rejected_scores, margin=0.0, label=1.0, utility=F.logsigmoid):
    """-[p U(d) + (1 - p) U(-d)], d = chosen - rejected - margin, of each pair, (B,), nats.

    Bradley-Terry with U = log sigmoid. margin: a number or (B,), Llama 2's m(r), arXiv:2307.09288
    eq. 2. label: p = P(chosen is better), a number or (B,): 1 is a hard label; AI feedback gives
    soft ones, and its least loss is then the entropy of p, not 0. utility: any increasing function.
    """
    difference = chosen_scores - rejected_scores - margin
    if not torch.is_tensor(label) and label == 1:  # U need not be defined below 0
        return -utility(difference)
    return -(label * utility(difference) + (1 - label) * utility(-difference))


def ranking_loss(scores, utility=F.logsigmoid, margin=0.0, label=1.0, keep=None):
    """Mean of `pairwise_loss` over each prompt's pairs, (B,). InstructGPT eq. 1, arXiv:2203.02155.

    scores (B, K), best response first. margin, label: numbers or (B, P), P = K-choose-2 pairs in
    the order of torch.triu_indices. keep (B, P) bool: the pairs that count (no ties, no padding),
    at least one a row; None: all.
    """
    K = scores.shape[1]
    i, j = torch.triu_indices(K, K, 1, device=scores.device)
    better, worse = scores[:, i], scores[:, j]  # (B, P)
    if keep is None:
        return pairwise_loss(better, worse, margin, label, utility).mean(1)
    # A pair that does not count must not reach U, whose gradient there may be NaN: NaN * 0 is NaN.
    better, worse = better.masked_fill(~keep, 1.0), worse.masked_fill(~keep, 0.0)
    losses = pairwise_loss(better, worse, margin, label, utility)
    return losses.masked_fill(~keep, 0.0).sum(1) / keep.sum(1)


def score_statistics(raw, transform="identity"):
    """What makes `normalised` scores of mean 0 and standard deviation 1 of these outputs (n,).

    ValueError when they are all equal.
    """
    scores = torch.sigmoid(raw) if transform == "sigmoid" else raw
    std = scores.std(correction=0).item()
    if not std > 0:
        raise ValueError(f"all {len(raw)} scores are {scores[0]:g}: they can't be normalised")
    return dict(zip(STATISTICS, (scores.mean().item(), std, transform), strict=True))


# --- scoring --------------------------------------------------------------------------------------


def add_scalar_head(policy):
    """A language model's trunk under a new scalar head, drawn from the default generator."""
    model = GPT(policy.config, scalar_head=True)
    model.load_state_dict(policy.state_dict() | {"score.weight": model.score.weight.detach()})
    return model


def score_rows(model, rows, cfg, device, autocast, rank, world):
    """The head's outputs, a list of numbers, for rows of (prompt ids, response ids), from all
    ranks. None if told to stop."""
    model.eval()
    scores, groups = [], group_by_prompt(rows, model.config.n_embd)
    # No gradients are kept, so more responses fit.
    batches, last_time = batches_of_groups(groups, 4 * cfg.micro_batch_size or 256), time.time()
    for begin in range(0, len(batches), world):
        if stop_requested(device):
            return None
        if rank == 0 and time.time() - last_time > 30:
            last_time = time.time()
            print(f"scored {begin}/{len(batches)} batches of responses", flush=True)
        for indices in batches[begin + rank : begin + rank + 1]:
            some = [groups[i] for i in indices]
            beside = pad_beside(*zip(*some, strict=True))
            tokens, mask, segments = (tensor.to(device) for tensor in beside)
            with torch.no_grad(), autocast:
                output = model(tokens, last_tokens(mask), segments)  # (N,), one a response
            found = output.split([len(responses) for _, responses in some])
            scores += [(i, row.tolist()) for i, row in zip(indices, found, strict=True)]
    return [score for _, row in sorted(gather(scores, device)) for score in row]


def score_examples(model, examples, cfg, device, autocast, rank, world):
    """Raw scores of each example's responses: a list of lists. None if told to stop."""
    rows = [(e["prompt"], response) for e in examples for response in e["responses"]]
    scores = score_rows(model, rows, cfg, device, autocast, rank, world)
    if scores is None:
        return None
    scores = iter(scores)
    return [list(itertools.islice(scores, len(e["responses"]))) for e in examples]


def sample_responses(model, tokenizer, prompts, cfg, device, temperature, gold, rank, world):
    """One response to each prompt, at a temperature, and what it is worth, from all ranks.

    Returns a list of dicts, in the order of `prompts`: the prompt's line with `response`, `parts`
    (numbers: eos = 1 if it ended, words, gold and its explanation); None if told to stop.
    """
    sampler = model if device.type == "cpu" else copy.deepcopy(model).bfloat16()
    sampler.eval()
    generator = torch.Generator(device).manual_seed(cfg.seed * world + rank)
    room = model.config.n_positions - cfg.max_new_tokens
    prompt_ids = [encode(tokenizer, line["prompt"], None, room)[0] for line in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))  # few pads in a batch
    samples = []
    rows = 4 * cfg.micro_batch_size or 256  # on one rank; no gradients are kept, so more fit
    for begin in range(0, len(prompts), rows * world):
        if stop_requested(device):
            return None
        indices = order[begin : begin + rows * world][rank::world]
        if not indices:
            continue
        tokens, mask = generate(
            sampler,
            [prompt_ids[i] for i in indices],
            cfg.max_new_tokens,
            temperature=temperature,
            eos=tokenizer.eot_token,
            generator=generator,
        )
        for i, row, inside in zip(indices, tokens, mask, strict=True):
            ids = row[inside].tolist()
            ended = ids[-1] == tokenizer.eot_token
            response = text_of(tokenizer, ids[:-1] if ended else ids)
            parts = {"eos": float(ended), "words": float(len(response.split()))}
            parts |= judge(gold, prompts[i], response)
            samples.append(prompts[i] | {"index": i, "response": response, "parts": parts})
    return sorted(gather(samples, device), key=lambda sample: sample["index"])


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


def load_reference(cfg, tokenizer, max_length, device):
    """The policy of --normalise_with, which must write in the reward model's tokens."""
    directory = cfg.normalise_with or cfg.init
    flag = f"--normalise_with {directory}"
    try:
        policy = load_model(directory, device)
        # --init's tokenizer may have come from --tokenizer.
        theirs = tokenizer if directory == cfg.init else load_tokenizer(directory)
        check_tokenizer(theirs, directory, load_config(directory))
    except (OSError, ValueError) as error:
        refuse(error)
    if policy.score is not None:
        refuse(f"{flag}: has a scalar head; scores are normalised on samples of a language model")
    if tokenizer_hash(theirs) != tokenizer_hash(tokenizer):
        refuse(f"{flag}: another tokenizer ({theirs.name}) than {cfg.init}'s ({tokenizer.name})")
    if cfg.max_new_tokens >= min(policy.config.n_positions, max_length):
        refuse(f"--max_new_tokens {cfg.max_new_tokens}: leaves a prompt no room in {directory}")
    return policy


def reference_rows(policy, tokenizer, prompts, cfg, device, max_length, rank, world):
    """(prompt ids, response ids) of a sample to each prompt, those that ended: what did not end has
    a score of its own in RL. None if told to stop."""
    samples = sample_responses(policy, tokenizer, prompts, cfg, device, 1.0, None, rank, world)
    if samples is None:
        return None
    ended = [s for s in samples if s["parts"]["eos"] and s["response"].strip()]
    if len(ended) < 2:
        refuse(
            f"{len(ended)} of {len(samples)} samples to normalise on ended, 2 are needed at least: "
            f"more --num_prompts, or more --max_new_tokens than {cfg.max_new_tokens}"
        )
    if rank == 0:
        print(
            f"scores are normalised on {len(ended)} samples ({len(samples) - len(ended)} more did "
            f"not end)" + (": few, 256 are usual" if len(ended) < 256 else ""),
            flush=True,
        )
    return [encode(tokenizer, s["prompt"], s["response"], max_length, True) for s in ended]


# --- evaluation -----------------------------------------------------------------------------------


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


def describe_rewards(examples, rewards, optima):
    """What the rewards (a list of n for each example, best first, between 0 and 1) look like.

    Of each kind: mean and std by rank, its optimum, `deviation` (the largest distance of a mean to
    it), `accuracy` (of pairs in the right order, ties half), a histogram of all in tenths; and w1,
    the distance of the kinds' mean curves, None where one kind is missing.
    """
    report = {}
    for kind in KINDS:
        chosen = [r for e, r in zip(examples, rewards, strict=True) if e["kind"] == kind]
        if not chosen:
            continue
        found = torch.tensor(chosen, dtype=torch.float64)  # (prompts, n)
        i, j = torch.triu_indices(found.shape[1], found.shape[1], 1)
        hits = 0.5 + 0.5 * (found[:, i] - found[:, j]).sign()
        mean, optimum = found.mean(0), torch.tensor(optima[kind], dtype=torch.float64)
        report[kind] = {
            "prompts": len(chosen),
            "accuracy": rate_interval(hits.sum(1).tolist(), [len(i)] * len(chosen)),
            "mean": mean.tolist(),
            "std": found.std(0, correction=0).tolist(),
            "optimum": optima[kind],
            "deviation": (mean - optimum).abs().max().item(),
            "histogram": torch.histc(found.float(), 10, 0, 1).int().tolist(),
        }
    curves = [torch.tensor(row["mean"], dtype=torch.float64) for row in report.values()]
    report["w1"] = wasserstein(*curves) if len(curves) == 2 else None
    return report


def flat(report, prefix):
    """What a run logs of `describe_rewards`; by rank, and histograms, are lists."""
    record = {f"{prefix}w1": report["w1"]} if report["w1"] is not None else {}
    for kind in set(KINDS) & set(report):
        row = report[kind]
        record |= {f"{prefix}{kind}_accuracy": row["accuracy"][0]}
        record |= {f"{prefix}{kind}_deviation": row["deviation"], f"{prefix}{kind}": row["mean"]}
        record |= {f"{prefix}{kind}_std": row["std"], f"{prefix}{kind}_histogram": row["histogram"]}
    return dict(sorted(record.items()))


def print_rewards(name, report):
    for kind in KINDS:
        if kind not in report:
            continue
        row = report[kind]
        means = " ".join(f"{x:.3f}" for x in row["mean"])
        best = " ".join(f"{x:.3f}" for x in row["optimum"])
        print(
            f"  {name}, {kind}: rewards by rank {means}, accuracy {row['accuracy'][0]:.3f}, "
            f"{row['prompts']} prompts\n  {' ' * len(f'{name}, {kind}')}  the optimum is {best}"
        )
    if report["w1"] is not None:
        print(f"  {name}: W1 between the kinds {report['w1']:.3f}", flush=True)


# --- collapse.py optimum, collapse.py plot --------------------------------------------------------


def matplotlib_pyplot():
    """matplotlib.pyplot, drawing to files alone; None, and a line that says so, without it."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, path, bottom=0.0):
    """Writes a figure, leaving that share of it free at its foot."""
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    print(path)
    return Path(path)


def optimum_main(cfg):
    """The theory: optimal rewards by utility and n, beside the laws they tend to."""
    names = split_names(cfg.utilities)
    try:
        sizes = [int(size) for size in split_names(cfg.sizes)]
    except ValueError:
        sizes = []
    if not names or not sizes or min(sizes) < 2:
        refuse("--utilities, --sizes: expected names, and numbers of at least 2, by commas")
    table = []
    for name in names:
        U = read_utility("--utilities", name, cfg.epsilon)
        base, _, number = name.partition(":")
        a = None if cfg.epsilon else limit_law(base, float(number) if number else None)
        for n in sizes:
            rewards = optimum_of("--utilities", name, n, U)
            row = {"utility": name, "n": n, "variance": rewards.var(correction=0).item()}
            row["share at 1"] = (rewards > 1 - 1e-9).double().mean().item()
            row["limit"] = None if a is None else "two atoms" if a == 0 else f"Beta({a:g}, {a:g})"
            row["W1 to it"] = None if a is None else distance_to_limit(rewards, a)
            table.append(row | {"rewards": rewards.tolist()})
            print(f"{name}, n = {n}: variance {row['variance']:.4f}", flush=True)
    heads = ["utility", "n", "variance", "share at 1", "limit", "W1 to it"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in table:
        cells = ["" if row[h] is None else row[h] for h in heads]
        cells = [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    write_table(cfg.out, lines, {"epsilon": cfg.epsilon, "optima": table})
    plt = matplotlib_pyplot()
    if plt is None:
        return
    columns = len(sizes)
    figure, panels = plt.subplots(
        len(names), columns, figsize=(3 * columns, 1.3 * len(names) + 0.6), squeeze=False
    )
    for row, name in zip(panels, names, strict=True):
        base, _, number = name.partition(":")
        a = None if cfg.epsilon else limit_law(base, float(number) if number else None)
        for panel, n in zip(row, sizes, strict=True):
            rewards = next(t["rewards"] for t in table if (t["utility"], t["n"]) == (name, n))
            bins = np.linspace(0, 1, 21)
            panel.hist(rewards, bins, density=True, color="0.75", edgecolor="0.4", linewidth=0.4)
            if n <= 100:
                panel.plot(rewards, [0] * n, "k|", markersize=10, clip_on=False)
            if a:
                edges = np.interp(bins, beta_quantiles(a, 20000), np.linspace(0, 1, 20000))
                panel.stairs(np.diff(edges) / 0.05, bins, color="k", linewidth=1.2, linestyle="--")
            panel.set_xlim(-0.02, 1.02)
            panel.set_yticks([])
            panel.tick_params(labelsize=7)
        row[0].set_ylabel(name.replace("_", " ").replace(":", ", "), fontsize=8)
    for top, bottom, n in zip(panels[0], panels[-1], sizes, strict=True):
        top.set_title(f"n = {n}", fontsize=9)
        bottom.set_xlabel("reward", fontsize=8)
    figure.suptitle(
        "Optimal rewards by utility: histogram in twentieths, ticks; dashed: limit law", fontsize=9
    )
    save_figure(figure, f"{cfg.out}.png")


def write_table(out, lines, result):
    """OUT.md and OUT.json."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(f"{out}.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
    write_json(f"{out}.json", result)
    print("\n".join(lines))


def plot_main(cfg):
    """Runs side by side: rewards by rank at the end, and the kinds coming together, or not."""
    found = []
    for name in split_names(cfg.runs):
        path = Path(name) / "metrics.jsonl"
        try:
            records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            settings = read_json(Path(name) / "args.json")["settings"]
            report = read_json(Path(name) / "report.json")
            found.append((name, settings, report, [r for r in records if "train_w1" in r]))
            _ = report["train"]["open"], report["train"]["closed"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            refuse(f"{name}: not a finished run of collapse.py with both kinds: {error!r}")
    if not found:
        refuse("--runs: expected run directories, by commas")
    lines = [
        "| run | utility, open | closed | prompts | W1 | deviation, open | closed | accuracy |"
    ]
    lines.append("|---" * 8 + "|")
    for name, settings, report, records in found:
        rows = [("training, end", report["train"]), ("held out, end", report.get("eval"))]
        rows = [(where, flat(row, "")) for where, row in rows if row and row["w1"] is not None]
        if len(rows) == 2:  # stopped early: where held-out accuracy was best
            best = max(records, key=lambda r: sum(r[f"eval_{kind}_accuracy"] for kind in KINDS))
            for where, prefix in (("training", "train_"), ("held out", "eval_")):
                early = {k.removeprefix(prefix): v for k, v in best.items() if k.startswith(prefix)}
                rows.append((f"{where}, step {best['step']}", early))
        for where, row in rows:
            accuracy = np.mean([row[f"{kind}_accuracy"] for kind in KINDS])
            lines.append(
                f"| {name} | {settings['open_utility']} | {settings['closed_utility']} | {where} | "
                f"{row['w1']:.3f} | {row['open_deviation']:.3f} | {row['closed_deviation']:.3f} | "
                f"{accuracy:.3f} |"
            )
    write_table(cfg.out, lines, {name: report for name, _, report, _ in found})
    if len(found) > 6:
        print("no figure of more than six runs")
        return
    plt = matplotlib_pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(
        4, len(found), figsize=(4 * len(found), 11), squeeze=False, sharey="row"
    )
    styles = {"open": ("k", "o"), "closed": ("0.6", "s")}
    for column, (name, settings, report, records) in zip(panels.T, found, strict=True):
        ranks = range(1, len(report["train"]["open"]["mean"]) + 1)
        for kind, (colour, marker) in styles.items():
            row = report["train"][kind]
            label = f"{kind}: {settings[f'{kind}_utility'].replace('_', ' ')}"
            # Hollow, and of two sizes: one can be seen behind the other.
            look = {"marker": marker, "fillstyle": "none", "markersize": 5 if kind == "open" else 9}
            spread = {"capsize": 2, "linestyle": "--" if kind == "open" else "-"}
            column[0].errorbar(
                ranks, row["mean"], row["std"], color=colour, label=label, **look, **spread
            )
            column[0].plot(ranks, row["optimum"], "x", color="k", markersize=4)
            if "eval" in report and kind in report["eval"]:
                held = report["eval"][kind]["mean"]
                column[0].plot(ranks, held, ":", color=colour, label=f"{kind}, held out")
        column[0].set_title(Path(name).name.replace("_", " "), fontsize=10)
        column[0].set_xlabel("rank of the response, best first (x: optimum)", fontsize=8)
        steps = [r["step"] for r in records]
        for kind, (colour, _) in styles.items():
            curves = np.array([r[f"train_{kind}"] for r in records])
            line = "--" if kind == "open" else "-"
            column[1].plot(steps, curves[:, 0], line, color=colour, label=f"{kind}, each rank")
            column[1].plot(steps, curves[:, 1:], line, color=colour)
        for where, style in (("train", "-"), ("eval", ":")):
            if f"{where}_w1" in records[-1]:
                label = "training prompts" if where == "train" else "held out"
                column[2].plot(steps, [r[f"{where}_w1"] for r in records], f"k{style}", label=label)
                for kind, (colour, _) in styles.items():
                    values = [r[f"{where}_{kind}_accuracy"] for r in records]
                    column[3].plot(steps, values, style, color=colour, label=f"{kind}, {label}")
        for panel in column[1:]:
            panel.set_xlabel("step", fontsize=8)
        for panel in column:
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
    labels = (
        "reward after training (mean, std)",
        "mean reward, training prompts",
        "W1 between the kinds' means",
        "accuracy (share of pairs)",
    )
    for panel, label in zip(panels[:, 0], labels, strict=True):
        panel.set_ylabel(label, fontsize=9)
    save_figure(figure, f"{cfg.out}.png")


# --- training -------------------------------------------------------------------------------------


def main():
    command = sys.argv[1] if sys.argv[1:] else ""
    if command == "optimum":
        return optimum_main(parse_config(OptimumConfig, __doc__, command))
    if command == "plot":
        # Runs may stand before the flags.
        names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[2:]))
        if names:
            sys.argv[2:] = ["--runs", ",".join(names), *sys.argv[2 + len(names) :]]
        return plot_main(parse_config(PlotConfig, __doc__, command))
    cfg = parse_config(Config, __doc__)
    if cfg.overlong not in ("drop", "cut"):
        refuse(f"--overlong: expected drop or cut, got {cfg.overlong}")
    if cfg.label_smoothing >= 0.5 or cfg.label_noise > 1 or cfg.adam_beta2 >= 1:
        refuse("--label_smoothing: less than 0.5, --label_noise: 1 at most, --adam_beta2: below 1")
    if 1 in (cfg.max_length, cfg.num_responses):
        refuse("--max_length, --num_responses: expected 0, or 2 or more")
    counts = (cfg.batch_size, cfg.max_new_tokens, cfg.log_every)
    if min(counts) < 1 or not min(cfg.clip_norm, cfg.lr) > 0:
        refuse(
            "--batch_size, --max_new_tokens, --log_every, --clip_norm, --lr: expected more than 0"
        )
    if not cfg.epsilon > 0:
        refuse("--epsilon: expected more than 0: training needs U below 0")
    files = split_names(cfg.data)
    if not files:
        refuse("--data: expected a file")
    normalise = cfg.normalise_with != "none"
    if normalise and cfg.num_prompts < 2:
        refuse("--num_prompts: expected 2 or more, or --normalise_with none")
    names = {"open": cfg.open_utility, "closed": cfg.closed_utility}
    utilities = {
        kind: read_utility(f"--{kind}_utility", text, cfg.epsilon) for kind, text in names.items()
    }
    device, dtype, rank, world = start_process(cfg)

    # The model: a language model's trunk under a new scalar head.
    try:
        model = load_model(cfg.init)
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.init)
        tokenizer_files(tokenizer)  # one that can't be saved is refused now, not after training
        check_tokenizer(tokenizer, cfg.init, load_config(cfg.init))
    except (OSError, ValueError) as error:
        refuse(error)
    if model.score is None:
        torch.manual_seed(cfg.seed)
        model = add_scalar_head(model)
    elif not cfg.normalise_with:
        refuse(f"--init {cfg.init}: a reward model: --normalise_with must name a policy, or none")
    set_dropout(model, 0.0)
    model.checkpoint_activations = cfg.checkpoint_activations
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    model.to(device, precision)
    max_length = min(cfg.max_length or model.config.n_positions, model.config.n_positions)

    # The data, all of it on every rank, so that all agree on every batch.
    data, counted, n = {"train": [], "eval": []}, [], cfg.num_responses
    for path in [*files, *([cfg.validation] if cfg.validation else [])]:
        found, n, counts = read_rankings(path, tokenizer, max_length, cfg.overlong == "cut", n)
        data["train" if len(counted) < len(files) else "eval"] += found
        counted.append((path, len(found), counts))
    examples = with_noise(data["train"], cfg.label_noise, cfg.seed)
    data["train"] = examples[: cfg.eval_lines or len(examples)]
    utilities = {
        kind: with_smoothing(scaled(U), cfg.label_smoothing) for kind, U in utilities.items()
    }
    optima = {
        kind: optimum_of(f"--{kind}_utility", names[kind], n, U).tolist()
        for kind, U in utilities.items()
    }
    lengths = row_lengths(examples, model.config.n_embd)
    steps_an_epoch = math.ceil(len(examples) / cfg.batch_size)
    total = cfg.steps or math.ceil(cfg.epochs * steps_an_epoch)
    inputs = [path for path, _, _ in counted]
    reference, prompts, models = None, [], [cfg.init]
    if normalise:
        reference = load_reference(cfg, tokenizer, max_length, device)
        prompts = [line for _, line in read_jsonl(cfg.prompts, {"prompt": True})]
        inputs.append(cfg.prompts)
        models.append(cfg.normalise_with or cfg.init)
    inputs += [path for directory in models for path in weight_files(Path(directory))]
    checkpoint = open_run(cfg, inputs, device, rank, world)
    out_dir = Path(cfg.out_dir)
    if rank == 0:
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"reward model: {size / 1e6:.2f}M parameters; {device}, {dtype}, {world} rank(s)")
        for path, number, counts in counted:
            what = ", ".join(f"{count} {name}" for name, count in counts.items())
            print(f"{path}: {number} lines of {n} responses kept; {what}")
        print(f"open: {names['open']}, closed: {names['closed']}; {total} steps", flush=True)

    mixed = dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    yardstick = []
    if normalise:  # now, since bad flags had better be seen before training than after
        yardstick = reference_rows(
            reference, tokenizer, prompts[: cfg.num_prompts], cfg, device, max_length, rank, world
        )
        if yardstick is None:
            print("stopped by SIGTERM before the first step", flush=True)
            sys.exit(128 + signal.SIGTERM)
    del reference

    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others}],
        lr=cfg.lr,
        betas=(0.9, cfg.adam_beta2),
        eps=cfg.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step = saved_step = 0
    interpolated = -1  # the first evaluation whose training pairs were all in order, but for 1%
    # Sums since the last printed line.
    window = dict.fromkeys(("loss", "prompts", "tokens", "read", "cells"), 0.0)
    if checkpoint:
        state = load_checkpoint(checkpoint, {"reward": model}, {"adam": optimizer}, device, rank)
        step, interpolated = state["step"], state["interpolated"]
        saved_step = step
        scaler.load_state_dict(state["scaler"])
        if rank == 0:
            window = dict(zip(window, state["window"], strict=True))
            print(f"resumed at step {step} from {checkpoint}", flush=True)
    # Losses go through `parallel`: DDP averages the gradients over the ranks in its backward pass.
    parallel = torch.compile(model) if cfg.compile else model
    if world > 1:
        parallel = DistributedDataParallel(
            parallel, device_ids=[device] if device.type == "cuda" else None
        )

    def save():
        nonlocal saved_step
        if step > saved_step:
            state = {"scaler": scaler.state_dict(), "window": all_reduce(window.values(), device)}
            state["interpolated"] = interpolated
            save_checkpoint(cfg, step, {"reward": model}, {"adam": optimizer}, state, device, rank)
            saved_step = step

    def stop():
        """SIGTERM: what was done is saved, and --resume goes on from here to the same weights."""
        save()
        all_reduce([0.0], device)  # when one rank ends, torchrun ends the others: let rank 0 finish
        if rank == 0:
            print(f"stopped by SIGTERM at step {step}; --resume goes on from there", flush=True)
        sys.exit(128 + signal.SIGTERM)

    started = last_time = time.time()
    first_step, epoch, batches, report = step, None, None, {}
    while True:
        if step == total or (cfg.save_every and step % cfg.save_every == 0):
            save()
        if stop_requested(device):
            stop()

        if step == total or (cfg.eval_every and step % cfg.eval_every == 0):
            record = {"step": step, "seconds": round(time.time() - started, 1)}
            for name, some in data.items():
                if not some:
                    continue
                raw = score_examples(model, some, cfg, device, autocast, rank, world)
                if raw is None:
                    stop()
                rewards = torch.tensor(raw, dtype=torch.float64).sigmoid().tolist()
                report[name] = describe_rewards(some, rewards, optima)
                record |= flat(report[name], f"{name}_")
            accuracy = [report["train"][k]["accuracy"][0] for k in KINDS if k in report["train"]]
            if min(accuracy) >= 0.99 and interpolated < 0:
                interpolated = step
            if rank == 0:
                append_line(out_dir / "metrics.jsonl", record)
                line = ""
                for name in report:
                    w1 = report[name]["w1"]
                    line += (
                        f"  {name}:" + (f" W1 {w1:.3f}" if w1 is not None else "") + " accuracy "
                    )
                    line += "/".join(
                        f"{report[name][k]['accuracy'][0]:.3f}" for k in KINDS if k in report[name]
                    )
                print(f"step {step}/{total}{line}", flush=True)
        if step == total:
            break

        # One step: gradients of the mean over the batch's prompts, over micro-batches and ranks.
        if epoch != step // steps_an_epoch:
            epoch = step // steps_an_epoch
            batches = grouped_batches(lengths, cfg.batch_size, [cfg.seed, epoch])
        batch = batches[step % steps_an_epoch]
        rate = learning_rate(step, total, cfg)
        for group in optimizer.param_groups:
            group["lr"] = rate
        penalty = cfg.logit_penalty * rate / cfg.lr  # about none at the end
        parallel.train()
        shares = rank_share(batch, rank, world, cfg.micro_batch_size)
        for micro, indices in enumerate(shares):
            # A rank without lines left runs too, with weight 0: the others wait for its gradients.
            some = [examples[i] for i in indices or batch[:1]]
            tensors = [x.to(device) for x in collate_rankings(some, model.config.n_embd)]
            tokens, mask, segments, closed = tensors
            last = micro == len(shares) - 1
            with parallel.no_sync() if world > 1 and not last else nullcontext():
                with autocast:
                    output = parallel(tokens, last_tokens(mask), segments)  # (N,)
                raw = output.view(-1, n)  # (B, n)
                rewards = raw.sigmoid()  # best first
                losses = torch.where(
                    closed,
                    ranking_loss(rewards, utilities["closed"]),
                    ranking_loss(rewards, utilities["open"]),
                )  # (B,)
                losses = losses + penalty * raw.square().mean(1)
                loss = losses.sum() * (1.0 if indices else 0.0)
                # One mean over micro-batches and ranks; DDP averages over the ranks: undo it.
                scaler.scale(loss * world / len(batch)).backward()
            if indices:
                window["tokens"] += mask.sum().item() + n * sum(len(e["prompt"]) for e in some)
                window["read"] += (segments >= 0).sum().item()
            window["loss"] += loss.item()
            window["prompts"] += len(indices)
            window["cells"] += tokens.numel()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm).item()
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
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if step % cfg.log_every == 0 or step == total:
            sums = dict(zip(window, all_reduce(window.values(), device), strict=True))
            now = time.time()
            left = (now - started) / (step - first_step) * (total - step)
            record = {
                "step": step,
                "seconds": round(now - started, 1),
                "loss": sums["loss"] / sums["prompts"],  # -U a pair, mean since the last line
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": norm if math.isfinite(norm) else None,
                "tokens_per_s": sums["tokens"] / (now - last_time),
                "padding": 1 - sums["read"] / sums["cells"],
            }
            last_time, window = now, dict.fromkeys(window, 0.0)
            if rank == 0:
                append_line(out_dir / "metrics.jsonl", record)
                print(
                    f"step {step}/{total}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad "
                    f"norm {norm:.2f}  {record['tokens_per_s']:.0f} tokens/s  "
                    f"{left // 60:.0f}:{left % 60:02.0f} left",
                    flush=True,
                )

    # Normalised scores, then the finished model and what it is worth.
    statistics = {}
    if normalise:
        raw = score_rows(model, yardstick, cfg, device, autocast, rank, world)
        if raw is None:
            stop()
        try:
            statistics = score_statistics(torch.tensor(raw, dtype=torch.float64), "sigmoid")
        except ValueError as error:  # the model is saved nevertheless, and refused by its readers
            if rank == 0:
                print(f"{out_dir}: not normalised: {error}", file=sys.stderr, flush=True)
    report |= statistics | {"step": step, "seconds": round(time.time() - started, 1)}
    report["interpolated_at"] = interpolated if interpolated >= 0 else None
    report["peak_memory_gib"] = round(peak_memory(device) / 2**30, 2)
    if rank == 0:
        save_model(out_dir, model, tokenizer, {"stage": "reward"} | statistics)
        for name in data:
            if name in report:
                print_rewards({"train": "training", "eval": "held out"}[name], report[name])
        when = "never" if interpolated < 0 else f"at step {interpolated}"
        print(f"training pairs in order, but for 1%: {when}")
        write_json(out_dir / "report.json", report)
        for path in out_dir.glob("checkpoint-*"):
            shutil.rmtree(path)
        print(f"{out_dir}: finished in {report['seconds']:.0f} s, {report['peak_memory_gib']} GiB")
    del parallel  # DDP is part of a reference cycle and keeps the group
    end_process(device)
    return None


def set_dropout(model, rate):
    """Sets all dropout rates: a checkpoint's own is its pre-training's."""
    model.config = dataclasses.replace(model.config, dropout=rate)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        elif hasattr(module, "dropout"):
            module.dropout = rate


def peak_memory(device):
    """The most memory this process has held, bytes: on the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    guarded(main)
