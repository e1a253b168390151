r"""Policy gradients of whole responses, without a value network: REINFORCE, RLOO, GRPO. Stage 3 of
RLHF, in the place of ppo.py.

Objective, as PPO's, for prompts x and responses y sampled from the policy:

    maximise  E[ score(x, y) - beta * KL(policy(. | x), reference(. | x)) ]

Its gradient is E[ A(y) grad log pi(y) ], A(y) being how much better the response is than was to be
expected: R(y) - b. The baseline b is, by --advantage,

    reinforce  a moving mean of all returns (Williams 1992)
    rloo       the mean of the other responses to the prompt (arXiv:2402.14740)
    grpo       the mean of all responses to the prompt; A is divided by their std (arXiv:2402.03300)

All tokens of a response have the same advantage, so that R needs no value of what is half said. The
update is clipped as PPO's is, as several are made on one rollout. R is the score less beta times
the KL's log-ratios; with --kl_in_loss the KL stands in the loss, as GRPO has it (by k3, which
descends KL(reference, policy)).

Simplified against the papers: every ratio is a token's (RLOO's is a response's), and the loss is
the mean over all tokens of a minibatch (GRPO's is over a response's first).

    python grpo.py --gold data/toy.py                   # the embedded task, against runs/reward
    python grpo.py --advantage rloo --reward data/toy.py --out_dir runs/rloo
    torchrun --nproc_per_node=8 grpo.py --init runs/sft --reward runs/reward --prompts p.jsonl \
        --validation held.jsonl --lr 1e-6 --num_samples 64 --batch_size 1024 --minibatch_size 1024 \
        --micro_batch_size 8 --max_new_tokens 128 --kl_in_loss --kl_estimator k3 --beta 0.04
"""

import dataclasses
import math
import time
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch

from feedback import (
    RewardFlags, Rewards, add_ptx_gradient, brief, check_ratio, check_rewards, check_start,
    held_out_nll, kl_estimate, learn_by_adapters, load_policy, load_python, logprobs_of, numbers,
    punish_missing_eos, read_demonstrations, read_prompts, record_of, reference_of, respond,
    sample_step, show, token_rewards, totals_of, warnings_of, whiten,
)  # fmt: skip
from model import entropy, predicts, token_logprobs
from run import Run, adam, flags, guarded, onto, refuse, schedule

# --- mathematics ----------------------------------------------------------------------------------


def reinforce_advantages(returns, baseline):
    """R - b, (B,): b must not know these responses. Williams 1992."""
    return returns - baseline


def rloo_advantages(returns, num_samples):
    """R_i - mean of the other responses' to its prompt, (B,), a prompt's being adjacent. REINFORCE
    leave-one-out, arXiv:2402.14740."""
    groups = returns.view(-1, num_samples)  # (prompts, K)
    others = (groups.sum(1, keepdim=True) - groups) / (num_samples - 1)
    return (groups - others).flatten()


def grpo_advantages(returns, num_samples, divide_by_std=True):
    """(R_i - mean) / std over the responses to its prompt, (B,), a prompt's being adjacent; where
    they are alike, about 0. arXiv:2402.03300 section 4.1.2; without the division 2503.20783."""
    groups = returns.view(-1, num_samples)  # (prompts, K)
    advantages = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / groups.std(1, keepdim=True, correction=0).clamp(min=1e-4)
    return advantages.flatten()


def clipped_loss(new_logprobs, logprobs, advantages, clip):
    """-min(A ratio, A clip(ratio, 1 - clip, 1 + clip)), (B, T). arXiv:2402.03300 eq. 3.

    Where nothing is clipped its gradient is -A ratio grad log pi, and in an update on the policy's
    own samples, the ratio being 1, that of REINFORCE.
    """
    ratio = (new_logprobs - logprobs).exp()
    return -torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))


# --advantage: what makes A (B,) of returns R (B,), reinforce's baseline, and the settings. A
# prompt's responses, of which there are cfg.num_samples, are adjacent.
ADVANTAGES = {
    "grpo": lambda R, baseline, cfg: grpo_advantages(R, cfg.num_samples, cfg.group_std),
    "rloo": lambda R, baseline, cfg: rloo_advantages(R, cfg.num_samples),
    "reinforce": lambda R, baseline, cfg: reinforce_advantages(R, baseline),
}


