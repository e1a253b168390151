"""Reward modelling: stage 2b of RLHF. A scalar head on a language model learns what people prefer.

Objective, over prompts with K ranked responses each (InstructGPT eq. 1, arXiv:2203.02155; K = 2 is
Bradley and Terry's model of a comparison):

    L = mean over prompts of  1 / (K choose 2) * sum_{i better than j} -log sigmoid(r_i - r_j - m)

with r_k the head's output at the last token, EOS, of response k, and m the pair's margin (Llama 2,
arXiv:2307.09288), 0 unless asked for. All of a prompt's responses are in one batch element, each
encoded once: as separate examples the K - 1 pairs of a response would each update on it, and the
model would overfit within an epoch.

After training, scores are normalised: mean 0 and standard deviation 1 on samples of the policy that
RL starts from, stored in config.json; every reader of a reward model demands them.

Simplified against the papers: one head on the whole trunk, no auxiliary language-model loss.

    python reward.py --gold data/toy.py                    # the embedded task, on annotate.py's
    torchrun --nproc_per_node=8 reward.py --init runs/sft --data hh.jsonl --validation held.jsonl \
        --prompts prompts.jsonl --out_dir runs/reward --lr 1e-5 --batch_size 64 --micro_batch_size 8
    python reward.py score --init runs/reward --data samples.jsonl --out scored.jsonl
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
MARGINS = {"small": (0, 1 / 3, 2 / 3, 1), "large": (0, 1, 2, 3)}  # Llama 2, table 27; by grade


@dataclasses.dataclass(frozen=True)
class Config:
    data: Annotated[str, "rankings or comparisons; several files by commas"] = (
        "runs/feedback/rankings.jsonl"
    )
    data_weights: Annotated[
        str, "how often an epoch passes over each file, by commas (0.5: half of it); empty: once"
    ] = ""
    validation: Annotated[str, "held-out rankings or comparisons; empty: none"] = (
        "runs/feedback_validation/rankings.jsonl"
    )
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) is the truth"] = ""
    init: Annotated[
        str, "trunk to start from: a run or Hugging Face GPT-2 directory; a reward model goes on"
    ] = "runs/sft"
    tokenizer: Annotated[str, "gpt2, FILE.tiktoken or directory; empty: --init's"] = ""
    old: Annotated[
        str, "an older reward model: its accuracy on 1,000 lines of each file is printed first"
    ] = ""
    normalise_with: Annotated[
        str, "policy on whose samples scores get mean 0, std 1; empty: --init; none: don't"
    ] = ""
    prompts: Annotated[str, "prompts for those samples"] = "data/toy/prompts_train.jsonl"
    num_prompts: Annotated[int, "how many of them, a sample each (Ziegler et al.: 256)"] = 1024
    max_new_tokens: Annotated[int, "longest of those samples, tokens"] = 48
    out_dir: Annotated[str, "run directory"] = "runs/reward"
    margin: Annotated[
        str, "none, data, small, large (Llama 2's, by grade) or four numbers by commas"
    ] = "none"
    label_smoothing: Annotated[float, "probability that a label is taken to be wrong"] = 0.0
    max_length: Annotated[int, "tokens of prompt and response; 0: the model's positions"] = 0
    overlong: Annotated[str, "response over max_length: drop it, or cut its end"] = "drop"
    epochs: Annotated[float, "passes over the data (all sources: 1; more overfits)"] = 1.0
    steps: Annotated[int, "optimiser steps, in the place of --epochs; 0: as --epochs says"] = 0
    batch_size: Annotated[int, "prompts a step, over all ranks (InstructGPT: 64)"] = 32
    micro_batch_size: Annotated[int, "prompts a forward on one rank; 0: all of its share"] = 0
    lr: Annotated[float, "peak learning rate (InstructGPT: 9e-6; Stiennon et al.: 1.5e-5)"] = 5e-4
    warmup: Annotated[int, "steps of linear warm-up (Llama 2: 3%)"] = 10
    final_lr: Annotated[float, "last rate over peak rate, by a cosine (InstructGPT: 0.1)"] = 0.1
    adam_beta2: Annotated[float, "Adam's second-moment decay (InstructGPT: 0.95)"] = 0.95
    adam_eps: Annotated[float, "Adam's epsilon (OpenAI 2019: 1e-5)"] = 1e-8
    weight_decay: Annotated[float, "AdamW's, on matrices (Llama 2: 0.1)"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm"] = 1.0
    seed: Annotated[int, "of the head, order and samples"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[
        str, "float32, bfloat16, float16, float64; empty: bfloat16 on cuda, else float32"
    ] = ""
    compile: Annotated[bool, "torch.compile the model"] = False
    checkpoint_activations: Annotated[bool, "less memory: a block's computed anew in backward"] = (
        False
    )
    log_every: Annotated[int, "steps between printed lines"] = 20
    eval_every: Annotated[int, "steps between evaluations; 0: only at the end"] = 100
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 100
    timeout_s: Annotated[int, "a collective that takes longer ends the job, seconds"] = 600
    resume: Annotated[bool, "go on from out_dir's last checkpoint, or start if none"] = False
    overwrite: Annotated[bool, "delete the run in out_dir first"] = False


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    init: Annotated[str, "a reward model's run directory"] = "runs/reward"
    data: Annotated[str, "demonstrations, samples, rankings or comparisons"] = (
        "runs/feedback_validation/samples.jsonl"
    )
    out: Annotated[str, "file to write: the lines of --data with scores"] = "scored.jsonl"
    field: Annotated[
        str, "name of the scores' field; plural for a list, chosen_ and rejected_ for a pair"
    ] = "score"
    micro_batch_size: Annotated[int, "a quarter of the responses a forward; 0: 64"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[
        str, "float32, bfloat16, float16, float64; empty: bfloat16 on cuda, else float32"
    ] = ""
    timeout_s: Annotated[int, "a collective that takes longer ends the job, seconds"] = 600


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


def grade_of(margin):
    """A margin -> its grade, Llama 2's four steps: 0 negligibly better or unsure, 1 slightly
    better, 2 better, 3 significantly better. Rounded down, but 2.9999999 is 3."""
    return min(int(margin + 1e-6), 3)


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


def read_numbers(flag, text):
    """Numbers of at least 0, by commas."""
    try:
        numbers = [float(number) for number in split_names(text)]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number < math.inf for number in numbers):
        refuse(f"{flag} {text}: expected numbers of at least 0, by commas")
    return numbers


def read_margin(text):
    """--margin -> "none", "data", or a table of margins by grade."""
    if text in ("none", "data"):
        return text
    table = MARGINS.get(text) or read_numbers("--margin", text)
    if len(table) != 4:
        refuse(f"--margin {text}: expected none, data, small, large or four numbers")
    return table


def epoch_order(sizes, weights, seed):
    """Indices into files of `sizes` lines laid end to end, each file passed over weights[f] times.

    Of a last, partial pass the lines are drawn at random, others in each epoch (`seed`).
    """
    rng, order, begin = np.random.default_rng(seed), [], 0
    for size, weight in zip(sizes, weights, strict=True):
        whole, part = divmod(round(weight * size), size)
        order += list(range(begin, begin + size)) * whole
        order += sorted((begin + rng.permutation(size)[:part]).tolist())
        begin += size
    return order


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


# --- mathematics ----------------------------------------------------------------------------------


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


def margin_of(margins, setting):
    """Margins as the data has them -> the loss's: "none", "data", or a table by `grade_of`."""
    if setting in ("none", "data"):
        return margins if setting == "data" else torch.zeros_like(margins)
    table = torch.tensor(setting, dtype=margins.dtype, device=margins.device)
    return table[(margins + 1e-6).clamp(max=3).long()]


