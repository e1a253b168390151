r"""Proximal policy optimisation for language: stage 3 of RLHF.

Objective, for prompts x and responses y sampled from the policy (Ziegler et al., arXiv:1909.08593):

    maximise  E[ score(x, y) - beta * KL(policy(. | x), reference(. | x)) ]

The KL is paid token by token, r_t = -beta (log pi(a_t) - log pi_ref(a_t)), and the score is added
at the last token; what did not end scores no more than --missing_eos_score. A value network says
what to expect before each token; advantages are by GAE (arXiv:1506.02438); the update is PPO's
clipped one (arXiv:1707.06347, eq. 7). Four models: the policy and the value network learn, the
reference (the policy as it was) and the reward don't.

One iteration is a rollout, its scores, advantages, a few epochs of minibatches: see `main`. Flags
put a KL to the old policy in the place of clipping (`--surrogate kl`), and the likelihood of
demonstrations beside the reward (`--ptx_coef`, PPO-ptx). Without a value network: grpo.py.

Simplified against the papers: a response cut off by --max_new_tokens is taken to end there, and no
value stands for what might have followed.

    python ppo.py --gold data/toy.py     # the embedded task, rewarded by the model in runs/reward
    python ppo.py --reward data/toy.py --out_dir runs/ppo-gold       # a reward of your own
    torchrun --nproc_per_node=8 ppo.py --init runs/sft --reward runs/reward --prompts p.jsonl \
        --validation held.jsonl --lr 3e-6 --value_lr 1e-5 --batch_size 512 --minibatch_size 64 \
        --micro_batch_size 8 --max_new_tokens 128
"""

import dataclasses
import math
import time
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch

from feedback import (
    RAW, RewardFlags, Rewards, add_ptx_gradient, add_scalar_head, brief, check_ratio,
    check_rewards, check_start, explained_variance, held_out_nll, kl_estimate, learn_by_adapters,
    load_policy, load_python, logprobs_of, normalised, numbers, punish_missing_eos,
    read_demonstrations, read_prompts, record_of, reference_of, respond, reward_model_for,
    sample_step, show, token_rewards, totals_of, warnings_of, whiten,
)  # fmt: skip
from model import GPT, entropy, predicts, spread, token_logprobs
from run import Run, adam, flags, guarded, onto, refuse, schedule

# --- mathematics ----------------------------------------------------------------------------------


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (arXiv:1506.02438 eq. 16) -> advantages, returns (B, T).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + V_t;
    the value after the last response token is 0. All (B, T), 0 outside the mask.
    """
    inside = mask.to(values.dtype)
    values = values * inside  # a pad's value must not be bootstrapped from
    advantages, carried = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(carried)
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = (delta + gamma * lam * carried) * inside[:, t]
        advantages[:, t] = carried
    return advantages, (advantages + values) * inside


def policy_loss(new_logprobs, logprobs, advantages, clip):
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), (B, T). arXiv:1707.06347 eq. 7."""
    ratio = (new_logprobs - logprobs).exp()  # 1 in the first minibatch: main checks it
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def kl_penalty_loss(new_logprobs, logprobs, advantages, coef):
    """-A ratio + coef KL(old policy, new), (B, T), the ratio unclipped. arXiv:1707.06347 eq. 8.

    The KL is k3 of the sampled tokens. They are the old policy's, so not only its mean but also its
    gradient's is that of the KL.
    """
    kl = kl_estimate(logprobs, new_logprobs, "k3")
    return -advantages * (new_logprobs - logprobs).exp() + coef * kl


def adaptive_coefficient(coef, kl, target):
    """Half where kl < target / 1.5, twice where kl > 1.5 target. arXiv:1707.06347 section 4."""
    return coef / 2 if kl < target / 1.5 else coef * 2 if kl > target * 1.5 else coef


def value_loss(new_values, values, returns, clip):
    """max((V - G)^2, (V_clipped - G)^2) / 2, (B, T), V_clipped within `clip` of the old value."""
    clipped = values + (new_values - values).clamp(-clip, clip)
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)


