"""What the experiments share. Each names the runs that it needs as command lines, and what to make
of their reports; here such commands are run, and intervals over seeds, tables and figures are
made.

    experiment(__doc__, runs, results)    # runs(seed) -> {name: command}; results(lab)

In commands and names E/ is the folder of all experiments' runs, `--out`: a run that several need is
made once. A command gets `--out_dir E/NAME`, and waits for those whose folders it names. It has
been run if its folder holds a report of this command, by the present code, on the present data.
"""

import argparse
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

# --- runs that several experiments need -----------------------------------------------------------

GOLD = "--gold data/toy.py"
SFT = f"sft.py {GOLD} --prompt_loss_weight 0.3 --num_prompts 200 --eval_every 0"
LINES = 1500, 4000, 12000  # of feedback, that reward models learn from
BEST = 12000  # whose reward model most use
# Curves need evaluations along a run, held-out demonstrations among them: what the policy forgets.
ALONG = "--eval_every 5 --ptx_validation data/toy/demonstrations_validation.jsonl"
# What evaluate.py judges needs none. Score and KL have settled long before iteration 30.
LATER = "--eval_every 0 --num_prompts 100"
SHORT = f"{LATER} --steps 30"
# The defaults of ppo.py and dpo.py, which choose.py has chosen among these.
PPO_BETA, DPO_BETA = 0.1, 0.3
PPO_BETAS = 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8
DPO_BETAS = 0.0375, 0.075, 0.15, 0.3, 0.6, 1.2


def feedback(seed):
    """SFT, where all policies start; rankings of its samples, to learn from and, on the test
    prompts, to be held to."""
    ask = f"annotate.py {GOLD} --policy E/sft-{seed} --seed {seed}"
    test = "--prompts data/toy/prompts_test.jsonl --num_prompts 1000"
    runs = {f"feedback-{seed}": ask, f"feedback-test-{seed}": f"{ask} {test}"}
    return {f"sft-{seed}": f"{SFT} --seed {seed}"} | runs


def rankings(seed, lines=BEST):
    """The first lines of the feedback, as a file."""
    text = f"head -n {lines} E/feedback-{seed}/rankings.jsonl > E/rankings-{lines}-{seed}.jsonl"
    return feedback(seed) | {f"rankings-{lines}-{seed}.jsonl": text}


def judging(seed, data, trunk="sft"):
    """A reward model that learns from a file, held to the test prompts' feedback."""
    flags = f"{GOLD} --init E/{trunk}-{seed} --data {data} --eval_every 0 --seed {seed}"
    return f"reward.py {flags} --validation E/feedback-test-{seed}/rankings.jsonl"


def reward_model(seed, lines=BEST):
    command = judging(seed, f"E/rankings-{lines}-{seed}.jsonl")
    return rankings(seed, lines) | {f"reward-{lines}-{seed}": command}


def start(seed, reward=f"E/reward-{BEST}"):
    """Flags of ppo.py and grpo.py: from SFT, against a reward model."""
    return f"{GOLD} --init E/sft-{seed} --reward {reward}-{seed} --seed {seed}"


def held(seed, lines=BEST):
    """PPO as it is by default."""
    command = f"ppo.py {start(seed, f'E/reward-{lines}')} {ALONG}"
    return reward_model(seed, lines) | {f"held-{lines}-{seed}": command}


def free(seed, lines=BEST):
    """PPO without a KL penalty; to place its best, evaluated at every iteration."""
    flags = f"{ALONG} --eval_every 1 --beta 0 --steps 80"  # the last --eval_every counts
    command = f"ppo.py {start(seed, f'E/reward-{lines}')} {flags}"
    return reward_model(seed, lines) | {f"free-{lines}-{seed}": command}


def ppo_at(seed, beta):
    command = f"ppo.py {start(seed)} {LATER} --beta {beta}"
    return reward_model(seed) | {f"ppo-{beta}-{seed}": command}


def dpo_at(seed, beta):
    flags = f"{GOLD} --init E/sft-{seed} --data E/rankings-{BEST}-{seed}.jsonl --seed {seed}"
    command = f'dpo.py {flags} --validation "" {LATER} --cache E/cache --beta {beta}'
    return rankings(seed) | {f"dpo-{beta}-{seed}": command}


def chosen(seed):
    """SFT goes on with the best response of each ranking."""
    best = f"data/convert.py best E/feedback-{seed}/rankings.jsonl E/chosen-{seed}.jsonl"
    flags = f"{GOLD} --init E/sft-{seed} --data E/chosen-{seed}.jsonl --seed {seed} --lr 5e-4"
    runs = {f"chosen-{seed}.jsonl": best, f"chosen-{seed}": f"sft.py {flags} {LATER}"}
    return feedback(seed) | runs


def best_of(seed, lines=BEST):
    """Best-of-n of SFT's samples, for n up to 32, on 500 prompts."""
    flags = f"{GOLD} --policies E/sft-{seed} --proxy E/reward-{lines}-{seed} --best_of_n 32"
    flags += f" --num_samples 1 --num_prompts 500 --seed {seed}"
    return reward_model(seed, lines) | {f"best-of-{lines}-{seed}": f"evaluate.py {flags}"}


