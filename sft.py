"""Supervised fine-tuning: stage 1 of RLHF, and pre-training with the same loop.

Objective, over prompts and demonstrated responses (step 1 of InstructGPT, arXiv:2203.02155):

    L = - sum_t w_t log pi(token_t | tokens before t) / sum_t w_t

with w_t = 1 on the response and the EOS that ends it, `--prompt_loss_weight` on the prompt. The
sums run over the whole batch, whatever the number of ranks and micro-batches. A line with an empty
prompt is plain language modelling, so this script also pre-trains.

Simplified against the papers: batches group sequences of like length in the place of packing
several into one row, so that no sequence can see another; one learning rate for all weights.

    python sft.py --prompt_loss_weight 0.3 --gold data/toy.py          # the embedded task
    torchrun --nproc_per_node=8 sft.py --init gpt2/ --data alpaca.jsonl --validation held.jsonl \
        --out_dir runs/alpaca --lr 1e-5 --batch_size 128 --micro_batch_size 8 --epochs 3
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
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from model import (
    GPT,
    GPTConfig,
    check_space,
    check_tokenizer,
    encode,
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
    tokenizer_files,
    weight_files,
    whole_file,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class Config:
    data: Annotated[str, "demonstrations: prompt, response"] = "data/toy/demonstrations.jsonl"
    validation: Annotated[str, "held-out demonstrations; empty: none"] = (
        "data/toy/demonstrations_validation.jsonl"
    )
    prompts: Annotated[str, "prompts to sample from when evaluating; empty: none"] = (
        "data/toy/prompts_validation.jsonl"
    )
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) judges samples"] = ""
    out_dir: Annotated[str, "run directory"] = "runs/sft"
    init: Annotated[str, "run or Hugging Face GPT-2 directory; empty: random weights"] = ""
    tokenizer: Annotated[
        str, "gpt2, FILE.tiktoken or directory; empty: --init's, or data/toy/bpe.tiktoken"
    ] = ""
    n_layer: Annotated[int, "layers, without --init (gpt2: 12)"] = 3
    n_embd: Annotated[int, "width, without --init (gpt2: 768)"] = 128
    n_head: Annotated[int, "attention heads, without --init (gpt2: 12)"] = 4
    n_positions: Annotated[int, "longest sequence, without --init (gpt2: 1024)"] = 128
    initializer_range: Annotated[
        float, "std of the initial weights, without --init (gpt2: 0.02; 128 wide, it can't copy)"
    ] = 0.1
    dropout: Annotated[float, "while training (InstructGPT: residual dropout 0.2)"] = 0.0
    prompt_loss_weight: Annotated[
        float, "weight of a prompt token's loss (papers: 0; embedded task from scratch: 0.3)"
    ] = 0.0
    max_length: Annotated[int, "tokens of prompt and response; 0: the model's positions"] = 0
    overlong: Annotated[str, "response over max_length: drop the line, or cut its end"] = "drop"
    epochs: Annotated[float, "passes over the data (InstructGPT: 16, Stiennon et al.: 1)"] = 1.0
    steps: Annotated[int, "optimiser steps, in the place of --epochs; 0: as --epochs says"] = 0
    batch_size: Annotated[int, "lines a step, over all ranks (Stiennon et al.: 128)"] = 32
    micro_batch_size: Annotated[int, "lines a forward on one rank; 0: all of its share"] = 0
    lr: Annotated[float, "peak learning rate (GPT-2: 3e-6 to 6e-5; InstructGPT: 9.65e-6)"] = 2e-3
    warmup: Annotated[int, "steps of linear warm-up"] = 50
    final_lr: Annotated[float, "last rate over peak rate, by a cosine (InstructGPT: 0.1)"] = 0.0
    adam_beta2: Annotated[float, "Adam's second-moment decay (GPT-3: 0.95)"] = 0.95
    adam_eps: Annotated[float, "Adam's epsilon (OpenAI 2019: 1e-5)"] = 1e-8
    weight_decay: Annotated[float, "AdamW's, on matrices (Llama 2: 0.1)"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm"] = 1.0
    num_prompts: Annotated[int, "prompts sampled in the last evaluation"] = 1000
    max_new_tokens: Annotated[int, "longest sampled response, tokens"] = 48
    seed: Annotated[int, "of weights, order, dropout and samples"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[
        str, "float32, bfloat16, float16, float64; empty: bfloat16 on cuda, else float32"
    ] = ""
    compile: Annotated[bool, "torch.compile the model"] = False
    checkpoint_activations: Annotated[bool, "less memory: a block's computed anew in backward"] = (
        False
    )
    log_every: Annotated[int, "steps between printed lines"] = 50
    eval_every: Annotated[int, "steps between evaluations; 0: only at the end"] = 250
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 250
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


def read_demonstrations(path, tokenizer, max_length, cut_response):
    """-> (prompt ids, response ids) of each line, and how many lines were cut and dropped."""
    examples, counts = [], {"cut": 0, "dropped": 0}
    for _, record in read_jsonl(path, {"prompt": True, "response": False}):
        whole = encode(tokenizer, record["prompt"], record["response"], sys.maxsize)
        if sum(map(len, whole)) <= max_length:
            examples.append(whole)
            continue
        try:
            cut = encode(tokenizer, record["prompt"], record["response"], max_length, cut_response)
        except ValueError:
            counts["dropped"] += 1
            continue
        counts["cut"] += 1
        examples.append(cut)
    if not examples:
        refuse(
            f"{path}:0: file: no response fits into {max_length} tokens; --overlong cut cuts them"
        )
    return examples, counts


def read_prompts(path):
    """The lines of a prompts file, `task` being a string where there is one."""
    prompts = []
    for where, record in read_jsonl(path, {"prompt": True}):
        if not isinstance(record.get("task", ""), str):
            refuse(f"{where}: task: expected a string, got {json.dumps(record['task'])[:40]}")
        prompts.append(record)
    return prompts


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


def loss_weights(tokens, mask, prompt_loss_weight):
    """w (B, T): 1 on response tokens, prompt_loss_weight on prompt tokens but the first, 0 on pads.

    The first token has nothing before it to be predicted from.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    begin = mask.int().argmax(1, keepdim=True)  # (B, 1), the response's first column
    prompt = (columns > 0) & (columns < begin)  # (B, T)
    return mask + prompt_loss_weight * prompt


