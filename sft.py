r"""Supervised fine-tuning: stage 1 of RLHF, and pre-training with the same loop.

Objective, over prompts and demonstrated responses (step 1 of InstructGPT, arXiv:2203.02155):

    L = - sum_t w_t log pi(token_t | tokens before t) / sum_t w_t

with w_t = 1 on the response and the EOS that ends it, `--prompt_loss_weight` on the prompt. The
sums run over the whole batch, whatever the number of ranks and micro-batches. A line with an empty
prompt is plain language modelling, so this script also pre-trains.

The embedded task is data/toy.py's small language; gold is its true reward, which judges samples.

Simplified against the papers: a batch has sequences of like length. Those that fit share a row,
and don't see each other.

    python sft.py --prompt_loss_weight 0.3 --gold data/toy.py          # the embedded task
    torchrun --nproc_per_node=8 sft.py --init gpt2/ --data alpaca.jsonl --validation held.jsonl \
        --out_dir runs/alpaca --lr 1e-5 --batch_size 128 --micro_batch_size 8 --epochs 3
"""

import dataclasses
import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from feedback import (
    batches_from, learn_by_adapters, load_policy, load_python, numbers, one_a_task, packed,
    read_demonstrations, read_prompts, respond, set_dropout, show,
)  # fmt: skip
from model import PARTS, GPT, GPTConfig, predicts, token_logprobs
from run import Run, TrainingFlags, adam, flags, guarded, onto, refuse, schedule
from tokens import load_tokenizer, tokenizer_files

# --- mathematics ----------------------------------------------------------------------------------


def loss_weights(mask, segments, prompt_loss_weight):
    """w (R, T) of rows from `pack`: 1 on response tokens, prompt_loss_weight on prompt tokens but
    the first of each example, 0 on pads.

    The first token has nothing before it to be predicted from.
    """
    example = segments // PARTS  # -1 on pads
    first = F.pad(example[:, 1:] != example[:, :-1], (1, 0), value=True)
    prompt = ~mask & ~first & (example >= 0)
    return mask + prompt_loss_weight * prompt


def weight_of(prompt, response, prompt_loss_weight):
    """The sum of one line's `loss_weights`, from the lengths of its two lists of ids alone: so that
    every rank knows the whole batch's without asking."""
    return len(response) + prompt_loss_weight * (len(prompt) - 1)


def weighted_nll(model, tokens, weights, segments):
    """sum_t w_t * -log pi(token_t | before) over a batch of rows (R, T), a scalar, nats. The head
    runs only where a token is trained."""
    trained = weights > 0
    logits = model(tokens, predicts(trained), segments)  # (N, V)
    return (-token_logprobs(logits, tokens, trained) * weights).sum()


