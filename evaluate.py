"""Head to head: which policy is better, by how much, and at what cost in KL.

Every policy responds to the same prompts; every judge scores every response. For policies A and B,

    win rate = mean over prompts and over pairs of a response of each of  [A better] + [tie] / 2
    KL(A, reference) = E sum_t sum_v pi(v | s_t) log(pi(v | s_t) / pi_ref(v | s_t))  nats a sequence

with 95% intervals by the bootstrap over prompts. A judge is a Python file that knows the truth
(`--gold`), a reward model, or a file of comparisons that somebody else labelled. Beside the win
rates stand those of two controls, the longer response and a coin; the report has them at equal
length too.

    python evaluate.py --policies runs/sft,runs/sft@temperature=0 --gold data/toy.py
    python evaluate.py --policies runs/sft,runs/sft@best_of=4:runs/reward --judges runs/reward
    python evaluate.py table; python evaluate.py check --better "A > B"      # of a report
    python evaluate.py plot runs/sft runs/reward                             # learning curves
    python evaluate.py scaling RUN...; python evaluate.py margins RUN...     # of reward models
    python evaluate.py curves "LABEL=RUN,RUN" ...    # groups of seeds: along training; or `points`,
                                                     # one a group; or `rows` of columns
"""

import argparse
import collections
import copy
import dataclasses
import datetime
import functools
import gc
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import shlex
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
from torch.distributed.rendezvous import rendezvous

from model import (
    batches_of_groups,
    check_tokenizer,
    encode,
    entropy,
    generate,
    group_by_prompt,
    last_tokens,
    load_config,
    load_model,
    load_tokenizer,
    masks_of_responses,
    pad_beside,
    predicts,
    read_json,
    text_of,
    tokenizer_hash,
    weight_files,
    whole_file,
    write_json,
)

