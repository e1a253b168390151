"""Head to head: which policy is better, by how much, and at what cost in KL.

Every policy responds to the same prompts; every judge scores every response. For policies A and B,

    win rate = mean over prompts and over pairs of a response of each of  [A better] + [tie] / 2
    KL(A, reference) = E sum_t sum_v pi(v | s_t) log(pi(v | s_t) / pi_ref(v | s_t))  nats a sequence

with 95% intervals by the bootstrap over prompts. Differences, over all prompts and by task, are
paired: a policy's score less the first's to the same prompt. A judge is a Python file that knows
the truth (`--gold`), a reward model, or a file of comparisons that somebody else labelled. Beside
the win rates stand those of two controls, the longer response and a coin; the report has them at
equal length too.

Simplified against the papers: the win rate at equal length has no term for a prompt's difficulty;
Elo ratings are Bradley-Terry's on Elo's scale, whatever the order of the games.

    python evaluate.py --policies runs/sft,runs/sft@temperature=0 --gold data/toy.py
    python evaluate.py --policies runs/sft,runs/sft@best_of=4:runs/reward --judges runs/reward
    python evaluate.py table; python evaluate.py check --better "A > B"      # of a report
    python evaluate.py plot runs/sft runs/reward                             # learning curves
"""

import collections
import dataclasses
import itertools
import math
import os
import shlex
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from feedback import (
    Reward, batches_of_groups, check_field, connected, distinct, fit_ratings, group_by_prompt,
    load_policy, masks_of_responses, normalised, pad_beside, read_preferences, read_prompts,
    score_rows, told,
)  # fmt: skip
from model import entropy, generate, predicts, read_json, text_of, tokenizer_hash, whole_file
from run import Run, RunFlags, flags, guarded, read_jsonl, refuse, write_jsonl

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
        "RUN, RUN@temperature=T, RUN@best_of=N:REWARD; the tables are against the first",
    ] = ("runs/sft",)
    reference: Annotated[str, "run that KL is to; empty: the first policy's"] = ""
    prompts: Annotated[str, "prompts for all of them"] = "data/toy/prompts_test.jsonl"
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) is the truth"] = ""
    judges: Annotated[tuple[str, ...], "more judges: reward models and Python files"] = ()
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
    num_shown: Annotated[int, "prompts whose responses stand side by side in the report"] = 6
    resume: Annotated[bool, "start anew unless the run in out_dir is finished"] = False


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
    runs: Annotated[tuple[str, ...], "run directories, here or before the flags"] = ()
    metrics: Annotated[tuple[str, ...], "names of metrics; empty: all that change"] = ()
    out: Annotated[str, "the figure"] = "runs/figures/curves.png"


@dataclasses.dataclass(frozen=True)
class Policy:
    name: str  # RUN[@temperature=T][@best_of=N:REWARD]
    run: str
    temperature: float
    best_of: int
    by: str  # the reward that the best are chosen by


def parse_policy(text):
    """A --policies entry as a Policy."""
    run, *options = text.split("@")
    known = {"temperature": "1", "best_of": "1:"}
    options = known | dict(option.partition("=")[::2] for option in options)
    count, _, by = options["best_of"].partition(":")
    try:
        policy = Policy(text, run, float(options["temperature"]), int(count), by)
        good = 0 <= policy.temperature < math.inf and policy.best_of >= 1
        if good and len(options) == len(known) and bool(by) == ("@best_of=" in text):
            return policy
    except ValueError:
        pass
    refuse(f"--policies {text}: expected RUN, RUN@temperature=T or RUN@best_of=N:REWARD")


def check(cfg, policies):
    """Ends the script where flags contradict each other."""
    if not policies or len(set(cfg.policies)) < len(policies):
        refuse("--policies: expected one or more, all different")
    if any(policy.by and policy.temperature == 0 for policy in policies):
        refuse("--policies: the best of several needs a temperature above 0")
    if cfg.best_of_n and (policies[0].by or policies[0].temperature == 0):
        refuse("--best_of_n: expected a first policy that samples, one response at a time")
    if cfg.gold and not cfg.gold.endswith(".py"):
        refuse(f"--gold {cfg.gold}: not a Python file")
    if not (cfg.gold or cfg.judges or cfg.comparisons):
        refuse("expected a judge: --gold, --judges or --comparisons")


