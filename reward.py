r"""Reward modelling: stage 2b of RLHF. A scalar head on a language model learns what people prefer.

Objective, over prompts with K ranked responses each (InstructGPT eq. 1, arXiv:2203.02155; K = 2 is
Bradley and Terry's model of a comparison):

    L = mean over prompts of  1 / (K choose 2) * sum_{i better than j} -log sigmoid(r_i - r_j - m)

with r_k the head's output at the last token, EOS, of response k, and m the pair's margin (Llama 2,
arXiv:2307.09288), 0 unless asked for. All of a prompt's responses are in one batch element, each
encoded once: as separate examples the K - 1 pairs of a response would each update on it, and the
model would overfit within an epoch.

After training, scores are normalised: mean 0 and standard deviation 1 on samples of the policy that
RL starts from, stored in config.json; every reader of a reward model demands them.

Simplified against the papers: one head on the whole trunk, no auxiliary language-model loss.

    python reward.py --gold data/toy.py                    # the embedded task, on annotate.py's
    torchrun --nproc_per_node=8 reward.py --init runs/sft --data hh.jsonl --validation held.jsonl \
        --prompts prompts.jsonl --out_dir runs/reward --lr 1e-5 --batch_size 64 --micro_batch_size 8
    python reward.py score --init runs/reward --data samples.jsonl --out scored.jsonl
"""

import dataclasses
import itertools
import json
import math
import sys
from array import array
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F

from feedback import (
    RewardModelFlags, bare, collate, ended_rows, grade_of, grouped_batches, load_python,
    load_reward_model, load_trunk, load_yardstick, normalised, read_examples, read_responses,
    row_lengths, score_examples, score_rows, statistics_of, told,
)  # fmt: skip
from model import last_tokens
from run import (
    ProcessFlags, Run, adam, flags, guarded, onto, read_jsonl, refuse, schedule, write_jsonl,
)  # fmt: skip
from tokens import encode, identity

# --- mathematics ----------------------------------------------------------------------------------


def pairwise_loss(chosen_scores, rejected_scores, margin=0.0, label=1.0, utility=F.logsigmoid):
    """-[p U(d - m) + (1 - p) U(-d - m)], d = chosen - rejected, of each pair, (B,), nats.

    Bradley-Terry with U = log sigmoid. margin: m, a number or (B,), by which the better one must
    lead, whichever it is: Llama 2's m(r), arXiv:2307.09288 eq. 2. label: p = P(chosen is better), a
    number or (B,): 1 is a hard label; AI feedback gives soft ones, and the least loss is then,
    without a margin, the entropy of p, not 0. utility: any increasing function.
    """
    difference = chosen_scores - rejected_scores
    if not torch.is_tensor(label) and label == 1:  # U need not be defined below 0
        return -utility(difference - margin)
    return -(label * utility(difference - margin) + (1 - label) * utility(-difference - margin))


def ranking_loss(scores, utility=F.logsigmoid, margin=0.0, label=1.0, keep=None):
    """Mean of `pairwise_loss` over each prompt's pairs, (B,). InstructGPT eq. 1, arXiv:2203.02155.

    scores (B, K), best response first. margin, label: numbers or (B, P), P = K-choose-2 pairs in
    the order of torch.triu_indices. keep (B, P) bool: the pairs that count (no ties, no padding),
    at least one a row; None: all.
    """
    K = scores.shape[1]
    i, j = torch.triu_indices(K, K, 1, device=scores.device)
    better, worse = scores[:, i], scores[:, j]  # (B, P)
    if keep is None:
        return pairwise_loss(better, worse, margin, label, utility).mean(1)
    # A pair that does not count must not reach U, whose gradient there may be NaN: NaN * 0 is NaN.
    better, worse = better.masked_fill(~keep, 1.0), worse.masked_fill(~keep, 0.0)
    losses = pairwise_loss(better, worse, margin, label, utility)
    return losses.masked_fill(~keep, 0.0).sum(1) / keep.sum(1)


