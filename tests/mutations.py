"""Planted bugs: each is one rewrite of a script's source, and that script's tests must fail.

    make test-mutations                        # all, a line each
    python tests/mutations.py ppo --only clip  # those whose name has `clip` in it

A win rate does not catch such bugs: with its advantages one token off, PPO still won 0.67 against
its start, as the right one did. What must catch them are the exact tests. Each bug goes into a copy
of the sources in a temporary folder; the tests that stand first in the list of its script run
first. Exit status 1 when a bug was not caught, or when the tests fail without one.
"""

# ruff: noqa: E501 (lines of the sources, as they stand)

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# {tests/test_NAME.py: [(name, file, what stands there, what the bug makes of it)]}
MUTATIONS = {
    "model": [
        (
            "RoPE turns the other way",
            "model.py",
            "torch.cat([a * cos - b * sin, b * cos + a * sin], -1)",
            "torch.cat([a * cos + b * sin, b * cos - a * sin], -1)",
        ),
        (
            "a sum over the vocabulary in float32",
            "model.py",
            "probabilities.cumsum(-1, dtype=widest(logits.device))",
            "probabilities.cumsum(-1).double()",
        ),
        (
            "a token that top-p took out can be drawn",
            "model.py",
            "torch.where(taken_out, probabilities.argmax(-1, keepdim=True), drawn)",
            "drawn",
        ),
        (
            "RoPE stretches what is fast",
            "model.py",
            '(keep + (1 - keep) / rope["factor"])',
            '(keep / rope["factor"] + (1 - keep))',
        ),
        (
            "a layer without RoPE has it",
            "model.py",
            "Block(config, bool(x)) for x in rotated",
            "Block(config, True) for x in rotated",
        ),
        (
            "heads that share keys are no neighbours in the cache",
            "model.py",
            "q = q.reshape(B, k.shape[1], -1, self.dim)",
            "q = q.reshape(B, -1, k.shape[1], self.dim).transpose(1, 2)",
        ),
        (
            "SwiGLU's halves change places",
            "model.py",
            "self.c_proj(F.silu(gate) * x)",
            "self.c_proj(F.silu(x) * gate)",
        ),
        (
            "a packed example sees the one before it",
            "model.py",
            "(example[b, k] == example[b, q])",
            "(example[b, k] <= example[b, q])",
        ),
        (
            "the last MLP's input is another position's",
            "model.py",
            "keep = None if at is None else places_of(at)",
            "keep = None if at is None else places_of(at).flip(0)",
        ),
        (
            "adapters are not merged into what is saved",
            "model.py",
            'weights[f"{name}.weight"] + module.scale * B @ A',
            'weights[f"{name}.weight"]',
        ),
        (
            "adapters count alpha times",
            "model.py",
            "self.scale = alpha / rank",
            "self.scale = alpha",
        ),
        (
            "the weights under adapters learn too",
            "model.py",
            "    model.requires_grad_(False)\n    for module",
            "    for module",
        ),
        (
            "B begins at random",
            "model.py",
            "nn.Parameter(torch.zeros(self.out_features, rank))",
            "nn.Parameter(torch.randn(self.out_features, rank))",
        ),
        (
            "the reference learns with the adapters",
            "feedback.py",
            "return copy.deepcopy(policy, shared).requires_grad_(False)",
            "return policy if cfg.lora_rank else copy.deepcopy(policy, shared).requires_grad_(False)",
        ),
        (
            "checkpointed though told not to",
            "model.py",
            "if self.checkpoint_activations and torch.is_grad_enabled() and caches is None:",
            "if torch.is_grad_enabled() and caches is None:",
        ),
    ],
    "tokens": [
        (
            "a text may spell a special token",
            "tokens.py",
            "found += super().encode_ordinary(text[begin:end])",
            'found += super().encode(text[begin:end], allowed_special="all")',
        ),
        (
            "the system's words are another turn's",
            "tokens.py",
            'before = system if i == 0 else ""',
            "before = system",
        ),
        (
            "the assistant's turn is closed before it is sampled",
            "tokens.py",
            "return found[:-1] if special == end else found",
            "return found",
        ),
        (
            "a turn's end is trained last",
            "tokens.py",
            "tokenizer.ends = tuple(dict.fromkeys((end, *tokenizer.ends)))",
            "tokenizer.ends = tuple(dict.fromkeys((*tokenizer.ends, end)))",
        ),
        (
            "a text's beginning token is left out",
            "tokens.py",
            "begin = [] if tokenizer.bos is None else [tokenizer.bos]",
            "begin = []",
        ),
        (
            "conversations are told apart by their texts alone",
            "tokens.py",
            "return isinstance(other, Conversation) and self.messages == other.messages",
            "return str(self) == str(other)",
        ),
        (
            "tokens in another order than their merges",
            "tokens.py",
            "if made != sorted(made) or set(made) != longer:",
            "if set(made) != longer:",
        ),
        (
            "what a tokenizer puts around texts is ignored",
            "tokens.py",
            'elif step["type"] != "ByteLevel":',
            'elif step["type"] == "ByteLevel" and step.get("never"):',
        ),
    ],
    "run": [
        (
            "inputs compared by their names",
            "run.py",
            'return held.get(value) or "".join(',
            'return value or "".join(',
        ),
        (
            "a folder is emptied of what it was linked to",
            "run.py",
            "if path.is_dir() and not path.is_symlink():",
            "if path.is_dir():",
        ),
        (
            "a refusal takes a folder along in which something is",
            "run.py",
            'if all(path.name in ("args.json", *sources(), "lost+found") for path in files):',
            "if files:",
        ),
        (
            "NaN in JSON",
            "tokens.py",
            "if finite and isinstance(contents, float) and not math.isfinite(contents):",
            "if finite and contents == math.inf:",
        ),
        (
            "NaN goes on",
            "run.py",
            "if not math.isfinite(norm) and self.scaler.get_scale() <= 1:",
            "if not math.isfinite(norm) and self.scaler.get_scale() <= 0:",
        ),
        (
            "a stopped evaluation counts as done",
            "run.py",
            "due(self.cfg.eval_every) and self.step > self.evaluated",
            "due(self.cfg.eval_every) and self.step > self.saved",
        ),
        (
            "generators are not restored",
            "run.py",
            "        torch.set_rng_state(generators[0])\n",
            "",
        ),
        (
            "moments are not restored",
            "run.py",
            'optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})',
            "pass",
        ),
        (
            "moments keep the file mapped",
            "run.py",
            "tensors[key].clone()",
            "tensors[key]",
        ),
        (
            "a rank without lines counts",
            "run.py",
            "yield rows or [filler], float(bool(rows))",
            "yield rows or [filler], 1.0",
        ),
        ("gradients averaged in no micro-batch", "run.py", "= begin == begins[-1]", "= False"),
        (
            "weight decay on all",
            "run.py",
            '{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others}',
            '{"params": matrices + others, "weight_decay": cfg.weight_decay}',
        ),
        (
            "the warm-up starts at 0",
            "run.py",
            "return peak * (step + 1) / cfg.warmup",
            "return peak * step / cfg.warmup",
        ),
        (
            "logs are not cut back",
            "run.py",
            "            os.truncate(log, min(",
            "            str(min(",
        ),
        (
            "a damaged checkpoint is read",
            "run.py",
            "if sha256(path / name) != hashes.get(name):",
            "if not sha256(path / name):",
        ),
        (
            "somebody's folder is deleted",
            "run.py",
            "if in_use and not (args.is_file() and (self.cfg.resume or self.cfg.overwrite)):",
            "if in_use and not (self.cfg.resume or self.cfg.overwrite):",
        ),
    ],
    "feedback": [
        (
            "rows that go along count",
            "feedback.py",
            "< real)[:, None]",
            "< real + 1)[:, None]",
        ),
        (
            "responses see each other",
            "model.py",
            "of_it = (part[b, k] == 0) | (part[b, k] == part[b, q])",
            "of_it = part[b, k] >= 0",
        ),
        (
            "places counted over all responses",
            "model.py",
            "return (columns - start_of(segments) + prompt) * (segments >= 0)",
            "return (columns - start_of(example)) * (segments >= 0)",
        ),
        (
            "responses taken for each other",
            "model.py",
            "[k] * (len(r) + 1) for k, r",
            "[min(k, 2)] * (len(r) + 1) for k, r",
        ),
        (
            "examples in one row see each other",
            "model.py",
            "return (k <= q) & (example[b, k] == example[b, q]) & of_it",
            "return (k <= q) & of_it",
        ),
        (
            "a sum runs on into the next response",
            "model.py",
            "value=len(values)).diff()",
            "value=len(values)).diff().flip(0)",
        ),
        (
            "prompts of one length taken for one prompt",
            "feedback.py",
            "groups[-1][0] == prompt and",
            "len(groups[-1][0]) == len(prompt) and",
        ),
        (
            "the reference's score less the response's",
            "feedback.py",
            "(scores - reference_scores).sigmoid()",
            "(reference_scores - scores).sigmoid()",
        ),
        (
            "unsafe and unlikely to be safe",
            "feedback.py",
            "unsafe.logical_or(safe.sigmoid() < threshold)",
            "unsafe.logical_and(safe.sigmoid() < threshold)",
        ),
        (
            "the safe reward's normalised score",
            "feedback.py",
            'raw = cfg.combine == "llama2"',
            "raw = False",
        ),
        (
            "scores whitened by each rank alone",
            "feedback.py",
            "whiten(scores, counted, all_reduce=self.run.sum_tensor)",
            "whiten(scores, counted)",
        ),
        (
            "k3 that loses its digits near 0",
            "feedback.py",
            "return log_ratio.expm1() - log_ratio",
            "return log_ratio.exp() - 1 - log_ratio",
        ),
        (
            "k2 not halved",
            "feedback.py",
            "return log_ratio**2 / 2",
            "return log_ratio**2",
        ),
        (
            "PAR of normalised scores",
            "feedback.py",
            "par_scores(self.std * scores, self.std * theirs)",
            "par_scores(scores, theirs)",
        ),
        (
            "the proxy of what did not end",
            "feedback.py",
            's if s["parts"]["eos"] else s | {"parts"',
            's if s["parts"] else s | {"parts"',
        ),
        (
            "spread between prompts taken for that within",
            "feedback.py",
            '"_between": between, "_within": all_of_it - between',
            '"_between": all_of_it - between, "_within": between',
        ),
        (
            "a spelled-out end learnt as letters",
            "feedback.py",
            'prompt, response = record["prompt"], bare(record["response"])',
            'prompt, response = record["prompt"], record["response"]',
        ),
        (
            "k3 of the swapped laws",
            "feedback.py",
            "return log_ratio.expm1() - log_ratio",
            "return (-log_ratio).exp() - 1 + log_ratio",
        ),
        (
            "whitening over pads",
            "feedback.py",
            "    inside = mask.to(x.dtype)\n\n    def total",
            "    inside = torch.ones_like(x)\n\n    def total",
        ),
        (
            "sampling's temperature is 1",
            "feedback.py",
            "            temperature=temperature,\n            eos=tokenizer.ends,",
            "            temperature=float(temperature > 0),\n            eos=tokenizer.ends,",
        ),
        (
            "scores not normalised",
            "feedback.py",
            "return normalised(raw, self.statistics)",
            "return raw",
        ),
        (
            "what ended is punished",
            "feedback.py",
            "scores.masked_fill(~ended, min(",
            "scores.masked_fill(ended, min(",
        ),
        (
            "reward weights in another order",
            "feedback.py",
            "return combine_scores(scores, weights, self.cfg.combine)",
            "return combine_scores(scores, weights[::-1], self.cfg.combine)",
        ),
        (
            "dropout left on",
            "feedback.py",
            "return model.eval().to(run.place(), run.precision), tokenizer",
            "return model.train().to(run.place(), run.precision), tokenizer",
        ),
        (
            "ranks with the same samples",
            "feedback.py",
            "seed = (cfg.seed * 1_000_003 + run.step) * 4096 + run.rank",
            "seed = (cfg.seed * 1_000_003 + run.step) * 4096",
        ),
    ],
    "sft": [
        (
            "the prompt is trained",
            "sft.py",
            "return mask + prompt_loss_weight * prompt",
            "return mask + (1 - prompt_loss_weight) * prompt",
        ),
        (
            "the first token is trained",
            "sft.py",
            "prompt = ~mask & ~first & (example >= 0)",
            "prompt = ~mask & (example >= 0)",
        ),
        (
            "each micro-batch's own mean",
            "sft.py",
            "weight * run.world / total_weight).backward()",
            "weight * run.world / token_weights.sum()).backward()",
        ),
        (
            "ranks with the same dropout",
            "sft.py",
            "torch.manual_seed(cfg.seed * run.world + run.rank)",
            "torch.manual_seed(cfg.seed)",
        ),
        (
            "each rank's own lines",
            "sft.py",
            "mine, most = batch[run.rank :: run.world]",
            "mine, most = batch[:: run.world]",
        ),
    ],
    "reward": [
        (
            "a soft label's margin for the chosen side alone",
            "reward.py",
            "(1 - label) * utility(-difference - margin)",
            "(1 - label) * utility(-difference + margin)",
        ),
        (
            "margins added",
            "reward.py",
            "return -utility(difference - margin)",
            "return -utility(difference + margin)",
        ),
        ("a mean over all pairs places", "reward.py", "/ keep.sum(1)", "/ keep.shape[1]"),
        (
            "soft labels the wrong way",
            "reward.py",
            "(label * utility(difference - margin) + (1 - label)",
            "((1 - label) * utility(difference - margin) + label",
        ),
        (
            "a rank without lines counts one",
            "reward.py",
            "run.scaler.scale(loss * weight * run.world",
            "run.scaler.scale(loss * run.world",
        ),
        (
            "the mean over each rank's own lines",
            "reward.py",
            "(loss * weight * run.world / len(batch))",
            "(loss * weight / max(len(lines), 1))",
        ),
        (
            "scores in another order",
            "reward.py",
            "scores = output[rows]",
            "scores = output[rows.flip(1)]",
        ),
        (
            "margins ignored",
            "reward.py",
            "margin=margin, label=label, keep=keep",
            "label=label, keep=keep",
        ),
        (
            "smoothing ignored",
            "reward.py",
            "label = smoothed(labels, cfg.label_smoothing)",
            "label = labels",
        ),
        (
            "epochs all the same",
            "reward.py",
            "order = epoch_order(sizes, weights, [cfg.seed, epoch])",
            "order = epoch_order(sizes, weights, [cfg.seed, 0])",
        ),
        (
            "resumed an epoch late",
            "reward.py",
            "itertools.count(step // an_epoch)",
            "itertools.count(step // an_epoch + 1)",
        ),
        (
            "gold pairs counted twice",
            "reward.py",
            'if golds and (line["prompt"], texts[i], texts[j]) in seen',
            'if False and (line["prompt"], texts[i], texts[j]) in seen',
        ),
        (
            "unsure labels count",
            "reward.py",
            'if pair["label"] > 0.5]  # at',
            'if pair["label"] >= 0.5]  # at',
        ),
        (
            "scores not normalised",
            "reward.py",
            "iter(normalised(torch.tensor(raw, dtype=torch.float64), statistics).tolist())",
            "iter(raw)",
        ),
        (
            "normalised with no samples",
            "reward.py",
            "statistics_of(reward_model, yardstick, many, run)",
            "statistics_of(reward_model, yardstick[:2], many, run)",
        ),
    ],
    "ppo": [
        ("KL to the old policy rewarded", "ppo.py", ".exp() + coef * kl", ".exp() - coef * kl"),
        (
            "KL from the new policy to the old",
            "ppo.py",
            'kl = kl_estimate(logprobs, new_logprobs, "k3")',
            'kl = kl_estimate(new_logprobs, logprobs, "k3")',
        ),
        (
            "the price of KL steered the wrong way",
            "ppo.py",
            "return coef / 2 if kl < target / 1.5",
            "return coef / 2 if kl > target / 1.5",
        ),
        (
            "the price of KL is not saved",
            "ppo.py",
            "modules, optimizers, beta=cfg.beta, step_coef=1.0, first=None)\n",
            "modules, optimizers, beta=cfg.beta, first=None)\n    now.step_coef = 1.0\n",
        ),
        (
            "KL in the loss and in the rewards",
            "ppo.py",
            "paid = 0.0 if cfg.kl_in_loss else now.beta",
            "paid = now.beta",
        ),
        (
            "the same demonstrations again",
            "feedback.py",
            "cfg.ptx_batch_size, update, cfg.seed",
            "cfg.ptx_batch_size, 0, cfg.seed",
        ),
        (
            "each rank's own mean of demonstrations",
            "feedback.py",
            "cfg.ptx_coef * weight * run.world / total",
            "cfg.ptx_coef * weight / sum(len(ptx[i][1]) for i in lines[:1])",
        ),
        (
            "the head learns beside the last blocks",
            "ppo.py",
            "(*policy.h[-trainable_layers:], policy.ln_f)",
            "(*policy.h[-trainable_layers:], policy.ln_f, policy.wte)",
        ),
        (
            "advantages one token early",
            "ppo.py",
            "advantages[:, t] = carried",
            "advantages[:, t - 1] = carried",
        ),
        ("lambda forgotten", "ppo.py", "delta + gamma * lam * carried", "delta + gamma * carried"),
        (
            "the response's mask one token late",
            "ppo.py",
            "mask, counted = rollout.mask,",
            "mask, counted = rollout.mask.roll(1, 1),",
        ),
        (
            "log-probabilities of the token after",
            "model.py",
            "return F.pad(mask.bool()[:, 1:], (0, 1))",
            "return mask.bool()",
        ),
        (
            "the score one token before the last",
            "feedback.py",
            "return rewards.scatter_add(1, last, ",
            "return rewards.scatter_add(1, last - 1, ",
        ),
        (
            "values of the state after the token",
            "ppo.py",
            "normalised(model(tokens, at=predicts(mask)), statistics)",
            "normalised(model(tokens, at=mask), statistics)",
        ),
        (
            "KL rewarded",
            "feedback.py",
            "rewards = -beta * kl_estimate",
            "rewards = beta * kl_estimate",
        ),
        (
            "whitening by each rank alone",
            "ppo.py",
            "whiten(advantages, counted, all_reduce=run.sum_tensor)",
            "whiten(advantages, counted)",
        ),
        (
            "the update's temperature is 1",
            "ppo.py",
            "new_logprobs = token_logprobs(logits, b.tokens, b.mask, cfg.temperature)",
            "new_logprobs = token_logprobs(logits, b.tokens, b.mask)",
        ),
        (
            "old log-probabilities follow the updates",
            "ppo.py",
            "losses = surrogate(new_logprobs, old.logprobs, old.advantages, size)",
            "losses = surrogate(new_logprobs, new_logprobs.detach(), old.advantages, size)",
        ),
        (
            "a pad's value is bootstrapped from",
            "ppo.py",
            "values = values * inside  # a pad",
            "values = values * 1  # a pad",
        ),
        (
            "each rank's own mean",
            "ppo.py",
            "(total,) = run.sum([sum(len(rollout.responses[i]) for i in minibatch)])",
            "total = run.world * sum(len(rollout.responses[i]) for i in minibatch)",
        ),
        (
            "each micro-batch's own mean",
            "ppo.py",
            "loss * (weight * run.world / total)",
            "loss * (weight * run.world / b.mask.sum() / math.ceil(largest / size))",
        ),
        (
            "no clip from below",
            "ppo.py",
            "advantages * ratio.clamp(1 - clip, 1 + clip)",
            "advantages * ratio.clamp(max=1 + clip)",
        ),
        (
            "the better of clipped and unclipped",
            "ppo.py",
            "return torch.maximum(-advantages * ratio",
            "return torch.minimum(-advantages * ratio",
        ),
        (
            "value loss not clipped",
            "ppo.py",
            "clipped = values + (new_values - values).clamp(-clip, clip)",
            "clipped = new_values",
        ),
        (
            "the reference learns",
            "ppo.py",
            "reference = run.parallel(reference_of(policy, cfg))",
            "reference = policy",
        ),
        (
            "entropy punished",
            "ppo.py",
            "loss = policy_sum + value_sum - cfg.entropy_coef * bonus",
            "loss = policy_sum + value_sum + cfg.entropy_coef * bonus",
        ),
        (
            "ranks with the same prompts",
            "feedback.py",
            "mine = sorted(order[run.rank :: run.world], key=lambda i: len(prompts[i][1]))",
            "mine = sorted(order[: len(order[run.rank :: run.world])], key=lambda i: len(prompts[i][1]))",
        ),
        (
            "policy and reference with the same draws",
            "ppo.py",
            "samples = respond(run, policy, some, seed=seed + 1, **how)",
            "samples = respond(run, policy, some, seed=seed, **how)",
        ),
        (
            "the other estimator in rewards",
            "feedback.py",
            "kl_estimate(logprobs, ref_logprobs) * mask",
            'kl_estimate(logprobs, ref_logprobs, "k3") * mask',
        ),
        (
            "rewards whitened with their mean",
            "ppo.py",
            "whiten(rewards, counted, shift_mean=False, all_reduce=run.sum_tensor)",
            "whiten(rewards, counted, all_reduce=run.sum_tensor)",
        ),
        (
            "each rank stops its epochs by itself",
            "ppo.py",
            "run.sum((sums - before).tolist())",
            "(sums - before).tolist()",
        ),
        (
            "beta stays",
            "ppo.py",
            "            now.beta = adaptive_beta(",
            "            adaptive_beta(",
        ),
        ("--value_init forgotten", "ppo.py", "start = cfg.value_init or next(", "start = next("),
        (
            "a value network from scratch that is the policy's trunk",
            "ppo.py",
            'model = add_scalar_head(policy) if start == "policy" else GPT(policy.config, scalar_head=True)',
            "model = add_scalar_head(policy)",
        ),
        (
            "beta falls when KL is too high",
            "ppo.py",
            "error = min(max(kl / target - 1,",
            "error = -min(max(kl / target - 1,",
        ),
        (
            "a resumed run forgets beta",
            "ppo.py",
            "modules, optimizers, beta=cfg.beta, step_coef=1.0, first=None)\n",
            "modules, optimizers, step_coef=1.0, first=None)\n    now.beta = cfg.beta\n",
        ),
        (
            "what did not end keeps its score",
            "ppo.py",
            "scores = punish_missing_eos(scores, rollout.ended, real, cfg, run)",
            "pass",
        ),
    ],
    "grpo": [
        (
            "leave-one-out leaves none out",
            "grpo.py",
            "return (groups - others).flatten()",
            "return (groups - groups.mean(1, keepdim=True)).flatten()",
        ),
        (
            "a group's sample standard deviation",
            "grpo.py",
            "groups.std(1, keepdim=True, correction=0)",
            "groups.std(1, keepdim=True)",
        ),
        (
            "the baseline forgets",
            "grpo.py",
            "else (1 - cfg.baseline_decay) * (new - earlier)",
            "else cfg.baseline_decay * (new - earlier)",
        ),
        (
            "the baseline is not saved",
            "grpo.py",
            '{"policy": optimizer}, baseline=None, first=None)\n',
            '{"policy": optimizer}, first=None)\n    now.baseline = None\n',
        ),
        (
            "a prompt's responses are not adjacent",
            "feedback.py",
            "some = [prompts[i] for i in mine + along for _ in range(num_samples)]",
            "some = [prompts[i] for i in mine + along] * num_samples",
        ),
        (
            "the mean of the other responses counts this one",
            "grpo.py",
            "(groups.sum(1, keepdim=True) - groups) / (num_samples - 1)",
            "groups.sum(1, keepdim=True) / num_samples",
        ),
        (
            "KL in the loss and in the returns",
            "grpo.py",
            "paid = 0.0 if cfg.kl_in_loss else cfg.beta",
            "paid = cfg.beta",
        ),
        (
            "the better of clipped and unclipped",
            "grpo.py",
            "return -torch.minimum(",
            "return -torch.maximum(",
        ),
        (
            "no clip from above",
            "grpo.py",
            "advantages * ratio.clamp(1 - clip, 1 + clip)",
            "advantages * ratio.clamp(min=1 - clip)",
        ),
        (
            "old log-probabilities follow the updates",
            "grpo.py",
            "clipped_loss(new_logprobs, b.logprobs,",
            "clipped_loss(new_logprobs, new_logprobs.detach(),",
        ),
        (
            "each rank's own mean",
            "grpo.py",
            "(total,) = run.sum([sum(len(rollout.responses[i]) for i in minibatch)])",
            "total = run.world * sum(len(rollout.responses[i]) for i in minibatch)",
        ),
        (
            "the reference learns",
            "grpo.py",
            "reference = run.parallel(reference_of(policy, cfg))",
            "reference = policy",
        ),
        (
            "entropy punished",
            "grpo.py",
            "loss = policy_sum - cfg.entropy_coef * bonus",
            "loss = policy_sum + cfg.entropy_coef * bonus",
        ),
        (
            "the update's temperature is 1",
            "grpo.py",
            "new_logprobs = token_logprobs(logits, b.tokens, b.mask, cfg.temperature)",
            "new_logprobs = token_logprobs(logits, b.tokens, b.mask)",
        ),
    ],
    "dpo": [
        (
            "Jensen-Shannon upside down",
            "dpo.py",
            "return F.logsigmoid(log_ratio)",
            "return F.logsigmoid(-log_ratio)",
        ),
        (
            "forward KL as alpha 0.5",
            "dpo.py",
            'alpha = 1.0 if name == "forward_kl"',
            'alpha = 0.5 if name == "forward_kl"',
        ),
        (
            "a ranking under the reverse KL",
            "dpo.py",
            "cfg.beta, beats, cfg.divergence)",
            "cfg.beta, beats)",
        ),
        (
            "pairs under the reverse KL",
            "dpo.py",
            "how = cfg.loss, cfg.label_smoothing, label, cfg.divergence",
            "how = cfg.loss, cfg.label_smoothing, label",
        ),
        (
            "margins of the reverse KL",
            "dpo.py",
            "cfg.beta * f_derivative(log_ratios, cfg.divergence)",
            "cfg.beta * log_ratios",
        ),
        (
            "mean of log-probabilities in the sum's place",
            "dpo.py",
            "return response_sums(logprobs.flatten().index_select(0, places_of(mask)), mask)",
            "return response_sums(logprobs[mask], mask) / response_sums(mask[mask] * 1.0, mask)",
        ),
        (
            "the chosen response's reference in both places",
            "dpo.py",
            "h = chosen - f_derivative(rejected_logprobs - ref_rejected_logprobs, divergence)",
            "h = chosen - f_derivative(rejected_logprobs - ref_chosen_logprobs, divergence)",
        ),
        (
            "policy and reference swapped",
            "dpo.py",
            "    q = label * (1 - label_smoothing)",
            "    h = -h\n    q = label * (1 - label_smoothing)",
        ),
        (
            "no reference",
            "dpo.py",
            "chosen = f_derivative(chosen_logprobs - ref_chosen_logprobs, divergence)",
            "chosen = f_derivative(chosen_logprobs, divergence)",
        ),
        (
            "mask one token late",
            "dpo.py",
            "    tokens, mask, segments, rows, keep, _, label = collate(examples, n_embd)\n",
            "    tokens, mask, segments, rows, keep, _, label = collate(examples, n_embd)\n    mask = mask.roll(1, 1)\n",
        ),
        (
            "prompt tokens counted",
            "dpo.py",
            "    tokens, mask, segments, rows, keep, _, label = collate(examples, n_embd)\n",
            "    tokens, mask, segments, rows, keep, _, label = collate(examples, n_embd)\n    mask = segments > 0\n    mask[:, 0] = False\n",
        ),
        (
            "end of text not counted",
            "dpo.py",
            "return response_sums(logprobs.flatten().index_select(0, places_of(mask)), mask)",
            "return response_sums((logprobs * mask.roll(-1, 1))[mask], mask)",
        ),
        (
            "chosen and rejected swapped",
            "dpo.py",
            "chosen, rejected = logprobs[:, i], logprobs[:, j]  # (B, P)",
            "rejected, chosen = logprobs[:, i], logprobs[:, j]  # (B, P)",
        ),
        (
            "beta missing on one side",
            "dpo.py",
            "return q * loss_of(h) + (1 - q) * loss_of(-h)",
            "return q * loss_of(h) + (1 - q) * loss_of(-h / beta)",
        ),
        (
            "beta squared",
            "dpo.py",
            "return -F.logsigmoid(beta * h)",
            "return -F.logsigmoid(beta * beta * h)",
        ),
        (
            "label forgotten",
            "dpo.py",
            "how = cfg.loss, cfg.label_smoothing, label, cfg.divergence",
            "how = cfg.loss, cfg.label_smoothing, 1.0, cfg.divergence",
        ),
        (
            "ties and padding count",
            "dpo.py",
            "return losses.masked_fill(~keep, 0.0).sum(1) / keep.sum(1)",
            "return losses.mean(1)",
        ),
        (
            "each micro-batch's own mean",
            "dpo.py",
            "losses.sum() * weight * run.world / len(batch)",
            "losses.sum() * weight * run.world / len(some) / math.ceil(most / (size or most))",
        ),
        (
            "dropout left on",
            "feedback.py",
            "return model.eval().to(run.place(), run.precision), tokenizer",
            "return model.train().to(run.place(), run.precision), tokenizer",
        ),
        (
            "ipo's target without the half",
            "dpo.py",
            "return (h - 1 / (2 * beta)) ** 2",
            "return (h - 1 / beta) ** 2",
        ),
        (
            "the last response wins the ranking",
            "dpo.py",
            'key=lambda sample: -sample["score"]',
            'key=lambda sample: sample["score"]',
        ),
        (
            "a resumed round is sampled anew",
            "dpo.py",
            "if cfg.online and now.round < epoch:",
            "if cfg.online and (now.round < epoch or run.step == run.first):",
        ),
        (
            "the reference follows the policy",
            "dpo.py",
            "reference = policy if cfg.refresh_reference else load_reference(run, tokenizer)",
            "reference = policy",
        ),
        (
            "noise after the rule for what did not end",
            "dpo.py",
            "scores = punish_missing_eos(scores, ended, len(samples), cfg, run).tolist()",
            "scores = punish_missing_eos(scores, ended, len(samples), cfg, run)\n    scores = (scores + 1e-9 * torch.tensor(noise)).tolist()",
        ),
        (
            "ranks that draw the same",
            "dpo.py",
            "seed = ((cfg.seed * 1_000_003 + number) * 4096 + run.rank) * 4096 + begin",
            "seed = ((cfg.seed * 1_000_003 + number) * 4096) * 4096 + begin",
        ),
        (
            "a cache of other weights is used",
            "dpo.py",
            "list(map(sha256, files_of([cfg.reference or cfg.init])))",
            "len(files_of([cfg.reference or cfg.init]))",
        ),
        (
            "a cache of other truncation is used",
            "dpo.py",
            '"tokens": [*identity(tokenizer), longest, cfg.overlong],',
            '"tokens": [*identity(tokenizer)],',
        ),
    ],
    "rlaif": [
        (
            "who responds to prompts reads them as plain text",
            "rlaif.py",
            'if request.get("cut"):',
            'if request.get("never"):',
        ),
        (
            "the second order not turned round",
            "rlaif.py",
            "return (shares[0] + 1 - shares[1]) / 2, shares",
            "return (shares[0] + shares[1]) / 2, shares",
        ),
        (
            "one order alone",
            "rlaif.py",
            "return (shares[0] + 1 - shares[1]) / 2, shares",
            "return shares[0], shares",
        ),
        (
            "answers swapped",
            "rlaif.py",
            "0.5 + 0.5 * math.tanh((one - two) / 2) for one, two in",
            "0.5 + 0.5 * math.tanh((two - one) / 2) for one, two in",
        ),
        (
            "bias of flipped pairs",
            "rlaif.py",
            "for a, b in shares if (a > 0.5) == (b > 0.5)]",
            "for a, b in shares if (a > 0.5) != (b > 0.5)]",
        ),
        ("ratings from 0", "rlaif.py", "np.arange(1, n + 1) * weights", "np.arange(n) * weights"),
        (
            "ratings on another scale",
            "rlaif.py",
            "2 * (rating - 1) / (n - 1) - 1",
            "2 * rating / n - 1",
        ),
        (
            "the answer before the rationale",
            "rlaif.py",
            'lines[-1] += " " + reason.strip()',
            'lines[-1] += ""',
        ),
        (
            "a rationale that gives the answer away",
            "rlaif.py",
            'text.split(section(template, "ending").strip())[0] for text in texts',
            "text for text in texts",
        ),
        (
            "fields filled in fields",
            "rlaif.py",
            '    pattern = "|".join(re.escape("{" + name + "}") for name in fields)\n    return re.sub(pattern, lambda match: fields[match[0][1:-1]].strip(), text)\n',
            '    for name in fields:\n        text = text.replace("{" + name + "}", fields[name].strip())\n    return text\n',
        ),
        (
            "the clamp forgotten",
            "rlaif.py",
            "p = min(max(answer[0], bounds[0]), bounds[1])",
            "p = min(max(answer[0], 0.0), bounds[1])",
        ),
        (
            "labels below one half",
            "rlaif.py",
            "1.0 if cfg.hard else max(p, 1 - p)",
            "1.0 if cfg.hard else p",
        ),
        (
            "the better one is rejected",
            "rlaif.py",
            '("first", "second") if p >= 0.5 else ("second", "first")',
            '("second", "first") if p >= 0.5 else ("first", "second")',
        ),
        (
            "the answer's place one token off",
            "rlaif.py",
            "pad([row[:-1] for row in rows], [row[-1:] for row in rows])",
            "pad([row[:-2] for row in rows], [row[-2:-1] for row in rows])",
        ),
        (
            "sampled blocks asked in parts",
            "rlaif.py",
            "            append_line(self.memory, kept)\n",
            "            for key in kept:\n                append_line(self.memory, {key: kept[key]})\n",
        ),
        (
            "answers are forgotten",
            "rlaif.py",
            "append_line(self.memory, kept)",
            "pass",
        ),
        (
            "a torn line takes the next with it",
            "rlaif.py",
            "        if whole < len(data):",
            "        if False:",
        ),
        (
            "absent answers are impossible",
            "rlaif.py",
            "if some else least for some in found]",
            "if some else -100.0 for some in found]",
        ),
        (
            "a server's error is an answer",
            "rlaif.py",
            "passing = reply.status in (408, 429) or reply.status >= 500",
            "passing = reply.status >= 500",
        ),
        ("marks unread", "rlaif.py", "token.strip(MARKS) in some", "token.strip() in some"),
        ("one spelling of several", "rlaif.py", "np.logaddexp.reduce(some)", "some[0]"),
        (
            "what is unanswered is labelled by lot",
            "rlaif.py",
            "            return []\n",
            "            return [-1.0] * len(answers)\n",
        ),
        (
            "hard labels by lot",
            "rlaif.py",
            "if cfg.hard and abs(p - 0.5) < 1e-6:",
            "if False:",
        ),
        (
            "most of it unanswered is fine",
            "rlaif.py",
            "if 2 * found.count(None) > len(pairs):",
            "if False:",
        ),
        (
            "revisions of the first response",
            "rlaif.py",
            "responses[n] = space + revision.strip()\n",
            "_ = space + revision.strip()\n",
        ),
        (
            "the same principle for all",
            "rlaif.py",
            "chosen = [principles[int(drawn.random() * len(principles))] for _ in lines]",
            "chosen = [principles[0] for _ in lines]",
        ),
        (
            "helpful demonstrations left out",
            "rlaif.py",
            'write_jsonl(run.out_dir / "demonstrations.jsonl", learnt + added)',
            'write_jsonl(run.out_dir / "demonstrations.jsonl", learnt)',
        ),
    ],
    "direct": [
        (
            "KL rewarded",
            "rlaif.py",
            "return (1 - beta) * scores - beta * kl",
            "return (1 - beta) * scores + beta * kl",
        ),
        (
            "beta on the KL alone",
            "rlaif.py",
            "return (1 - beta) * scores - beta * kl",
            "return scores - beta * kl",
        ),
        (
            "advantage upside down",
            "rlaif.py",
            "advantages = (worth[:, None] - values).detach()",
            "advantages = (values - worth[:, None]).detach()",
        ),
        (
            "the baseline learns from the policy's loss",
            "rlaif.py",
            "advantages = (worth[:, None] - values).detach()",
            "advantages = worth[:, None] - values",
        ),
        (
            "values one token late",
            "rlaif.py",
            "output = model(tokens, at=predicts(mask))  # (N,)",
            "output = model(tokens, at=mask)",
        ),
        (
            "KL of half the tokens",
            "rlaif.py",
            "worth = penalised(scores[rows], gap.sum(1).to(run.wide), cfg.beta)",
            "worth = penalised(scores[rows], gap[:, ::2].sum(1).to(run.wide), cfg.beta)",
        ),
        (
            "each micro-batch's own mean",
            "rlaif.py",
            "run.scaler.scale(loss * (weight * run.world / total)).backward()",
            "run.scaler.scale(loss * (weight / mask.sum() / math.ceil(share / size))).backward()",
        ),
        (
            "ranks averaged twice",
            "rlaif.py",
            "run.scaler.scale(loss * (weight * run.world / total)).backward()",
            "run.scaler.scale(loss * (weight / total)).backward()",
        ),
        (
            "a rank without episodes counts",
            "rlaif.py",
            "for rows, weight in run.micro_batches(list(range(real)), share, size, filler=0):",
            "for rows, weight in run.micro_batches(list(range(real or 1)), share, size, filler=0):",
        ),
        (
            "temperature forgotten",
            "rlaif.py",
            "new_logprobs = token_logprobs(logits, tokens, mask, cfg.temperature)",
            "new_logprobs = token_logprobs(logits, tokens, mask, 1.0)",
        ),
        (
            "what did not end keeps its score",
            "rlaif.py",
            "        scores = punish_missing_eos(scores, rollout.ended, real, cfg, run)\n",
            "",
        ),
        (
            "the reference learns too",
            "rlaif.py",
            "reference = run.parallel(reference_of(policy, cfg))\n    value_model",
            "reference = policy\n    value_model",
        ),
        (
            "answers stand among the logs",
            "rlaif.py",
            'f"answers/{run.rank}.jsonl"',
            'f"answers-{run.rank}.jsonl"',
        ),
        ("no step of the warm-up", "rlaif.py", 'group["lr"] = rate * peak', 'group["lr"] = peak'),
    ],
    "collapse": [
        (
            "no sigmoid",
            "collapse.py",
            "losses = prompt_aware_loss(raw.sigmoid(), closed, utilities)",
            "losses = prompt_aware_loss(raw, closed, utilities)",
        ),
        (
            "the kinds' utilities swapped",
            "collapse.py",
            "torch.where(closed[:, None], ",
            "torch.where(~closed[:, None], ",
        ),
        (
            "a straight line of slope 1 below 0",
            "collapse.py",
            "- slope * F.relu(-x)",
            "- F.relu(-x)",
        ),
        (
            "epsilon forgotten above 0",
            "collapse.py",
            "lambda x: -((x + epsilon) ** -g)",
            "lambda x: -(x ** -g)",
        ),
        ("the scale multiplies", "collapse.py", "F.logsigmoid(x / g)", "F.logsigmoid(x * g)"),
        (
            "pairs of one half counted once",
            "collapse.py",
            "gradient = 2 * (slopes.sum(0) - slopes.sum(1) - across[0].sum(1)",
            "gradient = 2 * (slopes.sum(0) / 2 - slopes.sum(1) / 2 - across[0].sum(1)",
        ),
        (
            "the middle one of an odd n forgotten",
            "collapse.py",
            "- n % 2 * middle[0])",
            "- 0 * middle[0])",
        ),
        (
            "what is at its bound never leaves",
            "collapse.py",
            "free = (s > 0) | (gradient > 0)",
            "free = s > 0",
        ),
        (
            "a step may close a gap",
            "collapse.py",
            "length = min(1.0, 0.9 / max(closing.max().item(), 1e-300))",
            "length = 1.0",
        ),
        (
            "distance of unsorted rewards",
            "collapse.py",
            "(a.sort().values - b.sort().values)",
            "(a - b.flip(0))",
        ),
        (
            "the limit law of another power",
            "collapse.py",
            '"inverse_power": (1 + g) / 2}',
            '"inverse_power": g / 2}',
        ),
        (
            "the upper half of the law is the lower one",
            "collapse.py",
            "torch.where(levels < 0.5, torch.tensor(lower), 1 - torch.tensor(lower))",
            "torch.tensor(lower)",
        ),
        (
            "the mean over each rank's own lines",
            "collapse.py",
            "run.scaler.scale(loss * weight * run.world / len(batch))",
            "run.scaler.scale(loss * weight / max(len(mine), 1))",
        ),
        (
            "a rank without lines counts one",
            "collapse.py",
            "run.scaler.scale(loss * weight * run.world / len(batch))",
            "run.scaler.scale(loss * run.world / len(batch))",
        ),
        (
            "statistics of raw scores",
            "collapse.py",
            'statistics_of(reward_model, yardstick, many, run, "sigmoid")',
            "statistics_of(reward_model, yardstick, many, run)",
        ),
        (
            "means over ranks, not by rank",
            "collapse.py",
            "mean, optimum = table.mean(0), torch",
            "mean, optimum = table.mean(1)[: table.shape[1]], torch",
        ),
        (
            "ties count as right",
            "collapse.py",
            "hits = 0.5 + 0.5 * (table[:, i] - table[:, j]).sign()",
            "hits = (table[:, i] >= table[:, j]).double()",
        ),
        ("utilities as they are", "collapse.py", "return lambda x: U(x) / height", "return U"),
        (
            "no penalty",
            "collapse.py",
            "loss = (losses + penalty * raw.square().mean(1)).sum()",
            "loss = losses.sum()",
        ),
        (
            "the penalty does not fall",
            "collapse.py",
            "penalty = cfg.logit_penalty * lr / cfg.lr",
            "penalty = cfg.logit_penalty",
        ),
        (
            "smoothing forgotten in the loss",
            "collapse.py",
            "return lambda x: (1 - smoothing) * U(x) + smoothing * U(-x)",
            "return U",
        ),
        (
            "the interpolation's step is not saved",
            "collapse.py",
            '{"reward": optimizer}, interpolated=None)',
            '{"reward": optimizer})\n    now.interpolated = None',
        ),
    ],
    "evaluate": [
        ("a text scored anew for every policy", "evaluate.py", "if row not in self.known]", "]"),
        (
            "KL the other way round",
            "evaluate.py",
            "kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)",
            "kl = (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(-1)",
        ),
        (
            "the reference's entropy",
            "evaluate.py",
            "return torch.stack([kl, entropy(logprobs)])",
            "return torch.stack([kl, entropy(ref_logprobs)])",
        ),
        (
            "the reference at the policy's temperature",
            "evaluate.py",
            "ref_logprobs = ref_logits.log_softmax(-1)",
            "ref_logprobs = (ref_logits / (temperature or 1)).log_softmax(-1)",
        ),
        (
            "entropy of different words, not of how often",
            "evaluate.py",
            "return sum(-count / total * math.log(count / total) for count in counts.values())",
            "return math.log(len(counts) or 1)",
        ),
        (
            "best of n with replacement",
            "evaluate.py",
            "weights[n - 1, i - 1] = math.comb(i - 1, n - 1) / math.comb(N, n)",
            "weights[n - 1, i - 1] = (i / N) ** n - ((i - 1) / N) ** n",
        ),
        (
            "ties of the proxy as they stand",
            "evaluate.py",
            "values[:] = (np.bincount(which, weights=values) / counts)[which]",
            "pass",
        ),
        (
            "the worst of several chosen",
            "evaluate.py",
            ".reshape(len(samples), -1, best_of).argmax(2)",
            ".reshape(len(samples), -1, best_of).argmin(2)",
        ),
        (
            "differences that are not paired",
            "evaluate.py",
            "gaps = values - means.get(first, np.nan)",
            "gaps = values - np.mean(means.get(first, np.nan))",
        ),
        ("what did not end as it scores", "evaluate.py", "np.where(e, grid, least)", "grid"),
    ],
    "experiments": [
        (
            "seeds and prompts counted twice",
            "experiments/common.py",
            "both = of_seeds + of_prompts - rest",
            "both = of_seeds + of_prompts",
        ),
        (
            "tasks' own levels taken for noise",
            "experiments/common.py",
            "return values - level + values.mean()",
            "return values",
        ),
        (
            "gold on a line in KL, not in its root",
            "experiments/frontier.py",
            "np.sqrt(kls.clip(min=0))",
            "kls.clip(min=0)",
        ),
        (
            "the smallest beta that will do",
            "experiments/choose.py",
            "chosen = max(beta for beta",
            "chosen = min(beta for beta",
        ),
        (
            "a law of RL for best-of-n",
            "experiments/common.py",
            "bend = d**2 if best_of else d * np.log(d)",
            "bend = d * np.log(d)",
        ),
        (
            "gold gained over nothing",
            "experiments/common.py",
            "number(x[column]) - first) for x in lines[1:]",
            "number(x[column])) for x in lines[1:]",
        ),
        (
            "intervals of a normal distribution",
            "experiments/common.py",
            "return float(np.interp(freedom, range(1, len(STUDENT) + 1), STUDENT))",
            "return 1.96",
        ),
        (
            "seeds set against each other in another order",
            "experiments/common.py",
            "over[label][name] = over_seeds(np.subtract(values, beside))",
            "over[label][name] = over_seeds(np.subtract(values, beside[::-1]))",
        ),
    ],
    "data": [
        (
            "a split without a test part",
            "data/convert.py",
            "place < 2 * split",
            "place < split",
        ),
        (
            "a person's next turn in a response",
            "data/convert.py",
            'if any("\\n\\nHuman:" in response for response in (chosen, rejected)):',
            "if False:",
        ),
        (
            "a conversation on two sides",
            "data/convert.py",
            'opening = re.split(r"\\n\\n(?:Assistant|### Response):", prompt)[0]',
            "opening = prompt",
        ),
        (
            "n-grams counted as often as they are said",
            "data/bleu.py",
            "sum(min(count, known[gram]) for gram, count in grams.items())",
            "sum(count for gram, count in grams.items() if gram in known)",
        ),
        (
            "no brevity penalty",
            "data/bleu.py",
            "math.exp(min(0.0, 1 - r / c) + sum",
            "math.exp(sum",
        ),
        (
            "each prompt's last response alone",
            "data/bleu.py",
            "pairs += [(text, texts[0]) for text in texts[1:]]",
            "pairs += [(text, texts[0]) for text in texts[-1:]]",
        ),
    ],
    "gpu": [
        (
            "a prompt's last tokens stay on the CPU",
            "model.py",
            "next_tokens = torch.tensor([prompt[-1] for prompt in prompts], device=device)",
            "next_tokens = torch.tensor([prompt[-1] for prompt in prompts])",
        ),
        (
            "positions of sampling stay on the CPU",
            "model.py",
            "positions = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)",
            "positions = torch.tensor([len(prompt) - 1 for prompt in prompts])",
        ),
        (
            "who has ended is known to the CPU alone",
            "model.py",
            "ended = torch.zeros(N * K, dtype=torch.bool, device=device)",
            "ended = torch.zeros(N * K, dtype=torch.bool)",
        ),
        (
            "places in packed rows are counted on the CPU",
            "model.py",
            "columns = torch.arange(segments.shape[1], device=segments.device)",
            "columns = torch.arange(segments.shape[1])",
        ),
        (
            "positions of a forward are on the CPU",
            "model.py",
            "positions = torch.arange(T, device=tokens.device)[None]",
            "positions = torch.arange(T)[None]",
        ),
        (
            "a recorded step always writes the column that it was recorded with",
            "model.py",
            "self.column.fill_(column)",
            "self.column.fill_(column // 256 * 256)",
        ),
        (
            "what is recorded asks the GPU for a number",
            "model.py",
            "self.visible[..., : self.size]",
            "self.visible[..., : max(self.size, int(self.column))]",
        ),
        (
            "what is recorded is kept for another size",
            "model.py",
            "            self.again = recorded(self.compute) if tokens.is_cuda else self.compute\n",
            '            self.again = getattr(self, "again", None) or recorded(self.compute)\n',
        ),
        (
            "who ended stays on the CPU",
            "feedback.py",
            "tokens, mask, ended = onto(device, *pad(ids, responses), torch.tensor(ended))",
            "(tokens, mask), ended = onto(device, *pad(ids, responses)), torch.tensor(ended)",
        ),
        (
            "columns of rewards are counted on the CPU",
            "feedback.py",
            "    columns = torch.arange(mask.shape[1], device=mask.device)\n    last =",
            "    columns = torch.arange(mask.shape[1])\n    last =",
        ),
        (
            "rollouts are drawn by the CPU's generator",
            "feedback.py",
            "generator = torch.Generator(run.device).manual_seed(seed)\n    sampler",
            "generator = torch.Generator().manual_seed(seed)\n    sampler",
        ),
        (
            "weights of rewards stay on the CPU",
            "feedback.py",
            "weights = torch.tensor(weights, dtype=scores.dtype, device=scores.device)",
            "weights = torch.tensor(weights, dtype=scores.dtype)",
        ),
        (
            "sums begin on the CPU",
            "run.py",
            "torch.zeros(n, dtype=self.wide, device=self.device)",
            "torch.zeros(n, dtype=self.wide)",
        ),
        (
            "the GPU's generator gets its state from the GPU",
            "run.py",
            "torch.cuda.set_rng_state(generators[1], self.device)",
            "torch.cuda.set_rng_state(generators[1].to(self.device), self.device)",
        ),
        (
            "the GPU's generator is not saved",
            "run.py",
            "generators.append(torch.cuda.get_rng_state(self.device))",
            "generators.append(generators[0])",
        ),
        (
            "a batch of comparisons stays on the CPU",
            "reward.py",
            "tensors = onto(run.device, *collate(some, width))",
            "tensors = collate(some, width)",
        ),
        (
            "what is counted waits for the GPU",
            "run.py",
            "x.detach().to(self.wide) if torch.is_tensor(x) else x",
            "x.item() if torch.is_tensor(x) else x",
        ),
        (
            "copies to the GPU wait for it",
            "run.py",
            "return [x.to(device, non_blocking=True) for x in pinned]",
            "return [x.to(device) for x in pinned]",
        ),
        (
            "a policy stays on the CPU",
            "feedback.py",
            "return model.eval().to(run.place(), run.precision), tokenizer\n\n\ndef load_reward_model",
            'return model.eval().to("cpu", run.precision), tokenizer\n\n\ndef load_reward_model',
        ),
    ],
    "shard": [
        (
            "a part is taken for the whole",
            "run.py",
            "return x.full_tensor() if isinstance(x, DTensor) else x",
            "return x.to_local() if isinstance(x, DTensor) else x",
        ),
        (
            "Adam's numbers of another cut go on",
            "run.py",
            "x = cut_as(parameters[int(index)], tensors[key].clone())",
            "x = cut_as(parameters[0], tensors[key].clone())",
        ),
        (
            "a rank without a prompt does not go along",
            "feedback.py",
            "along = order[: math.ceil(groups / run.world) - len(mine)]",
            "along = order[:0] if mine else order[:1]",
        ),
    ],
}