# --- samples --------------------------------------------------------------------------------------


def sample_policy(model, tokenizer, prompts, temperature, count, seed, run):
    """`count` responses to each prompt (line, ids): lists (prompts) of lists of {"prompt_ids",
    "ids", "text", "ended"}.

    A chunk of prompts draws from a generator of its own, so that any number of ranks samples the
    same; `seed` differs between policies.
    """
    cfg, eos = run.cfg, tokenizer.eot_token
    size = max((4 * cfg.micro_batch_size or 256) // count, 1)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))
    chunks, found = [order[i : i + size] for i in range(0, len(order), size)], []
    for begin in range(0, len(chunks), run.world):
        run.stop_if_told()
        run.progress("sampled prompts", begin * size, len(prompts))
        number = begin + run.rank
        if number >= len(chunks):
            continue
        generator = torch.Generator(run.device).manual_seed((seed * 1_000_003 + number) % 2**63)
        tokens, mask = generate(
            model,
            [prompts[i][1] for i in chunks[number]],
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
    for i, new, text, ended in run.gather(found):
        samples[i].append({"prompt_ids": prompts[i][1], "ids": new, "text": text, "ended": ended})
    return samples


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
            tokens, mask, segments = (
                x.to(run.device) for x in pad_beside(*zip(*some, strict=True))
            )
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
            both, inside = torch.cat(both, 1), mask.expand(2, -1, -1)  # (2, N), (2, B, T)
            tokenwise = both.new_zeros(inside.shape).masked_scatter(inside, both)
            masks = masks_of_responses(mask, segments)
            sums = torch.stack([(tokenwise * m).sum(2) for m in masks], 2)  # (2, B, K)
            for n, (_, responses), *both in zip(numbers, some, *sums.tolist(), strict=True):
                found.append([n, *(values[: len(responses)] for values in both)])
    _, *both = zip(*sorted(run.gather(found)), strict=True)
    return {
        name: np.array(list(itertools.chain(*values))).reshape(len(samples), -1)
        for name, values in zip(("kl", "entropy"), both, strict=True)
    }


# --- judges ---------------------------------------------------------------------------------------


class Judge:
    """Scores responses: a Python file, which reads texts, and may `explain` and `compare` them; or
    a reward model, which reads the tokens of a response and the EOS that ended it."""

    def __init__(self, name, tokenizer, run):
        self.run, self.reward = run, Reward(name, tokenizer, run)
        self.file = None if self.reward.model else self.reward.file
        self.known = {}  # the head's output for (prompt ids, response ids)

    def __call__(self, lines, samples):
        """Scores (prompts, K). To a reward model what did not end has no score of its own, NaN: see
        `fill_missing`."""
        if self.file:
            return np.array(self.ask(partial(self.tell, "score"), lines, samples))
        rows = [(tuple(s["prompt_ids"]), tuple(s["ids"])) for some in samples for s in some]
        # Each text once, whoever wrote it: in another batch rounding would keep equals from ties.
        new = [row for row in dict.fromkeys(rows) if row not in self.known]
        if new:
            size = 4 * self.run.cfg.micro_batch_size or 256  # no gradients are kept: more fit
            raw = score_rows(self.reward.model, new, size, self.run)
            self.known.update(zip(new, raw, strict=True))
        raw = torch.tensor([self.known[row] for row in rows], dtype=torch.float64)
        scores = normalised(raw, self.reward.statistics).numpy().reshape(len(samples), -1)
        return np.where(grid_of(samples, lambda s: s["ended"]) > 0, scores, np.nan)

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
    """-> {name: Judge}, gold being one of them; and those by which the best are chosen."""
    judges = {"gold": Judge(cfg.gold, tokenizer, run)} if cfg.gold else {}
    judges |= {name: Judge(name, tokenizer, run) for name in cfg.judges}
    names = {policy.by for policy in policies if policy.by}
    names |= {cfg.proxy} if cfg.best_of_n else set()
    return judges, {name: judges.get(name) or Judge(name, tokenizer, run) for name in sorted(names)}


def fill_missing(grids):
    """What did not end gets the smaller of -1 and the lowest score of what did, as in ppo.py, over
    all of `grids`, so that the same response scores the same whoever wrote it."""
    least = min([-1.0, *(float(score) for grid in grids for score in grid[~np.isnan(grid)])])
    return [np.where(np.isnan(grid), least, grid) for grid in grids]


def choose_best(samples, scores, best_of):
    """The best of each `best_of` samples in turn, by score, the first among equals."""
    (scores,) = fill_missing([scores])
    best = scores.reshape(len(samples), -1, best_of).argmax(2)  # (prompts, groups)
    return [
        [some[group * best_of + k] for group, k in enumerate(row)]
        for some, row in zip(samples, best, strict=True)
    ]


def read_labelled(path, names):
    """{(a, b): {prompt: [share of a]}} from preferences whose `policy`, parallel to the responses,
    names who wrote them. Both orders, and several judgements, of a prompt are one vote."""
    found = {}
    for where, record, responses, pairs in read_preferences(path) if path else ():
        wrote = record.get("policy")
        if not isinstance(wrote, list) or [type(x) for x in wrote] != [str] * len(responses):
            refuse(f"{where}: policy: expected a list of {len(responses)}, who wrote what")
        for i, j, _, label in pairs:
            a, b = wrote[i], wrote[j]
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


def describe(samples, parts, tasks, cfg):
    """What a policy's samples are like, whoever judges them: lengths, endings, variety, KL; means
    by task of all `parts` {name: (prompts, K)}, NaN not counted."""
    texts = [[sample["text"] for sample in some] for some in samples]
    every = [text for some in texts for text in some]
    found = {
        "samples": len(every),
        "tokens": interval(grid_of(samples, lambda s: len(s["ids"])).mean(1), cfg),
        "words": float(np.mean([len(text.split()) for text in every])),
        "eos": float(grid_of(samples, lambda s: s["ended"]).mean()),
        "empty": float(np.mean([not text.strip() for text in every])),
        "distinct_1": distinct(every, 1),
        "distinct_2": distinct(every, 2),
        "entropy_2": gram_entropy(every, 2),
    }
    if len(every) > len(samples):
        # Over one prompt's samples: does the policy say one thing, whatever it is asked?
        found["distinct_2_a_prompt"] = float(np.mean([distinct(some, 2) for some in texts]))
        found["entropy_2_a_prompt"] = float(np.mean([gram_entropy(some, 2) for some in texts]))
        found["different_a_prompt"] = float(np.mean([len(set(some)) / len(some) for some in texts]))
    for name in ("kl", "entropy"):  # of who chooses none is known
        found[name] = interval(parts[name].mean(1), cfg) if name in parts else None
    found |= {"kl_is_bound": False, "parts": {}}
    for task, numbers in tasks.items():
        said = {name: x[numbers][~np.isnan(x[numbers])] for name, x in parts.items()}
        found["parts"][task] = {name: float(x.mean()) for name, x in said.items() if len(x)}
    return found


def head_to_head(cfg, judges, lines, samples, scores):
    """Win rates of each against each by every judge, and by the controls, length and a coin; the
    same at equal length; differences of scores, paired by prompt; ratings.

    scores {judge: {policy: (prompts, K)}}; judges who compare two responses are asked to.
    """
    lengths = {n: grid_of(some, lambda s: len(s["ids"])) for n, some in samples.items()}
    names = list(samples)
    sections = "win_rate", "length_controlled", "difference"
    report = {section: {} for section in (*sections, "order_decides", "elo")}
    coin = np.random.default_rng(cfg.seed)
    coins = {name: coin.random(grid.shape) for name, grid in lengths.items()}
    for by, grids in (scores | {LONGER: lengths, COIN: coins}).items():
        wins = np.zeros((len(lines), len(names), len(names)))
        compares = by in scores and hasattr(judges[by].file, "compare")
        for section in sections if by in scores else sections[:1]:
            report[section][by] = {name: {} for name in names}
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
            if compares:
                shares, flips = judges[by].compare(lines, samples[a], samples[b])
                report["order_decides"][f"{by}: {a}, {b}"] = flips
                pairs = shares, lengths[a][:, 0], lengths[b][:, 0]
            else:
                shares = win_shares(grids[a], grids[b])
                pairs = every_pair(grids[a], grids[b], lengths[a], lengths[b])
            wins[:, i, j], wins[:, j, i] = shares, 1 - shares
            both_ways(report["win_rate"][by], a, b, interval(shares, cfg))
            if by in scores:
                how = {"replicates": min(cfg.bootstrap, 200), "seed": cfg.seed}
                rate = length_controlled_win_rate(*pairs, **how)
                both_ways(report["length_controlled"][by], a, b, rate)
                gap = interval(grids[a].mean(1) - grids[b].mean(1), cfg)
                both_ways(report["difference"][by], a, b, gap, total=0.0)
        if len(names) > 1 and by in scores:
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
    got worse. Of the policies that have a number for every response to the task's prompts."""
    report = {what: {task: {} for task in tasks} for what in grids}
    for what, task in itertools.product(grids, tasks):
        means = {policy: grid[tasks[task]].mean(1) for policy, grid in grids[what].items()}
        means = {policy: values for policy, values in means.items() if not np.isnan(values).any()}
        for policy, values in means.items():
            over = interval(values - means[first], cfg) if first in means else None
            report[what][task][policy] = {name: interval(values, cfg), "over_first": over}
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
        return float(sum(report["seconds"] for report in runs))
    except (OSError, ValueError, LookupError, TypeError):
        return None


# --- the report -----------------------------------------------------------------------------------


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


def cells_of(corner, names, columns):
    """Rows of cells, the first the heads, of columns {head: numbers}; without those that are
    empty."""
    cells = {head: texts_of(column) for head, column in columns.items()}
    cells = {corner: names} | {head: column for head, column in cells.items() if any(column)}
    return [list(cells), *zip(*cells.values(), strict=True)]


def main_tables(report, judges, show):
    """{title: rows}: what each policy is worth by these judges, and over the first; what it wins
    against the first by all judges, and Elo; scores by task."""
    names, every = list(report["policies"]), list(report["policies"].values())
    first, worth = names[0], {}
    for by in judges:
        worth[f"score by {by}"] = [found["scores"][by] for found in every]
        gaps = report["difference"][by]
        worth[f"over {first}'s, by {by}"] = [gaps[name].get(first) for name in names]
    for head, bound in (("KL, nats", False), ("KL at most", True)):
        worth[head] = [f["kl"] if f["kl_is_bound"] == bound else None for f in every]
    worth["tokens"] = [found["tokens"][0] for found in every]
    for head, name in (("EOS", "eos"), ("distinct 2", "distinct_2")):
        worth[head] = [found[name] for found in every]
    for part in show:
        worth[part] = [found["parts"].get("all", {}).get(part) for found in every]
    worth["training, s"] = [found["training_seconds"] for found in every]
    won = {}
    for by, rates in report["win_rate"].items():
        won[f"by {by}"] = [rates.get(name, {}).get(first) for name in names]
    for by, ratings in report["elo"].items():
        won[f"Elo by {by}"] = [ratings[name] for name in names]
    tables = {"Scores, and what they cost in KL": worth, f"Wins against {first}": won}
    for by in judges:
        tasks = report["by_task"][by]
        if len(tasks) > 1:
            columns = {t: [x[name]["score"] for name in names] for t, x in tasks.items()}
            for task, found in tasks.items():
                columns[f"{task}: over {first}'s"] = [found[x]["over_first"] for x in names]
            tables[f"Scores by task, by {by}"] = columns
    return {title: cells_of("policy", names, columns) for title, columns in tables.items()}


def more_tables(report, proxy):
    """{title: rows}: what the printed tables leave out."""
    names, every, tables = list(report["policies"]), list(report["policies"].values()), {}
    for by in report["win_rate"]:
        for section, more in (("win_rate", ""), ("length_controlled", ", at equal length")):
            rates = report[section].get(by, {})
            columns = {b: [rates.get(a, {}).get(b) for a in names] for b in names}
            tables[f"Win rates by {by}{more}"] = cells_of("row against column", names, columns)
    parts = report["parts_by_task"]
    for task in parts["eos"]:
        known = {part.replace("_", " "): x[task] for part, x in parts.items() if x[task]}
        columns = {a: [found.get(a, {}).get("mean") for found in known.values()] for a in names}
        tables[f"What responses are like: {task}"] = cells_of("", list(known), columns)
    keys = ["entropy", "distinct_1", "distinct_2", "distinct_2_a_prompt", "different_a_prompt"]
    keys += ["entropy_2", "entropy_2_a_prompt", "words", "empty"]
    columns = {key.replace("_", " "): [found.get(key) for found in every] for key in keys}
    tables["Variety"] = cells_of("policy", names, columns)
    curve = report.get("best_of_n", [])
    curve = [row for row in curve if row["n"] & (row["n"] - 1) == 0 or row["n"] == len(curve)]
    columns = {"KL at most, nats": [row["kl"] for row in curve]}
    for key in ("proxy", "gold", "gold_gain"):
        columns[key.replace("_", " ")] = [row.get(key) for row in curve]
    rows = cells_of("n", [str(row["n"]) for row in curve], columns)
    return tables | {f"Best of n: {names[0]} by {proxy}": rows}


def side_by_side(count, lines, samples, scores):
    """Markdown of all policies' responses to `count` prompts, the tasks in turn."""
    turns = itertools.chain.from_iterable(itertools.zip_longest(*tasks_of(lines, "task").values()))
    text = ["", "## Side by side", ""]
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


def markdown(rows):
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def print_tables(report, judges, show):
    print("means with 95% intervals by the bootstrap over prompts, differences paired by prompt")
    for title, rows in main_tables(report, judges[:1], show).items():
        if len(rows[0]) > 1:
            print(f"\n{title}")
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
                print("  ".join(cells).rstrip(), flush=True)


def write_report(cfg, report, figures, texts):
    """The Markdown report: all tables, figures, and `texts`, the responses side by side."""
    path = Path(cfg.report or Path(cfg.out_dir) / "report.md")
    names = list(report["policies"])
    title = names[0] if len(names) == 1 else f"{len(names)} policies"
    text = [f"# {title} on {report['prompts']} prompts", ""]
    text += ["Means with 95% intervals, by the bootstrap over prompts; differences are paired by"]
    text += [f"prompt. KL, nats a sequence, is to {report['reference']}.", ""]
    text += [f"`{shlex.join(['python', *sys.argv])}`"]
    tables = main_tables(report, list(report["difference"]), cfg.show)
    for title, rows in (tables | more_tables(report, cfg.proxy)).items():
        text += ["", f"## {title}", "", *markdown(rows)] if len(rows[0]) > 1 else []
    for pair, share in report["order_decides"].items():
        text += ["", f"The order of the two decided in {share:.1%} of comparisons ({pair})."]
    for figure in figures:
        text += ["", f"![{figure.stem}]({os.path.relpath(figure, path.parent)})"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text("\n".join([*text, *texts]) + "\n", "utf-8")
    print(path)


def write_samples(path, lines, samples, name):
    """A samples file: each prompt's line with its responses, without those that are empty."""
    texts = [[s["text"] for s in some if s["text"].strip()] for some in samples]
    pairs = zip(lines, texts, strict=True)
    write_jsonl(path, [line | {"responses": some, "policy": name} for line, some in pairs if some])


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


def figures_of(folder, report, proxy):
    """{path: what `draw` takes}."""
    figures, (first, *others) = {}, report["policies"]
    if others and report["difference"]:
        by, curves = next(iter(report["difference"])), {}
        for name, found in report["policies"].items():
            if found["kl"] is not None:
                label = f"{name} (KL at most)" if found["kl_is_bound"] else name
                curves[label] = [(math.sqrt(max(found["kl"][0], 0.0)), found["scores"][by])]
        x_label = "square root of KL to the reference (nats a sequence)"
        figures[folder / "score_by_kl.png"] = curves, x_label, f"score by {by}"
    if rows := report.get("best_of_n"):
        names = [name for name in ("proxy", "gold") if name in rows[0]]
        curves = {name: [(row["n"], row[name]) for row in rows] for name in names}
        labels = "n (KL is at most log n - (n - 1)/n)", "score of the best of n"
        title = f"{first}, best of n by {proxy}"
        figures[folder / "best_of_n.png"] = curves, *labels, title, 2
    return figures


def draw(plt, path, curves, x_label, y_label, title="", base=None):
    """A figure of curves {label: [(x, [mean, low, high])]}; `base`: of a logarithmic axis."""
    figure, panel = plt.subplots(figsize=(6, 4))
    for label, points in curves.items():
        x, values = zip(*points, strict=True)
        middle, low, high = np.array(values, dtype=np.float64).T  # without an interval NaN
        bars = np.nan_to_num([middle - low, high - middle]).clip(min=0)
        panel.errorbar(x, middle, yerr=bars, marker="o", markersize=4, capsize=3, label=label)
    if base:
        panel.set_xscale("log", base=base)
        panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.set_title(title, fontsize=9)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save_figure(figure, path)


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
    print_tables(report, list(report["difference"]), cfg.show)


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


def plot(cfg):
    """evaluate.py plot: learning curves from metrics.jsonl, a panel a metric, a line a run."""
    if not cfg.runs:
        refuse("expected run directories: evaluate.py plot RUN...")
    curves = read_curves(cfg.runs)
    wanted = cfg.metrics or sorted(curves)
    for metric in wanted:
        if metric not in curves:
            refuse(f"--metrics {metric}: in no run; there are {', '.join(sorted(curves))}")
    if not wanted or not cfg.out.endswith(".png"):
        refuse("expected runs that have logged a metric, and --out FILE.png")
    plt = matplotlib_pyplot()
    if plt is None:
        return
    columns = min(len(wanted), 3)
    rows = math.ceil(len(wanted) / columns)
    size = 4.5 * columns, 3 * rows + 0.5
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for panel, metric in itertools.zip_longest(panels.flat, wanted):
        if metric is None:
            panel.axis("off")
            continue
        for i, name in enumerate(cfg.runs):  # a colour a run, in all panels
            points = zip(*curves[metric].get(name, [(math.nan, math.nan)]), strict=True)
            panel.plot(*points, marker=".", markersize=3, color=f"C{i}")
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
    figure.legend(panels[0, 0].lines, cfg.runs, loc="lower center", ncols=4, fontsize=8)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, cfg.out, bottom=0.5 / size[1])


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

    # The models. All read and write the same tokens, and see the same prompts: what would not fit
    # into the least of them is cut for all.
    base = cfg.reference or policies[0].run
    reference, tokenizer = load_policy(base, run)
    judges, proxies = load_judges(cfg, policies, tokenizer, run)
    rewards = [judge.reward.model for judge in (judges | proxies).values()]
    positions = [model.config.n_positions for model in (reference, *filter(None, rewards))]
    for name in dict.fromkeys(policy.run for policy in policies):
        model, theirs = load_policy(name, run)
        positions.append(model.config.n_positions)
        vocabularies = {model.config.vocab_size, reference.config.vocab_size}
        if tokenizer_hash(theirs) != tokenizer_hash(tokenizer) or len(vocabularies) > 1:
            refuse(f"{name}: another tokenizer or vocabulary than {base}'s")
        del model  # here and below before the next is loaded: all may not fit
    for where, line in read_jsonl(cfg.prompts, {"prompt": True}):
        if cfg.by in line:
            check_field(where, line, cfg.by, str)
    prompts = read_prompts(cfg.prompts, tokenizer, min(positions) - cfg.max_new_tokens, run.say)
    prompts = prompts[: cfg.num_prompts or None]
    lines = [line for line, _ in prompts]
    labelled = read_labelled(cfg.comparisons, cfg.policies)
    inputs = [cfg.prompts, cfg.comparisons, cfg.gold, *cfg.judges, *proxies, base]
    run.open([*inputs, *(policy.run for policy in policies)])

    # Each policy responds, and is judged. `scores` and `parts`, which is all else that is known of
    # a response, are {judge, or part: {policy: (prompts, K)}}.
    report = {"prompts": len(prompts), "reference": base, "policies": {}}
    samples, scores, parts = {}, {by: {} for by in judges}, {}
    tasks = tasks_of(lines, cfg.by)
    everything = tasks | {"all": range(len(lines))}
    for number, policy in enumerate(policies):
        begun, name, temperature = time.time(), policy.name, policy.temperature
        model, _ = load_policy(policy.run, run)
        how, seed = (run.sampler(model), tokenizer, prompts, temperature), cfg.seed * 1009 + number
        count = policy.best_of * cfg.best_of_samples if policy.by else cfg.num_samples
        count = 1 if temperature == 0 else count  # it always says the same
        some = sample_policy(*how, count, seed, run)
        if policy.by:
            some = choose_best(some, proxies[policy.by](lines, some), policy.best_of)
        samples[name] = some
        for by, judge in judges.items():
            scores[by][name] = judge(lines, some)
        known = {"words": grid_of(some, lambda s: len(s["text"].split()))}
        known |= {"eos": grid_of(some, lambda s: s["ended"])}
        known |= judges["gold"].explain(lines, some) if cfg.gold else {}
        if policy.best_of == 1:
            known |= divergences(model, reference, some, temperature, run)
        for part, grid in known.items():
            parts.setdefault(part, {})[name] = grid
        found = describe(some, known, everything, cfg)
        of_base = Path(policy.run).resolve() == Path(base).resolve() and temperature == 1
        if policy.best_of > 1 and of_base:
            found |= {"kl": [best_of_n_kl(policy.best_of), None, None], "kl_is_bound": True}
        if cfg.best_of_n and number == 0:
            many = sample_policy(*how, cfg.best_of_n, seed + 500, run)
            (values,) = fill_missing([proxies[cfg.proxy](lines, many)])
            golds = judges["gold"](lines, many) if cfg.gold else None
            report["best_of_n"] = best_of_n_report(values, golds, cfg)
        found["training_seconds"] = training_seconds(policy)
        found["seconds"] = round(time.time() - begun, 1)
        report["policies"][name] = found
        if run.rank == 0:
            write_samples(run.out_dir / f"samples-{number}.jsonl", lines, some, name)
        run.say(f"{name}: {found['samples']} responses in {found['seconds']:.0f} s")
        del model, how

    # Each against each, on every rank alike.
    for by, grids in scores.items():
        scores[by] = dict(zip(grids, fill_missing(grids.values()), strict=True))
    for name, found in report["policies"].items():
        found["scores"] = {by: interval(grids[name].mean(1), cfg) for by, grids in scores.items()}
    report |= head_to_head(cfg, judges, lines, samples, scores)
    report["by_task"] = by_task(scores, tasks, "score", policies[0].name, cfg)
    report["parts_by_task"] = by_task(parts, everything, "mean", policies[0].name, cfg)
    for (a, b), votes in labelled.items():
        rate = interval([float(np.mean(shares)) for shares in votes.values()], cfg)
        report["win_rate"].setdefault(cfg.comparisons, {}).setdefault(a, {})[b] = rate

    # The tables; the numbers; then the figures, which may fail, and lose nothing.
    figures = {}
    if run.rank == 0:
        print_tables(report, list(scores), cfg.show)
        plt = matplotlib_pyplot()
        figures = figures_of(run.out_dir, report, cfg.proxy) if plt else {}
        texts = side_by_side(cfg.num_shown, lines, samples, scores)
        write_report(cfg, report, figures, texts)
    run.finish(report)
    for path, what in figures.items():
        draw(plt, path, *what)


if __name__ == "__main__":
    guarded(main)
