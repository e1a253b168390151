r"""Direct preference optimisation: preferences to policy, without a reward model or sampling.

Objective, for a chosen response y_w and a rejected one y_l to a prompt x (Rafailov et al.,
arXiv:2305.18290 eq. 7), pi being the policy and pi_ref the reference, where it starts:

    minimise  -E[ log sigmoid(beta h) ],  h = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)

It is the Bradley-Terry likelihood of the preferences under the reward beta log pi/pi_ref, whose
optimal policy at KL coefficient beta is pi itself. Relatives, by --loss: ipo, hinge, robust,
plackett_luce (whole rankings), cpl (no reference). --label_smoothing makes dpo conservative DPO;
comparisons with a `label` (AI feedback) are learnt as probabilities. With --online JUDGE the policy
samples, the judge ranks, and the policy learns from that, round by round.

Simplified against the paper: a ranking's pairs are one batch element; AdamW, not RMSprop.

    python dpo.py --gold data/toy.py                   # the embedded task, runs/feedback's rankings
    python dpo.py --online runs/reward --out_dir runs/online      # samples of its own, judged
    torchrun --nproc_per_node=8 dpo.py --init runs/sft --data pairs.jsonl --validation held.jsonl \
        --prompts held.jsonl --max_new_tokens 128 --beta 0.1 --lr 5e-7 --warmup 150 \
        --batch_size 64 --micro_batch_size 4 --out_dir runs/hh
"""

import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from feedback import (
    Reward, brief, collate, grouped_batches, learn_by_adapters, load_policy, load_python, numbers,
    prompts_of_step, punish_missing_eos, read_examples, read_prompts, respond, row_lengths,
    sample_rollout, score_rows, show,
)  # fmt: skip
from model import places_of, predicts, response_sums, token_logprobs
from run import Run, TrainingFlags, adam, files_of, flags, guarded, onto, refuse, schedule, sha256
from tokens import identity, whole_file

# --- mathematics ----------------------------------------------------------------------------------


def dpo_loss(
    chosen_logprobs,
    rejected_logprobs,
    ref_chosen_logprobs,
    ref_rejected_logprobs,
    beta,
    loss="dpo",
    label_smoothing=0.0,
    label=1.0,
    divergence="reverse_kl",
):
    """q L(h) + (1 - q) L(-h) of each pair, (B,), q being the probability that chosen is better.

    h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), each a sum over
    the response's tokens, nats (B,). L is, by `loss`:
        dpo     -log sigmoid(beta h)      arXiv:2305.18290 eq. 7
        ipo     (h - 1 / (2 beta))^2      arXiv:2310.12036 eq. 17, beta being its tau
        hinge   max(0, 1 - beta h)        arXiv:2305.10425, arXiv:2309.06657
        robust  as dpo, with a q that makes up for wrong labels, arXiv:2403.00409
    divergence: another than the reverse KL puts `f_derivative` of each log-ratio in its place.
    label: P(chosen is better), a number or (B,). label_smoothing: the probability e that a label
    is wrong; q = label (1 - e) + (1 - label) e is conservative DPO; robust takes
    q = (label - e) / (1 - 2 e): its mean over labels so flipped is the loss of the right ones.
    """
    # These log-ratios are all that holds the policy to the reference. The gradient, for dpo and
    # label 1, is -beta sigmoid(-beta h) (grad log pi(chosen) - grad log pi(rejected)). The weight
    # sigmoid(-beta h) is near 1 for pairs that the implicit reward beta log pi/ref orders wrongly,
    # and near 0 for those that it has learnt; without it the language degenerates (section 4).
    chosen = f_derivative(chosen_logprobs - ref_chosen_logprobs, divergence)
    h = chosen - f_derivative(rejected_logprobs - ref_rejected_logprobs, divergence)
    q = label * (1 - label_smoothing) + (1 - label) * label_smoothing
    if loss == "robust":
        q = (label - label_smoothing) / (1 - 2 * label_smoothing)

    def loss_of(h):
        if loss in ("dpo", "robust"):
            return -F.logsigmoid(beta * h)
        if loss == "ipo":
            return (h - 1 / (2 * beta)) ** 2
        if loss == "hinge":
            return torch.relu(1 - beta * h)
        raise ValueError(f"loss {loss}: expected dpo, ipo, hinge or robust")

    return q * loss_of(h) + (1 - q) * loss_of(-h)


