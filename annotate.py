"""Gathering feedback: stage 2a of RLHF. Samples responses, has them ranked or compared.

`--annotator terminal` asks a person. `--annotator simulated` sees the gold reward through noise:
response k of a prompt is worth to annotator a

    u_k = gold_k + bias_a * words_k + scale_a * g_k,    g_k ~ Gumbel(0, 1) afresh each judgement

and the ranking goes by u. It then follows Plackett and Luce's law, and each pair Bradley and
Terry's: P(i before j) = sigmoid((u_i - u_j without noise) / scale_a). The scales are set so that
agreement with gold, on pairs that gold orders strictly, is `--agreement`.

Simplified against the sources: annotators do not tire, learn or disagree about the instructions;
their bias is one number, the gold points that they see in a word.

    python annotate.py --gold data/toy.py                  # the embedded task: runs/feedback
    python annotate.py --annotator terminal --name ada --prompts mine.jsonl --out_dir runs/ada
    python annotate.py --report runs/feedback/rankings.jsonl --gold data/toy.py
    python annotate.py elo --data comparisons.jsonl        # ratings of who wrote the responses
"""

import argparse
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
import select
import shutil
import signal
import sys
import textwrap
import time
import typing
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from model import (
    check_tokenizer,
    encode,
    generate,
    load_config,
    load_model,
    load_tokenizer,
    read_json,
    text_of,
    weight_files,
    whole_file,
    write_json,
)

GRADES = ("negligibly better, or unsure", "slightly better", "better", "significantly better")
GRADE_KEYS = {str(n): (0, 4 - n) if n < 5 else (1, n - 5) for n in range(1, 9)}  # which, grade
OTHER_KEYS = {"": "quit", "q": "quit", "l": "later", "u": "undo"}
ELO = 400 / math.log(10)  # points of Elo's scale in one nat of log-odds


@dataclasses.dataclass(frozen=True)
class Config:
    prompts: Annotated[str, "prompts to respond to"] = "data/toy/prompts_train.jsonl"
    num_prompts: Annotated[int, "how many of them, from the file's start; 0: all"] = 0
    policy: Annotated[
        str, "who responds: run directories, by commas, each perhaps RUN@temperature=T"
    ] = "runs/sft"
    num_responses: Annotated[int, "K, responses a prompt, 2 to 9 (InstructGPT: 4 to 9)"] = 4
    samples: Annotated[str, "samples file to judge, in the place of sampling"] = ""
    annotator: Annotated[str, "simulated, or terminal: a person at the keyboard"] = "simulated"
    output: Annotated[str, "rankings, or comparisons of two with a margin of 0 to 3"] = "rankings"
    pairs: Annotated[int, "comparisons: pairs judged a prompt; 0: all"] = 1
    gold: Annotated[
        str, "Python file whose score(prompt, response, **fields) simulated annotators see"
    ] = ""
    agreement: Annotated[
        float, "simulated: agreement with gold where it is strict (sources: 0.73 to 0.77)"
    ] = 0.75
    annotators: Annotated[int, "simulated: how many; each prompt is judged by one"] = 5
    noise_spread: Annotated[float, "simulated: std of the log of their noises' scales"] = 0.25
    bias: Annotated[float, "simulated: std over them of the gold points they see in a word"] = 0.03
    overlap: Annotated[
        float, "simulated: share of prompts that all of them judge, to compare them on"
    ] = 0.02
    grade_step: Annotated[float, "simulated: gold points from one grade to the next"] = 1.5
    name: Annotated[str, "terminal: your name; it also decides the order you see"] = "person"
    report: Annotated[str, "judged files, by commas: print agreement, and do nothing else"] = ""
    out_dir: Annotated[str, "folder for samples.jsonl and what was judged"] = "runs/feedback"
    max_new_tokens: Annotated[int, "longest sampled response, tokens"] = 48
    micro_batch_size: Annotated[int, "prompts sampled at a time on one rank, K times each"] = 64
    seed: Annotated[int, "of samples, annotators and orders"] = 0
    device: Annotated[str, "cpu or cuda; empty: cuda where there is one"] = ""
    dtype: Annotated[str, "of sampling on cuda (bfloat16 when empty); on the cpu float32"] = ""
    timeout_s: Annotated[int, "a collective that takes longer ends the job, seconds"] = 600
    resume: Annotated[bool, "go on with the samples and judgements in out_dir"] = False
    overwrite: Annotated[bool, "delete what is in out_dir first"] = False


