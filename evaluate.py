"""Head to head: which policy is better, by how much, and at what cost in KL.

Every policy responds to the same prompts. A judge that scores does so for every response; one that
compares reads the first of each policy. For policies A and B,

    win rate = mean over prompts and over pairs of a response of each of  [A better] + [tie] / 2
    KL(A, reference) = E sum_t sum_v pi(v | s_t) log(pi(v | s_t) / pi_ref(v | s_t))  nats a sequence

with 95% intervals by the bootstrap over prompts. Differences, over all prompts and by task, are
paired: a policy's score less the first's to the same prompt. Beside the win rates stand those of
two controls, the longer response and a coin; the report has wins at equal length too.

A policy is a run directory, or a file of outputs, whoever wrote them: JSON Lines of `prompt` and
`response` or `responses`, matched to the prompts by their text; its KL is not known. A judge is a
reward model; a file of comparisons that somebody else labelled; or a Python file (`--gold` if it is
the truth), which defines one of these, or both:

    score(prompt, response, **fields) -> a number; fields: the others of the prompt's line
    compare(prompt, a, b, **fields) -> P(a is better); it is asked in both orders

Simplified against the papers: the win rate at equal length has no term for a prompt's difficulty;
Elo ratings are Bradley-Terry's on Elo's scale, whatever the order of the games.

    python evaluate.py --policies runs/sft,runs/sft@temperature=0 --gold data/toy.py
    python evaluate.py --policies runs/sft,runs/sft@best_of=4:runs/reward --judges runs/reward
    python evaluate.py --policies ours.jsonl,theirs.jsonl --prompts "" --judges mine.py
    python evaluate.py table; python evaluate.py check --better "A > B"      # of a report
    python evaluate.py plot runs/ppo --y gold,kl             # learning curves; or --tensorboard
"""

import collections
import dataclasses
import itertools
import math
import os
import re
import shlex
import shutil
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from feedback import (
    batches_of_groups, check_field, connected, distinct, fit_ratings, group_by_prompt,
    load_policy, load_python, normalised, read_preferences, read_responses, reward_model_for,
    score_rows, told,
)  # fmt: skip
from model import entropy, generate, pack, predicts, response_sums
from run import Run, RunFlags, flags, guarded, onto, read_jsonl, refuse, write_jsonl
from tokens import encode, identity, load_tokenizer, read_json, response_of, whole_file

ELO = 400 / math.log(10)  # points of Elo's scale in one nat of log-odds
LONGER, COIN = "length", "a coin"  # controls: what no judge should be content to match

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


def win_rate(scores_a, scores_b, replicates=1000, seed=0):
    """-> rate, low, high: how often A's response scores more than B's, ties half, and its 95%
    interval by the bootstrap over prompts. scores: as in `win_shares`."""
    return mean_with_interval(win_shares(scores_a, scores_b), replicates, seed)


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