def f_derivative(log_ratio, divergence="reverse_kl"):
    """f'(u) of log u = log(pi / ref) of whole responses, any shape, without its constant; arXiv:
    2309.16240 table 1. For a policy held by D_f = E_ref f(pi / ref), it is what DPO has log u for.

        reverse_kl log u    forward_kl -1/u    js log(u / (1 + u))    alpha:A -u^-A / A, 0 < A < 1

    Below log u = -10 / A, where u^-A grows past all measure, it stays as it is there: no gradient.
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return F.logsigmoid(log_ratio)
    name, _, number = divergence.partition(":")
    alpha = 1.0 if name == "forward_kl" else float(number)
    return -(-alpha * log_ratio).clamp(max=10).exp() / alpha


def plackett_luce_loss(logprobs, ref_logprobs, beta, beats=None, divergence="reverse_kl"):
    """-log of the probability of each ranking under the implicit rewards r, (B,), nats.

    r = beta (logprobs - ref_logprobs), (B, K), best response first, or beta `f_derivative` of the
    log-ratios: the best is drawn first, with probability softmax(r), then the next among those
    left. arXiv:2305.18290 appendix A.3.
    beats (B, K, K) bool: whether response i (axis 1) is better than j (axis 2). None: all that
    follow. A response of a tie is drawn from itself and those that it beats.
    """
    r = beta * f_derivative(logprobs - ref_logprobs, divergence)
    if beats is None:
        beats = torch.ones(*r.shape, r.shape[1], dtype=torch.bool, device=r.device).triu(1)
    own = torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    left = r[:, None].expand(beats.shape).masked_fill(~(beats | own), -math.inf)
    return (left.logsumexp(2) - r).sum(1)


def cpl_loss(chosen_logprobs, rejected_logprobs, alpha, bias=1.0):
    """-log(e^a+ / (e^a+ + e^(bias a-))), a = alpha times the log-probability of a segment, (B,).

    Contrastive preference learning, arXiv:2310.13639: an advantage is alpha log pi, and no
    reference is needed. The log-probabilities are `discounted` sums. bias < 1 asks less of the
    rejected segment's fall.
    """
    return F.softplus(alpha * (bias * rejected_logprobs - chosen_logprobs))


def discounted(logprobs, mask, gamma):
    """sum_t gamma^t log pi(token t) over each response of mask (B, T), in their order, t counted
    from its first token: (M,). logprobs (B, T)."""
    mask = mask.bool()
    if gamma != 1:
        columns = torch.arange(mask.shape[1], device=mask.device)
        outside = (columns * ~mask).cummax(1).values  # the last column before that is in none
        logprobs = logprobs.new_tensor(gamma) ** (columns - outside - 1) * logprobs
    return response_sums(logprobs.flatten().index_select(0, places_of(mask)), mask)


# --- settings -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(TrainingFlags):
    data: Annotated[tuple[str, ...], "rankings or comparisons"] = ("runs/feedback/rankings.jsonl",)
    validation: Annotated[str, "held-out rankings or comparisons; empty: none"] = (
        "runs/feedback_validation/rankings.jsonl"
    )
    init: Annotated[str, "policy to start from: a run or Hugging Face directory"] = "runs/sft"
    reference: Annotated[str, "policy that KL is to; empty: --init"] = ""
    online: Annotated[
        str, "judge of the policy's own samples, in the place of --data: a reward model or FILE.py"
    ] = ""
    train_prompts: Annotated[str, "prompts of online rounds"] = "data/toy/prompts_train.jsonl"
    prompts: Annotated[str, "held-out prompts to sample for; empty: none"] = (
        "data/toy/prompts_validation.jsonl"
    )
    num_prompts: Annotated[int, "of them, in the last evaluation; in others a quarter"] = 1000
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) is the truth"] = ""
    cache: Annotated[str, "directory for the reference's log-probabilities; empty: not kept"] = (
        "runs/cache"
    )
    out_dir: Annotated[str, "run directory"] = "runs/dpo"
    loss: Annotated[
        Literal["dpo", "ipo", "hinge", "robust", "plackett_luce", "cpl"], "see above, and dpo_loss"
    ] = "dpo"
    beta: Annotated[
        float,
        "KL coefficient (Rafailov et al.: 0.1, summaries 0.5); cpl's alpha; ipo's tau, of sums",
        "(0, inf)",
    ] = 0.3
    divergence: Annotated[
        str,
        "from the reference: reverse_kl, forward_kl, js or alpha:A, A from 0 (reverse) to 1",
        "loss=dpo|robust|plackett_luce",
    ] = "reverse_kl"
    label_smoothing: Annotated[
        float,
        "probability that a label is wrong (dpo, robust: 0.1)",
        "[0, 0.5)",
        "loss=dpo|ipo|hinge|robust",
    ] = 0.0
    gamma: Annotated[float, "discount a token", "[0, 1]", "loss=cpl"] = 1.0
    cpl_bias: Annotated[float, "weight of the rejected segment in cpl (Hejna et al.: 0.5)"] = 0.5
    rounds: Annotated[int, "rounds (RLHF Workflow: 3)", "[1, inf)", "online"] = 20
    round_prompts: Annotated[int, "prompts a round, over all ranks", "[1, inf)", "online"] = 256
    num_samples: Annotated[
        int, "responses to each, all of whose pairs are learnt", "[2, inf)", "online"
    ] = 2
    judge_noise: Annotated[
        float, "scale of Gumbel noise on the judge's scores: people, simulated", "online"
    ] = 0.0
    refresh_reference: Annotated[
        bool,
        "each round's reference is the policy that begins it (RLHF Workflow), so that one beta no "
        "more bounds the KL to the start",
        "online",
    ] = False
    missing_eos_score: Annotated[
        float | None,
        "online, if a response did not end, the smaller of this and the lowest; none: its own",
        "(-inf, inf)",
    ] = -1.0
    temperature: Annotated[float, "of sampling, not of the loss", "(0, inf)"] = 1.0
    max_new_tokens: Annotated[int, "longest sampled response, tokens", "[1, inf)"] = 48
    max_length: Annotated[int, "tokens of prompt and response; 0: the model's positions"] = 0
    overlong: Annotated[
        Literal["drop", "cut"], "a response over max_length: drop it, or cut its end"
    ] = "drop"
    epochs: Annotated[float, "passes over the data (paper: 1)", "not online"] = 1.0
    steps: Annotated[
        int, "optimiser steps, in the place of --epochs; 0: as --epochs says", "not online"
    ] = 0
    batch_size: Annotated[int, "prompts a step, over all ranks (paper: 64 pairs)", "[1, inf)"] = 32
    micro_batch_size: Annotated[int, "prompts a forward on one rank; 0: all of its share"] = 0
    lr: Annotated[float, "peak learning rate (paper: 1e-6, RMSprop)"] = 1e-4
    warmup: Annotated[int, "steps of linear warm-up (paper: 150)"] = 10
    final_lr: Annotated[float, "last rate over peak rate, by a cosine (paper: constant)"] = 0.1
    clip_norm: Annotated[float, "largest gradient norm (the paper's code: 10)", "(0, inf)"] = 1.0
    log_every: Annotated[int, "steps between printed lines", "[1, inf)"] = 20
    eval_every: Annotated[int, "steps between evaluations; 0: only at the end"] = 100
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 100


def has_reference(cfg):
    """Whether the loss is held to a reference's log-probabilities."""
    return cfg.loss != "cpl"