def smoothed(label, smoothing):
    """P(better) when labels are taken to be wrong with probability `smoothing`."""
    return label * (1 - smoothing) + (1 - label) * smoothing


def score_statistics(raw, transform="identity"):
    """What makes `normalised` scores of mean 0 and standard deviation 1 of these outputs (n,).

    ValueError when they are all equal.
    """
    scores = torch.sigmoid(raw) if transform == "sigmoid" else raw
    std = scores.std(correction=0).item()
    if not std > 0:
        raise ValueError(f"all {len(raw)} scores are {scores[0]:g}: they can't be normalised")
    return dict(zip(STATISTICS, (scores.mean().item(), std, transform), strict=True))


def normalised(raw, statistics):
    """(transform(raw) - mean) / std, raw a tensor of the head's outputs."""
    mean, std, transform = (statistics[name] for name in STATISTICS)
    return ((torch.sigmoid(raw) if transform == "sigmoid" else raw) - mean) / std


# --- scoring --------------------------------------------------------------------------------------


def add_scalar_head(policy):
    """A language model's trunk under a new scalar head, drawn from the default generator."""
    model = GPT(policy.config, scalar_head=True)
    model.load_state_dict(policy.state_dict() | {"score.weight": model.score.weight.detach()})
    return model


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


def pair_records(examples, scores, golds=None):
    """What each pair says, as dicts: `prompt`, `task`; `difference` of the raw scores, and how many
    `words` longer, of the better response over the worse; `margin` and `label`.

    Better by the label, or by gold where `golds` (gold scores of each example's responses) is
    given: then a prompt's pair counts once, however many annotators judged it.
    """
    found, seen = [], set()
    for number, (example, raw) in enumerate(zip(examples, scores, strict=True)):
        prompt, texts = example["line"]["prompt"], example["texts"]
        pairs = example["pairs"]
        if golds is not None:
            value = golds[number]
            both = itertools.permutations(range(len(raw)), 2)
            pairs = [(i, j, value[i] - value[j], 1.0) for i, j in both if value[i] > value[j]]
        for i, j, margin, label in pairs:
            if golds is not None:
                if (prompt, texts[i], texts[j]) in seen:
                    continue
                seen.add((prompt, texts[i], texts[j]))
            words = len(texts[i].split()) - len(texts[j].split())
            pair = {"prompt": prompt, "task": example["line"].get("task", "all"), "words": words}
            pair |= {"difference": raw[i] - raw[j], "margin": margin, "label": label}
            found.append(pair)
    return found