@cache
def resamplings(count, replicates, seed):
    """How often each of `count` prompts is drawn in each resampling, (replicates, count)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=replicates)


def kl_and_entropy(logits, ref_logits, tokens, temperature):
    """KL(policy, reference) and the policy's entropy, of next-token distributions, (2, N), nats.

    logits, ref_logits (N, V); tokens (N,), what the policy said. Their sums over a response are on
    average, without bias, those of the distributions of whole responses, and vary less than
    log-probabilities of the tokens drawn. The policy's logits are divided by its temperature, the
    reference's are as they are; at temperature 0 the policy puts probability 1 on what it said, so
    that the KL is -log pi_ref of it and the entropy 0.
    """
    ref_logprobs = ref_logits.log_softmax(-1)
    if temperature == 0:
        kl = -ref_logprobs.gather(1, tokens[:, None]).squeeze(1)
        return torch.stack([kl, torch.zeros_like(kl)])
    logprobs = (logits / temperature).log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)
    return torch.stack([kl, entropy(logprobs)])


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
    count, rates = int(prompts.max()) + 1, []
    draws = resamplings(count, replicates, seed) if count > 1 and replicates else []
    for counts in (np.ones(count), *draws):
        theta = fit_logistic(x, wins, share * counts[prompts])
        rates.append(float(1 / (1 + np.exp(-theta[0]))))
    if len(rates) == 1:
        return [rates[0], None, None]
    return [rates[0], *map(float, np.percentile(rates[1:], [2.5, 97.5]))]


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


def every_pair(scores_a, scores_b, lengths_a, lengths_b):
    """-> wins, lengths of A and B, prompts (pairs,): each response of A to a prompt with each of B.
    A's tables (prompts, K), B's (prompts, L)."""
    wins = 0.5 + 0.5 * np.sign(scores_a[:, :, None] - scores_b[:, None])  # (prompts, K, L)
    longer, other, prompts = (
        np.broadcast_to(x, wins.shape).ravel()
        for x in (lengths_a[:, :, None], lengths_b[:, None], np.arange(len(wins))[:, None, None])
    )
    return wins.ravel(), longer, other, prompts


def ratings_of(wins, start=1000.0, replicates=1000, seed=0):
    """Elo ratings [rating, low, high] of players who all played on all prompts.

    wins (prompts, n, n): each prompt's share of wins of row over column. No interval when more than
    2.5% of the resamplings had to be made finite.
    """
    wins = np.asarray(wins, dtype=np.float64)
    count, n = wins.shape[:2]
    total = start + ELO * fit_ratings(wins.sum(0))
    intervals = [(None, None)] * n
    if count > 1 and replicates and n > 1:
        draws = resamplings(count, replicates, seed)
        resampled = np.einsum("rp,pij->rij", draws, wins, optimize=True)
        if np.mean(~connected(resampled > 0)) <= 0.025:
            found = start + ELO * fit_ratings(resampled, wins.sum(0) + wins.sum(0).T > 0)
            intervals = np.percentile(found, [2.5, 97.5], axis=0).T.tolist()
    return [[rating, *interval] for rating, interval in zip(total.tolist(), intervals, strict=True)]


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


# --- settings -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(RunFlags):
    policies: Annotated[
        tuple[str, ...],
        "RUN, RUN@temperature=T, RUN@best_of=N:REWARD, or a file of outputs (.jsonl); the tables "
        "are against the first",
    ] = ("runs/sft",)
    reference: Annotated[str, "run that KL is to; empty: the first policy's"] = ""
    prompts: Annotated[
        str, "prompts for all of them; empty: those that all files of outputs have"
    ] = "data/toy/prompts_test.jsonl"
    gold: Annotated[
        str, "Python file that is the truth: score(prompt, response, **fields), or compare"
    ] = ""
    judges: Annotated[
        tuple[str, ...],
        "more judges: reward models, Python files of score(prompt, response, **fields) or "
        "compare(prompt, a, b, **fields)",
    ] = ()
    comparisons: Annotated[
        str, "comparisons or rankings of these policies (named in `policy`) as one more judge"
    ] = ""
    report: Annotated[str, "Markdown report; empty: report.md in out_dir"] = ""
    out_dir: Annotated[str, "folder for report.json, samples and figures"] = "runs/evaluation"
    num_prompts: Annotated[int, "how many of them, from the file's start; 0: all"] = 0
    num_samples: Annotated[
        int, "K, responses of a policy to a prompt; greedy, best_of: 1", "[1, inf)"
    ] = 4
    best_of_samples: Annotated[
        int, "responses of a best_of policy, each the best of N", "[1, inf)"
    ] = 1
    max_new_tokens: Annotated[int, "longest response, tokens", "[1, inf)"] = 48
    micro_batch_size: Annotated[
        int, "responses a forward for KL; sampling and judging take four times as many; 0: 64"
    ] = 0
    best_of_n: Annotated[int, "best-of-n of the first policy for n up to this; 0: none"] = 0
    proxy: Annotated[str, "reward that best-of-n goes by", "best_of_n"] = "runs/reward"
    bootstrap: Annotated[int, "resamplings of the prompts (at equal length 200 at most)"] = 1000
    by: Annotated[str, "field of the prompts that scores are told apart by"] = "task"
    show: Annotated[tuple[str, ...], "parts of gold's `explain` in the printed table"] = (
        "harmless",
    )
    num_shown: Annotated[int, "prompts whose responses stand side by side in the report"] = 3


@dataclasses.dataclass(frozen=True)
class TableConfig:
    report: Annotated[str, "report.json of an evaluation"] = "runs/evaluation/report.json"
    show: Annotated[tuple[str, ...], "parts of gold's `explain` in the table"] = ("harmless",)


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    report: Annotated[str, "report.json of an evaluation"] = "runs/evaluation/report.json"
    judge: Annotated[str, "whose scores are compared"] = "gold"
    better: Annotated[tuple[str, ...], "claims, each POLICY > POLICY"] = ()


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    runs: Annotated[
        tuple[str, ...],
        "run directories, here or before the flags; NAME-0, NAME-1, ... are drawn as a group",
    ] = ()
    y: Annotated[
        tuple[str, ...],
        "what to draw, of what was logged at any step: gold is eval_gold too; empty: up to eight "
        "that change, those that matter most first",
    ] = ()
    out: Annotated[str, "the figure"] = "runs/figures/curves.png"
    tensorboard: Annotated[
        bool, "write RUN/tensorboard, TensorBoard's event files of all that was logged; no figure"
    ] = False


# --- policies -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Policy:
    name: str  # RUN[@temperature=T][@best_of=N:REWARD], or a file of outputs
    run: str
    temperature: float = 1.0
    best_of: int = 1
    by: str = ""  # the reward that the best are chosen by
    is_file: bool = False


def parse_policy(text):
    """A --policies entry as a Policy."""
    if text.endswith((".jsonl", ".jsonl.gz")) or Path(text).is_file():
        return Policy(text, text, is_file=True)
    # An @ that begins no option is part of a path, and so is all of what there is.
    run, *options = [text] if Path(text).exists() else re.split("@(?=temperature=|best_of=)", text)
    given = dict(option.split("=", 1) for option in options)
    count, _, by = given.get("best_of", "1:").partition(":")
    try:
        policy = Policy(text, run, float(given.get("temperature", 1)), int(count), by)
        good = 0 <= policy.temperature < math.inf and policy.best_of >= 1
        if good and bool(by) == ("best_of" in given):
            return policy
    except ValueError:
        pass
    refuse(
        f"--policies {text}: expected RUN, RUN@temperature=T or RUN@best_of=N:REWARD; or FILE.jsonl"
    )


def check(cfg, policies):
    """Ends the script where flags contradict each other."""
    if not policies or len(set(cfg.policies)) < len(policies):
        refuse("--policies: expected one or more, all different")
    if any(policy.by and policy.temperature == 0 for policy in policies):
        refuse("--policies: the best of several needs a temperature above 0")
    if cfg.best_of_n and (policies[0].by or policies[0].is_file or not policies[0].temperature):
        refuse("--best_of_n: expected a first policy that samples, one response at a time")
    if cfg.gold and not cfg.gold.endswith(".py"):
        refuse(f"--gold {cfg.gold}: not a Python file")
    if not (cfg.gold or cfg.judges or cfg.comparisons):
        refuse("expected a judge: --gold, --judges or --comparisons")
    if not cfg.prompts and not any(policy.is_file for policy in policies):
        refuse("--prompts: expected a file; only files of outputs bring prompts of their own")


def read_lines(path, by):
    """Yields (where, line) of a file whose lines have a prompt."""
    for where, line in read_jsonl(path, {"prompt": True}):
        for name, kind in {"unsafe": bool, "task": str, by: str}.items():
            if name in line:
                check_field(where, line, name, kind)
        yield where, line


def read_outputs(path, by):
    """A file of outputs -> {prompt: (its first line's other fields, the responses of all its
    lines)}, and the policy that all of its lines name, or the path."""
    found, writers = {}, set()
    for where, line in read_lines(path, by):
        if "responses" not in line:
            check_field(where, line, "response", str)
            line["responses"] = [line["response"]]
        responses, writer = read_responses(where, line, 1), line.get("policy")
        writers.add(writer if isinstance(writer, str) else path)
        others = ("response", "responses", "scores", "policy")
        fields = {name: value for name, value in line.items() if name not in others}
        found.setdefault(line["prompt"], (fields, []))[1].extend(responses)
    return found, writers.pop() if len(writers) == 1 else path


def choose_prompts(cfg, outputs, say):
    """The lines of the prompts to respond to: those that all files of outputs respond to."""
    if cfg.prompts:
        lines = [line for _, line in read_lines(cfg.prompts, cfg.by)]
    else:
        lines = [fields for fields, _ in next(iter(outputs.values())).values()]
    wanted = len(lines)
    for path, found in outputs.items():
        kept = [line for line in lines if line["prompt"] in found]
        if not kept:
            refuse(
                f"{path}: responds to none of {len(lines)} prompts, the first of which is "
                f"{lines[0]['prompt'][:60]!r}; --prompts '' takes those that all files have"
            )
        lines = kept
    if len(lines) < wanted:
        say(f"{len(lines)} of {wanted} prompts: to the others some file of outputs has no response")
    return lines[: cfg.num_prompts or None]


def tokenizer_of(judges):
    """The first reward model's; None where there is none, and texts are read as they are."""
    try:
        return next((load_tokenizer(name) for name in judges if not name.endswith(".py")), None)
    except (OSError, ValueError) as error:
        refuse(error)


def encoded(lines, tokenizer, most, say):
    """[(line, the prompt's last `most` token ids)], and how many prompts lost their start."""
    if most < 1:
        refuse("--max_new_tokens: leaves a prompt no room in the model's positions")
    if tokenizer is None:
        return [(line, []) for line in lines], 0
    whole = [encode(tokenizer, line["prompt"], None, sys.maxsize)[0] for line in lines]
    cut = sum(len(ids) > most for ids in whole)
    if cut:
        say(f"{len(lines)} prompts, {cut} of which lose their start")
    return [(line, ids[-most:]) for line, ids in zip(lines, whole, strict=True)], cut