def check(cfg):
    """Ends the script where flags contradict each other."""
    name, _, number = cfg.divergence.partition(":")
    try:
        known = 0 < float(number) < 1 if name == "alpha" else False
    except ValueError:
        known = False
    for wrong, message in (
        (
            not known and cfg.divergence not in ("reverse_kl", "forward_kl", "js"),
            f"--divergence {cfg.divergence}: expected reverse_kl, forward_kl, js or alpha:A, "
            f"0 < A < 1",
        ),
        (not cfg.online and not cfg.data, "--data: expected a file"),
        (cfg.max_length == 1, "--max_length: expected 2 or more"),
        (
            cfg.refresh_reference and not has_reference(cfg),
            "--refresh_reference: --loss cpl has no reference",
        ),
    ):
        if wrong:
            refuse(message)


# --- losses of lines, and what is logged of them --------------------------------------------------

# A batch has B lines of up to K responses, and so up to P = K-choose-2 pairs a line. The responses,
# M in all, stand in R rows of T tokens: those to one prompt beside each other where it is cheaper.


def collate_pairs(examples, n_embd, run):
    """A batch: tokens, mask, segments (R, T), rows (B, K), keep, label (B, P) of `collate`, and
    ref_logprobs (B, K), the reference's of the responses."""
    tokens, mask, segments, rows, keep, _, label = collate(examples, n_embd)
    K = rows.shape[1]  # an example with fewer repeats its first
    refs = [e["ref"] + e["ref"][:1] * (K - len(e["ref"])) for e in examples]
    found = {"tokens": tokens, "mask": mask, "segments": segments, "rows": rows, "keep": keep}
    found |= {"label": label.to(run.precision)}
    found |= {"ref_logprobs": torch.tensor(refs, dtype=torch.float64).to(run.precision)}
    return SimpleNamespace(**dict(zip(found, onto(run.device, *found.values()), strict=True)))


