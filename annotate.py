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

import dataclasses
import itertools
import json
import math
import os
import select
import shutil
import signal
import sys
import textwrap
import zlib
from contextlib import contextmanager
from typing import Annotated, Literal

import numpy as np
import torch

from feedback import (
    bare, check_field, connected, fit_ratings, grade_of, grouped_rate, load_policy, load_python,
    read_preferences, read_responses, told,
)  # fmt: skip
from model import generate
from run import Run, RunFlags, flags, guarded, read_jsonl, refuse, write_jsonl
from tokens import encode, response_of, write_json

# --- mathematics ----------------------------------------------------------------------------------

GRADES = ("negligibly better, or unsure", "slightly better", "better", "significantly better")
ELO = 400 / math.log(10)  # points of Elo's scale in one nat of log-odds


def noisy(values, scale, rng):
    """u = values + scale * g, g ~ Gumbel(0, 1), (K,). In the order of u they follow Plackett and
    Luce's law, with weights exp(values / scale): arXiv:1401.1003."""
    return values + scale * rng.gumbel(size=len(values))


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
    best = agreement_at(low, gaps, factors)
    if best < agreement - 1e-9:
        raise ValueError(f"with this bias, annotators without noise agree in {best:.3f}")
    for _ in range(200):
        middle = math.sqrt(low * high)
        enough = agreement_at(middle, gaps, factors) > agreement
        low, high = (middle, high) if enough else (low, middle)
    return low


def elo_expected(rating, opponent):
    """A player's expected score, 0 to 1, from two ratings on Elo's scale."""
    return 1 / (1 + 10 ** ((opponent - rating) / 400))


def elo_ratings(games, players, k=32.0, start=1000.0):
    """Elo's sequential update over games [(a, b, score of a: 1, 0.5 or 0, ...)] -> ratings
    (players,).

    The result depends on the games' order and on k: R_a += k (S_a - E_a), R_b the opposite.
    """
    ratings = np.full(players, float(start))
    for a, b, score, *_ in games:
        change = k * (score - elo_expected(ratings[a], ratings[b]))
        ratings[a] += change
        ratings[b] -= change
    return ratings


def wins_of(games, players):
    """How often (row) beat (column) in such games, (players, players); a draw is half a win."""
    wins = np.zeros((players, players))
    for a, b, score, *_ in games:
        wins[a, b] += score
        wins[b, a] += 1 - score
    return wins


def bootstrap_ratings(games, players, replicates, rng):
    """`fit_ratings` of resampled games -> (replicates, players), and the share of replicates in
    which some score was finite only for the half wins that were added.

    games: [(a, b, score of a, group)]; groups are resampled whole, since games on one prompt are
    not independent.
    """
    groups = {}
    for game in games:
        groups.setdefault(game[3], []).append(game)
    table = np.stack([wins_of(some, players) for some in groups.values()])  # (groups, n, n)
    total, count = table.sum(0), len(table)
    met = total + total.T > 0
    found, weak = [], 0
    for begin in range(0, replicates, 100):
        size = min(100, replicates - begin)
        weights = rng.multinomial(count, np.full(count, 1 / count), size)  # (size, groups)
        wins = np.tensordot(weights, table, 1)
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
    if scale == "zscore":
        return centred / max(float(centred.std()), 1e-8)
    raise ValueError(f"scale {scale}: expected logit or zscore")


