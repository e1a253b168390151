"""ppo.py: its mathematics against vectors, double loops and exact enumeration; the whole script."""

import copy
import dataclasses
import itertools
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from conftest import (
    CANNED,
    can_the_rollout,
    gradient,
    metrics,
    policy_of_arms,
    read_lines,
    run_script,
    same_run,
    write_jsonl,
)
from ranks import on_ranks
from safetensors.torch import load_file

import ppo
import reward
from model import load_model, load_tokenizer, save_model


def run(monkeypatch, *args):
    return run_script(ppo, monkeypatch, *args)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- the vectors of methods.md, card C1, C2, C4 ---------------------------------------------------

LOGPROBS, REF, MASK = tensor([-1, -0.5, -2]), tensor([-1.2, -0.9, -1.5]), torch.ones(1, 3).bool()
VALUES = tensor([0.3, 0.6, 0.9])


def test_reward_and_advantage_vectors():
    rewards = ppo.token_rewards(tensor(1.5), LOGPROBS, REF, MASK, 0.1)
    assert rewards[0].tolist() == pytest.approx([-0.02, -0.04, 1.55])
    advantages, returns = ppo.gae(rewards, VALUES, MASK, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([1.113625, 0.8775, 0.65])
    assert returns[0].tolist() == pytest.approx([1.413625, 1.4775, 1.55])
    white = ppo.whiten(advantages, MASK)
    assert white[0].tolist() == pytest.approx([1.232268, -0.015189, -1.217080], abs=1e-6)
    scaled = ppo.whiten(rewards, MASK, shift_mean=False)
    assert scaled[0].tolist() == pytest.approx([-0.196972, -0.223823, 1.910795], abs=1e-6)
    new = tensor([-0.7, -0.9, -1.9])
    losses = ppo.policy_loss(new, LOGPROBS, advantages, 0.2)
    assert losses[0].tolist() == pytest.approx([-1.336350, -0.588206, -0.718361], abs=1e-6)
    value = ppo.value_loss(tensor([0.1, 0.9, 1.4]), VALUES, returns, 0.2)
    assert value.mean().item() == pytest.approx(0.397853, abs=1e-6)
    unclipped = ppo.value_loss(tensor([0.1, 0.9, 1.4]), VALUES, returns, 1e9)
    assert unclipped.mean().item() == pytest.approx(0.346936, abs=1e-6)


def test_variants_vectors():
    """Cards B7, C3, C6 and 13: Llama 2's reward, J^KL, baselines without a value network, PAR."""
    safe, helpful = tensor([0.9, 0.1, 0.6, 0.3])[0], tensor([0.2, 0.8, 0.7, 0.95])[0]
    unsafe = torch.tensor([True, False, False, False])
    combined = ppo.helpful_or_safe(helpful.logit(), safe.logit(), unsafe)
    assert combined.tolist() == pytest.approx([2.197225, -2.197225, 0.847298, 2.944439], abs=1e-6)
    white = ppo.whiten(combined, torch.ones(4))
    assert white.tolist() == pytest.approx([0.635689, -1.600382, -0.051208, 1.015901], abs=1e-6)

    returns = tensor([1, 0, 0.5, 2])[0]
    found = ppo.rloo_advantages(returns, 4).tolist()
    assert found == pytest.approx([1 / 6, -7 / 6, -0.5, 1.5])
    found = ppo.grpo_advantages(returns, 4).tolist()
    assert found == pytest.approx([0.169031, -1.183216, -0.507093, 1.521278], abs=1e-6)
    found = ppo.grpo_advantages(returns, 4, divide_by_std=False).tolist()
    assert found == pytest.approx([0.125, -0.875, -0.375, 1.125])
    two = ppo.grpo_advantages(returns.repeat(2) + tensor([0, 0, 0, 0, 5, 5, 5, 5])[0], 4)
    assert two[:4].tolist() == pytest.approx(two[4:].tolist())  # a prompt's own mean
    alike = returns.new_full((4,), 0.3) + tensor([0, 1e-7, 0, -1e-7])[0]  # rounding is no reward
    assert ppo.grpo_advantages(alike, 4).abs().max() < 1e-2
    assert ppo.reinforce_advantages(returns, 0.5).tolist() == [0.5, -0.5, 0, 1.5]
    logprobs, bleu = tensor([-3.2, -4.1])[0], tensor([0.35, 0.1])[0]
    loss = -(ppo.reinforce_advantages(bleu, 0.2) * logprobs).mean()
    assert loss.item() == pytest.approx(0.035) and loss.item() + 0.017 * 2.5 == pytest.approx(
        0.0775
    )

    coef = 1.0
    for kl, expected in [(0.02, 2), (0.012, 2), (0.004, 1), (0.0066, 0.5), (0.0067, 0.5)]:
        coef = ppo.adaptive_coefficient(coef, kl, 0.01)
        assert coef == expected
    for refs, expected in [([0.9], 0.689974), ([0.9, 0.2, 1.5], 0.685794)]:
        found = ppo.par_scores(tensor([1.7])[0], tensor(*[[r] for r in refs]))
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_the_kl_penalty_is_the_kl():
    """J^KL over all three tokens that could have been drawn, weighted by the old policy: the
    penalty and its gradient are those of the exact KL, and card C3's numbers come out."""
    old, new = tensor([0.7, 0.2, 0.1])[0].log(), tensor([0.5, 0.4, 0.1])[0].log().requires_grad_()
    none = torch.zeros(3)
    weighted = (old.exp() * ppo.kl_penalty_loss(new.log_softmax(-1), old, none, 1.0)).sum()
    exact = (old.exp() * (old - new.log_softmax(-1))).sum()
    assert weighted.item() == pytest.approx(0.096901, abs=1e-6) == exact.item()
    ours, theirs = torch.autograd.grad(weighted, new)[0], torch.autograd.grad(exact, new)[0]
    assert torch.allclose(ours, theirs, atol=1e-12)
    advantages = tensor([1.113625, 0.8775, 0.65])
    later = tensor([-0.7, -0.9, -1.9])
    gain = ppo.kl_penalty_loss(later, LOGPROBS, advantages, 0.0).mean()
    assert -gain.item() - weighted.item() == pytest.approx(0.839700, abs=1e-6)


@pytest.mark.parametrize("advantage", ["reinforce", "rloo", "grpo", "kl"])
def test_expected_gradients_lead_to_the_exact_optimum(advantage):
    """The bandit of methods.md section 0, with every pair of two responses to the prompt weighted
    by its probability in the place of samples: within 1e-3 of pi_ref exp(r / beta) / Z. Not so with
    GRPO's division by the standard deviation."""
    rewards, ref, beta = tensor([0, 1, 2])[0], tensor([0.5, 0.3, 0.2])[0], 0.5
    optimum = tensor([0.036667, 0.162559, 0.800774])[0]
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))  # (9, 2)

    def solve(divide=False):
        logits, baseline, coef = ref.log().requires_grad_(), 0.0, 1.0
        for _ in range(1500):
            old = logits.detach().log_softmax(-1)
            returns = rewards - beta * (old - ref.log())
            if advantage in ("reinforce", "kl"):
                gains = [ppo.reinforce_advantages(returns, baseline)[pairs.flatten()]]
                baseline += 0.1 * ((old.exp() * returns).sum().item() - baseline)
            elif advantage == "rloo":
                gains = [ppo.rloo_advantages(returns[pair], 2) for pair in pairs]
            else:
                gains = [ppo.grpo_advantages(returns[pair], 2, divide) for pair in pairs]
            gains = torch.cat(gains).view(9, 2)
            new, chances = logits.log_softmax(-1), old.exp()[pairs].prod(1, keepdim=True)
            if advantage == "kl":
                losses = ppo.kl_penalty_loss(new[pairs], old[pairs], gains, coef)
            else:
                losses = ppo.policy_loss(new[pairs], old[pairs], gains, 0.2)
            (gradient,) = torch.autograd.grad((chances * losses).sum() / 2, logits)
            with torch.no_grad():
                logits -= 0.5 * gradient
        return 0.5 * (logits.softmax(-1) - optimum).abs().sum().item()

    assert solve() < 1e-3
    assert advantage != "grpo" or solve(divide=True) > 0.01


