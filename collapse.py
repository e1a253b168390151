r"""Reward collapse, and the prompt-aware loss that prevents it (Song, Cai, Lee and Su,
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
    python collapse.py optimum                                  # the theory: n = 8, 50, 1000
    torchrun --nproc_per_node=8 collapse.py --init runs/sft --data rankings.jsonl \
        --validation held.jsonl --prompts prompts.jsonl --epochs 2 --lr 1e-5 --out_dir runs/aware
"""

import dataclasses
import math
import sys
from array import array
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F

from feedback import (
    RewardModelFlags, batches_from, count_spelled, ended_rows, groups_of, load_trunk,
    load_yardstick, read_responses, row_lengths, score_examples, statistics_of,
)  # fmt: skip
from model import last_tokens, pack
from run import Run, adam, flags, guarded, onto, read_jsonl, refuse, schedule
from tokens import encode, whole_file, write_json

# --- mathematics: the loss ------------------------------------------------------------------------


def prompt_aware_loss(rewards, closed, utilities):
    """-1 / (n choose 2) sum_{i < j} U(r_i - r_j), U by the prompt's kind, (B,). arXiv:2305.17608.

    rewards (B, n) between 0 and 1, best response first; closed (B,) bool; utilities: {"open": U,
    "closed": U}, functions on tensors, defined below 0 too.
    """
    n = rewards.shape[1]
    i, j = torch.triu_indices(n, n, 1, device=rewards.device)
    gaps = rewards[:, i] - rewards[:, j]  # (B, n choose 2)
    gains = torch.where(closed[:, None], utilities["closed"](gaps), utilities["open"](gaps))
    return -gains.mean(1)


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


# --- mathematics: what it tends to ----------------------------------------------------------------


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

    def objective(s):
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
        before = objective(s)
        while True:
            new = (s + length * step).clamp(min=0)
            rise = (gradient @ (new - s)).item()
            if objective(new) >= before + 1e-4 * rise - 1e-14 * abs(before):
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


def law_density(a, bins=20):
    """The mean density of Beta(a, a) in each of as many equal parts of [0, 1], (bins,)."""
    edges = np.linspace(0, 1, bins + 1)
    below = np.interp(edges, beta_quantiles(a, 20_000), np.linspace(0, 1, 20_000))
    return bins * np.diff(below)


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


# --- settings -------------------------------------------------------------------------------------

KINDS = ("open", "closed")