def adaptive_beta(beta, kl, target, batch_size, horizon):
    """beta (1 + e batch_size / horizon), e = clip(kl / target - 1, -0.2, 0.2); kl, target in nats a
    sequence. arXiv:1909.08593 section 2.2, with their code's step."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * batch_size / horizon)


# --- settings -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(RewardFlags):
    value_init: Annotated[
        str,
        "reward model that the value network starts as; policy: --init's trunk under a head of 0; "
        "random: a new trunk; empty: the first reward model of --reward, else policy",
    ] = ""
    out_dir: Annotated[str, "run directory"] = "runs/ppo"
    beta: Annotated[float, "KL coefficient (Stiennon et al.: 0.05; InstructGPT: 0.02)"] = 0.1
    kl_in_loss: Annotated[
        bool, "beta's KL stands in the loss, by --kl_estimator, and not in the rewards"
    ] = False
    kl_estimator: Annotated[
        Literal["k2", "k3"],
        "k2 descends KL(policy, reference), which the objective has; k3 (GRPO) its reverse",
        "kl_in_loss",
    ] = "k2"
    kl_target: Annotated[float, "nats a sequence that beta is steered to; 0: beta is fixed"] = 0.0
    kl_horizon: Annotated[
        int, "episodes in which beta can change by a fifth (Ziegler et al.)", "[1, inf)"
    ] = 10000
    advantage: Annotated[str, "gae alone; reinforce, rloo and grpo are in grpo.py"] = "gae"
    gamma: Annotated[float, "discount a token (all sources: 1)", "[0, 1]"] = 1.0
    lam: Annotated[float, "GAE's lambda (all sources: 0.95)", "[0, 1]"] = 0.95
    whiten_rewards: Annotated[
        bool, "rewards of std 1 over a batch, their mean kept (Ziegler et al.)"
    ] = False
    whiten_advantages: Annotated[
        bool, "advantages of mean 0 and std 1 over a batch's response tokens"
    ] = True
    surrogate: Annotated[
        Literal["clip", "kl"], "kl: no clipping, but a coefficient times the KL from the old policy"
    ] = "clip"
    clip: Annotated[
        float, "largest change of a ratio that is rewarded (sources: 0.2)", "surrogate=clip"
    ] = 0.2
    step_kl_target: Annotated[
        float,
        "mean nats a token of an iteration's last epoch, which that coefficient is steered to",
        "(0, inf)",
        "surrogate=kl",
    ] = 0.01
    value_clip: Annotated[
        float, "largest change of a value that lowers its loss (sources: 0.2)"
    ] = 0.2
    trainable_layers: Annotated[
        int, "blocks of the policy that learn, the last ones, and the final norm; 0: everything"
    ] = 0
    value_lr: Annotated[float, "the value network's (sources: 1.65e-6 to 1.5e-5)"] = 5e-4


# What is summed over the tokens of all updates of an iteration, and logged as means a token.
# clip_fraction: ratios further than `clip` from 1; update_kl: from the old policy to the new.
SUMMED = ("policy_loss", "value_loss", "clip_fraction", "update_kl", "entropy", "trained")
SHOWN = ("score", "kl", "eos", "tokens", "clip_fraction", "entropy", "value_loss")


def check(cfg):
    """Ends the script where flags contradict each other."""
    check_rewards(cfg)
    for wrong, message in (
        (
            cfg.advantage != "gae",
            f"--advantage {cfg.advantage}: ppo.py has gae; reinforce, rloo and grpo are in grpo.py",
        ),
        (cfg.kl_target and not cfg.beta, "--kl_target: beta is steered by factors, 0 stays 0"),
        (
            cfg.kl_target and cfg.kl_horizon < cfg.batch_size,
            "--kl_horizon: expected --batch_size at least, or beta may swing, and fall below 0",
        ),
        (cfg.value_init.endswith(".py"), "--value_init: a reward model, policy or random"),
        (
            cfg.lora_rank and (cfg.trainable_layers or cfg.value_init == "random"),
            "--lora_rank: all blocks learn by adapters; not with --trainable_layers, nor with "
            "--value_init random, whose weights would stay random",
        ),
    ):
        if wrong:
            refuse(message)


# --- the models, and what they say ----------------------------------------------------------------


def freeze(policy, trainable_layers):
    """Leaves the last blocks and the final norm to learn; the embeddings, which are the head, and
    the blocks before stay as they are. 0: all learn."""
    if trainable_layers > policy.config.n_layer:
        refuse(f"--trainable_layers: --init has {policy.config.n_layer}")
    if trainable_layers:
        policy.requires_grad_(False)
        for module in (*policy.h[-trainable_layers:], policy.ln_f):
            module.requires_grad_(True)


def value_network(cfg, policy, reward, tokenizer, run):
    """-> the value network by --value_init, and the statistics that its values are `normalised`
    by."""
    start = cfg.value_init or next((one.name for one in reward.all if one.model), "policy")
    if start not in ("policy", "random"):
        # It starts knowing what a finished response scores (Stiennon et al. 2020); a model of its
        # own, as it will learn.
        model, statistics = reward_model_for(start, tokenizer, run)
        return model, RAW if cfg.combine == "llama2" else statistics
    torch.manual_seed(cfg.seed)
    model = add_scalar_head(policy) if start == "policy" else GPT(policy.config, scalar_head=True)
    torch.nn.init.zeros_(model.score.weight)
    return model.eval().to(run.place(), run.precision), RAW


def values_of(tokens, mask, model, statistics):
    """The value network's values, (B, T), on the scale of the scores: column t is of the state
    before token t is chosen. 0 outside the mask."""
    values = normalised(model(tokens, at=predicts(mask)), statistics)  # (N,)
    return spread(values, mask)


def policy_losses(new_logprobs, old, now, cfg):
    """The policy's loss of each token, (B, T), by --surrogate; with the KL where --kl_in_loss."""
    surrogate, size = {
        "clip": (policy_loss, cfg.clip),
        "kl": (kl_penalty_loss, now.step_coef),
    }[cfg.surrogate]
    losses = surrogate(new_logprobs, old.logprobs, old.advantages, size)
    if cfg.kl_in_loss:
        losses = losses + now.beta * kl_estimate(new_logprobs, old.ref_logprobs, cfg.kl_estimator)
    return losses


