"""Planted bugs: each is one rewrite of a script's source, and that script's tests must fail.

    make test-mutations                        # all, a line each
    python tests/mutations.py ppo --only clip  # those whose name has `clip` in it

A win rate does not catch such bugs: with its advantages one token off, PPO still won 0.67 against
its start, as the right one did. What must catch them are the exact tests. Each bug goes into a copy
of the sources in a temporary folder; the tests that stand first in the list of its script run
first. Exit status 1 when a bug was not caught, or when the tests fail without one.
"""

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

# {script: [(name, file, what stands there, what the bug makes of it)]}
MUTATIONS = {
    "model": [
        (
            "responses see each other",
            "model.py",
            "(segments[:, None] == segments[:, :, None])",
            "(segments[:, None] > 0)",
        ),
        (
            "places counted over all responses",
            "model.py",
            "positions = (visible.sum(2) - 1) * (segments >= 0)",
            "positions = (segments >= 0).cumsum(1) - 1",
        ),
        (
            "responses taken for each other",
            "model.py",
            "[k] * (len(r) + 1) for k, r",
            "[min(k, 2)] * (len(r) + 1) for k, r",
        ),
        (
            "prompts of one length taken for one prompt",
            "model.py",
            "groups[-1][0] == prompt and",
            "len(groups[-1][0]) == len(prompt) and",
        ),
        (
            "two threads make the first call of MKL's exp",
            "model.py",
            "torch.ones(1).exp()",
            "torch.ones(1)",
        ),
        (
            "what a row's positions have before them is left out",
            "model.py",
            "used = at.flip(1).cumsum(1).flip(1) > 0",
            "used = at.clone()",
        ),
        (
            "a row's pads stand in the wrong places",
            "model.py",
            "grid = (used.flatten().cumsum(0) - 1).view(tokens.shape)",
            "grid = (used.flatten().cumsum(0) - 1).clamp(max=len(cells) - 2).view(tokens.shape)",
        ),
        (
            "checkpointed though told not to",
            "model.py",
            "if self.checkpoint_activations and torch.is_grad_enabled() and caches is None:",
            "if torch.is_grad_enabled() and caches is None:",
        ),
    ],
    "ppo": [
        (
            "leave-one-out leaves none out",
            "ppo.py",
            "return (groups - others).flatten()",
            "return (groups - groups.mean(1, keepdim=True)).flatten()",
        ),
        (
            "a group's sample standard deviation",
            "ppo.py",
            "groups.std(1, keepdim=True, correction=0)",
            "groups.std(1, keepdim=True)",
        ),
        (
            "KL to the old policy rewarded",
            "ppo.py",
            ".exp() + coef * kl",
            ".exp() - coef * kl",
        ),
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
            '"step_coef": step_coef,',
            '"step_coef": 1.0,',
        ),
        (
            "the baseline forgets",
            "ppo.py",
            "old + (1 - cfg.baseline_decay)",
            "old + cfg.baseline_decay",
        ),
        (
            "the baseline is not saved",
            "ppo.py",
            '{"baseline": baseline,',
            '{"baseline": None,',
        ),
        (
            "a prompt's responses are not adjacent",
            "ppo.py",
            "mine = [i for i in mine for _ in range(cfg.num_samples)]",
            "mine = mine * cfg.num_samples",
        ),
        (
            "KL in the loss and in the rewards",
            "ppo.py",
            "paid = 0.0 if cfg.kl_in_loss else beta",
            "paid = beta",
        ),
        (
            "the same demonstrations again",
            "ppo.py",
            "cfg.ptx_batch_size, update, cfg.seed",
            "cfg.ptx_batch_size, 0, cfg.seed",
        ),
        (
            "each rank's own mean of demonstrations",
            "ppo.py",
            "cfg.ptx_coef * real * world / total",
            "cfg.ptx_coef * real / sum(len(ptx[i][1]) for i in lines[:1])",
        ),
        (
            "the head learns beside the last blocks",
            "ppo.py",
            "(*policy.h[-trainable_layers:], policy.ln_f)",
            "(*policy.h[-trainable_layers:], policy.ln_f, policy.wte)",
        ),
        (
            "the reference's score less the response's",
            "ppo.py",
            "(scores - reference_scores).sigmoid()",
            "(reference_scores - scores).sigmoid()",
        ),
        (
            "unsafe and unlikely to be safe",
            "ppo.py",
            "unsafe.logical_or(safe.sigmoid() < threshold)",
            "unsafe.logical_and(safe.sigmoid() < threshold)",
        ),
        (
            "the safe reward's normalised score",
            "ppo.py",
            "                rewards[n] = kind, model, raw\n",
            "                pass\n",
        ),
        (
            "scores whitened by each rank alone",
            "ppo.py",
            "whiten(scores, counted.any(1), all_reduce=sum_over_ranks)",
            "whiten(scores, counted.any(1))",
        ),
        (
            "advantages one token early",
            "ppo.py",
            "advantages[:, t] = carried",
            "advantages[:, t - 1] = carried",
        ),
        (
            "lambda forgotten",
            "ppo.py",
            "delta + gamma * lam * carried",
            "delta + gamma * carried",
        ),
        (
            "the response's mask one token late",
            "ppo.py",
            'tokens, mask = batch["tokens"], batch["mask"]\n        counted',
            'tokens, mask = batch["tokens"], batch["mask"].roll(1, 1)\n        counted',
        ),
        (
            "log-probabilities of the token after",
            "model.py",
            "return F.pad(mask.bool()[:, 1:], (0, 1))",
            "return mask.bool()",
        ),
        (
            "the score one token before the last",
            "ppo.py",
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
            "ppo.py",
            "rewards = -beta * kl_estimate",
            "rewards = beta * kl_estimate",
        ),
        (
            "k3 of the swapped laws",
            "ppo.py",
            "return log_ratio.exp() - 1 - log_ratio",
            "return (-log_ratio).exp() - 1 + log_ratio",
        ),
        (
            "whitening over pads",
            "ppo.py",
            "    inside = mask.to(x.dtype)\n\n    def total",
            "    inside = torch.ones_like(x)\n\n    def total",
        ),
        (
            "whitening by each rank alone",
            "ppo.py",
            "whiten(advantages, counted, all_reduce=sum_over_ranks)",
            "whiten(advantages, counted)",
        ),
        (
            "the update's temperature is 1",
            "ppo.py",
            "new_logprobs = token_logprobs(logits, read, inside, cfg.temperature)",
            "new_logprobs = token_logprobs(logits, read, inside)",
        ),
        (
            "sampling's temperature is 1",
            "ppo.py",
            "temperature=cfg.temperature,\n            eos=eos,",
            "temperature=float(cfg.temperature > 0),\n            eos=eos,",
        ),
        (
            "old log-probabilities follow the updates",
            "ppo.py",
            'known = new_logprobs, old["logprobs"], old["advantages"]',
            'known = new_logprobs, new_logprobs.detach(), old["advantages"]',
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
            'total = all_reduce([sum(len(batch["responses"][i]) for i in minibatch)], device)[0]',
            'total = world * sum(len(batch["responses"][i]) for i in minibatch)',
        ),
        (
            "each micro-batch's own mean",
            "ppo.py",
            "loss * (real * world / total)",
            "loss * (real * world / inside.sum() / len(micros))",
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
            "reference = copy.deepcopy(policy).to(device, precision).requires_grad_(False)",
            "reference = policy.to(device, precision)",
        ),
        (
            "dropout left on",
            "ppo.py",
            "model.eval().to(device, precision)",
            "model.train().to(device, precision)",
        ),
        (
            "scores not normalised",
            "ppo.py",
            "return normalised(torch.cat(raw), statistics[0])",
            "return torch.cat(raw)",
        ),
        (
            "what ended is punished",
            "ppo.py",
            "scores.masked_fill(~ended, least)",
            "scores.masked_fill(ended, least)",
        ),
        (
            "entropy punished",
            "ppo.py",
            "loss = policy_sum + value_sum - cfg.entropy_coef * bonus",
            "loss = policy_sum + value_sum + cfg.entropy_coef * bonus",
        ),
        (
            "ranks with the same prompts",
            "ppo.py",
            "mine = sorted(order[rank::world],",
            "mine = sorted(order[:share],",
        ),
        (
            "ranks with the same samples",
            "ppo.py",
            "seed = (cfg.seed * 1_000_003 + step) * 4096 + rank",
            "seed = (cfg.seed * 1_000_003 + step) * 4096",
        ),
        (
            "policy and reference with the same draws",
            "ppo.py",
            " + (model is policy)",
            "",
        ),
        (
            "the other estimator in rewards",
            "ppo.py",
            "token_rewards(scores, logprobs, ref_logprobs, mask, paid, cfg.kl_estimator)",
            "token_rewards(scores, logprobs, ref_logprobs, mask, paid)",
        ),
        (
            "rewards whitened with their mean",
            "ppo.py",
            "whiten(rewarded, counted, shift_mean=False, ",
            "whiten(rewarded, counted, ",
        ),
        (
            "each rank stops its epochs by itself",
            "ppo.py",
            "moved = all_reduce((window - before).tolist(), device)",
            "moved = (window - before).tolist()",
        ),
        (
            "reward weights in another order",
            "ppo.py",
            "return combine_scores(torch.stack(scores), weights, cfg.combine)",
            "return combine_scores(torch.stack(scores), weights[::-1], cfg.combine)",
        ),
        (
            "beta stays",
            "ppo.py",
            "            beta = adaptive_beta(",
            "            adaptive_beta(",
        ),
        (
            "--value_init forgotten",
            "ppo.py",
            'value_init = cfg.value_init or (models[0] if models else "policy")',
            'value_init = models[0] if models else "policy"',
        ),
        (
            "a value network from scratch that is the policy's trunk",
            "ppo.py",
            'modules["value"] = GPT(policy.config, scalar_head=True)',
            'modules["value"] = add_scalar_head(policy)',
        ),
        (
            "NaN goes on",
            "ppo.py",
            "if not finite and scaler.get_scale() <= 1:",
            "if not finite and scaler.get_scale() <= 0:",
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
            'beta, first, evaluated = state["beta"], state["first"], state["evaluated"]',
            'first, evaluated = state["first"], state["evaluated"]',
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
            "        return (logprobs * mask).sum(1)\n",
            "        return (logprobs * mask).sum(1) / mask.sum(1).clamp(min=1)\n",
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
            "    tokens, mask, segments, rows, keep, _, label = collate(examples, n_embd)\n"
            "    mask = mask.roll(1, 1)\n",
        ),
        (
            "prompt tokens counted",
            "dpo.py",
            "    tokens, mask, segments, rows, keep, _, label = collate(examples, n_embd)\n",
            "    tokens, mask, segments, rows, keep, _, label = collate(examples, n_embd)\n"
            "    mask = segments > 0\n    mask[:, 0] = False\n",
        ),
        (
            "end of text not counted",
            "dpo.py",
            "        return (logprobs * mask).sum(1)\n",
            "        return (logprobs * (mask & mask.roll(-1, 1))).sum(1)\n",
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
            "return q * f(h) + (1 - q) * f(-h)",
            "return q * f(h) + (1 - q) * f(-h / beta)",
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
            "scaler.scale(loss * world / len(batch)).backward()",
            "scaler.scale(loss / len(some) / len(shares)).backward()",
        ),
        (
            "dropout left on",
            "dpo.py",
            "return model.eval().to(device, precision), tokenizer",
            "return model.train().to(device, precision), tokenizer",
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
            "ranked = sorted(responses.values(), key=lambda row: -scores[row])",
            "ranked = sorted(responses.values(), key=lambda row: scores[row])",
        ),
        (
            "a resumed round is sampled anew",
            "dpo.py",
            "if cfg.online and epoch != step // steps_an_epoch:",
            "if cfg.online:",
        ),
        (
            "the reference follows the policy",
            "dpo.py",
            "to = policy if cfg.refresh_reference else reference",
            "to = policy",
        ),
        (
            "noise after the rule for what did not end",
            "dpo.py",
            "scores = punish_missing_eos(scores, ended, len(scores), cfg, device).tolist()",
            "scores = (punish_missing_eos(scores, ended, len(scores), cfg, device)"
            " + 1e-9 * torch.tensor(noise)).tolist()",
        ),
        (
            "ranks that draw the same",
            "dpo.py",
            "seed = ((cfg.seed * 1_000_003 + number) * 4096 + rank) * 4096 + begin",
            "seed = ((cfg.seed * 1_000_003 + number) * 4096) * 4096 + begin",
        ),
        (
            "a cache of other weights is used",
            "dpo.py",
            '"reference": list(map(sha256, model_files))',
            '"reference": len(model_files)',
        ),
        (
            "a cache of other truncation is used",
            "dpo.py",
            "[tokenizer_hash(tokenizer), max_length, cfg.overlong]",
            "[tokenizer_hash(tokenizer)]",
        ),
    ],
    "rlaif": [
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
        (
            "ratings from 0",
            "rlaif.py",
            "np.arange(1, n + 1) * weights",
            "np.arange(n) * weights",
        ),
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
            '    pattern = "|".join(re.escape("{" + name + "}") for name in fields)\n'
            "    return re.sub(pattern, lambda match: fields[match[0][1:-1]].strip(), text)\n",
            "    for name in fields:\n"
            '        text = text.replace("{" + name + "}", fields[name].strip())\n'
            "    return text\n",
        ),
        (
            "the clamp forgotten",
            "rlaif.py",
            "p = min(max(p, low), high)",
            "p = min(max(p, 0.0), high)",
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
            "last = torch.tensor([len(row) - 1 for row in rows]",
            "last = torch.tensor([len(row) - 2 for row in rows]",
        ),
        (
            "sampled blocks asked in parts",
            "rlaif.py",
            "        if not sampled:\n            return missing\n",
            "        return missing\n",
        ),
        (
            "answers are forgotten",
            "rlaif.py",
            'file.write("".join(json.dumps(record) + "\\n" for record in records))',
            "pass",
        ),
        (
            "a torn line takes the next with it",
            "rlaif.py",
            "            if self.torn:\n",
            "            if False:\n",
        ),
        (
            "absent answers are impossible",
            "rlaif.py",
            "result.append(same[0] if same else floor)",
            "result.append(same[0] if same else -100.0)",
        ),
        (
            "a server's error is an answer",
            "rlaif.py",
            "if error.code != 429 and error.code < 500:",
            "if error.code < 500:",
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
            "principle = principles[int(drawn.random() * len(principles))]",
            "principle = principles[0]",
        ),
        (
            "helpful demonstrations left out",
            "rlaif.py",
            'write_jsonl(out_dir / "demonstrations.jsonl", learnt + added)',
            'write_jsonl(out_dir / "demonstrations.jsonl", learnt)',
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
            "worth = penalised(scores[rows], gap.sum(1).double(), cfg.beta)",
            "worth = penalised(scores[rows], gap[:, ::2].sum(1).double(), cfg.beta)",
        ),
        (
            "each micro-batch's own mean",
            "rlaif.py",
            "(policy_losses.sum() + value_losses.sum()) * (weight * world / total)",
            "(policy_losses.sum() + value_losses.sum()) * (weight / mask.sum() / len(micros))",
        ),
        (
            "ranks averaged twice",
            "rlaif.py",
            "(policy_losses.sum() + value_losses.sum()) * (weight * world / total)",
            "(policy_losses.sum() + value_losses.sum()) * (weight / total)",
        ),
        (
            "a rank without episodes counts",
            "rlaif.py",
            "weight = float(rows.start < real)",
            "weight = 1.0",
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
            'scores = punish_missing_eos(scores, batch["ended"], len(mine), cfg, device)\n'
            "        ref_logprobs",
            "ref_logprobs",
        ),
        (
            "the reference learns too",
            "rlaif.py",
            "reference = copy.deepcopy(policy).to(device, precision).requires_grad_(False)\n"
            "    value_model = add_scalar_head(policy)",
            "reference = policy.to(device, precision)\n    value_model = add_scalar_head(policy)",
        ),
        (
            "answers stand among the logs",
            "rlaif.py",
            'rater.remember(out_dir / "answers" / f"{rank}.jsonl")',
            'rater.remember(out_dir / f"answers-{rank}.jsonl")',
        ),
        (
            "no step of the warm-up",
            "rlaif.py",
            'group["lr"] = rate * peak',
            'group["lr"] = peak',
        ),
    ],
    "evaluate": [
        (
            "a text scored anew for every policy",
            "evaluate.py",
            "if row not in known]",
            "]",
        ),
        (
            "KL the other way round",
            "evaluate.py",
            "kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)",
            "kl = (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(-1)",
        ),
        (
            "the reference's entropy",
            "evaluate.py",
            "pieces.append(torch.stack([kl, entropy(logprobs)]))",
            "pieces.append(torch.stack([kl, entropy(ref_logprobs)]))",
        ),
        (
            "the reference at the policy's temperature",
            "evaluate.py",
            "ref_logprobs = reference.head(ref_piece).log_softmax(-1)",
            "ref_logprobs = (reference.head(ref_piece) / (temperature or 1)).log_softmax(-1)",
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
            "a law of RL for best-of-n",
            "evaluate.py",
            "bend = d**2 if best_of else d * np.log(d)",
            "bend = d * np.log(d)",
        ),
        (
            "gold gained over nothing",
            "evaluate.py",
            "x[y] - lines[0][y]) for x in lines[1:]",
            "x[y]) for x in lines[1:]",
        ),
        (
            "intervals of a normal distribution",
            "evaluate.py",
            "t = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.4 / freedom",
            "t = 1.96",
        ),
        (
            "seeds set against each other in another order",
            "evaluate.py",
            "pairs = list(zip(seeds, first, strict=True))",
            "pairs = list(zip(seeds, first[::-1], strict=True))",
        ),
        (
            "the worst of several chosen",
            "evaluate.py",
            "some[max(group, key=lambda k: values[k])]",
            "some[min(group, key=lambda k: values[k])]",
        ),
        (
            "KL of an evaluation's wrong policy",
            "evaluate.py",
            'policy, first = report["policies"][part], next(iter(report["policies"]))',
            'policy = report["policies"][first := next(iter(report["policies"]))]',
        ),
    ],
    "data": [
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
    "collapse": [
        (
            "no sigmoid",
            "collapse.py",
            "rewards = raw.sigmoid()",
            "rewards = raw",
        ),
        (
            "the kinds' utilities swapped",
            "collapse.py",
            'ranking_loss(rewards, utilities["closed"]),\n'
            '                    ranking_loss(rewards, utilities["open"]),',
            'ranking_loss(rewards, utilities["open"]),\n'
            '                    ranking_loss(rewards, utilities["closed"]),',
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
        (
            "the scale multiplies",
            "collapse.py",
            "F.logsigmoid(x / g)",
            "F.logsigmoid(x * g)",
        ),
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
            "scaler.scale(loss * world / len(batch))",
            "scaler.scale(loss / max(len(indices), 1))",
        ),
        (
            "a rank without lines counts one",
            "collapse.py",
            "loss = losses.sum() * (1.0 if indices else 0.0)",
            "loss = losses.sum()",
        ),
        (
            "statistics of raw scores",
            "collapse.py",
            'score_statistics(torch.tensor(raw, dtype=torch.float64), "sigmoid")',
            "score_statistics(torch.tensor(raw, dtype=torch.float64))",
        ),
        (
            "means over ranks, not by rank",
            "collapse.py",
            "mean, optimum = found.mean(0)",
            "mean, optimum = found.mean(1)[: found.shape[1]]",
        ),
        (
            "ties count as right",
            "collapse.py",
            "hits = 0.5 + 0.5 * (found[:, i] - found[:, j]).sign()",
            "hits = (found[:, i] >= found[:, j]).double()",
        ),
        (
            "utilities as they are",
            "collapse.py",
            "return lambda x: U(x) / height",
            "return U",
        ),
        (
            "no penalty",
            "collapse.py",
            "losses = losses + penalty * raw.square().mean(1)",
            "losses = losses + 0",
        ),
        (
            "the penalty does not fall",
            "collapse.py",
            "penalty = cfg.logit_penalty * rate / cfg.lr",
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
            'state["interpolated"] = interpolated',
            'state["interpolated"] = -1',
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
        for part in ("data", "tests"):
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