def preference_loss(logprobs, ref_logprobs, keep, label, cfg):
    """The loss of each line, (B,): of its pairs, or of its whole ranking.

    logprobs, ref_logprobs (B, K): of the responses, best first. keep (B, P) bool: which of the
    K-choose-2 pairs count (no ties, no padding); label (B, P).
    """
    K = logprobs.shape[1]
    i, j = torch.triu_indices(K, K, 1, device=logprobs.device)
    chosen, rejected = logprobs[:, i], logprobs[:, j]  # (B, P)
    if cfg.loss == "plackett_luce":
        beats = keep.new_zeros(*logprobs.shape, logprobs.shape[1])
        beats[:, i, j] = keep
        return plackett_luce_loss(logprobs, ref_logprobs, cfg.beta, beats, cfg.divergence)
    if cfg.loss == "cpl":
        losses = label * cpl_loss(chosen, rejected, cfg.beta, cfg.cpl_bias)
        losses = losses + (1 - label) * cpl_loss(rejected, chosen, cfg.beta, cfg.cpl_bias)
    else:
        references = ref_logprobs[:, i], ref_logprobs[:, j]
        how = cfg.loss, cfg.label_smoothing, label, cfg.divergence
        losses = dpo_loss(chosen, rejected, *references, cfg.beta, *how)
    return losses.masked_fill(~keep, 0.0).sum(1) / keep.sum(1)


def pair_numbers(logprobs, ref_logprobs, keep, label, cfg):
    """What is logged of a batch, as sums over its pairs: {name: tensor of one number}. See
    `preference_loss`."""
    K = logprobs.shape[1]
    i, j = torch.triu_indices(K, K, 1, device=logprobs.device)
    logprobs = logprobs.detach()
    log_ratios = logprobs - ref_logprobs
    rewards = cfg.beta * f_derivative(log_ratios, cfg.divergence)  # but for a prompt's constant
    margin = rewards[:, i] - rewards[:, j]  # (B, P)
    ordered = keep & (label > 0.5)  # at 0.5 neither is the better one
    if cfg.loss == "cpl":
        weight = torch.sigmoid(cfg.cpl_bias * rewards[:, j] - rewards[:, i])
    else:  # |dL/dh| / beta: sigmoid(-beta h) for dpo, and for a ranking as if of its pairs
        kind = "dpo" if cfg.loss == "plackett_luce" else cfg.loss
        with torch.enable_grad():
            h = (margin / cfg.beta).requires_grad_()
            losses = dpo_loss(h, 0.0, 0.0, 0.0, cfg.beta, kind, cfg.label_smoothing, label)
            weight = torch.autograd.grad(losses.sum(), h)[0].abs() / cfg.beta
    return {
        "accuracy": ((0.5 + 0.5 * margin.sign()) * ordered).sum(),
        "margin": (margin * keep).sum(),
        "weight": (weight * keep).sum(),
        "chosen": (logprobs[:, i] * keep).sum(),
        "rejected": (logprobs[:, j] * keep).sum(),
        "pairs": keep.sum(),
        "ordered": ordered.sum(),
    }


def sums_of(losses, logprobs, b, weight, run):
    """`pair_numbers` of a batch, its `loss` and how many `prompts`; all 0 where its weight is."""
    found = pair_numbers(logprobs, b.ref_logprobs, b.keep, b.label, run.cfg)
    found = {name: x.to(run.wide) for name, x in found.items()}
    found |= {"loss": losses.detach().sum().to(run.wide), "prompts": len(losses)}
    return {name: weight * x for name, x in found.items()}


def means_of(sums):
    """Sums of `sums_of` -> means: the loss a prompt, the others a pair. 0 where nothing was."""
    sums = Counter(sums)
    found = {"loss": sums["loss"] / max(sums["prompts"], 1)}
    found["accuracy"] = sums["accuracy"] / max(sums["ordered"], 1)
    names = ("margin", "weight", "chosen", "rejected")
    return found | {name: sums[name] / max(sums["pairs"], 1) for name in names}