@dataclasses.dataclass(frozen=True)
class EloConfig:
    data: Annotated[str, "comparisons or rankings, by commas"] = "runs/feedback/rankings.jsonl"
    players: Annotated[
        str, "policies (the lines' `policy`), or responses: each against its prompt's others"
    ] = "policies"
    out: Annotated[str, "policies: ratings as JSON; responses: rankings with `scores`"] = ""
    bootstrap: Annotated[int, "resamplings of the prompts, for 95% intervals"] = 1000
    k: Annotated[float, "points at stake in a game, in the sequential update"] = 32.0
    start: Annotated[float, "mean rating, and where the sequential update starts"] = 1000.0
    method: Annotated[str, "responses: mle, or sequential"] = "mle"
    scale: Annotated[str, "responses: logit (differences are log-odds), or zscore"] = "logit"
    seed: Annotated[int, "of the bootstrap"] = 0


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


def read_policy(text):
    """RUN or RUN@temperature=T -> the directory, the temperature."""
    directory, _, option = text.partition("@")
    name, _, value = option.partition("=")
    try:
        temperature = float(value) if option else 1.0
    except ValueError:
        temperature = -1.0
    if (option and name != "temperature") or not 0 <= temperature < math.inf:
        refuse(f"--policy {text}: expected RUN or RUN@temperature=T")
    return directory, temperature


# --- sampling -------------------------------------------------------------------------------------


def load_policies(cfg, device, dtype):
    """[(name, model, tokenizer, temperature)] of --policy."""
    policies = []
    for text in split_names(cfg.policy):
        directory, temperature = read_policy(text)
        try:
            model, tokenizer = load_model(directory, device), load_tokenizer(directory)
            check_tokenizer(tokenizer, directory, load_config(directory))
        except (OSError, ValueError) as error:
            refuse(error)
        if model.score is not None:
            refuse(f"--policy {directory}: has a scalar head; it scores text and writes none")
        if cfg.max_new_tokens >= model.config.n_positions:
            refuse(f"--max_new_tokens: {directory} has only {model.config.n_positions} positions")
        if device.type == "cuda":
            model = model.to(dtype)
        policies.append((text, model, tokenizer, temperature))
    if not 1 <= len(policies) <= cfg.num_responses:
        refuse(
            f"--policy: expected 1 to {cfg.num_responses} (--num_responses), got {len(policies)}"
        )
    return policies


def sample_all(cfg, policies, prompts, device, rank, world):
    """Writes out_dir/samples.jsonl: K responses to each prompt, from all policies in turn.

    A chunk of prompts of like lengths is the unit of work: its random numbers depend on the seed
    and its number alone, so that any number of ranks, and a run that was stopped and resumed, write
    the same. Of equal responses to a prompt one is kept; those that are empty or did not end are
    dropped; all is counted. Returns how many prompts have two responses to compare.
    """
    size = cfg.micro_batch_size
    lengths = [len(policies[0][2].encode_ordinary(line["prompt"])) for line in prompts]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    partial = Path(cfg.out_dir) / "samples.partial.jsonl"
    done = 0
    if partial.exists():  # each line that was written whole counts, if its whole chunk is there
        lines = [line for line in partial.read_bytes().splitlines(True) if line.endswith(b"\n")]
        done = len(chunks) if len(lines) == len(prompts) else len(lines) // size
        if rank == 0:
            os.truncate(partial, sum(map(len, lines[: done * size])))
    all_reduce([0.0], device)  # every rank has looked; only now may rank 0 write there
    started = last_time = time.time()
    for first in range(done, len(chunks), world):
        if stop_requested(device):
            if rank == 0:
                print(f"stopped by SIGTERM after {first * size} prompts; --resume goes on there")
            sys.exit(128 + signal.SIGTERM)
        number, found = first + rank, []
        if number < len(chunks):
            found = sample_chunk(cfg, policies, [prompts[i] for i in chunks[number]], number)
            found = [[i, responses] for i, responses in zip(chunks[number], found, strict=True)]
        found = gather(found, device)
        if rank > 0:
            continue
        with open(partial, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in found)
        reached, now = min(first + world, len(chunks)), time.time()
        if now - last_time > 10 or reached == len(chunks):
            last_time = now
            left = (now - started) / (reached - done) * (len(chunks) - reached)
            print(
                f"sampled {min(reached * size, len(prompts))}/{len(prompts)} prompts, "
                f"{left // 60:.0f}:{left % 60:02.0f} left",
                flush=True,
            )
    kept = finish_samples(cfg, prompts, partial) if rank == 0 else 0
    return int(all_reduce([kept], device)[0])