def test_what_is_frozen(small_gpt):
    policy = small_gpt()
    ppo.freeze(policy, 1)
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in policy.named_parameters() if n.startswith(("h.1.", "ln_f."))}


def test_adaptive_beta_vector():
    beta = 0.15
    for kl, expected in [(9, 0.15153600), (6.5, 0.15218255), (2, 0.15062420)]:
        beta = ppo.adaptive_beta(beta, kl, 6, 512, 10000)
        assert beta == pytest.approx(expected, abs=1e-8)


def test_kl_estimator_vectors():
    """Of the three tokens, and exactly: what each estimator is on average over q, and spreads."""
    for kind, mean in [("k1", 0.033333), ("k2", 0.075), ("k3", 0.079257)]:
        found = ppo.kl_estimate(LOGPROBS, REF, kind).mean().item()
        assert found == pytest.approx(mean, abs=1e-6)
    q, p = tensor([0.5, 0.3, 0.2]), tensor([0.4, 0.4, 0.2])
    for kind, mean in [("k1", 0.025267), ("k2", 0.024862), ("k3", 0.025267)]:
        estimates = ppo.kl_estimate(q.log(), p.log(), kind)
        assert (q * estimates).sum().item() == pytest.approx(mean, abs=1e-6)
    with pytest.raises(ValueError, match="expected k1, k2 or k3"):
        ppo.kl_estimate(q, p, "k4")


def test_kl_estimators_on_a_language_model(small_gpt):
    """Every response of up to 3 tokens of a small vocabulary: the sum of k1, and of k3, weighted by
    probability, is the exact KL of the two laws of responses."""
    policy = small_gpt(vocab_size=4, dtype=torch.float64, initializer_range=0.6)
    reference = small_gpt(vocab_size=4, dtype=torch.float64, initializer_range=0.6, seed=1)
    prompt, eos = [1, 2], 3
    exact = k1 = k3 = total = 0.0
    for length in (1, 2, 3):
        for body in itertools.product(range(3), repeat=length - 1):
            for last in range(4) if length == 3 else [eos]:
                response = [*body, last]
                tokens = torch.tensor([prompt + response])
                mask = torch.tensor([[False] * 2 + [True] * length])
                lengths = [len(prompt) + length]
                batch = {"tokens": tokens, "mask": mask, "lengths": lengths}
                cfg = ppo.Config()
                lp, ref = (
                    ppo.response_logprobs(model, batch, 0, cfg, ppo.nullcontext())
                    for model in (policy, reference)
                )
                p = lp.sum().exp().item()
                total += p
                exact += p * (lp - ref).sum().item()
                k1 += p * (ppo.kl_estimate(lp, ref, "k1") * mask).sum().item()
                k3 += p * (ppo.kl_estimate(lp, ref, "k3") * mask).sum().item()
    assert total == pytest.approx(1) and k1 == pytest.approx(exact)
    assert k3 == pytest.approx(exact, abs=1e-9)  # unbiased given the context, token by token


# --- slow loops -----------------------------------------------------------------------------------


def ragged(rows=6, T=11, seed=0):
    """Masks of different beginnings and lengths, and garbage everywhere else."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(rows, T, dtype=torch.bool)
    for row in mask:
        begin = rng.integers(1, 4)
        row[begin : begin + rng.integers(1, T - begin + 1)] = True
    draw = [torch.tensor(rng.normal(size=(rows, T))) for _ in range(4)]
    return mask, *draw


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_double_sum(gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, by two loops over the response's own tokens; values in
    the pads and the prompt, garbage here, make no difference."""
    mask, rewards, values, *_ = ragged()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b, inside in enumerate(mask):
        at = inside.nonzero().flatten().tolist()
        for n, t in enumerate(at):
            total = 0.0
            for power, k in enumerate(range(n, len(at))):
                following = values[b, at[k + 1]].item() if k + 1 < len(at) else 0.0
                delta = rewards[b, at[k]].item() + gamma * following - values[b, at[k]].item()
                total += (gamma * lam) ** power * delta
            assert advantages[b, t].item() == pytest.approx(total, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(total + values[b, t].item(), abs=1e-12)
        assert not advantages[b, ~inside].any() and not returns[b, ~inside].any()


def test_whitening_is_over_the_mask_and_over_ranks():
    mask, x, *_ = ragged()
    white, inside = ppo.whiten(x, mask), x[mask].numpy()
    expected = (inside - inside.mean()) / np.sqrt(inside.var() + 1e-8)
    assert white[mask].numpy() == pytest.approx(expected) and not white[~mask].any()
    shifted = ppo.whiten(x, mask, shift_mean=False)[mask].numpy()
    assert shifted == pytest.approx(expected + inside.mean())
    # Two ranks, one at a time: each adds what the other has, in the order that it is asked.
    halves = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    sums = []
    for part, inside in halves:
        count, first = inside.sum().double(), (part * inside).sum()
        sums.append(torch.stack([count, first]))
    mean = (sums[0] + sums[1])[1] / (sums[0] + sums[1])[0]
    squares = [(((p - mean) ** 2) * m).sum()[None] for p, m in halves]
    for n, (part, inside) in enumerate(halves):
        others = iter([sums[1 - n], squares[1 - n]])
        found = ppo.whiten(part, inside, all_reduce=lambda t, others=others: t + next(others))
        assert torch.allclose(found, white[:2] if n == 0 else white[2:])


def test_explained_variance():
    mask, returns, values, *_ = ragged()
    values = 0.7 * returns + 0.3 * values + 1
    expected = 1 - np.var((returns - values)[mask].numpy()) / np.var(returns[mask].numpy())
    assert ppo.explained_variance(returns, values, mask) == pytest.approx(expected)
    assert ppo.explained_variance(0 * returns, values, mask) == 0.0


def test_policy_loss_by_cases():
    """Where the ratio has moved the way the advantage wants by more than the clip there is no
    gradient; everywhere else it is -A ratio."""
    logprobs = torch.zeros(1, 6, dtype=torch.float64)
    ratio = tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9])
    advantages = tensor([1, -1, 1, -1, 1, -1])
    new = ratio.log().requires_grad_()
    losses = ppo.policy_loss(new, logprobs, advantages, 0.2)
    (found,) = torch.autograd.grad(losses.sum(), new)
    assert losses[0].tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.1, 0.9])
    assert found[0].tolist() == pytest.approx([0, 1.5, -0.5, 0, -1.1, 0.9])