@dataclasses.dataclass(frozen=True)
class Config(RewardModelFlags):
    data: Annotated[tuple[str, ...], "rankings of n responses, with `kind`; files by commas"] = (
        "data/toy/rankings_kinds.jsonl",
    )
    validation: Annotated[str, "held-out rankings of n responses; empty: none"] = (
        "data/toy/rankings_kinds_validation.jsonl"
    )
    out_dir: Annotated[str, "run directory"] = "runs/collapse"
    open_utility: Annotated[
        str, "of open-ended prompts: linear, log, power, inverse_power or log_sigmoid, :PARAMETER"
    ] = "inverse_power"
    closed_utility: Annotated[str, "of closed-ended prompts"] = "linear"
    epsilon: Annotated[
        float, "added to differences where U is steep at 0 (their code: 0.1)", "(0, inf)"
    ] = 0.1
    logit_penalty: Annotated[
        float, "of the mean square of the head's outputs, lest rewards get stuck; falls as lr does"
    ] = 3e-2
    num_responses: Annotated[
        int, "n: lines with more lose some in between, those with fewer are dropped; 0: line 1's"
    ] = 0
    label_noise: Annotated[
        float, "share of the training lines whose order is drawn by lot", "[0, 1]"
    ] = 0.0
    epochs: Annotated[float, "passes over the data; the collapse comes when they are many"] = 80.0
    eval_lines: Annotated[int, "training lines in an evaluation, from the first; 0: all"] = 512
    batch_size: Annotated[int, "prompts a step, over all ranks (their code: 8)", "[1, inf)"] = 8
    lr: Annotated[float, "peak learning rate (their code, DeBERTa: 1e-5)", "(0, inf)"] = 1e-3
    warmup: Annotated[int, "steps of linear warm-up (their code: 10%)"] = 20
    final_lr: Annotated[float, "last rate over peak rate, by a cosine"] = 0.01
    adam_beta2: Annotated[float, "Adam's second-moment decay", "[0, 1)"] = 0.999
    weight_decay: Annotated[float, "AdamW's, on matrices (their code: 0.01)"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm (their code: 2)", "(0, inf)"] = 2.0
    eval_every: Annotated[int, "steps between evaluations; 0: only at the end"] = 40
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 200


@dataclasses.dataclass(frozen=True)
class OptimumConfig:
    utilities: Annotated[tuple[str, ...], "NAME or NAME:PARAMETER, by commas"] = (
        *("linear", "log_sigmoid", "log_sigmoid:0.25", "power:0.5", "log", "inverse_power:0.5"),
        "inverse_power",
    )
    epsilon: Annotated[float, "added to differences where U is steep at 0"] = 0.0
    sizes: Annotated[tuple[int, ...], "how many responses, by commas", "[2, inf)"] = (8, 50, 1000)
    out: Annotated[str, "writes OUT.json and OUT.md"] = "runs/figures/optimal_rewards"


def named(text):
    """NAME or NAME:PARAMETER -> name, and parameter or None."""
    name, _, number = text.partition(":")
    return name, float(number) if number else None


def read_utility(flag, text, epsilon):
    """`utility` of NAME or NAME:PARAMETER, or the script ends."""
    try:
        return utility(*named(text), epsilon)
    except (ValueError, OverflowError) as error:
        refuse(f"{flag} {text}: {error}")


def optimum_of(flag, text, n, U):
    """`optimal_rewards`, or the script ends."""
    try:
        return optimal_rewards(n, U)
    except (ValueError, RuntimeError) as error:
        refuse(f"{flag} {text}: n = {n}: {error}")


# --- data -----------------------------------------------------------------------------------------


def read_rankings(path, tokenizer, max_length, overlong="drop", n=0, say=print):
    """Examples of a rankings file: `prompt` and `responses` (token ids, best first, n of them: as
    many as the file's first line has, where n is 0), `kind`. [] where path is empty.

    The order is taken as it stands, ties in `scores` too. Of more than n responses, n are kept, the
    best and the worst among them; lines with fewer, or one that is too long (and not `cut`), or two
    that are equal, are dropped.
    """
    examples, lines = [], 0
    counts = {"texts cut": 0, "lines with fewer": 0, "with one too long": 0, "with equal ones": 0}
    for where, record in read_jsonl(path, {"prompt": True}) if path else ():
        texts, lines = read_responses(where, record), lines + 1
        count_spelled(counts, record["responses"], texts)
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
        if longest > limit and overlong == "drop":
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
    what = ", ".join(f"{count} {name}" for name, count in counts.items())
    if path and not examples:
        refuse(f"{path}:0: file: none of its {lines} lines can be learnt from ({what})")
    if path:
        say(f"{path}: {len(examples)} lines of {n} responses; {what}")
    return examples


def with_noise(examples, share, seed):
    """Examples of which a share, drawn at random, have their responses in a random order."""
    rng, noisy = np.random.default_rng([seed, 1]), list(examples)
    for i in rng.permutation(len(examples))[: round(share * len(examples))].tolist():
        order = rng.permutation(len(examples[i]["responses"]))
        noisy[i] = examples[i] | {"responses": [examples[i]["responses"][k] for k in order]}
    return noisy


def collate_kinds(examples, n_embd):
    """Examples -> tokens, mask, segments (R, T), responses to a prompt beside each other where that
    is cheaper for a model of width n_embd; closed (B,) bool."""
    groups = [g for e in examples for g in groups_of(e["prompt"], e["responses"], n_embd)]
    closed = torch.tensor([example["kind"] == "closed" for example in examples])
    return *pack(*zip(*groups, strict=True)), closed


# --- evaluation -----------------------------------------------------------------------------------


def describe_rewards(examples, rewards, optima):
    """What the rewards (a list of n for each example, best first, between 0 and 1) look like.

    Of each kind: KIND, the means by rank; KIND_std; KIND_deviation, the largest distance of a mean
    to the optimum; KIND_accuracy, of pairs in the right order, ties half; KIND_histogram, of all in
    tenths; KIND_prompts, how many. And w1, the distance of the kinds' means, if both are there.
    """
    found, curves = {}, []
    for kind in KINDS:
        chosen = [r for e, r in zip(examples, rewards, strict=True) if e["kind"] == kind]
        if not chosen:
            continue
        table = torch.tensor(chosen, dtype=torch.float64)  # (prompts, n)
        i, j = torch.triu_indices(table.shape[1], table.shape[1], 1)
        mean, optimum = table.mean(0), torch.tensor(optima[kind], dtype=torch.float64)
        curves.append(mean)
        hits = 0.5 + 0.5 * (table[:, i] - table[:, j]).sign()
        found[f"{kind}_accuracy"] = hits.mean().item()
        found[f"{kind}_deviation"] = (mean - optimum).abs().max().item()
        found[kind], found[f"{kind}_std"] = mean.tolist(), table.std(0, correction=0).tolist()
        found[f"{kind}_histogram"] = torch.histc(table.float(), 10, 0, 1).int().tolist()
        found[f"{kind}_prompts"] = len(chosen)
    return ({"w1": wasserstein(*curves)} if len(curves) == 2 else {}) | found


def describe_model(model, examples, optima, size, run):
    """`describe_rewards` of a model; {} of no examples."""
    if not examples:
        return {}
    raw = torch.tensor(score_examples(model, examples, size, run), dtype=torch.float64)
    return describe_rewards(examples, raw.sigmoid().tolist(), optima)


def numbers_in(found):
    """What of `describe_rewards` is printed."""
    return {name: x for name, x in found.items() if isinstance(x, float)}


# --- collapse.py optimum --------------------------------------------------------------------------


def optimum_main(cfg):
    """The theory: optimal rewards by utility and n, beside the laws they tend to."""
    if not cfg.utilities or not cfg.sizes:
        refuse("--utilities, --sizes: expected one at least")
    table, heads = [], ["utility", "n", "variance", "share at 1", "limit", "W1 to it"]
    for text in cfg.utilities:
        U = read_utility("--utilities", text, cfg.epsilon)
        a = None if cfg.epsilon else limit_law(*named(text))
        for n in cfg.sizes:
            rewards = optimum_of("--utilities", text, n, U)
            row = {"utility": text, "n": n, "variance": rewards.var(correction=0).item()}
            row["share at 1"] = (rewards > 1 - 1e-9).double().mean().item()
            row["limit"] = None if a is None else "two atoms" if a == 0 else f"Beta({a:g}, {a:g})"
            row["W1 to it"] = None if a is None else distance_to_limit(rewards, a)
            row["law"] = law_density(a).tolist() if a else None
            table.append(row | {"rewards": rewards.tolist()})
            print(f"{text}, n = {n}: variance {row['variance']:.4f}", flush=True)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in table:
        cells = ["" if row[h] is None else row[h] for h in heads]
        cells = [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(f"{cfg.out}.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
    write_json(f"{cfg.out}.json", {"epsilon": cfg.epsilon, "optima": table})
    print(f"{cfg.out}.json: the rewards themselves")


# --- main -----------------------------------------------------------------------------------------


def main():
    if sys.argv[1:2] == ["optimum"]:
        optimum_main(flags(OptimumConfig, __doc__, "optimum"))
        return
    cfg = flags(Config, __doc__)
    if not cfg.data or cfg.num_responses == 1:
        refuse("--data: expected a file; --num_responses: 0, or 2 or more")
    names = {"open": cfg.open_utility, "closed": cfg.closed_utility}
    utilities = {}
    for kind, text in names.items():
        U = scaled(read_utility(f"--{kind}_utility", text, cfg.epsilon))
        utilities[kind] = with_smoothing(U, cfg.label_smoothing)
    run = Run(cfg)  # device, precision, ranks

    # The model: a language model's trunk under a new scalar head, or a reward model that goes on.
    reward_model, tokenizer, max_length = load_trunk(cfg, run)
    reference, prompts = load_yardstick(cfg, tokenizer, max_length, run)

    # The data, all of it on every rank, so that all agree on every batch.
    n, examples = cfg.num_responses, []
    for path in cfg.data:
        examples += read_rankings(path, tokenizer, max_length, cfg.overlong, n, run.say)
        n = len(examples[0]["responses"])
    held_out = read_rankings(cfg.validation, tokenizer, max_length, cfg.overlong, n, run.say)
    examples = with_noise(examples, cfg.label_noise, cfg.seed)
    optima = {
        kind: optimum_of(f"--{kind}_utility", names[kind], n, U).tolist()
        for kind, U in utilities.items()
    }
    total = cfg.steps or math.ceil(cfg.epochs * math.ceil(len(examples) / cfg.batch_size))
    inputs = [*cfg.data, cfg.validation, cfg.prompts, cfg.init, cfg.normalise_with, cfg.tokenizer]
    run.open(inputs, total)

    # Scores are normalised on samples that are drawn now: bad flags are seen before training.
    many, yardstick = 4 * cfg.micro_batch_size or 256, []  # without gradients more fit
    if reference:
        yardstick = ended_rows(run, reference, prompts, tokenizer, many, max_length)
    del reference

    model = run.parallel(reward_model)  # losses go through it: compiled, under DDP
    optimizer = adam(reward_model, cfg.lr, cfg)
    now = run.resume({"reward": reward_model}, {"reward": optimizer}, interpolated=None)
    width, report = reward_model.config.n_embd, {}
    lengths = row_lengths(examples, width)
    batches = batches_from(run.step, lengths, cfg.batch_size, cfg.seed)
    while True:
        run.save_or_stop()
        if run.evaluation_due():
            some = examples[: cfg.eval_lines or len(examples)]
            found = describe_model(reward_model, some, optima, many, run)
            held = describe_model(reward_model, held_out, optima, many, run)
            right = [found[f"{kind}_accuracy"] for kind in KINDS if kind in found]
            if min(right) >= 0.99 and now.interpolated is None:
                now.interpolated = run.step  # training pairs are in order, but for 1%
            report = {f"train_{name}": x for name, x in found.items()}
            run.log("metrics", report, numbers_in(found), "training: ")
            run.log_evaluation(held, numbers_in(held))
            report |= {f"eval_{name}": x for name, x in held.items()}
        if run.step == total:
            break

        # One step: gradients of the mean over the batch's prompts, over micro-batches and ranks.
        batch = next(batches)
        lr = schedule(run.step, total, cfg, cfg.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        penalty = cfg.logit_penalty * lr / cfg.lr  # about none at the end
        model.train()
        mine, most = batch[run.rank :: run.world], math.ceil(len(batch) / run.world)
        for lines, weight in run.micro_batches(mine, most, cfg.micro_batch_size, filler=batch[0]):
            some = [examples[i] for i in lines]
            tokens, mask, segments, closed = onto(run.device, *collate_kinds(some, width))
            with run.autocast:
                output = model(tokens, last_tokens(mask), segments)  # (N,), one a response
            raw = output.view(-1, n)  # (B, n), best response first
            losses = prompt_aware_loss(raw.sigmoid(), closed, utilities)  # (B,)
            loss = (losses + penalty * raw.square().mean(1)).sum()
            # One mean over micro-batches and ranks; DDP averages over the ranks: undo it.
            run.scaler.scale(loss * weight * run.world / len(batch)).backward()
            run.count(loss=weight * loss, prompts=weight * len(lines))
            read = mask.sum() + n * sum(len(example["prompt"]) for example in some)
            run.count(tokens=weight * read, cells=tokens.numel())
            run.count(filled=weight * (segments >= 0).sum())
        norm = run.clip(optimizer, reward_model, batch)  # ends the run if it is not finite
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1

        if run.due(cfg.log_every):
            sums, seconds = run.counted()  # over all ranks, since the last printed line
            record = {"loss": sums["loss"] / sums["prompts"]}  # -U a pair, and the penalty
            record |= {"lr": lr, "grad_norm": norm, "tokens_per_s": sums["tokens"] / seconds}
            run.log("metrics", record | {"padding": 1 - sums["filled"] / sums["cells"]}, record)

    # Normalised scores, then the finished model and what it is worth.
    statistics = statistics_of(reward_model, yardstick, many, run, "sigmoid")
    run.save_model(reward_model, tokenizer, stage="reward", **statistics)
    report |= {f"{kind}_optimum": optimum for kind, optimum in optima.items()}
    run.finish(report | statistics | {"interpolated_at": now.interpolated})


if __name__ == "__main__":
    guarded(main)
