"""dpo.py: its losses against vectors, exact optima and TRL's numbers; the whole script."""

import copy
import dataclasses
import itertools
import json
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import gradient, metrics, read_lines, run_script, same_run, weights, write_jsonl
from ranks import on_ranks
from safetensors.torch import load_file

import dpo
import run as runs
from feedback import add_scalar_head, read_examples, read_preferences
from model import load_model, save_model

LOSSES = ("dpo", "ipo", "hinge", "robust", "plackett_luce", "cpl")


def run(monkeypatch, *args):
    return run_script(dpo, monkeypatch, *args)


def report_of(out):
    return json.loads((out / "report.json").read_text())


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- the vectors of methods.md, cards D1 to D4 and D8 ---------------------------------------------

CHOSEN, REJECTED = tensor(-10, -8), tensor(-12, -7.5)
REF_CHOSEN, REF_REJECTED = tensor(-11, -8.2), tensor(-11.5, -8.5)
FOUR = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)


@pytest.mark.parametrize(
    "loss, smoothing, expected",
    [
        ("dpo", 0.0, [0.620957, 0.733947]),
        ("dpo", 0.1, [0.635957, 0.725947]),
        ("robust", 0.1, [0.602207, 0.743947]),
        ("ipo", 0.0, [12.25, 33.64]),
        ("hinge", 0.0, [0.85, 1.08]),
    ],
)
def test_loss_vectors(loss, smoothing, expected):
    losses = dpo.dpo_loss(*FOUR, 0.1, loss, smoothing)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "divergence, expected",
    [
        ("forward_kl", [0.631154, 0.715944]),
        ("js", [0.660652, 0.707492]),
        ("alpha:0.5", [0.627691, 0.723423]),
        ("alpha:1e-9", [0.620957, 0.733947]),  # as the reverse KL
    ],
)
def test_divergence_vectors(divergence, expected):
    losses = dpo.dpo_loss(*FOUR, 0.1, divergence=divergence)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    far = dpo.dpo_loss(
        tensor(-1e4), tensor(-1), tensor(-1), tensor(-1e4), 0.1, "dpo", 0, 1, divergence
    )
    assert far.isfinite().all()


def test_lines_and_logs_under_another_divergence():
    logprobs, ref = tensor([-9, -8, -12]), tensor([-8, -9, -10])  # (1, 3)
    keep, label = torch.tensor([[True, True, False]]), torch.ones(1, 3, dtype=torch.float64)
    g = torch.log(torch.sigmoid(logprobs - ref))[0]
    for loss in ("dpo", "plackett_luce"):
        c = dpo.Config(loss=loss, beta=0.4, divergence="js")
        found = dpo.preference_loss(logprobs, ref, keep, label, c).item()
        r = c.beta * g
        if loss == "dpo":
            expected = (F.softplus(r[1] - r[0]) + F.softplus(r[2] - r[0])) / 2
        else:
            expected = r.logsumexp(0) - r[0]
        assert found == pytest.approx(expected.item())
        numbers = dpo.pair_numbers(logprobs, ref, keep, label, c)
        assert numbers["margin"] == pytest.approx((2 * r[0] - r[1] - r[2]).item())
        weight = torch.sigmoid(r[1] - r[0]) + torch.sigmoid(r[2] - r[0])
        assert numbers["weight"] == pytest.approx(weight.item())


def test_ipo_on_length_averages():
    """As TRL has it; ours sums, as the paper and its authors' first code do."""
    w, r = tensor(5, 4), tensor(6, 3)
    losses = dpo.dpo_loss(CHOSEN / w, REJECTED / r, REF_CHOSEN / w, REF_REJECTED / r, 0.1, "ipo")
    assert losses.tolist() == pytest.approx([22.246944, 27.913611], abs=1e-6)


def test_other_losses():
    for bias, expected in [(0.5, [0.913015, 0.928057]), (1.0, [0.598139, 0.718460])]:
        found = dpo.cpl_loss(CHOSEN, REJECTED, 0.1, bias).tolist()
        assert found == pytest.approx(expected, abs=1e-6)
    scores = tensor(-0.5, -0.7, -1.2)[None]
    found = dpo.plackett_luce_loss(scores, torch.zeros_like(scores), 1.0)
    assert found.tolist() == pytest.approx([1.313623], abs=1e-6)
    with pytest.raises(ValueError, match="expected dpo, ipo, hinge or robust"):
        dpo.dpo_loss(*FOUR, 0.1, "kto")