STATISTICS = ("reward_mean", "reward_std", "score_transform")
ELO = 400 / math.log(10)  # points of Elo's scale in one nat of log-odds
LONGER, COIN = "length", "a coin"  # controls: what no judge should be content to match
# Student's t for 95% and 1, 2, ... degrees of freedom: a few seeds are all that there are.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclasses.dataclass(frozen=True)
class Config:
    policies: Annotated[
        str,
        "by commas: RUN, RUN@temperature=T, RUN@best_of=N:REWARD; the table is against the first",
    ] = "runs/sft"
    reference: Annotated[str, "run that KL is to; empty: the first policy's"] = ""
    prompts: Annotated[str, "prompts for all of them"] = "data/toy/prompts_test.jsonl"
    num_prompts: Annotated[int, "how many of them, from the file's start; 0: all"] = 0
    num_samples: Annotated[int, "K, responses of a policy to a prompt; greedy, best_of: 1"] = 4
    best_of_samples: Annotated[int, "responses of a best_of policy, each the best of N"] = 1
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) is the truth"] = ""
    judges: Annotated[str, "more judges, by commas: reward models and Python files"] = ""
    comparisons: Annotated[
        str, "file of comparisons between these policies (named in `policy`) as one more judge"
    ] = ""
    best_of_n: Annotated[
        int, "curve of best-of-n for n up to this, of the first policy; 0: none"
    ] = 0
    proxy: Annotated[str, "reward that best-of-n goes by"] = "runs/reward"
    by: Annotated[str, "field of the prompts that scores are told apart by"] = "task"
    show: Annotated[str, "parts of gold's `explain` in the printed table, by commas"] = "harmless"
    num_shown: Annotated[int, "prompts whose responses stand side by side in the report"] = 6
    bootstrap: Annotated[int, "resamplings of the prompts (at equal length 200 at most)"] = 1000
    out_dir: Annotated[str, "folder for report.json, samples and figures"] = "runs/evaluation"
    report: Annotated[str, "Markdown report; empty: report.md in out_dir"] = ""
    max_new_tokens: Annotated[int, "longest response, tokens"] = 48
    micro_batch_size: Annotated[
        int, "responses a forward for KL; sampling and judging take four times as many; 0: 64"
    ] = 0
    seed: Annotated[int, "of samples and bootstrap"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[
        str, "float32, bfloat16, float16, float64; empty: bfloat16 on cuda, else float32"
    ] = ""
    timeout_s: Annotated[int, "a collective that takes longer ends the job, seconds"] = 600
    resume: Annotated[bool, "start anew unless the run in out_dir is finished"] = False
    overwrite: Annotated[bool, "delete the run in out_dir first"] = False


@dataclasses.dataclass(frozen=True)
class TableConfig:
    report: Annotated[str, "report.json of an evaluation"] = "runs/evaluation/report.json"
    show: Annotated[str, "parts of gold's `explain` in the table, by commas"] = "harmless"


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    report: Annotated[str, "report.json of an evaluation"] = "runs/evaluation/report.json"
    judge: Annotated[str, "whose scores are compared"] = "gold"
    better: Annotated[str, "claims by commas, each POLICY > POLICY"] = ""


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    runs: Annotated[str, "run directories, by commas, or before the flags"] = ""
    metrics: Annotated[str, "names of metrics, by commas; empty: all that change"] = ""
    out: Annotated[str, "the figure"] = "runs/figures/curves.png"


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    runs: Annotated[str, "finished reward.py runs, by commas, or before the flags"] = ""
    out: Annotated[str, "writes OUT.json, OUT.md and, with matplotlib, OUT.png"] = (
        "runs/figures/reward_scaling"
    )


@dataclasses.dataclass(frozen=True)
class MarginsConfig:
    runs: Annotated[str, "finished reward.py runs, by commas, or before the flags"] = ""
    out: Annotated[str, "writes OUT.json and OUT.md"] = "runs/figures/reward_margins"


GROUPS = "LABEL=RUN,RUN,... (a run a seed), by semicolons, or before the flags"


@dataclasses.dataclass(frozen=True)
class CurvesConfig:
    groups: Annotated[str, GROUPS] = ""
    x: Annotated[str, "step, or sqrt_kl"] = "step"
    y: Annotated[str, "what evaluations have logged, by commas, a panel each"] = "proxy,gold"
    fit: Annotated[str, "panels to which Gao et al.'s laws are fitted, by commas"] = ""
    y_labels: Annotated[str, "beside the panels, by commas; empty: what y is"] = ""
    title: Annotated[str, "of the figure"] = ""
    out: Annotated[str, "writes OUT.json, OUT.md and, with matplotlib, OUT.png"] = (
        "runs/figures/curves"
    )


@dataclasses.dataclass(frozen=True)
class PointsConfig:
    groups: Annotated[str, f"{GROUPS}; of METHOD:LABEL, a method's points are joined"] = ""
    x: Annotated[str, "label (a number), or a column, as kl or sqrt_kl"] = "sqrt_kl"
    y: Annotated[str, "columns, by commas, a panel each"] = "gold"
    x_label: Annotated[str, "under the figure; empty: what x is"] = ""
    title: Annotated[str, "of the figure"] = ""
    out: Annotated[str, "writes OUT.json, OUT.md and, with matplotlib, OUT.png"] = (
        "runs/figures/points"
    )


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    groups: Annotated[str, GROUPS] = ""
    columns: Annotated[str, "of the table and the figure, by commas"] = "gold,wins,kl,seconds"
    title: Annotated[str, "of the figure"] = ""
    out: Annotated[str, "writes OUT.json, OUT.md and, with matplotlib, OUT.png"] = (
        "runs/figures/rows"
    )


# --- from the plumbing of the training scripts (tests/test_copies.py) -----------------------------

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


# --- policies -------------------------------------------------------------------------------------


def split_names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_policy(text):
    """RUN[@temperature=T][@best_of=N:REWARD] -> {"name", "run", "temperature", "best_of", "by"}."""
    run, *options = text.split("@")
    policy = {"name": text, "run": run, "temperature": 1.0, "best_of": 1, "by": None}
    for option in options:
        name, _, value = option.partition("=")
        try:
            if name == "temperature" and 0 <= float(value) < math.inf:
                policy["temperature"] = float(value)
                continue
            count, _, reward = value.partition(":")
            if name == "best_of" and int(count) >= 1 and reward:
                policy |= {"best_of": int(count), "by": reward}
                continue
        except ValueError:
            pass
        refuse(f"--policies {text}: expected RUN, RUN@temperature=T or RUN@best_of=N:REWARD")
    return policy


def load_policy(directory, device):
    """A language model and its tokenizer."""
    try:
        model, tokenizer = load_model(directory, device), load_tokenizer(directory)
        check_tokenizer(tokenizer, directory, load_config(directory))
    except (OSError, ValueError) as error:
        refuse(error)
    if model.score is not None:
        refuse(f"{directory}: has a scalar head; it scores text and writes none")
    return model, tokenizer


def sample_policy(
    model, tokenizer, prompts, count, temperature, seed, room, cfg, device, rank, world
):
    """`count` responses to each prompt, of which the last `room` tokens are read: a list (prompts)
    of lists of {"prompt_ids", "ids", "text", "ended"}; None if told to stop.

    A chunk of prompts draws from a generator of its own, so that any number of ranks samples the
    same; `seed` differs between policies.
    """
    size = max((4 * cfg.micro_batch_size or 256) // count, 1)
    eos = tokenizer.eot_token
    ids = [encode(tokenizer, line["prompt"], None, room)[0] for line in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    found, started = [], time.time()
    last_time = started
    for number in range(rank, math.ceil(len(chunks) / world) * world, world):
        if stop_requested(device):
            return None
        if number >= len(chunks):
            continue
        if rank == 0 and time.time() - last_time > 20:
            last_time = time.time()
            left = (last_time - started) / number * (len(chunks) - number)
            print(
                f"  sampled {number * size}/{len(prompts)} prompts, {left:.0f} s left", flush=True
            )
        generator = torch.Generator(device).manual_seed((seed * 1_000_003 + number) % 2**63)
        tokens, mask = generate(
            model,
            [ids[i] for i in chunks[number]],
            cfg.max_new_tokens,
            num_samples=count,
            temperature=temperature,
            eos=eos,
            generator=generator,
        )
        for n, (row, inside) in enumerate(zip(tokens.cpu(), mask.cpu(), strict=True)):
            new = row[inside].tolist()
            ended = new[-1] == eos
            text = text_of(tokenizer, new[:-1] if ended else new)
            found.append([chunks[number][n // count], new, text, ended])
    samples = [[] for _ in prompts]
    for i, new, text, ended in gather(found, device):
        samples[i].append({"prompt_ids": ids[i], "ids": new, "text": text, "ended": ended})
    return samples


def kl_and_entropy(policy, reference, samples, temperature, cfg, device, rank, world):
    """KL to the reference, and entropy, of each sample: sums over its tokens of those of the
    next-token distributions, nats. Their means are, without bias, the KL and the entropy of the
    distributions of whole responses, and vary less than log-probabilities of the tokens drawn.

    Two lists (prompts) of lists. The policy's logits are divided by its temperature, the
    reference's are as they are; at temperature 0 the policy puts probability 1 on what it said, so
    that the KL is -log pi_ref of it and the entropy 0. In the models' own precision: logits rounded
    to bfloat16 would add some 0.01 nats a token to every KL. None if told to stop.
    """
    rows = [(s["prompt_ids"], s["ids"]) for some in samples for s in some]
    groups = group_by_prompt(rows, policy.config.n_embd)
    batches, found = batches_of_groups(groups, cfg.micro_batch_size or 64), []
    for begin in range(0, len(batches), world):
        if stop_requested(device):
            return None
        numbers = batches[begin + rank] if begin + rank < len(batches) else []
        if not numbers:
            continue
        some = [groups[n] for n in numbers]
        beside = pad_beside(*zip(*some, strict=True))
        tokens, mask, segments = (tensor.to(device) for tensor in beside)
        with torch.no_grad():
            at = predicts(mask)
            hidden = policy.states(tokens, at, segments)  # (N, C)
            ref_hidden = reference.states(tokens, at, segments)
            pieces = []
            # Whole vocabularies of all positions at once would be gigabytes.
            for piece, ref_piece, target in zip(
                hidden.split(1024), ref_hidden.split(1024), tokens[mask].split(1024), strict=True
            ):
                ref_logprobs = reference.head(ref_piece).log_softmax(-1)  # (n, V)
                if temperature == 0:
                    kl = -ref_logprobs.gather(1, target[:, None]).squeeze(1)
                    pieces.append(torch.stack([kl, torch.zeros_like(kl)]))
                    continue
                logprobs = (policy.head(piece) / temperature).log_softmax(-1)
                kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)
                pieces.append(torch.stack([kl, entropy(logprobs)]))
        both = torch.cat(pieces, 1)  # (2, N)
        inside = mask.expand(2, -1, -1)
        tokenwise = both.new_zeros(inside.shape).masked_scatter(inside, both)  # (2, B, T)
        masks = masks_of_responses(mask, segments)
        sums = torch.stack([(tokenwise * m).sum(2) for m in masks], 2)  # (2, B, K)
        for n, (_, responses), kl, nats in zip(numbers, some, *sums.tolist(), strict=True):
            found.append((n, kl[: len(responses)], nats[: len(responses)]))
    found, tables = sorted(gather(found, device)), []
    for which in (1, 2):
        values = iter([value for row in found for value in row[which]])
        tables.append([[next(values) for _ in some] for some in samples])
    return tables


# --- judges ---------------------------------------------------------------------------------------


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


def load_judge(name, device):
    """A judge's name -> ("file", module) or ("model", model, tokenizer, statistics, scores so
    far)."""
    if name.endswith(".py"):
        return "file", load_gold(name)
    try:
        return "model", *load_reward_model(name, device), {}
    except (OSError, ValueError) as error:
        refuse(error)


def weights_of(name):
    """The files that a policy's or a judge's name stands for."""
    return [name] if name.endswith(".py") else weight_files(Path(name))


def judge_samples(loaded, prompts, samples, cfg, device, autocast, rank, world):
    """Scores of all samples, a list (prompts) of lists; None if told to stop.

    A Python file reads the text. A reward model reads the tokens of a response and the EOS that
    ended it; what did not end has no score of its own, NaN: see `fill_missing`.
    """
    if loaded[0] == "file":
        mine = [
            [i, [gold_score(loaded[1], prompts[i], s["text"]) for s in samples[i]]]
            for i in range(rank, len(prompts), world)
        ]
        return [scores for _, scores in sorted(gather(mine, device), key=lambda pair: pair[0])]
    _, model, _, statistics, known = loaded
    rows = [(tuple(s["prompt_ids"]), tuple(s["ids"])) for some in samples for s in some]
    # Each text once, whoever wrote it: in another batch rounding would keep equals from being ties.
    new = [row for row in dict.fromkeys(rows) if row not in known]
    raw = score_rows(model, new, cfg, device, autocast, rank, world) if new else []
    if raw is None:
        return None
    known.update(zip(new, raw, strict=True))
    raw = torch.tensor([known[row] for row in rows], dtype=torch.float64)
    scores = iter(normalised(raw, statistics).tolist())
    table = [[next(scores) for _ in some] for some in samples]
    return [
        [score if sample["ended"] else math.nan for score, sample in zip(*rows, strict=True)]
        for rows in zip(table, samples, strict=True)
    ]


def fill_missing(tables):
    """What did not end gets the smaller of -1 and the lowest score of what did, as in ppo.py, over
    all of `tables`, so that the same response scores the same whoever wrote it."""
    ended = [s for table in tables for some in table for s in some if not math.isnan(s)]
    least = min([-1.0, *ended])
    return [[[least if math.isnan(s) else s for s in some] for some in table] for table in tables]


def choose_best(samples, scores, best_of):
    """The best of each `best_of` samples in turn, by score, the first among equals."""
    chosen = []
    for some, values in zip(samples, *fill_missing([scores]), strict=True):
        groups = [range(i, i + best_of) for i in range(0, len(some), best_of)]
        chosen.append([some[max(group, key=lambda k: values[k])] for group in groups])
    return chosen


# --- mathematics ----------------------------------------------------------------------------------


def best_of_n(proxy, gold):
    """Expected gold of the best of n samples by the proxy, n = 1..N: (N,), mean over prompts.

    proxy, gold: (prompts, N). From one set of N samples, without bias: the i-th smallest by proxy
    is the best of a random subset of n with probability (i-1 choose n-1) / (N choose n); equal
    proxies share what is theirs. The proxy's own curve is best_of_n(proxy, proxy). Stated in Gao et
    al. 2022, arXiv:2210.10760; KL to the policy is at most log n - (n-1)/n.
    """
    return best_of_n_by_prompt(proxy, gold).mean(0)


def best_of_n_by_prompt(proxy, gold):
    """`best_of_n` of each prompt, (prompts, N)."""
    proxy, gold = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    order = np.argsort(proxy, axis=1, kind="stable")
    sorted_proxy = np.take_along_axis(proxy, order, 1)
    sorted_gold = np.take_along_axis(gold, order, 1)
    for values, ranked in zip(sorted_gold, sorted_proxy, strict=True):
        _, which, counts = np.unique(ranked, return_inverse=True, return_counts=True)
        values[:] = (np.bincount(which, weights=values) / counts)[which]
    N = proxy.shape[1]
    weights = np.zeros((N, N))  # (n, i)
    for n in range(1, N + 1):
        for i in range(n, N + 1):
            weights[n - 1, i - 1] = math.comb(i - 1, n - 1) / math.comb(N, n)
    return sorted_gold @ weights.T


def best_of_n_kl(n):
    """log n - (n-1)/n, nats: the KL of the best of n to the policy, or a bound where ties occur."""
    return math.log(n) - (n - 1) / n


@functools.cache
def resamplings(count, replicates, seed):
    """How often each of `count` prompts is drawn in each resampling, (replicates, count)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=replicates)


def win_shares(scores_a, scores_b):
    """(prompts,): the share of pairs, a response of each, in which A's scores more, ties half.

    scores: (prompts,), or lists (prompts) of lists, of any number of responses.
    """
    shares = []
    for a, b in zip(scores_a, scores_b, strict=True):
        gaps = np.atleast_1d(a)[:, None] - np.atleast_1d(b)[None]
        shares.append(float((0.5 + 0.5 * np.sign(gaps)).mean()))
    return np.array(shares)


def mean_with_interval(values, replicates=1000, seed=0):
    """[mean, low, high] of a value a prompt, by the bootstrap; a single prompt has no interval."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or not replicates:
        return [float(values.mean()), None, None]
    means = resamplings(len(values), replicates, seed) @ values / len(values)
    return [float(values.mean()), *map(float, np.percentile(means, [2.5, 97.5]))]


def win_rate(scores_a, scores_b, replicates=1000, seed=0):
    """-> rate, low, high: how often A's response scores more than B's, ties half, and its 95%
    interval by the bootstrap over prompts. scores: as in `win_shares`."""
    return mean_with_interval(win_shares(scores_a, scores_b), replicates, seed)


def fit_logistic(x, y, weights, ridge=1e-3):
    """theta, phi that maximise sum w [y log p + (1 - y) log(1 - p)], p = sigmoid(theta + phi x).

    y in [0, 1]. By Newton's method; the ridge, in units of one prompt, keeps it finite when A
    always wins.
    """
    columns, theta = np.stack([np.ones_like(x), x], 1), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-columns @ theta))
        gradient = columns.T @ (weights * (y - p)) - ridge * theta
        hessian = (columns * (weights * p * (1 - p))[:, None]).T @ columns + ridge * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        theta = theta + step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    return theta


def length_controlled_win_rate(wins, lengths_a, lengths_b, prompts=None, replicates=1000, seed=0):
    """[rate, low, high]: the win rate were both responses of one length.

    wins, lengths (pairs,): of pairs of responses; prompts (pairs,): the number of each pair's
    prompt, each prompt weighing the same (None: a prompt a pair). sigmoid(theta) of a logistic
    regression of wins on tanh((length_a - length_b) / std), as in length-controlled AlpacaEval
    (Dubois et al. 2024, arXiv:2404.04475), without its term for each instruction's difficulty.

    None where one side is longer in nearly all pairs: then nothing tells length from quality.
    """
    wins = np.asarray(wins, dtype=np.float64)
    gap = np.asarray(lengths_a, dtype=np.float64) - np.asarray(lengths_b, dtype=np.float64)
    prompts = np.arange(len(wins)) if prompts is None else np.asarray(prompts)
    share = 1 / np.bincount(prompts)[prompts]
    if min((gap <= 0).mean(), (gap >= 0).mean()) < 0.02:
        return [None, None, None]
    x = np.tanh(gap / gap.std()) if gap.std() > 0 else np.zeros_like(gap)

    def rate(counts):
        theta = fit_logistic(x, wins, share * counts[prompts])
        return float(1 / (1 + np.exp(-theta[0])))

    count = int(prompts.max()) + 1
    if count < 2 or not replicates:
        return [rate(np.ones(count)), None, None]
    found = [rate(counts) for counts in resamplings(count, replicates, seed)]
    return [rate(np.ones(count)), *map(float, np.percentile(found, [2.5, 97.5]))]


def every_pair(scores_a, scores_b, lengths_a, lengths_b):
    """Tables (prompts) of lists -> wins, lengths of A and B, prompts (pairs,): each response of A
    to a prompt with each of B."""
    rows = []
    for i, (a, b, m, n) in enumerate(zip(scores_a, scores_b, lengths_a, lengths_b, strict=True)):
        for (x, p), (y, q) in itertools.product(zip(a, m, strict=True), zip(b, n, strict=True)):
            rows.append((0.5 + 0.5 * np.sign(x - y), p, q, i))
    wins, longer, other, prompts = (np.array(column) for column in zip(*rows, strict=True))
    return wins, longer, other, prompts.astype(int)


def connected(beats):
    """(..., n, n) bool, who beat whom -> (...): whether each leads to each by a chain of wins,
    without which some rating of greatest likelihood is infinite (Ford 1957)."""
    n = beats.shape[-1]
    reach = (beats | np.eye(n, dtype=bool)).astype(np.float64)
    for _ in range(max(n - 1, 1).bit_length()):
        reach = np.minimum(reach @ reach, 1.0)
    return (reach > 0).all((-2, -1))


def fit_ratings(wins, met=None):
    """Bradley-Terry scores of greatest likelihood, in nats of log-odds, of mean 0.

    wins (..., n, n): how often (row) beat (column), a tie being half a win each way. Where a chain
    of wins does not lead from everyone to everyone, half a win each way is added between all who
    met (in `met`, (n, n) bool, the games of these wins unless given): else a score is infinite.
    P(a beats b) = sigmoid(s_a - s_b), and 173.7178 s is on Elo's scale.

    Raises ValueError when some players never met, not even by way of others.
    """
    wins = np.asarray(wins, dtype=np.float64)
    n = wins.shape[-1]
    met = (wins + wins.swapaxes(-1, -2) > 0) if met is None else met
    if not connected(met).all():
        raise ValueError("some players never met, not even by way of others")
    weak = ~connected(wins > 0)
    wins = wins + 0.5 * (met & weak[..., None, None])
    games = wins + wins.swapaxes(-1, -2)
    scores = np.zeros(wins.shape[:-1])
    for _ in range(200):  # Newton's method on a concave likelihood, at most a nat a step
        p = 1 / (1 + np.exp(scores[..., None, :] - scores[..., :, None]))  # P(row beats column)
        gradient = (wins - games * p).sum(-1)
        if np.abs(gradient).max() < 1e-9 * games.sum((-2, -1)).max():
            break
        weight = games * p * (1 - p)
        hessian = np.eye(n) * weight.sum(-1)[..., None] - weight
        step = np.linalg.solve(hessian + 1 / n, gradient[..., None])[..., 0]  # keeps the mean at 0
        scores = scores + step * np.minimum(1, 1 / np.abs(step).max(-1, keepdims=True).clip(1e-12))
    return scores - scores.mean(-1, keepdims=True)


def ratings_of(wins, start=1000.0, replicates=1000, seed=0):
    """Elo ratings [rating, low, high] of players who all played on all prompts.

    wins (prompts, n, n): each prompt's share of wins of row over column. No interval when more than
    2.5% of the resamplings had to be made finite.
    """
    wins = np.asarray(wins, dtype=np.float64)
    count, n = wins.shape[:2]
    total = start + ELO * fit_ratings(wins.sum(0))
    intervals = np.full((2, n), np.nan)
    if count > 1 and replicates and n > 1:
        draws = resamplings(count, replicates, seed)
        resampled = np.einsum("rp,pij->rij", draws, wins, optimize=True)
        if np.mean(~connected(resampled > 0)) <= 0.025:
            found = start + ELO * fit_ratings(resampled, wins.sum(0) + wins.sum(0).T > 0)
            intervals = np.percentile(found, [2.5, 97.5], axis=0)
    finite = not np.isnan(intervals).any()
    return [
        [float(total[i]), *((float(x) for x in intervals[:, i]) if finite else (None, None))]
        for i in range(n)
    ]


def distinct(texts, n):
    """Different n-grams of words over all n-grams, of all texts taken together (Li et al. 2016,
    arXiv:1510.03055); 0 when there are none."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def gram_entropy(texts, n):
    """Entropy, nats, of the n-grams of words as they occur in all texts taken together (Zhang et
    al. 2018, arXiv:1809.05972): unlike `distinct`, it sees how often. It grows with the number of
    texts, and only policies with equally many compare; 0 when there is no n-gram."""
    counts = collections.Counter(
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    )
    total = counts.total()
    return sum(-count / total * math.log(count / total) for count in counts.values())


def least_squares(columns, y):
    """y = columns @ coefficients + noise of one variance. -> coefficients, their standard errors.

    columns (n, k), y (n,), n > k. Raises ValueError when the columns do not tell them apart.
    """
    columns, y = np.asarray(columns, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n, k = columns.shape
    if n <= k or np.linalg.matrix_rank(columns) < k:
        raise ValueError(f"{n} runs do not determine {k} coefficients")
    coefficients = np.linalg.lstsq(columns, y, rcond=None)[0]
    variance = ((y - columns @ coefficients) ** 2).sum() / (n - k)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(columns.T @ columns)))
    return coefficients, errors


def over_seeds(values):
    """[mean, low, high] over seeds, by Student's t; a single seed has no interval."""
    mean, freedom = float(np.mean(values)), len(values) - 1
    if not freedom:
        return [mean, None, None]
    t = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.4 / freedom
    half = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


# --- evaluation -----------------------------------------------------------------------------------


def describe(samples, prompts, gold, cfg):
    """What samples are like, whoever judges them: lengths, endings, diversity, gold's parts."""
    every = [sample for some in samples for sample in some]
    texts = [sample["text"] for sample in every]
    tokens = [float(np.mean([len(s["ids"]) for s in some])) for some in samples]
    found = {
        "samples": len(every),
        "tokens": mean_with_interval(tokens, cfg.bootstrap, cfg.seed),
        "words": float(np.mean([len(text.split()) for text in texts])),
        "eos": float(np.mean([sample["ended"] for sample in every])),
        "empty": float(np.mean([not text.strip() for text in texts])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "entropy_2": gram_entropy(texts, 2),
    }
    if len(every) > len(samples):
        # Over one prompt's samples: does the policy say one thing, whatever it is asked?
        each = [[sample["text"] for sample in some] for some in samples]
        found["distinct_2_a_prompt"] = float(np.mean([distinct(some, 2) for some in each]))
        found["entropy_2_a_prompt"] = float(np.mean([gram_entropy(some, 2) for some in each]))
        found["different_a_prompt"] = float(np.mean([len(set(some)) / len(some) for some in each]))
    groups = {}
    for line, some in zip(prompts, samples, strict=True):
        for sample in some:
            for name, value in gold_parts(gold, line, sample["text"]).items():
                for task in {"all", line.get(cfg.by, "all")}:
                    groups.setdefault(task, {}).setdefault(name, []).append(value)
    found["parts"] = {
        task: {name: float(np.mean(values)) for name, values in groups[task].items()}
        for task in sorted(groups, key=lambda task: (task != "all", task))
    }
    return found


def compare_texts(module, prompts, samples_a, samples_b):
    """Win shares of A by a judge who reads two responses, in both orders, and how often the order
    decided: `compare(prompt, first, second, **fields)` -> P(the first is better). The first
    response of each policy is compared."""

    def ask(line, first, second):
        fields = {k: v for k, v in line.items() if k not in ("prompt", "response")}
        try:
            found = float(module.compare(line["prompt"], first, second, **fields))
        except Exception as error:
            refuse(f"{module.__file__}: compare: {type(error).__name__}: {error}")
        if not 0 <= found <= 1:
            refuse(f"{module.__file__}: compare: expected a probability, got {found}")
        return found

    shares, flips = [], []
    for line, a, b in zip(prompts, samples_a, samples_b, strict=True):
        first = ask(line, a[0]["text"], b[0]["text"])
        second = ask(line, b[0]["text"], a[0]["text"])
        shares.append((first + 1 - second) / 2)
        flips.append((first - 0.5) * (second - 0.5) > 0)
    return np.array(shares), float(np.mean(flips))


def read_labelled(path, names):
    """{(a, b): [(prompt, share of a)]} from comparisons whose `policy` names two of `names`."""
    found = {}
    for where, record in read_jsonl(path, {"prompt": False, "chosen": False, "rejected": False}):
        policy, label = record.get("policy"), record.get("label", 1.0)
        if not isinstance(policy, list) or [type(name) for name in policy] != [str, str]:
            refuse(f"{where}: policy: expected a list of two, who wrote chosen and rejected")
        if type(label) not in (int, float) or not 0.5 <= label <= 1:
            refuse(f"{where}: label: expected a probability from 0.5 to 1, got {str(label)[:40]}")
        a, b = policy
        if a != b and a in names and b in names:
            found.setdefault((a, b), []).append((record["prompt"], float(label)))
            found.setdefault((b, a), []).append((record["prompt"], 1 - float(label)))
    if not found:
        refuse(f"{path}:0: file: compares no two of the policies {', '.join(names)}")
    return found


def mean_by_prompt(rows):
    """[(prompt, value)] -> one mean a prompt, both orders and several judgements taken together."""
    groups = {}
    for prompt, value in rows:
        groups.setdefault(prompt, []).append(value)
    return [float(np.mean(values)) for values in groups.values()]


def head_to_head(cfg, names, scores, lengths, comparers):
    """Win rates of each against each by every judge, and by the controls, length and a coin; the
    same at equal length; differences of scores, paired by prompt; ratings.

    scores {judge: {policy: lists (prompts) of lists}}; lengths {policy: as scores}; comparers
    {judge: function of two names -> shares, share of flips}, for judges who read two responses.
    """
    report = {"win_rate": {}, "length_controlled": {}, "order_decides": {}, "elo": {}}
    report |= {"difference": {}}
    coin = np.random.default_rng(cfg.seed)
    coins = {name: [coin.random(len(some)).tolist() for some in lengths[name]] for name in names}
    count, settings = len(lengths[names[0]]), (cfg.bootstrap, cfg.seed)
    for by, table in (scores | {LONGER: lengths, COIN: coins}).items():
        wins = np.zeros((count, len(names), len(names)))
        sections = ("win_rate", "length_controlled", "difference")
        for section in sections if by in scores else sections[:1]:
            report[section][by] = {name: {} for name in names}
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
            pairs = every_pair(table[a], table[b], lengths[a], lengths[b])
            if by in comparers:
                wins[:, i, j], flips = comparers[by](a, b)
                report["order_decides"][f"{by}: {a}, {b}"] = flips
                first = [[some[0] for some in lengths[name]] for name in (a, b)]
                pairs = wins[:, i, j], *first, np.arange(count)
            else:
                wins[:, i, j] = win_shares(table[a], table[b])
            wins[:, j, i] = 1 - wins[:, i, j]
            both_ways(report["win_rate"][by], a, b, mean_with_interval(wins[:, i, j], *settings))
            if by not in scores:
                continue
            rate = length_controlled_win_rate(*pairs, min(cfg.bootstrap, 200), cfg.seed)
            both_ways(report["length_controlled"][by], a, b, rate)
            gaps = [np.mean(x) - np.mean(y) for x, y in zip(table[a], table[b], strict=True)]
            gap = mean_with_interval(gaps, *settings)
            both_ways(report["difference"][by], a, b, gap, total=0.0)
        if len(names) > 1 and by in scores:
            ratings = ratings_of(wins, replicates=cfg.bootstrap, seed=cfg.seed)
            report["elo"][by] = dict(zip(names, ratings, strict=True))
    return report


def scores_by_task(cfg, names, prompts, scores):
    """{judge: {task: {policy: {"score", "over_first"}}}}, means with intervals; the second paired
    by prompt with the first policy's: a win rate can hide a task that got worse. By another field
    than the task where --by names one."""
    tasks, report = {}, {}
    for i, line in enumerate(prompts):
        tasks.setdefault(line.get(cfg.by, "all"), []).append(i)
    for by, table in scores.items():
        for task, numbers in tasks.items():
            rows = report.setdefault(by, {}).setdefault(task, {})
            first = np.array([np.mean(table[names[0]][i]) for i in numbers])
            for name in names:
                values = np.array([np.mean(table[name][i]) for i in numbers])
                settings = (cfg.bootstrap, cfg.seed)
                rows[name] = {"score": mean_with_interval(values, *settings)}
                rows[name]["over_first"] = mean_with_interval(values - first, *settings)
    return report


def both_ways(table, a, b, value, total=1.0):
    """Enters [value, low, high] of a against b, and total - value of b against a."""
    table[a][b] = value
    table[b][a] = [None if x is None else total - x for x in (value[0], value[2], value[1])]


def best_of_n_report(proxies, golds, cfg):
    """The curve for n = 1..N: proxy, gold (None without), analytic KL, and gold's gain over n = 1
    by paired differences."""
    rows, proxy_curve = [], best_of_n_by_prompt(proxies, proxies)
    gold_curve = None if golds is None else best_of_n_by_prompt(proxies, golds)
    for n in range(1, proxy_curve.shape[1] + 1):
        row = {"n": n, "kl": best_of_n_kl(n)}
        row["proxy"] = mean_with_interval(proxy_curve[:, n - 1], cfg.bootstrap, cfg.seed)
        if gold_curve is not None:
            gain = gold_curve[:, n - 1] - gold_curve[:, 0]
            row["gold"] = mean_with_interval(gold_curve[:, n - 1], cfg.bootstrap, cfg.seed)
            row["gold_gain"] = mean_with_interval(gain, cfg.bootstrap, cfg.seed)
        rows.append(row)
    return rows


# --- the report -----------------------------------------------------------------------------------


def interval_text(value, digits=2):
    if value is None or value[0] is None:
        return ""
    mean, low, high = value
    text = f"{mean:.{digits}f}"
    return text if low is None else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def summary_table(report, judges, show):
    """Rows of cells, the first the heads: one a policy. Wins are against the first of them."""
    names = list(report["policies"])
    first, controls = names[0], (LONGER, COIN)
    scored = [by for by in judges if by in report["difference"]]
    compared = [by for by in [*judges, *controls] if by in report["win_rate"]]
    heads = ["policy", *(f"score by {by}" for by in scored)]
    heads += [f"wins by {by}" for by in compared] if len(names) > 1 else []
    heads += ["KL, nats", "tokens", "EOS", *show, "training, s"]
    rows = [heads]
    for name in names:
        found = report["policies"][name]
        row = [name, *(interval_text(found["scores"][by]) for by in scored)]
        for by in compared if len(names) > 1 else ():
            row.append(interval_text(report["win_rate"][by].get(name, {}).get(first), 3))
        row.append(("at most " if found["kl_is_bound"] else "") + interval_text(found["kl"]))
        row += [f"{found['tokens'][0]:.1f}", f"{found['eos']:.3f}"]
        parts, seconds = found["parts"].get("all", {}), found["training_seconds"]
        row += [f"{parts[part]:.3f}" if part in parts else "" for part in show]
        rows.append([*row, "" if seconds is None else f"{seconds:.0f}"])
    return rows


def markdown(rows):
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(rows[0]), "|" + "---|" * len(rows[0]), *map(line, rows[1:])]


def print_aligned(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def quoted(text):
    """A text on one line, as it is: no markup of its own."""
    text = " / ".join(text.splitlines()).replace("`", "'")
    return f"`{text}`" if text.strip() else "(empty)"


def write_report(cfg, report, judges, show, prompts, samples, scores, figures):
    """The Markdown report: the table, each against each, parts by task, best-of-n, texts."""
    path = Path(cfg.report or Path(cfg.out_dir) / "report.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(report["policies"])
    title = names[0] if len(names) == 1 else f"{len(names)} policies"
    text = [f"# {title} on {len(prompts)} prompts", ""]
    text += [
        "Means with 95% intervals, by the bootstrap over prompts. KL is to",
        report["reference"],
    ]
    text += [
        f"(nats a sequence), wins are against {names[0]}.",
        "",
        f"`{shlex.join(['python', *sys.argv])}`",
        "",
    ]
    text += markdown(summary_table(report, judges, show))
    for by, table in report["win_rate"].items() if len(names) > 1 else ():
        judged = by in report["elo"]
        more = ["Elo", f"score over {names[0]}'s"] if judged else []
        rows = [["row against column", *names, *more]]
        for a in names:
            cells = [interval_text(table.get(a, {}).get(b), 3) for b in names]
            if judged:
                gap = report["difference"][by][a].get(names[0])
                cells += [interval_text(report["elo"][by][a], 0), interval_text(gap)]
            rows.append([a, *cells])
        text += ["", f"## Win rates by {by}", "", *markdown(rows)]
        if by in report["length_controlled"]:
            controlled = report["length_controlled"][by]
            rows = [["row against column", *names]]
            rows += [[a, *(interval_text(controlled[a].get(b), 3) for b in names)] for a in names]
            text += ["", "The same at equal length (empty where one side is always longer):", ""]
            text += markdown(rows)
    for by, tasks in report["by_task"].items():
        if len(tasks) < 2:
            break
        rows = [["policy", *tasks, *(f"{task}: over {names[0]}'s" for task in tasks)]]
        for name in names:
            cells = [interval_text(tasks[task][name]["score"]) for task in tasks]
            cells += [interval_text(tasks[task][name]["over_first"]) for task in tasks]
            rows.append([name, *cells])
        text += ["", f"## Scores by task, by {by}", "", *markdown(rows)]
    for pair, share in report["order_decides"].items():
        text += ["", f"The order of the two decided in {share:.1%} of comparisons ({pair})."]
    for task in dict.fromkeys(t for f in report["policies"].values() for t in f["parts"]):
        members = [report["policies"][name]["parts"].get(task, {}) for name in names]
        every = set.intersection(*(set(parts) for parts in members))
        parts = [part for part in members[0] if part in every]
        rows = [["policy", *(part.replace("_", " ") for part in parts)]]
        for name, found in zip(names, members, strict=True):
            rows.append([name, *(f"{found[part]:.3f}" for part in parts)])
        text += ["", f"## What gold says of {task}", "", *markdown(rows)]
    keys = ["distinct_1", "distinct_2", "distinct_2_a_prompt", "different_a_prompt"]
    keys += ["entropy_2", "entropy_2_a_prompt", "words", "empty"]
    rows = [["policy", "entropy, nats", *(key.replace("_", " ") for key in keys)]]
    for name in names:
        found = report["policies"][name]
        cells = [f"{found[key]:.3f}" if key in found else "" for key in keys]
        rows.append([name, interval_text(found["entropy"]), *cells])
    text += ["", "## Variety", "", *markdown(rows)]
    if report.get("best_of_n"):
        has_gold, N = "gold" in report["best_of_n"][0], len(report["best_of_n"])
        rows = [["n", "KL at most, nats", "proxy", *(["gold", "gain in gold"] if has_gold else [])]]
        for row in report["best_of_n"]:
            if row["n"] & (row["n"] - 1) == 0 or row["n"] == N:
                values = [row[key] for key in ("proxy", "gold", "gold_gain") if key in row]
                cells = [str(row["n"]), f"{row['kl']:.3f}", *map(interval_text, values)]
                rows.append(cells)
        text += ["", f"## Best of n: {names[0]} by {cfg.proxy}", "", *markdown(rows)]
    for figure in figures:
        text += ["", f"![{figure.stem}]({os.path.relpath(figure, path.parent)})"]
    text += ["", "## Side by side", ""]
    for i in shown_prompts(prompts, cfg.num_shown):
        prompt = prompts[i]["prompt"]
        text += [f"**{prompts[i].get('task', 'prompt')}**: {quoted(prompt[-600:])}", ""]
        rows = [["policy", "response", *scores]]
        for name in names:
            sample = samples[name][i][0]
            ending = "" if sample["ended"] else " (no EOS)"
            values = [f"{table[name][i][0]:+.2f}" for table in scores.values()]
            rows.append([name, quoted(sample["text"]) + ending, *values])
        text += [*markdown(rows), ""]
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(text) + "\n", "utf-8")
    return path


def shown_parts(report, names):
    """Those of `names` that gold's explanations have."""
    parts = [p for f in report["policies"].values() for p in f.get("parts", {}).values()]
    return [name for name in split_names(names) if any(name in part for part in parts)]


def read_report(path):
    try:
        report = read_json(path)
    except (OSError, ValueError) as error:
        refuse(f"{path}: not a report: {error}")
    if not isinstance(report.get("policies"), dict) or "difference" not in report:
        refuse(f"{path}: policies: is missing; expected the report.json of an evaluation")
    return report


def show_table(cfg):
    """evaluate.py table: prints the table of a finished evaluation again."""
    report = read_report(cfg.report)
    judges = list(next(iter(report["policies"].values()))["scores"])
    print(f"means with 95% intervals; wins against {next(iter(report['policies']))}")
    print_aligned(summary_table(report, judges[:1], shown_parts(report, cfg.show)))


def check_claims(cfg):
    """evaluate.py check: exit status 1 unless each claim's paired difference is surely above 0."""
    differences, failed = read_report(cfg.report)["difference"].get(cfg.judge, {}), False
    claims = split_names(cfg.better)
    if not claims:
        refuse("--better: expected claims by commas, each POLICY > POLICY")
    for claim in claims:
        better, _, worse = (side.strip() for side in claim.partition(" > "))
        found = differences.get(better, {}).get(worse)
        if not found or found[1] is None:
            refuse(f"{cfg.report}: {claim}: {cfg.judge} did not judge these two on several prompts")
        failed = failed or found[1] <= 0
        print(f"{'ok' if found[1] > 0 else 'FAILED'}  {claim}, by {interval_text(found)}")
    if failed:
        sys.exit(1)


def shown_prompts(prompts, count):
    """Numbers of `count` prompts, the tasks in turn."""
    tasks = {}
    for i, line in enumerate(prompts):
        tasks.setdefault(line.get("task", "all"), []).append(i)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*tasks.values()))
    return [i for i in turns if i is not None][:count]


# --- figures --------------------------------------------------------------------------------------


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


def draw_frontier(plt, path, report, by):
    """Score against the square root of KL, a point a policy."""
    figure, panel = plt.subplots(figsize=(6, 4))
    for name, found in report["policies"].items():
        if found["kl"] is None:
            continue
        mean, low, high = found["scores"][by]
        bars = None if low is None else [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]
        label = f"{name} (KL at most)" if found["kl_is_bound"] else name
        x = math.sqrt(max(found["kl"][0], 0.0))
        panel.errorbar([x], [mean], yerr=bars, marker="o", capsize=3, label=label)
    panel.set_xlabel("square root of KL to the reference (nats a sequence)")
    panel.set_ylabel(f"score by {by}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return save_figure(figure, path)


def draw_best_of_n(plt, path, rows, title):
    figure, panel = plt.subplots(figsize=(6, 4))
    x = [row["n"] for row in rows]
    for name in ("proxy", "gold"):
        if name in rows[0]:
            values = [row[name] for row in rows]
            panel.plot(x, [v[0] for v in values], marker=".", label=name)
            if values[0][1] is not None:
                panel.fill_between(x, [v[1] for v in values], [v[2] for v in values], alpha=0.2)
    panel.set_xscale("log", base=2)
    ticks = [2**i for i in range(len(rows).bit_length())]
    panel.set_xticks(ticks, [str(n) for n in ticks])
    panel.set_xlabel("n (KL is at most log n - (n - 1)/n)")
    panel.set_ylabel("score of the best of n")
    panel.set_title(title, fontsize=9)
    panel.grid(alpha=0.3)
    panel.legend()
    return save_figure(figure, path)


def plot(cfg):
    """evaluate.py plot: learning curves from metrics.jsonl, a panel a metric, a line a run."""
    runs = {}
    for name in split_names(cfg.runs):
        lines = [line for _, line in read_jsonl(Path(name) / "metrics.jsonl", {})]
        runs[name] = [line for line in lines if type(line.get("step")) is int]
    if not runs:
        refuse("expected run directories: evaluate.py plot RUN...")
    curves = {}  # {metric: {run: [(step, value)]}}
    for name, lines in runs.items():
        for line in lines:
            for metric, value in line.items():
                if metric not in ("step", "seconds") and type(value) in (int, float):
                    points = curves.setdefault(metric, {}).setdefault(name, [])
                    points.append((line["step"], value))
    wanted = split_names(cfg.metrics) or sorted(curves)
    for metric in wanted:
        if metric not in curves:
            refuse(f"--metrics {metric}: in no run; there are {', '.join(sorted(curves))}")
    if not wanted or not cfg.out.endswith(".png"):
        refuse("expected runs that have logged a metric, and --out FILE.png")
    plt = matplotlib_pyplot()
    if plt is None:
        return
    colours = {name: f"C{i}" for i, name in enumerate(runs)}  # one a run, in all panels
    columns = min(len(wanted), 3)
    rows = math.ceil(len(wanted) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.5 * columns, 3 * rows + 0.5), squeeze=False
    )
    for panel, metric in itertools.zip_longest(panels.flat, wanted):
        if metric is None:
            panel.axis("off")
            continue
        for name, points in curves[metric].items():
            panel.plot(*zip(*points, strict=True), marker=".", markersize=3, color=colours[name])
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
    lines = [plt.Line2D([], [], color=colour) for colour in colours.values()]
    figure.legend(lines, list(colours), loc="lower center", ncols=4, fontsize=8)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, cfg.out, bottom=0.5 / (3 * rows + 0.5))


# --- experiments with reward models ---------------------------------------------------------------


def read_runs(names):
    """[(args, report)] of finished runs of reward.py."""
    runs = []
    for name in split_names(names):
        try:
            args = read_json(Path(name) / "args.json").get("settings", {})
            report = read_json(Path(name) / "report.json")
        except (OSError, ValueError) as error:
            refuse(f"{name}: not a finished run: {error}")
        if "labels" not in report or "epoch_pairs" not in report:
            refuse(f"{name}: report.json: not of reward.py, or without held-out data")
        runs.append((args, report))
    if not runs:
        refuse("--runs: expected run directories, by commas")
    return runs


def scaling(cfg):
    """evaluate.py scaling."""
    rows = []
    for args, report in read_runs(cfg.runs):
        row = {"parameters": report["parameters"], "pairs": report["epoch_pairs"]}
        row |= {"seed": args.get("seed"), "out_dir": args.get("out_dir")}
        for name in ("labels", "gold"):
            if report.get(name):
                row[name] = report[name]["all"]["model"][0]
        rows.append(row)
    judges = [name for name in ("gold", "labels") if all(name in row for row in rows)]
    cells = {}
    for row in rows:
        # Files of one length have nearly as many pairs: ties and equal responses differ by seed.
        cells.setdefault((row["parameters"], round(math.log2(row["pairs"]) * 2) / 2), []).append(
            row
        )
    result = {"runs": rows, "cells": [], "fits": {}}
    text = ["| parameters | comparisons | seeds | " + " | ".join(judges) + " |"]
    text.append("|---|---|---|" + "---|" * len(judges))
    for (parameters, _), members in sorted(cells.items()):
        pairs = float(np.mean([row["pairs"] for row in members]))
        cell = {"parameters": parameters, "pairs": pairs, "seeds": len(members)}
        cell |= {name: over_seeds([row[name] for row in members]) for name in judges}
        result["cells"].append(cell)
        values = " | ".join(interval_text(cell[name], 3) for name in judges)
        text.append(f"| {parameters / 1e6:.2f}M | {pairs:.0f} | {len(members)} | {values} |")
    text.append("")
    for name in judges:
        columns = [[1, math.log2(row["pairs"]), math.log2(row["parameters"])] for row in rows]
        try:
            slopes, errors = least_squares(columns, [row[name] for row in rows])
        except ValueError as error:
            text.append(f"{name}: no slopes: {error}")
            continue
        fit = {"intercept": slopes[0], "per_doubling_of_data": slopes[1]}
        fit |= {"per_doubling_of_model": slopes[2], "standard_errors": errors.tolist()}
        result["fits"][name] = {k: v if k[0] == "s" else float(v) for k, v in fit.items()}
        text.append(
            f"Agreement with {name}, points a doubling: data {100 * slopes[1]:+.2f} "
            f"(standard error {100 * errors[1]:.2f}), model {100 * slopes[2]:+.2f} "
            f"({100 * errors[2]:.2f}), over {len(rows)} runs."
        )
    write_tables(cfg.out, result, text)
    draw_scaling(cfg.out, result["cells"], judges)


def draw_scaling(out, cells, judges):
    plt = matplotlib_pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(1, len(judges), figsize=(5 * len(judges), 4), squeeze=False)
    for panel, name in zip(panels[0], judges, strict=True):
        for parameters in sorted({cell["parameters"] for cell in cells}):
            line = [cell for cell in cells if cell["parameters"] == parameters]
            x, y = [cell["pairs"] for cell in line], [cell[name][0] for cell in line]
            half = [cell[name][2] - cell[name][0] if cell[name][2] else 0.0 for cell in line]
            label = f"{parameters / 1e6:.2f}M parameters"
            panel.errorbar(x, y, yerr=half, marker="o", capsize=3, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("comparisons trained on")
        panel.set_ylabel(f"held-out agreement with {name}")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle("Reward models: data and size (mean and 95% interval over seeds)")
    save_figure(figure, f"{out}.png")


def margins(cfg):
    """evaluate.py margins."""
    groups = {}
    for args, report in read_runs(cfg.runs):
        groups.setdefault(args.get("margin", "none"), []).append(report)
    grades = sorted({g for members in groups.values() for r in members for g in r["by_grade"]})
    heads = [f"labels, grade {grade}" for grade in reversed(grades)]
    heads += ["labels, mean of grades", "labels, all", "gold, all", "ECE", "bimodality"]
    result, text = {"margins": {}}, ["| margin | seeds | " + " | ".join(heads) + " |"]
    text.append("|---|---|" + "---|" * len(heads))
    for setting, members in groups.items():
        missing = {"rate": [math.nan]}
        by_grade = [
            [r["by_grade"].get(g, missing)["rate"][0] for g in reversed(grades)] for r in members
        ]
        columns = list(zip(*by_grade, strict=True))
        columns += [[float(np.mean(row)) for row in by_grade]]
        columns += [[r["labels"]["all"]["model"][0] for r in members]]
        columns += [[r["gold"]["all"]["model"][0] if r.get("gold") else math.nan for r in members]]
        columns += [[r["calibration"]["ece"] for r in members]]
        columns += [[r["bimodality"] for r in members]]
        values = [over_seeds(column) for column in columns]
        values = [None if math.isnan(value[0]) else value for value in values]
        result["margins"][setting] = dict(zip(heads, values, strict=True))
        cells = " | ".join(interval_text(value, 3) for value in values)
        text.append(f"| {setting} | {len(members)} | {cells} |")
    write_tables(cfg.out, result, text)


# --- several runs, each in several seeds ----------------------------------------------------------

# Told apart in greyscale too.
MARKERS, LINES = "osD^vP*X<>", ("-", "--", "-.", ":")
AXES = {
    "step": "iteration",
    "kl": "KL to the reference (nats a sequence)",
    "sqrt_kl": "square root of KL to the reference (nats a sequence)",
    "gold": "gold score (points)",
    "greedy_gold": "gold score of greedy responses (points)",
    "entropy": "entropy of a response (nats)",
    "distinct_1": "different words (share of all)",
    "distinct_2": "different pairs of words (share of all)",
    "distinct_2_a_prompt": "different pairs of words, to a prompt (share)",
    "different_a_prompt": "different responses to a prompt (share)",
    "entropy_2": "entropy of pairs of words (nats)",
    "entropy_2_a_prompt": "entropy of pairs of words, to a prompt (nats)",
    "training_seconds": "training (seconds)",
    "proxy": "score that was optimised",
    "wins": "wins against the reference by gold",
    "nll": "held-out demonstrations (nats a token)",
}
LESS_IS_BETTER = ("nll", "kl")


def read_groups(text):
    """LABEL=RUN,RUN;... -> {label: [run]}."""
    groups = {}
    for group in filter(None, map(str.strip, text.split(";"))):
        label, _, runs = group.partition("=")
        if not split_names(runs) or label in groups:
            refuse(f"{group}: expected LABEL=RUN,RUN,... and no label twice")
        groups[label] = split_names(runs)
    if not groups:
        refuse("expected groups of runs: LABEL=RUN,RUN,...")
    return groups


def numbers_of(name):
    """{column: number} of a finished run of ppo.py, dpo.py or `rlaif.py direct` on held-out
    prompts, sampled and `greedy_`; of RUN#POLICY, a policy in an evaluation's report; of
    RUN#best_of=N, a row of its best-of-n curve."""
    run, _, part = name.partition("#")
    try:
        report = read_json(Path(run) / "report.json")
        if part.startswith("best_of="):
            rows = {str(row["n"]): row for row in report["best_of_n"]}
            row = rows[part.partition("=")[2]]
            found = {key: value[0] for key, value in row.items() if key in ("gold", "proxy")}
            found["kl"] = row["kl"]
        elif part:
            policy, first = report["policies"][part], next(iter(report["policies"]))
            found = {k: v for k, v in policy.items() if type(v) in (int, float)}
            found |= {judge: value[0] for judge, value in policy["scores"].items()}
            found |= {key: policy[key][0] for key in ("kl", "entropy") if policy.get(key)}
            wins = report["win_rate"].get("gold", {}).get(part, {}).get(first)
            found["wins"] = 0.5 if part == first else wins[0] if wins else None
        else:
            found = {k: v for k, v in report.items() if type(v) in (int, float)}
            for prefix, side in (("", "sampled"), ("greedy_", "greedy")):
                parts = report[side]["policy"]["all"].items()
                found |= {prefix + k: v[0] for k, v in parts if isinstance(v, list)}
                found[f"{prefix}distinct_2"] = report[side]["distinct_2"][0]
                for judge, wins in report[side]["win_rate"].items():
                    found[prefix + ("wins" if judge == "gold" else f"{judge}_wins")] = wins[0]
        found = {k: v for k, v in found.items() if v is not None and math.isfinite(v)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        refuse(f"{name}: report.json: nothing to compare: {type(error).__name__}: {error}")
    if "kl" in found:
        found["sqrt_kl"] = math.sqrt(max(found["kl"], 0.0))
    return found


def evaluations_of(name):
    """[{"step", column: number}] along a run: what ppo.py and its kin have logged as `eval_`, or of
    RUN#best_of, the best-of-n curve of an evaluation, n being the step."""
    run, _, part = name.partition("#")
    lines = {}
    if part == "best_of":
        try:
            report = read_json(Path(run) / "report.json")
            counts = [row["n"] for row in report["best_of_n"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            refuse(f"{name}: report.json: no best-of-n curve: {error}")
        lines = {n: {"step": n} | numbers_of(f"{run}#best_of={n}") for n in counts}
    else:
        for _, line in read_jsonl(Path(run) / "metrics.jsonl", {}):
            numbers = {k: v for k, v in line.items() if type(v) in (int, float) and abs(v) < 1e300}
            found = {k[5:]: v for k, v in numbers.items() if k[:5] == "eval_"}
            if found and type(line.get("step")) is int:
                lines.setdefault(line["step"], {"step": line["step"]}).update(found)
    for line in lines.values():
        if "kl" in line:
            line["sqrt_kl"] = math.sqrt(max(line["kl"], 0.0))
    return [lines[step] for step in sorted(lines)]


def gao_law(points, best_of):
    """The law of Gao et al. (arXiv:2210.10760) that is nearest to points (d, R), d the square root
    of the KL, R the score gained: R = d (a - b d) of best-of-n, d (a - b log d) of RL.
    -> a, b. Points of one run share prompts and a start: what a and b are worth, seeds tell."""
    d, R = np.asarray(points, dtype=np.float64).T
    if d.max() < 1.3 * d.min():
        raise ValueError(f"distances of {d.min():.2f} to {d.max():.2f} do not tell a from b")
    bend = d**2 if best_of else d * np.log(d)
    (a, b), _ = least_squares(np.stack([d, -bend], 1), R)
    return float(a), float(b)


def gained(lines, y):
    """(d, R) of a run's evaluations: the square root of the KL, and y over what it was at first."""
    return [(x["sqrt_kl"], x[y] - lines[0][y]) for x in lines[1:] if x["sqrt_kl"] > 0]


def curves(cfg):
    """evaluate.py curves: what evaluations have logged, mean and 95% interval over seeds."""
    groups, wanted = read_groups(cfg.groups), split_names(cfg.y)
    if cfg.x not in ("step", "sqrt_kl") or not set(split_names(cfg.fit)) <= set(wanted):
        refuse("--x: expected step or sqrt_kl; --fit: some of --y")
    if cfg.fit and cfg.x != "sqrt_kl":
        refuse("--fit: the laws are of --x sqrt_kl")
    result, heads = {}, ["group", "seeds"]
    for y in wanted:
        extreme = "lowest" if y in LESS_IS_BETTER else "highest"
        heads += [f"{y} at first", f"{extreme} mean {y}, at {cfg.x}", f"{y} at last"]
    rows = [[*heads, *([f"{cfg.x} at last"] if cfg.x != "step" else [])]]
    for label, runs in groups.items():
        seeds = [evaluations_of(run) for run in runs]
        for run, lines in zip(runs, seeds, strict=True):
            missing = [name for name in (cfg.x, *wanted) if not all(name in x for x in lines)]
            if missing or not lines:
                refuse(f"{run}: no {', '.join(missing) or 'evaluation'} in what it has logged")
        steps = sorted(set.intersection(*({line["step"] for line in lines} for lines in seeds)))
        at = [[{x["step"]: x for x in lines}[step] for lines in seeds] for step in steps]
        found = {"runs": runs, "steps": steps, "seeds": seeds}
        for name in (cfg.x, *wanted):
            found[name] = [over_seeds([line[name] for line in lines]) for lines in at]
        row = [label, str(len(runs))]
        for y in wanted:
            sign = -1 if y in LESS_IS_BETTER else 1
            best = max(range(len(steps)), key=lambda i: sign * found[y][i][0])
            where = f"{interval_text(found[y][best])} at {found[cfg.x][best][0]:.3g}"
            row += [interval_text(found[y][0]), where, interval_text(found[y][-1])]
        rows.append(row + ([interval_text(found[cfg.x][-1])] if cfg.x != "step" else []))
        for y in split_names(cfg.fit):
            try:
                laws = [gao_law(gained(lines, y), runs[0].endswith("#best_of")) for lines in seeds]
            except ValueError as error:
                print(f"{label}: no law of {y}: {error}", file=sys.stderr)
                continue
            a, b = (over_seeds(values) for values in zip(*laws, strict=True))
            found.setdefault("laws", {})[y] = {"a": a, "b": b}
        result[label] = found
    text = markdown(rows)
    for label, found in result.items():
        for y, law in found.get("laws", {}).items():
            form = "d (a - b d)" if groups[label][0].endswith("#best_of") else "d (a - b log d)"
            a, b = (interval_text(law[name], 3) for name in "ab")
            text.append(f"{label}: {y} gained = {form}: a {a}, b {b}")
    write_tables(cfg.out, result, text)
    plt = matplotlib_pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(1, len(wanted), figsize=(5.2 * len(wanted), 4.2), squeeze=False)
    names = dict(zip(wanted, split_names(cfg.y_labels), strict=False))
    for panel, y in zip(panels[0], wanted, strict=True):
        for n, (label, found) in enumerate(result.items()):
            style = {"color": f"C{n}", "linestyle": LINES[n % 4]}
            x, middle = [v[0] for v in found[cfg.x]], [v[0] for v in found[y]]
            panel.plot(x, middle, marker=MARKERS[n % 10], markersize=4, label=label, **style)
            for lines in found["seeds"]:
                pairs = [(line[cfg.x], line[y]) for line in lines]
                panel.plot(*zip(*pairs, strict=True), color=f"C{n}", linewidth=0.7, alpha=0.4)
            if found[y][0][1] is not None:
                low, high = ([v[side] for v in found[y]] for side in (1, 2))
                if cfg.x == "step":
                    panel.fill_between(x, low, high, color=f"C{n}", alpha=0.12)
                else:  # KL may fall again: a band would fold over itself
                    last = [[middle[-1] - low[-1]], [high[-1] - middle[-1]]]
                    panel.errorbar(x[-1:], middle[-1:], yerr=last, color=f"C{n}", capsize=3)
            law = found.get("laws", {}).get(y)
            if law:
                d = np.linspace(0.05, max(x), 100)
                best_of = groups[label][0].endswith("#best_of")
                bend = d if best_of else np.log(d)
                fitted = middle[0] + d * (law["a"][0] - law["b"][0] * bend)
                panel.plot(d, fitted, color=f"C{n}", linewidth=0.8)
        middles = [v[0] for found in result.values() for v in found[y]]
        room = 0.15 * (max(middles) - min(middles)) or 1.0
        panel.set_ylim(min(middles) - 2 * room, max(middles) + 2 * room)
        panel.set_xlabel(AXES.get(cfg.x, cfg.x))
        panel.set_ylabel(names.get(y, AXES.get(y, y)))
        panel.grid(alpha=0.3)
    finish_figure(figure, panels[0][0], cfg, len(result))


def finish_figure(figure, panel, cfg, count):
    """Title, one legend for all panels below them, and the file."""
    handles, labels = panel.get_legend_handles_labels()
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure.suptitle(cfg.title, fontsize=11)
    figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=9)
    save_figure(figure, f"{cfg.out}.png", bottom=0.02 + 0.055 * rows)


def read_columns(groups, names):
    """{label: {column: [mean, low, high] over its runs}}, and the same of what each has over the
    first group, run by run: seeds differ more from one another than groups do in a seed."""
    table, over, first = {}, {}, None
    for label, runs in groups.items():
        seeds = [numbers_of(run) for run in runs]
        for run, found in zip(runs, seeds, strict=True):
            missing = [name for name in names if name not in found]
            if missing:
                refuse(f"{run}: no {', '.join(missing)}; there are {', '.join(sorted(found))}")
        table[label] = {name: over_seeds([found[name] for found in seeds]) for name in names}
        first = first or seeds
        if len(seeds) == len(first):
            pairs = list(zip(seeds, first, strict=True))
            over[label] = {
                name: over_seeds([a[name] - b[name] for a, b in pairs]) for name in names
            }
    return table, over


def points(cfg):
    """evaluate.py points: a point a group, mean and 95% interval over seeds; a line a method."""
    groups, wanted = read_groups(cfg.groups), split_names(cfg.y)
    table, _ = read_columns(groups, [*([] if cfg.x == "label" else [cfg.x]), *wanted])
    methods = {}
    for label in groups:
        method, _, name = label.partition(":")
        if cfg.x == "label":
            try:
                table[label]["label"] = [float(name), None, None]
            except ValueError:
                refuse(f"{label}: with --x label expected METHOD:NUMBER")
        methods.setdefault(method, []).append(label)
    for labels in methods.values():
        labels.sort(key=lambda label: table[label][cfg.x][0])  # the order of their line
    columns = [cfg.x, *wanted]
    rows = [["group", "seeds", *columns]]
    for label, found in table.items():
        values = [interval_text(found[name], 3) for name in columns]
        rows.append([label, str(len(groups[label])), *values])
    write_tables(cfg.out, {"groups": groups, "columns": table}, markdown(rows))
    plt = matplotlib_pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(
        1, len(wanted), figsize=(max(6.5, 5 * len(wanted)), 4.8), squeeze=False
    )
    for panel, y in zip(panels[0], wanted, strict=True):
        for n, (method, labels) in enumerate(methods.items()):
            found = [table[label] for label in labels]
            x, middle = [f[cfg.x][0] for f in found], [f[y][0] for f in found]
            bars = [
                [0.0 if f[name][2] is None else f[name][2] - f[name][0] for f in found]
                for name in (cfg.x, y)
            ]
            style = {"color": f"C{n}", "linestyle": LINES[n % 4], "marker": MARKERS[n % 10]}
            panel.errorbar(x, middle, xerr=bars[0], yerr=bars[1], capsize=3, label=method, **style)
            for label, *where in zip(labels, x, middle, strict=True):
                if cfg.x != "label" and ":" in label:
                    panel.annotate(
                        label.partition(":")[2],
                        where,
                        xytext=(4, 4),
                        textcoords="offset points",
                        fontsize=8,
                    )
        panel.set_xlabel(cfg.x_label or AXES.get(cfg.x, cfg.x))
        panel.set_ylabel(AXES.get(y, y))
        panel.grid(alpha=0.3)
    finish_figure(figure, panels[0][0], cfg, len(methods))


def groups_in_rows(cfg):
    """evaluate.py rows: groups below one another, a column a panel."""
    groups, wanted = read_groups(cfg.groups), split_names(cfg.columns)
    table, over = read_columns(groups, wanted)
    text = [["", "seeds", *wanted, *(f"{c}: over {next(iter(groups))}'s" for c in wanted)]]
    for label, found in table.items():
        cells = [interval_text(found[c], 3) for c in wanted]
        cells += [interval_text(over.get(label, {}).get(c), 3) for c in wanted]
        text.append([label, str(len(groups[label])), *cells])
    result = {"groups": groups, "columns": table, "over_first": over}
    write_tables(cfg.out, result, markdown(text))
    plt = matplotlib_pyplot()
    if plt is None:
        return
    labels = list(table)
    figure, panels = plt.subplots(
        1,
        len(wanted),
        figsize=(2 + 2.6 * len(wanted), 1.4 + 0.36 * len(labels)),
        sharey=True,
        squeeze=False,
    )
    for panel, column in zip(panels[0], wanted, strict=True):
        values = [table[label][column] for label in labels]
        bars = [0.0 if v[2] is None else v[2] - v[0] for v in values]
        heights = range(len(labels), 0, -1)
        panel.errorbar(
            [v[0] for v in values], heights, xerr=bars, fmt="ko", capsize=3, markersize=4
        )
        panel.axvline(values[0][0], color="grey", linewidth=0.8, linestyle=":")  # the first group
        panel.set_title(AXES.get(column, column), fontsize=8)
        panel.set_yticks(heights, labels)
        panel.grid(alpha=0.3, axis="x")
    figure.suptitle(cfg.title, fontsize=11)
    save_figure(figure, f"{cfg.out}.png")


def write_tables(out, result, text):
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_json(f"{out}.json", result)
    with whole_file(f"{out}.md") as temporary:
        temporary.write_text("\n".join(text) + "\n", "utf-8")
    print("\n".join(text))
    print(f"{out}.md, {out}.json")


# --- main -----------------------------------------------------------------------------------------


def main():
    commands = {"plot": (plot, PlotConfig), "scaling": (scaling, ScalingConfig)}
    commands |= {"margins": (margins, MarginsConfig), "table": (show_table, TableConfig)}
    commands |= {"check": (check_claims, CheckConfig), "curves": (curves, CurvesConfig)}
    commands |= {"points": (points, PointsConfig), "rows": (groups_in_rows, RowsConfig)}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        command, config = commands[sys.argv[1]]
        # Runs may stand before the flags.
        runs = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[2:]))
        for name, separator in (("runs", ","), ("groups", ";")):
            if runs and name in config.__dataclass_fields__:
                sys.argv[2 : 2 + len(runs)] = [f"--{name}", separator.join(runs)]
        return command(parse_config(config, __doc__, sys.argv[1]))
    cfg = parse_config(Config, __doc__)
    if min(cfg.num_samples, cfg.max_new_tokens) < 1:
        refuse("--num_samples, --max_new_tokens: expected more than 0")
    policies = [parse_policy(text) for text in split_names(cfg.policies)]
    names = [policy["name"] for policy in policies]
    if not policies or len(set(names)) < len(names):
        refuse("--policies: expected one or more, all different")
    device, dtype, rank, world = start_process(cfg)
    mixed = dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    prompts = []
    for where, line in read_jsonl(cfg.prompts, {"prompt": True}):
        for field in ("task", cfg.by):
            if not isinstance(line.get(field, ""), str):
                found = json.dumps(line[field])[:40]
                refuse(f"{where}: {field}: expected a string, got {found}")
        prompts.append(line)
    prompts = prompts[: cfg.num_prompts or None]

    if not prompts:
        refuse("--num_prompts: no prompt is left")
    if any(policy["by"] and policy["temperature"] == 0 for policy in policies):
        refuse("--policies: the best of several needs a temperature above 0")
    if cfg.best_of_n and (policies[0]["by"] or policies[0]["temperature"] == 0):
        refuse("--best_of_n: expected a first policy that samples, one response at a time")

    # 1. Judges, by name; gold is one of them. Proxies, by which the best is chosen.
    gold = load_gold(cfg.gold) if cfg.gold else None
    judges = {"gold": ("file", gold)} if gold else {}
    judges |= {name: load_judge(name, device) for name in split_names(cfg.judges)}
    proxies = {policy["by"] for policy in policies if policy["by"]}
    proxies |= {cfg.proxy} if cfg.best_of_n else set()
    proxies = {name: judges.get(name) or load_judge(name, device) for name in sorted(proxies)}
    labelled = read_labelled(cfg.comparisons, names) if cfg.comparisons else {}
    if not judges and not labelled:
        refuse("expected a judge: --gold, --judges or --comparisons")
    reference_name = cfg.reference or policies[0]["run"]
    reference, tokenizer = load_policy(reference_name, device)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    reference.to(precision)
    # All read and write the same tokens, and see the same prompts: what would not fit into the
    # least of them is cut for all.
    positions = reference.config.n_positions
    for name in dict.fromkeys(policy["run"] for policy in policies):
        model, theirs = load_policy(name, "cpu")
        positions = min(positions, model.config.n_positions)
        vocabularies = (model.config.vocab_size, reference.config.vocab_size)
        if tokenizer_hash(theirs) != tokenizer_hash(tokenizer) or len(set(vocabularies)) > 1:
            refuse(f"{name}: another tokenizer or vocabulary than {reference_name}'s")
    for name, loaded in (judges | proxies).items():
        if loaded[0] == "model":
            positions = min(positions, loaded[1].config.n_positions)
            loaded[1].to(precision)
            if tokenizer_hash(loaded[2]) != tokenizer_hash(tokenizer):
                refuse(f"{name}: another tokenizer than {reference_name}'s")
    room = positions - cfg.max_new_tokens
    if room < 1:
        refuse(f"--max_new_tokens {cfg.max_new_tokens}: leaves no room in {positions} positions")
    cut = sum(len(tokenizer.encode_ordinary(line["prompt"])) > room for line in prompts)
    inputs = [cfg.prompts, *([cfg.comparisons] if cfg.comparisons else [])]
    others = [*split_names(cfg.judges), *proxies, *([cfg.gold] if cfg.gold else [])]
    for name in [reference_name, *(policy["run"] for policy in policies), *others]:
        inputs += weights_of(name)
    settings = settings_of(cfg, inputs, world)
    may_resume(cfg, settings)
    all_reduce([0.0], device)  # every rank has looked; only now may rank 0 change what is there
    out_dir = Path(cfg.out_dir)
    if rank == 0:
        new_run(out_dir, settings)
        print(f"{len(prompts)} prompts, {cut} of which are cut at their start", flush=True)

    def stop():
        if rank == 0:
            print("stopped by SIGTERM", flush=True)
        sys.exit(128 + signal.SIGTERM)

    # 2. Each policy responds, and is judged.
    report = {"prompts": len(prompts), "reference": reference_name, "policies": {}}
    samples, scores, started, curve = {}, {by: {} for by in judges}, time.time(), None
    for number, policy in enumerate(policies):
        name, begun = policy["name"], time.time()
        model = load_policy(policy["run"], device)[0].to(precision)
        sampler = model
        if device.type == "cuda" and dtype == torch.bfloat16:
            sampler = copy.deepcopy(model).bfloat16()
        count = policy["best_of"] * cfg.best_of_samples if policy["by"] else cfg.num_samples
        count = 1 if policy["temperature"] == 0 else count  # it always says the same
        temperature, seed = policy["temperature"], cfg.seed * 1009 + number
        how = (cfg, device, rank, world)
        judged = (cfg, device, autocast, rank, world)
        some = sample_policy(sampler, tokenizer, prompts, count, temperature, seed, room, *how)
        if some is None:
            stop()
        if policy["by"]:
            values = judge_samples(proxies[policy["by"]], prompts, some, *judged)
            if values is None:
                stop()
            some = choose_best(some, values, policy["best_of"])
        samples[name], kl, spread = some, None, None
        if policy["best_of"] == 1:
            tables = kl_and_entropy(model, reference, some, temperature, *how)
            if tables is None:
                stop()
            kl, spread = (
                mean_with_interval([np.mean(x) for x in table], cfg.bootstrap, cfg.seed)
                for table in tables
            )
        elif Path(policy["run"]).resolve() == Path(reference_name).resolve() and temperature == 1:
            kl = [best_of_n_kl(policy["best_of"]), None, None]
        for by, loaded in judges.items():
            scores[by][name] = judge_samples(loaded, prompts, some, *judged)
            if scores[by][name] is None:
                stop()
        if cfg.best_of_n and number == 0:
            many = sample_policy(
                sampler, tokenizer, prompts, cfg.best_of_n, temperature, seed + 500, room, *how
            )
            values = many and judge_samples(proxies[cfg.proxy], prompts, many, *judged)
            golds = (
                judge_samples(judges["gold"], prompts, many, *judged) if values and gold else None
            )
            if not values:
                stop()
            curve = best_of_n_report(*fill_missing([values]), golds, cfg)
        if rank == 0:
            found = describe(some, prompts, gold, cfg) | {"kl": kl, "scores": {}}
            found["kl_is_bound"] = policy["best_of"] > 1 and kl is not None
            found["entropy"] = spread  # of the response, nats; who chooses has none that is known
            found["training_seconds"] = training_seconds(policy)
            found["seconds"] = round(time.time() - begun, 1)
            report["policies"][name] = found
            write_samples(out_dir / f"samples-{number}.jsonl", prompts, some, name)
            print(f"{name}: {found['samples']} responses in {found['seconds']:.0f} s", flush=True)
        del model, sampler

    # 3. Each against each; then everything is written, by rank 0.
    if rank == 0:
        for by, table in scores.items():
            filled = fill_missing(table.values())
            scores[by] = dict(zip(table, filled, strict=True))
            for name, values in scores[by].items():
                means = [float(np.mean(value)) for value in values]
                value = mean_with_interval(means, cfg.bootstrap, cfg.seed)
                report["policies"][name]["scores"][by] = value
        lengths = {
            name: [[float(len(s["ids"])) for s in row] for row in some]
            for name, some in samples.items()
        }
        comparers = {
            by: lambda a, b, module=loaded[1]: compare_texts(
                module, prompts, samples[a], samples[b]
            )
            for by, loaded in judges.items()
            if loaded[0] == "file" and hasattr(loaded[1], "compare")
        }
        report |= head_to_head(cfg, names, scores, lengths, comparers)
        report["by_task"] = scores_by_task(cfg, names, prompts, scores)
        for (a, b), rows in labelled.items():
            rate = mean_with_interval(mean_by_prompt(rows), cfg.bootstrap, cfg.seed)
            report["win_rate"].setdefault(cfg.comparisons, {}).setdefault(a, {})[b] = rate
        if curve:
            report["best_of_n"] = curve
        report["seconds"] = round(time.time() - started, 1)
        order = [*judges, *([cfg.comparisons] if cfg.comparisons else [])]
        finish(cfg, report, order, prompts, samples, scores)
    end_process(device)
    return None


def training_seconds(policy):
    """What training took, by the run's report.json; with the reward model's, for a best-of-n."""
    total = 0.0
    for run in [policy["run"], *([policy["by"]] if policy["by"] else [])]:
        try:
            seconds = read_json(Path(run) / "report.json").get("seconds")
        except (OSError, ValueError):
            return None
        if type(seconds) not in (int, float):
            return None
        total += seconds
    return total


def finish(cfg, report, judges, prompts, samples, scores):
    """Prints the table; writes the report, first without figures, then with them."""
    out_dir, figures, show = Path(cfg.out_dir), [], shown_parts(report, cfg.show)
    print(f"means with 95% intervals; wins against {next(iter(report['policies']))}")
    print_aligned(summary_table(report, judges[:1], show))  # the report has all judges
    path = write_report(cfg, report, judges, show, prompts, samples, scores, figures)
    write_json(out_dir / "report.json", report)
    plt = matplotlib_pyplot()
    if plt and scores and len(report["policies"]) > 1:
        figures.append(draw_frontier(plt, out_dir / "score_by_kl.png", report, next(iter(scores))))
    if plt and report.get("best_of_n"):
        title = f"{next(iter(report['policies']))}, best of n by {cfg.proxy}"
        drawn = draw_best_of_n(plt, out_dir / "best_of_n.png", report["best_of_n"], title)
        figures.append(drawn)
    write_report(cfg, report, judges, show, prompts, samples, scores, figures)
    print(path)


def write_samples(path, prompts, samples, name):
    """A samples file: each prompt's line with its responses, without those that are empty."""
    records = []
    for line, some in zip(prompts, samples, strict=True):
        texts = [sample["text"] for sample in some if sample["text"].strip()]
        if texts:
            records.append(line | {"responses": texts, "policy": name})
    write_jsonl(path, records)


def write_jsonl(path, records):
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    guarded(main)