def samples_of_file(path, found, prompts, tokenizer, room, say):
    """Samples, as `sample_policy` has them, of a file of outputs: of each prompt as many as of the
    prompt that has the fewest. Reward models have `room` for prompt and response."""
    count, samples, cut = min(len(found[line["prompt"]][1]) for line, _ in prompts), [], 0
    for line, prompt in prompts:
        samples.append([])
        for text in found[line["prompt"]][1][:count]:
            sample = {"prompt_ids": [], "ids": text.split(), "text": text, "ended": True}
            if tokenizer:
                ids = encode(tokenizer, "", text, room, True)[1]
                kept = prompt[-(room - len(ids)) :]
                sample |= {"prompt_ids": kept, "ids": ids, "ended": ids[-1] in tokenizer.ends}
                cut += len(kept) < len(prompt) or not sample["ended"]
            samples[-1].append(sample)
    left = sum(len(found[line["prompt"]][1]) for line, _ in prompts) - count * len(prompts)
    if left or cut:
        say(
            f"{path}: {count} responses to each prompt, {left} more are left out; {cut} are, or "
            f"their prompt is, too long to be read whole"
        )
    return samples


# --- samples --------------------------------------------------------------------------------------


def sample_policy(model, tokenizer, prompts, temperature, count, seed, run, path):
    """`count` responses to each prompt (line, ids): lists (prompts) of lists of {"prompt_ids",
    "ids", "text", "ended"}. Their ids are kept in `path` once all are there; where they are, an
    evaluation that was stopped has drawn them.

    A chunk of prompts draws from a generator of its own, so that any number of ranks samples the
    same; `seed` differs between policies.
    """
    if path.exists():
        drawn = [line["ids"] for _, line in read_jsonl(path, {})]
    else:
        drawn = draw_responses(model, tokenizer, prompts, temperature, count, seed, run)
        if run.rank == 0:
            write_jsonl(path, [{"ids": some} for some in drawn])
    samples = []
    for (_, prompt), some in zip(prompts, drawn, strict=True):
        samples.append([])
        for ids in some:
            text, ended = response_of(tokenizer, ids)
            samples[-1].append({"prompt_ids": prompt, "ids": ids, "text": text, "ended": ended})
    return samples