def test_the_gradient_is_the_papers():
    """-beta sigmoid(-beta h) for log pi(chosen), the opposite for log pi(rejected); nothing for the
    reference's, were it to learn."""
    four = [x.clone().requires_grad_() for x in FOUR]
    found = torch.autograd.grad(dpo.dpo_loss(*four, 0.1).sum(), four[:2])
    weight = torch.sigmoid(-0.1 * tensor(1.5, -0.8))
    assert found[0].tolist() == pytest.approx([-0.046257, -0.051999], abs=1e-6)
    assert torch.allclose(found[0], -0.1 * weight) and torch.allclose(found[1], 0.1 * weight)
    for more in [("dpo", 0.0), ("dpo", 0.1), ("robust", 0.1), ("ipo", 0.0)]:
        assert torch.autograd.gradcheck(
            lambda *x, more=more: dpo.dpo_loss(*x, 0.3, *more, 0.8), four
        )


def test_soft_labels_and_wrong_ones():
    """A label p weighs the two orders by p and 1 - p. Robust: on labels that are flipped with
    probability e, its mean is dpo's loss on clean ones. At h = 0 every dpo is ln 2."""
    clean, swapped = dpo.dpo_loss(*FOUR, 0.1), dpo.dpo_loss(*FOUR[:2][::-1], *FOUR[2:][::-1], 0.1)
    soft = dpo.dpo_loss(*FOUR, 0.1, label=tensor(0.7, 0.6))
    assert torch.allclose(soft, tensor(0.7, 0.6) * clean + tensor(0.3, 0.4) * swapped)
    robust = dpo.dpo_loss(*FOUR, 0.1, "robust", 0.2)
    wrong = dpo.dpo_loss(*FOUR[:2][::-1], *FOUR[2:][::-1], 0.1, "robust", 0.2)
    assert torch.allclose(0.8 * robust + 0.2 * wrong, clean)
    for loss, smoothing, label in [("dpo", 0, 1), ("dpo", 0.2, 0.7), ("robust", 0.2, 1)]:
        start = dpo.dpo_loss(CHOSEN, REJECTED, CHOSEN, REJECTED, 0.1, loss, smoothing, label)
        assert start.tolist() == pytest.approx([math.log(2)] * 2)


def test_plackett_luce_is_a_law_of_rankings():
    """Its probabilities of all orders sum to 1; of two responses it is dpo; ties and what is not
    there count for nothing."""
    r, zero = tensor(0.4, -1.0, 0.3, 1.2), torch.zeros(1, 4, dtype=torch.float64)
    orders = [r[list(order)][None] for order in itertools.permutations(range(4))]
    total = sum(math.exp(-dpo.plackett_luce_loss(order, zero, 0.7).item()) for order in orders)
    assert total == pytest.approx(1)
    two = dpo.plackett_luce_loss(torch.stack([CHOSEN, REJECTED], 1), torch.zeros(2, 2), 0.1)
    assert torch.allclose(two, dpo.dpo_loss(CHOSEN, REJECTED, tensor(0, 0), tensor(0, 0), 0.1))
    beats = torch.zeros(1, 4, 4, dtype=torch.bool)
    beats[0, 0, 1] = beats[0, 0, 2] = True  # 1 and 2 a tie, 3 not there
    found = dpo.plackett_luce_loss(r[None], zero, 1.0, beats)
    assert found.item() == pytest.approx((r[:3].logsumexp(0) - r[0]).item())