def test_gradients_of_the_losses():
    mask, new, old, advantages, returns = ragged()
    new, old = (0.3 * new).requires_grad_(), 0.3 * old
    for loss in (
        lambda x: ppo.policy_loss(x, old, advantages, 0.2)[mask],
        lambda x: ppo.value_loss(x, old, returns, 0.2)[mask],
    ):
        assert torch.autograd.gradcheck(loss, new)


def test_a_score_lands_on_the_last_token():
    mask, logprobs, ref, *_ = ragged()
    scores = torch.arange(1.0, 7, dtype=torch.float64)
    rewards = ppo.token_rewards(scores, logprobs, ref, mask, 0.0)
    assert rewards.sum(1).tolist() == scores.tolist()
    for row, inside in zip(rewards, mask, strict=True):
        assert row.nonzero().flatten().tolist() == [inside.nonzero().max().item()]
    for kind in ("k1", "k2", "k3"):
        full = ppo.token_rewards(scores, logprobs, ref, mask, 0.1, kind)
        penalty = (ppo.kl_estimate(logprobs, ref, kind) * mask).sum(1)
        assert torch.allclose(full.sum(1), scores - 0.1 * penalty)


def test_values_are_of_the_state_before_the_token(small_gpt):
    """Column t of the values has read the tokens before t, and no more."""
    model = small_gpt(scalar_head=True, dtype=torch.float64)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    mask = torch.tensor([[False, False, True, True, True]])
    statistics = {"reward_mean": 0.5, "reward_std": 2.0, "score_transform": "identity"}
    with torch.no_grad():
        values = ppo.response_values(model, tokens, mask, statistics)
        for t in (2, 3, 4):
            alone = (model(tokens[:, :t])[0, -1].item() - 0.5) / 2
            assert values[0, t].item() == pytest.approx(alone)
        assert not values[0, :2].any()


def test_combining_rewards():
    scores = tensor([1.0, 2.0], [3.0, -1.0])
    assert ppo.combine_scores(scores, [1.0, 1.0], "mean").tolist() == [2.0, 0.5]
    assert ppo.combine_scores(scores, [3.0, 1.0], "mean").tolist() == [1.5, 1.25]
    assert ppo.combine_scores(scores, [1.0, 1.0], "min").tolist() == [1.0, -1.0]


def test_sampling_is_at_the_temperature(small_gpt):
    """Nearly 0 takes the most likely token; 1 gives each token its probability."""
    model = small_gpt(vocab_size=6)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
    for temperature, law in [(1e-3, torch.eye(6)[expected.argmax()]), (1.0, expected)]:
        c = ppo.Config(temperature=temperature, max_new_tokens=1, micro_batch_size=1000)
        batch = ppo.sample_batch(model, [{}] * 4000, [[1, 2]] * 4000, c, 5, 0, torch.device("cpu"))
        counts = batch["tokens"][:, 2].bincount(minlength=6) / 4000
        assert (counts - law).abs().sum() < 0.06
        assert (batch["ended"] == (batch["tokens"][:, 2] == 5)).all()