def hit(difference):
    """1 when the better response has more, 0 when it has less, ties one half."""
    return 0.5 + 0.5 * float(np.sign(difference))


def accuracies(pairs):
    """{group: {"model", "longer", "random": [rate, low, high], "pairs"}}, for all and each task.

    `longer` and `random` are the controls: a judge who prefers the longer response, and a coin.
    """
    coin = np.random.default_rng(0)
    for pair in pairs:
        pair["coin"] = float(coin.random() < 0.5)
    groups = {"all": pairs}
    for task in sorted({pair["task"] for pair in pairs} - {"all"}):
        groups[task] = [pair for pair in pairs if pair["task"] == task]
    table = {}
    for name, members in groups.items():
        found = grouped_rate([(p["prompt"], hit(p["difference"])) for p in members])
        longer = grouped_rate([(p["prompt"], hit(p["words"])) for p in members])
        random = grouped_rate([(p["prompt"], p["coin"]) for p in members])
        table[name] = {"model": found["rate"], "longer": longer["rate"], "random": random["rate"]}
        table[name]["pairs"] = len(members)
    return table


def calibration(pairs, bins=10):
    """Reliability of sigmoid(difference) as a probability: bins of confidence from 0.5 to 1.

    -> {"bins": [{"confidence", "accuracy", "pairs"}], "ece"}: the expected calibration error is the
    mean over pairs of |accuracy - confidence| of their bin (Guo et al. 2017, arXiv:1706.04599). A
    soft label counts with its probability for the response that the model prefers.
    """
    x = np.array([pair["difference"] for pair in pairs])
    label = np.array([pair["label"] for pair in pairs])
    confidence = 1 / (1 + np.exp(-np.abs(np.clip(x, -500, 500))))
    correct = np.where(x > 0, label, np.where(x < 0, 1 - label, 0.5))
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for b in range(bins):
        inside = which == b
        if inside.any():
            means = {"confidence": float(confidence[inside].mean())}
            means["accuracy"] = float(correct[inside].mean())
            found.append(means | {"pairs": int(inside.sum())})
    error = sum(row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in found)
    return {"bins": found, "ece": error / len(pairs)}