def test_discounted_sums():
    logprobs, mask = tensor([0, 1, 2, 4], [0, 0, 3, 5]), torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    assert dpo.discounted(logprobs, mask, 1).tolist() == [7, 8]
    expected = [1 + 2 * 0.9 + 4 * 0.81, 3 + 5 * 0.9]
    assert dpo.discounted(logprobs, mask, 0.9).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_lines(loss):
    """A ranking of three with a tie of the first two, and a pair beside padding: the mean of their
    pairs, or the ranking's; what is padding does not count. And what is logged of them."""
    logprobs, ref = tensor([-9, -8, -12], [-7, -9, -7]), tensor([-8, -9, -10], [-8, -8.5, -8])
    keep = torch.tensor([[False, True, True], [True, False, False]])
    label = torch.ones(2, 3, dtype=torch.float64)
    if loss != "plackett_luce":
        label[1, 0] = 0.7
    c = dpo.Config(loss=loss, beta=0.4, label_smoothing=0.1 if loss in ("dpo", "robust") else 0.0)
    found = dpo.preference_loss(logprobs, ref, keep, label, c)
    r = c.beta * (logprobs - ref)

    def pair(line, a, b):
        p = label[line, 0].item() if line else 1.0
        if loss == "cpl":
            a, b = c.beta * logprobs[line, a], c.beta * logprobs[line, b]
            return p * -(a - torch.logsumexp(torch.stack([a, c.cpl_bias * b]), 0)) + (1 - p) * -(
                b - torch.logsumexp(torch.stack([b, c.cpl_bias * a]), 0)
            )
        four = logprobs[line, a], logprobs[line, b], ref[line, a], ref[line, b]
        return dpo.dpo_loss(*four, c.beta, loss, c.label_smoothing, p)

    if loss == "plackett_luce":
        expected = [
            2 * -r[0, :].new_tensor(0)
            + (r[0, [0, 2]].logsumexp(0) - r[0, 0])
            + (r[0, [1, 2]].logsumexp(0) - r[0, 1]),
            r[1, :2].logsumexp(0) - r[1, 0],
        ]
    else:
        expected = [(pair(0, 0, 2) + pair(0, 1, 2)) / 2, pair(1, 0, 1)]
    assert found.tolist() == pytest.approx([x.item() for x in expected])
    numbers = dpo.pair_numbers(logprobs, ref, keep, label, c)
    margins = [r[0, 0] - r[0, 2], r[0, 1] - r[0, 2], r[1, 0] - r[1, 1]]
    assert numbers["margin"] == pytest.approx(sum(margins).item()) and numbers["pairs"] == 3
    assert numbers["accuracy"] == sum(m > 0 for m in margins) and numbers["ordered"] == 3
    assert numbers["chosen"] == -9 - 8 - 7 and numbers["rejected"] == -12 - 12 - 9
    if loss in ("dpo", "ipo", "hinge", "cpl"):  # of the first line, whose labels are sure
        first = dpo.pair_numbers(logprobs[:1], ref[:1], keep[:1], label[:1], c)["weight"]
        h = torch.stack(margins[:2]) / c.beta
        weight = {
            "dpo": (0.9 - torch.sigmoid(c.beta * h)).abs(),
            "ipo": (2 * (h - 1 / (2 * c.beta))).abs() / c.beta,
            "hinge": (c.beta * h < 1).double(),
            "cpl": torch.sigmoid(c.cpl_bias * r[0, 2] - r[0, :2]),
        }[loss]
        assert first == pytest.approx(weight.sum().item())


def test_labels_of_one_half_have_no_order():
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    both = tensor([-9, -8]), tensor([-8, -8])
    keep = torch.ones(1, 1, dtype=torch.bool)
    found = dpo.pair_numbers(*both, keep, half, dpo.Config())
    assert found["ordered"] == 0 == found["accuracy"] and found["pairs"] == 1


# --- exact optima: three one-token responses, methods.md section 0 --------------------------------

PI_REF, REWARDS = tensor(0.5, 0.3, 0.2), tensor(0, 1, 2)