def test_prompts_of_step():
    """Whole epochs run on from iteration to iteration, each in another order."""
    steps = [ppo.prompts_of_step(5, 4, step, 3) for step in range(5)]
    flat = [number for step in steps for number in step]
    epochs = [flat[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and epochs[0] != epochs[1]
    assert sorted(ppo.prompts_of_step(2, 6, 1, 0)) == [0, 0, 0, 1, 1, 1]


# --- the whole script -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(toy_data, policy_run, tokenizer, tmp_path_factory):
    """A folder with 20 prompts, 9 held out, a policy and a normalised reward model."""
    folder = tmp_path_factory.mktemp("data")
    for name, source, count in [
        ("prompts.jsonl", "prompts_train.jsonl", 20),
        ("held.jsonl", "prompts_validation.jsonl", 9),
        ("demonstrations.jsonl", "demonstrations.jsonl", 5),
    ]:
        write_jsonl(folder / name, read_lines(toy_data / source)[:count])
    policy = load_model(policy_run)  # its checkpoint has dropout; the script must turn it off
    policy.config = dataclasses.replace(policy.config, dropout=0.1)
    save_model(folder / "policy", policy, tokenizer, {"stage": "sft"})
    torch.manual_seed(3)
    model = reward.add_scalar_head(load_model(policy_run))
    statistics = {"reward_mean": 0.1, "reward_std": 1.2, "score_transform": "identity"}
    save_model(folder / "reward", model, tokenizer, {"stage": "reward"} | statistics)
    with torch.no_grad():
        model.score.weight.mul_(-0.5)
    statistics |= {"reward_mean": -0.2, "reward_std": 0.7}
    save_model(folder / "other", model, tokenizer, {"stage": "reward"} | statistics)
    return folder


def flags(data, out, *more):
    files = ["--prompts", data / "prompts.jsonl", "--validation", data / "held.jsonl"]
    files += ["--init", data / "policy", "--reward", data / "reward", "--max_new_tokens", 8]
    files += ["--num_prompts", 9, "--device", "cpu", "--out_dir", out]
    return list(map(str, [*files, *more]))


@pytest.mark.parametrize(
    "more",
    [
        ["--lr", 0.003, "--value_lr", 0.03, "--value_init", "policy"],
        ["--lr", 0.003, "--value_lr", 0.03, "--surrogate", "kl"],
        ["--lr", 0.003, "--advantage", "reinforce", "--baseline_decay", 0.5],
        ["--lr", 0.003, "--advantage", "rloo", "--num_samples", 8],
        ["--lr", 0.003, "--advantage", "grpo", "--num_samples", 8, "--no-group_std"],
        ["--lr", 0.003, "--advantage=rloo", "--num_samples=8", "--kl_in_loss", "--kl_estimator=k2"],
    ],
    ids=["ppo", "kl", "reinforce", "rloo", "grpo", "kl_in_loss"],
)
def test_the_bandit_reaches_the_exact_optimum(tmp_path, monkeypatch, tokenizer, more):
    """methods.md section 0: three one-token responses with reference probabilities .5, .3, .2 and
    rewards 0, 1, 2; at beta 0.5 the optimum is pi_ref exp(r / beta) / Z, and PPO, advantages not
    whitened, lands within 0.02 of it in total variation; its relatives too."""
    arms = policy_of_arms(tmp_path / "policy", tokenizer)
    (tmp_path / "arms.py").write_text(
        "def score(prompt, response, **fields):\n"
        "    return {' golf': 0, ' chess': 1, ' tennis': 2}[response]\n"
    )
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Which?"}])
    args = ["--init", tmp_path / "policy", "--reward", tmp_path / "arms.py", "--validation", ""]
    args += ["--prompts", tmp_path / "prompts.jsonl", "--max_new_tokens", 1, "--device", "cpu"]
    args += ["--missing_eos_score", "none", "--no-whiten_advantages", "--beta", 0.5]
    args += ["--steps", 40, "--batch_size", 128, "--minibatch_size", 128, "--update_epochs", 2]
    args += ["--final_lr", 0.01, "--out_dir", tmp_path / "run", *more]
    assert run(monkeypatch, *args) == 0
    with torch.no_grad():
        logits = load_model(tmp_path / "run")(torch.tensor([tokenizer.encode_ordinary("Which?")]))
    found = logits[0, -1].softmax(-1)[arms]
    optimum = torch.tensor([0.036667, 0.162559, 0.800774])
    distance = 0.5 * (found - optimum).abs().sum().item()
    print(f"total variation {distance:.4f}: {found.tolist()}")
    assert found.sum() > 0.999 and distance < 0.02


def iterations_by_hand(data, tokenizer, c):
    """What ppo.py does with the canned rollout, one sequence at a time, without pads, masks or
    batches: c's number of iterations from the papers' equations and Adam's. -> parameters, and what
    is carried from one iteration to the next."""
    policy, reward_model = (
        load_model(data / "policy").double(),
        load_model(data / "reward").double(),
    )
    reference, value = copy.deepcopy(policy), load_model(data / "other").double()
    lines = read_lines(data / "prompts.jsonl")

    def score_after(ids):  # the reward, normalised, of all of ids
        return (reward_model(torch.tensor([ids]))[0, -1] - 0.1) / 1.2

    def value_after(ids):
        return (value(torch.tensor([ids]))[0, -1] + 0.2) / 0.7

    def logprobs_of(model, prompt, response):
        logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        logprobs = (logits / c.temperature).log_softmax(-1)
        return [row[token] for row, token in zip(logprobs, response, strict=True)], [
            -(row.exp() * row).sum() for row in logprobs
        ]

    ptx = read_lines(data / "demonstrations.jsonl")
    ptx = [[tokenizer.encode_ordinary(line[k]) for k in ("prompt", "response")] for line in ptx]
    fixed = [] if not c.trainable_layers else ["wte", "wpe"]  # the policy has one block
    named = {"policy": policy, "value": value}
    if c.advantage != "gae":
        del named["value"]

    moments, adam_steps, beta = {}, 0, c.beta
    baseline, coef, K = 0.0, 1.0, c.num_samples
    for step in range(c.steps):
        episodes = []
        chosen = ppo.prompts_of_step(len(lines), c.batch_size // K, step, c.seed)
        chosen = sorted(chosen, key=lambda i: len(tokenizer.encode_ordinary(lines[i]["prompt"])))
        for i, n in itertools.product(chosen, range(K)):
            text = lines[i]["prompt"]
            prompt = tokenizer.encode_ordinary(text)
            response = (list(text.encode()) * 2)[: 2 + (len(text) + n) % 6]
            response += [tokenizer.eot_token] * ((len(text) + n) % 3 > 0)
            episode = {"prompt": prompt, "response": response}
            with torch.no_grad():
                episode["old"] = logprobs_of(policy, prompt, response)[0]
                ref = logprobs_of(reference, prompt, response)[0]
                sequence = prompt + response
                episode["values"] = [
                    value_after(sequence[: len(prompt) + t]) for t in range(len(response))
                ]
                episode["score"] = score_after(sequence)
                if c.shaping == "par":
                    there = tokenizer.encode_ordinary(lines[i]["reference"])[:8]
                    there += [tokenizer.eot_token] * (len(there) < 8)
                    episode["score"] = 1 / (
                        1 + (score_after(prompt + there) - episode["score"]).exp()
                    )
                if c.shaping == "clip":
                    episode["score"] = episode["score"].clamp(-c.score_clip, c.score_clip)
            episode["ref"] = ref
            log_ratios = [r - lp for lp, r in zip(episode["old"], ref, strict=True)]
            paid = 0.0 if c.kl_in_loss else beta
            episode["rewards"] = [-paid * (x.exp() - 1 - x) for x in log_ratios]  # k3
            episode["kl"] = -sum(log_ratios).item()
            episodes.append(episode)
        if c.shaping == "whiten":
            scores = [episode["score"] for episode in episodes]
            for episode in episodes:
                episode["score"] = (episode["score"] - np.mean(scores)) / math.sqrt(
                    np.var(scores) + 1e-8
                )
        least = min(-1.0, *(episode["score"] for episode in episodes))
        everything = []
        for episode in episodes:
            ended = episode["response"][-1] == tokenizer.eot_token
            episode["rewards"][-1] = episode["rewards"][-1] + (episode["score"] if ended else least)
        rewards = [reward.item() for episode in episodes for reward in episode["rewards"]]
        mean, std = np.mean(rewards), math.sqrt(np.var(rewards) + 1e-8)
        if not c.whiten_rewards:
            mean, std = 0.0, 1.0
        wholes = []
        for episode in episodes:
            episode["rewards"] = [(reward - mean) / std + mean for reward in episode["rewards"]]
            wholes.append(sum(episode["rewards"]).item())
            n, values = len(episode["response"]), [*episode["values"], 0.0]
            deltas = [episode["rewards"][t] + c.gamma * values[t + 1] - values[t] for t in range(n)]
            episode["advantages"] = [
                sum((c.gamma * c.lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)
            ]
            episode["returns"] = [
                a + v for a, v in zip(episode["advantages"], values, strict=False)
            ]
        for j, episode in enumerate(episodes):
            group = wholes[j // K * K : j // K * K + K]
            others = [x for k, x in enumerate(group) if k != j % K]
            whole = {
                "gae": lambda: None,
                "reinforce": lambda: wholes[j] - baseline,  # noqa: B023
                "rloo": lambda: wholes[j] - np.mean(others),  # noqa: B023
                "grpo": lambda: (wholes[j] - np.mean(group)) / max(np.std(group), 1e-4),  # noqa: B023
            }[c.advantage]()
            if whole is not None:
                episode["advantages"] = [torch.tensor(whole, dtype=torch.float64)] * len(
                    episode["response"]
                )
            everything += episode["advantages"]
        baseline = np.mean(wholes) if step == 0 else 0.9 * baseline + 0.1 * np.mean(wholes)
        mean, std = np.mean(everything), math.sqrt(np.var(everything) + 1e-8)
        if not c.whiten_advantages:
            mean, std = 0.0, 1.0
        minibatches = math.ceil(c.batch_size / c.minibatch_size)
        for epoch in range(c.update_epochs):
            steps_away = []
            order = np.random.default_rng([c.seed, step, epoch, 0]).permutation(c.batch_size)
            for number in range(minibatches):
                loss, count, rewarded_changes = 0.0, 0, 0
                for i in order[number::minibatches]:
                    e = episodes[i]
                    prompt, response = e["prompt"], e["response"]
                    new, entropies = logprobs_of(policy, prompt, response)
                    for t in range(len(response)):
                        ratio = (new[t] - e["old"][t]).exp()
                        advantage = (e["advantages"][t] - mean) / std
                        low, high = 1 - c.clip, 1 + c.clip
                        least_gain = min(ratio * advantage, ratio.clamp(low, high) * advantage)
                        steps_away.append(ratio.item() - 1 - math.log(ratio.item()))
                        if c.surrogate == "kl":
                            least_gain = ratio * advantage - coef * (ratio - 1 - ratio.log())
                        if c.kl_in_loss:
                            x = e["ref"][t] - new[t]
                            least_gain = least_gain - beta * (x.exp() - 1 - x)
                        v = value_after(prompt + response[:t])
                        near = e["values"][t] + (v - e["values"][t]).clamp(
                            -c.value_clip, c.value_clip
                        )
                        errors = (v - e["returns"][t]) ** 2, (near - e["returns"][t]) ** 2
                        loss = loss - least_gain + max(errors) / 2 - c.entropy_coef * entropies[t]
                        count += 1
                        rewarded_changes += abs(ratio.item() - 1) > c.clip
                loss = loss / count
                if c.ptx_coef:
                    some = ppo.prompts_of_step(len(ptx), c.ptx_batch_size, adam_steps, c.seed)
                    nll = []
                    for prompt, text in (ptx[i] for i in some):
                        response = [*text, tokenizer.eot_token]
                        logits = policy(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
                        nll += [
                            -row[token]
                            for row, token in zip(logits.log_softmax(-1), response, strict=True)
                        ]
                    loss = loss + c.ptx_coef * sum(nll) / len(nll)
                adam_steps += 1
                for name, model in named.items():
                    peak = c.lr if name == "policy" else c.value_lr
                    rate = peak * (step + 1) / c.warmup  # all steps are of the warm-up
                    parameters = [
                        p
                        for n, p in model.named_parameters()
                        if name == "value" or n.split(".")[0] not in fixed
                    ]
                    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
                    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
                    scale = min(1.0, c.clip_norm / (norm + 1e-6))
                    for p, g in zip(parameters, gradients, strict=True):
                        m, v = moments.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
                        m = 0.9 * m + 0.1 * scale * g
                        v = c.adam_beta2 * v + (1 - c.adam_beta2) * (scale * g) ** 2
                        moments[p] = m, v
                        m, v = m / (1 - 0.9**adam_steps), v / (1 - c.adam_beta2**adam_steps)
                        with torch.no_grad():
                            if p.dim() == 2:
                                p *= 1 - rate * c.weight_decay
                            p -= rate * m / (v.sqrt() + c.adam_eps)
        assert rewarded_changes > 0 or c.surrogate == "kl"  # the clip has something to clip
        if c.surrogate == "kl":
            away = np.mean(steps_away)  # of the last epoch
            assert away != 0
            coef *= 0.5 if away < 0.01 / 1.5 else 2 if away > 0.015 else 1
        kl = np.mean([episode["kl"] for episode in episodes])
        if c.kl_target:
            error = min(max(kl / c.kl_target - 1, -0.2), 0.2)
            beta = beta * (1 + error * c.batch_size / c.kl_horizon)
    parameters = {}
    for name, model in named.items():
        parameters |= {f"{name}.{k}": v for k, v in model.state_dict().items()}
    return parameters, {"beta": beta, "baseline": baseline, "step_coef": coef}


VARIANTS = {
    "ppo": {"whiten_rewards": True, "kl_target": 0.3, "kl_horizon": 20},
    "kl": {"surrogate": "kl", "shaping": "whiten", "whiten_advantages": False},
    "reinforce": {
        "advantage": "reinforce",
        "ptx_coef": 0.7,
        "ptx_batch_size": 3,
        "trainable_layers": 1,
        "shaping": "clip",
        "score_clip": 0.3,
    },
    "rloo": {"advantage": "rloo", "num_samples": 3, "shaping": "par", "whiten_advantages": False},
    "grpo": {"advantage": "grpo", "num_samples": 3, "kl_in_loss": True, "surrogate": "kl"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_iterations_against_ones_by_hand(data, tmp_path, tokenizer, variant):
    """Everything between a rollout and the new weights: both networks equal to 1e-9."""
    size = {"rloo": 6, "grpo": 6}.get(variant, 7)
    c = ppo.Config(
        steps=2,
        batch_size=size,
        minibatch_size=3,
        micro_batch_size=2,
        update_epochs=2,
        temperature=0.8,
        gamma=0.98,
        lam=0.9,
        beta=0.3,
        clip=0.05,
        value_clip=0.05,
        entropy_coef=0.02,
        weight_decay=0.1,
        clip_norm=0.5,
        lr=0.01,
        value_lr=0.02,
        warmup=2,
        dtype="float64",
        kl_estimator="k3",
        value_init=str(data / "other"),
        **VARIANTS[variant],
    )
    if c.ptx_coef:
        c = dataclasses.replace(c, ptx_data=str(data / "demonstrations.jsonl"))
    idle = () if c.advantage == "gae" else ("gamma", "lam", "value_init", "value_lr", "value_clip")
    idle += ("clip",) if c.surrogate == "kl" else ()
    changed = [(k, v) for k, v in vars(c).items() if v != getattr(ppo.Config(), k)]
    changed = [(k, v) for k, v in changed if k not in idle]
    args = []
    for name, value in changed:
        switch = f"--{name}" if value else f"--no-{name}"
        args += [switch] if isinstance(value, bool) else [f"--{name}", value]
    with can_the_rollout(ppo) as patch:
        assert run(patch, *flags(data, tmp_path / "run", "--validation", "", *args)) == 0
    found = load_file(tmp_path / "run/checkpoint-2/tensors.safetensors")
    expected_parameters, carried = iterations_by_hand(data, tokenizer, c)
    state = json.loads((tmp_path / "run/checkpoint-2/state.json").read_text())
    assert state["beta"] == pytest.approx(carried["beta"], rel=1e-9)
    assert state["step_coef"] == carried["step_coef"]
    if c.kl_target:
        assert abs(carried["beta"] / c.beta - 1) > 0.001
    if c.advantage == "reinforce":
        assert state["baseline"] == pytest.approx(carried["baseline"], rel=1e-9)
    assert any("value." in name for name in found) == (c.advantage == "gae")
    for name, expected in expected_parameters.items():
        difference = (found[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert difference < 1e-9, (name, difference)


@pytest.mark.parametrize("variant", ["gae", "rloo"])
def test_ranks_and_accumulation_take_the_same_update(data, tmp_path, variant):
    """15 episodes of different lengths, some not ended, on 1 rank, 2 ranks and in micro-batches:
    the gradients of policy and value network equal to 1e-12 relative in float64; without a value
    network too, with demonstrations beside the reward and their held-out loss."""
    args = ["--steps", 1, "--batch_size", 15, "--minibatch_size", 15, "--update_epochs", 1]
    args += ["--dtype", "float64", "--clip_norm", 1e9, "--entropy_coef", 0.01, "--validation", ""]
    args += ["--whiten_rewards"]
    keys = ["score", "kl", "policy_loss", "value_loss", "explained_variance", "eos"]
    if variant == "rloo":
        args += ["--advantage", "rloo", "--num_samples", 3, "--surrogate", "kl", "--kl_in_loss"]
        args += ["--kl_estimator", "k3", "--shaping", "whiten", "--ptx_coef", 0.5]
        args += ["--ptx_batch_size", 5, "--ptx_data", data / "demonstrations.jsonl"]
        args += ["--ptx_validation", data / "demonstrations.jsonl"]
        keys += ["ptx_loss", "eval_nll"]
    for name, ranks, more in [
        ("one", 1, []),
        ("accumulated", 1, ["--micro_batch_size", 4]),
        ("two", 2, []),
        ("both", 2, ["--micro_batch_size", 3]),
    ]:
        argv = flags(data, tmp_path / name, *args, *more)
        if ranks == 1:
            with can_the_rollout(ppo) as patch:
                assert run(patch, *argv) == 0
            continue
        code = f"{CANNED.format(script='ppo')}sys.argv = {['ppo.py', *argv]!r}\nppo.main()\n"
        done = on_ranks("ppo", code, ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.1
    for name in ("accumulated", "two", "both"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in (key for key in keys if key in a or key in b):
                assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12), (name, key)
    if variant == "rloo":  # the loss before the update, of all demonstrations: that of the first
        assert logged[0]["eval_nll"] == pytest.approx(logged[1]["ptx_loss"], rel=1e-6)


LONG = ["--steps", 5, "--batch_size", 8, "--minibatch_size", 3, "--save_every", 2]
LONG += ["--eval_every", 3, "--kl_target", 0.5, "--kl_horizon", 100]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *flags(data, out, *LONG)) == 0
    return out


@pytest.mark.parametrize("moment", [1, 3, 4, 5])
def test_kill_and_resume(data, tmp_path, uninterrupted, moment):
    """kill -9 in an update of an iteration: the end is bit-identical."""
    args = flags(data, tmp_path / "run", *LONG, "--resume")
    code = (
        "import signal\n"
        f"real, calls = ppo.gae, []\n"
        f"def gae(*args):\n"
        f"    calls.append(1)\n"
        f"    if len(calls) == {moment} and not os.path.exists({str(tmp_path / 'killed')!r}):\n"
        f"        open({str(tmp_path / 'killed')!r}, 'w').close()\n"
        f"        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    return real(*args)\n"
        f"ppo.gae = gae\nsys.argv = {['ppo.py', *args]!r}\nppo.main()\n"
    )
    first = on_ranks("ppo", code, 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *args) == 0
    same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "where, call", [("generate", 7), ("whiten", 3), ("judge", 5), ("judge", 30)]
)
def test_sigterm_saves_and_resumes(data, tmp_path, monkeypatch, uninterrupted, where, call):
    """SIGTERM in a rollout (after an evaluation), an update, an evaluation and the last one."""
    args = flags(data, tmp_path / "run", *LONG, "--resume")
    with monkeypatch.context() as patch:
        real, calls = getattr(ppo, where), []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        patch.setattr(ppo, where, interrupted)
        assert run(patch, *args) == 128 + signal.SIGTERM
    assert not (tmp_path / "run/report.json").exists()
    assert run(monkeypatch, *args) == 0
    same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("n, minibatch", [(1, 2), (5, 1)])
def test_ranks_share_the_episodes(data, tmp_path, n, minibatch):
    """Fewer episodes than ranks, or an odd number: it ends, every prompt is sampled once, and ranks
    draw from different generators."""
    argv = ["ppo.py", *flags(data, tmp_path / "run", "--steps", 2, "--batch_size", n)]
    argv += ["--minibatch_size", str(minibatch), "--micro_batch_size", "1"]
    code = (
        "import json\nreal = ppo.sample_batch\n"
        "def recorded(sampler, prompts, ids, cfg, eos, seed, device):\n"
        f"    with open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'a') as file:\n"
        "        record = [seed, [line['prompt'] for line in prompts]]\n"
        "        print(json.dumps(record), file=file)\n"
        "    return real(sampler, prompts, ids, cfg, eos, seed, device)\n"
        f"ppo.sample_batch = recorded\nsys.argv = {argv!r}\nppo.main()\n"
    )
    done = on_ranks("ppo", code)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["episodes"] == 2 * n and report["sampled"]["policy"]["all"]["count"] == 9
    prompts = [line["prompt"] for line in read_lines(data / "prompts.jsonl")]
    rollouts = [
        [record for record in read_lines(tmp_path / rank) if set(record[1]) <= set(prompts)]
        for rank in "01"
    ]
    for step, calls in enumerate(zip(*rollouts, strict=True)):
        order = [prompts[i] for i in ppo.prompts_of_step(len(prompts), n, step, 0)]
        assert sorted(calls[0][1]) == sorted(order[::2])
        assert sorted(calls[1][1]) == sorted(order[1::2] or order[:1])
        assert calls[0][0] != calls[1][0]
    assert len(rollouts[0]) == 2


def test_it_learns_a_reward_of_ones_own(data, tmp_path, monkeypatch, capsys):
    """A Python file that pays for short responses: they get shorter, and win by it; KL is paid."""
    (tmp_path / "short.py").write_text(
        "def score(prompt, response, *, task, **fields): return -len(response.split())\n"
    )
    more = ["--reward", tmp_path / "short.py", "--gold", tmp_path / "short.py", "--steps", 12]
    more += ["--batch_size", 32, "--minibatch_size", 16, "--lr", 3e-3, "--beta", 0.01]
    more += ["--ptx_validation", data / "demonstrations.jsonl"]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *more)) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["sampled"]["win_rate"]["gold"][0] > 0.6
    lines = [line for line in metrics(tmp_path / "run") if "score" in line]
    assert lines[-1]["score"] > lines[0]["score"] + 0.3 and lines[-1]["kl"] > 0.05
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert {"updates", "entropy", "clip_fraction", "rollout_share"} <= set(lines[0])
    held = [line for line in metrics(tmp_path / "run") if "eval_gold" in line]
    assert [line["step"] for line in held] == [0, 10, 12]
    assert len({line["eval_nll"] for line in held}) == 3  # what it forgets, in the same line
    assert "wins against the reference by gold" in capsys.readouterr().out


def test_a_variant_resumes(data, tmp_path):
    """REINFORCE's baseline, the price of J^KL and the order of demonstrations go on where a killed
    run stood."""
    args = ["--advantage", "reinforce", "--surrogate", "kl", "--ptx_coef", 0.1, "--steps", 3]
    args += ["--ptx_data", data / "demonstrations.jsonl", "--ptx_batch_size", 2, "--save_every", 1]
    args += ["--batch_size", 4, "--minibatch_size", 2, "--validation", "", "--step_kl_target", 1e-6]
    args += ["--trainable_layers", 1]
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *flags(data, tmp_path / "whole", *args)) == 0
    with pytest.MonkeyPatch.context() as patch:
        real, calls = ppo.reinforce_advantages, []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*args)

        patch.setattr(ppo, "reinforce_advantages", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(patch, *flags(data, tmp_path / "run", *args))
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *flags(data, tmp_path / "run", *args, "--resume")) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    found = metrics(tmp_path / "run")
    assert found[0]["step_coef"] == 1 and found[2]["step_coef"] == 4
    assert len({line["baseline"] for line in found}) == 3


def test_the_safe_reward_decides_where_it_must(data, tmp_path):
    """Llama 2's combination of two reward models, by hand: what is optimised, and what is told."""
    lines = read_lines(data / "prompts.jsonl")[:6]
    lines = [line | {"unsafe": n % 3 == 0} for n, line in enumerate(lines)]
    write_jsonl(tmp_path / "prompts.jsonl", lines)
    args = ["--reward", f"{data / 'reward'},{data / 'other'}", "--combine", "llama2", "--steps", 1]
    args += ["--prompts", tmp_path / "prompts.jsonl", "--batch_size", 6, "--dtype", "float64"]
    args += ["--missing_eos_score", "none", "--validation", ""]
    with can_the_rollout(ppo) as patch:
        batch = ppo.sample_batch(
            None, lines, [[0]] * 6, None, load_tokenizer(data / "policy").eot_token, 0, "cpu"
        )
        assert run(patch, *flags(data, tmp_path / "run", *args)) == 0
    helpful, safe = (load_model(data / name).double() for name in ("reward", "other"))
    expected, sides = [], set()
    for line, response in zip(lines, batch["responses"], strict=True):
        ids = load_tokenizer(data / "policy").encode_ordinary(line["prompt"]) + response
        h, s = (model(torch.tensor([ids]))[0, -1].item() for model in (helpful, safe))
        decides = line["unsafe"] or 1 / (1 + math.exp(-s)) < 0.15
        expected.append(s if decides else h)
        sides.add(decides)
    assert len(sides) == 2
    assert metrics(tmp_path / "run")[0]["score"] == pytest.approx(np.mean(expected), rel=1e-6)


def test_prompts_without_what_a_score_needs(data, tmp_path, monkeypatch, capsys):
    lines = read_lines(data / "prompts.jsonl")
    for name, value, more, message in [
        ("reference", None, ["--shaping", "par"], "reference: expected a str, got none"),
        ("reference", 3, ["--shaping", "par"], "reference: expected a str, got 3"),
        ("unsafe", "no", ["--combine", "llama2"], 'unsafe: expected a bool, got "no"'),
    ]:
        line = {k: v for k, v in lines[1].items() if k != name} | ({name: value} if value else {})
        write_jsonl(tmp_path / "prompts.jsonl", [lines[0], line])
        more += ["--reward", f"{data / 'reward'},{data / 'other'}"]
        more += ["--prompts", tmp_path / "prompts.jsonl"]
        assert run(monkeypatch, *flags(data, tmp_path / "run", *more)) == 2
        assert f"{tmp_path / 'prompts.jsonl'}:2: {message}" in capsys.readouterr().err


def test_a_policy_that_did_not_learn_wins_half(data, tmp_path, monkeypatch):
    """Its samples are other draws than the reference's, from the same law; greedy, the same."""
    held = write_jsonl(tmp_path / "held.jsonl", 20 * read_lines(data / "held.jsonl"))
    more = ["--steps", 1, "--batch_size", 2, "--lr", 0, "--value_lr", 0]
    more += ["--validation", held, "--num_prompts", 180]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *more)) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    _, low, high = report["sampled"]["win_rate"]["proxy"]
    assert low < 0.5 < high and 0.05 < high - low < 0.2
    assert report["sampled"]["difference"]["all"]["kl"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert report["greedy"]["win_rate"]["proxy"] == [0.5, 0.5, 0.5]
    assert report["greedy"]["distinct_2"][0] == report["greedy"]["distinct_2"][1]


def test_several_rewards_and_other_choices(data, tmp_path, monkeypatch):
    """Two rewards by weight and by the least of them, another value network's start, estimator,
    temperature and discount: each runs, and the scores are those of both."""
    (tmp_path / "words.py").write_text(
        "def score(prompt, response, **fields): return -len(response.split())\n"
    )
    both = ["--reward", f"{data / 'reward'},{tmp_path / 'words.py'}", "--steps", 1]
    both += ["--batch_size", 8, "--value_init", data / "reward", "--kl_estimator", "k3"]
    both += ["--temperature", 0.8, "--gamma", 0.99, "--lam", 0.9, "--validation", ""]
    scores = []
    for more in (["--reward_weights", "3,1"], ["--combine", "min"], ["--reward_weights", "1,0"]):
        out = tmp_path / str(len(scores))
        assert run(monkeypatch, *flags(data, out, *both, *more)) == 0
        scores.append(metrics(out)[0]["score"])
    assert len(set(scores)) == 3 and min(scores) == scores[1]
    # The third is the reward model's alone: of the words, whose weight is 0, nothing is left.
    assert run(monkeypatch, *flags(data, tmp_path / "alone", *both[2:])) == 0
    assert metrics(tmp_path / "alone")[0]["score"] == pytest.approx(scores[2])


def test_a_value_network_from_scratch(data, tmp_path, monkeypatch):
    """--value_init random: worth 0 at first, as under policy; another trunk, so that it learns
    otherwise; the same one again, whatever the default generator had drawn before."""
    logs = []
    for how in ("policy", "random", "random"):
        out = tmp_path / str(len(logs))
        more = ["--value_init", how, "--steps", 2, "--batch_size", 8, "--validation", ""]
        assert run(monkeypatch, *flags(data, out, *more)) == 0
        logs.append([(x["explained_variance"], x["value_loss"]) for x in metrics(out)])
    assert logs[0] != logs[1] and logs[1] == logs[2]
    assert logs[0][0][0] == logs[1][0][0] == 0.0


def test_what_did_not_end():
    """It scores the smaller of --missing_eos_score and the lowest in the batch; rows that a rank
    without episodes goes along with count for nothing."""
    own, ended = tensor(0.5, 3.0, -2.0), torch.tensor([True, False, True])
    for given, real, expected in [
        ("none", 3, 3.0),
        ("-7", 3, -7.0),
        ("50", 3, -2.0),
        ("50", 2, 0.5),
        ("50", 0, 50.0),
    ]:
        c = ppo.Config(missing_eos_score=given)
        found = ppo.punish_missing_eos(own, ended, real, c, torch.device("cpu"))
        assert found.tolist() == [0.5, expected, -2.0]
    samples = [
        {"response": "a b c", "parts": {"proxy": proxy, "eos": eos}}
        for proxy, eos in [(1.0, 1.0), (9.0, 0.0)]
    ]
    table = ppo.beside(samples, samples[::-1], "-1")
    assert table["win_rate"]["proxy"][0] == 0.5
    assert table["policy"]["all"]["proxy"][0] == 5.0  # each one's own score
    assert table["difference"]["all"]["proxy"][:3] == pytest.approx([0, -3.92, 3.92])  # -1 and 1
    assert ppo.beside(samples, samples[::-1], "none")["difference"]["all"]["proxy"][1] < -15
    assert table["distinct_2"] == [0.5, 0.5]


def test_the_self_check_finds_another_forward(data, tmp_path, monkeypatch, capsys):
    """Log-probabilities of another temperature than the update's."""
    real = ppo.response_logprobs
    other = ppo.dataclasses.replace

    def wrong(model, batch, size, cfg, autocast):
        return real(model, batch, size, other(cfg, temperature=0.9), autocast)

    monkeypatch.setattr(ppo, "response_logprobs", wrong)
    assert run(monkeypatch, *flags(data, tmp_path / "run", *LONG)) == 2
    assert "self-check: the first minibatch's ratio" in capsys.readouterr().err


def test_warnings():
    cfg, before = ppo.Config(max_new_tokens=10), {"eos": 1.0, "value_loss": 0.5}
    good = {"kl": 1.0, "eos": 0.95, "empty": 0.0, "tokens": 5.0, "value_loss": 0.4}
    assert ppo.warnings_of(good, before, cfg) == []
    for change, words in [
        ({"kl": -1.0}, "below 0"),
        ({"eos": 0.7}, "fewer responses end"),
        ({"empty": 0.03}, "3.0% of the responses are empty"),
        ({"tokens": 9.5}, "as long as --max_new_tokens"),
        ({"value_loss": 9.0}, "lower --value_lr"),
    ]:
        (found,) = ppo.warnings_of(good | change, before, cfg)
        assert words in found


def test_stop_kl_ends_the_epochs(data, tmp_path, monkeypatch):
    more = ["--steps", 1, "--batch_size", 8, "--minibatch_size", 8, "--update_epochs", 6]
    more += ["--lr", 1e-2, "--warmup", 0, "--validation", ""]
    assert run(monkeypatch, *flags(data, tmp_path / "all", *more)) == 0
    assert run(monkeypatch, *flags(data, tmp_path / "few", *more, "--stop_kl", 1e-6)) == 0
    assert metrics(tmp_path / "all")[0]["updates"] == 6
    assert 1 < metrics(tmp_path / "few")[0]["updates"] < 6


def test_ranks_stop_their_epochs_together(data, tmp_path):
    """One rank's policy has moved, the other's has not: both stop, and none waits for the other."""
    more = ["--steps", 1, "--batch_size", 8, "--minibatch_size", 8, "--update_epochs", 4]
    more += ["--stop_kl", 1e-9, "--validation", "", "--timeout_s", 30]
    argv = ["ppo.py", *flags(data, tmp_path / "run", *more)]
    code = (  # the second rank's sums say that nothing has moved
        "stack = torch.stack\n"
        "def still(parts, *rest):\n"
        "    found = stack(parts, *rest)\n"
        "    if os.environ['RANK'] == '1' and found.dtype == torch.float64 and len(parts) == 6:\n"
        "        found[3] = 0\n"
        "    return found\n"
        f"ppo.torch.stack = still\nsys.argv = {argv!r}\nppo.main()\n"
    )
    done = on_ranks("ppo", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(tmp_path / "run")[0]["updates"] < 4


def test_nan_stops_before_the_update(data, tmp_path, monkeypatch, capsys):
    """In the first update of the third iteration: the checkpoint of the second is as it was."""
    real, calls = ppo.value_loss, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) > 8 else 1)

    monkeypatch.setattr(ppo, "value_loss", broken)
    more = ["--steps", 4, "--batch_size", 8, "--minibatch_size", 4, "--save_every", 2]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *more, "--validation", "")) == 1
    error = capsys.readouterr().err
    assert "iteration 2, update 0: the gradient norms are {'policy': " in error
    assert (tmp_path / "run/checkpoint-2/state.json").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_precisions(data, tmp_path, monkeypatch, dtype):
    more = [*LONG, "--dtype", dtype]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *more)) == 0
    assert all(
        math.isfinite(line["score"]) for line in metrics(tmp_path / "run") if "score" in line
    )