def against(seed, policies, flags="--num_samples 1 --bootstrap 200"):
    """Evaluates policies on the same prompts, the first of them SFT."""
    policies = ",".join([f"E/sft-{seed}", *policies])
    return f"evaluate.py {GOLD} --seed {seed} {flags} --policies {policies}"


# --- what an experiment does ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lab:
    out: str  # the folder of all runs, E/
    seeds: tuple
    jobs: int
    quick: bool


def experiment(doc, runs, results):
    """Runs what has not been run, for each seed; then `results` writes tables and figures."""
    lab = flags(doc)
    os.chdir(ROOT)
    Path(lab.out, "figures").mkdir(parents=True, exist_ok=True)
    lock = os.open(Path(lab.out, "lock"), os.O_CREAT | os.O_RDWR)  # held until the end
    fcntl.flock(lock, fcntl.LOCK_EX)  # another experiment makes the same runs: wait for it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    commands = {}
    for seed in lab.seeds:
        commands |= runs(seed)
    begun = time.time()
    write_task(commands)
    make(lab, commands)
    results(lab)
    print(f"{lab.out}/figures: {time.time() - begun:.0f} s", flush=True)


def flags(doc):
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of all work")
    parser.add_argument("--seeds", help="by commas (default: 0,1,2; with --quick 0)")
    parser.add_argument("--jobs", type=int, help="runs at a time, on all cores (default: cores)")
    parser.add_argument("--out", help="folder of runs (default: runs/experiments, or runs/quick)")
    found = parser.parse_args()
    out = Path(found.out or ROOT / "runs" / ("quick" if found.quick else "experiments")).resolve()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    try:
        seeds = tuple(map(int, (found.seeds or ("0" if found.quick else "0,1,2")).split(",")))
    except ValueError:
        parser.error(f"--seeds {found.seeds}: expected numbers by commas")
    return Lab(str(out), seeds, found.jobs or len(os.sched_getaffinity(0)), found.quick)


def write_task(commands):
    """The embedded task's files, where they are missing or of an older toy.py."""
    for name, more in {"bpe.tiktoken": [], "judge.jsonl": ["--judge"]}.items():
        script, file = Path("data/toy.py"), Path("data/toy", name)
        needed = not more or any(str(file) in command for command in commands.values())
        if needed and not (file.exists() and file.stat().st_mtime >= script.stat().st_mtime):
            subprocess.run([sys.executable, script, *more], check=True)


# --- running commands -----------------------------------------------------------------------------


def make(lab, commands):
    """Runs what has not been run, lab.jobs commands at a time, each when what it names is there."""
    needs = {name: needed(name, command, commands) for name, command in commands.items()}
    waiting, running, refused = dict(commands), {}, set()
    try:
        while waiting or running:
            unmade = waiting.keys() | running.keys()
            ready = [name for name in waiting if not needs[name] & unmade]
            for name in ready[: lab.jobs - len(running)]:
                process = begin(lab, name, waiting.pop(name), name in refused)
                if process:
                    running[name] = process, time.time()
            for name, (process, begun) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode == 2 and "--resume" in process.args:
                    waiting[name] = commands[name]  # it can't go on, and begins anew
                    refused.add(name)
                else:
                    check(lab, name, process, time.time() - begun)
            time.sleep(0.05)
    finally:  # when one fails, or at Ctrl-C: the others save, and go on next time
        for process, _ in running.values():
            process.terminate()
            process.wait()


def needed(name, command, commands):
    """Names of the other commands whose results this one reads."""
    named = re.findall(r"(?<![\w/])E/([\w.+-]+)", command)
    return {other for other in named if other in commands and other != name}