# --- settings -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(RunFlags):
    prompts: Annotated[str, "prompts to respond to"] = "data/toy/prompts_train.jsonl"
    num_prompts: Annotated[int, "how many of them, from the file's start; 0: all"] = 0
    policy: Annotated[
        tuple[str, ...], "who responds: run directories, each perhaps RUN@temperature=T"
    ] = ("runs/sft",)
    samples: Annotated[str, "samples file to judge, in the place of sampling"] = ""
    gold: Annotated[
        str, "Python file whose score(prompt, response, **fields) simulated annotators see"
    ] = ""
    report: Annotated[
        tuple[str, ...], "judged files: print how far they agree, and do nothing else"
    ] = ()
    out_dir: Annotated[str, "folder for samples.jsonl and what was judged"] = "runs/feedback"
    num_responses: Annotated[int, "K, responses a prompt (InstructGPT: 4 to 9)", "[2, 9]"] = 4
    max_new_tokens: Annotated[int, "longest sampled response, tokens", "[1, inf)"] = 48
    micro_batch_size: Annotated[
        int, "prompts sampled at a time on one rank, K times each", "[1, inf)"
    ] = 64
    annotator: Annotated[Literal["simulated", "terminal"], "terminal: a person at the keyboard"] = (
        "simulated"
    )
    output: Annotated[
        Literal["rankings", "comparisons"], "comparisons: of two, with a margin of 0 to 3"
    ] = "rankings"
    pairs: Annotated[int, "pairs judged a prompt; 0: all", "output=comparisons"] = 1
    agreement: Annotated[
        float, "of annotators with gold (sources: 0.73 to 0.77)", "(0.5, 1]", "annotator=simulated"
    ] = 0.75
    annotators: Annotated[int, "how many; one a prompt", "[1, inf)", "annotator=simulated"] = 5
    noise_spread: Annotated[float, "std of their scales' logarithm", "annotator=simulated"] = 0.25
    bias: Annotated[
        float, "std over them of the gold points they see in a word", "annotator=simulated"
    ] = 0.03
    overlap: Annotated[
        float, "share of prompts that all judge, to compare them on", "annotator=simulated"
    ] = 0.02
    grade_step: Annotated[
        float, "gold points from one grade to the next", "(0, inf)", "annotator=simulated"
    ] = 1.5
    name: Annotated[str, "your name; it also decides the order you see", "annotator=terminal"] = (
        "person"
    )
    dtype: Annotated[
        Literal["", "float32", "bfloat16", "float16", "float64"],
        "of sampling on cuda; empty: bfloat16. On the cpu it is float32",
    ] = ""


@dataclasses.dataclass(frozen=True)
class EloConfig:
    data: Annotated[tuple[str, ...], "comparisons or rankings"] = ("runs/feedback/rankings.jsonl",)
    out: Annotated[str, "policies: ratings as JSON; responses: rankings with `scores`"] = ""
    players: Annotated[
        Literal["policies", "responses"],
        "the lines' `policy`; or responses, each against its prompt's others",
    ] = "policies"
    bootstrap: Annotated[int, "policies: resamplings of prompts, for 95% intervals"] = 1000
    k: Annotated[float, "points at stake in a game, in the sequential update"] = 32.0
    start: Annotated[float, "mean rating, and where the sequential update starts"] = 1000.0
    method: Annotated[
        Literal["mle", "sequential"], "greatest likelihood, or Elo's update", "players=responses"
    ] = "mle"
    scale: Annotated[
        Literal["logit", "zscore"], "logit: differences are log-odds", "players=responses"
    ] = "logit"
    seed: Annotated[int, "of the bootstrap"] = 0


def check(cfg):
    """Ends the script where flags contradict each other."""
    if cfg.annotator == "simulated" and not cfg.gold:
        refuse("--annotator simulated: expected --gold, a Python file (the task's: data/toy.py)")
    if not cfg.samples and not 1 <= len(cfg.policy) <= cfg.num_responses:
        refuse(
            f"--policy: expected 1 to {cfg.num_responses} (--num_responses), got {len(cfg.policy)}"
        )


# --- sampling -------------------------------------------------------------------------------------


def read_policy(text):
    """RUN or RUN@temperature=T -> the directory, the temperature."""
    directory, given, value = text.partition("@temperature=")  # a path may have an @ too
    try:
        temperature = float(value) if given else 1.0
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature < math.inf:
        refuse(f"--policy {text}: expected RUN or RUN@temperature=T")
    return directory, temperature


def load_policies(cfg, run):
    """[(name, model, tokenizer, temperature)] of --policy."""
    policies = []
    for text in cfg.policy:
        directory, temperature = read_policy(text)
        model, tokenizer = load_policy(directory, run)
        if cfg.max_new_tokens >= model.config.n_positions:
            refuse(f"--max_new_tokens: {directory} has only {model.config.n_positions} positions")
        policies.append((text, run.sampler(model), tokenizer, temperature))
    return policies