# --- settings -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(RewardFlags):
    out_dir: Annotated[str, "run directory"] = "runs/grpo"
    advantage: Annotated[
        Literal[tuple(ADVANTAGES)], "what a response is compared with, see above"
    ] = "grpo"
    num_samples: Annotated[
        int, "responses to each prompt of an iteration (RLOO: 2 to 4; GRPO: 64)", "[1, inf)"
    ] = 4
    group_std: Annotated[bool, "divide by the std over a prompt's responses", "advantage=grpo"] = (
        True
    )
    baseline_decay: Annotated[
        float, "of the moving mean return, an iteration", "[0, 1)", "advantage=reinforce"
    ] = 0.9
    beta: Annotated[float, "KL coefficient (GRPO: 0.04; RLOO: 0.03 to 0.1)"] = 0.1
    kl_in_loss: Annotated[
        bool, "beta's KL stands in the loss, by --kl_estimator, and not in the returns"
    ] = False
    kl_estimator: Annotated[
        Literal["k2", "k3"],
        "k2 descends KL(policy, reference), which the objective has; k3 (GRPO) its reverse",
        "kl_in_loss",
    ] = "k2"
    whiten_rewards: Annotated[
        bool, "rewards of std 1 over a batch's tokens, their mean kept (Ziegler et al.)"
    ] = False
    whiten_advantages: Annotated[
        bool, "advantages of mean 0 and std 1 over a batch's response tokens (sources: not)"
    ] = False
    clip: Annotated[float, "largest change of a ratio that is rewarded (sources: 0.2)"] = 0.2


# What is summed over the tokens of all updates of an iteration, and logged as means a token.
# clip_fraction: ratios further than `clip` from 1; update_kl: from the old policy to the new.
SUMMED = ("policy_loss", "clip_fraction", "update_kl", "entropy", "trained")
SHOWN = ("score", "kl", "eos", "tokens", "clip_fraction", "entropy")


def check(cfg):
    """Ends the script where flags contradict each other."""
    check_rewards(cfg)
    if cfg.advantage != "reinforce" and cfg.num_samples < 2:
        refuse(f"--advantage {cfg.advantage}: compares a prompt's responses: --num_samples 4")
    if cfg.advantage == "reinforce" and cfg.whiten_advantages:
        refuse("--whiten_advantages: subtracts a mean, so that reinforce's baseline does nothing")


# --- main -----------------------------------------------------------------------------------------