def margin_of(margins, setting):
    """Margins as the data has them -> the loss's: "none", "data", or a table by `grade_of`."""
    if setting in ("none", "data"):
        return margins if setting == "data" else torch.zeros_like(margins)
    table = torch.tensor(setting, dtype=margins.dtype, device=margins.device)
    return table[(margins + 1e-6).clamp(max=3).long()]


def smoothed(label, smoothing):
    """P(better) when labels are taken to be wrong with probability `smoothing`."""
    return label * (1 - smoothing) + (1 - label) * smoothing


# --- settings -------------------------------------------------------------------------------------

MARGINS = {"small": [0, 1 / 3, 2 / 3, 1], "large": [0, 1, 2, 3]}  # Llama 2, table 27; by grade


@dataclasses.dataclass(frozen=True)
class Config(RewardModelFlags):
    data: Annotated[tuple[str, ...], "rankings or comparisons, several files by commas"] = (
        "runs/feedback/rankings.jsonl",
    )
    data_weights: Annotated[
        tuple[float, ...], "how often an epoch passes over each file (0.5: half of it); empty: once"
    ] = ()
    validation: Annotated[str, "held-out rankings or comparisons; empty: none"] = (
        "runs/feedback_validation/rankings.jsonl"
    )
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) is the truth"] = ""
    old: Annotated[
        str, "an older reward model: its accuracy on 1,000 lines of each file is printed first"
    ] = ""
    out_dir: Annotated[str, "run directory"] = "runs/reward"
    margin: Annotated[
        str, "none, data, small, large (Llama 2's, by grade) or four numbers by commas"
    ] = "none"
    batch_size: Annotated[int, "prompts a step, over all ranks (InstructGPT: 64)", "[1, inf)"] = 32
    lr: Annotated[float, "peak learning rate (InstructGPT: 9e-6; Stiennon et al.: 1.5e-5)"] = 5e-4
    warmup: Annotated[int, "steps of linear warm-up (Llama 2: 3%)"] = 10
    log_every: Annotated[int, "steps between printed lines", "[1, inf)"] = 20
    eval_every: Annotated[int, "steps between evaluations; 0: only at the end"] = 100
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 100


@dataclasses.dataclass(frozen=True)
class ScoreConfig(ProcessFlags):
    init: Annotated[str, "a reward model's run directory"] = "runs/reward"
    data: Annotated[str, "demonstrations, samples, rankings or comparisons"] = (
        "runs/feedback_validation/samples.jsonl"
    )
    field: Annotated[
        str, "name of the scores' field; plural for a list, chosen_ and rejected_ for a pair"
    ] = "score"
    micro_batch_size: Annotated[int, "a quarter of the responses a forward; 0: 64"] = 0
    out: Annotated[str, "file to write: the lines of --data with scores"] = "scored.jsonl"


def read_margin(text):
    """--margin -> "none", "data", or a table of margins by grade."""
    if text in ("none", "data"):
        return text
    try:
        table = MARGINS.get(text) or [float(number) for number in text.split(",")]
    except ValueError:
        table = []
    if len(table) != 4 or not all(0 <= number < math.inf for number in table):
        refuse(f"--margin {text}: expected none, data, small, large or four numbers, none below 0")
    return table


# --- data -----------------------------------------------------------------------------------------


def epoch_order(sizes, weights, seed):
    """Indices into files of `sizes` lines laid end to end, each file passed over weights[f] times.

    Of a last, partial pass the lines are drawn at random, others in each epoch (`seed`).
    """
    rng, order, begin = np.random.default_rng(seed), [], 0
    for size, weight in zip(sizes, weights, strict=True):
        whole, part = divmod(round(weight * size), size)
        order += list(range(begin, begin + size)) * whole
        order += sorted((begin + rng.permutation(size)[:part]).tolist())
        begin += size
    return order