def by_grade(pairs):
    """Accuracy by the pair's grade, 0 to 3 (see `grade_of`); {} when no pair has a margin."""
    if not any(pair["margin"] > 0 for pair in pairs):
        return {}
    rows = [(grade_of(p["margin"]), p["prompt"], hit(p["difference"])) for p in pairs]
    return {
        str(grade): grouped_rate([(prompt, h) for g, prompt, h in rows if g == grade])
        for grade in sorted({g for g, _, _ in rows})
    }


def bimodality(values):
    """Sarle's coefficient (skewness^2 + 1) / kurtosis: 1/3 for a Gaussian, 5/9 for a uniform law,
    1 for two points. Margins push scores into two clumps (Llama 2, figure 27)."""
    x = values - values.mean()
    if not x.any():
        return 0.0
    skewness, kurtosis = ((x**n).mean() / x.std() ** n for n in (3, 4))
    return float((skewness**2 + 1) / kurtosis)


def evaluate(examples, scores, golds):
    """Everything that report.json says of a model with these raw scores on held-out examples."""
    pairs = pair_records(examples, scores)
    sure = [pair for pair in pairs if pair["label"] > 0.5]  # at 0.5 none is better
    report = {"labels": accuracies(sure), "calibration": calibration(pairs)}
    report["by_grade"] = by_grade(sure)
    difference = torch.tensor([p["difference"] for p in pairs], dtype=torch.float64)
    label = torch.tensor([p["label"] for p in pairs], dtype=torch.float64)
    losses = pairwise_loss(difference, 0.0, label=label)
    entropy = -(torch.xlogy(label, label) + torch.xlogy(1 - label, 1 - label))
    report["loss"] = float(losses.mean())  # nats a pair, without margins or smoothing
    report["label_entropy"] = float(entropy.mean())  # the least that the loss can be
    raw = np.array([s for row in scores for s in row])
    words = np.array([len(text.split()) for e in examples for text in e["texts"]])
    if raw.std() > 0 and words.std() > 0:
        report["score_length_correlation"] = float(np.corrcoef(raw, words)[0, 1])
    report["bimodality"] = bimodality(raw)
    shorter = [(p["prompt"], hit(p["difference"])) for p in sure if p["words"] < 0]
    if shorter:
        report["where_the_shorter_is_better"] = grouped_rate(shorter)
    if golds is not None:
        strict = pair_records(examples, scores, golds)
        report["gold"] = accuracies(strict)
        report["gold_by_grade"] = by_grade(strict)
    return report


def print_evaluation(report):
    for name, what in [("labels", "the labels"), ("gold", "gold, where it is strict")]:
        for group, row in report.get(name, {}).items():
            if not row["pairs"]:
                continue
            if group == "all":
                print(f"agreement with {what}: rate with 95% interval; controls")
            rate, low, high = row["model"]
            interval = "" if low is None else f"[{low:.3f}, {high:.3f}]"
            print(
                f"  {group:<12} {rate:.3f}  {interval:<16}  longer {row['longer'][0]:.3f}  "
                f"random {row['random'][0]:.3f}  {row['pairs']} pairs"
            )
    for grade, row in report["by_grade"].items():
        print(f"  labels of grade {grade}: {row['rate'][0]:.3f}  {row['pairs']} pairs")
    print(f"calibration: expected error {report['calibration']['ece']:.3f}; confidence: accuracy")
    rows = report["calibration"]["bins"]
    print("  " + "  ".join(f"{r['confidence']:.2f}: {r['accuracy']:.2f}" for r in rows), flush=True)


# --- reward.py score ------------------------------------------------------------------------------