def sample_chunk(cfg, policies, prompts, number):
    """-> each prompt's responses, [text, policy, whether it ended, whether the prompt was cut].

    The K responses are dealt out to the policies; who gets one more changes from chunk to chunk.
    """
    responses = [[] for _ in prompts]
    generator = torch.Generator(policies[0][1].wte.weight.device)
    generator.manual_seed(cfg.seed * 1_000_003 + number)
    for p, (name, model, tokenizer, temperature) in enumerate(policies):
        count = len(range((p + number) % len(policies), cfg.num_responses, len(policies)))
        room, eos = model.config.n_positions - cfg.max_new_tokens, tokenizer.eot_token
        whole = [encode(tokenizer, line["prompt"], None, sys.maxsize)[0] for line in prompts]
        tokens, mask = generate(
            model,
            [ids[-room:] for ids in whole],
            cfg.max_new_tokens,
            num_samples=count,
            temperature=temperature,
            eos=eos,
            generator=generator,
        )
        for i, (row, inside) in enumerate(zip(tokens.cpu(), mask.cpu(), strict=True)):
            new = row[inside].tolist()
            ended = new[-1] == eos
            text = text_of(tokenizer, new[:-1] if ended else new)
            responses[i // count].append([text, name, ended, len(whole[i // count]) > room])
    return responses


def finish_samples(cfg, prompts, partial):
    """samples.partial.jsonl -> samples.jsonl, in the prompts' order and without those that have
    nothing to compare; returns how many there are."""
    counts, records = dict.fromkeys(("unended", "empty", "equal", "cut"), 0), {}
    for text in partial.read_text("utf-8").splitlines():
        index, responses = json.loads(text)
        kept = {}
        for text, name, ended, cut in responses:
            counts["cut"] += cut
            if not ended or not text.strip():
                counts["unended" if not ended else "empty"] += 1
            elif text in kept:
                counts["equal"] += 1
            else:
                kept[text] = name
        if len(kept) >= 2:
            fields = {"responses": list(kept), "policy": list(kept.values())}
            records[index] = prompts[index] | fields
    path, total = partial.with_name("samples.jsonl"), len(prompts) * cfg.num_responses
    print(
        f"{path}: {len(records)} prompts; of {total} responses dropped: {counts['unended']} not "
        f"ended, {counts['empty']} empty, {counts['equal']} equal to another; {counts['cut']} to a "
        f"prompt that was cut; {len(prompts) - len(records)} prompts had fewer than two left",
        flush=True,
    )
    if counts["unended"] > 0.5 * total:
        print(f"most did not end within --max_new_tokens {cfg.max_new_tokens}: give them more")
    if records:
        write_jsonl(path, [records[index] for index in sorted(records)])
    partial.unlink()
    return len(records)


def write_jsonl(path, records):
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# --- simulated annotators -------------------------------------------------------------------------


def agreement_at(scale, gaps, factors):
    """Expected agreement with gold, scale_a being `scale` * factors.

    gaps (N,): of pairs that gold orders strictly, what the better is worth more to the annotator
    before noise (bias included); factors (N,): of the annotator who judges the pair. The difference
    of two Gumbel variables is logistic, so each agrees with probability sigmoid(gap / scale_a).
    """
    x = np.clip(gaps / (scale * factors), -500, 500)
    return float(np.mean(1 / (1 + np.exp(-x))))


def noise_scale(gaps, factors, agreement):
    """The scale, in gold points, at which `agreement_at` is `agreement`, by bisection.

    Raises ValueError when the bias alone already makes them agree less.
    """
    low, high = 1e-6, 1e6
    if agreement_at(low, gaps, factors) < agreement - 1e-9:
        best = agreement_at(low, gaps, factors)
        raise ValueError(f"with this bias, annotators without noise agree in {best:.3f}")
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (
            (middle, high) if agreement_at(middle, gaps, factors) > agreement else (low, middle)
        )
    return low


def choose_pairs(rng, K, pairs):
    """`pairs` of the K-choose-2 pairs of responses, at random; all of them when 0."""
    every = list(itertools.combinations(range(K), 2))
    if not 0 < pairs < len(every):
        return every
    return [every[i] for i in sorted(rng.choice(len(every), pairs, replace=False))]


def simulate(cfg, samples, gold):
    """Yields judged lines. See the docstring above for the law that they follow."""
    rng = np.random.default_rng([cfg.seed, 1])
    factors = np.exp(cfg.noise_spread * rng.standard_normal(cfg.annotators))
    biases = cfg.bias * rng.standard_normal(cfg.annotators)
    jobs = []  # (line, responses as one judges them: values before noise, annotator, pairs)
    gaps, gap_factors, ties = [], [], 0
    for number, line in enumerate(samples):
        K = len(line["responses"])
        golds = np.array([gold_score(gold, line, r) for r in line["responses"]])
        words = np.array([len(r.split()) for r in line["responses"]])
        everyone = rng.random() < cfg.overlap
        who = range(cfg.annotators) if everyone else [number % cfg.annotators]
        for a in who:
            values = golds + biases[a] * words
            pairs = choose_pairs(rng, K, 0 if cfg.output == "rankings" else cfg.pairs)
            jobs.append((line, values, a, pairs))
            for i, j in pairs:
                if golds[i] == golds[j]:
                    ties += 1
                else:
                    gaps.append((values[i] - values[j]) * np.sign(golds[i] - golds[j]))
                    gap_factors.append(factors[a])
    if not gaps:
        refuse(f"--gold {cfg.gold}: gives all responses to each prompt the same score")
    try:
        scale = noise_scale(np.array(gaps), np.array(gap_factors), cfg.agreement)
    except ValueError as error:
        refuse(f"--agreement {cfg.agreement}: {error}")
    print(
        f"{cfg.annotators} simulated annotators, noise {scale:.3f} gold points; "
        f"{len(gaps)} pairs that gold orders, {ties} ties",
        flush=True,
    )
    for line, values, a, pairs in jobs:
        name = f"simulated-{a}"
        if cfg.output == "rankings":
            seen = values + scale * factors[a] * rng.gumbel(size=len(values))
            order = np.argsort(-seen, kind="stable").tolist()
            # The annotator's own marks, in grades: their differences are margins.
            marks = [float(seen[i]) / cfg.grade_step for i in order]
            yield ranking(line, order, name, marks)
            continue
        for i, j in pairs:
            seen = values[[i, j]] + scale * factors[a] * rng.gumbel(size=2)
            grade = grade_of(abs(seen[0] - seen[1]) / cfg.grade_step)
            yield comparison(line, (i, j) if seen[0] > seen[1] else (j, i), name, grade)


def ranking(line, order, annotator, scores=None):
    """A rankings line: the sample's line with its responses in `order`, best first."""
    record = line | {"responses": [line["responses"][i] for i in order], "annotator": annotator}
    if isinstance(line.get("policy"), list):
        record["policy"] = [line["policy"][i] for i in order]
    record.pop("scores", None)
    return record | ({} if scores is None else {"scores": scores})


def comparison(line, pair, annotator, grade):
    """A comparisons line: the sample's line, its responses pair[0] over pair[1], by a grade."""
    others = ("responses", "scores", "label")  # a label of the prompt's is not of the pair
    record = {name: value for name, value in line.items() if name not in others}
    record |= {"chosen": line["responses"][pair[0]], "rejected": line["responses"][pair[1]]}
    if isinstance(line.get("policy"), list):
        record["policy"] = [line["policy"][i] for i in pair]
    return record | {"margin": grade, "annotator": annotator}


# --- a person at the terminal ---------------------------------------------------------------------


@contextmanager
def keyboard():
    """While it lasts, keys come one by one and unseen. Whatever ends it, the terminal is as it was
    before: SIGTERM, too, then ends Python by an exception."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not sys.stdin.isatty():
        yield
        return
    import termios  # not on every system, and only needed here
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def read_key():
    """One key; from a pipe one character, spaces aside. "": the end."""
    if not sys.stdin.isatty():
        while (key := sys.stdin.read(1)) and key.isspace():
            pass
        return key
    descriptor = sys.stdin.fileno()
    key = os.read(descriptor, 1)
    if key == b"\x1b":  # an arrow or a function key: the rest of it is no answer
        while select.select([descriptor], [], [], 0.01)[0]:
            byte = os.read(descriptor, 1)
            if byte not in (b"[", b"O") and b"@" <= byte <= b"~":
                break
    return "" if key in (b"", b"\x04") else key.decode("latin-1")


def show(text, label, width):
    """Wraps a text under a label. What could command the terminal is shown as U+FFFD."""
    text = text.strip().replace("\r", "")
    text = "".join(
        c if c.isprintable() or c == "\n" else " " if c.isspace() else "\ufffd" for c in text
    )
    for number, line in enumerate(text.split("\n")):
        for i, part in enumerate(textwrap.wrap(line, width, break_on_hyphens=False) or [""]):
            print(f"{label if number == i == 0 else ' ' * len(label)}{part}")


def ask(line, order, head, output):
    """Shows one sample and asks. -> (the answer, "judged"), or None and "later", "undo", "quit".

    order: the responses as shown. The answer to a ranking: groups of equals, best first; to a
    comparison: ((better, worse), grade).
    """
    width = max(min(shutil.get_terminal_size().columns, 100) - 6, 20)
    if sys.stdout.isatty():
        print("\x1b[2J\x1b[H", end="")
    print(head)
    print()
    prompt = line["prompt"]
    show(prompt if len(prompt) <= 4000 else f"[...] {prompt[-4000:]}", "  ", width)
    print()
    for label, i in zip("AB" if output == "comparisons" else "123456789", order, strict=False):
        show(line["responses"][i], f" {label}  ", width)
        print()
    print("u: take back   l: later   q: quit (all judgements are saved)")
    if output == "comparisons":
        print("A is better: 1 significantly  2 better  3 slightly  4 hardly, unsure")
        print(
            "B is better: 8 significantly  7 better  6 slightly  5 hardly, unsure",
            flush=True,
        )
        while True:
            key = read_key()
            if key in OTHER_KEYS:
                return None, OTHER_KEYS[key]
            if key in GRADE_KEYS:
                side, grade = GRADE_KEYS[key]
                return ((order[side], order[1 - side]), grade), "judged"
    groups = []
    while True:
        left = [i for i in order if not any(i in group for group in groups)]
        if len(left) <= 1:
            return groups + [left] * bool(left), "judged"
        labels = [str(order.index(i) + 1) for i in left]
        so_far = " > ".join(str(order.index(group[0]) + 1) for group in groups)
        print(
            f"best of {', '.join(labels)}?   =: these are equally good"
            + (f"   so far: {so_far}" if groups else ""),
            flush=True,
        )
        key = read_key()
        while key not in (*OTHER_KEYS, *labels, "="):
            key = read_key()
        if key == "u" and groups:
            groups.pop()
        elif key in OTHER_KEYS:
            return None, OTHER_KEYS[key]
        elif key == "=":
            return [*groups, left], "judged"
        else:
            groups.append([order[int(key) - 1]])


def level_scores(groups):
    """Groups of equals, best first -> the responses in order, and the level of each as its score:
    equal scores are a tie, and others differ by how many levels lie between."""
    scores = [len(groups) - level for level, group in enumerate(groups) for _ in group]
    return [i for group in groups for i in group], scores


def ask_person(cfg, samples, path):
    """Has a person judge, in an order of their own. Every judgement is on the disk before the next
    is asked, so a run that is quit, killed or cut off loses none. -> whether all are judged."""
    items = []  # (line, which of its responses, in the order that they are shown in)
    rng = np.random.default_rng([cfg.seed, 2, zlib.crc32(cfg.name.encode())])
    for line in samples:
        K = len(line["responses"])
        pairs = choose_pairs(rng, K, cfg.pairs) if cfg.output == "comparisons" else [range(K)]
        items += [(line, rng.permutation(list(pair)).tolist()) for pair in pairs]
    queue, history = rng.permutation(len(items)).tolist(), []
    if path.exists():
        for text in path.read_bytes().splitlines(keepends=True):
            if text.endswith(b"\n"):  # else it was cut off while being written
                history.append((json.loads(text)["item"], len(text)))
    done = {item for item, _ in history}
    queue = [item for item in queue if item not in done]
    with keyboard(), open(path, "ab") as file:
        file.truncate(sum(size for _, size in history))
        while True:
            if not queue:
                print("\nall are judged; u: take back the last   any other key: finish", flush=True)
                if read_key() != "u":
                    break
                queue.append(history.pop()[0])
                file.truncate(sum(size for _, size in history))
            line, order = items[queue[0]]
            head = f"{cfg.name}: {len(history)} of {len(items)} judged"
            answer, what = ask(line, order, head, cfg.output)
            if what == "quit":
                break
            if what == "later":
                queue.append(queue.pop(0))
            elif what == "undo":
                if history:
                    queue.insert(0, history.pop()[0])
                    file.truncate(sum(size for _, size in history))
            else:
                if cfg.output == "comparisons":
                    record = comparison(line, answer[0], cfg.name, answer[1])
                else:
                    ranked, levels = level_scores(answer)
                    record = ranking(line, ranked, cfg.name, levels)
                text = (json.dumps(record | {"item": queue[0]}) + "\n").encode()
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                history.append((queue.pop(0), len(text)))
    print(f"{path}: {len(history)} of {len(items)} judged", flush=True)
    return not queue


# --- agreement ------------------------------------------------------------------------------------


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


def agreement_report(paths, gold):
    """Agreement of what was judged with gold, where gold is strict, and between annotators."""
    with_gold, verdicts, ties, known = {"all": []}, {}, 0, {}  # known: gold scores by text
    for path in paths:
        for where, record, responses, pairs in read_preferences(path):
            prompt, annotator = record["prompt"], record.get("annotator", path)
            if not isinstance(annotator, str):
                refuse(f"{where}: annotator: expected a string")
            graded = any(margin > 0 for _, _, margin, _ in pairs) or "margin" in record
            for i, j, margin, label in pairs:
                if label == 0.5:  # nobody is better
                    continue
                both = frozenset((responses[i], responses[j]))
                verdicts.setdefault((prompt, both), {})[annotator] = responses[i]
                if gold is None:
                    continue
                scores = []
                for response in (responses[i], responses[j]):
                    if (prompt, response) not in known:
                        known[prompt, response] = gold_score(gold, record, response)
                    scores.append(known[prompt, response])
                if scores[0] == scores[1]:
                    ties += 1
                    continue
                keys = ["all", f"annotator {annotator}"]
                keys += [f"task {record['task']}"] if "task" in record else []
                keys += [GRADES[grade_of(margin)]] if graded else []
                for key in keys:
                    with_gold.setdefault(key, []).append((prompt, float(scores[0] > scores[1])))
    between = {"all": []}
    for (prompt, _), verdict in verdicts.items():
        for a, b in itertools.combinations(sorted(verdict), 2):
            hit = (prompt, float(verdict[a] == verdict[b]))
            for key in ("all", a, b):
                between.setdefault(key, []).append(hit)
    report = {"between_annotators": {key: grouped_rate(rows) for key, rows in between.items()}}
    if gold is not None:
        grades = {grade: i for i, grade in enumerate(GRADES)}
        order = sorted(with_gold, key=lambda key: (grades.get(key, -1), key != "all", key))
        report["with_gold"] = {key: grouped_rate(with_gold[key]) for key in order}
        report["gold_ties"] = ties
    return report


def print_report(report):
    titles = [("with_gold", "agreement with gold, where it is strict")]
    titles += [("between_annotators", "agreement between annotators, on what both judged")]
    for name, title in titles:
        if not report.get(name, {}).get("all", {}).get("pairs"):
            continue
        print(f"{title}: rate with 95% interval over prompts")
        for key, found in report[name].items():
            rate, low, high = found["rate"]
            interval = "" if low is None else f"[{low:.3f}, {high:.3f}]"
            print(f"  {key:<30} {rate:.3f}  {interval:<16}  {found['pairs']} pairs")
    if not report["between_annotators"]["all"]["pairs"]:
        print("no pair was judged by two annotators")
    if report.get("gold_ties"):
        print(f"  {report['gold_ties']} more pairs are ties in gold")


# --- ratings --------------------------------------------------------------------------------------


def elo_expected(rating, opponent):
    """A player's expected score, 0 to 1, from two ratings on Elo's scale."""
    return 1 / (1 + 10 ** ((opponent - rating) / 400))


def elo_ratings(games, players, k=32.0, start=1000.0):
    """Elo's sequential update over games [(a, b, score of a: 1, 0.5 or 0)] -> ratings (players,).

    The result depends on the games' order and on k: R_a += k (S_a - E_a), R_b the opposite.
    """
    ratings = np.full(players, float(start))
    for a, b, score in games:
        change = k * (score - elo_expected(ratings[a], ratings[b]))
        ratings[a] += change
        ratings[b] -= change
    return ratings


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


def bootstrap_ratings(games, players, replicates, rng):
    """`fit_ratings` of resampled games -> (replicates, players), and the share of replicates in
    which some score was finite only for the half wins that were added.

    games: [(a, b, score of a, group)]; groups are resampled whole, since games on one prompt are
    not independent.
    """
    numbers = {group: i for i, group in enumerate(dict.fromkeys(g for *_, g in games))}
    n = players
    table = np.zeros((len(numbers), n * n))  # wins by group
    for a, b, score, group in games:
        table[numbers[group], a * n + b] += score
        table[numbers[group], b * n + a] += 1 - score
    total = table.sum(0).reshape(n, n)
    met = total + total.T > 0
    found, weak = [], 0
    for begin in range(0, replicates, 100):
        size = min(100, replicates - begin)
        weights = rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size)
        wins = (weights @ table).reshape(size, n, n)
        weak += int((~connected(wins > 0)).sum())
        found.append(fit_ratings(wins, met))
    return np.concatenate(found), weak / replicates


def to_reward(scores, scale):
    """Bradley-Terry scores of one prompt's responses -> rewards of mean 0.

    "logit": the scores themselves, so that sigmoid of a difference is a probability of winning;
    "zscore": divided by their standard deviation, which with few games blows noise up.
    """
    centred = scores - scores.mean()
    if scale == "logit":
        return centred
    return centred / max(float(centred.std()), 1e-8)


def elo_main(cfg):
    """annotate.py elo: head-to-head results to ratings."""
    if cfg.players not in ("policies", "responses") or cfg.method not in ("mle", "sequential"):
        refuse("--players: expected policies or responses; --method: mle or sequential")
    if cfg.scale not in ("logit", "zscore"):
        refuse(f"--scale: expected logit or zscore, got {cfg.scale}")
    if (cfg.players == "responses" and not cfg.out) or cfg.out.endswith(".gz"):
        refuse("--out: expected a file to write, not compressed, with --players responses")
    games, lines = [], {}  # (a, b, score of a, prompt); {prompt: its first line}
    for path in split_names(cfg.data):
        for where, record, responses, pairs in read_preferences(path):
            prompt = record["prompt"]
            lines.setdefault(prompt, record)
            names = responses
            if cfg.players == "policies":
                names = record.get("policy")
                if isinstance(names, str):  # one wrote them all: no game
                    continue
                if not isinstance(names, list) or len(names) != len(responses):
                    refuse(f"{where}: policy: expected a list, who wrote each response")
                if not all(isinstance(name, str) for name in names):
                    refuse(f"{where}: policy: expected strings")
            decided = {(i, j): label for i, j, _, label in pairs}
            for i, j in itertools.combinations(range(len(responses)), 2):
                if names[i] != names[j]:  # equal scores: a draw
                    games.append((names[i], names[j], decided.get((i, j), 0.5), prompt))
    if not games:
        refuse(f"{cfg.data}: no line compares two {cfg.players}")
    if cfg.players == "responses":
        rate_responses(cfg, games, lines)
    else:
        rate_policies(cfg, games)


def rate_policies(cfg, games):
    names = sorted({name for a, b, *_ in games for name in (a, b)})
    number = {name: i for i, name in enumerate(names)}
    games = [(number[a], number[b], score, group) for a, b, score, group in games]
    n, wins = len(names), np.zeros((len(names), len(names)))
    for a, b, score, _ in games:
        wins[a, b] += score
        wins[b, a] += 1 - score
    try:
        ratings = cfg.start + ELO * fit_ratings(wins)
    except ValueError as error:
        refuse(f"{cfg.data}: {error}")
    # Elo's own update sees the games in an order of chance: the file's may be sorted.
    rng = np.random.default_rng(cfg.seed)
    shuffled = [games[i][:3] for i in rng.permutation(len(games))]
    sequential = elo_ratings(shuffled, n, cfg.k, cfg.start)
    report = {"games": len(games), "players": {}, "gaps": []}
    replicates, weak = None, 0.0
    if cfg.bootstrap and len({group for *_, group in games}) > 1:
        replicates, weak = bootstrap_ratings(games, n, cfg.bootstrap, rng)
        replicates = cfg.start + ELO * replicates

    def interval(values):
        # Were more than 2.5% of the resampled scores finite by decree, the decree would be an end.
        if replicates is None or weak > 0.025:
            return [None, None]
        return [float(x) for x in np.percentile(values(replicates), [2.5, 97.5])]

    order = sorted(range(n), key=lambda i: -ratings[i])
    for i in order:
        report["players"][names[i]] = {
            "rating": [float(ratings[i]), *interval(lambda r, i=i: r[:, i])],
            "sequential": float(sequential[i]),
            "games": float(wins[i].sum() + wins[:, i].sum()),
            "wins": float(wins[i].sum()),
            "reward_logit": float(to_reward(ratings / ELO, "logit")[i]),
            "reward_zscore": float(to_reward(ratings / ELO, "zscore")[i]),
        }
    for i, j in itertools.combinations(order, 2):
        gap = [float(ratings[i] - ratings[j]), *interval(lambda r, i=i, j=j: r[:, i] - r[:, j])]
        report["gaps"].append({"better": names[i], "worse": names[j], "gap": gap})
    print(
        f"{len(games)} games; ratings of greatest likelihood with 95% intervals, mean {cfg.start}"
    )
    for name, found in report["players"].items():
        rating, low, high = found["rating"]
        text = "" if low is None else f"[{low:.0f}, {high:.0f}]"
        print(
            f"  {name:<40} {rating:7.1f}  {text:<14}  sequential {found['sequential']:7.1f}  "
            f"won {found['wins']:g} of {found['games']:g}"
        )
    for found in report["gaps"]:
        if found["gap"][1] is not None:
            gap, low, high = found["gap"]
            print(f"  {found['better']} over {found['worse']}: {gap:.0f} [{low:.0f}, {high:.0f}]")
    if not connected(wins > 0):
        print("  wins do not lead from all to all: half a win each way was added among who met")
    if replicates is not None and weak > 0.025:
        print(f"  no intervals: in {weak:.0%} of the resampled results a rating has no bound")
    if cfg.out:
        write_json(cfg.out, report)


def rate_responses(cfg, games, lines):
    """Writes each prompt's responses, best first, with `scores`: rewards from their games."""
    by_prompt, records, apart = {}, [], 0
    for a, b, score, prompt in games:
        by_prompt.setdefault(prompt, []).append((a, b, score))
    for prompt, played in by_prompt.items():
        names = list(dict.fromkeys(name for a, b, _ in played for name in (a, b)))
        number = {name: i for i, name in enumerate(names)}
        played = [(number[a], number[b], score) for a, b, score in played]
        if cfg.method == "sequential":
            scores = elo_ratings(played, len(names), cfg.k, cfg.start) / ELO
        else:
            wins = np.zeros((len(names), len(names)))
            for a, b, score in played:
                wins[a, b] += score
                wins[b, a] += 1 - score
            try:
                scores = fit_ratings(wins)
            except ValueError:
                apart += 1
                continue
        rewards = to_reward(scores, cfg.scale)
        order = np.argsort(-rewards, kind="stable").tolist()
        drop = "responses chosen rejected scores margin label policy annotator item".split()
        line = {name: value for name, value in lines[prompt].items() if name not in drop}
        line |= {"responses": [names[i] for i in order], "games": len(played)}
        records.append(line | {"scores": [round(float(rewards[i]), 6) for i in order]})
    write_jsonl(cfg.out, records)
    print(f"{cfg.out}: {len(records)} prompts with rewards from {len(games)} games")
    if apart:
        print(f"{apart} prompts left out: some of their responses never met")


# --- main -----------------------------------------------------------------------------------------


def main():
    if sys.argv[1:2] == ["elo"]:
        return elo_main(parse_config(EloConfig, __doc__, "elo"))
    cfg = parse_config(Config, __doc__)
    if cfg.report:
        gold = load_gold(cfg.gold) if cfg.gold else None
        return print_report(agreement_report(split_names(cfg.report), gold))
    if cfg.annotator not in ("simulated", "terminal"):
        refuse(f"--annotator: expected simulated or terminal, got {cfg.annotator}")
    if cfg.output not in ("rankings", "comparisons"):
        refuse(f"--output: expected rankings or comparisons, got {cfg.output}")
    if not 2 <= cfg.num_responses <= 9:
        refuse(f"--num_responses: expected 2 to 9, got {cfg.num_responses}")
    if min(cfg.annotators, cfg.micro_batch_size, cfg.max_new_tokens) < 1 or not cfg.grade_step:
        refuse(
            "--annotators, --micro_batch_size, --max_new_tokens, --grade_step: expected more than 0"
        )
    simulated = cfg.annotator == "simulated"
    if simulated and not cfg.gold:
        refuse(
            "--annotator simulated: expected --gold, a Python file (the task's own: data/toy.py)"
        )
    if simulated and not 0.5 < cfg.agreement <= 1:
        refuse(f"--agreement: expected more than 0.5 and at most 1, got {cfg.agreement}")
    gold = load_gold(cfg.gold) if cfg.gold else None
    device, dtype, rank, world = start_process(cfg)
    if not simulated and world > 1:
        refuse("--annotator terminal: there is one terminal; run it without torchrun")

    # 1. What is to be judged: a samples file, or responses sampled here.
    out_dir, source = Path(cfg.out_dir), cfg.samples or cfg.prompts
    samples, inputs = [], [source]
    for where, record in read_jsonl(source, {"prompt": False}):
        check_task(where, record)
        if cfg.samples:
            count = len(read_responses(where, record))
            if not simulated and count > 9:
                refuse(f"{where}: responses: {count}; nine keys are all that a person has here")
        samples.append(record)
    if not cfg.samples:
        samples = samples[: cfg.num_prompts or None]
        policies = load_policies(cfg, device, dtype)
        for text in split_names(cfg.policy):
            inputs += weight_files(Path(read_policy(text)[0]))
    settings = settings_of(cfg, inputs, world)
    resume = may_resume(cfg, settings)
    all_reduce([0.0], device)  # every rank has looked; only now may rank 0 change what is there
    if rank == 0 and not resume:
        new_run(out_dir, settings)
    all_reduce([0.0], device)
    if not cfg.samples:
        path = out_dir / "samples.jsonl"
        if not path.exists() and not sample_all(cfg, policies, samples, device, rank, world):
            refuse(f"{path}: no prompt has two responses to compare")
        all_reduce([0.0], device)  # every rank reads what rank 0 has written
        samples = [record for _, record in read_jsonl(path, {"prompt": False})]
    end_process(device)
    if rank > 0:
        return None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the samples are on the disk

    # 2. Judging, by rank 0 alone.
    path = out_dir / f"{cfg.output}.jsonl"
    if simulated:
        records = list(simulate(cfg, samples, gold))
        write_jsonl(path, records)
        print(f"{path}: {len(records)} lines", flush=True)
    elif not ask_person(cfg, samples, path):
        return None

    # 3. How far they agree.
    report = agreement_report([path], gold)
    print_report(report)
    write_json(out_dir / "report.json", report)
    return None


if __name__ == "__main__":
    guarded(main)