@pytest.mark.parametrize(
    "more, message",
    [
        (["--combine", "max"], "--combine max: expected one of mean, min, llama2"),
        (["--kl_estimator", "k4"], "--kl_estimator k4: expected one of k1, k2, k3"),
        (["--shaping", "tanh"], "--shaping tanh: expected one of none, clip"),
        (["--advantage", "a2c"], "--advantage a2c: expected one of gae, reinforce"),
        (["--surrogate", "both"], "--surrogate both: expected one of clip, kl"),
        (["--advantage", "rloo"], "--advantage rloo: compares a prompt's responses"),
        (["--num_samples", "3"], "--num_samples: 128 episodes are no whole groups of 3"),
        (["--baseline_decay", "0.5"], "--baseline_decay: only with --advantage reinforce"),
        (
            ["--advantage", "reinforce", "--baseline_decay", "1"],
            "--baseline_decay: expected less than 1",
        ),
        (["--kl_in_loss"], "--kl_in_loss: the gradient of k1 is 0"),
        (["--combine", "llama2"], "--combine llama2: expected two rewards"),
        (["--ptx_coef", "1"], "--ptx_coef and --ptx_data: one is nothing"),
        (["--ptx_data", "x.jsonl"], "--ptx_coef and --ptx_data: one is nothing"),
        (["--lam", "0.9", "--advantage", "reinforce"], "--lam: only with --advantage gae"),
        (["--no-group_std"], "--group_std: only with --advantage grpo"),
        (["--clip", "0.1", "--surrogate", "kl"], "--clip: only with --surrogate clip"),
        (["--step_kl_target", "1"], "--step_kl_target: only with --surrogate kl"),
        (["--score_clip", "2"], "--score_clip: only with --shaping clip"),
        (["--ptx_coef", "1", "--ptx_data", "none.jsonl"], "none.jsonl:0: file: can't be read"),
        (["--trainable_layers", "2"], "--trainable_layers: --init"),
        (["--score_clip", "0"], "--score_clip: expected more than 0"),
        (["--gamma", "1.1"], "--gamma, --lam: expected at most 1"),
        (["--temperature", "0"], "--temperature: above 0"),
        (["--minibatch_size", "0"], "expected more than 0"),
        (["--missing_eos_score", "low"], "--missing_eos_score low: expected a number or none"),
        (["--missing_eos_score", "nan"], "--missing_eos_score nan: expected a number or none"),
        (["--combine", "min", "--reward_weights", "1"], "has no weights"),
        (["--kl_target", "1", "--kl_horizon", "9"], "--kl_horizon: expected at least"),
        (["--kl_target", "1", "--beta", "0"], "from 0 they lead nowhere"),
        (["--gold", "data/toy.py", "--validation", ""], "--gold: judges samples for --validation"),
        (["--value_init", "x.py"], "--value_init: expected a reward model"),
        (["--reward", ""], "--reward_weights: expected 0 numbers"),
        (["--reward_weights", "1,2"], "--reward_weights: expected 1 numbers"),
        (["--reward_weights", "0"], "not all 0"),
        (["--reward", "nowhere"], "nowhere: not a model directory"),
        (["--reward", "nowhere.py"], "nowhere.py: not a Python file"),
        (["--init", "nowhere"], "nowhere: not a model directory"),
        (["--max_new_tokens", "96"], "leaves no room in 96 positions"),
        (["--top_p", "0.9"], "unrecognized arguments"),
    ],
)
def test_bad_settings(data, tmp_path, monkeypatch, capsys, more, message):
    assert run(monkeypatch, *flags(data, tmp_path / "run"), *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_what_is_no_reward_is_refused(data, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *flags(data, tmp_path / "run", "--reward", data / "policy")) == 2
    assert "not a reward model" in capsys.readouterr().err
    assert run(monkeypatch, *flags(data, tmp_path / "run", "--init", data / "reward")) == 2
    assert "has a scalar head" in capsys.readouterr().err


def test_help_shows_every_flag(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in vars(ppo.Config()))