def sample_all(run, policies, prompts, path):
    """Writes samples.jsonl: K responses to each prompt, from all policies in turn.

    A chunk of prompts of like lengths is the unit of work: its random numbers depend on the seed
    and its number alone, so that any number of ranks, and a run that was stopped and resumed, write
    the same.
    """
    size = run.cfg.micro_batch_size
    first = policies[0][2]  # tokenizer
    lengths = [len(encode(first, line["prompt"], None, sys.maxsize)[0]) for line in prompts]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    partial, done = path.with_name("samples.partial.jsonl"), 0
    if partial.exists():  # each line that was written whole counts, if its whole chunk is there
        lines = [line for line in partial.read_bytes().splitlines(True) if line.endswith(b"\n")]
        done = len(chunks) if len(lines) == len(prompts) else len(lines) // size
        if run.rank == 0:
            os.truncate(partial, sum(map(len, lines[: done * size])))
    run.wait()  # every rank has looked; only now may rank 0 write there
    for first in range(done, len(chunks), run.world):
        run.stop_if_told()
        run.progress("sampled chunks of prompts", first, len(chunks))
        number, found = first + run.rank, []
        if number < len(chunks):
            found = sample_chunk(run, policies, prompts, chunks[number], number)
        found = run.gather(found)
        if run.rank == 0:
            with open(partial, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in found)
    if run.rank == 0:
        finish_samples(run.cfg, prompts, partial, path)
    run.wait()