def held_out_numbers(policy, examples, run):
    """`means_of` held-out examples, over all ranks; {} of none."""
    if not examples:
        return {}
    cfg, sums, lengths = run.cfg, Counter(), row_lengths(examples, policy.config.n_embd)
    order = sorted(range(len(examples)), key=lengths.__getitem__)  # few pads in a batch
    mine, most = order[run.rank :: run.world], math.ceil(len(order) / run.world)
    for rows, weight in run.micro_batches(mine, most, cfg.micro_batch_size or 64, filler=0):
        run.stop_if_told()
        b = collate_pairs([examples[i] for i in rows], policy.config.n_embd, run)
        with torch.no_grad(), run.autocast:
            logits = policy(b.tokens, predicts(b.mask), b.segments)
        logprobs = discounted(token_logprobs(logits, b.tokens, b.mask), b.mask, cfg.gamma)
        logprobs = logprobs[b.rows]  # (B, K)
        losses = preference_loss(logprobs, b.ref_logprobs, b.keep, b.label, cfg)
        sums.update(sums_of(losses, logprobs, b, weight, run))
    return means_of(run.sum(run.in_numbers(sums)))


# --- the reference --------------------------------------------------------------------------------


def load_reference(run, tokenizer):
    """The reference, for as long as the caller needs it. Training needs no more of it than its
    log-probabilities of the responses: they are computed once, and the memory is free again."""
    name = run.cfg.reference or run.cfg.init
    reference, theirs = load_policy(name, run)
    reference = run.parallel(reference.requires_grad_(False))
    if identity(theirs) != identity(tokenizer):
        refuse(f"--reference {name}: another tokenizer or template than {run.cfg.init}'s")
    return reference


def logprobs_of_rows(model, rows, size, run):
    """Sums of log-probabilities, a list of numbers, for rows of (prompt ids, response ids), from
    all ranks; `size` responses a forward."""

    def of(logits, tokens, mask):
        return discounted(token_logprobs(logits, tokens, mask), mask, run.cfg.gamma)

    return score_rows(model, rows, size, run, predicts, of)


def rows_of(examples):
    return [(e["prompt"], response) for e in examples for response in e["responses"]]


def pairs_of(examples):
    return [pair for example in examples for pair in example["pairs"]]


def with_reference(examples, logprobs):
    """Examples with `ref`, their responses' log-probabilities under the reference, and without
    their texts, which of many lines take as much memory as the tokens."""
    logprobs = iter(logprobs)
    return [
        {name: example[name] for name in ("prompt", "responses", "pairs")}
        | {"ref": list(itertools.islice(logprobs, len(example["responses"])))}
        for example in examples
    ]


def refer(path, examples, longest, size, tokenizer, run):
    """A file's examples `with_reference`: its log-probabilities are computed once, and kept in
    --cache under a key of all that they depend on. 0 where the loss has no reference."""
    cfg, rows = run.cfg, rows_of(examples)
    if not has_reference(cfg) or not examples:
        return with_reference(examples, itertools.repeat(0.0))
    key = {
        "rows": [Path(path).suffix, sha256(path)],
        "reference": list(map(sha256, files_of([cfg.reference or cfg.init]))),
        "numbers": [cfg.gamma, str(run.dtype), run.device.type],
        "tokens": [*identity(tokenizer), longest, cfg.overlong],
    }
    key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    cache, begun = Path(cfg.cache) / f"{key}.safetensors", time.time()
    logprobs = read_cache(cache, len(rows)) if cfg.cache and run.rank == 0 else None
    if run.sum([logprobs is not None])[0]:  # rank 0 decides for all
        logprobs, how = run.gather(logprobs or []), f"from {cache}"
    else:
        if cfg.cache:  # a folder that can't be made is told now
            cache.parent.mkdir(parents=True, exist_ok=True)
        logprobs = logprobs_of_rows(load_reference(run, tokenizer), rows, size, run)
        if cfg.cache and run.rank == 0:
            write_cache(cache, logprobs)
        how = f"in {time.time() - begun:.0f} s"
    run.say(f"{path}: {len(rows)} log-probabilities of the reference {how}")
    return with_reference(examples, logprobs)