def mutated(name, file, old, new):
    """The file's source with the bug in it."""
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise ValueError(f"{name}: {file} has {source.count(old)} times {old!r}, expected once")
    return source.replace(old, new)


def run_tests(script, file="", source=""):
    """The script's tests in a copy of the sources, `file` having `source` there. -> the first test
    that fails, "" when none does; seconds."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part in ("data", "docs", "experiments", "tests"):
            ignored = shutil.ignore_patterns("toy", "__pycache__")
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(path, folder)
        if file:
            (folder / file).write_text(source, encoding="utf-8")
        began = time.time()
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, f"tests/test_{script}.py"],
            cwd=folder,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode == 1) != bool(failed):
        sys.exit(f"the tests could not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return failed[0] if failed else "", time.time() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", help="whose bugs; none: all scripts'")
    parser.add_argument("--only", default="", help="bugs whose name has this in it")
    args = parser.parse_args()
    missed = []
    for script in args.scripts or MUTATIONS:
        failed, seconds = run_tests(script)
        if failed:
            sys.exit(f"{script}: {failed} fails without any bug")
        print(f"{script}: its tests pass without a bug ({seconds:.0f} s)", flush=True)
        chosen = [m for m in MUTATIONS[script] if args.only in m[0]]
        for name, file, old, new in chosen:
            failed, seconds = run_tests(script, file, mutated(name, file, old, new))
            print(f"  {name}: {failed or 'NOT CAUGHT'} ({seconds:.0f} s)", flush=True)
            missed += [] if failed else [f"{script}: {name}"]
        print(f"{script}: {len(chosen)} bugs planted", flush=True)
    if missed:
        sys.exit(f"not caught: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