def begin(lab, name, command, anew=False):
    """Starts what is to be run -> its process, None where it has been run."""
    command = tenth(command) if lab.quick else command
    command = re.sub(r"(?<![\w/])E/", shlex.quote(lab.out) + "/", command)
    if name.endswith(".jsonl"):  # a file made of others
        if is_newest(Path(lab.out, name), command):
            return None
        words = shlex.split(command) if ".py" in command else ["sh", "-c", command]
    else:
        words = [*shlex.split(command), "--out_dir", f"{lab.out}/{name}"]
        state = state_of(Path(lab.out, name), words)
        if state == "done":
            return None
        words.append("--resume" if state == "unfinished" and not anew else "--overwrite")
    words = words if words[0] == "sh" else [sys.executable, *words]
    print("$", " ".join(words), flush=True)
    with open(log_of(lab, name), "w") as log:
        threads = max(len(os.sched_getaffinity(0)) // lab.jobs, 1)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment)


def is_newest(file, command):
    """Whether a file is there and newer than all that its command names."""
    named = [Path(word) for word in shlex.split(command) if Path(word).exists()]
    named = [path / "report.json" if path.is_dir() else path for path in named]
    times = [path.stat().st_mtime for path in named if path != file]
    return file.exists() and file.stat().st_mtime >= max(times)


def state_of(folder, words):
    """Of a run's folder: "done"; "unfinished", but of this command, the present code and data;
    "other"."""
    words = words[1:] if words[0].startswith("experiments/") else words  # which starts a script
    try:
        args = json.loads((folder / "args.json").read_text())
        kept = [word for word in args["command"] if word not in ("--resume", "--overwrite")]
        sums = {file: x for found in args["inputs"].values() for file, x in found.items()}
        sums |= {words[0]: sha256(folder / "script.py")}
        shared = ("tokens.py", "model.py", "run.py", "feedback.py")
        sums |= {name: sha256(folder / name) for name in shared}
        if kept != words or any(sha256(ROOT / path) != known for path, known in sums.items()):
            return "other"
    except (OSError, ValueError, LookupError):
        return "other"
    return "done" if (folder / "report.json").exists() else "unfinished"


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def log_of(lab, name):
    folder = Path(lab.out, "logs")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.txt"


def check(lab, name, process, seconds):
    """Ends everything where a command failed, with its last words."""
    if process.returncode:
        if name.endswith(".jsonl"):
            Path(lab.out, name).unlink(missing_ok=True)  # half of a file
        print("\n".join(log_of(lab, name).read_text("utf-8").splitlines()[-12:]), file=sys.stderr)
        sys.exit(f"{name}: exit status {process.returncode}; all it said: {log_of(lab, name)}")
    if not name.endswith(".jsonl"):
        print(f"{name}: {seconds:.0f} s", flush=True)


# How much there is of what a quick run does a tenth of, where a command doesn't say it.
WHOLE = {
    "sft.py": {"epochs": 1.0, "num_prompts": 1000},
    "annotate.py": {"num_prompts": 12000},
    "reward.py": {"num_prompts": 1024},
    "ppo.py": {"steps": 50, "eval_every": 10, "num_prompts": 1000},
    "grpo.py": {"steps": 50, "eval_every": 10, "num_prompts": 1000},
    "dpo.py": {"num_prompts": 1000},
    "collapse.py": {"epochs": 80.0, "eval_every": 40, "num_prompts": 1024},
    "evaluate.py": {"num_prompts": 1000},
}


def tenth(command):
    """The command with a tenth of its steps, prompts and lines."""
    for script, whole in WHOLE.items():
        if f"{script} --" in command:  # and no sub-command of it
            more = [f" --{flag} {x}" for flag, x in whole.items() if f"--{flag} " not in command]
            command += "".join(more)

    def less(match):
        flag, text = match.groups()
        whole = max(int(float(text)) // 10, min(int(float(text)), 1))
        return f"{flag} {float(text) / 10 if '.' in text else whole}"

    return re.sub(
        r"(--(?:steps|epochs|rounds|num_prompts|eval_every)|head -n) (\S+)", less, command
    )


# --- reading what runs have found -----------------------------------------------------------------


def path_of(lab, name, seed):
    """A run or policy by its name, in which * stands for the seed."""
    return name.replace("E/", f"{lab.out}/").replace("*", str(seed))


def reports(lab, name):
    """The report.json of a run, for each seed."""
    paths = [Path(path_of(lab, name, seed), "report.json") for seed in lab.seeds]
    return [json.loads(path.read_text("utf-8")) for path in paths]


def prices(lab, name):
    """For each seed a run's beta in units of its reward model's raw score; [] where it has none."""
    found = [report.get("price_of_kl") for report in reports(lab, name)]
    return [] if None in found else found


def policies(lab, evaluation, name):
    """For each seed {column: number or [mean, low, high]} of a policy in an evaluation's report:
    wins against the first policy by gold, parts as PART and TASK_PART, gold of a task as TASK_gold,
    over the first policy's as TASK_over."""
    return [
        policy_numbers(report, path_of(lab, name, seed))
        for seed, report in zip(lab.seeds, reports(lab, evaluation), strict=True)
    ]


def policy_numbers(report, name):
    known, first, found = report["policies"][name], next(iter(report["policies"])), {}
    for part, tasks in report["parts_by_task"].items():
        for task, table in tasks.items():
            if name in table:
                found[part if task == "all" else f"{task}_{part}"] = table[name]["mean"]
    found |= {k: v for k, v in known.items() if isinstance(v, int | float | list)}
    found |= known["scores"]
    for task, table in report["by_task"].get("gold", {}).items():
        found |= {f"{task}_gold": table[name]["score"], f"{task}_over": table[name]["over_first"]}
    wins = report["win_rate"].get("gold", {}).get(name, {})
    found["wins"] = 0.5 if name == first else wins.get(first)
    if found.get("kl"):
        found["sqrt_kl"] = math.sqrt(max(number(found["kl"]), 0.0))
    return {k: v for k, v in found.items() if v is not None and v != []}


def best_of_rows(lab, evaluation):
    """For each seed the rows of its best-of-n curve, n being the step."""
    rows = [report["best_of_n"] for report in reports(lab, evaluation)]
    return [
        [row | {"step": row["n"], "sqrt_kl": math.sqrt(row["kl"])} for row in curve]
        for curve in rows
    ]


def evaluations(lab, name, of="eval_"):
    """For each seed the lines {"step", column: number} of a run's evaluations, whose names begin
    with `of`: of the first 10 steps, every fifth, and the last, if there are more."""
    found = []
    for seed in lab.seeds:
        lines = {}
        for text in Path(path_of(lab, name, seed), "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            numbers = {k: x for k, x in line.items() if k.startswith(of) and x is not None}
            if numbers:
                found_at = lines.setdefault(line["step"], {"step": line["step"]})
                found_at |= {k.removeprefix(of): x for k, x in numbers.items()}
        for line in lines.values():
            line["sqrt_kl"] = math.sqrt(max(line.get("kl", 0.0), 0.0))
        steps = [s for s in sorted(lines) if s <= 10 or s % 5 == 0 or s == max(lines)]
        found.append([lines[step] for step in steps])
    return found


PROMPTS = "data/toy/prompts_{}.jsonl"


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


@functools.cache
def toy():
    """data/toy.py, which knows gold, and what a prompt is about."""
    sys.path.append(str(ROOT / "data"))
    return importlib.import_module("toy")


def topics_of(lines):
    """What each prompt is about; a post is a topic of its own."""
    return [toy().read_prompt(x["prompt"]).get("topic", x["prompt"]) for x in lines]


def tasks_of(lines, by="task"):
    """{task, or another field of the prompts: their numbers}."""
    return {
        task: [n for n, line in enumerate(lines) if line[by] == task]
        for task in sorted({line[by] for line in lines})
    }


def golds(lab, evaluation, name, split="test"):
    """Gold of a policy in an evaluation by prompt, (seeds, prompts), a mean over its responses.
    Samples files leave out empty responses: they score 0."""
    table = []
    for seed, report in zip(lab.seeds, reports(lab, evaluation), strict=True):
        policy = path_of(lab, name, seed)
        file = f"samples-{list(report['policies']).index(policy)}.jsonl"
        lines = read_lines(Path(path_of(lab, evaluation, seed), file))
        said = {line["prompt"]: line["responses"] for line in lines}
        count = report["policies"][policy]["samples"] / report["prompts"]
        prompts = [line["prompt"] for line in read_lines(PROMPTS.format(split))]
        totals = [
            sum(toy().score(prompt, response) for response in said.get(prompt, ()))
            for prompt in prompts[: report["prompts"]]
        ]
        table.append(np.array(totals) / count)
    return np.array(table)


# --- statistics -----------------------------------------------------------------------------------

# Student's t, 97.5%, by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MARGIN = 0.2  # gold points: what is surely less makes no difference here


def number(value):
    """A number, or the mean of [mean, low, high]."""
    return float(value[0] if isinstance(value, list) else value)


def student(freedom):
    """Student's t; between whole degrees of freedom on a straight line, which is a little more."""
    if freedom > len(STUDENT):
        return 1.96 + 2.4 / freedom
    return float(np.interp(freedom, range(1, len(STUDENT) + 1), STUDENT))


# What a quantity of such a name is within, unless it is what one has over another.
RATES = "wins|accuracy|agrees|harmless|helpful|refused|complied|position|distinct|different|eos"
COUNTS = "made_up|outside|rude|filler|repeated|tokens|words|entropy|kl|nll|std|error|ece|seconds"
BOUNDS = {RATES: (0.0, 1.0), COUNTS: (0.0, math.inf)}


def over_seeds(values, name=""):
    """[mean, low, high] over seeds, 95% by Student's t, as far as a quantity of that name can be;
    a single seed has no interval."""
    values = [number(value) for value in values]
    mean, freedom = float(np.mean(values)), len(values) - 1
    if not freedom:
        return [mean, None, None]
    half = student(freedom) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    known = [x for names, x in BOUNDS.items() if re.search(names, name) and "over" not in name]
    least, most = known[0] if known else (-math.inf, math.inf)
    return [mean, min(mean, max(mean - half, least)), max(mean, min(mean + half, most))]


def mean_and_error(values, topics=None):
    """Mean of values (seeds, prompts), its standard error and degrees of freedom, seeds and prompts
    both being drawn at random: the seeds have the same prompts, and each its own policies.

    The mean square of seeds, plus that of prompts, less the residual's, which is in both; the
    larger of the two where that is less. Freedom by Satterthwaite; 0 of a single number. topics: of
    each prompt; prompts on one topic are one draw. A single seed: over prompts.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = values.mean()
    if topics is not None:  # (seeds, topics): each as large as its prompts make it
        names, which = np.unique(topics, return_inverse=True)
        shares = (which[:, None] == np.arange(len(names))) * (len(names) / len(which))
        values = mean + (values - mean) @ shares
    by_seed, by_prompt = values.mean(1, keepdims=True) - mean, values.mean(0) - mean
    seeds, prompts = (max(n - 1, 1) for n in values.shape)  # their degrees of freedom
    of_seeds = values.shape[1] * (by_seed**2).sum() / seeds  # mean squares
    of_prompts = values.shape[0] * (by_prompt**2).sum() / prompts
    rest = ((values - mean - by_seed - by_prompt) ** 2).sum() / (seeds * prompts)
    total, freedom = max((of_seeds, seeds), (of_prompts, prompts))
    both = of_seeds + of_prompts - rest
    if both > total:
        parts = of_seeds**2 / seeds + of_prompts**2 / prompts + rest**2 / (seeds * prompts)
        total, freedom = both, max(both**2 / parts, min(seeds, prompts))
    return float(mean), math.sqrt(total / values.size), freedom if values.size > 1 else 0


def within(values, tasks):
    """Values (seeds, prompts) whose tasks all have the mean of all: for errors of a mean over tasks
    that have as many prompts as they have, and are not drawn."""
    level = np.zeros(values.shape[1])
    for of in tasks.values():
        level[of] = values[:, of].mean()
    return values - level + values.mean()


def over_both(values, topics=None):
    """[mean, low, high], 95%, over seeds and prompts, or topics: see `mean_and_error`."""
    mean, error, freedom = mean_and_error(values, topics)
    half = student(freedom) * error
    return [mean, mean - half, mean + half] if freedom else [mean, None, None]


def verdict(interval):
    """What the interval of a difference in gold says: equivalent, where all of it is within MARGIN;
    different, where 0 is outside; undecided."""
    _, low, high = interval
    if low is None:
        return "undecided"
    if max(-low, high) < MARGIN:
        return "equivalent"
    return "different" if low > 0 or high < 0 else "undecided"


def columns_of(groups, names):
    """{label: {column: [mean, low, high]}} of groups {label: [{column: number}, a seed]}; and the
    same of what each has over the first group, seed by seed: seeds differ more from one another
    than groups do in a seed."""
    table, over, first = {}, {}, next(iter(groups.values()))
    for label, seeds in groups.items():
        table[label], over[label] = {}, {}
        for name in (n for n in names if all(n in found for found in seeds)):
            values = [number(found[name]) for found in seeds]
            table[label][name] = over_seeds(values, name)
            if all(name in found for found in first):
                beside = [number(found[name]) for found in first]
                over[label][name] = over_seeds(np.subtract(values, beside))
    return table, over


def along(seeds, columns):
    """{"step": the steps that all seeds have, column: [mean, low, high] at each}, of seeds' lines
    {"step", column: number}."""
    by_step = [{line["step"]: line for line in lines} for lines in seeds]
    steps = sorted(set.intersection(*map(set, by_step)))
    found = {c: [over_seeds([lines[s][c] for lines in by_step], c) for s in steps] for c in columns}
    return found | {"steps": steps, "seeds": seeds}


def least_squares(columns, y):
    """y = columns @ coefficients + noise of one variance -> coefficients, their standard errors.
    ValueError when the columns (n, k), n > k, do not tell them apart."""
    columns, y = np.asarray(columns, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n, k = columns.shape
    if n <= k or np.linalg.matrix_rank(columns) < k:
        raise ValueError(f"{n} runs do not determine {k} coefficients")
    coefficients = np.linalg.lstsq(columns, y, rcond=None)[0]
    variance = ((y - columns @ coefficients) ** 2).sum() / (n - k)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(columns.T @ columns)))
    return coefficients, errors


def gao_law(points, best_of):
    """The law of Gao et al. (arXiv:2210.10760) that is nearest to points (d, R), d the square root
    of the KL, R the score gained: R = d (a - b d) of best-of-n, d (a - b log d) of RL -> a, b.
    Points of one run share prompts and a start: what a and b are worth, seeds tell."""
    d, R = np.asarray(points, dtype=np.float64).reshape(-1, 2).T
    if len(d) < 3 or d.max() < 1.3 * d.min():
        raise ValueError("its distances do not tell a from b")
    bend = d**2 if best_of else d * np.log(d)
    (a, b), _ = least_squares(np.stack([d, -bend], 1), R)
    return float(a), float(b)


def gained(lines, column):
    """(d, R) of a run's evaluations: the square root of the KL, and what the column has gained."""
    first = number(lines[0][column])
    return [(x["sqrt_kl"], number(x[column]) - first) for x in lines[1:] if x["sqrt_kl"] > 0]


# --- tables ---------------------------------------------------------------------------------------


def interval_text(value, digits=2):
    """A number, or [mean, low, high], as text; "" for None."""
    if value is None:
        return ""
    mean, low, high = value if isinstance(value, list) else (value, None, None)
    text = f"{mean:.{digits}f}"
    return text if low is None else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown(cells):
    """Rows of cells, the first the heads, as a Markdown table."""
    lines = ["| " + " | ".join(" ".join(str(x).split()) for x in row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]


def write(lab, name, result, lines):
    """figures/NAME.json and .md, which is printed too."""
    path = Path(lab.out, "figures", name)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(["", *lines, f"{path}.md, {path}.json"]), flush=True)


OVER_SEEDS = "Brackets: 95% over the seeds, which share the data and the prompts."
WORDS = f"equivalent: all of it within {MARGIN} points; different: 0 is outside; else undecided."
OVER_BOTH = f"""Brackets: 95%, seeds and each task's prompts both drawn at random; the seeds share
the data and the prompts. By topic, and in all prompts, those on one topic are one draw. {WORDS}"""


def gains(lab, name, pairs, by="task", split="test"):
    """A table of differences in gold {label: (seeds, prompts)}, paired by prompt and seed, over all
    prompts and by a field of theirs, with the word of each."""
    cells, result = [["gold"]], {}
    for label, values in pairs.items():
        lines = read_lines(PROMPTS.format(split))[: values.shape[1]]
        topics, tasks = topics_of(lines), tasks_of(lines, by)
        found = {f"all {len(lines)} prompts": over_both(within(values, tasks), topics)}
        for task, of in tasks.items():
            count = len({topics[n] for n in of})
            found[f"{task}: {len(of)} prompts"] = over_both(values[:, of])
            if count < len(of):
                some = over_both(values[:, of], [topics[n] for n in of])
                found[f"{task}: {count} topics"] = some
        texts = [f"{interval_text(x)} {verdict(x)}" for x in found.values()]
        cells[0], result[label] = ["gold", *found], found
        cells.append([label, *texts])
    write(lab, name, result, [*markdown(cells), "", OVER_BOTH])


def by_seed(lab, name, rows, digits=2, differences=()):
    """A table of quantities {label: [number or [mean, low, high], a seed]}, and their means over
    the seeds, with a word where they are differences in gold."""
    cells = [["", *(f"seed {seed}" for seed in lab.seeds), "over seeds"]]
    for label, values in rows.items():
        every = [*values, over_seeds(values, label)]
        cells.append([label, *(interval_text(x, digits) for x in every)])
        if label in differences:
            cells[-1][-1] += f" {verdict(over_seeds(values))}"
    notes = ["Of a seed they are over prompts.", *([WORDS] if differences else [])]
    result = {"seeds": lab.seeds, "rows": rows}
    write(lab, name, result, [*markdown(cells), "", OVER_SEEDS, *notes])


def rows(lab, name, groups, columns, title, differences=True):
    """A table of groups {label: [{column: number}, a seed]}, with what each has over the first, but
    for gold, of which prompts tell more: `gains`; and its figure, a panel a column."""
    table, over = columns_of(groups, columns)
    others = [column for column in columns if differences and not column.endswith(IN_POINTS)]
    heads, first = [title_of(column) for column in columns], next(iter(groups))
    cells = [["", *heads, *(f"{title_of(column)}, over {first}" for column in others)]]
    for label in groups:
        found = [table[label].get(column) for column in columns]
        found += [over[label].get(column) for column in others]
        cells.append([label, *(interval_text(value, 3) for value in found)])
    result = {"columns": table, "over_first": over, "seeds": groups}
    write(lab, name, result, [*markdown(cells), "", OVER_SEEDS])
    draw_rows(lab, name, groups, columns, title)


def points(lab, name, groups, x, y, title, x_label=""):
    """A table of groups {METHOD:LABEL: [{column: number}, a seed]}, and a figure: a point a group,
    a line a method, a panel for each of y. x: a column, or "label", a number after the colon."""
    if x == "label":
        for label, seeds in groups.items():
            groups[label] = [found | {x: float(label.partition(":")[2])} for found in seeds]
    columns = [x, *y, *(["kl"] if x == "sqrt_kl" else [])]
    table, _ = columns_of(groups, columns)
    cells = [["", *map(title_of, columns)]]
    for label, found in table.items():
        cells.append([label, *(interval_text(found[column], 3) for column in columns)])
    result = {"columns": table, "seeds": groups}
    write(lab, name, result, [*markdown(cells), "", OVER_SEEDS])
    draw_points(lab, name, table, x, y, title, x_label)


def curves(lab, name, groups, x, y, title, fit="", y_labels=(), over=""):
    """A table of groups {label: [[{"step", column: number}, an evaluation], a seed]}, and a figure:
    a line a group, a panel for each of y, against x. `fit`: that of y to which Gao's laws are
    fitted; `over`: the group whose last gold the others' is compared with."""
    result, cells, notes = {}, [[""]], [OVER_SEEDS]
    for column in y:
        extreme = "lowest" if column in LESS_IS_BETTER else "highest"
        cells[0] += [f"{column} at first", f"{extreme} mean {column}, at {x}", f"{column} at last"]
    cells[0] += [f"{x} at last"] if x != "step" else []
    for label, seeds in groups.items():
        result[label] = found = along(seeds, [x, *y])
        cells.append([label])
        for column in y:
            means = [value[0] for value in found[column]]
            best = means.index(min(means) if column in LESS_IS_BETTER else max(means))
            where = f"{interval_text(found[column][best])} at {found[x][best][0]:.3g}"
            ends = [interval_text(found[column][i]) for i in (0, -1)]
            cells[-1] += [ends[0], where, ends[1]]
        cells[-1] += [interval_text(found[x][-1])] if x != "step" else []
        if fit:
            notes += ["", f"{label}: {fit_law(found, seeds, fit)}"]
    for label in [label for label in groups if over and label != over]:
        gap = over_seeds(np.subtract(*(last_gold(result[x]) for x in (label, over))))
        text = f"{label}, gold at last over {over}: {interval_text(gap)} {verdict(gap)}"
        notes += ["", text]
    notes += ["", WORDS] if over else []
    write(lab, name, result, [*markdown(cells), "", *notes])
    draw_curves(lab, name, result, x, y, title, fit, y_labels)


def last_gold(found):
    """Gold of each seed at the last step that all have."""
    return [
        number(line["gold"])
        for lines in found["seeds"]
        for line in lines
        if line["step"] == found["steps"][-1]
    ]


def fit_law(found, seeds, column):
    """Enters Gao's law into a group of curves -> what it is, in words."""
    best_of = "n" in seeds[0][0]
    try:
        laws = [gao_law(gained(lines, column), best_of) for lines in seeds]
    except ValueError as error:
        return f"no law of {column}: {error}"
    a, b = (over_seeds(values) for values in zip(*laws, strict=True))
    found["law"] = {"a": a, "b": b, "best_of": best_of}
    law, a, b = "d" if best_of else "log d", interval_text(a, 3), interval_text(b, 3)
    return f"{column} gained = d (a - b {law}): a {a}, b {b}"


# --- figures --------------------------------------------------------------------------------------

MARKERS, DASHES = "osD^vP*X<>", ("-", "--", "-.", ":")  # told apart in greyscale too
LESS_IS_BETTER = ("nll", "kl")
IN_POINTS = ("gold", "_over")
TITLES = {
    "step": "iteration",
    "kl": "KL to the start (nats a sequence)",
    "sqrt_kl": "square root of KL to the start (nats a sequence)",
    "gold": "gold score (points)",
    "greedy_gold": "gold of greedy responses",
    "entropy": "entropy of a response (nats)",
    "distinct_1": "different words (share of all)",
    "distinct_2": "different pairs of words (share)",
    "distinct_2_a_prompt": "different pairs of words,\nto a prompt (share)",
    "different_a_prompt": "different responses\nto a prompt (share)",
    "entropy_2": "entropy of pairs of words (nats)",
    "entropy_2_a_prompt": "entropy of pairs of words,\nto a prompt (nats)",
    "training_seconds": "training (seconds)",
    "proxy": "score that was optimised",
    "wins": "wins against the start by gold",
    "greedy_wins": "wins of greedy responses",
    "corpus_bleu": "BLEU, all as one corpus",
    "data/bleu.py": "smoothed BLEU of sentences",
    "harmful_harmless": "harmless, harmful requests",
    "benign_helpful": "helpful, benign requests",
    "benign_refused": "refused, benign requests",
    "nll": "held-out demonstrations (nats a token)",
}


def title_of(column):
    task, _, what = column.rpartition("_")
    texts = {"gold": f"gold, {task} prompts", "over": f"gold over SFT's, {task} prompts"}
    return TITLES.get(column) or texts.get(what) or column.replace("_", " ")


def half_of(value):
    """Half the width of an interval, 0 where there is none."""
    return 0.0 if value[2] is None else value[2] - value[0]


def sides_of(values):
    """How far intervals [mean, low, high] reach down, and up, (2, N); 0 where there are none."""
    middle, *limits = np.array(values, dtype=np.float64).T  # None becomes NaN
    return np.nan_to_num([middle - limits[0], limits[1] - middle])


def pyplot():
    """matplotlib.pyplot, drawing to files alone; None, and a line that says so, without it."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(lab, name, figure, title, legend=None):
    """figures/NAME.png, with one legend below all panels: that of the panel `legend`."""
    figure.suptitle(title, fontsize=11)
    bottom = 0.0
    if legend:
        handles, labels = legend.get_legend_handles_labels()
        count = min(len(labels), 3)
        figure.legend(handles, labels, loc="lower center", ncols=count, fontsize=9)
        lines = math.ceil(len(labels) / count)
        bottom = (0.1 + 0.22 * lines) / figure.get_figheight()
    figure.tight_layout(rect=(0, bottom, 1, 1))
    path = Path(lab.out, "figures", f"{name}.png")
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
    print(path, flush=True)


def draw_rows(lab, name, groups, columns, title):
    """Groups below one another: a dot and its interval, blue strokes the seeds; dotted: the first
    group's."""
    plt, (table, _) = pyplot(), columns_of(groups, columns)
    if plt is None:
        return
    down = math.ceil(len(columns) / 5)
    across = math.ceil(len(columns) / down)
    size = (2 + 2.4 * across, 0.5 + (1 + 0.36 * len(groups)) * down)
    figure, panels = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False)
    heights = {label: len(groups) - n for n, label in enumerate(groups)}
    for panel in panels.flat[len(columns) :]:
        panel.axis("off")
    for panel, column in zip(panels.flat, columns, strict=False):
        known = [label for label in groups if column in table[label]]
        for label in known:
            value, y = table[label][column], heights[label]
            panel.errorbar(value[0], y, xerr=sides_of([value]), fmt="ko", capsize=3, markersize=4)
            seeds = [number(found[column]) for found in groups[label]]
            panel.plot(seeds, [y] * len(seeds), "|", color="C0", markersize=9)
        if known and known[0] == next(iter(groups)):
            panel.axvline(table[known[0]][column][0], color="grey", linewidth=0.8, linestyle=":")
        panel.set_title(title_of(column), fontsize=8)
        panel.set_yticks(list(heights.values()), list(heights))
        panel.set_ylim(0.4, len(groups) + 0.6)
        panel.locator_params(axis="x", nbins=4)
        low, high = panel.get_xlim()
        if high - low < 1e-9:  # all alike
            panel.set_xlim(low - 0.5, high + 0.5)
        panel.grid(alpha=0.3, axis="x")
    save(lab, name, figure, title)


def draw_points(lab, name, table, x, y, title, x_label):
    plt = pyplot()
    if plt is None:
        return
    size = (max(6.5, 5 * len(y)), 4.8)
    figure, panels = plt.subplots(1, len(y), figsize=size, squeeze=False)
    methods = list(dict.fromkeys(label.partition(":")[0] for label in table))
    for panel, column in zip(panels[0], y, strict=True):
        for n, method in enumerate(methods):
            labels = [label for label in table if label.partition(":")[0] == method]
            labels.sort(key=lambda label: table[label][x][0])  # the order of their line
            middle = [[table[label][c][0] for label in labels] for c in (x, column)]
            bars = [sides_of([table[label][c] for label in labels]) for c in (x, column)]
            look = {"color": f"C{n}", "linestyle": DASHES[n % 4], "marker": MARKERS[n % 10]}
            panel.errorbar(*middle, bars[1], bars[0], capsize=3, label=method, **look)
            place = {"xytext": (4, 5 - 14 * (n % 2)), "textcoords": "offset points"}
            for label, *where in zip(labels, *middle, strict=True) if x != "label" else ():
                text = label.partition(":")[2]  # above the point, below the next method's
                panel.annotate(text, where, color=f"C{n}", fontsize=8, **place)
        panel.set_xlabel(x_label or title_of(x))
        panel.set_ylabel(title_of(column))
        panel.grid(alpha=0.3)
    save(lab, name, figure, title, legend=panels[0][0])


def draw_curves(lab, name, result, x, y, title, fit, y_labels):
    """Means with their intervals, thin lines the seeds; thin and smooth: fitted laws."""
    plt = pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(1, len(y), figsize=(5.2 * len(y), 4.2), squeeze=False)
    for panel, column, text in zip(panels[0], y, y_labels or map(title_of, y), strict=True):
        for n, (label, found) in enumerate(result.items()):
            look = {"color": f"C{n}", "linestyle": DASHES[n % 4], "marker": MARKERS[n % 10]}
            middle = [[value[0] for value in found[c]] for c in (x, column)]
            panel.plot(*middle, markersize=4, label=label, **look)
            if len(found["seeds"]) > 1:
                draw_seeds(panel, found, middle, x, column, f"C{n}")
            if column == fit and "law" in found:
                law, d = found["law"], np.linspace(0.05, max(middle[0]), 100)
                bent = law["b"][0] * (d if law["best_of"] else np.log(d))
                law = middle[1][0] + d * (law["a"][0] - bent)
                panel.plot(d, law, color=f"C{n}", linewidth=0.8)
        middles = [value[0] for found in result.values() for value in found[column]]
        room = 0.3 * (max(middles) - min(middles)) or 1.0
        panel.set_ylim(min(middles) - room, max(middles) + room)
        panel.set_xlabel(title_of(x))
        panel.set_ylabel(text)
        panel.grid(alpha=0.3)
    save(lab, name, figure, title, legend=panels[0][0])


def draw_seeds(panel, found, middle, x, column, colour):
    for lines in found["seeds"]:
        pairs = [(number(line[x]), number(line[column])) for line in lines]
        panel.plot(*zip(*pairs, strict=True), color=colour, linewidth=0.7, alpha=0.4)
    low, high = ([value[side] for value in found[column]] for side in (1, 2))
    if x == "sqrt_kl":  # which may fall again: a band would fold over itself
        last = sides_of(found[column][-1:])
        panel.errorbar(middle[0][-1:], middle[1][-1:], last, color=colour, capsize=3)
    else:
        panel.fill_between(middle[0], low, high, color=colour, alpha=0.12)