def read_cache(path, count):
    """Log-probabilities that write_cache wrote, if all are there as written; else None."""
    try:
        with safe_open(path, "pt") as file:
            logprobs, known = file.get_tensor("logprobs"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    good = hashlib.sha256(logprobs.numpy().tobytes()).hexdigest() == known
    return logprobs.tolist() if good and len(logprobs) == count else None


def write_cache(path, logprobs):
    tensor = torch.tensor(logprobs, dtype=torch.float64)
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    with whole_file(path) as temporary:
        save_file({"logprobs": tensor}, temporary, {"sha256": digest})


# How far the first log-probability of a response may be from the reference's, as a share of it: the
# two are one, but sums round otherwise among other rows.
FAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def check_reference(logprobs, ref_logprobs, run):
    """Ends the run, on all ranks, unless a policy that nothing has trained is its reference: the
    first loss is then ln 2 for dpo."""
    far = ((logprobs.detach() - ref_logprobs) / ref_logprobs.clamp(max=-1)).abs().max()
    far, limit = run.gather([float(far)]), FAR[run.dtype]
    if not all(x <= limit for x in far):
        refuse(
            f"self-check: the untrained policy's log-probabilities differ from the reference's by "
            f"a share of {max(far):.1e} (limit {limit:.0e}), though the two are one model. Likely "
            f"causes: dropout, a stale cache, log-probabilities of other tokens"
        )


# --- online rounds --------------------------------------------------------------------------------


def sample_round(run, policy, prompts, judge, tokenizer, number, size):
    """num_samples responses to each of this rank's prompts of a round, a prompt's adjacent, each a
    dict with what the judge says of it. `size` rows a forward."""
    cfg, K, samples = run.cfg, run.cfg.num_samples, []
    order = prompts_of_step(len(prompts), cfg.round_prompts, number, cfg.seed)
    mine = sorted(order[run.rank :: run.world], key=lambda i: len(prompts[i][1]))
    sampler, many = run.sampler(policy), max(size // K, 1)
    most = math.ceil(cfg.round_prompts / run.world)  # prompts of the rank with most
    along = order[: most - len(mine)]  # as the others wait
    for begin in range(0, most, many):
        run.stop_if_told()
        some = [prompts[i] for i in (mine + along)[begin : begin + many] for _ in range(K)]
        seed = ((cfg.seed * 1_000_003 + number) * 4096 + run.rank) * 4096 + begin // many
        generator = torch.Generator(run.device).manual_seed(seed)
        batch = sample_rollout(sampler, some, tokenizer, cfg, cfg.temperature, generator)
        told = batch.responses, batch.texts, batch.ended.tolist(), judge(batch, size).tolist()
        for (line, ids), response, text, ended, score in zip(some, *told, strict=True):
            sample = {"line": line, "prompt": ids, "response": response, "text": text}
            samples.append(sample | {"ended": ended, "score": score})
    # Gumbel noise makes a person of the judge: choices by it follow Bradley and Terry's law. What
    # did not end has its score after the noise, as that is a rule, and nobody's judgement.
    samples = samples[: len(mine) * K]
    scores = torch.tensor([sample["score"] for sample in samples], dtype=torch.float64)
    noise = np.random.default_rng([cfg.seed, number, run.rank]).gumbel(size=len(samples))
    ended = torch.tensor([sample["ended"] for sample in samples], dtype=torch.bool)
    scores = scores + cfg.judge_noise * torch.tensor(noise)
    scores = punish_missing_eos(scores, ended, len(samples), cfg, run).tolist()
    return [sample | {"score": score} for sample, score in zip(samples, scores, strict=True)]


def ranking_of(samples):
    """Samples to one prompt as an example, best response first; of equal ones the first is kept, of
    empty ones none."""
    kept = {}
    for sample in samples:
        if sample["text"].strip():
            kept.setdefault(sample["text"], sample)
    ranked = sorted(kept.values(), key=lambda sample: -sample["score"])
    scores = [sample["score"] for sample in ranked]
    pairs = itertools.combinations(range(len(ranked)), 2)
    return {
        "prompt": samples[0]["prompt"],
        "responses": [sample["response"] for sample in ranked],
        "pairs": [(i, j, 0.0, 1.0) for i, j in pairs if scores[i] > scores[j]],
        "texts": [sample["text"] for sample in ranked],
        "scores": scores,
        "line": samples[0]["line"],
    }


def judged_round(run, policy, prompts, judge, tokenizer, number, size):
    """A round's examples: samples of the policy as it is, from all ranks, as the judge ranks
    them."""
    cfg, K = run.cfg, run.cfg.num_samples
    samples = sample_round(run, policy, prompts, judge, tokenizer, number, size)
    found = [ranking_of(samples[i : i + K]) for i in range(0, len(samples), K)]
    found = [example for example in found if example["pairs"]]
    counts = {"score": sum(sample["score"] for sample in samples), "samples": len(samples)}
    counts |= {"ended": sum(sample["ended"] for sample in samples)}
    counts |= {"empty": sum(not sample["text"].strip() for sample in samples)}
    sums = run.sum(counts)
    found = run.gather(found)
    logprobs = itertools.repeat(0.0)
    if has_reference(cfg):
        reference = policy if cfg.refresh_reference else load_reference(run, tokenizer)
        logprobs = logprobs_of_rows(reference, rows_of(found), size, run)
    run.say(
        f"round {number + 1}/{cfg.rounds}  score {sums['score'] / sums['samples']:+.3f}  EOS "
        f"{sums['ended'] / sums['samples']:.3f}  {sums['empty']:.0f} empty  {len(found)} of "
        f"{cfg.round_prompts} prompts with a pair"
        + ("" if found else ": nothing to learn in this round")
    )
    for example in found:
        line = {name: x for name, x in example["line"].items() if name != "policy"}
        ranking = {"responses": example["texts"], "scores": example["scores"]}
        run.log("rounds", {"round": number} | line | ranking)
    return with_reference(found, logprobs)


# --- main -----------------------------------------------------------------------------------------


def main():
    cfg = flags(Config, __doc__)
    check(cfg)
    run = Run(cfg)  # device, precision, ranks

    # The policy, in eval mode for good: dropout would make it differ from its reference.
    policy, tokenizer = load_policy(cfg.init, run)
    learn_by_adapters(policy, cfg)
    judge = Reward(cfg.online, tokenizer, run) if cfg.online else None
    gold = load_python(cfg.gold) if cfg.gold else None

    # The data, all of it on every rank, so that all agree on every batch.
    reference = load_reference(run, tokenizer)  # to be checked; it is loaded again where needed
    positions = min(policy.config.n_positions, reference.config.n_positions)
    del reference
    longest = min(cfg.max_length or positions, positions)
    files = () if cfg.online else cfg.data
    train_prompts = cfg.train_prompts if cfg.online else ""
    parts = [read_examples(path, tokenizer, longest, cfg.overlong, run.say) for path in files]
    held_out = read_examples(cfg.validation, tokenizer, longest, cfg.overlong, run.say)
    pairs = pairs_of(itertools.chain(*parts))
    judged = [*pairs, *pairs_of(held_out)]
    if cfg.loss == "plackett_luce" and any(label < 1 for *_, label in judged):
        refuse("--loss plackett_luce: a ranking has no label below 1")
    if judge and judge.model:
        positions = min(positions, judge.model.config.n_positions)
    room = positions - cfg.max_new_tokens
    prompts = read_prompts(train_prompts, tokenizer, room, run.say)
    held_prompts = read_prompts(cfg.prompts, tokenizer, room, run.say)[: cfg.num_prompts]

    # An epoch is a pass over the data, or an online round.
    lines = cfg.round_prompts if cfg.online else sum(map(len, parts))
    an_epoch = math.ceil(lines / cfg.batch_size)  # steps
    total = cfg.steps or math.ceil((cfg.rounds if cfg.online else cfg.epochs) * an_epoch)
    inputs = [*files, cfg.validation, train_prompts, cfg.prompts, cfg.gold]
    run.open([*inputs, cfg.online, cfg.init, cfg.reference], total)

    # The reference's log-probabilities of all responses, once; then what learns. What was sampled
    # in a round can't be sampled again from what the policy is later: checkpoints have it.
    many = 4 * cfg.micro_batch_size or 256  # rows a forward without gradients: more fit
    for n, path in enumerate(files):
        parts[n] = refer(path, parts[n], longest, many, tokenizer, run)
    data = list(itertools.chain(*parts))
    held_out = refer(cfg.validation, held_out, longest, many, tokenizer, run)
    model = run.parallel(policy)  # losses go through it: compiled, under DDP
    optimizer, modules = adam(policy, cfg.lr, cfg), {"policy": policy}
    now = run.resume(modules, {"policy": optimizer}, labels=len(pairs), round=-1, examples=[])
    run.say(
        "what to expect: both log-probabilities fall, the chosen one's too; it is the margin "
        "between them that is trained"
    )

    # Held-out prompts: the policy's samples against the reference's. A win is between independent
    # draws, hence two seeds.
    few, seed = held_prompts[: max(cfg.num_prompts // 4, 1)], 2 * 1_000_003 * (cfg.seed + 1)
    how = {"tokenizer": tokenizer, "temperature": cfg.temperature, "rows": many}
    how |= {"score": judge, "gold": gold}
    base = respond(run, load_reference(run, tokenizer), few, seed=seed, **how)
    while True:
        run.save_or_stop()
        if run.evaluation_due():
            asked = few if run.step else []  # at first nothing has been learnt
            reference = load_reference(run, tokenizer)
            samples = respond(run, policy, asked, seed=seed + 1, kl_to=reference, **how)
            del reference  # training has the memory to itself
            found = numbers(samples, base, cfg.missing_eos_score)
            found |= held_out_numbers(policy, held_out, run)
            run.log_evaluation(found, brief(found))
            show(run, samples)
        if run.step == total:
            break

        # 1. The batch: of the data, or of an online round. There a prompt whose responses are all
        #    alike drops out, and perhaps a last batch with it.
        epoch, place = divmod(run.step, an_epoch)
        if cfg.online and now.round < epoch:
            now.examples = judged_round(run, policy, prompts, judge, tokenizer, epoch, many)
            now.round, now.labels = epoch, now.labels + len(pairs_of(now.examples))
        examples = now.examples if cfg.online else data
        if place == 0 or run.step == run.first:
            lengths = row_lengths(examples, policy.config.n_embd)
            order = [cfg.seed, epoch]
            batches = grouped_batches(lengths, cfg.batch_size, order) if examples else []
        batch = batches[place] if place < len(batches) else []

        # 2. One step: gradients of the mean over the batch's prompts, over micro-batches and ranks.
        for group in optimizer.param_groups:
            group["lr"] = schedule(run.step, total, cfg, cfg.lr)
        mine, most = batch[run.rank :: run.world], math.ceil(len(batch) / run.world)
        size = cfg.micro_batch_size
        for rows, weight in run.micro_batches(mine, most, size, batch[0]) if batch else ():
            some = [examples[i] for i in rows]
            b = collate_pairs(some, policy.config.n_embd, run)
            with run.autocast:
                logits = model(b.tokens, predicts(b.mask), b.segments)  # (N, V)
            logprobs = discounted(token_logprobs(logits, b.tokens, b.mask), b.mask, cfg.gamma)
            logprobs = logprobs[b.rows]  # (B, K)
            losses = preference_loss(logprobs, b.ref_logprobs, b.keep, b.label, cfg)  # (B,)
            # One mean over micro-batches and ranks; DDP averages over the ranks: undo it.
            run.scaler.scale(losses.sum() * weight * run.world / len(batch)).backward()
            if run.step == 0 and has_reference(cfg) and not cfg.reference:
                check_reference(logprobs, b.ref_logprobs, run)
            run.count(**sums_of(losses, logprobs, b, weight, run))
            tokens = sum(len(prompt) + len(response) for prompt, response in rows_of(some))
            run.count(tokens=weight * tokens)
        norm = 0.0
        if batch:
            norm = run.clip(optimizer, policy, batch)  # ends the run if it is not finite
            run.scaler.step(optimizer)
            run.scaler.update()
            optimizer.zero_grad(set_to_none=True)
        run.step += 1

        if run.due(cfg.log_every):
            sums, seconds = run.counted()  # over all ranks, since the last printed line
            record = means_of(sums) | {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            record["tokens_per_s"] = sums.get("tokens", 0.0) / seconds
            run.log("metrics", record | ({"labels": now.labels} if cfg.online else {}), record)

    # The finished policy, then what it is worth on held-out prompts.
    run.save_model(policy, tokenizer, stage="dpo")
    reference = load_reference(run, tokenizer)
    samples = respond(run, policy, held_prompts, seed=seed + 1, kl_to=reference, **how)
    base = respond(run, reference, held_prompts, seed=seed, **how)
    worth = numbers(samples, base, cfg.missing_eos_score)
    run.finish({"labels": now.labels} | held_out_numbers(policy, held_out, run) | worth)


if __name__ == "__main__":
    guarded(main)