# --- settings -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(TrainingFlags):
    data: Annotated[str, "demonstrations: prompt, response"] = "data/toy/demonstrations.jsonl"
    validation: Annotated[str, "held-out demonstrations; empty: none"] = (
        "data/toy/demonstrations_validation.jsonl"
    )
    prompts: Annotated[str, "prompts to sample from when evaluating; empty: none"] = (
        "data/toy/prompts_validation.jsonl"
    )
    init: Annotated[str, "run or Hugging Face directory; empty: random weights"] = ""
    tokenizer: Annotated[
        str, "gpt2, FILE.tiktoken or directory; empty: --init's, or data/toy/bpe.tiktoken"
    ] = ""
    template: Annotated[
        Literal["", "none", "chatml", "llama3"],
        "how prompts are laid out; none: as plain text; empty: as --init does, else by its "
        "tokenizer's special tokens",
        "init",
    ] = ""
    turns: Annotated[
        Literal["all", "last"], "of a conversation, train all turns of the assistant's, or the last"
    ] = "all"
    gold: Annotated[str, "Python file whose score(prompt, response, **fields) judges samples"] = ""
    out_dir: Annotated[str, "run directory"] = "runs/sft"
    prompt_loss_weight: Annotated[
        float, "weight of a prompt token's loss (papers: 0; embedded task from scratch: 0.3)"
    ] = 0.0
    dropout: Annotated[
        float, "of all kinds, while training (InstructGPT: residual 0.2)", "[0, 1)"
    ] = 0.0
    epochs: Annotated[float, "passes over the data (InstructGPT: 16, Stiennon et al.: 1)"] = 1.0
    steps: Annotated[int, "optimiser steps, in the place of --epochs; 0: as --epochs says"] = 0
    max_length: Annotated[int, "tokens of prompt and response; 0: the model's positions"] = 0
    overlong: Annotated[
        Literal["drop", "cut"],
        "what is over max_length loses its prompt's start; a response that still is: drop the "
        "line, or cut its end, so that it has no EOS",
    ] = "drop"
    n_layer: Annotated[int, "layers (gpt2: 12)", "not init"] = 3
    n_embd: Annotated[int, "width (gpt2: 768)", "not init"] = 128
    n_head: Annotated[int, "attention heads (gpt2: 12)", "not init"] = 4
    n_positions: Annotated[int, "longest sequence (gpt2: 1024)", "not init"] = 128
    initializer_range: Annotated[
        float,
        "std of the initial weights (gpt2: 0.02, with which 128 wide doesn't learn)",
        "not init",
    ] = 0.1
    num_prompts: Annotated[int, "prompts sampled in the last evaluation"] = 1000
    max_new_tokens: Annotated[int, "longest sampled response, tokens", "[1, inf)"] = 48
    batch_size: Annotated[int, "lines a step, over all ranks (Stiennon: 128)", "[1, inf)"] = 32
    lr: Annotated[float, "peak learning rate (GPT-2: 3e-6 to 6e-5; InstructGPT: 9.65e-6)"] = 2e-3
    warmup: Annotated[int, "steps of linear warm-up"] = 50
    final_lr: Annotated[float, "last rate over peak rate, by a cosine (InstructGPT: 0.1)"] = 0.0


def new_policy(cfg, run):
    """A model of random weights, and its tokenizer."""
    try:
        tokenizer = load_tokenizer(cfg.tokenizer or "data/toy/bpe.tiktoken")
        tokenizer_files(tokenizer)  # one that can't be saved is refused now, not after training
        names = ("n_layer", "n_embd", "n_head", "n_positions", "initializer_range")
        sizes = {name: getattr(cfg, name) for name in names}
        torch.manual_seed(cfg.seed)
        policy = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes))
    except (OSError, ValueError) as error:
        refuse(error)
    return policy.to(run.place(), run.precision), tokenizer


def held_out_loss(model, examples, size, run):
    """{"loss": mean nats of held-out response tokens, EOS included, "perplexity"}; {} of none."""
    if not examples:
        return {}
    model.eval()
    total = run.zeros(2)
    mine = sorted(examples[run.rank :: run.world], key=lambda example: sum(map(len, example)))
    most = math.ceil(len(examples) / run.world)
    for some, weight in run.micro_batches(mine, most, size, filler=examples[0]):
        run.stop_if_told()
        tokens, mask, segments = onto(run.device, *packed(some))
        with torch.no_grad(), run.autocast:
            nll = weighted_nll(model, tokens, mask.float(), segments)
        total += weight * torch.stack([nll.to(run.wide), mask.sum()])
    nll, count = run.sum(total.tolist())
    return {"loss": nll / count, "perplexity": math.exp(min(nll / count, 700))}  # exp(710) is inf


# --- main -----------------------------------------------------------------------------------------