def weighted_nll(model, tokens, mask, weights):
    """sum_t w_t * -log pi(token_t | before) over a (B, T) batch, nats; and the response's alone.

    The head runs only where a token is trained. Returns two scalars; the second has no gradient.
    """
    trained = weights > 0
    logits = model(tokens, at=predicts(trained))  # (N, V)
    nll = -token_logprobs(logits, tokens, trained)  # (B, T)
    return (nll * weights).sum(), (nll * mask).sum().detach()


# --- evaluation -----------------------------------------------------------------------------------


def held_out_loss(model, examples, cfg, device, autocast, rank, world):
    """Mean nll of held-out response tokens, EOS included, nats a token.

    NaN without any; None if told to stop.
    """
    if not examples:
        return math.nan
    model.eval()
    total, count = 0.0, 0
    lengths = [len(p) + len(r) for p, r in examples]
    for batch in grouped_batches(lengths, 4 * cfg.batch_size, seed=0):
        if stop_requested(device):
            return None
        for indices in rank_share(batch, rank, world, cfg.micro_batch_size):
            if indices:
                tokens, mask = pad(*zip(*[examples[i] for i in indices], strict=True))
                tokens, mask = tokens.to(device), mask.to(device)
                with torch.no_grad(), autocast:
                    total += weighted_nll(model, tokens, mask, mask.float())[1].item()
                count += int(mask.sum())
    total, count = all_reduce([total, count], device)
    return total / count


def held_out_record(loss):
    """The metrics of a held-out loss; none when there was nothing held out."""
    if math.isnan(loss):
        return {}
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}


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


def print_samples(samples):
    for sample in samples:
        gold = f"  gold {sample['parts']['gold']:+.2f}" if "gold" in sample["parts"] else ""
        print(f"  [{sample.get('task', 'all')}]{gold}  {sample['prompt'][-200:]!r}")
        print(f"      -> {sample['response']!r}{'' if sample['parts']['eos'] else '  (no EOS)'}")


def print_table(name, table):
    print(f"{name}: means with 95% intervals")
    for task, parts in table.items():
        print(f"  {task} ({parts['count']} prompts)")
        for part, value in parts.items():
            if part != "count" and parts["count"] > 1:
                print("    {:<12} {:8.3f}  [{:.3f}, {:.3f}]".format(part, *value))


# --- main -----------------------------------------------------------------------------------------


