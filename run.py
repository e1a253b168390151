"""What a run is, in every script: flags, processes, precision, its directory, exact resuming, logs.
No algorithm is in here, and nothing of RLHF: a reader can pass it over.

    cfg = flags(Config, __doc__)              # annotations are help, bounds, and what needs what
    run = Run(cfg)                            # device, precision, ranks
    run.open([cfg.data, cfg.init], total)     # makes out_dir, or finds what to resume in it
    run.resume({"policy": policy}, {"policy": optimizer})
    while True:
        run.save_or_stop()                    # every save_every steps, at the end, on SIGTERM
        if run.evaluation_due(): run.log_evaluation({"loss": ...})
        if run.step == total: break
        ...                                   # forward, loss, backward, optimiser step
        run.step += 1
        if run.due(cfg.log_every): run.log("metrics", {"loss": ...})
    run.finish({"loss": ...})

Whoever has infrastructure of his own replaces `Run`. It never calls a model, a loss or a step of an
optimiser; what a loop's arithmetic rests on are its `micro_batches`, `parallel` and `clip`.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import typing
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model import GPT, save_model, weight_files, weights_of, widest
from tokens import (
    MESSAGES, TOKENIZER_FILES, Conversation, check_space, plain, read_json, whole_file, write_json,
)  # fmt: skip

# --- flags ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
    """What a command has that computes, but makes no run directory."""

    group = "run"
    device: Annotated[str, "cpu, cuda, or mps (not tried); empty: cuda where there is one"] = ""
    dtype: Annotated[
        Literal["", "float32", "bfloat16", "float16", "float64"],
        "empty: bfloat16 on cuda, float32 on the cpu",
    ] = ""
    timeout_s: Annotated[int, "a collective that takes longer ends the job, seconds"] = 600


@dataclasses.dataclass(frozen=True)
class RunFlags(ProcessFlags):
    """What every script has."""

    group = "run"
    seed: Annotated[int, "of order and samples"] = 0
    resume: Annotated[bool, "go on with the run in out_dir, or start if there is none"] = False
    overwrite: Annotated[bool, "delete the run in out_dir first"] = False


@dataclasses.dataclass(frozen=True)
class TrainingFlags(RunFlags):
    """What every script that trains has besides; scripts set other defaults."""

    group = "optimiser"
    batch_size: Annotated[int, "lines a step, over all ranks", "[1, inf)"] = 32
    micro_batch_size: Annotated[int, "lines a forward on one rank; 0: all of its share"] = 0
    lr: Annotated[float, "peak learning rate"] = 1e-3
    warmup: Annotated[int, "steps of linear warm-up"] = 10
    final_lr: Annotated[float, "last rate over peak rate, by a cosine (InstructGPT: 0.1)"] = 0.1
    adam_beta2: Annotated[float, "Adam's second-moment decay (GPT-3: 0.95)", "[0, 1)"] = 0.95
    adam_eps: Annotated[float, "Adam's epsilon (OpenAI 2019, Llama 2: 1e-5)"] = 1e-8
    weight_decay: Annotated[float, "AdamW's, on matrices (Llama 2: 0.1)"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm", "(0, inf)"] = 1.0
    lora_rank: Annotated[
        int, "rank of adapters that learn in the place of the weights; 0: none", "[0, inf)"
    ] = 0
    lora_alpha: Annotated[float, "alpha / rank scales adapters", "(0, inf)", "lora_rank"] = 16.0
    compile: Annotated[bool, "torch.compile the blocks of what is trained and scored by"] = False
    shard: Annotated[
        bool, "weights, gradients and Adam's numbers cut over the ranks, by FSDP", "not lora_rank"
    ] = False
    checkpoint_activations: Annotated[bool, "less memory: blocks computed anew in backward"] = False
    log_every: Annotated[int, "steps between printed lines", "[1, inf)"] = 50
    eval_every: Annotated[int, "steps between evaluations; 0: only at the end"] = 250
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 250


# What may be another when a run goes on.
FREE = ("out_dir", "resume", "overwrite", "timeout_s", "checkpoint_activations")
# Of this process: torchrun's store; the SIGTERMs that came; its run's folder, as long as that was
# made or empty when it came, and whether it was there.
stores, stop_signals, made = [], [], []


def refuse(message):
    """Ends the script for bad input: one line, from one rank, and exit status 2. A run that has not
    begun leaves no folder."""
    if says_it():
        # What is quoted in it may be of any length, and of many lines.
        print(" ".join(f"{message}".splitlines())[:2000], file=sys.stderr, flush=True)
    forget_folder()
    sys.exit(2)


def says_it():
    """Whether this rank is the first that refuses."""
    if not stores:  # the ranks have not met, and all refuse alike
        if os.environ.get("LOCAL_RANK", "0") == "0":
            return True
        time.sleep(10)  # when one rank ends, torchrun ends the others: let that one speak first
        return False
    try:
        return stores[0].add(f"refused {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:  # rank 0 keeps the store, and is gone
        return True


def forget_folder():
    """Takes back what `make_directory` made, if nothing has come to it."""
    for folder, was_there in made:
        files = list(folder.iterdir()) if folder.exists() else ()
        if all(path.name in ("args.json", *sources(), "lost+found") for path in files):
            for path in files:
                if path.name != "lost+found":
                    path.unlink()
            if not was_there and folder.exists():
                folder.rmdir()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        refuse(f"{self.prog}: {message} (--help explains all flags)")


def flags(config_class, doc, command="", positional=""):
    """`config_class` from the command line, after `command` where there are sub-commands.

    A field is Annotated[type, help, *rules]. Types: Literal, one of these; tuple[x, ...], several
    by commas; float | None, a number or none. Rules: "[0, 1)", the interval that its numbers are in
    ("[0, inf)" if it isn't said); "advantage=gae" (or "advantage=rloo|grpo"), what another flag
    must be; "online" and "not online", another flag that must or must not be given. `positional`: a
    field of several values that may also stand before the flags, without its name.
    """
    form = argparse.RawDescriptionHelpFormatter
    name = f"{Path(sys.argv[0]).name} {command}".strip()
    usage = f"{name} [{positional} ...] [--flag value ...]".replace("[ ...] ", "")
    parser = Parser(name, usage, doc, formatter_class=form, allow_abbrev=False)
    hints = typing.get_type_hints(config_class, include_extras=True)
    for group, names in groups_of_flags(config_class).items():
        part = parser.add_argument_group(group)
        for name in names:
            default = getattr(config_class, name)
            part.add_argument(f"--{name}", default=default, **argument(hints[name], default))
    if positional:
        parser.add_argument("several", nargs="*", help=f"as --{positional}")
    found = vars(parser.parse_args(sys.argv[2:] if command else None))
    several = found.pop("several", [])
    if several:
        found[positional] = tuple(several)
    cfg = config_class(**found)
    for name, hint in hints.items():
        for rule in hint.__metadata__[1:]:
            if rule[0] not in "[(" and getattr(cfg, name) != getattr(config_class, name):
                check_needed(parser, cfg, name, rule)
        bounds = next((rule for rule in hint.__metadata__[1:] if rule[0] in "[("), "[0, inf)")
        value = getattr(cfg, name)
        for number in value if type(value) is tuple else [value]:
            if type(number) in (int, float) and not within(number, bounds):
                parser.error(f"--{name}: expected a number in {bounds}, got {number:g}")
    return cfg


def groups_of_flags(config_class):
    """{group: fields that --help shows in it}. A class's fields are "data" up to its out_dir, and
    "algorithm" after it, the script's own first; those of RunFlags and TrainingFlags theirs."""
    groups, seen = {"data": [], "algorithm": [], "optimiser": [], "run": []}, set()
    for cls in reversed(config_class.__mro__):
        own = list(inspect.get_annotations(cls))
        last = next((own.index(name) for name in ("out_dir", "out") if name in own), len(own))
        mine = {"data": [], "algorithm": []}
        for i, name in enumerate(own):
            if name not in seen and "group" in vars(cls):
                groups[cls.group].append(name)
            elif name not in seen:
                mine["data" if i <= last else "algorithm"].append(name)
            seen.add(name)
        groups["data"] += mine["data"]
        groups["algorithm"] = mine["algorithm"] + groups["algorithm"]
    return {group: names for group, names in groups.items() if names}


def argument(hint, default):
    """What argparse must know of a field."""
    kind, (text, *rules) = hint.__origin__, hint.__metadata__
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    shown = ",".join(map(str, default)) if type(default) is tuple else default
    text += f" (default: {repr(shown) if shown == '' else shown})"
    text += "".join(f"; in {rule}" for rule in rules if rule[0] in "[(")
    needed = (rule for rule in rules if rule[0] not in "[(")
    text += "".join(f"; only {in_words(rule)}" for rule in needed)
    how = {"help": text.replace("%", "%%"), "type": kind, "metavar": "X"}
    if kind is bool:
        return {"help": how["help"], "action": argparse.BooleanOptionalAction}
    if origin is Literal:
        how |= {"choices": args, "metavar": "{" + ",".join(filter(None, args)) + "}"}
        return how | {"type": str}
    if origin is tuple:
        return how | {"type": by_commas(args[0]), "metavar": "X,X"}
    if type(None) in args:
        return how | {"type": number_or_none}
    return how


def by_commas(kind):
    def several(text):
        return tuple(kind(x.strip()) for x in text.split(",") if x.strip())

    several.__name__ = f"list of {kind.__name__}s by commas"
    return several


def number_or_none(text):
    return None if text == "none" else float(text)


def in_words(rule):
    return f"with{'out' if rule.startswith('not ') else ''} --{rule.split()[-1].replace('=', ' ')}"


def check_needed(parser, cfg, name, rule):
    """Refuses a flag that was set, where what it needs is not so."""
    flag, equals, wanted = rule.removeprefix("not ").partition("=")
    value = getattr(cfg, flag)
    met = str(value) in wanted.split("|") if equals else bool(value) != rule.startswith("not ")
    if not met:
        parser.error(f"--{name}: only {in_words(rule)}")


def within(x, bounds):
    low, high = map(float, bounds[1:-1].split(","))
    return low <= x <= high and (x > low or bounds[0] == "[") and (x < high or bounds[-1] == "]")


# --- a run ----------------------------------------------------------------------------------------


class Run:
    """One run of a script: its processes and precision, its directory, its checkpoints, its log.

    Every rank calls every method, in the same order: most of them tell the ranks something, and
    would wait for the one that is missing. `say` and `log` write on rank 0 alone.
    """

    def __init__(self, cfg):
        """torchrun sets the world; without it, a world of one."""
        signal.signal(signal.SIGTERM, lambda *_: stop_signals.append(1))
        self.cfg, self.out_dir = cfg, Path(getattr(cfg, "out_dir", ""))
        self.rank, self.world = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        self.device = self.choose_device()
        self.wide = widest(self.device)  # for sums
        if self.world > 1:
            self.join(datetime.timedelta(seconds=cfg.timeout_s))
        cuda = self.device.type == "cuda"
        self.dtype = getattr(torch, cfg.dtype or ("bfloat16" if cuda else "float32"))
        self.mixed = self.dtype in (torch.bfloat16, torch.float16)
        # Of weights; a forward of theirs runs in `autocast`.
        self.precision = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.autocast = (
            torch.autocast(self.device.type, self.dtype) if self.mixed else contextlib.nullcontext()
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.shards = self.world > 1 and getattr(cfg, "shard", False)
        if self.shards and self.dtype == torch.float16:
            refuse("--shard: not in float16, whose scaling of losses FSDP does not know")
        self.modules, self.optimizers, self.state = {}, {}, SimpleNamespace()
        self.step, self.total = 0, None  # steps done, and in all
        self.first = 0  # the step that this process began with
        self.saved = 0  # that of the last checkpoint
        self.evaluated = -1  # that of the last evaluation
        self.checkpoint = None  # what to resume
        self.earlier, self.started = 0.0, time.time()  # seconds until that, and since then
        self.window, self.last = Counter(), time.time()  # sums since the last printed line
        self.spoken = time.time()  # when `progress` last said something
        self.wrapped = []  # models under DDP

    def choose_device(self):
        name, there = self.cfg.device, torch.cuda.is_available()
        if not (name or there) and torch.version.cuda and self.rank == 0:
            print(
                f"warning: on the CPU: torch is built for CUDA {torch.version.cuda}, but finds no "
                f"GPU or no driver; --device cpu, if that is meant",
                file=sys.stderr,
            )
        kind, _, index = (name or ("cuda" if there else "cpu")).partition(":")
        if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
            refuse(f"--device {name}: expected cpu, cuda or mps")
        if kind == "mps" and not torch.backends.mps.is_available():
            refuse(f"--device {name}: there is no such device here")
        if kind == "mps" and (self.world > 1 or self.cfg.dtype not in ("", "float32")):
            refuse(f"--device {name}: expected one process, in float32")
        if kind != "cuda":
            return torch.device(kind)
        if int(index or 0) >= torch.cuda.device_count():
            refuse(f"--device {name}: there is no such CUDA device here")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", index or 0)))
        torch.cuda.set_device(device)
        return device

    def join(self, limit):
        """Meets the other ranks."""
        store, self.rank, self.world = next(rendezvous("env://", timeout=limit))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps its store when it starts the ranks again: without a name of their own
            # they may read the addresses of those that died, and wait for them. Agents on several
            # nodes count restarts each for itself, so that there such a name would part them.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        stores.append(store)
        # Numbers of the CPU go between CPUs: a GPU is not waited for.
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world, timeout=limit
        )

    # What ranks tell each other.

    def sum(self, values):
        """Numbers, a list or a dict of them -> their sums over the ranks. A dict's order counts."""
        if isinstance(values, dict):
            return dict(zip(values, self.sum(values.values()), strict=True))
        return self.sum_tensor(torch.tensor(list(values), dtype=torch.float64)).tolist()

    def sum_tensor(self, tensor):
        """In place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self):
        """Until every rank is here."""
        self.sum([0])

    def gather(self, records):
        """The lists of JSON values of all ranks, one after another, on every rank."""
        if self.world == 1:
            return list(records)
        text = json.dumps(plain(records, marked=True))
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        data = F.pad(data, (0, int(max(sizes)) - len(data)))
        padded = [torch.empty_like(data) for _ in sizes]
        dist.all_gather(padded, data)
        texts = [bytes(x[:n].tolist()) for x, n in zip(padded, sizes, strict=True)]

        def unmarked(found):
            return Conversation(found[MESSAGES]) if found.keys() == {MESSAGES} else found

        lists = (json.loads(text, object_hook=unmarked) for text in texts)
        return [record for some in lists for record in some]

    def say(self, *text):
        self.spoken = time.time()
        if self.rank == 0:
            print(*text, flush=True)

    def progress(self, what, done, total):
        """Says how far something long has come, when nothing was said for 30 seconds."""
        if time.time() - self.spoken > 30:
            self.say(f"  {what}: {done} of {total}")

    # The directory.

    def open(self, inputs, total=None, free=()):
        """Makes out_dir, or finds there the run to go on with: -> whether it did.

        inputs: flags' values that are files, or run directories, which stand for their weights and
        config.json; "" is none. A run goes on only with the flags (but FREE and `free`), the
        inputs' contents and the number of ranks that it began with: another order of the data would
        train on some examples twice and on others never. It goes on from its last checkpoint;
        without a `total` number of steps, by what the script finds in the directory.
        """
        made.clear()
        self.total, self.checkpoint = total, None
        settings = {name: x for name, x in vars(self.cfg).items() if name not in (*FREE, *free)}
        settings = json.loads(json.dumps(settings | {"world": self.world}))  # lists for tuples
        sums = {name: {path: sha256(path) for path in files_of([name])} for name in inputs}
        resumes = self.may_resume(settings, sums)
        if resumes and total is not None:
            steps = [path.name[11:] for path in self.out_dir.glob("checkpoint-*")]
            steps = [int(step) for step in steps if step.isdigit()]
            resumes = bool(steps)
            self.checkpoint = self.out_dir / f"checkpoint-{max(steps)}" if steps else None
        self.wait()  # every rank has looked; only now may rank 0 change what is there
        if self.rank == 0 and not resumes:
            self.make_directory({"settings": settings, "inputs": sums})
        self.wait()
        return resumes

    def held(self):
        """What is in out_dir; a mounted disk has a lost+found of its own."""
        files = self.out_dir.iterdir() if self.out_dir.exists() else ()
        return [path for path in files if path.name != "lost+found"]

    def may_resume(self, settings, sums):
        """Whether out_dir holds a run to go on with, of these settings and inputs."""
        out_dir, args = self.out_dir, self.out_dir / "args.json"
        # What a run that was killed in its first moments left is not in use.
        in_use = any(path.suffix != ".tmp" for path in self.held())
        if in_use and not (args.is_file() and (self.cfg.resume or self.cfg.overwrite)):
            refuse(f"{out_dir}: in use; --resume goes on with its run, --overwrite deletes it")
        for path in itertools.chain(*sums.values()):
            if self.cfg.overwrite and out_dir.resolve() in Path(path).resolve().parents:
                refuse(f"{path}: is in --out_dir, which --overwrite would delete")
        if not (args.is_file() and self.cfg.resume):
            return False
        try:
            old, known = (dict(read_json(args)[name]) for name in ("settings", "inputs"))
            before, after = contents_of(old, known), contents_of(settings, sums)
        except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
            refuse(f"{args}: damaged, or of another version: nothing can be resumed: {error!r}")
        changes = []
        for name in sorted(old.keys() | settings.keys()):
            if before.get(name) != after.get(name):
                was, is_now = old.get(name), settings.get(name)
                what = f"{was!r} -> {is_now!r}" if was != is_now else f"{was!r} has other contents"
                changes.append(f"{name}: {what}")
        if not changes and before != after:
            changes = ["inputs: others, or with other contents"]
        if changes:
            refuse(f"{out_dir}: can't resume with other settings: {'; '.join(changes)}")
        if (out_dir / "report.json").exists():
            self.say(f"{out_dir}: this run is finished")
            sys.exit(0)
        return True

    def make_directory(self, record):
        """out_dir, emptied where it is (it may be a link, or a disk), with args.json and the
        sources that run. args.json goes last: what is left without it would look like somebody's
        folder."""
        out_dir, was_there = self.out_dir, self.out_dir.exists()
        if not self.held():
            out_dir.resolve().mkdir(parents=True, exist_ok=True)
            made[:] = [(out_dir.resolve(), was_there)]
        (out_dir / "report.json").unlink(missing_ok=True)  # it is no finished run from here on
        for path in sorted(self.held(), key=lambda path: path.name == "args.json"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        write_json(out_dir / "args.json", record | {"command": sys.argv, "versions": versions})
        for name, path in sources().items():
            shutil.copyfile(path, out_dir / name)

    def log(self, name, record, shown=None, prefix=""):
        """Appends a line to out_dir/NAME.jsonl, and prints the numbers `shown` after the prefix."""
        if name == "metrics":
            record = {"step": self.step, "seconds": self.seconds()} | record
        if shown:
            numbers = "  ".join(f"{key} {x:.4g}" for key, x in shown.items())
            self.say(f"step {self.step}/{self.total}  {prefix}{numbers}  {self.left()}")
        if self.rank == 0:
            append_line(self.out_dir / f"{name}.jsonl", record)

    def log_evaluation(self, numbers, shown=None):
        """Logs held-out numbers, under names that begin with eval_, and prints those `shown`, all
        unless told. They are done only now: a run that was stopped before does them when it goes
        on."""
        if numbers:
            record = {f"eval_{name}": x for name, x in numbers.items()}
            self.log("metrics", record, numbers if shown is None else shown, "held out: ")
        self.evaluated = self.step

    # Checkpoints.

    def resume(self, modules, optimizers, **state):
        """-> a namespace of `state`, JSON values that checkpoints hold beside the modules (equal on
        all ranks), the optimizers and every rank's default generators; from the last one, if any.
        No pickle is ever read."""
        self.modules, self.optimizers, self.state = modules, optimizers, SimpleNamespace(**state)
        self.started = self.last = time.time()
        if self.checkpoint:
            self.load(self.checkpoint)
        self.first = self.step
        learning = {
            name: sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
            for name, module in modules.items()
        }
        sizes = ", ".join(f"{name} {size:.2f}M" for name, size in learning.items())
        self.say(
            f"parameters that learn: {sizes}; {self.device}, {self.dtype}, {self.world} rank(s); "
            f"{self.total} steps"
            + (f"; resumed at step {self.step} from {self.checkpoint}" if self.checkpoint else "")
        )
        if self.total and self.cfg.warmup > self.total:
            self.say(
                f"warning: --warmup {self.cfg.warmup}: the learning rate rises in all of these "
                f"steps and never reaches its peak"
            )
        return self.state

    def load(self, path):
        tensors, known = self.read_checkpoint(path)
        for name, module in self.modules.items():
            learnt = {
                key: cut_as(x, tensors[f"{name}.{key}"]) for key, x in learnt_by(module).items()
            }
            module.load_state_dict(learnt, strict=False)
        for name, optimizer in self.optimizers.items():
            moments = {}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for key in [key for key in tensors if key.startswith(f"adam_{name}.")]:
                _, index, moment = key.split(".")
                # A copy, as load_file maps the file, whose room on the disk would not become free.
                x = cut_as(parameters[int(index)], tensors[key].clone())
                moments.setdefault(int(index), {})[moment] = x
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        generators = [torch.tensor(list(bytes.fromhex(g))).byte() for g in known["rng"][self.rank]]
        torch.set_rng_state(generators[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(generators[1], self.device)
        self.scaler.load_state_dict(known["scaler"])
        state = {n: with_nan(x) if isinstance(x, dict) else x for n, x in known["state"].items()}
        self.state = SimpleNamespace(**state)
        self.step = self.saved = known["step"]
        self.evaluated, self.earlier = known["evaluated"], known["seconds"]
        window = with_nan(known["window"])
        self.window = Counter(window if self.rank == 0 else dict.fromkeys(window, 0))
        for log in self.out_dir.glob("*.jsonl") if self.rank == 0 else ():
            # What was logged after the checkpoint will be logged again.
            os.truncate(log, min(known["logs"].get(log.name, 0), log.stat().st_size))

    def read_checkpoint(self, path):
        """-> tensors, state: exactly what `save` wrote; anything else is refused."""
        names = ("tensors.safetensors", "state.json")
        expected = {
            f"{name}.{key}": value.shape
            for name, module in self.modules.items()
            for key, value in learnt_by(module).items()
        }
        try:
            hashes = read_json(path / "sha256.json")
            for name in names:
                if sha256(path / name) != hashes.get(name):
                    raise ValueError(f"{path / name}: damaged: its sha256 is not the recorded one")
            for name in sorted(file.name for file in path.iterdir()):
                if name not in (*names, "sha256.json"):
                    raise ValueError(f"{path / name}: a file that no script of ours wrote")
            tensors, known = load_file(path / names[0]), read_json(path / names[1])
            script = known.get("script", "another program")
            if script != Path(sys.argv[0]).name or len(known.get("rng", [])) <= self.rank:
                raise ValueError(f"{path / names[1]}: of {script}, or of fewer ranks")
            found = {k: x.shape for k, x in tensors.items() if k.split(".")[0] in self.modules}
            if found != expected:
                raise ValueError(f"{path / names[0]}: of another model than this run's")
        except SafetensorError as error:
            refuse(f"{path / names[0]}: {error}; this checkpoint can't be resumed")
        except (OSError, ValueError) as error:
            refuse(f"{error}; this checkpoint can't be resumed")
        return tensors, known

    def save(self):
        """Writes checkpoint-<step>/ under another name, renames it, deletes older ones."""
        if self.step <= self.saved:
            return
        self.saved = self.step
        generators = [torch.get_rng_state()]
        if self.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.device))
        rng = self.gather([[bytes(g.tolist()).hex() for g in generators]])
        window = self.sum(self.in_numbers(self.window))
        tensors = {}
        for name, module in self.modules.items():
            tensors |= {f"{name}.{key}": value for key, value in learnt_by(module).items()}
        for name, optimizer in self.optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"adam_{name}.{index}.{key}": x for key, x in moments.items()}
        if self.shards:  # every rank has a part of each
            tensors = {name: whole(x).to(self.host()) for name, x in tensors.items()}
        if self.rank > 0:
            return
        final = self.out_dir / f"checkpoint-{self.step}"
        temporary = final.with_name(".checkpoint.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # what a kill left of an earlier save
        check_space(final, tensors.values())
        temporary.mkdir()
        try:
            with whole_file(temporary / "tensors.safetensors") as path:
                save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path)
            state = {"step": self.step, "evaluated": self.evaluated, "seconds": self.seconds()}
            state |= {"state": vars(self.state), "scaler": self.scaler.state_dict()}
            state |= {"rng": rng, "window": window, "script": Path(sys.argv[0]).name}
            state["logs"] = {log.name: log.stat().st_size for log in self.out_dir.glob("*.jsonl")}
            write_json(temporary / "state.json", state)
            names = ("tensors.safetensors", "state.json")
            write_json(temporary / "sha256.json", {n: sha256(temporary / n) for n in names})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in self.out_dir.glob("checkpoint-*"):
            if path != final:
                shutil.rmtree(path)

    def save_or_stop(self):
        self.progress("steps", self.step, self.total)
        if self.due(self.cfg.save_every):
            self.save()
        self.stop_if_told()

    def stop_if_told(self):
        """SIGTERM to any rank: what was done is saved; --resume goes on to the same weights. All
        ranks ask at the same places, so all stop there."""
        if self.sum([len(stop_signals)])[0] > 0:
            self.save()
            self.wait()  # when one rank ends, torchrun ends the others: let rank 0 finish
            where = "" if self.total is None else f" at step {self.step}"
            self.say(f"stopped by SIGTERM{where}; --resume goes on from there")
            sys.exit(128 + signal.SIGTERM)

    def due(self, every):
        return self.step == self.total or (every > 0 and self.step % every == 0)

    def evaluation_due(self):
        """Once a step, also where a run was stopped after it."""
        return self.due(self.cfg.eval_every) and self.step > self.evaluated

    # Training.

    def parallel(self, model):
        """What a model is called through: its blocks compiled; with --shard cut over the ranks;
        else, where something learns, under DDP. Both average gradients over the ranks. What does
        not learn goes through it too, so that equal weights give equal numbers.

        Optimizers come after it, as cut weights are other tensors.
        """
        model.checkpoint_activations = self.cfg.checkpoint_activations
        if self.cfg.compile:
            for block in model.h:
                block.compile()
        if self.shards:
            half = {"param_dtype": self.dtype, "reduce_dtype": torch.float32} if self.mixed else {}
            mesh = init_device_mesh(self.device.type, (self.world,))
            for part in (*model.h, model):  # gathered when it is called, and freed after
                fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**half))
        elif self.world > 1 and any(p.requires_grad for p in model.parameters()):
            where = [self.device] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=where)
            self.wrapped.append(model)
        return model

    def micro_batches(self, mine, most, size, filler):
        """Yields (rows, weight): `mine` in lists of `size` (0: all), as many on every rank, `most`
        being the longest rank's. A rank without rows left gets [filler] and weight 0, as the others
        wait for its gradients: forward and backward stand in the loop's body. Gradients are
        averaged over the ranks in the last one alone."""
        begins = range(0, most, size or most)
        for begin in begins:
            self.progress("rows of an update", begin, most)
            for model in self.wrapped:
                model.require_backward_grad_sync = begin == begins[-1]  # as no_sync() does
            rows = mine[begin : begin + (size or most)]
            yield rows or [filler], float(bool(rows))

    def clip(self, optimizer, model, lines=()):
        """Unscales and clips a model's gradients -> their norm; ends the run where it isn't finite,
        naming the batch's `lines` (numbers among those that were kept).

        The norm is of gradients summed over ranks: all stop, or none. float16 may overflow: the
        scaler then skips the step and halves its scale.
        """
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.cfg.clip_norm)
        norm = whole(norm).item()
        if not math.isfinite(norm) and self.scaler.get_scale() <= 1:
            which = ", ".join(str(i + 1) for i in lines[:8])
            which = f" on lines {which}, ... (as numbered among those kept)" if lines else ""
            if self.rank == 0:
                print(
                    f"step {self.step}: the gradient's norm is {norm}{which}; stopped before the "
                    f"update; the last checkpoint is as it was",
                    file=sys.stderr,
                    flush=True,
                )
            sys.exit(1)
        return norm

    def count(self, **numbers):
        """Adds to the sums that the next printed line is about: numbers, or tensors of one, which
        stay on the device until then."""
        for name, x in numbers.items():
            self.window[name] += x.detach().to(self.wide) if torch.is_tensor(x) else x

    def in_numbers(self, window):
        """{name: number or tensor of one} -> {name: number}: the device is waited for once."""
        tensors = {name: x for name, x in window.items() if torch.is_tensor(x)}
        values = torch.stack(list(tensors.values())).tolist() if tensors else []
        return dict(window) | dict(zip(tensors, values, strict=True))

    def counted(self):
        """-> sums over all ranks of what was counted since the last call, and the seconds since."""
        sums, now = self.sum(self.in_numbers(self.window)), time.time()
        seconds, self.window, self.last = now - self.last, Counter(), now
        return sums, seconds

    def sampler(self, model):
        """What to sample with, in eval mode: a copy where weights are cut, or blocks compiled, and
        on a GPU in bfloat16, unless --dtype says otherwise, as sampling is bound by reading the
        weights."""
        half = self.device.type == "cuda" and self.mixed
        if not (half or self.shards or getattr(self.cfg, "compile", False)):
            return model.eval()
        return self.copied(model, torch.bfloat16 if half else self.precision, self.device)

    def copied(self, model, dtype, device):
        """A copy of a model, whole and with its adapters merged, in eval mode."""
        with torch.device("meta"):
            copy = GPT(model.config, model.score is not None)
        weights = {name: whole(x).to(device, dtype) for name, x in weights_of(model).items()}
        copy.load_state_dict(weights, assign=True)
        return copy.eval().requires_grad_(False)

    def host(self):
        """Where whole weights of cut ones go to be saved: on rank 0 alone they are something."""
        return "cpu" if self.rank == 0 else "meta"

    def place(self):
        """Where a model goes that was loaded: one that is cut goes on from there in its parts."""
        return "cpu" if self.shards else self.device

    def zeros(self, n):
        """Sums that begin, (n,)."""
        return torch.zeros(n, dtype=self.wide, device=self.device)

    def seconds(self):
        return round(self.earlier + time.time() - self.started, 1)

    def left(self):
        if self.step == self.first:
            return ""
        a_step = (time.time() - self.started) / (self.step - self.first)
        minutes, seconds = divmod(round(a_step * (self.total - self.step)), 60)
        return f"{minutes}:{seconds:02} left"

    def save_model(self, model, tokenizer, **extra):
        if self.shards:
            model = self.copied(model, self.precision, self.host())
        if self.rank == 0:
            save_model(self.out_dir, model, tokenizer, extra)

    def finish(self, report):
        """The last thing that a script does: report.json, whose presence says that all is done."""
        report = {"step": self.step, "seconds": self.seconds()} | report
        report["peak_memory_gib"] = round(peak_memory(self.device) / 2**30, 2)
        if self.rank == 0:
            write_json(self.out_dir / "report.json", report)
            for path in self.out_dir.glob("checkpoint-*"):
                shutil.rmtree(path)
            self.say(f"{self.out_dir}: finished in {report['seconds']:.0f} s")
        self.wait()  # no rank leaves while another still writes

    def leave(self):
        """Parts from the other ranks; what follows is rank 0's alone. Not once something was
        `parallel`: DDP would hold the group."""
        if self.world > 1:
            self.wait()
            dist.destroy_process_group()


def sources():
    """{name in a run's directory: path} of the sources that run."""
    here = Path(__file__).parent
    shared = {name: here / name for name in ("tokens.py", "model.py", "run.py", "feedback.py")}
    return {"script.py": sys.argv[0]} | {n: path for n, path in shared.items() if path.exists()}


def files_of(names):
    """Files, and of directories the weights, config.json and tokenizer."""
    found = []
    for path in [Path(name) for name in names if name]:
        if path.is_file():
            found.append(path)
        elif (path / "config.json").is_file():
            found += [*weight_files(path), path / "config.json"]
        found += [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    return list(map(str, found))


def with_nan(numbers):
    """{name: number} of a checkpoint, where JSON has null for what was no finite one."""
    return {name: math.nan if x is None else x for name, x in numbers.items()}


def contents_of(settings, sums):
    """Settings with what each input holds in the place of its name, which may be spelled otherwise,
    or have moved; the name may be part of a value, as in runs/sft@temperature=0. Under "" stands
    what all inputs hold."""
    held = {name: ",".join(files.values()) for name, files in sums.items() if files}

    def contents(value):
        if isinstance(value, list):
            return [contents(x) for x in value]
        if not isinstance(value, str):
            return value
        return held.get(value) or "".join(
            held.get(part, part) for part in re.split(r"(@(?=\w+=)|:)", value)
        )

    found = {name: contents(value) for name, value in settings.items()}
    return found | {"": sorted(set(held.values()))}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def peak_memory(device):
    """The most memory this process has held, bytes: on the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def learnt_by(module):
    """{name: tensor} of what a checkpoint holds of a module: all; but of one with adapters what
    learns, as the rest is --init's, whose sha256 args.json has."""
    state = module.state_dict()
    if not any(name.endswith(".B") for name in state):
        return state
    return {name: state[name] for name, p in module.named_parameters() if p.requires_grad}


def onto(device, *tensors):
    """Tensors of the CPU on a device, which is not waited for."""
    device = torch.device(device)
    pinned = (x.pin_memory() for x in tensors) if device.type == "cuda" else tensors
    return [x.to(device, non_blocking=True) for x in pinned]


def whole(x):
    """A tensor; of one that is cut over the ranks, its parts together: all ranks must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def cut_as(like, x):
    """x, cut over the ranks as `like` is, if that is and has its shape."""
    if not isinstance(like, DTensor) or x.shape != like.shape:
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def adam(model, lr, cfg):
    """AdamW of what learns; weight decay on matrices."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices, others = ([p for p in learning if (p.dim() == 2) == two] for two in (True, False))
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others}]
    how = {"betas": (0.9, cfg.adam_beta2), "eps": cfg.adam_eps, "weight_decay": 0.0}
    how["fused"] = learning[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, **how)


def schedule(step, total, cfg, peak=1.0):
    """The learning rate: linear warm-up to the peak, then a cosine to final_lr of it."""
    if step < cfg.warmup:
        return peak * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(total - cfg.warmup, 1)
    return peak * (cfg.final_lr + (1 - cfg.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def guarded(main):
    """Runs a script's main(). A disk, an interrupt or another rank that ends it leaves one line and
    a status other than 0; what was saved stays."""
    keep_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may lack a character, which ends no run
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        # What is left to the interpreter's end would now and then abort the process there, by
        # gloo's threads: DDP is part of a reference cycle, and holds the group.
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
    except OSError as error:  # a full disk, a folder that can't be written
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        print("interrupted; what was saved stays", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        # gloo's errors have no type of their own; NCCL's watchdog ends a rank without one.
        if not (stores and ("gloo" in str(error) or isinstance(error, dist.DistError))):
            raise
        forget_folder()
        silent, said = silent_ranks(), " ".join(str(error).splitlines())
        why = (
            f"no answer within --timeout_s from rank {silent}, or it is gone; what was saved stays"
        )
        sys.exit(
            f"rank {os.environ['RANK']}: {why if silent else 'ranks can not reach each other'} "
            f"({said if len(said) < 400 else said[:200] + ' ... ' + said[-200:]})"
        )


def keep_memory():
    """Tells glibc, where there is one, to keep what is freed: given back to the system, each large
    tensor's pages would be asked for, and filled with zeros, anew."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest that its manual allows
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


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


# --- JSON Lines -----------------------------------------------------------------------------------


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
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # with a mark, or not
                record = json.loads(text, parse_constant=refuse_constant)
                if not isinstance(record, dict):
                    refuse(f"{where}: line: expected an object, got {type(record).__name__}")
                try:
                    with_conversation(record)
                except ValueError as error:
                    refuse(f"{where}: prompt: {error}")
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


def with_conversation(record):
    """A JSON object with a prompt of messages as one of text, which knows its messages."""
    if isinstance(record.get("prompt"), list):
        record["prompt"] = Conversation(record["prompt"])
    return record


def write_jsonl(path, records):
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(plain(record, finite=True)) + "\n" for record in records)


def append_line(path, record):
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(record, finite=True)) + "\n")
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error}") from error