# --- main -----------------------------------------------------------------------------------------


def main():
    cfg = flags(Config, __doc__)
    check(cfg)
    run = Run(cfg)  # device, precision, ranks

    # Four models, all in eval mode for good: dropout would make the ratio differ from 1. The
    # reference is --init's policy, also in a run that is resumed below.
    policy, tokenizer = load_policy(cfg.init, run)
    reference = run.parallel(reference_of(policy, cfg))
    reward = Rewards(cfg, tokenizer, run)  # one, or several combined
    value_model, statistics = value_network(cfg, policy, reward, tokenizer, run)
    freeze(policy, cfg.trainable_layers)
    learn_by_adapters(policy, cfg)
    learn_by_adapters(value_model, cfg)

    # Prompts and demonstrations. A run goes on only with the same files, models and flags.
    positions = [model.config.n_positions for model in (policy, value_model, *reward.models)]
    room = min(positions) - cfg.max_new_tokens
    needed = {"reference": str} if cfg.shaping == "par" else {}
    prompts = read_prompts(cfg.prompts, tokenizer, room, run.say, **needed)
    held_out = read_prompts(cfg.validation, tokenizer, room, run.say)
    ptx = read_demonstrations(cfg.ptx_data, tokenizer, policy.config.n_positions, "cut", run.say)
    ptx_held = read_demonstrations(
        cfg.ptx_validation, tokenizer, policy.config.n_positions, "cut", run.say
    )
    gold = load_python(cfg.gold) if cfg.gold else None
    inputs = [cfg.prompts, cfg.validation, cfg.ptx_data, cfg.ptx_validation, cfg.gold]
    run.open([*inputs, cfg.init, cfg.value_init, *cfg.reward], total=cfg.steps)

    modules = {"policy": policy, "value": value_model}
    peaks = {"policy": cfg.lr, "value": cfg.value_lr}
    forward = {name: run.parallel(model) for name, model in modules.items()}  # compiled, under DDP
    optimizers = {name: adam(model, peaks[name], cfg) for name, model in modules.items()}
    # What changes from iteration to iteration; `first`: the first one's numbers, to warn by.
    now = run.resume(modules, optimizers, beta=cfg.beta, step_coef=1.0, first=None)
    # Every rank deals its episodes out to the same number of minibatches.
    share = math.ceil(cfg.batch_size // cfg.num_samples / run.world) * cfg.num_samples
    minibatches = min(math.ceil(cfg.batch_size / cfg.minibatch_size), share)
    largest = math.ceil(share / minibatches)  # episodes of a minibatch on one rank
    size = cfg.micro_batch_size or largest

    # Held-out prompts: the policy's samples against the reference's. A win is between independent
    # draws, hence two seeds.
    few, many = held_out[: max(cfg.num_prompts // 4, 1)], 4 * size  # no gradients: more fit
    seed = 2 * 1_000_003 * (cfg.seed + 1)
    how = {"temperature": cfg.temperature, "rows": many, "score": reward, "gold": gold}
    how |= {"tokenizer": tokenizer, "kl_to": reference}
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

        # 1. Rollout: responses to this rank's prompts. The `real` first rows count: all, but where
        #    the rank has a prompt less than others, and goes along as they wait for it.
        times = [time.time()]
        rollout, real = sample_step(run, policy, prompts, tokenizer, cfg.num_samples)
        mask, counted = rollout.mask, rollout.counted(real)
        times.append(time.time())

        # 2. Scores of whole responses, the least of them for those that did not end;
        #    log-probabilities and values of tokens, by the forward that the update will use: the
        #    sampler's own differ in their last digits.
        scores = reward.shaped(rollout, real, size)  # (B,)
        scores = punish_missing_eos(scores, rollout.ended, real, cfg, run)
        logprobs = rollout.each(size, run, logprobs_of, forward["policy"], cfg.temperature)
        ref_logprobs = rollout.each(size, run, logprobs_of, reference, cfg.temperature)  # (B, T)
        values = rollout.each(size, run, values_of, forward["value"], statistics)
        if run.step == 0:
            check_start(logprobs, ref_logprobs, cfg, run)
        times.append(time.time())

        # 3. Rewards, advantages and returns.
        paid = 0.0 if cfg.kl_in_loss else now.beta
        rewards = token_rewards(scores, logprobs, ref_logprobs, mask, paid)
        if cfg.whiten_rewards:  # over the response tokens of all ranks, as below
            rewards = whiten(rewards, counted, shift_mean=False, all_reduce=run.sum_tensor)
        advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, counted, all_reduce=run.sum_tensor)

        # 4. The update: epochs of minibatches, the old policy's numbers being constants.
        rate = schedule(run.step, cfg.steps, cfg)  # of the peak
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * peaks[name]
        old = {"tokens": rollout.tokens, "mask": mask, "logprobs": logprobs, "values": values}
        old |= {"ref_logprobs": ref_logprobs, "advantages": advantages, "returns": returns}
        sums, ptx_sums = run.zeros(len(SUMMED)), run.zeros(2)
        norms, updates = dict.fromkeys(modules, 0.0), 0
        for epoch in range(cfg.update_epochs):
            shuffle = np.random.default_rng([cfg.seed, run.step, epoch, run.rank])
            shuffled, before = shuffle.permutation(real).tolist(), sums.clone()
            for number in range(minibatches):
                minibatch = sorted(shuffled[number::minibatches])  # rows are sorted by length
                (total,) = run.sum([sum(len(rollout.responses[i]) for i in minibatch)])  # tokens
                for rows, weight in run.micro_batches(minibatch, largest, size, filler=0):
                    columns = slice(max(rollout.lengths[i] for i in rows))
                    (rows,) = onto(run.device, torch.tensor(rows))
                    b = SimpleNamespace(**{name: x[rows, columns] for name, x in old.items()})
                    with run.autocast:
                        logits = forward["policy"](b.tokens, at=predicts(b.mask))  # (N, V)
                    new_logprobs = token_logprobs(logits, b.tokens, b.mask, cfg.temperature)
                    policy_sum = (policy_losses(new_logprobs, b, now, cfg) * b.mask).sum()
                    with run.autocast:
                        new_values = values_of(b.tokens, b.mask, forward["value"], statistics)
                    value_losses = value_loss(new_values, b.values, b.returns, cfg.value_clip)
                    value_sum = (value_losses * b.mask).sum()
                    # Exact where it is learnt from, else of the samples: on average the same.
                    bonus = -b.logprobs.sum()
                    if cfg.entropy_coef:
                        bonus = entropy(logits, cfg.temperature).sum()
                    loss = policy_sum + value_sum - cfg.entropy_coef * bonus
                    # One mean over micro-batches and ranks; DDP averages: undo it.
                    run.scaler.scale(loss * (weight * run.world / total)).backward()
                    ratio = (new_logprobs - b.logprobs).detach().exp()  # 1 outside the mask
                    if updates == 0 and run.step == run.first:
                        check_ratio(ratio, run)
                    clipped = ((ratio - 1).abs() > cfg.clip).sum()
                    drift = (ratio - 1 - ratio.log()).sum()  # KL of old and new policy, by k3
                    found = [policy_sum, value_sum, clipped, drift, bonus, b.mask.sum()]
                    sums += weight * torch.stack([x.detach().to(run.wide) for x in found])
                if ptx:
                    update = (run.step * cfg.update_epochs + epoch) * minibatches + number
                    ptx_sums += add_ptx_gradient(forward["policy"], ptx, update, size, cfg, run)
                for name, optimizer in optimizers.items():  # both are finite, before either steps
                    norms[name] = max(norms[name], run.clip(optimizer, modules[name]))
                for optimizer in optimizers.values():
                    run.scaler.step(optimizer)
                    optimizer.zero_grad(set_to_none=True)
                run.scaler.update()
                updates += 1
            moved = dict(zip(SUMMED, run.sum((sums - before).tolist()), strict=True))
            epoch_kl = moved["update_kl"] / moved["trained"]  # the same on all ranks
            if cfg.stop_kl and epoch_kl > cfg.stop_kl:
                break
        times.append(time.time())
        run.step += 1

        # 5. What happened, in numbers over all ranks; the next iteration's coefficients.
        totals = totals_of(rollout, scores, logprobs - ref_logprobs, real, cfg.num_samples)
        totals |= dict(zip(SUMMED, sums.tolist(), strict=True))
        record = record_of(run.sum(totals), SUMMED, now.beta, times)
        record |= {f"{name}_norm": norm for name, norm in norms.items()}
        record |= {"lr": rate * cfg.lr, "updates": updates}
        explained = explained_variance(returns, values, counted, run.sum_tensor)
        record["explained_variance"] = explained
        if ptx:
            nll, count = run.sum(ptx_sums.tolist())
            record["ptx_loss"] = nll / count
        if cfg.surrogate == "kl":
            record |= {"step_coef": now.step_coef, "last_epoch_kl": epoch_kl}
            now.step_coef = adaptive_coefficient(now.step_coef, epoch_kl, cfg.step_kl_target)
        if cfg.kl_target:
            now.beta = adaptive_beta(
                now.beta, record["kl"], cfg.kl_target, cfg.batch_size, cfg.kl_horizon
            )
        now.first = now.first or {name: record[name] for name in ("eos", "value_loss")}
        if run.due(cfg.log_every):
            run.log("metrics", record, {name: record[name] for name in SHOWN})
            for warning in warnings_of(record, now.first, cfg):
                run.say(f"  warning: {warning}")

    # The finished policy, then what it is worth on held-out prompts.
    run.save_model(policy, tokenizer, stage="ppo")
    some = held_out[: cfg.num_prompts]
    samples = respond(run, policy, some, seed=seed + 1, **how)
    base = respond(run, reference, some, seed=seed, **how)
    report = {"beta": now.beta, "price_of_kl": now.beta * reward.std}
    report |= {"episodes": run.step * cfg.batch_size}
    run.finish(report | numbers(samples, base, cfg.missing_eos_score))


if __name__ == "__main__":
    guarded(main)