def write_jsonl(path, records):
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def score_main(cfg):
    """reward.py score: writes the lines of a file with normalised scores."""
    if not cfg.out or cfg.out.endswith(".gz"):
        refuse("--out: expected a file to write, not compressed")
    device, dtype, rank, world = start_process(cfg)
    try:
        model, tokenizer, statistics = load_reward_model(cfg.init, device)
    except (OSError, ValueError) as error:
        refuse(error)
    mixed = dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    names = {"response": cfg.field, "responses": f"{cfg.field}s"}
    names |= {"chosen": f"chosen_{cfg.field}", "rejected": f"rejected_{cfg.field}"}
    lines, rows, longest, cut = [], [], model.config.n_positions, 0
    for where, record in read_jsonl(cfg.data, {"prompt": True}):
        parts = [name for name in names if name in record]
        if not parts:
            refuse(f"{where}: response: is missing (or responses, or chosen and rejected)")
        for name in parts:
            if names[name] in record:
                refuse(f"{where}: {names[name]}: is there already; --field names another")
            texts = record[name] if name == "responses" else [record[name]]
            if not isinstance(texts, list) or not texts:
                refuse(f"{where}: {name}: expected a list of texts")
            for text in texts:
                if not isinstance(text, str) or not text.strip():
                    refuse(f"{where}: {name}: expected text, got {json.dumps(text)[:40]}")
                ids = encode(tokenizer, record["prompt"], text, longest, cut_response=True)
                cut += sum(map(len, ids)) == longest
                rows.append([array("i", part) for part in ids])
        lines.append((record, parts))
    raw = score_rows(model, rows, cfg, device, autocast, rank, world)
    if raw is None:
        sys.exit(128 + signal.SIGTERM)
    if rank == 0:
        scores = iter(normalised(torch.tensor(raw, dtype=torch.float64), statistics).tolist())
        for record, parts in lines:
            for name in parts:
                many = name == "responses"
                found = list(itertools.islice(scores, len(record[name]) if many else 1))
                record[names[name]] = found if many else found[0]
        write_jsonl(cfg.out, [record for record, _ in lines])
        print(
            f"{cfg.out}: {len(lines)} lines, {len(rows)} responses scored, {cut} of which fill the "
            f"model's {longest} positions and may have been cut"
        )
    end_process(device)


# --- main -----------------------------------------------------------------------------------------