def draw_responses(model, tokenizer, prompts, temperature, count, seed, run):
    """Token ids of `count` responses to each prompt, from all ranks."""
    size = max((4 * run.cfg.micro_batch_size or 256) // count, 1)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))
    chunks, found = [order[i : i + size] for i in range(0, len(order), size)], []
    for begin in range(0, len(chunks), run.world):
        run.stop_if_told()
        run.progress("sampled prompts", begin * size, len(prompts))
        number = begin + run.rank
        if number >= len(chunks):
            continue
        generator = torch.Generator(run.device).manual_seed((seed * 1_000_003 + number) % 2**63)
        responses = generate(
            model,
            [prompts[i][1] for i in chunks[number]],
            run.cfg.max_new_tokens,
            num_samples=count,
            temperature=temperature,
            eos=tokenizer.ends,
            generator=generator,
        )
        found += [[chunks[number][n // count], ids] for n, ids in enumerate(responses)]
    drawn = [[] for _ in prompts]
    for i, ids in run.gather(found):
        drawn[i].append(ids)
    return drawn


def grid_of(samples, number):
    """number(sample) of all samples: (prompts, K), K responses to each prompt."""
    return np.array([[number(s) for s in some] for some in samples], dtype=np.float64)


def divergences(policy, reference, samples, temperature, run):
    """{"kl": to the reference, "entropy": its own}, (prompts, K), nats: `kl_and_entropy` summed
    over each sample's tokens. In the models' own precision: logits rounded to bfloat16 would add
    some 0.01 nats a token to every KL."""
    rows = [(s["prompt_ids"], s["ids"]) for some in samples for s in some]
    groups = group_by_prompt(rows, policy.config.n_embd)
    batches, found = batches_of_groups(groups, run.cfg.micro_batch_size or 64), []
    for begin in range(0, len(batches), run.world):
        run.stop_if_told()
        run.progress("batches of responses with their KL", begin, len(batches))
        for numbers in batches[begin + run.rank : begin + run.rank + 1]:
            some = [groups[n] for n in numbers]
            tokens, mask, segments = onto(run.device, *pack(*zip(*some, strict=True)))
            with torch.no_grad():
                at = predicts(mask)
                hidden = policy.states(tokens, at, segments)  # (N, C)
                ref_hidden = reference.states(tokens, at, segments)
                # Whole vocabularies of all positions at once would be gigabytes.
                pieces = [x.split(1024) for x in (hidden, ref_hidden, tokens[mask])]
                both = [
                    kl_and_entropy(policy.head(ours), reference.head(theirs), said, temperature)
                    for ours, theirs, said in zip(*pieces, strict=True)
                ]
            sums = response_sums(torch.cat(both, 1).T, mask)  # (M, 2)
            sums = sums.split([len(responses) for _, responses in some])
            found += [[n, *x.T.tolist()] for n, x in zip(numbers, sums, strict=True)]
    _, *both = zip(*sorted(run.gather(found)), strict=True)
    return {
        name: np.array(list(itertools.chain(*values))).reshape(len(samples), -1)
        for name, values in zip(("kl", "entropy"), both, strict=True)
    }


# --- judges ---------------------------------------------------------------------------------------


class Judge:
    """Judges responses: a Python file, which reads texts, and may `score`, `explain` or `compare`
    them; or a reward model, which reads the tokens of a response and the EOS that ended it."""

    def __init__(self, name, tokenizer, run):
        self.name, self.run, self.file, self.model = name, run, None, None
        self.known = {}  # the head's output for (prompt ids, response ids)
        if name.endswith(".py"):
            self.file = load_python(name, needs=("score", "compare"))
        else:
            self.model, self.statistics = reward_model_for(name, tokenizer, run)
        self.scores = self.model is not None or hasattr(self.file, "score")
        self.compares = hasattr(self.file, "compare")

    def __call__(self, lines, samples):
        """Scores (prompts, K), all of them finite."""
        if self.file:
            return np.array(self.ask(partial(self.tell, "score"), lines, samples))
        rows = [(tuple(s["prompt_ids"]), tuple(s["ids"])) for some in samples for s in some]
        # Each text once, whoever wrote it: in another batch rounding would keep equals from ties.
        new = [row for row in dict.fromkeys(rows) if row not in self.known]
        if new:
            size = 4 * self.run.cfg.micro_batch_size or 256  # no gradients are kept: more fit
            raw = score_rows(self.model, new, size, self.run, name=self.name)
            self.known.update(zip(new, raw, strict=True))
        raw = torch.tensor([self.known[row] for row in rows], dtype=torch.float64)
        return normalised(raw, self.statistics).numpy().reshape(len(samples), -1)

    def explain(self, lines, samples):
        """{part: (prompts, K)} of what the file's `explain` says, NaN where it doesn't."""
        if not hasattr(self.file, "explain"):
            return {}
        told_all = self.ask(partial(self.tell, "explain"), lines, samples)
        names = dict.fromkeys(name for some in told_all for parts in some for name in parts)
        return {
            name: grid_of(told_all, lambda parts, name=name: parts.get(name, np.nan))
            for name in names
        }

    def compare(self, lines, samples_a, samples_b):
        """-> win shares of A (prompts,), and how often the order decided, where the file reads two
        responses: `compare(prompt, first, second, **fields)` -> P(the first is better). The first
        response of each policy is compared, in both orders."""
        rows = self.ask(self.both_orders, lines, samples_a, samples_b)
        first, second = np.array(rows).T
        return (first + 1 - second) / 2, float(np.mean((first - 0.5) * (second - 0.5) > 0))

    def ask(self, question, *columns):
        """[question(*row)] of rows, one a prompt, the ranks taking turns."""
        rows, found, run = list(zip(*columns, strict=True)), [], self.run
        for begin in range(0, len(rows), run.world):
            run.stop_if_told()
            run.progress("judged prompts", begin, len(rows))
            for row in rows[begin + run.rank : begin + run.rank + 1]:
                found.append([begin + run.rank, question(*row)])
        return [answer for _, answer in sorted(run.gather(found), key=lambda pair: pair[0])]

    def tell(self, function, line, some):
        return [told(self.file, function, line, sample["text"]) for sample in some]

    def both_orders(self, line, some, others):
        texts = some[0]["text"], others[0]["text"]
        fields = {name: x for name, x in line.items() if name not in ("prompt", "response")}
        try:
            found = [
                float(self.file.compare(line["prompt"], *pair, **fields))
                for pair in (texts, texts[::-1])
            ]
        except Exception as error:
            refuse(f"{self.file.__file__}: compare: {type(error).__name__}: {error}")
        for p in found:
            if not 0 <= p <= 1:
                refuse(f"{self.file.__file__}: compare: expected a probability, got {p}")
        return found


def load_judges(cfg, policies, tokenizer, run):
    """-> {name: Judge}, gold being one of them; and those by which the best are chosen, which must
    score."""
    judges = {"gold": Judge(cfg.gold, tokenizer, run)} if cfg.gold else {}
    judges |= {name: Judge(name, tokenizer, run) for name in cfg.judges}
    names = {policy.by for policy in policies if policy.by}
    names |= {cfg.proxy} if cfg.best_of_n else set()
    proxies = {n: judges.get(n) or Judge(n, tokenizer, run) for n in sorted(names)}
    for name, judge in proxies.items():
        if not judge.scores:
            refuse(f"{name}: score: no such function; the best of several is chosen by scores")
    return judges, proxies


def floored(judge, grids, samples):
    """Scores; to a reward model, which has learnt from whole responses alone, what did not end has
    the smaller of -1 and the lowest score of all grids: going on for ever can't pay, as in ppo.py,
    and the same response scores the same, whoever wrote it. A Python file reads the text itself."""
    if judge.file:
        return grids
    least = min([-1.0, *(float(grid.min()) for grid in grids)])
    ended = [grid_of(some, lambda s: s["ended"]) > 0 for some in samples]
    return [np.where(e, grid, least) for grid, e in zip(grids, ended, strict=True)]


def choose_best(samples, scores, best_of):
    """The best of each `best_of` samples in turn, by score, the first among equals."""
    best = scores.reshape(len(samples), -1, best_of).argmax(2)  # (prompts, groups)
    return [
        [some[group * best_of + k] for group, k in enumerate(row)]
        for some, row in zip(samples, best, strict=True)
    ]


def read_labelled(path, names, called=None):
    """{(a, b): {prompt: [share of a]}} from preferences whose `policy`, parallel to the responses,
    names who wrote them, perhaps as `called` has it: {name: that of the policy}. Both orders, and
    several judgements, of a prompt are one vote."""
    found, called = {}, called or {}
    for where, record, responses, pairs in read_preferences(path) if path else ():
        wrote = record.get("policy")
        if not isinstance(wrote, list) or [type(x) for x in wrote] != [str] * len(responses):
            refuse(f"{where}: policy: expected a list of {len(responses)}, who wrote what")
        for i, j, _, label in pairs:
            a, b = (called.get(name, name) for name in (wrote[i], wrote[j]))
            if a != b and a in names and b in names:
                for pair, share in (((a, b), label), ((b, a), 1 - label)):
                    found.setdefault(pair, {}).setdefault(record["prompt"], []).append(share)
    if path and not found:
        refuse(f"{path}:0: file: compares no two of the policies {', '.join(names)}")
    return found


# --- evaluation -----------------------------------------------------------------------------------


def interval(values, cfg):
    """[mean, low, high] of one value a prompt."""
    return mean_with_interval(values, cfg.bootstrap, cfg.seed)


def tasks_of(lines, by):
    """{task: numbers of its prompts}."""
    tasks = {}
    for i, line in enumerate(lines):
        tasks.setdefault(line.get(by, "all"), []).append(i)
    return tasks


def parts_of(samples, tokenizer, ended):
    """What responses are like, whoever judges: {part: (prompts, K), or (prompts, 1) where it is of
    all that is said to a prompt}. `ended`: whether it is known which of them did."""
    parts = {"words": grid_of(samples, lambda s: len(s["text"].split()))}
    parts |= {"tokens": grid_of(samples, lambda s: len(s["ids"]))} if tokenizer else {}
    parts |= {"eos": grid_of(samples, lambda s: s["ended"])} if ended else {}
    parts["empty"] = grid_of(samples, lambda s: not s["text"].strip())
    if len(samples[0]) > 1:  # does the policy say one thing, whatever it is asked?
        texts = [[sample["text"] for sample in some] for some in samples]
        parts["distinct_2_a_prompt"] = np.array([[distinct(some, 2)] for some in texts])
        parts["entropy_2_a_prompt"] = np.array([[gram_entropy(some, 2)] for some in texts])
        parts["different_a_prompt"] = np.array([[len(set(some)) / len(some)] for some in texts])
    return parts


def describe(samples, parts, cfg):
    """Means of what is known of a policy's responses, KL with its interval (None: not known); and
    the variety of all their texts taken together."""
    every = [sample["text"] for some in samples for sample in some]
    found = {"samples": len(every), "eos": None, "tokens": None, "kl": None, "entropy": None}
    found |= {part: float(x.mean()) for part, x in parts.items()}
    for part in {"tokens", "kl", "entropy"} & parts.keys():
        found[part] = interval(parts[part].mean(1), cfg)
    found |= {"distinct_1": distinct(every, 1), "distinct_2": distinct(every, 2)}
    return found | {"entropy_2": gram_entropy(every, 2), "kl_is_bound": False}


def head_to_head(cfg, judges, lines, samples, scores):
    """Win rates of each against each by every judge, and by the controls, length and a coin; the
    same at equal length; differences of scores, paired by prompt; ratings.

    scores {judge who has them: {policy: (prompts, K)}}; judges who compare two are asked to.
    """
    lengths = {n: grid_of(some, lambda s: len(s["ids"])) for n, some in samples.items()}
    names, coin = list(samples), np.random.default_rng(cfg.seed)
    coins = {name: coin.random(grid.shape) for name, grid in lengths.items()}
    sections = "win_rate", "length_controlled", "difference", "order_decides", "elo"
    report, known = {name: {} for name in sections}, scores | {LONGER: lengths, COIN: coins}
    for by in (*judges, LONGER, COIN):
        grids, wins = known.get(by), np.zeros((len(lines), len(names), len(names)))
        rates, even, gaps = ({name: {} for name in names} for _ in range(3))
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
            if by in judges and judges[by].compares:
                shares, flips = judges[by].compare(lines, samples[a], samples[b])
                report["order_decides"][f"{by}: {a}, {b}"] = flips
                pairs = shares, lengths[a][:, 0], lengths[b][:, 0]
            else:
                shares = win_shares(grids[a], grids[b])
                pairs = every_pair(grids[a], grids[b], lengths[a], lengths[b])
            wins[:, i, j], wins[:, j, i] = shares, 1 - shares
            both_ways(rates, a, b, interval(shares, cfg))
            if by in judges:
                how = {"replicates": min(cfg.bootstrap, 200), "seed": cfg.seed}
                both_ways(even, a, b, length_controlled_win_rate(*pairs, **how))
            if by in scores:
                gap = interval(grids[a].mean(1) - grids[b].mean(1), cfg)
                both_ways(gaps, a, b, gap, total=0.0)
        report["win_rate"][by] = rates
        if by in scores:
            report["difference"][by] = gaps
        if by in judges:
            report["length_controlled"][by] = even
        if by in judges and len(names) > 1:
            ratings = ratings_of(wins, replicates=cfg.bootstrap, seed=cfg.seed)
            report["elo"][by] = dict(zip(names, ratings, strict=True))
    return report


def both_ways(table, a, b, value, total=1.0):
    """Enters [value, low, high] of a against b, and total - value of b against a."""
    table[a][b] = value
    table[b][a] = [None if x is None else total - x for x in (value[0], value[2], value[1])]


def by_task(grids, tasks, name, first, cfg):
    """{what: {task: {policy: {name: its mean, "over_first": what it has over the first policy's,
    paired by prompt}}}} of grids {what: {policy: (prompts, K)}}: a win rate can hide a task that
    got worse. Of the prompts that have a number (none: NaN) for every response."""
    report = {what: {task: {} for task in tasks} for what in grids}
    for what, task in itertools.product(grids, tasks):
        means = {policy: grid[tasks[task]].mean(1) for policy, grid in grids[what].items()}
        for policy, values in means.items():
            gaps = values - means.get(first, np.nan)
            known = {name: values, "over_first": gaps}
            known = {key: x[~np.isnan(x)] for key, x in known.items()}
            if len(known[name]):
                found = {key: interval(x, cfg) if len(x) else None for key, x in known.items()}
                report[what][task][policy] = found
    return report


def best_of_n_report(proxies, golds, cfg):
    """The curve for n = 1..N: proxy, gold (None without), analytic KL, and gold's gain over n = 1
    by paired differences."""
    rows, proxy_curve = [], best_of_n_by_prompt(proxies, proxies)
    gold_curve = None if golds is None else best_of_n_by_prompt(proxies, golds)
    for n in range(1, proxy_curve.shape[1] + 1):
        row = {"n": n, "kl": best_of_n_kl(n), "proxy": interval(proxy_curve[:, n - 1], cfg)}
        if gold_curve is not None:
            row["gold"] = interval(gold_curve[:, n - 1], cfg)
            row["gold_gain"] = interval(gold_curve[:, n - 1] - gold_curve[:, 0], cfg)
        rows.append(row)
    return rows


def training_seconds(policy):
    """What training took, by the run's report.json; with the reward model's, for a best-of-n."""
    try:
        runs = [read_json(Path(run) / "report.json") for run in (policy.run, policy.by) if run]
        return float(sum(report["seconds"] for report in runs)) or None
    except (OSError, ValueError, LookupError, TypeError):
        return None


# --- the report -----------------------------------------------------------------------------------

# What the summary's columns mean, by how their heads begin.
MEANINGS = {
    "score by": "mean score by that judge; a reward model's are in standard deviations of what it "
    "was normalised on, and what did not end has the lowest of all, -1 at most",
    "over": "the difference of scores to the first policy's, paired by prompt",
    "KL, nats": "KL to the reference, nats a response: how far training has gone from it",
    "KL at most": "log n - (n - 1)/n, which the KL of the best of n does not exceed",
    "tokens": "mean length of a response, with the EOS that ends it",
    "words": "mean length of a response",
    "EOS": "share of responses that ended within --max_new_tokens",
    "distinct 2": "different pairs of neighbouring words, as a share of all pairs",
    "training, s": "seconds that training took, a best-of-n's with its reward model's",
    "by": "share of pairs, a response of each policy, in which this one's is better; a tie is "
    "half, and a judge of two texts reads each policy's first",
    "Elo by": "ratings from all win rates by that judge: 400 points more win 10 times as often",
}


def texts_of(column):
    """Numbers, or [mean, low, high], as texts with the digits that the largest of them needs; ""
    where they are None."""
    rows, texts = [x if isinstance(x, list) else [x] for x in column], []
    largest = max((abs(row[0]) for row in rows if row[0] is not None), default=0)
    digits = 0 if largest >= 100 else 2 if largest > 1 else 3
    for row in rows:
        mean, *limits = [f"{x:.{digits}f}" for x in row if x is not None] or [""]
        texts.append(f"{mean} [{', '.join(limits)}]" if limits else mean)
    return texts


def table(title, corner, rows):
    """Lines of Markdown: a table {row: {head: number}}, without columns that are empty."""
    heads = dict.fromkeys(head for row in rows.values() for head in row)
    columns = {head: texts_of([row.get(head) for row in rows.values()]) for head in heads}
    columns = {head: column for head, column in columns.items() if any(column)}
    cells = [[corner, *columns], *zip(map(str, rows), *columns.values(), strict=True)]
    return ["", f"## {title}", "", *markdown(cells)] if columns else []


def markdown(cells):
    """A table of which each column is as wide as what is in it."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(widths), *lines[1:]]


def summary(report, judges, show):
    """Tables: what each policy is worth by these judges, and over the first; what it wins against
    the first by all judges, and Elo; what controls would say; scores by task."""
    first, worth, won = next(iter(report["policies"])), {}, {}
    rates = {by: x for by, x in report["win_rate"].items() if by not in (LONGER, COIN)}
    for name, found in report["policies"].items():
        worth[name] = row = {}
        for by in judges:
            row[f"score by {by}"] = found["scores"][by]
            row[f"over {first}'s, by {by}"] = report["difference"][by][name].get(first)
        row |= {"KL, nats": None, "KL at most": None}
        row["KL at most" if found["kl_is_bound"] else "KL, nats"] = found["kl"]
        if found["tokens"]:
            row["tokens"] = found["tokens"][0]
        else:  # without a model there are none
            row["words"] = found["words"]
        row |= {"EOS": found["eos"], "distinct 2": found["distinct_2"]}
        for part in show:
            known = report["parts_by_task"].get(part, {}).get("all", {})
            row[part] = known[name]["mean"][0] if name in known else None
        row["training, s"] = found["training_seconds"]
        won[name] = {f"by {by}": found.get(name, {}).get(first) for by, found in rates.items()}
        won[name] |= {f"Elo by {by}": ratings[name] for by, ratings in report["elo"].items()}
    controls = {
        f"by {by}": {name: found.get(first) for name, found in report["win_rate"][by].items()}
        for by in (LONGER, COIN)
    }
    cost = ", and what they cost in KL" if report["reference"] else ""
    text = table(f"Scores{cost}", "policy", worth) + table(f"Wins against {first}", "policy", won)
    text += table(f"Controls: wins against {first} if this decided", "", controls)
    for by in judges:
        tasks = report["by_task"][by]
        rows = {name: {t: x[name]["score"] for t, x in tasks.items()} for name in won}
        for name, row in rows.items():
            row |= {f"{t}: over {first}'s": x[name]["over_first"] for t, x in tasks.items()}
        text += table(f"Scores by task, by {by}", "policy", rows) if len(tasks) > 1 else []
    return text


def other_tables(report, proxy):
    """What the summary leaves out."""
    text, policies = [], report["policies"]
    for by in [by for by in report["win_rate"] if by not in (LONGER, COIN)]:
        for section, more in (("win_rate", ""), ("length_controlled", ", at equal length")):
            rates = report[section].get(by, {})
            rows = {a: {b: rates.get(a, {}).get(b) for b in policies} for a in policies}
            text += table(f"Win rates by {by}{more}", "row against column", rows)
    for task in report["parts_by_task"]["words"]:
        rows = {
            part.replace("_", " "): {name: x["mean"] for name, x in found[task].items()}
            for part, found in report["parts_by_task"].items()
            if found[task]
        }
        text += table(f"What responses are like: {task}", "", rows)
    keys = "samples distinct_1 distinct_2 entropy_2".split()
    rows = {a: {key.replace("_", " "): x[key] for key in keys} for a, x in policies.items()}
    text += table("Variety of all responses together", "policy", rows)
    curve = report.get("best_of_n", [])
    keys = {"kl": "KL at most, nats", "proxy": "proxy", "gold": "gold", "gold_gain": "gold gain"}
    rows = {
        row["n"]: {head: row.get(key) for key, head in keys.items()}
        for row in curve
        if row["n"] & (row["n"] - 1) == 0 or row["n"] == len(curve)
    }
    return text + table(f"Best of n: {next(iter(policies))} by {proxy}", "n", rows)


def side_by_side(count, lines, samples, scores):
    """Markdown of all policies' responses to `count` prompts, the tasks in turn."""
    turns = itertools.chain.from_iterable(itertools.zip_longest(*tasks_of(lines, "task").values()))
    text = []
    for i in [i for i in turns if i is not None][:count]:
        text += [f"**{lines[i].get('task', 'prompt')}**: {quoted(lines[i]['prompt'][-600:])}", ""]
        rows = [["policy", "response", *scores]]
        for name, some in samples.items():
            ending = "" if some[i][0]["ended"] else " (no EOS)"
            values = [f"{grids[name][i][0]:+.2f}" for grids in scores.values()]
            rows.append([name, quoted(some[i][0]["text"]) + ending, *values])
        text += [*markdown(rows), ""]
    return text


def quoted(text):
    """A text on one line, as it is: no markup of its own."""
    text = " / ".join(text.splitlines()).replace("`", "'")
    return f"`{text}`" if text.strip() else "(empty)"


def print_summary(report, judges, show):
    print("means with 95% intervals by the bootstrap over prompts, differences paired by prompt")
    print("\n".join(summary(report, judges[:1], show)), flush=True)


def write_report(cfg, report, figures, texts):
    """The Markdown report: `texts`, the responses side by side; a figure; the summary, and what its
    columns mean; all other tables and figures."""
    path = Path(cfg.report or Path(cfg.out_dir) / "report.md")
    names, reference = list(report["policies"]), report["reference"]
    pictures = [f"![{p.stem}]({os.path.relpath(p, path.parent)})" for p in figures]
    tables = summary(report, list(report["difference"]), cfg.show)
    title = names[0] if len(names) == 1 else f"{len(names)} policies"
    text = [f"# {title} on {report['prompts']} prompts", "", *texts, *pictures[:1], ""]
    text += ["Means with 95% intervals, by the bootstrap over prompts; differences are paired."]
    text += [f"KL is to {reference}."] if reference else []
    text += [f"{report['cut_prompts']} prompts lost their start."] if report["cut_prompts"] else []
    text += [*tables, ""]
    parts = dict.fromkeys(cfg.show, "mean of this part of gold's `explain`, where it has it")
    for head, meaning in (MEANINGS | parts).items():
        if any(f"| {head} " in line for line in tables):
            text += [f"- {head}: {meaning}."]
    text += other_tables(report, cfg.proxy)
    for pair, share in report["order_decides"].items():
        text += ["", f"The order of the two decided in {share:.1%} of comparisons ({pair})."]
    text += [line for picture in pictures[1:] for line in ("", picture)]
    text += ["", f"`{shlex.join(['python', *sys.argv])}`"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(text) + "\n", "utf-8")
    print(path)


def write_samples(path, lines, samples, name):
    """A samples file: each prompt's line with its responses, without those that are empty."""
    texts = [[s["text"] for s in some if s["text"].strip()] for some in samples]
    pairs = zip(lines, texts, strict=True)
    write_jsonl(path, [line | {"responses": some, "policy": name} for line, some in pairs if some])


# --- figures --------------------------------------------------------------------------------------

MARKERS = "osD^vP*X<>"  # told apart in greyscale too


def figures_of(folder, report, proxy):
    """{path: what `draw` takes}."""
    figures, (first, *others) = {}, report["policies"]
    if others and report["difference"]:
        by, curves = next(iter(report["difference"])), {}
        for name, found in report["policies"].items():
            if found["kl"] is not None:
                label = f"{name} (KL at most)" if found["kl_is_bound"] else name
                curves[label] = [[(math.sqrt(max(found["kl"][0], 0.0)), found["scores"][by])]]
        x_label = "square root of KL to the reference (nats a sequence)"
        if len(curves) > 1:
            figures[folder / "score_by_kl.png"] = x_label, {f"score by {by}": curves}
    if rows := report.get("best_of_n"):
        label, panels = f"{first}, the best of n by {proxy}", {}
        for name, by in (("proxy", proxy), ("gold", "gold")):
            if name in rows[0]:
                panels[f"score by {by}"] = {label: [[(row["n"], row[name]) for row in rows]]}
        figures[folder / "best_of_n.png"] = "n (KL is at most log n - (n - 1)/n)", panels, 2
    return figures


def draw(path, x_label, panels, base=None):
    """A figure of panels {what: {label: [[(x, number or [mean, low, high])], a run]}}, two beside
    each other, with one legend below all. Of several runs under one label, the thick line is their
    mean. `base`: of a logarithmic x axis. -> whether matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: matplotlib is not installed")
        return False
    across, legend = min(len(panels), 2), {}
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    width, rows = 8.4 if across == 2 else 6.2, math.ceil(len(panels) / 2)
    columns = max(1, int(13 * width / (max(map(len, labels)) + 6)))  # of the legend
    height = (2.3 if across == 2 else 3.4) * rows + 0.2 * math.ceil(len(labels) / columns) + 0.3
    figure = Figure((width, height), layout="constrained")
    grid = figure.subplots(rows, across, squeeze=False).flat
    for (what, curves), panel in zip(panels.items(), grid, strict=False):
        for label, runs in curves.items():
            n = labels.index(label)
            look = {"color": f"C{n % 10}", "marker": MARKERS[(n + n // 10) % 10], "markersize": 4}
            if len(runs) > 1:
                for points in runs:
                    panel.plot(*zip(*points, strict=True), color=look["color"], linewidth=0.6)
                known = [dict(points) for points in runs]
                shared = sorted(set.intersection(*map(set, known))) or [math.nan]
                runs = [[(x, np.mean([y.get(x, math.nan) for y in known])) for x in shared]]
            x, values = zip(*runs[0], strict=True)
            middle, *limits = np.array(values, dtype=np.float64).reshape(len(x), -1).T
            bars = [abs(np.nan_to_num(limit - middle)) for limit in limits] or None
            legend[label] = panel.errorbar(x, middle, yerr=bars, capsize=3, linewidth=1, **look)
        if base:
            panel.set_xscale("log", base=base)
            panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(x_label, fontsize=8)
        panel.set_ylabel(what, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    for panel in grid:  # those that are left over
        panel.axis("off")
    where = {"loc": "outside lower center", "ncols": columns, "fontsize": 8}
    figure.legend(legend.values(), legend, **where)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    print(path)
    return True


# --- sub-commands ---------------------------------------------------------------------------------


def read_report(path):
    try:
        report = read_json(path)
    except (OSError, ValueError) as error:
        refuse(f"{path}: not a report: {error}")
    if not isinstance(report.get("policies"), dict) or "difference" not in report:
        refuse(f"{path}: policies: is missing; expected the report.json of an evaluation")
    return report


def show_table(cfg):
    """evaluate.py table: prints the tables of a finished evaluation again."""
    report = read_report(cfg.report)
    print_summary(report, list(report["difference"]), cfg.show)


def check_claims(cfg):
    """evaluate.py check: exit status 1 unless each claim's paired difference is surely above 0."""
    differences, failed = read_report(cfg.report)["difference"].get(cfg.judge, {}), False
    if not cfg.better:
        refuse("--better: expected claims by commas, each POLICY > POLICY")
    for claim in cfg.better:
        better, _, worse = (side.strip() for side in claim.partition(" > "))
        found = differences.get(better, {}).get(worse)
        if not found or found[1] is None:
            refuse(f"{cfg.report}: {claim}: {cfg.judge} did not judge these two on several prompts")
        failed = failed or found[1] <= 0
        print(f"{'ok' if found[1] > 0 else 'FAILED'}  {claim}, by {texts_of([found])[0]}")
    if failed:
        sys.exit(1)


def read_curves(runs):
    """{metric: {run: [(step, value)]}} from the runs' metrics.jsonl."""
    curves = {}
    for name in runs:
        for _, line in read_jsonl(Path(name) / "metrics.jsonl", {}):
            for metric, value in line.items() if type(line.get("step")) is int else ():
                if metric not in ("step", "seconds") and type(value) in (int, float):
                    points = curves.setdefault(metric, {}).setdefault(name, [])
                    points.append((line["step"], value))
    return curves


# What one looks at first, whatever the script.
FIRST = "gold win_rate score proxy kl loss accuracy margin eos tokens entropy nll".split()


def choose_metrics(curves, asked):
    """Names of metrics to draw: those asked for; else up to eight that change in some run."""

    def logged(name, among):  # under this name or as a held-out number, whichever more runs have
        known = [metric for metric in (name, f"eval_{name}") if metric in among]
        return max(known, key=lambda metric: len(curves[metric]), default=None)

    for name in asked:
        if logged(name, curves) is None:
            refuse(f"--y {name}: in no run; there are {', '.join(sorted(curves))}")
    if asked:
        return list(dict.fromkeys(logged(name, curves) for name in asked))
    changing = [
        metric
        for metric, runs in curves.items()
        if any(len({value for _, value in points}) > 1 for points in runs.values())
    ]
    first = [logged(name, changing) for name in FIRST]
    return list(dict.fromkeys([*filter(None, first), *changing]))[:8]


def plot(cfg):
    """evaluate.py plot: learning curves from metrics.jsonl, a panel a metric, a colour a run or a
    group of runs."""
    if not cfg.runs:
        refuse("expected run directories: evaluate.py plot RUN...")
    if cfg.tensorboard:
        return copy_to_tensorboard(cfg.runs)
    curves, groups = read_curves(cfg.runs), {}
    wanted = choose_metrics(curves, cfg.y)
    if not wanted or not cfg.out.endswith(".png"):
        refuse("expected runs that have logged a metric that changes, and --out FILE.png")
    for name in cfg.runs:
        groups.setdefault(re.sub(r"-\d+/?$", "-*", name), []).append(name)
    panels = {metric: {} for metric in wanted}
    for label, names in groups.items():
        label = names[0] if len(names) == 1 else f"{label} (mean of {len(names)})"
        for metric, panel in panels.items():
            if found := [curves[metric][name] for name in names if name in curves[metric]]:
                panel[label] = found
    if draw(cfg.out, "step", panels) and len(wanted) < len(curves):
        print(f"{len(wanted)} of {len(curves)} metrics; --y NAME,NAME draws others")


def copy_to_tensorboard(runs):
    """Each run's metrics.jsonl as TensorBoard's event files, in RUN/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        refuse("--tensorboard: tensorboard is not installed here (pip install tensorboard)")
    for name, curves in {name: read_curves([name]) for name in runs}.items():
        folder, temporary = Path(name, "tensorboard"), Path(name, ".tensorboard.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        writer = SummaryWriter(str(temporary))
        for metric, found in curves.items():
            for step, value in found[name]:
                writer.add_scalar(metric, value, step)
        writer.close()
        shutil.rmtree(folder, ignore_errors=True)  # twice the same would show everything twice
        os.replace(temporary, folder)
        print(folder)


# --- main -----------------------------------------------------------------------------------------


def main():
    commands = {"table": (show_table, TableConfig), "check": (check_claims, CheckConfig)}
    commands |= {"plot": (plot, PlotConfig)}
    if sys.argv[1:] and sys.argv[1] in commands:
        command, config = commands[sys.argv[1]]
        return command(flags(config, __doc__, sys.argv[1], "runs" if command is plot else ""))
    cfg = flags(Config, __doc__)
    policies = [parse_policy(text) for text in cfg.policies]
    check(cfg, policies)
    run = Run(cfg)  # device, precision, ranks

    # The prompts, and what files say to them.
    files = {p.name: read_outputs(p.name, cfg.by) for p in policies if p.is_file}
    lines = choose_prompts(cfg, {path: texts for path, (texts, _) in files.items()}, run.say)
    called = {writer: path for path, (_, writer) in files.items()}
    labelled = read_labelled(cfg.comparisons, cfg.policies, called)

    # The models. All read and write the same tokens, and see the same prompts: what would not fit
    # into the least of them is cut for all.
    runs = list(dict.fromkeys(policy.run for policy in policies if not policy.is_file))
    base = cfg.reference or next(iter(runs), "")
    reference, tokenizer = load_policy(base, run) if base else (None, tokenizer_of(cfg.judges))
    judges, proxies = load_judges(cfg, policies, tokenizer, run)
    models = [judge.model for judge in (judges | proxies).values() if judge.model]
    room = min([model.config.n_positions for model in models], default=sys.maxsize)
    positions = [room, *([reference.config.n_positions] if base else [])]
    for name in runs:
        model, theirs = load_policy(name, run)
        positions.append(model.config.n_positions)
        vocabularies = {model.config.vocab_size, reference.config.vocab_size}
        if identity(theirs) != identity(tokenizer) or len(vocabularies) > 1:
            refuse(f"{name}: another tokenizer, template or vocabulary than {base}'s")
        del model  # here and below before the next is loaded: all may not fit
    longest = min(positions) - (cfg.max_new_tokens if runs else 1)
    prompts, cut = encoded(lines, tokenizer, longest, run.say)
    inputs = [cfg.prompts, cfg.comparisons, cfg.gold, *cfg.judges, *proxies, base, *runs, *files]
    run.open(inputs)

    # Each policy responds, and is judged. `scores` and `parts`, which is all else that is known of
    # a response, are {judge, or part: {policy: (prompts, K)}}.
    report = {"prompts": len(prompts), "cut_prompts": cut, "reference": base, "policies": {}}
    samples, scores, parts = {}, {by: {} for by, judge in judges.items() if judge.scores}, {}
    for number, policy in enumerate(policies):
        begun, name, temperature = time.time(), policy.name, policy.temperature
        if policy.is_file:
            some = samples_of_file(name, files[name][0], prompts, tokenizer, room, run.say)
        else:
            model, seed = load_policy(policy.run, run)[0], cfg.seed * 1009 + number
            how = run.sampler(model), tokenizer, prompts, temperature
            count = policy.best_of * cfg.best_of_samples if policy.by else cfg.num_samples
            count = 1 if temperature == 0 else count  # it always says the same
            some = sample_policy(*how, count, seed, run, run.out_dir / f"tokens-{number}.jsonl")
        if policy.by:
            proxy = proxies[policy.by]
            (values,) = floored(proxy, [proxy(lines, some)], [some])
            some = choose_best(some, values, policy.best_of)
        samples[name] = some
        for by, grids in scores.items():
            grids[name] = judges[by](lines, some)
        known = parts_of(some, tokenizer, not policy.is_file)
        if policy.best_of == 1 and not policy.is_file:
            known |= divergences(model, reference, some, temperature, run)
            if not np.isfinite(known["kl"]).all():
                refuse(f"{name}: its KL to {base} is not a finite number")
        found = describe(some, known, cfg)
        explained = judges["gold"].explain(lines, some) if cfg.gold else {}
        for part, grid in (explained | known).items():
            parts.setdefault(part, {})[name] = grid
        of_base = Path(policy.run).resolve() == Path(base).resolve() and temperature == 1
        if policy.best_of > 1 and of_base:
            found |= {"kl": [best_of_n_kl(policy.best_of), None, None], "kl_is_bound": True}
        if cfg.best_of_n and number == 0:
            path, proxy = run.out_dir / "tokens-best_of_n.jsonl", proxies[cfg.proxy]
            many = sample_policy(*how, cfg.best_of_n, seed + 500, run, path)
            (values,) = floored(proxy, [proxy(lines, many)], [many])
            golds = judges["gold"](lines, many) if "gold" in scores else None
            report["best_of_n"] = best_of_n_report(values, golds, cfg)
        found["training_seconds"] = training_seconds(policy)
        found["seconds"] = round(time.time() - begun, 1)
        report["policies"][name] = found
        if run.rank == 0:
            write_samples(run.out_dir / f"samples-{number}.jsonl", lines, some, name)
        run.say(f"{name}: {found['samples']} responses in {found['seconds']:.0f} s")
        model = how = None

    # Each against each, on every rank alike.
    for by, grids in scores.items():
        final = floored(judges[by], grids.values(), samples.values())
        scores[by] = dict(zip(grids, final, strict=True))
    for name, found in report["policies"].items():
        found["scores"] = {by: interval(grids[name].mean(1), cfg) for by, grids in scores.items()}
    report |= head_to_head(cfg, judges, lines, samples, scores)
    tasks, first = tasks_of(lines, cfg.by), policies[0].name
    report["by_task"] = by_task(scores, tasks, "score", first, cfg)
    everything = tasks | {"all": range(len(lines))}
    report["parts_by_task"] = by_task(parts, everything, "mean", first, cfg)
    for (a, b), votes in labelled.items():
        rate = interval([float(np.mean(shares)) for shares in votes.values()], cfg)
        report["win_rate"].setdefault(cfg.comparisons, {}).setdefault(a, {})[b] = rate

    if run.rank == 0:
        print_summary(report, list(scores), cfg.show)
        figures = figures_of(run.out_dir, report, cfg.proxy)
        drawn = [path for path, what in figures.items() if draw(path, *what)]
        write_report(cfg, report, drawn, side_by_side(cfg.num_shown, lines, samples, scores))
    run.finish(report)


if __name__ == "__main__":
    guarded(main)