def descend(loss_of):
    """The arms' probabilities where a loss of their log-probabilities is least."""
    logits = PI_REF.log().clone().requires_grad_()
    how = {"max_iter": 200, "tolerance_grad": 1e-10, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **how)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(logits.log_softmax(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("loss", ["dpo", "robust"])
def test_dpo_lands_on_the_optimum(beta, loss):
    """With the exact Bradley-Terry probabilities as labels: pi_ref exp(r / beta) / Z. The robust
    loss gets them through a noisy channel, and undoes it."""
    optimum = (PI_REF.log() + REWARDS / beta).softmax(0)
    i, j = torch.triu_indices(3, 3, 1)
    label, e = torch.sigmoid(REWARDS[i] - REWARDS[j]), 0.1
    if loss == "robust":
        label = label * (1 - e) + (1 - label) * e

    def loss_of(logprobs):
        refs = PI_REF.log()
        four = logprobs[i], logprobs[j], refs[i], refs[j]
        return dpo.dpo_loss(*four, beta, loss, e if loss == "robust" else 0.0, label).sum()

    assert 0.5 * (descend(loss_of) - optimum).abs().sum().item() < 1e-6


DIVERGENCES = {  # f(u), arXiv:2309.16240 table 1
    "reverse_kl": lambda u: u * u.log(),
    "forward_kl": lambda u: -u.log(),
    "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha:0.3": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7),
}


@pytest.mark.parametrize("loss", ["dpo", "plackett_luce"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_have_their_own_optimum(divergence, loss):
    """The policy that maximises E r - beta E_ref f(pi / ref), found without DPO, is where the loss
    leads with the exact probabilities of pairs, or of rankings, as labels."""
    beta, f = 0.8, DIVERGENCES[divergence]

    def objective(logprobs):
        pi = logprobs.exp()
        return -(pi * REWARDS).sum() + beta * (PI_REF * f(pi / PI_REF)).sum()

    i, j = torch.triu_indices(3, 3, 1)
    label = torch.sigmoid(REWARDS[i] - REWARDS[j])
    orders = torch.tensor(list(itertools.permutations(range(3))))
    none = torch.zeros(len(orders), 3, dtype=torch.float64)
    chances = (-dpo.plackett_luce_loss(REWARDS[orders], none, 1.0)).exp()
    assert chances.sum().item() == pytest.approx(1)

    def loss_of(logprobs):
        refs = PI_REF.log()
        if loss == "plackett_luce":
            losses = dpo.plackett_luce_loss(
                logprobs[orders], refs[orders], beta, divergence=divergence
            )
            return (chances * losses).sum()
        four = logprobs[i], logprobs[j], refs[i], refs[j]
        return dpo.dpo_loss(*four, beta, label=label, divergence=divergence).sum()

    optimum = descend(objective)
    assert 0.5 * (descend(loss_of) - optimum).abs().sum().item() < 1e-6
    assert 0.5 * (optimum - PI_REF).abs().sum().item() > 0.1


def test_ipo_settles_where_dpo_does_not():
    """Of two arms one always wins: IPO's log-ratio stays at 1 / (2 tau), DPO's grows and grows."""
    half = tensor(0.5).log()

    def ratio_after(loss, steps):
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            logprobs = logits.log_softmax(0)
            dpo.dpo_loss(logprobs[:1], logprobs[1:], half, half, 0.4, loss).sum().backward()
            optimizer.step()
        return (logits[0] - logits[1]).item()

    assert ratio_after("ipo", 2000) == pytest.approx(1.25, abs=1e-3)
    growth = [ratio_after("dpo", steps) for steps in (250, 500, 1000)]
    assert growth[0] > 5 and growth[1] > growth[0] + 2 and growth[2] > growth[1] + 2


# --- the whole script -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(toy_data, policy_run, tokenizer, tmp_path_factory):
    """A folder with 21 rankings of 2 to 4 responses and 9 comparisons, some with a label, 8 held
    out, 20 and 9 prompts, a policy with dropout in its checkpoint, another one, and a reward model.
    """
    folder = tmp_path_factory.mktemp("data")
    lines = read_lines(toy_data / "rankings.jsonl")[:24]
    for i, line in enumerate(lines):
        for name in ("responses", "scores"):
            line[name] = line[name][: 2 + i % 3]
    lines = [line for line in lines if line["scores"][0] > line["scores"][-1]]
    pairs = read_lines(toy_data / "comparisons.jsonl")[:9]
    pairs = [pair | ({"label": 0.7} if i % 2 else {}) for i, pair in enumerate(pairs)]
    write_jsonl(folder / "rankings.jsonl", lines)
    write_jsonl(folder / "train.jsonl", lines + pairs)
    for name, source, count in [
        ("held.jsonl", "rankings_validation.jsonl", 8),
        ("prompts.jsonl", "prompts_train.jsonl", 20),
        ("held_prompts.jsonl", "prompts_validation.jsonl", 9),
    ]:
        write_jsonl(folder / name, read_lines(toy_data / source)[:count])
    policy = load_model(policy_run)
    policy.config = dataclasses.replace(policy.config, dropout=0.1)
    save_model(folder / "policy", policy, tokenizer, {"stage": "sft"})
    with torch.no_grad():
        policy.wte.weight.mul_(0.8)
    save_model(folder / "other", policy, tokenizer, {"stage": "sft"})
    torch.manual_seed(3)
    model = add_scalar_head(load_model(policy_run))
    statistics = {"reward_mean": 0.1, "reward_std": 1.2, "score_transform": "identity"}
    save_model(folder / "reward", model, tokenizer, {"stage": "reward"} | statistics)
    return folder


def flags(data, out, *more):
    files = ["--data", data / "train.jsonl", "--validation", data / "held.jsonl"]
    files += ["--prompts", data / "held_prompts.jsonl", "--init", data / "policy", "--cache", ""]
    files += ["--train_prompts", data / "prompts.jsonl", "--num_prompts", 9, "--device", "cpu"]
    files += ["--max_new_tokens", 8, "--out_dir", out]
    return list(map(str, [*files, *more]))


NOTHING_HELD_OUT = ["--validation", "", "--prompts", ""]


def steps_by_hand(data, tokenizer, cfg, steps):
    """The first optimiser steps, one sequence at a time, without pads or masks, from the papers'
    equations and Adam's. -> parameters."""
    policy = load_model(data / "policy").double()
    reference = copy.deepcopy(policy)
    lines = read_lines(data / "train.jsonl")

    def logprob(model, prompt, response):
        ids = [*tokenizer.encode_ordinary(response), tokenizer.eot_token]
        prompt = tokenizer.encode_ordinary(prompt)
        logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        return sum(row[token] for row, token in zip(logits, ids, strict=True))

    examples = read_examples(data / "train.jsonl", tokenizer, 96, "drop")
    lengths = dpo.row_lengths(examples, policy.config.n_embd)
    batches = dpo.grouped_batches(lengths, cfg.batch_size, [cfg.seed, 0])
    assert len(lengths) == len(lines)
    moments = {}
    for step in range(steps):
        loss = 0.0
        for number in batches[step]:
            line = lines[number]
            if "responses" in line:
                scored = list(zip(line["responses"], line["scores"], strict=True))
                pairs = [
                    (a, b, 1.0) for (a, x), (b, y) in itertools.combinations(scored, 2) if x > y
                ]
            else:
                pairs = [(line["chosen"], line["rejected"], line.get("label", 1.0))]
            for chosen, rejected, label in pairs:
                h = 0.0
                for response, sign in ((chosen, 1), (rejected, -1)):
                    h = h + sign * logprob(policy, line["prompt"], response)
                    h = h - sign * logprob(reference, line["prompt"], response).detach()
                q = label * (1 - cfg.label_smoothing) + (1 - label) * cfg.label_smoothing
                p = torch.sigmoid(cfg.beta * h)
                cross_entropy = -q * p.log() - (1 - q) * (1 - p).log()
                loss = loss + cross_entropy / len(pairs) / len(batches[step])
        parameters = list(policy.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        scale = min(1.0, cfg.clip_norm / (norm + 1e-6))
        rate = cfg.lr * (step + 1) / cfg.warmup
        for p, g in zip(parameters, gradients, strict=True):
            m, v = moments.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
            m = 0.9 * m + 0.1 * scale * g
            v = cfg.adam_beta2 * v + (1 - cfg.adam_beta2) * (scale * g) ** 2
            moments[p] = m, v
            m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - cfg.adam_beta2 ** (step + 1))
            with torch.no_grad():
                p -= rate * m / (v.sqrt() + cfg.adam_eps)
    return policy.state_dict()


def test_two_steps_against_ones_by_hand(data, tmp_path, monkeypatch, tokenizer):
    """Rankings, comparisons and soft labels in one batch: the weights equal to 1e-9."""
    cfg = dpo.Config(
        steps=2,
        batch_size=12,
        micro_batch_size=5,
        beta=0.3,
        label_smoothing=0.1,
        clip_norm=0.5,
        lr=0.01,
        warmup=2,
        dtype="float64",
    )
    changed = [(k, v) for k, v in vars(cfg).items() if v != getattr(dpo.Config(), k)]
    args = [part for k, v in changed for part in (f"--{k}", v)]
    monkeypatch.setattr(runs.shutil, "rmtree", lambda *a, **k: None)  # the checkpoint stays
    assert run(monkeypatch, *flags(data, tmp_path / "run", *NOTHING_HELD_OUT, *args)) == 0
    found = load_file(tmp_path / "run/checkpoint-2/tensors.safetensors")
    for name, expected in steps_by_hand(data, tokenizer, cfg, 2).items():
        difference = (found[f"policy.{name}"] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert difference < 1e-9, (name, difference)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_to_order(data, tmp_path, monkeypatch, loss):
    """The training pairs, over and over: the accuracy of the implicit rewards rises to nearly 1."""
    train = data / ("rankings.jsonl" if loss in ("dpo", "plackett_luce") else "train.jsonl")
    more = [
        "--data",
        train,
        "--loss",
        loss,
        "--epochs",
        30,
        "--lr",
        3e-3,
        "--log_every",
        1,
        *NOTHING_HELD_OUT,
    ]
    more += ["--beta", {"ipo": 0.5, "cpl": 0.3}.get(loss, 0.1)]
    if loss == "robust":
        more += ["--label_smoothing", 0.1]
    if loss == "cpl":
        more += ["--gamma", 0.9, "--cpl_bias", 0.8, "--epochs", 60]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *more)) == 0
    lines = metrics(tmp_path / "run")
    assert lines[-1]["accuracy"] > (0.8 if loss == "cpl" else 0.9)
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    if loss != "cpl":
        assert lines[0]["margin"] == pytest.approx(0, abs=1e-5) and lines[-1]["margin"] > 0.3
    if loss == "dpo":
        assert lines[0]["weight"] == pytest.approx(0.5, abs=1e-5)
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_ranks_and_accumulation_take_the_same_step(data, tmp_path):
    """30 lines of 2 to 4 responses on 1 rank, 2 ranks and in micro-batches: the first step's
    gradient equal to 1e-12 relative in float64, and what is logged."""
    args = ["--steps", 1, "--batch_size", 29, "--dtype", "float64", "--clip_norm", 1e9]
    args += ["--reference", data / "other", *NOTHING_HELD_OUT]
    for name, ranks, more in [
        ("one", 1, []),
        ("accumulated", 1, ["--micro_batch_size", 4]),
        ("two", 2, ["--micro_batch_size", 3]),
    ]:
        argv = flags(data, tmp_path / name, *args, *more)
        if ranks == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(runs.shutil, "rmtree", lambda *a, **k: None)
                assert run(patch, *argv) == 0
            continue
        code = "import run\nrun.shutil.rmtree = lambda *args, **kwargs: None\n"
        code += f"sys.argv = {['dpo.py', *argv]!r}\ndpo.main()\n"
        done = on_ranks("dpo", code, ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.1
    for name in ("accumulated", "two"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in ("loss", "accuracy", "chosen", "rejected"):
                assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12), (name, key)


LONG = ["--epochs", 2, "--batch_size", 8, "--save_every", 3, "--eval_every", 4, "--log_every", 2]
ONLINE = ["--online", None, "--rounds", 3, "--round_prompts", 11, "--batch_size", 4]
ONLINE += ["--save_every", 2, "--eval_every", 4, "--log_every", 2, "--judge_noise", 0.3]


def long(data, online):
    return [data / "reward" if flag is None else flag for flag in (ONLINE if online else LONG)]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    for online in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            assert run(patch, *flags(data, folder / str(online), *long(data, online))) == 0
    return folder


def test_kill_and_resume(data, tmp_path, uninterrupted):
    """kill -9 in the midst of an online round, after a checkpoint: the end is bit-identical, logs
    and judged samples too, though they can't be sampled again."""
    args = flags(data, tmp_path / "run", *long(data, online=True), "--resume")
    code = (
        "import signal\n"
        "real, steps = dpo.schedule, []\n"
        "def counted(step, *args):\n"
        "    if step == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(step, *args)\n"
        "dpo.schedule = counted\n"
        f"sys.argv = {['dpo.py', *args]!r}\ndpo.main()\n"
    )
    first = on_ranks("dpo", code, 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    state = json.loads((tmp_path / "run/checkpoint-4/state.json").read_text())["state"]
    assert state["round"] == 1 and state["examples"]
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *args) == 0
    same_run(tmp_path / "run", uninterrupted / "True")


@pytest.mark.parametrize(
    "online, where, call",
    [(False, "schedule", 9), (False, "pair_numbers", 4), (True, "sample_rollout", 2)],
)
def test_sigterm_saves_and_resumes(data, tmp_path, monkeypatch, uninterrupted, online, where, call):
    """SIGTERM in an update, in evaluation and in a round's sampling, which is begun again."""
    args = flags(data, tmp_path / "run", *long(data, online), "--resume")
    with monkeypatch.context() as patch:
        real, calls = getattr(dpo, where), []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        patch.setattr(dpo, where, interrupted)
        assert run(patch, *args) == 128 + signal.SIGTERM
    assert not (tmp_path / "run/report.json").exists()
    assert run(monkeypatch, *args) == 0
    same_run(tmp_path / "run", uninterrupted / str(online))


@pytest.mark.parametrize("n, stop", [(1, True), (3, False)])
def test_two_ranks_with_few_prompts_online(data, tmp_path, n, stop):
    """A rank with one prompt or none; with SIGTERM to one rank in the second round's sampling both
    stop, and go on when resumed. Every pair is counted, and ranks draw differently."""
    args = ["--online", data / "reward", "--rounds", 2, "--round_prompts", n, "--batch_size", 2]
    args += ["--num_samples", 3, "--resume"]
    argv = ["dpo.py", *flags(data, tmp_path / "run", *args)]
    stopped = tmp_path / "stopped"
    code = (
        "import json, signal\nreal, calls = dpo.sample_rollout, []\n"
        "def recorded(sampler, prompts, *args):\n"
        "    calls.append(1)\n"
        f"    with open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'a') as file:\n"
        "        seed = args[-1].initial_seed()\n"
        "        print(json.dumps([seed, [line['prompt'] for line, _ in prompts]]), file=file)\n"
        f"    if {stop} and os.environ['RANK'] == '0' and len(calls) == 2:\n"
        f"        if not os.path.exists({str(stopped)!r}):\n"
        f"            open({str(stopped)!r}, 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(sampler, prompts, *args)\n"
        f"dpo.sample_rollout = recorded\nsys.argv = {argv!r}\ndpo.main()\n"
    )
    done = on_ranks("dpo", code)
    if stop:
        assert done.returncode != 0 and "stopped by SIGTERM" in done.stdout
        done = on_ranks("dpo", code)
    assert done.returncode == 0, done.stderr[-3000:]
    rounds = read_lines(tmp_path / "run/rounds.jsonl")
    pairs = [sum(a > b for a, b in itertools.combinations(line["scores"], 2)) for line in rounds]
    assert report_of(tmp_path / "run")["labels"] == sum(pairs) > 0 and min(pairs) > 0
    # What was judged is a file of rankings, that other stages read.
    assert len(list(read_preferences(tmp_path / "run/rounds.jsonl"))) == len(rounds)
    if n > 1:
        first, second = (read_lines(tmp_path / rank)[0] for rank in "01")
        own = second[1][: n // 2 * 3]  # the rest goes along
        assert first[0] != second[0] and own and not set(first[1]) & set(own)


def test_a_round_without_pairs(data, tmp_path, monkeypatch, capsys):
    """A judge to whom all are equal: nothing is learnt, it is said, and the run ends."""
    (tmp_path / "same.py").write_text("def score(prompt, response, **fields): return 1.0\n")
    args = ["--online", tmp_path / "same.py", "--rounds", 2, "--round_prompts", 4]
    args += ["--missing_eos_score", "none"]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 0
    assert "0 of 4 prompts with a pair: nothing to learn in this round" in capsys.readouterr().out
    assert report_of(tmp_path / "run")["labels"] == 0
    assert weights(tmp_path / "run") == weights(data / "policy")


def test_noise_makes_no_pair_of_two_that_did_not_end(data, tmp_path, monkeypatch):
    """Of one token, hardly a response ends: what did not end ties, whatever the noise says."""
    args = ["--online", data / "reward", "--rounds", 1, "--round_prompts", 20, "--judge_noise", 2]
    args += ["--max_new_tokens", 1, "--prompts", "", "--num_samples", 4]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 0
    rounds = tmp_path / "run/rounds.jsonl"
    assert not rounds.exists() or not read_lines(rounds)


def test_online_learns_what_the_judge_likes(data, toy_data, tmp_path, monkeypatch):
    """A Python file that likes short responses: they get shorter; with the reference refreshed in
    each round KL to the start grows further."""
    (tmp_path / "short.py").write_text(
        "def score(prompt, response, *, task, **fields): return -len(response.split())\n"
    )
    short = tmp_path / "short.py"
    args = ["--online", short, "--gold", short, "--rounds", 10, "--round_prompts", 32]
    args += ["--batch_size", 16, "--lr", 3e-3, "--eval_every", 0, "--validation", "", "--beta", 1]
    args += ["--prompts", toy_data / "prompts_validation.jsonl", "--num_prompts", 200]
    kl = []
    for more in ([], ["--refresh_reference"]):
        out = tmp_path / str(len(kl))
        assert run(monkeypatch, *flags(data, out, *args, *more)) == 0
        assert report_of(out)["win_rate"] > 0.6, report_of(out)
        kl.append(report_of(out)["kl"])
    assert 0.05 < kl[0] < kl[1]


def test_the_cache_of_the_reference(data, tmp_path, monkeypatch, capsys):
    """The second run reads what the first computed, to the same weights; another truncation, other
    weights or a damaged file do not."""
    cached = ["--cache", tmp_path / "cache", "--steps", 2, *NOTHING_HELD_OUT]

    def log_of(name, *more):
        assert run(monkeypatch, *flags(data, tmp_path / name, *cached, *more)) == 0
        return capsys.readouterr().out

    assert "log-probabilities of the reference in" in log_of("first")
    (file,) = (tmp_path / "cache").iterdir()
    assert f"from {file}" in log_of("second")
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    assert "log-probabilities of the reference in" in log_of("third", "--max_length", 80)
    assert "of the reference in" in log_of("fourth", "--reference", data / "other")
    assert "of the reference in" in log_of("fifth", "--dtype", "float64")
    assert "of the reference in" in log_of("sixth", "--data", data / "rankings.jsonl")
    assert len(list((tmp_path / "cache").iterdir())) == 5
    for place in (-20, 40):
        contents = bytearray(file.read_bytes())
        contents[place] ^= 4
        file.write_bytes(contents)
        assert "log-probabilities of the reference in" in log_of(f"damaged{place}")
        assert f"from {file}" in log_of(f"repaired{place}")
    assert weights(tmp_path / "first") == weights(tmp_path / "repaired40")


def test_the_self_check_finds_another_reference(data, tmp_path, monkeypatch, capsys):
    real = dpo.with_reference

    def wrong(examples, logprobs):
        return real(examples, [x * (1 + 1e-4 * i) for i, x in enumerate(logprobs)])

    monkeypatch.setattr(dpo, "with_reference", wrong)
    assert run(monkeypatch, *flags(data, tmp_path / "run", *LONG)) == 2
    assert "self-check: the untrained policy's log-probabilities" in capsys.readouterr().err


def test_another_reference(data, tmp_path, monkeypatch):
    """A policy other than its reference: the first margin is not 0, and KL is to the reference."""
    args = ["--reference", data / "other", "--steps", 1, "--lr", 0, "--log_every", 1]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 0
    (line,) = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert abs(line["margin"]) > 0.01
    report = report_of(tmp_path / "run")
    assert report["kl"] > 0.05
    pairs = [pairs for *_, pairs in read_preferences(data / "train.jsonl")]
    assert report["labels"] == sum(map(len, pairs))


def test_held_out_numbers(data, tmp_path, monkeypatch, tokenizer):
    """Before training and after, logged and reported: those of the pairs, one by one."""
    args = ["--steps", 1, "--lr", 0.1, "--prompts", "", "--dtype", "float64"]
    args += ["--micro_batch_size", 3]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 0
    first, _, last = metrics(tmp_path / "run")
    assert first["eval_loss"] == pytest.approx(math.log(2)) and first["eval_margin"] == 0
    report, sums = report_of(tmp_path / "run"), []
    models = [load_model(path).double() for path in (tmp_path / "run", data / "policy")]
    for example in read_examples(data / "held.jsonl", tokenizer, 96):
        each = []
        for response in example["responses"]:
            ids = [*example["prompt"], *response]
            logits = [model(torch.tensor([ids]))[0, : len(ids) - 1] for model in models]
            rows = [x.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None]) for x in logits]
            each.append([row[len(example["prompt"]) - 1 :].sum().item() for row in rows])
        for i, j, _, _ in example["pairs"]:
            h = each[i][0] - each[i][1] - each[j][0] + each[j][1]
            sums.append([each[i][0], each[j][0], 0.3 * h, h > 0])
    for n, name in enumerate(("chosen", "rejected", "margin", "accuracy")):
        expected = sum(row[n] for row in sums) / len(sums)
        # The weights of a finished run are float32.
        assert report[name] == pytest.approx(expected, rel=1e-4)
        assert last[f"eval_{name}"] == report[name]


@pytest.mark.parametrize("more", [["--beta", 5], ["--loss", "ipo", "--beta", 0.5]])
def test_precisions(data, tmp_path, monkeypatch, more):
    """A steep loss too passes the self-check; the numbers are near float32's, and not the same."""
    chosen = {}
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        args = flags(data, tmp_path / dtype, *LONG, *more, *NOTHING_HELD_OUT, "--dtype", dtype)
        assert run(monkeypatch, *args) == 0
        chosen[dtype] = metrics(tmp_path / dtype)[-1]["chosen"]
    assert len(set(chosen.values())) == 4
    assert all(x == pytest.approx(chosen["float32"], rel=0.05) for x in chosen.values())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--loss", "kto"], "--loss: invalid choice: 'kto'"),
        (["--overlong", "keep"], "--overlong: invalid choice: 'keep'"),
        (["--label_smoothing", "0.5"], "--label_smoothing: expected a number in [0, 0.5), got 0.5"),
        (["--gamma", "1.1", "--loss", "cpl"], "--gamma: expected a number in [0, 1], got 1.1"),
        (["--beta", "0"], "--beta: expected a number in (0, inf), got 0"),
        (["--temperature", "0"], "--temperature: expected a number in (0, inf), got 0"),
        (["--max_length", "1"], "--max_length: expected 2 or more"),
        (["--label_smoothing", "0.1", "--loss", "cpl"], "--label_smoothing: only with --loss dpo|"),
        (["--divergence", "alpha:1"], "--divergence alpha:1: expected reverse_kl"),
        (["--divergence", "alpha"], "--divergence alpha: expected reverse_kl"),
        (["--divergence", "js:"], "--divergence js:: expected reverse_kl"),
        (["--divergence", "js:1"], "--divergence js:1: expected reverse_kl"),
        (["--divergence", "tv"], "--divergence tv: expected reverse_kl"),
        (["--divergence", "js", "--loss", "ipo"], "--divergence: only with --loss dpo|robust|"),
        (["--gamma", "0.9"], "--gamma: only with --loss cpl"),
        (["--refresh_reference"], "--refresh_reference: only with --online"),
        (["--judge_noise", "1"], "--judge_noise: only with --online"),
        (["--online", "x.py", "--steps", "1"], "--steps: only without --online"),
        (["--online", "x.py", "--refresh_reference", "--loss", "cpl"], "has no reference"),
        (["--loss", "plackett_luce"], "a ranking has no label below 1"),
        (["--online", "x.py", "--num_samples", "1"], "--num_samples: expected a number in [2, inf"),
        (["--online", "nowhere"], "nowhere"),
        (["--missing_eos_score", "low"], "--missing_eos_score: invalid"),
        (["--data", ""], "--data: expected a file"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--reference", "nowhere"], "nowhere"),
        (["--max_new_tokens", "96"], "--max_new_tokens: leaves a prompt no room"),
    ],
)
def test_bad_settings(data, tmp_path, monkeypatch, capsys, more, message):
    assert run(monkeypatch, *flags(data, tmp_path / "run"), *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