def main():
    cfg = flags(Config, __doc__)
    check(cfg)
    run = Run(cfg)  # device, precision, ranks

    # The policy learns; the reference, which is where it starts, and the rewards don't. In eval
    # mode for good: dropout would make the ratio differ from 1.
    policy, tokenizer = load_policy(cfg.init, run)
    reference = run.parallel(reference_of(policy, cfg))
    learn_by_adapters(policy, cfg)
    reward = Rewards(cfg, tokenizer, run)  # one, or several combined
    room = min(m.config.n_positions for m in (policy, *reward.models)) - cfg.max_new_tokens
    needed = {"reference": str} if cfg.shaping == "par" else {}
    prompts = read_prompts(cfg.prompts, tokenizer, room, run.say, **needed)
    held_out = read_prompts(cfg.validation, tokenizer, room, run.say)
    ptx = read_demonstrations(cfg.ptx_data, tokenizer, policy.config.n_positions, "cut", run.say)
    ptx_held = read_demonstrations(
        cfg.ptx_validation, tokenizer, policy.config.n_positions, "cut", run.say
    )
    gold = load_python(cfg.gold) if cfg.gold else None
    inputs = [cfg.prompts, cfg.validation, cfg.ptx_data, cfg.ptx_validation, cfg.gold]
    run.open([*inputs, cfg.init, *cfg.reward], total=cfg.steps)

    model = run.parallel(policy)  # losses go through it: compiled, under DDP
    optimizer = adam(policy, cfg.lr, cfg)
    # What changes from iteration to iteration; `first`: the first one's numbers, to warn by.
    now = run.resume({"policy": policy}, {"policy": optimizer}, baseline=None, first=None)
    # Every rank deals its episodes out to the same number of minibatches.
    share = math.ceil(cfg.batch_size // cfg.num_samples / run.world) * cfg.num_samples
    minibatches = min(math.ceil(cfg.batch_size / cfg.minibatch_size), share)
    largest = math.ceil(share / minibatches)  # episodes of a minibatch on one rank
    size = cfg.micro_batch_size or largest

    # Held-out prompts: the policy's samples against the reference's, drawn independently.
    few, many = held_out[: max(cfg.num_prompts // 4, 1)], 4 * size  # no gradients: more fit
    seed = 2 * 1_000_003 * (cfg.seed + 1)
    how = {"tokenizer": tokenizer, "temperature": cfg.temperature, "rows": many}
    how |= {"score": reward, "gold": gold, "kl_to": reference}
    base = respond(run, reference, few, seed=seed, **how)
    while True:
        run.save_or_stop()
        if run.evaluation_due():
            samples = respond(run, policy, few, seed=seed + 1, **how)
            found = numbers(samples, base, cfg.missing_eos_score)
            found |= held_out_nll(policy, ptx_held, many, run)
            run.log_evaluation(found, brief(found))
            show(run, samples)
        if run.step == cfg.steps:
            break

        # 1. Rollout: num_samples responses to each of this rank's prompts, a prompt's adjacent.
        #    The `real` first rows count: all, but where the rank has a prompt less than others, and
        #    goes along as they wait for it.
        begun = time.time()
        rollout, real = sample_step(run, policy, prompts, tokenizer, cfg.num_samples)
        mask, counted = rollout.mask, rollout.counted(real)
        sampled = time.time()

        # 2. Scores of whole responses, the least of them for those that did not end;
        #    log-probabilities by the forward that the update will use: the sampler's own differ in
        #    their last digits.
        scores = reward.shaped(rollout, real, size)  # (B,)
        scores = punish_missing_eos(scores, rollout.ended, real, cfg, run)
        logprobs = rollout.each(size, run, logprobs_of, model, cfg.temperature)  # (B, T)
        ref_logprobs = rollout.each(size, run, logprobs_of, reference, cfg.temperature)
        if run.step == 0:
            check_start(logprobs, ref_logprobs, cfg, run)
        scored = time.time()

        # 3. Returns of whole responses, and what they are worth beside others: of each token alike.
        paid = 0.0 if cfg.kl_in_loss else cfg.beta
        rewards = token_rewards(scores, logprobs, ref_logprobs, mask, paid)
        if cfg.whiten_rewards:  # over the response tokens of all ranks, as below
            rewards = whiten(rewards, counted, shift_mean=False, all_reduce=run.sum_tensor)
        returns = rewards.sum(1)  # (B,)
        advantages = ADVANTAGES[cfg.advantage](returns, now.baseline or 0.0, cfg)
        advantages = advantages[:, None] * mask  # (B, T)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, counted, all_reduce=run.sum_tensor)

        # 4. The update: epochs of minibatches, the old policy's numbers being constants.
        lr = cfg.lr * schedule(run.step, cfg.steps, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        old = {"tokens": rollout.tokens, "mask": mask, "logprobs": logprobs}
        old |= {"ref_logprobs": ref_logprobs, "advantages": advantages}
        sums, ptx_sums = run.zeros(len(SUMMED)), run.zeros(2)
        norm, updates = 0.0, 0
        for epoch in range(cfg.update_epochs):
            before = sums.clone()
            shuffle = np.random.default_rng([cfg.seed, run.step, epoch, run.rank])
            shuffled = shuffle.permutation(real).tolist()
            for number in range(minibatches):
                minibatch = sorted(shuffled[number::minibatches])  # rows are sorted by length
                (total,) = run.sum([sum(len(rollout.responses[i]) for i in minibatch)])  # tokens
                for rows, weight in run.micro_batches(minibatch, largest, size, filler=0):
                    columns = slice(max(rollout.lengths[i] for i in rows))
                    (rows,) = onto(run.device, torch.tensor(rows))
                    b = SimpleNamespace(**{name: x[rows, columns] for name, x in old.items()})
                    with run.autocast:
                        logits = model(b.tokens, at=predicts(b.mask))  # (N, V)
                    new_logprobs = token_logprobs(logits, b.tokens, b.mask, cfg.temperature)
                    losses = clipped_loss(new_logprobs, b.logprobs, b.advantages, cfg.clip)
                    if cfg.kl_in_loss:
                        known = new_logprobs, b.ref_logprobs, cfg.kl_estimator
                        losses = losses + cfg.beta * kl_estimate(*known)
                    policy_sum = (losses * b.mask).sum()
                    # Exact where it is learnt from, else of the samples: on average the same.
                    bonus = -b.logprobs.sum()
                    if cfg.entropy_coef:
                        bonus = entropy(logits, cfg.temperature).sum()
                    loss = policy_sum - cfg.entropy_coef * bonus
                    # One mean over micro-batches and ranks; DDP averages: undo it.
                    run.scaler.scale(loss * (weight * run.world / total)).backward()
                    ratio = (new_logprobs - b.logprobs).detach().exp()  # 1 outside the mask
                    if updates == 0 and run.step == run.first:
                        check_ratio(ratio, run)
                    clipped = ((ratio - 1).abs() > cfg.clip).sum()
                    drift = (ratio - 1 - ratio.log()).sum()  # KL of old and new policy, by k3
                    found = [policy_sum, clipped, drift, bonus, b.mask.sum()]
                    sums += weight * torch.stack([x.detach().to(run.wide) for x in found])
                if ptx:
                    update = (run.step * cfg.update_epochs + epoch) * minibatches + number
                    ptx_sums += add_ptx_gradient(model, ptx, update, size, cfg, run)
                norm = max(norm, run.clip(optimizer, policy))
                run.scaler.step(optimizer)
                run.scaler.update()
                optimizer.zero_grad(set_to_none=True)
                updates += 1
            moved = dict(zip(SUMMED, run.sum((sums - before).tolist()), strict=True))
            if cfg.stop_kl and moved["update_kl"] / moved["trained"] > cfg.stop_kl:
                break  # the same on all ranks
        run.step += 1

        # 5. What happened, in numbers over all ranks.
        totals = totals_of(rollout, scores, logprobs - ref_logprobs, real, cfg.num_samples)
        totals |= {"return": (rewards * counted).sum().item()}
        totals |= dict(zip(SUMMED, sums.tolist(), strict=True))
        times = begun, sampled, scored, time.time()
        record = record_of(run.sum(totals), SUMMED, cfg.beta, times)
        record |= {"policy_norm": norm, "lr": lr, "updates": updates}
        if ptx:
            nll, count = run.sum(ptx_sums.tolist())
            record["ptx_loss"] = nll / count
        if cfg.advantage == "reinforce":  # of the next iteration: it must not know its responses
            new, earlier = record["return"], now.baseline
            more = 0.0 if earlier is None else (1 - cfg.baseline_decay) * (new - earlier)
            now.baseline = record["baseline"] = new if earlier is None else earlier + more
        now.first = now.first or {"eos": record["eos"]}
        if run.due(cfg.log_every):
            run.log("metrics", record, {name: record[name] for name in SHOWN})
            for warning in warnings_of(record, now.first, cfg):
                run.say(f"  warning: {warning}")

    # The finished policy, then what it is worth on held-out prompts.
    run.save_model(policy, tokenizer, stage="grpo")
    some = held_out[: cfg.num_prompts]
    base = respond(run, reference, some, seed=seed, **how)
    found = numbers(respond(run, policy, some, seed=seed + 1, **how), base, cfg.missing_eos_score)
    report = {"price_of_kl": cfg.beta * reward.std, "episodes": run.step * cfg.batch_size}
    run.finish(report | found)


if __name__ == "__main__":
    guarded(main)