def main():
    cfg = flags(Config, __doc__)
    if cfg.max_length == 1:
        refuse("--max_length: expected 2 or more")
    run = Run(cfg)  # device, precision, ranks

    # The model: an --init directory's, or a new one. Its tokenizer comes with it.
    if cfg.init:
        policy, tokenizer = load_policy(cfg.init, run, cfg.tokenizer, cfg.template or None)
        learn_by_adapters(policy, cfg)
    elif cfg.lora_rank:
        refuse("--lora_rank: only with --init, as the weights don't learn")
    else:
        policy, tokenizer = new_policy(cfg, run)
    set_dropout(policy, cfg.dropout)

    # The data, all of it on every rank, so that all agree on every batch.
    longest = min(cfg.max_length or policy.config.n_positions, policy.config.n_positions)
    if policy.wpe is None:  # RoPE has any number of positions: later stages keep to these
        policy.config = dataclasses.replace(policy.config, n_positions=longest)
    how = (tokenizer, longest, cfg.overlong, run.say, cfg.turns)
    examples = read_demonstrations(cfg.data, *how)
    held_out = read_demonstrations(cfg.validation, *how)
    room = policy.config.n_positions - cfg.max_new_tokens
    prompts = read_prompts(cfg.prompts, tokenizer, room, run.say)
    gold = load_python(cfg.gold) if cfg.gold else None
    lengths = [len(prompt) + len(response) for prompt, response in examples]
    total = cfg.steps or math.ceil(cfg.epochs * math.ceil(len(examples) / cfg.batch_size))
    vocabulary = cfg.tokenizer or ("" if cfg.init else "data/toy/bpe.tiktoken")
    inputs = [cfg.data, cfg.validation, cfg.prompts, cfg.gold, cfg.init, vocabulary]
    run.open(inputs, total)

    model = run.parallel(policy)  # training losses go through it: compiled, under DDP
    optimizer = adam(policy, cfg.lr, cfg)
    torch.manual_seed(cfg.seed * run.world + run.rank)  # dropout differs between the ranks
    # A run that goes on gets its step and generators, and so its batches and dropout, from here.
    run.resume({"policy": policy}, {"policy": optimizer})
    batches = batches_from(run.step, lengths, cfg.batch_size, cfg.seed)
    many = 4 * cfg.micro_batch_size or 256  # lines a forward without gradients: more fit
    few = one_a_task(prompts)[:6]  # to be read, not to be measured by

    while True:
        run.save_or_stop()
        if run.evaluation_due():
            samples = respond(run, policy, few, tokenizer, 1.0, many, cfg.seed, gold=gold)
            run.log_evaluation(held_out_loss(policy, held_out, many, run))
            show(run, samples)
        if run.step == total:
            break

        # One step: gradients of the batch's weighted mean, over micro-batches and ranks.
        batch = next(batches)
        total_weight = sum(weight_of(*examples[i], cfg.prompt_loss_weight) for i in batch)
        for group in optimizer.param_groups:
            group["lr"] = schedule(run.step, total, cfg, cfg.lr)
        model.train()
        mine, most = batch[run.rank :: run.world], math.ceil(len(batch) / run.world)
        size = cfg.micro_batch_size
        for rows, weight in run.micro_batches(mine, most, size, filler=batch[0]):  # 0 of a filler
            some = [examples[i] for i in rows]
            tokens, mask, segments = onto(run.device, *packed(some))  # (R, T)
            token_weights = loss_weights(mask, segments, cfg.prompt_loss_weight)
            with run.autocast:
                nll = weighted_nll(model, tokens, token_weights, segments)
            # One mean over micro-batches and ranks; DDP averages over the ranks: undo it.
            run.scaler.scale(nll * weight * run.world / total_weight).backward()
            run.count(nll=weight * nll, cells=tokens.numel())
            run.count(tokens=weight * sum(lengths[i] for i in rows))
        run.count(token_weights=total_weight / run.world)  # which the sum over ranks undoes
        norm = run.clip(optimizer, policy, batch)  # ends the run if it is not finite
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1

        if run.due(cfg.log_every):
            sums, seconds = run.counted()  # over all ranks, since the last printed line
            record = {"loss": sums["nll"] / sums["token_weights"]}  # weighted mean, nats a token
            record |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            record |= {"tokens_per_s": sums["tokens"] / seconds}
            run.log("metrics", record | {"padding": 1 - sums["tokens"] / sums["cells"]}, record)

    # The finished model, then what it is worth.
    run.save_model(policy, tokenizer, stage="sft")
    some = prompts[: cfg.num_prompts]
    samples = respond(run, policy, some, tokenizer, 1.0, many, cfg.seed, gold=gold)
    run.finish(numbers(samples) | held_out_loss(policy, held_out, many, run))


if __name__ == "__main__":
    guarded(main)