def main():
    if sys.argv[1:2] == ["score"]:
        return score_main(parse_config(ScoreConfig, __doc__, "score"))
    cfg = parse_config(Config, __doc__)
    if cfg.overlong not in ("drop", "cut"):
        refuse(f"--overlong: expected drop or cut, got {cfg.overlong}")
    if cfg.label_smoothing >= 0.5 or cfg.adam_beta2 >= 1 or cfg.max_length == 1:
        refuse(
            "--label_smoothing: expected less than 0.5; --adam_beta2: 1; --max_length: 2 or more"
        )
    if min(cfg.batch_size, cfg.max_new_tokens, cfg.log_every) < 1 or not cfg.clip_norm > 0:
        refuse("--batch_size, --max_new_tokens, --log_every, --clip_norm: expected more than 0")
    files, margin_setting = split_names(cfg.data), read_margin(cfg.margin)
    weights = read_numbers("--data_weights", cfg.data_weights) or [1.0] * len(files)
    if not files or len(weights) != len(files):
        refuse(f"--data_weights: expected {len(files)} numbers, one a file of --data")
    device, dtype, rank, world = start_process(cfg)

    # The model: a language model's trunk under a new scalar head, or a reward model that goes on.
    try:
        model = load_model(cfg.init)
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.init)
        tokenizer_files(tokenizer)  # one that can't be saved is refused now, not after training
        check_tokenizer(tokenizer, cfg.init, load_config(cfg.init))
        if model.score is None:
            torch.manual_seed(cfg.seed)
            model = add_scalar_head(model)
        elif not cfg.normalise_with:
            refuse(
                f"--init {cfg.init}: a reward model: --normalise_with must name a policy, or none"
            )
        old = load_reward_model(cfg.old, device)[:2] if cfg.old else None
    except (OSError, ValueError) as error:
        refuse(error)
    if old and tokenizer_hash(old[1]) != tokenizer_hash(tokenizer):
        refuse(f"--old {cfg.old}: another tokenizer ({old[1].name}) than {cfg.init}'s")
    if old and old[0].config.n_positions < (cfg.max_length or model.config.n_positions):
        refuse(f"--old {cfg.old}: has fewer positions than {cfg.init}: give a --max_length")
    set_dropout(model, 0.0)
    model.checkpoint_activations = cfg.checkpoint_activations
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    model.to(device, precision)
    max_length = min(cfg.max_length or model.config.n_positions, model.config.n_positions)

    # The data, all of it on every rank, so that all agree on every batch.
    examples, sizes, counts = [], [], []
    for path in files:
        found, count = read_examples(path, tokenizer, max_length, cfg.overlong == "cut")
        examples += found
        sizes.append(len(found))
        counts.append(count)
    held_out, held_counts, golds = [], {}, None
    if cfg.validation:
        held_out, held_counts = read_examples(
            cfg.validation, tokenizer, max_length, cfg.overlong == "cut"
        )
    if cfg.gold and held_out:
        gold, golds = load_gold(cfg.gold), []
        for e in held_out:
            golds.append([gold_score(gold, e["line"], text) for text in e["texts"]])
    lengths = row_lengths(examples, model.config.n_embd)
    lines_an_epoch = sum(round(w * size) for w, size in zip(weights, sizes, strict=True))
    if not lines_an_epoch:
        refuse("--data_weights: no line is left")
    steps_an_epoch = math.ceil(lines_an_epoch / cfg.batch_size)
    total = cfg.steps or math.ceil(cfg.epochs * steps_an_epoch)
    normalise = cfg.normalise_with != "none"
    inputs = [*files, *([cfg.validation] if cfg.validation else [])]
    reference, prompts, models = None, [], [cfg.init, *([cfg.old] if cfg.old else [])]
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
        counted = list(zip(files, sizes, counts, strict=True))
        if held_out:
            counted.append((cfg.validation, len(held_out), held_counts))
        for path, number, count in counted:
            what = ", ".join(f"{n} {name}" for name, n in count.items())
            print(f"{path}: {number} lines kept; responses: {what}")
        pairs = sum(len(example["pairs"]) for example in examples)
        print(f"{pairs} pairs; {total} steps of {cfg.batch_size} prompts", flush=True)

    mixed = dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    yardstick = []
    if normalise:  # now, since bad flags had better be seen before training than after
        yardstick = reference_rows(
            reference, tokenizer, prompts[: cfg.num_prompts], cfg, device, max_length, rank, world
        )
    report_old, begin = {}, 0
    for path, number in zip(files, sizes, strict=True):
        # How far an older model still holds on the new data: Llama 2's was refreshed weekly.
        some, begin = examples[begin : begin + min(number, 1000)], begin + number
        if not old or yardstick is None:
            continue
        scores = score_examples(old[0].to(precision), some, cfg, device, autocast, rank, world)
        if scores is None:
            yardstick = None
            continue
        sure = [pair for pair in pair_records(some, scores) if pair["label"] > 0.5]
        report_old[path] = accuracies(sure)["all"]
        rate = report_old[path]["model"][0]
        if rank == 0 and sure:
            print(f"--old {cfg.old}: agrees with the labels of {path} in {rate:.3f} of pairs")
    if yardstick is None:
        print("stopped by SIGTERM before the first step", flush=True)
        sys.exit(128 + signal.SIGTERM)
    del reference, old

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
    # Sums since the last printed line.
    window = dict.fromkeys(("loss", "prompts", "hits", "pairs", "tokens", "read", "cells"), 0.0)
    if checkpoint:
        state = load_checkpoint(checkpoint, {"reward": model}, {"adam": optimizer}, device, rank)
        step = saved_step = state["step"]
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

        if held_out and (step == total or (cfg.eval_every and step % cfg.eval_every == 0)):
            scores = score_examples(model, held_out, cfg, device, autocast, rank, world)
            if scores is None:
                stop()
            report = evaluate(held_out, scores, golds)
            record = {"step": step, "seconds": round(time.time() - started, 1)}
            record |= {"eval_loss": report["loss"], "eval_ece": report["calibration"]["ece"]}
            agreement = ""
            for name in ("labels", "gold"):
                if report.get(name, {"all": {"pairs": 0}})["all"]["pairs"]:
                    rate = record[f"eval_{name}_accuracy"] = report[name]["all"]["model"][0]
                    agreement += f"  agreement with {name} {rate:.3f}"
            if rank == 0:
                append_line(out_dir / "metrics.jsonl", record)
                loss = f"held-out loss {record['eval_loss']:.4f} nats a pair"
                print(f"step {step}/{total}  {loss}{agreement}", flush=True)
                for example, raw in list(zip(held_out, scores, strict=True))[:4]:
                    sample = {"step": step, "prompt": example["line"]["prompt"]}
                    sample |= {"responses": example["texts"], "raw_scores": raw}
                    append_line(out_dir / "samples.jsonl", sample)
        if step == total:
            break

        # One step: gradients of the mean over the batch's prompts, over micro-batches and ranks.
        if epoch != step // steps_an_epoch:
            epoch = step // steps_an_epoch
            chosen = epoch_order(sizes, weights, [cfg.seed, epoch])
            batches = grouped_batches(
                [lengths[i] for i in chosen], cfg.batch_size, [cfg.seed, epoch]
            )
        batch = [chosen[i] for i in batches[step % steps_an_epoch]]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, cfg)
        parallel.train()
        shares = rank_share(batch, rank, world, cfg.micro_batch_size)
        for micro, indices in enumerate(shares):
            # A rank without lines left runs too, with weight 0: the others wait for its gradients.
            some = [examples[i] for i in indices or batch[:1]]
            tensors = [x.to(device) for x in collate(some, model.config.n_embd)]
            tokens, mask, segments, rows, keep, margins, labels = tensors
            last = micro == len(shares) - 1
            with parallel.no_sync() if world > 1 and not last else nullcontext():
                with autocast:
                    output = parallel(tokens, last_tokens(mask), segments)  # (N,)
                scores = output[rows]  # (B, K)
                losses = ranking_loss(
                    scores,
                    margin=margin_of(margins, margin_setting).to(scores.dtype),
                    label=smoothed(labels, cfg.label_smoothing).to(scores.dtype),
                    keep=keep,
                )  # (B,)
                loss = losses.sum() * (1.0 if indices else 0.0)
                # One mean over micro-batches and ranks; DDP averages over the ranks: undo it.
                scaler.scale(loss * world / len(batch)).backward()
            if indices:
                i, j = torch.triu_indices(*[rows.shape[1]] * 2, 1, device=device)
                sign = (scores[:, i] - scores[:, j]).detach().sign()[keep]
                window["hits"] += (0.5 + 0.5 * sign).sum().item()
                window["pairs"] += len(sign)
                window["tokens"] += sum(
                    len(e["prompt"]) + len(r) for e in some for r in e["responses"]
                )
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
                "loss": sums["loss"] / sums["prompts"],  # nats a pair, mean since the last line
                "accuracy": sums["hits"] / sums["pairs"],  # against the labels, before training on
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": norm if math.isfinite(norm) else None,
                "tokens_per_s": sums["tokens"] / (now - last_time),
                "padding": 1 - sums["read"] / sums["cells"],
            }
            last_time, window = now, dict.fromkeys(window, 0.0)
            if rank == 0:
                append_line(out_dir / "metrics.jsonl", record)
                print(
                    f"step {step}/{total}  loss {record['loss']:.4f}  accuracy "
                    f"{record['accuracy']:.3f}  lr {record['lr']:.2e}  grad norm {norm:.2f}  "
                    f"{record['tokens_per_s']:.0f} tokens/s  padding {record['padding']:.1%}  "
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
            statistics = score_statistics(torch.tensor(raw, dtype=torch.float64))
        except ValueError as error:  # the model is saved nevertheless, and refused by its readers
            if rank == 0:
                print(f"{out_dir}: not normalised: {error}", file=sys.stderr, flush=True)
    report |= {"old": report_old} if cfg.old else {}
    report |= statistics | {"step": step, "seconds": round(time.time() - started, 1)}
    report["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    first_epoch = epoch_order(sizes, weights, [cfg.seed, 0])
    report["epoch_lines"] = lines_an_epoch
    report["epoch_pairs"] = sum(len(examples[i]["pairs"]) for i in first_epoch)
    report["peak_memory_gib"] = round(peak_memory(device) / 2**30, 2)
    if rank == 0:
        save_model(out_dir, model, tokenizer, {"stage": "reward"} | statistics)
        if held_out:
            print_evaluation(report)
        if statistics:
            mean, std = statistics["reward_mean"], statistics["reward_std"]
            print(f"normalised: raw mean {mean:.3f}, std {std:.3f} on {len(yardstick)} samples")
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