def sample_chunk(run, policies, prompts, chunk, number):
    """-> [(i, responses)] of the prompts that the chunk names, a response being [text, policy,
    whether it ended, whether the prompt was cut].

    The K responses are dealt out to the policies; who gets one more changes from chunk to chunk.
    """
    cfg, found = run.cfg, {i: [] for i in chunk}
    generator = torch.Generator(run.device).manual_seed(cfg.seed * 1_000_003 + number)
    for p, (name, model, tokenizer, temperature) in enumerate(policies):
        count = len(range((p + number) % len(policies), cfg.num_responses, len(policies)))
        room = model.config.n_positions - cfg.max_new_tokens
        whole = [encode(tokenizer, prompts[i]["prompt"], None, sys.maxsize)[0] for i in chunk]
        responses = generate(
            model,
            [ids[-room:] for ids in whole],
            cfg.max_new_tokens,
            num_samples=count,
            temperature=temperature,
            eos=tokenizer.ends,
            generator=generator,
        )
        for n, new in enumerate(responses):
            text, ended = response_of(tokenizer, new)
            cut = len(whole[n // count]) > room
            found[chunk[n // count]].append([text, name, ended, cut])
    return list(found.items())


def finish_samples(cfg, prompts, partial, path):
    """samples.partial.jsonl -> samples.jsonl, in the prompts' order. Of equal responses to a prompt
    one is kept; those that are empty or did not end are dropped, and prompts that then have nothing
    to compare; all is counted. Without any prompt left there is no file."""
    counts, records = dict.fromkeys(("unended", "empty", "equal", "cut"), 0), {}
    for line in partial.read_text("utf-8").splitlines():
        (index, responses), kept = json.loads(line), {}
        for text, name, ended, cut in responses:
            counts["cut"] += cut
            text = bare(text)  # what is read again
            if not ended or not text.strip():
                counts["unended" if not ended else "empty"] += 1
            elif text in kept:
                counts["equal"] += 1
            else:
                kept[text] = name
        if len(kept) >= 2:
            fields = {"responses": list(kept), "policy": list(kept.values())}
            records[index] = prompts[index] | fields
    total = len(prompts) * cfg.num_responses
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


# --- what was judged ------------------------------------------------------------------------------


def choose_pairs(rng, K, pairs):
    """`pairs` of the K-choose-2 pairs of responses, at random; all of them when 0."""
    every = list(itertools.combinations(range(K), 2))
    if not 0 < pairs < len(every):
        return every
    return [every[i] for i in sorted(rng.choice(len(every), pairs, replace=False))]


def ranking(line, order, annotator, scores):
    """A rankings line: the sample's line with its responses in `order`, best first."""
    record = line | {"responses": [line["responses"][i] for i in order], "annotator": annotator}
    if isinstance(line.get("policy"), list):
        record["policy"] = [line["policy"][i] for i in order]
    record.pop("scores", None)  # which may be the sample's; ours stand last
    return record | {"scores": scores}


def comparison(line, pair, annotator, grade):
    """A comparisons line: the sample's line, its responses pair[0] over pair[1], by a grade."""
    others = ("responses", "scores", "label")  # a label of the prompt's is not of the pair
    record = {name: value for name, value in line.items() if name not in others}
    record |= {"chosen": line["responses"][pair[0]], "rejected": line["responses"][pair[1]]}
    if isinstance(line.get("policy"), list):
        record["policy"] = [line["policy"][i] for i in pair]
    return record | {"margin": grade, "annotator": annotator}


# --- simulated annotators -------------------------------------------------------------------------


def simulate(cfg, samples, gold):
    """Yields judged lines. See the docstring above for the law that they follow."""
    rng = np.random.default_rng([cfg.seed, 1])
    factors = np.exp(cfg.noise_spread * rng.standard_normal(cfg.annotators))
    biases = cfg.bias * rng.standard_normal(cfg.annotators)
    jobs = []  # (line, what its responses are worth before noise to one, who that is, pairs)
    gaps, gap_factors, ties = [], [], 0
    for number, line in enumerate(samples):
        golds = np.array([told(gold, "score", line, r) for r in line["responses"]])  # (K,)
        words = np.array([len(r.split()) for r in line["responses"]])
        everyone = rng.random() < cfg.overlap
        for a in range(cfg.annotators) if everyone else [number % cfg.annotators]:
            values = golds + biases[a] * words
            pairs = choose_pairs(rng, len(golds), 0 if cfg.output == "rankings" else cfg.pairs)
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
            seen = noisy(values, scale * factors[a], rng)
            order = np.argsort(-seen, kind="stable").tolist()
            # The annotator's own marks, in grades: their differences are margins.
            marks = [float(seen[i]) / cfg.grade_step for i in order]
            yield ranking(line, order, name, marks)
            continue
        for i, j in pairs:
            seen = noisy(values[[i, j]], scale * factors[a], rng)
            grade = grade_of(abs(seen[0] - seen[1]) / cfg.grade_step)
            yield comparison(line, (i, j) if seen[0] > seen[1] else (j, i), name, grade)


# --- a person at the terminal ---------------------------------------------------------------------

OTHER_KEYS = {"": "quit", "q": "quit", "l": "later", "u": "undo"}
GRADE_KEYS = {str(n): (0, 4 - n) if n < 5 else (1, n - 5) for n in range(1, 9)}  # which, grade
GRADE_HELP = """A is better: 1 significantly  2 better  3 slightly  4 hardly, unsure
B is better: 8 significantly  7 better  6 slightly  5 hardly, unsure"""


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


def print_wrapped(text, label, width):
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
    print(f"{head}\n")
    prompt = line["prompt"]
    print_wrapped(prompt if len(prompt) <= 4000 else f"[...] {prompt[-4000:]}", "  ", width)
    print()
    for label, i in zip("AB" if output == "comparisons" else "123456789", order, strict=False):
        print_wrapped(line["responses"][i], f" {label}  ", width)
        print()
    print("u: take back   l: later   q: quit (all judgements are saved)")
    return ask_pair(order) if output == "comparisons" else ask_ranking(order)


def ask_pair(order):
    print(GRADE_HELP, flush=True)
    while True:
        key = read_key()
        if key in OTHER_KEYS:
            return None, OTHER_KEYS[key]
        if key in GRADE_KEYS:
            side, grade = GRADE_KEYS[key]
            return ((order[side], order[1 - side]), grade), "judged"


def ask_ranking(order):
    """Asks for the best of those that are left, until one is."""
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
    queue = rng.permutation(len(items)).tolist()
    history = []  # (item, bytes of its line), in the order that they were judged in
    if path.exists():
        for text in path.read_bytes().splitlines(keepends=True):
            if text.endswith(b"\n"):  # else it was cut off while being written
                history.append((json.loads(text)["item"], len(text)))
    done = {item for item, _ in history}
    queue = [item for item in queue if item not in done]
    with keyboard(), open(path, "ab") as file:
        while True:
            file.truncate(sum(size for _, size in history))  # what was taken back is gone
            if not queue:
                print("\nall are judged; u: take back the last   any other key: finish", flush=True)
                if read_key() != "u":
                    break
                queue.append(history.pop()[0])
                continue
            line, order = items[queue[0]]
            head = f"{cfg.name}: {len(history)} of {len(items)} judged"
            answer, what = ask(line, order, head, cfg.output)
            if what == "quit":
                break
            if what == "later":
                queue.append(queue.pop(0))
            elif what == "undo":
                queue[:0] = [history.pop()[0]] if history else []
            else:
                if cfg.output == "comparisons":
                    pair, grade = answer
                    record = comparison(line, pair, cfg.name, grade)
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


def agreement_report(paths, gold):
    """Agreement of what was judged with gold, where gold is strict, and between annotators."""
    with_gold, between = {"all": []}, {"all": []}  # [(prompt, whether they agree)] by name
    verdicts, known, ties = {}, {}, 0  # known: gold scores
    for path in paths:
        for where, record, responses, pairs in read_preferences(path):
            prompt, annotator = record["prompt"], record.get("annotator", path)
            if not isinstance(annotator, str):
                refuse(f"{where}: annotator: expected a string")
            graded = any(margin > 0 for _, _, margin, _ in pairs) or "margin" in record
            for i, j, margin, label in pairs:
                if label == 0.5:  # nobody is better
                    continue
                better, worse = responses[i], responses[j]
                verdicts.setdefault((prompt, frozenset((better, worse))), {})[annotator] = better
                if gold is None:
                    continue
                for text in (better, worse):
                    if (prompt, text) not in known:
                        known[prompt, text] = told(gold, "score", record, text)
                gap = known[prompt, better] - known[prompt, worse]
                if gap == 0:
                    ties += 1
                    continue
                keys = ["all", f"annotator {annotator}"]
                keys += [f"task {record['task']}"] if "task" in record else []
                keys += [GRADES[grade_of(margin)]] if graded else []
                for key in keys:
                    with_gold.setdefault(key, []).append((prompt, float(gap > 0)))
    for (prompt, _), verdict in verdicts.items():
        for a, b in itertools.combinations(sorted(verdict), 2):
            for key in ("all", a, b):
                between.setdefault(key, []).append((prompt, float(verdict[a] == verdict[b])))
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


def elo_main(cfg):
    """annotate.py elo: head-to-head results to ratings."""
    if (cfg.players == "responses" and not cfg.out) or cfg.out.endswith(".gz"):
        refuse("--out: expected a file to write, not compressed, with --players responses")
    games, lines = [], {}  # (a, b, score of a, prompt); {prompt: its first line}
    for path in cfg.data:
        for where, record, responses, pairs in read_preferences(path):
            lines.setdefault(record["prompt"], record)
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
                    score = decided.get((i, j), 0.5)
                    games.append((names[i], names[j], score, record["prompt"]))
    if not games:
        refuse(f"{', '.join(cfg.data)}: no line compares two {cfg.players}")
    if cfg.players == "responses":
        rate_responses(cfg, games, lines)
    else:
        rate_policies(cfg, games)


def numbered(games, names):
    """Games of names as games of their places among `names`."""
    place = {name: i for i, name in enumerate(names)}
    return [(place[a], place[b], *rest) for a, b, *rest in games]


def middle_95(values):
    """[low, high] that 95% of the values lie between; of none [None, None]."""
    return [float(x) for x in np.percentile(values, [2.5, 97.5])] if len(values) else [None, None]


def rate_policies(cfg, games):
    """Prints ratings and their gaps, and writes them to --out."""
    names = sorted({name for a, b, *_ in games for name in (a, b)})
    games, n = numbered(games, names), len(names)
    wins = wins_of(games, n)
    try:
        ratings = cfg.start + ELO * fit_ratings(wins)
    except ValueError as error:
        refuse(f"{', '.join(cfg.data)}: {error}")
    # Elo's own update sees the games in an order of chance: the file's may be sorted.
    rng = np.random.default_rng(cfg.seed)
    shuffled = [games[i] for i in rng.permutation(len(games))]
    sequential = elo_ratings(shuffled, n, cfg.k, cfg.start)
    replicates, weak = np.empty((0, n)), 0.0
    if cfg.bootstrap and len({group for *_, group in games}) > 1:
        replicates, weak = bootstrap_ratings(games, n, cfg.bootstrap, rng)
        replicates = cfg.start + ELO * replicates
    if weak > 0.025:  # else what half wins made finite would be an end of an interval
        replicates = replicates[:0]

    report = {"games": len(games), "players": {}, "gaps": []}
    rewards = {scale: to_reward(ratings / ELO, scale) for scale in ("logit", "zscore")}
    order = sorted(range(n), key=lambda i: -ratings[i])
    what = f"ratings of greatest likelihood with 95% intervals, mean {cfg.start}"
    print(f"{len(games)} games; {what}")
    for i in order:
        rating, (low, high) = float(ratings[i]), middle_95(replicates[:, i])
        won, played = float(wins[i].sum()), float(wins[i].sum() + wins[:, i].sum())
        found = {"rating": [rating, low, high], "sequential": float(sequential[i])}
        found |= {"games": played, "wins": won}
        found |= {f"reward_{scale}": float(values[i]) for scale, values in rewards.items()}
        report["players"][names[i]] = found
        interval = "" if low is None else f"[{low:.0f}, {high:.0f}]"
        print(
            f"  {names[i]:<40} {rating:7.1f}  {interval:<14}  sequential {sequential[i]:7.1f}  "
            f"won {won:g} of {played:g}"
        )
    for i, j in itertools.combinations(order, 2):
        gap = float(ratings[i] - ratings[j])
        low, high = middle_95(replicates[:, i] - replicates[:, j])
        report["gaps"].append({"better": names[i], "worse": names[j], "gap": [gap, low, high]})
        if low is not None:
            print(f"  {names[i]} over {names[j]}: {gap:.0f} [{low:.0f}, {high:.0f}]")
    if not connected(wins > 0):
        print("  wins do not lead from all to all: half a win each way was added among who met")
    if weak > 0.025:
        print(f"  no intervals: in {weak:.0%} of the resampled results a rating has no bound")
    if cfg.out:
        write_json(cfg.out, report)


def rate_responses(cfg, games, lines):
    """Writes each prompt's responses, best first, with `scores`: rewards from their games."""
    by_prompt, records, apart = {}, [], 0
    for game in games:
        by_prompt.setdefault(game[3], []).append(game)
    drop = "responses chosen rejected scores margin label policy annotator item".split()
    for prompt, played in by_prompt.items():
        names = list(dict.fromkeys(name for a, b, *_ in played for name in (a, b)))
        played = numbered(played, names)
        try:
            if cfg.method == "sequential":
                scores = elo_ratings(played, len(names), cfg.k, cfg.start) / ELO
            else:
                scores = fit_ratings(wins_of(played, len(names)))
        except ValueError:
            apart += 1
            continue
        rewards = to_reward(scores, cfg.scale)
        order = np.argsort(-rewards, kind="stable").tolist()
        line = {name: value for name, value in lines[prompt].items() if name not in drop}
        line |= {"responses": [names[i] for i in order], "games": len(played)}
        records.append(line | {"scores": [round(float(rewards[i]), 6) for i in order]})
    write_jsonl(cfg.out, records)
    print(f"{cfg.out}: {len(records)} prompts with rewards from {len(games)} games")
    if apart:
        print(f"{apart} prompts left out: some of their responses never met")


# --- main -----------------------------------------------------------------------------------------


def read_source(cfg):
    """Lines of --samples, or of --prompts."""
    lines = []
    for where, line in read_jsonl(cfg.samples or cfg.prompts, {"prompt": False}):
        if "task" in line:
            check_field(where, line, "task", str)
        if cfg.samples:
            line["responses"] = read_responses(where, line)
            count = len(line["responses"])
            if cfg.annotator == "terminal" and count > 9:
                refuse(f"{where}: responses: {count}; nine keys are all that a person has here")
        lines.append(line)
    return lines if cfg.samples else lines[: cfg.num_prompts or None]


def main():
    if sys.argv[1:2] == ["elo"]:
        return elo_main(flags(EloConfig, __doc__, "elo"))
    cfg = flags(Config, __doc__)
    gold = load_python(cfg.gold) if cfg.gold else None
    if cfg.report:
        return print_report(agreement_report(cfg.report, gold))
    check(cfg)
    run = Run(cfg)
    if cfg.annotator == "terminal" and run.world > 1:
        refuse("--annotator terminal: there is one terminal; run it without torchrun")

    # 1. What is to be judged: a samples file, or responses sampled here.
    samples = read_source(cfg)
    if cfg.samples:
        run.open([cfg.samples, cfg.gold])
    else:
        policies = load_policies(cfg, run)
        run.open([cfg.prompts, cfg.gold, *(read_policy(text)[0] for text in cfg.policy)])
        path = run.out_dir / "samples.jsonl"
        if not path.exists():
            sample_all(run, policies, samples, path)
        if not path.exists():
            refuse(f"{path}: no prompt has two responses to compare")
        samples = [line for _, line in read_jsonl(path, {"prompt": False})]

    # 2. Judging, by rank 0 alone.
    run.leave()
    if run.rank > 0:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the samples are on the disk
    path = run.out_dir / f"{cfg.output}.jsonl"
    if cfg.annotator == "simulated":
        records = list(simulate(cfg, samples, gold))
        write_jsonl(path, records)
        print(f"{path}: {len(records)} lines", flush=True)
    elif not ask_person(cfg, samples, path):
        return

    # 3. How far they agree.
    report = agreement_report([path], gold)
    print_report(report)
    write_json(run.out_dir / "report.json", {"seconds": run.seconds()} | report)


if __name__ == "__main__":
    guarded(main)