def batches_of_files(step, sizes, weights, lengths, cfg):
    """Batches of all epochs, lists of indices, from `step` on."""
    an_epoch = math.ceil(len(epoch_order(sizes, weights, 0)) / cfg.batch_size)
    for epoch in itertools.count(step // an_epoch):
        order = epoch_order(sizes, weights, [cfg.seed, epoch])
        some = [lengths[i] for i in order]
        batches = grouped_batches(some, cfg.batch_size, [cfg.seed, epoch])
        for batch in batches[step % an_epoch if epoch == step // an_epoch else 0 :]:
            yield [order[i] for i in batch]


# --- evaluation -----------------------------------------------------------------------------------


def pair_records(examples, scores, golds=None):
    """What each pair says, as dicts: its `task`; `difference` of the raw scores, and how many
    `words` longer, of the better response over the worse; `margin` and `label`.

    Better by the label, or by gold where `golds` (gold scores of each example's responses) is
    given: then a prompt's pair counts once, however many annotators judged it.
    """
    found, seen = [], set()
    for number, (example, raw) in enumerate(zip(examples, scores, strict=True)):
        line, texts, pairs = example["line"], example["texts"], example["pairs"]
        if golds:
            value = golds[number]
            both = itertools.permutations(range(len(raw)), 2)
            pairs = [(i, j, value[i] - value[j], 1.0) for i, j in both if value[i] > value[j]]
        for i, j, margin, label in pairs:
            if golds and (line["prompt"], texts[i], texts[j]) in seen:
                continue
            seen.add((line["prompt"], texts[i], texts[j]))
            words = len(texts[i].split()) - len(texts[j].split())
            pair = {"task": line.get("task", "all"), "words": words}
            found.append(pair | {"difference": raw[i] - raw[j], "margin": margin, "label": label})
    return found


def hit(difference):
    """1 when the better response has more, 0 when it has less, ties one half."""
    return 0.5 + 0.5 * float(np.sign(difference))


def accuracies(pairs, name):
    """{NAME_accuracy, NAME_longer, NAME_random, NAME_pairs} of all pairs, and NAME_TASK_... of each
    task: how often the model, a judge who prefers the longer response, and a coin are right."""
    coins = np.random.default_rng(0).random(len(pairs)) < 0.5
    pairs = [pair | {"coin": coin} for pair, coin in zip(pairs, coins, strict=True)]
    tasks = sorted({pair["task"] for pair in pairs} - {"all"})
    groups = {f"{name}_{task}": [p for p in pairs if p["task"] == task] for task in tasks}
    found = {}
    for group, some in ({name: pairs} | groups).items():
        if some:
            found[f"{group}_accuracy"] = float(np.mean([hit(p["difference"]) for p in some]))
            found[f"{group}_longer"] = float(np.mean([hit(p["words"]) for p in some]))
            found[f"{group}_random"] = float(np.mean([p["coin"] for p in some]))
        found[f"{group}_pairs"] = len(some)
    return found


def by_grade(pairs, prefix=""):
    """Accuracy by the pair's grade, 0 to 3 (see `grade_of`); {} when no pair has a margin."""
    found, grades = {}, {}
    for pair in pairs if any(pair["margin"] > 0 for pair in pairs) else ():
        grades.setdefault(grade_of(pair["margin"]), []).append(hit(pair["difference"]))
    for grade, hits in sorted(grades.items()):
        found[f"{prefix}grade_{grade}_accuracy"] = float(np.mean(hits))
        found[f"{prefix}grade_{grade}_pairs"] = len(hits)
    return found


def calibration(pairs, bins=10):
    """Reliability of sigmoid(difference) as a probability, in bins of confidence from 0.5 to 1.

    -> {"ece", "calibration": [{"confidence", "accuracy", "pairs"}]}: the expected calibration error
    is the mean over pairs of |accuracy - confidence| of their bin (Guo et al. 2017,
    arXiv:1706.04599). A soft label counts with its probability for the response that the model
    prefers.
    """
    x = np.array([pair["difference"] for pair in pairs])
    label = np.array([pair["label"] for pair in pairs])
    confidence = 1 / (1 + np.exp(-np.abs(np.clip(x, -500, 500))))
    correct = np.where(x > 0, label, np.where(x < 0, 1 - label, 0.5))
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for b in sorted(set(which.tolist())):
        inside = which == b
        means = {"confidence": float(confidence[inside].mean())}
        means["accuracy"] = float(correct[inside].mean())
        found.append(means | {"pairs": int(inside.sum())})
    error = sum(row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in found)
    return {"ece": error / len(pairs), "calibration": found}


def bimodality(values):
    """Sarle's coefficient (skewness^2 + 1) / kurtosis: 1/3 for a Gaussian, 5/9 for a uniform law,
    1 for two points. Margins push scores into two clumps (Llama 2, figure 27)."""
    x = values - values.mean()
    if not x.any():
        return 0.0
    skewness, kurtosis = ((x**n).mean() / x.std() ** n for n in (3, 4))
    return float((skewness**2 + 1) / kurtosis)


def evaluate(examples, scores, golds=None):
    """What a model with these raw scores is worth on held-out examples: {name: mean}, and the bins
    of `calibration`. loss: nats a pair, without margins or smoothing."""
    pairs = pair_records(examples, scores)
    sure = [pair for pair in pairs if pair["label"] > 0.5]  # at 0.5 none is better
    difference, label = (
        torch.tensor([p[name] for p in pairs], dtype=torch.float64)
        for name in ("difference", "label")
    )
    entropy = -(torch.xlogy(label, label) + torch.xlogy(1 - label, 1 - label))
    found = {"loss": float(pairwise_loss(difference, 0.0, label=label).mean())}
    found |= {"label_entropy": float(entropy.mean())}  # the least that the loss can be
    found |= accuracies(sure, "labels") | by_grade(sure) | calibration(pairs)
    if golds:
        strict = pair_records(examples, scores, golds)
        found |= accuracies(strict, "gold") | by_grade(strict, "gold_")
    shorter = [hit(p["difference"]) for p in sure if p["words"] < 0]  # where that is better
    if shorter:
        found |= {"shorter_accuracy": float(np.mean(shorter)), "shorter_pairs": len(shorter)}
    raw = np.array([s for row in scores for s in row])
    words = np.array([len(text.split()) for e in examples for text in e["texts"]])
    if raw.std() > 0 and words.std() > 0:
        found["score_length_correlation"] = float(np.corrcoef(raw, words)[0, 1])
    return found | {"bimodality": bimodality(raw)}


SHOWN = ("loss", "labels_accuracy", "labels_longer", "gold_accuracy", "ece")


def show_scores(run, examples, scores):
    """Logs the raw scores of some held-out responses, and prints the first line's."""
    for example, raw in list(zip(examples, scores, strict=True))[:4]:
        record = {"step": run.step, "prompt": example["line"]["prompt"]}
        run.log("samples", record | {"responses": example["texts"], "raw_scores": raw})
    run.say(f"  {examples[0]['line']['prompt'][-160:]!r}, the best response first, raw scores:")
    for raw, text in zip(scores[0], examples[0]["texts"], strict=True):
        run.say(f"  {raw:8.3f} {text!r}")


def load_old(cfg, tokenizer, max_length, run):
    """The reward model of --old; None where there is none."""
    if not cfg.old:
        return None
    try:
        model, theirs, _ = load_reward_model(cfg.old, run.device)
    except (OSError, ValueError) as error:
        refuse(error)
    if identity(theirs) != identity(tokenizer):
        refuse(f"--old {cfg.old}: another tokenizer or template ({theirs.name}) than {cfg.init}'s")
    if model.config.n_positions < max_length:
        refuse(f"--old {cfg.old}: has fewer positions than {cfg.init}: give a --max_length")
    return model.to(run.precision)


def accuracy_of_old(old, paths, files, size, run):
    """{file: agreement with its labels} of the model of --old, on its examples: how far an older
    model still holds on new data (Llama 2's was refreshed weekly)."""
    found = {}
    for path, examples in zip(paths, files, strict=True) if old else ():
        pairs = pair_records(examples[:1000], score_examples(old, examples[:1000], size, run))
        hits = [hit(pair["difference"]) for pair in pairs if pair["label"] > 0.5]
        if hits:
            found[path] = float(np.mean(hits))
            run.say(f"--old agrees with the labels of {path} in {found[path]:.3f} of pairs")
    return found


# --- reward.py score ------------------------------------------------------------------------------


def texts_to_score(where, record, names):
    """{field: its texts} of a line, once they have been checked; `names`: {field: its scores'}."""
    found = {}
    for name in [name for name in names if name in record]:
        if names[name] in record:
            refuse(f"{where}: {names[name]}: is there already; --field names another")
        if name == "responses":
            found[name] = read_responses(where, record, 1)
            continue
        if not isinstance(record[name], str) or not bare(record[name]).strip():
            refuse(f"{where}: {name}: expected text, got {json.dumps(record[name])[:40]}")
        found[name] = [bare(record[name])]
    if not found:
        refuse(f"{where}: response: is missing (or responses, or chosen and rejected)")
    return found


def score_main(cfg):
    """reward.py score: writes the lines of a file with normalised scores."""
    if not cfg.out or cfg.out.endswith(".gz"):
        refuse("--out: expected a file to write, not compressed")
    run = Run(cfg)
    try:
        model, tokenizer, statistics = load_reward_model(cfg.init, run.device)
    except (OSError, ValueError) as error:
        refuse(error)
    model.to(run.precision)
    names = {"response": cfg.field, "responses": f"{cfg.field}s"}
    names |= {"chosen": f"chosen_{cfg.field}", "rejected": f"rejected_{cfg.field}"}
    lines, rows, longest = [], [], model.config.n_positions
    for where, record in read_jsonl(cfg.data, {"prompt": True}):
        texts = texts_to_score(where, record, names)
        lines.append((record, texts))
        for text in itertools.chain(*texts.values()):
            ids = encode(tokenizer, record["prompt"], text, longest, cut_response=True)
            rows.append([array("i", part) for part in ids])  # 4 bytes a token; a list has 36
    raw = score_rows(model, rows, 4 * cfg.micro_batch_size or 256, run)
    scores = iter(normalised(torch.tensor(raw, dtype=torch.float64), statistics).tolist())
    for record, texts in lines:
        for name, some in texts.items():
            found = [next(scores) for _ in some]
            record[names[name]] = found if name == "responses" else found[0]
    if run.rank == 0:
        write_jsonl(cfg.out, [record for record, _ in lines])
    cut = sum(sum(map(len, row)) == longest for row in rows)
    run.say(
        f"{cfg.out}: {len(lines)} lines, {len(rows)} responses scored, {cut} of which fill the "
        f"model's {longest} positions and may have been cut"
    )
    run.wait()  # no rank leaves while another still writes


# --- main -----------------------------------------------------------------------------------------


def main():
    if sys.argv[1:2] == ["score"]:
        score_main(flags(ScoreConfig, __doc__, "score"))
        return
    cfg = flags(Config, __doc__)
    margin_setting = read_margin(cfg.margin)
    weights = cfg.data_weights or (1.0,) * len(cfg.data)
    if not cfg.data or len(weights) != len(cfg.data):
        refuse(f"--data, --data_weights: expected a file, and {len(cfg.data)} numbers, one a file")
    run = Run(cfg)  # device, precision, ranks

    # The model: a language model's trunk under a new scalar head, or a reward model that goes on.
    reward_model, tokenizer, max_length = load_trunk(cfg, run)
    old = load_old(cfg, tokenizer, max_length, run)
    reference, prompts = load_yardstick(cfg, tokenizer, max_length, run)

    # The data, all of it on every rank, so that all agree on every batch.
    how = (tokenizer, max_length, cfg.overlong, run.say)
    files = [read_examples(path, *how) for path in cfg.data]
    examples, sizes = list(itertools.chain(*files)), list(map(len, files))
    held_out, golds = read_examples(cfg.validation, *how), []
    if cfg.gold:
        gold = load_python(cfg.gold)
        golds = [[told(gold, "score", e["line"], text) for text in e["texts"]] for e in held_out]
    first_epoch = epoch_order(sizes, weights, [cfg.seed, 0])
    if not first_epoch:
        refuse("--data_weights: no line is left")
    total = cfg.steps or math.ceil(cfg.epochs * math.ceil(len(first_epoch) / cfg.batch_size))
    inputs = [*cfg.data, cfg.validation, cfg.gold, cfg.prompts, cfg.init, cfg.old, cfg.tokenizer]
    run.open([*inputs, cfg.normalise_with], total)

    # Scores are normalised on samples that are drawn now: bad flags are seen before training.
    many = 4 * cfg.micro_batch_size or 256  # responses a forward: without gradients more fit
    yardstick = []
    if reference:
        yardstick = ended_rows(run, reference, prompts, tokenizer, many, max_length)
    accuracy = accuracy_of_old(old, cfg.data, files, many, run)
    del reference, old

    model = run.parallel(reward_model)  # losses go through it: compiled, under DDP
    optimizer = adam(reward_model, cfg.lr, cfg)
    run.resume({"reward": reward_model}, {"reward": optimizer})
    width = reward_model.config.n_embd
    lengths, report = row_lengths(examples, width), {}
    batches = batches_of_files(run.step, sizes, weights, lengths, cfg)
    while True:
        run.save_or_stop()
        if held_out and run.evaluation_due():
            scores = score_examples(reward_model, held_out, many, run)
            report = evaluate(held_out, scores, golds)
            run.log_evaluation(report, {name: report[name] for name in SHOWN if name in report})
            show_scores(run, held_out, scores)
        if run.step == total:
            break

        # One step: gradients of the mean over the batch's prompts, over micro-batches and ranks.
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = schedule(run.step, total, cfg, cfg.lr)
        model.train()
        mine, most = batch[run.rank :: run.world], math.ceil(len(batch) / run.world)
        for lines, weight in run.micro_batches(mine, most, cfg.micro_batch_size, filler=batch[0]):
            some = [examples[i] for i in lines]
            tensors = onto(run.device, *collate(some, width))
            tokens, mask, segments, rows, keep, margins, labels = tensors
            with run.autocast:
                output = model(tokens, last_tokens(mask), segments)  # (N,), one a response
            scores = output[rows]  # (B, K), best response first
            margin = margin_of(margins, margin_setting).to(scores.dtype)  # (B, P)
            label = smoothed(labels, cfg.label_smoothing).to(scores.dtype)
            loss = ranking_loss(scores, margin=margin, label=label, keep=keep).sum()
            # One mean over micro-batches and ranks; DDP averages over the ranks: undo it.
            run.scaler.scale(loss * weight * run.world / len(batch)).backward()
            i, j = torch.triu_indices(rows.shape[1], rows.shape[1], 1, device=run.device)
            hits = (0.5 + 0.5 * (scores[:, i] - scores[:, j]).detach().sign()) * keep
            run.count(loss=weight * loss, prompts=weight * len(lines))
            run.count(hits=weight * hits.sum(), pairs=weight * keep.sum())
            read = sum(len(e["prompt"]) + len(r) for e in some for r in e["responses"])
            run.count(tokens=weight * read, cells=tokens.numel())
            run.count(filled=weight * (segments >= 0).sum())
        norm = run.clip(optimizer, reward_model, batch)  # ends the run if it is not finite
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1

        if run.due(cfg.log_every):
            sums, seconds = run.counted()  # over all ranks, since the last printed line
            record = {"loss": sums["loss"] / sums["prompts"]}  # nats a pair
            record |= {"accuracy": sums["hits"] / sums["pairs"]}  # by labels, before training on
            record |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            record |= {"tokens_per_s": sums["tokens"] / seconds}
            run.log("metrics", record | {"padding": 1 - sums["filled"] / sums["cells"]}, record)

    # Normalised scores, then the finished model and what it is worth.
    statistics = statistics_of(reward_model, yardstick, many, run)
    run.save_model(reward_model, tokenizer, stage="reward", **statistics)
    report |= {"old": accuracy} if cfg.old else {}
    report |= {"parameters": sum(p.numel() for p in reward_model.parameters())}
    report |= {"epoch_lines": len(first_epoch)}
    report |= {"epoch_pairs": sum(len(examples[i]["pairs"]) for i in first_epoch)}
    run.finish(report | statistics)


if __name__ == "__main__":
    guarded(main)