def main():
    cfg = parse_config(Config, __doc__)
    if cfg.overlong not in ("drop", "cut"):
        refuse(f"--overlong: expected drop or cut, got {cfg.overlong}")
    if cfg.dropout >= 1 or cfg.adam_beta2 >= 1 or cfg.max_length == 1:
        refuse("--dropout, --adam_beta2: expected less than 1; --max_length: expected 2 or more")
    if min(cfg.batch_size, cfg.max_new_tokens, cfg.log_every) < 1 or not cfg.clip_norm > 0:
        refuse("--batch_size, --max_new_tokens, --log_every, --clip_norm: expected more than 0")
    device, dtype, rank, world = start_process(cfg)

    # The model: an --init directory's, or a new one. Its tokenizer comes with it.
    try:
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.init or "data/toy/bpe.tiktoken")
        tokenizer_files(tokenizer)  # one that can't be saved is refused now, not after training
        if cfg.init:
            policy = load_model(cfg.init)
            check_tokenizer(tokenizer, cfg.init, load_config(cfg.init))
            if policy.score is not None:
                refuse(f"--init {cfg.init}: has a scalar head, no language model's")
        else:
            torch.manual_seed(cfg.seed)
            sizes = {name: getattr(cfg, name) for name in ("n_layer", "n_embd", "n_head")}
            sizes |= {"n_positions": cfg.n_positions, "initializer_range": cfg.initializer_range}
            policy = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes))
    except (OSError, ValueError) as error:
        refuse(error)
    set_dropout(policy, cfg.dropout)
    policy.checkpoint_activations = cfg.checkpoint_activations
    policy.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    max_length = min(cfg.max_length or policy.config.n_positions, policy.config.n_positions)
    if cfg.max_new_tokens >= policy.config.n_positions:
        refuse(f"--max_new_tokens: expected fewer than the {policy.config.n_positions} positions")

    # The data, all of it on every rank, so that all agree on every batch.
    cut = cfg.overlong == "cut"
    examples, counts = read_demonstrations(cfg.data, tokenizer, max_length, cut)
    held_out, prompts, inputs = [], [], [cfg.data]
    if cfg.validation:
        held_out, held_counts = read_demonstrations(cfg.validation, tokenizer, max_length, cut)
        inputs.append(cfg.validation)
    if cfg.prompts:
        prompts = read_prompts(cfg.prompts)
        inputs.append(cfg.prompts)
    inputs += weight_files(Path(cfg.init)) if cfg.init else []
    gold = load_gold(cfg.gold) if cfg.gold else None
    lengths = [len(prompt) + len(response) for prompt, response in examples]
    steps_an_epoch = math.ceil(len(examples) / cfg.batch_size)
    total = cfg.steps or math.ceil(cfg.epochs * steps_an_epoch)
    checkpoint = open_run(cfg, inputs, device, rank, world)
    out_dir = Path(cfg.out_dir)
    if rank == 0:
        size = sum(parameter.numel() for parameter in policy.parameters())
        print(f"policy: {size / 1e6:.2f}M parameters; {device}, {dtype}, {world} rank(s)")
        print(
            f"{cfg.data}: {len(examples)} lines, {sum(lengths)} tokens, {counts['cut']} cut, "
            f"{counts['dropped']} dropped; {total} steps of {cfg.batch_size} lines",
            flush=True,
        )
        if held_out:
            print(
                f"{cfg.validation}: {len(held_out)} lines, {held_counts['cut']} cut, "
                f"{held_counts['dropped']} dropped",
                flush=True,
            )

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
    mixed = dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    torch.manual_seed(cfg.seed * world + rank)  # dropout differs between the ranks
    step = saved_step = 0
    window = {
        "loss": 0.0,
        "weight": 0.0,
        "tokens": 0.0,
        "cells": 0.0,
    }  # since the last printed line
    if checkpoint:
        state = load_checkpoint(checkpoint, {"policy": policy}, {"adam": optimizer}, device, rank)
        step = saved_step = state["step"]
        scaler.load_state_dict(state["scaler"])
        if rank == 0:
            window = dict(zip(window, state["window"], strict=True))
            print(f"resumed at step {step} from {checkpoint}", flush=True)
    # Losses go through `model`: DDP averages the gradients over the ranks in its backward pass.
    model = torch.compile(policy) if cfg.compile else policy
    if world > 1:
        model = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )

    def save():
        nonlocal saved_step
        if step > saved_step:
            state = {"scaler": scaler.state_dict(), "window": all_reduce(window.values(), device)}
            save_checkpoint(cfg, step, {"policy": policy}, {"adam": optimizer}, state, device, rank)
            saved_step = step

    def stop():
        """SIGTERM: what was done is saved, and --resume goes on from here to the same weights."""
        save()
        all_reduce([0.0], device)  # when one rank ends, torchrun ends the others: let rank 0 finish
        if rank == 0:
            print(f"stopped by SIGTERM at step {step}; --resume goes on from there", flush=True)
        sys.exit(128 + signal.SIGTERM)

    started = last_time = time.time()
    first_step, epoch, batches, eval_loss = step, None, None, None
    while True:
        if step == total or (cfg.save_every and step % cfg.save_every == 0):
            save()
        if stop_requested(device):
            stop()

        if step == total or (cfg.eval_every and step % cfg.eval_every == 0):
            # The same held-out lines and prompts every time, so that evaluations compare.
            eval_loss = held_out_loss(policy, held_out, cfg, device, autocast, rank, world)
            few = one_a_task(prompts)[:6]
            samples = sample_responses(policy, tokenizer, few, cfg, device, 1.0, gold, rank, world)
            if eval_loss is None or samples is None:
                stop()
            if rank == 0:
                record = {"step": step, "seconds": round(time.time() - started, 1)}
                record |= held_out_record(eval_loss)
                if "eval_loss" in record:
                    append_line(out_dir / "metrics.jsonl", record)
                    print(
                        f"step {step}/{total}  held-out loss {eval_loss:.4f} nats a token, "
                        f"perplexity {record['eval_perplexity']:.3f}"
                    )
                for sample in samples:
                    append_line(out_dir / "samples.jsonl", {"step": step} | sample)
                print_samples(samples)
        if step == total:
            break

        # One step: gradients of the batch's weighted mean, over micro-batches and ranks.
        if epoch != step // steps_an_epoch:
            epoch = step // steps_an_epoch
            batches = grouped_batches(lengths, cfg.batch_size, [cfg.seed, epoch])
        batch = batches[step % steps_an_epoch]
        total_weight = sum(
            len(examples[i][1]) + cfg.prompt_loss_weight * (len(examples[i][0]) - 1) for i in batch
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, cfg)
        model.train()
        shares = rank_share(batch, rank, world, cfg.micro_batch_size)
        for micro, indices in enumerate(shares):
            # A rank without lines left runs too, with weight 0: the others wait for its gradients.
            pairs = [examples[i] for i in indices or batch[:1]]
            tokens, mask = pad(*zip(*pairs, strict=True))  # (B, T)
            tokens, mask = tokens.to(device), mask.to(device)
            weights = loss_weights(tokens, mask, cfg.prompt_loss_weight)
            last = micro == len(shares) - 1
            with model.no_sync() if world > 1 and not last else nullcontext():
                with autocast:
                    loss, _ = weighted_nll(model, tokens, mask, weights)
                loss = loss * (1.0 if indices else 0.0)
                # One mean over micro-batches and ranks; DDP averages over the ranks: undo it.
                scaler.scale(loss * world / total_weight).backward()
            window["loss"] += loss.item()
            window["weight"] += total_weight / world / len(shares)
            window["tokens"] += sum(lengths[i] for i in indices)
            window["cells"] += tokens.numel()
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
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if step % cfg.log_every == 0 or step == total:
            loss_sum, weight_sum, tokens_seen, cells = all_reduce(window.values(), device)
            now = time.time()
            left = (now - started) / (step - first_step) * (total - step)
            record = {
                "step": step,
                "seconds": round(now - started, 1),
                "loss": loss_sum / weight_sum,  # weighted nats a token, mean since the last line
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": norm if math.isfinite(norm) else None,
                "tokens_per_s": tokens_seen / (now - last_time),
                "padding": 1 - tokens_seen / cells,
            }
            last_time, window = now, dict.fromkeys(window, 0.0)
            if rank == 0:
                append_line(out_dir / "metrics.jsonl", record)
                print(
                    f"step {step}/{total}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
                    f"grad norm {norm:.2f}  {record['tokens_per_s']:.0f} tokens/s  "
                    f"padding {record['padding']:.1%}  {left // 60:.0f}:{left % 60:02.0f} left",
                    flush=True,
                )

    # The finished model, then what it is worth, greedy and sampled.
    if rank == 0:
        save_model(out_dir, policy, tokenizer, {"stage": "sft"})
    report = {"step": step, "seconds": round(time.time() - started, 1)}
    report["peak_memory_gib"] = round(peak_memory(device) / 2**30, 2)
    report |= held_out_record(eval_loss)
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        if some := prompts[: cfg.num_prompts]:
            samples = sample_responses(
                policy, tokenizer, some, cfg, device, temperature, gold, rank, world
            )
            if samples is None:
                stop()
            report[name] = summarise(samples)
            if rank == 0:
                print_table(f"{name} (temperature {temperature:g})", report[name])
    if rank == 0:
        write_json(out_dir / "report.json", report)
        for path in out_dir.glob("checkpoint-*"):
            shutil.rmtree(path)
        print(f"{out_dir}: finished in {report['seconds']:.0f} s, {report['peak_memory_gib']} GiB")
    del model  # DDP is part of a reference cycle and keeps the group
    end_process(device)


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
