"""reward.py: its losses against vectors and slow oracles, its statistics, the whole script."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    gradient,
    metrics,
    read_lines,
    run_script,
    weights,
    write_jsonl,
)
from ranks import on_ranks

import reward
from model import (
    GPT,
    GPTConfig,
    encode,
    last_tokens,
    load_config,
    load_model,
    load_tokenizer,
    masks_of_responses,
    pad,
    save_model,
)

SMALL, LARGE = [0, 1 / 3, 2 / 3, 1], [0, 1, 2, 3]


def run(monkeypatch, *args):
    return run_script(reward, monkeypatch, *args)


@pytest.fixture(scope="module")
def data(toy_data, policy_run, tmp_path_factory):
    """A folder with 36 rankings of 2 to 4 responses and 12 comparisons, 8 rankings held out, 300
    prompts, and the policy."""
    folder = tmp_path_factory.mktemp("data")
    lines = read_lines(toy_data / "rankings.jsonl")[:36]
    for i, line in enumerate(lines):
        for name in ("responses", "scores"):
            line[name] = line[name][: 2 + i % 3]
    lines = [line for line in lines if line["scores"][0] > line["scores"][-1]]
    write_jsonl(folder / "rankings.jsonl", lines)
    for name, source, count in [
        ("comparisons.jsonl", "comparisons.jsonl", 12),
        ("held.jsonl", "rankings_validation.jsonl", 8),
        ("prompts.jsonl", "prompts_validation.jsonl", 300),
    ]:
        write_jsonl(folder / name, read_lines(toy_data / source)[:count])
    write_jsonl(folder / "both.jsonl", lines + read_lines(folder / "comparisons.jsonl"))
    shutil.copytree(policy_run, folder / "policy")
    return folder


def flags(data, out, *more):
    files = ["--data", data / "rankings.jsonl", "--validation", data / "held.jsonl"]
    files += ["--prompts", data / "prompts.jsonl", "--init", data / "policy"]
    files += ["--num_prompts", 64, "--max_new_tokens", 8, "--device", "cpu", "--out_dir", out]
    return list(map(str, [*files, *more]))


def scores_of(directory, rows):
    """Raw scores of (prompt, response) texts, one at a time, by the model alone."""
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    found = []
    for prompt, response in rows:
        ids = encode(tokenizer, prompt, response, 96)
        with torch.no_grad():
            found.append(model(torch.tensor([[*ids[0], *ids[1]]]))[0, -1].item())
    return found


# --- the losses -----------------------------------------------------------------------------------


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_vector():
    """methods.md B1: the loss at a gap of 0.9 and its gradient."""
    scores = tensor(1.3, 0.4).requires_grad_()
    loss = reward.pairwise_loss(scores[:1], scores[1:])
    assert loss.item() == pytest.approx(0.341154, abs=1e-6)
    loss.sum().backward()
    assert scores.grad.tolist() == pytest.approx([-0.289050, 0.289050], abs=1e-6)


def test_margin_vectors():
    """methods.md B3, Llama 2's two tables at a gap of 0.9, best grade first."""
    for table, expected in [
        (SMALL, [0.744397, 0.583271, 0.449427, 0.341154]),
        (LARGE, [2.215520, 1.387335, 0.744397, 0.341154]),
    ]:
        margins = reward.margin_of(tensor(3, 2, 1, 0), table)
        found = reward.pairwise_loss(tensor(*[0.9] * 4), torch.zeros(4), margins)
        assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_soft_label_vector():
    """methods.md B4: cross-entropy with (.6, .4), its gradient q - p, and the hard label."""
    scores = tensor(0.3, -0.2).requires_grad_()
    loss = reward.pairwise_loss(scores[:1], scores[1:], label=0.6)
    assert loss.item() == pytest.approx(0.674077, abs=1e-6)
    loss.sum().backward()
    assert scores.grad.tolist() == pytest.approx([0.022459, -0.022459], abs=1e-6)
    hard = reward.pairwise_loss(tensor(0.3), tensor(-0.2), label=tensor(1.0))
    assert hard.item() == pytest.approx(0.474077, abs=1e-6)
    least = reward.pairwise_loss(tensor(math.log(1.5)), tensor(0.0), label=0.6)
    assert least.item() == pytest.approx(0.673012, abs=1e-6)  # the entropy of the label


def test_ranking_vector():
    """methods.md B2: four responses, the mean over six pairs and its gradient."""
    scores = tensor(2, 1, 0.5, -1)[None].requires_grad_()
    loss = reward.ranking_loss(scores)
    assert loss.tolist() == pytest.approx([0.227613], abs=1e-6)
    loss.sum().backward()
    expected = [-0.083132, -0.037967, 0.062923, 0.058176]
    assert scores.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_normalisation_vector():
    """methods.md B5."""
    raw = tensor(0.2, -1.1, 2.4, 0.5)
    statistics = reward.score_statistics(raw)
    assert 1 / statistics["reward_std"] == pytest.approx(0.799361, abs=1e-6)
    assert reward.normalised(raw, statistics).tolist() == pytest.approx(
        [-0.239808, -1.278977, 1.518785, 0], abs=1e-6
    )
    bounded = reward.score_statistics(raw, "sigmoid")
    found = reward.normalised(raw, bounded)
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found[2].item() == pytest.approx(
        (1 / (1 + math.exp(-2.4)) - bounded["reward_mean"]) / bounded["reward_std"]
    )
    for bad in (tensor(1, 1), tensor(1, math.nan)):
        with pytest.raises(ValueError, match="can't be normalised"):
            reward.score_statistics(bad)


def test_sixty_two_and_a_half_percent():
    """methods.md B1: accuracy of these differences, ties one half."""
    assert np.mean([reward.hit(x) for x in (0.8, -0.1, 0.3, 0.0)]) == 0.625


def one_pair_at_a_time(examples, scores, setting, smoothing):
    """The loss of a batch from its definition: python numbers, pair by pair, prompt by prompt."""
    total = 0.0
    for example, r in zip(examples, scores, strict=True):
        losses = []
        for i, j, margin, label in example["pairs"]:
            grade = min(int(margin + 1e-6), 3)
            table = isinstance(setting, list)
            m = setting[grade] if table else {"none": 0.0, "data": margin}[setting]
            p = label * (1 - smoothing) + (1 - label) * smoothing
            d = r[i] - r[j] - m
            losses.append(-(p * F.logsigmoid(d) + (1 - p) * F.logsigmoid(-d)))
        total = total + sum(losses) / len(losses)
    return total


@pytest.mark.parametrize("setting", ["none", "data", SMALL, LARGE])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("width", [1, 1000])  # a prompt's responses in several rows, or in one
def test_k_wise_is_the_mean_over_pairs(setting, smoothing, width):
    """Ragged K, ties, margins, soft labels and smoothing in one batch: the value and the gradient
    equal those of the pairs taken one by one."""
    torch.manual_seed(0)
    examples = []
    for K, pairs in [
        (4, [(i, j, j - i + 0.3, 1.0) for i, j in itertools.combinations(range(4), 2)]),
        (2, [(0, 1, 2.0, 0.7)]),
        (3, [(0, 1, 3.9, 1.0), (0, 2, 0.0, 1.0)]),  # 1 and 2 are a tie
        (2, [(0, 1, 1.0, 0.5)]),
        (9, [(i, j, 0.5, 1.0) for i, j in itertools.combinations(range(9), 2)]),
    ]:
        responses = [[k + 1] * (1 + k % 3) for k in range(K)]
        examples.append({"prompt": [7, 8], "responses": responses, "pairs": pairs})
    tokens, mask, segments, rows, keep, margins, labels = reward.collate(examples, width)
    assert rows.shape == (5, 9) and keep.shape == (5, 36) and (len(tokens) > 5) == (width == 1)
    masks = masks_of_responses(mask, segments)
    inside = [(row, m) for row in range(len(tokens)) for m in masks[:, row] if m.any()]
    assert len(inside) == last_tokens(mask).sum()  # so many scores, in this order
    for b, example in enumerate(examples):
        for k, response in enumerate(example["responses"]):
            row, own = inside[rows[b, k]]
            assert tokens[row][own].tolist() == response
    lengths = (segments >= 0).sum(1).tolist()
    assert max(reward.row_lengths(examples, width)) == max(lengths)
    flat = torch.randn(len(inside), dtype=torch.float64, requires_grad=True)
    losses = reward.ranking_loss(
        flat[rows],
        margin=reward.margin_of(margins, setting),
        label=reward.smoothed(labels, smoothing),
        keep=keep,
    )
    (found,) = torch.autograd.grad(losses.sum(), flat)
    scores = [flat[rows[b, : len(e["responses"])]] for b, e in enumerate(examples)]
    expected = one_pair_at_a_time(examples, scores, setting, smoothing)
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-12)
    (slow,) = torch.autograd.grad(expected, flat)
    assert (found - slow).abs().max() < 1e-13


def test_ranking_loss_takes_any_utility():
    """U = log on differences in (0, 1], which is NaN below 0: what does not count never reaches
    it. Gradients against finite differences."""
    scores = tensor(0.9, 0.5, 0.1)[None].requires_grad_()
    loss = reward.ranking_loss(scores, utility=torch.log)
    assert loss.item() == pytest.approx(-(math.log(0.4) * 2 + math.log(0.8)) / 3)
    keep = torch.tensor([[True, False, True]])
    padded = tensor(0.9, 0.5, 0.4)[None].requires_grad_()
    some = reward.ranking_loss(padded, utility=torch.log, keep=keep)
    assert some.item() == pytest.approx(-(math.log(0.4) + math.log(0.1)) / 2)
    wrong = tensor(0.9, 0.5, 2.0)[None].requires_grad_()  # the padding's differences are below 0
    keep = torch.tensor([[True, False, False]])
    loss = reward.ranking_loss(wrong, utility=torch.log, keep=keep)
    (found,) = torch.autograd.grad(loss.sum(), wrong)
    assert found[0].tolist() == pytest.approx([-2.5, 2.5, 0.0])
    assert torch.autograd.gradcheck(lambda s: reward.ranking_loss(s, utility=torch.sqrt), scores)
    by_int = reward.pairwise_loss(tensor(0.9), tensor(0.5), label=1, utility=torch.log)
    assert by_int.item() == pytest.approx(-math.log(0.4))


# --- scores ---------------------------------------------------------------------------------------


def test_a_score_is_of_its_last_token_whatever_the_pads_hold(small_gpt):
    model = small_gpt(scalar_head=True)
    tokens, mask = pad([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]])
    garbage = tokens.clone()
    garbage[0, 5:] = 49
    with torch.no_grad():
        clean = model(tokens, last_tokens(mask))
        assert torch.equal(clean, model(garbage, last_tokens(mask)))
        alone = model(torch.tensor([[1, 2, 3, 5, 6]]))[0, -1]
    assert clean[0].item() == pytest.approx(alone.item(), abs=1e-6)


def test_add_scalar_head(small_gpt):
    """The trunk is the policy's; the head's std is 1/sqrt(n_embd + 1)."""
    policy = small_gpt(n_embd=256, n_layer=1)
    model = reward.add_scalar_head(policy)
    for name, value in policy.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.score.weight.shape == (1, 256)
    assert model.score.weight.std().item() == pytest.approx(257**-0.5, rel=0.15)


# --- data -----------------------------------------------------------------------------------------


def test_read_examples(tmp_path, tokenizer):
    lines = [
        {"prompt": "My car.", "responses": [" a b", " a", " a", " c"], "scores": [3, 2, 2, 2]},
        {"prompt": "My car.", "chosen": " yes", "rejected": " yes"},
        {"prompt": "My car.", "chosen": " yes", "rejected": " no", "margin": 2, "label": 0.75},
        {"prompt": "My car.", "responses": [" a", " b"], "scores": [1, 1]},
        {"prompt": "My car.", "responses": [" a" * 30, " b", " c"]},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", lines)
    examples, counts = reward.read_examples(path, tokenizer, 20, False)
    assert [len(e["responses"]) for e in examples] == [3, 2, 2]
    assert examples[0]["pairs"] == [(0, 1, 1.0, 1.0), (0, 2, 1.0, 1.0)]
    assert examples[0]["texts"] == [" a b", " a", " c"]
    assert examples[1]["pairs"] == [(0, 1, 2.0, 0.75)]
    assert examples[2]["pairs"] == [(0, 1, 0.0, 1.0)] and examples[2]["texts"] == [" b", " c"]
    assert counts == {"cut": 0, "too long": 1, "equal": 2, "lines without a pair": 2}
    eos = tokenizer.eot_token
    assert examples[1]["responses"][0].tolist() == [*tokenizer.encode_ordinary(" yes"), eos]
    examples, counts = reward.read_examples(path, tokenizer, 8, True)
    long = examples[-1]
    assert len(long["responses"][0]) == 7 and eos not in long["responses"][0]
    assert len(long["prompt"]) == 1 and counts["cut"] == 4


def test_epoch_order():
    order = reward.epoch_order([4, 10], [2.0, 0.5], [0, 0])
    assert sorted(order[:8]) == [0, 0, 1, 1, 2, 2, 3, 3] and len(order) == 13
    assert len(set(order[8:])) == 5 and min(order[8:]) >= 4
    assert reward.epoch_order([4, 10], [2.0, 0.5], [0, 1]) != order
    assert reward.epoch_order([3, 3], [0.0, 1.0], [0, 0]) == [3, 4, 5]
    assert reward.epoch_order([5], [1.0], [0, 7]) == [0, 1, 2, 3, 4]


# --- evaluation -----------------------------------------------------------------------------------


def example(prompt, texts, pairs, **fields):
    return {"line": {"prompt": prompt} | fields, "texts": texts, "pairs": pairs}


def test_evaluation_by_hand():
    """Two prompts of two tasks; labels, gold, the controls, margins, lengths."""
    examples = [
        example("P", ["a b", "a", "a b c"], [(0, 1, 3, 1.0), (0, 2, 1, 1.0)], task="s"),
        example("Q", ["x y", "x"], [(0, 1, 2, 0.8)], task="t"),
        example("Q", ["x y", "x"], [(0, 1, 0, 0.5)], task="t"),
    ]
    scores, golds = [[1.0, 0.0, 2.0], [0.5, 0.5], [0.5, 0.5]], [[1, 2, 3], [5, 4], [5, 4]]
    report = reward.evaluate(examples, scores, golds)
    labels = report["labels"]
    assert labels["all"]["pairs"] == 3 and labels["all"]["model"][0] == 0.5  # 1, 0, tie
    assert labels["s"]["model"][0] == 0.5 and labels["t"]["model"] == [0.5, None, None]
    assert labels["all"]["longer"][0] == pytest.approx(2 / 3)
    # By gold: c > b, c > a, b > a of P, x y > x of Q, which counts once.
    gold = report["gold"]
    assert gold["all"]["pairs"] == 4 and gold["s"]["model"][0] == pytest.approx(2 / 3)
    assert gold["t"]["longer"][0] == 1 and gold["s"]["longer"][0] == pytest.approx(2 / 3)
    assert {g: row["rate"][0] for g, row in report["by_grade"].items()} == {
        "1": 0.0,
        "2": 0.5,
        "3": 1.0,
    }
    assert report["where_the_shorter_is_better"]["pairs"] == 1
    probabilities = [1 / (1 + math.exp(-d)) for d in (1.0, -1.0, 0.0, 0.0)]
    losses = [-math.log(probabilities[0]), -math.log(probabilities[1]), math.log(2), math.log(2)]
    assert report["loss"] == pytest.approx(np.mean(losses))
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert report["label_entropy"] == pytest.approx((entropy + math.log(2)) / 4)


def test_a_prompts_pairs_are_one_cluster():
    """Ten annotators who say the same of one prompt do not make it ten prompts."""
    once = [example(f"{i}", ["a", "b"], [(0, 1, 0, 1.0)]) for i in range(20)]
    scores = [[1.0, 0.0] if i % 4 else [0.0, 1.0] for i in range(20)]
    one = reward.evaluate(once, scores, None)["labels"]["all"]["model"]
    ten = reward.evaluate(once * 10, scores * 10, None)["labels"]["all"]["model"]
    assert one[0] == ten[0] == 0.75 and one[1:] == pytest.approx(ten[1:])


def test_calibration():
    """Outcomes drawn from sigmoid(difference) are calibrated; twice the differences are not, by as
    much as the definition says; a soft label is as good as many draws."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1.5, 40000)
    won = rng.random(40000) < 1 / (1 + np.exp(-x))
    pairs = [{"difference": d, "label": 1.0} for d in np.where(won, x, -x)]
    report = reward.calibration(pairs)
    assert report["ece"] < 0.01 and sum(row["pairs"] for row in report["bins"]) == 40000
    double = reward.calibration([{"difference": 2 * p["difference"], "label": 1.0} for p in pairs])
    over = 1 / (1 + np.exp(-2 * abs(x))) - 1 / (1 + np.exp(-abs(x)))
    assert double["ece"] == pytest.approx(over.mean(), abs=0.01)
    soft = [{"difference": d, "label": 1 / (1 + math.exp(-d))} for d in abs(x)]
    assert reward.calibration(soft)["ece"] < 1e-9
    even = reward.calibration([{"difference": 0.0, "label": 1.0}] * 4)
    assert even == {"bins": [{"confidence": 0.5, "accuracy": 0.5, "pairs": 4}], "ece": 0.0}


# --- the same update whatever the ranks -----------------------------------------------------------

# The drivers keep the checkpoint that a finished run deletes, for `gradient`.
KEEP = "reward.shutil.rmtree = lambda *args, **kwargs: None\n"


def test_ranks_and_accumulation_take_the_same_gradient(data, tmp_path, monkeypatch):
    """Ragged K and lengths, comparisons among rankings, 15 lines on 2 ranks, margins from the data
    and smoothing: equal to 1e-12 relative in float64."""
    args = ["--data", data / "both.jsonl", "--steps", 1, "--batch_size", 15, "--dtype", "float64"]
    args += ["--clip_norm", 1e9, "--margin", "data", "--label_smoothing", 0.1]
    with monkeypatch.context() as patch:
        patch.setattr(reward.shutil, "rmtree", lambda *args, **kwargs: None)
        assert run(patch, *flags(data, tmp_path / "one", *args)) == 0
        more = ["--micro_batch_size", 4]
        assert run(patch, *flags(data, tmp_path / "accumulated", *args, *more)) == 0
    for name, more in (("two", []), ("both", ["--micro_batch_size", 3])):
        argv = ["reward.py", *flags(data, tmp_path / name, *args, *more)]
        done = on_ranks("reward", f"{KEEP}sys.argv = {argv!r}\nreward.main()\n")
        assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.1
    for name in ("accumulated", "two", "both"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in ("loss", "accuracy", "eval_loss", "eval_labels_accuracy"):
                assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-9)


@pytest.mark.parametrize("n", [1, 3, 9])
def test_few_lines_on_two_ranks(data, tmp_path, n):
    lines = read_lines(data / "rankings.jsonl")[:n]
    write_jsonl(tmp_path / "few.jsonl", lines)
    argv = ["reward.py", *flags(data, tmp_path / "run", "--data", tmp_path / "few.jsonl")]
    argv += ["--batch_size", "4", "--micro_batch_size", "1"]
    done = on_ranks("reward", f"sys.argv = {argv!r}\nreward.main()\n")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["step"] == math.ceil(n / 4) and report["epoch_lines"] == n


# --- stop and resume ------------------------------------------------------------------------------

LONG = ["--epochs", 2, "--batch_size", 6, "--save_every", 4, "--eval_every", 5, "--log_every", 3]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """A few epochs of part of two files, in one go."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *flags(data, out, *two_files(data))) == 0
    assert json.loads((out / "report.json").read_text())["step"] == 12
    return out


def two_files(data):
    names = f"{data / 'rankings.jsonl'},{data / 'comparisons.jsonl'}"
    return ["--data", names, "--data_weights", "1,0.5", *LONG]


@pytest.mark.parametrize("moment", [2, 4, 6, 12])
def test_kill_and_resume(data, tmp_path, uninterrupted, moment):
    """kill -9 before the first save, on a save, at an epoch's end, in the last step."""
    args = flags(data, tmp_path / "run", *two_files(data), "--resume")
    code = (
        "import signal\n"
        f"real = reward.learning_rate\n"
        f"def rate(step, total, cfg):\n"
        f"    if step + 1 == {moment} and not os.path.exists({str(tmp_path / 'killed')!r}):\n"
        f"        open({str(tmp_path / 'killed')!r}, 'w').close()\n"
        f"        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    return real(step, total, cfg)\n"
        f"reward.learning_rate = rate\nsys.argv = {['reward.py', *args]!r}\nreward.main()\n"
    )
    first = on_ranks("reward", code, 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *args) == 0
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert metrics(tmp_path / "run") == metrics(uninterrupted)
    for name in ("samples.jsonl", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.parametrize("where, call", [("learning_rate", 3), ("score_rows", 2)])
def test_sigterm_saves_and_resumes(data, tmp_path, monkeypatch, uninterrupted, where, call):
    args = flags(data, tmp_path / "run", *two_files(data), "--resume")
    with monkeypatch.context() as patch:
        real, calls = getattr(reward, where), []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        patch.setattr(reward, where, interrupted)
        assert run(patch, *args) == 128 + signal.SIGTERM
    assert not (tmp_path / "run/report.json").exists()
    assert run(monkeypatch, *args) == 0
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert metrics(tmp_path / "run")[-1] == metrics(uninterrupted)[-1]


def test_resume_refuses_other_weights(data, tmp_path, monkeypatch, capsys):
    """A policy that was retrained meanwhile would give other statistics."""
    shutil.copytree(data / "policy", tmp_path / "policy")
    args = flags(data, tmp_path / "run", *LONG, "--init", tmp_path / "policy", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(reward, "score_rows", lambda *args: None)  # as if told to stop
        assert run(patch, *args) == 128 + signal.SIGTERM
    model, tokenizer = load_model(tmp_path / "policy"), load_tokenizer(tmp_path / "policy")
    with torch.no_grad():
        model.wte.weight += 0.01
    save_model(tmp_path / "policy", model, tokenizer)
    assert run(monkeypatch, *args) == 2
    assert "policy/model.safetensors: " in capsys.readouterr().err


# --- numbers --------------------------------------------------------------------------------------


def test_a_bad_gradient_on_one_rank_stops_all_before_the_update(data, tmp_path):
    argv = ["reward.py", *flags(data, tmp_path / "run", *LONG)]
    code = (
        "real, calls, updates, step_of = reward.ranking_loss, [], [], torch.optim.AdamW.step\n"
        "def poisoned(*args, **kwargs):\n"
        "    losses = real(*args, **kwargs)\n"
        "    calls.append(1)\n"
        "    bad = len(calls) == 3 and os.environ['RANK'] == '1'\n"
        "    return losses * float('nan') if bad else losses\n"
        "def counted(self, *args, **kwargs):\n"
        "    updates.append(1)\n"
        "    return step_of(self, *args, **kwargs)\n"
        "torch.optim.AdamW.step = counted\n"
        f"reward.ranking_loss = poisoned\nsys.argv = {argv!r}\n"
        "try:\n    reward.main()\nfinally:\n    os.write(1, b'updates %d\\n' % len(updates))\n"
    )
    done = on_ranks("reward", code)
    assert done.returncode != 0
    assert done.stdout.count("updates 2\n") == 2
    assert "step 2: the gradient is nan on the batch of lines" in done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_precisions(data, tmp_path, monkeypatch, dtype, uninterrupted):
    args = flags(data, tmp_path / "run", *two_files(data), "--dtype", dtype)
    assert run(monkeypatch, *args) == 0
    found, expected = metrics(tmp_path / "run")[-1], metrics(uninterrupted)[-1]
    tolerance = 1e-5 if dtype == "float64" else 0.03
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=tolerance)


def test_scores_are_float32_under_autocast(small_gpt):
    """bfloat16 has three digits: rewards that differ in the fourth would be ties."""
    model = small_gpt(scalar_head=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).dtype == torch.float32


# --- the whole script -----------------------------------------------------------------------------


def test_it_learns_and_is_normalised(data, toy_data, tmp_path, monkeypatch, capsys):
    """Enough steps on little data: it ranks that as told. Fresh samples of the policy, scored as
    any reader would, have mean 0 and standard deviation 1 to 0.1; stored scores are the model's."""
    args = flags(data, tmp_path / "run", "--epochs", 30, "--batch_size", 12, "--lr", 3e-3)
    args += ["--validation", str(data / "rankings.jsonl"), "--num_prompts", "300"]
    args += ["--gold", str(ROOT / "data/toy.py")]
    assert run(monkeypatch, *args) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["labels"]["all"]["model"][0] > 0.95 and report["loss"] < 0.3
    assert report["gold"]["all"]["model"][0] > 0.9  # whose order the labels are
    assert report["labels"]["all"]["random"][0] < 0.7
    assert set(report["labels"]) == {"all", "benign", "harmful", "summary"}
    printed = capsys.readouterr().out
    assert "agreement with gold" in printed and "longer 0." in printed and "calibration" in printed
    config = load_config(tmp_path / "run")
    assert config["stage"] == "reward" and config["score_transform"] == "identity"
    assert config["architectures"] == ["GPT2ForSequenceClassification"]

    # Fresh samples, by annotate.py's way, through `reward.py score`.
    import annotate

    more = ["--annotator", "simulated", "--gold", ROOT / "data/toy.py", "--seed", 5]
    more += ["--policy", data / "policy", "--prompts", toy_data / "prompts_test.jsonl"]
    more += ["--max_new_tokens", 8, "--num_responses", 4, "--out_dir", tmp_path / "fresh"]
    assert run_script(annotate, monkeypatch, *more, "--num_prompts", 600) == 0
    scored = tmp_path / "scored.jsonl"
    more = ["score", "--init", tmp_path / "run", "--data", tmp_path / "fresh/samples.jsonl"]
    assert run(monkeypatch, *more, "--out", scored) == 0
    lines = read_lines(scored)
    values = np.concatenate([line["scores"] for line in lines])
    assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1, (values.mean(), values.std())
    raw = scores_of(tmp_path / "run", [(lines[0]["prompt"], r) for r in lines[0]["responses"]])
    expected = (np.array(raw) - config["reward_mean"]) / config["reward_std"]
    assert lines[0]["scores"] == pytest.approx(expected, abs=1e-5)


def test_another_size_than_the_policys(data, tmp_path, monkeypatch, capsys, tokenizer):
    """--init is a larger model, --normalise_with the policy; 4 times the width."""
    torch.manual_seed(1)
    sizes = {"n_positions": 80, "n_embd": 64, "n_layer": 2, "n_head": 4}
    large = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes))
    save_model(tmp_path / "large", large, tokenizer, {"stage": "sft"})
    args = ["--init", tmp_path / "large", "--normalise_with", data / "policy", "--steps", 2]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 0
    model, _, statistics = reward.load_reward_model(tmp_path / "run")
    assert model.config.n_embd == 64 and statistics["reward_std"] > 0


def test_refreshing(data, tmp_path, monkeypatch, capsys, uninterrupted):
    """The old model's accuracy on each new file comes first; a reward model goes on from its own
    weights when it is --init; --epochs 0 only normalises anew."""
    args = ["--old", uninterrupted, "--steps", 1, "--num_prompts", 20]
    assert run(monkeypatch, *flags(data, tmp_path / "new", *two_files(data), *args)) == 0
    printed = capsys.readouterr().out
    for name in ("rankings", "comparisons"):
        assert f"agrees with the labels of {data / name}.jsonl in 0." in printed
    assert printed.index("agrees with") < printed.index("step 0/1")
    report = json.loads((tmp_path / "new/report.json").read_text())
    assert len(report["old"]) == 2 and "few, 256 are usual" in printed
    args = ["--init", uninterrupted, "--normalise_with", data / "policy", "--epochs", 0]
    assert run(monkeypatch, *flags(data, tmp_path / "same", *args)) == 0
    assert weights(tmp_path / "same") == weights(uninterrupted)
    assert run(monkeypatch, *flags(data, tmp_path / "other", "--init", uninterrupted)) == 2
    assert "--normalise_with must name a policy" in capsys.readouterr().err


def test_scores_of_every_kind_of_line(data, tmp_path, monkeypatch, capsys, uninterrupted):
    lines = [
        {"prompt": "My car.", "response": " a", "extra": 1},
        {"prompt": "My car.", "chosen": " a", "rejected": " b"},
        {"prompt": "My car.", "responses": [" b", " a"]},
    ]
    path, out = write_jsonl(tmp_path / "data.jsonl", lines), tmp_path / "scored.jsonl"
    args = ["score", "--init", uninterrupted, "--data", path, "--out", out, "--device", "cpu"]
    assert run(monkeypatch, *args) == 0
    first, second, third = read_lines(out)
    same = first["score"], second["chosen_score"], third["scores"][1]
    assert first["extra"] == 1 and same == pytest.approx([same[0]] * 3, abs=1e-5)
    assert second["rejected_score"] == pytest.approx(third["scores"][0], abs=1e-5)
    assert abs(third["scores"][0] - same[0]) > 1e-3
    assert run(monkeypatch, *args, "--data", out, "--out", tmp_path / "b.jsonl") == 2
    assert "scored.jsonl:1: score: is there already" in capsys.readouterr().err
    more = ["--data", out, "--out", tmp_path / "b.jsonl", "--field", "reward"]
    assert run(monkeypatch, *args, *more) == 0
    assert set(read_lines(tmp_path / "b.jsonl")[2]) >= {"scores", "rewards"}
    argv = list(map(str, ["reward.py", *args, "--out", tmp_path / "two.jsonl"]))
    done = on_ranks("reward", f"sys.argv = {argv!r}\nreward.main()\n")
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(read_lines(tmp_path / "two.jsonl"), [first, second, third], strict=True):
        assert a.keys() == b.keys() and a.get("score", 0) == pytest.approx(b.get("score", 0), 1e-5)


def test_a_run_holds_what_the_design_says(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {
        *("args.json", "config.json", "metrics.jsonl", "model.safetensors", "report.json"),
        *("samples.jsonl", "script.py", "tokenizer.json", "tokenizer_config.json"),
    }
    report = json.loads((uninterrupted / "report.json").read_text())
    assert {"labels", "calibration", "by_grade", "loss", "reward_mean", "seconds"} <= set(report)


# --- settings and input ---------------------------------------------------------------------------


def test_a_reward_model_must_be_normalised(data, tmp_path, monkeypatch, capsys):
    args = ["--normalise_with", "none", "--steps", 1]
    assert run(monkeypatch, *flags(data, tmp_path / "raw", *args)) == 0
    with pytest.raises(ValueError, match="never normalised"):
        reward.load_reward_model(tmp_path / "raw")
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "P", "response": "r"}])
    more = ["--data", path, "--out", tmp_path / "scored.jsonl"]
    assert run(monkeypatch, "score", "--init", tmp_path / "raw", *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "never normalised" in error
    assert not (tmp_path / "scored.jsonl").exists()
    assert run(monkeypatch, "score", "--init", data / "policy", *more) == 2
    assert "not a reward model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value",
    [
        ("reward_mean", None),
        ("reward_mean", "0"),
        ("reward_std", 0),
        ("reward_std", -1),
        ("reward_std", True),
        ("score_transform", "tanh"),
        ("score_transform", None),
        ("tokenizer", "000000000000"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, uninterrupted, name, value):
    shutil.copytree(uninterrupted, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text()) | {name: value}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"normalised|was trained with the tokenizer"):
        reward.load_reward_model(tmp_path / "run")


def test_another_tokenizer_is_refused(data, tmp_path, monkeypatch, capsys, small_gpt):
    """A policy that writes in other tokens can't be who the scores are normalised on."""
    lines = (ROOT / "README.md").read_bytes()
    ranks = {bytes([byte]): byte for byte in range(256)} | {lines[:2]: 256}
    from model import make_encoding

    other = make_encoding(ranks, "other")
    save_model(tmp_path / "other", small_gpt(vocab_size=258), other, {"stage": "sft"})
    args = flags(data, tmp_path / "run", "--normalise_with", tmp_path / "other")
    assert run(monkeypatch, *args) == 2
    assert "another tokenizer" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert run(monkeypatch, *flags(data, tmp_path / "run", "--old", data / "policy")) == 2
    assert "not a reward model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--overlong", "keep"], "--overlong: expected drop or cut, got keep"),
        (["--label_smoothing", "0.5"], "--label_smoothing: expected less than 0.5"),
        (["--margin", "huge"], "--margin huge: expected numbers"),
        (["--margin", "1,2"], "--margin 1,2: expected none, data, small, large or four numbers"),
        (["--data_weights", "1,2"], "--data_weights: expected 1 numbers"),
        (["--data_weights", "x"], "--data_weights x: expected numbers"),
        (["--data_weights", "0"], "--data_weights: no line is left"),
        (["--data", ""], "--data_weights: expected 0 numbers"),
        (["--batch_size", "0"], "expected more than 0"),
        (["--init", "nowhere"], "nowhere: not a model directory"),
        (["--normalise_with", "nowhere"], "nowhere: not a model directory"),
        (["--old", "nowhere"], "nowhere: not a model directory"),
        (["--max_new_tokens", "96"], "leaves a prompt no room"),
        (["--max_length", "3"], "has a pair to learn from"),
        (["--num_prompts", "0"], "0 of 0 samples to normalise on ended"),
    ],
)
def test_bad_settings(data, tmp_path, monkeypatch, capsys, more, message):
    assert run(monkeypatch, *flags(data, tmp_path / "run"), *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_input_in_the_folder_to_delete_is_refused(data, tmp_path, monkeypatch, capsys):
    shutil.copytree(data / "policy", tmp_path / "run")
    (tmp_path / "run/args.json").write_text('{"settings": {}}')
    args = flags(data, tmp_path / "run", "--init", tmp_path / "run", "--overwrite")
    assert run(monkeypatch, *args) == 2
    assert "is in --out_dir, which --overwrite would delete" in capsys.readouterr().err
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt": "P", "chosen": "a"}, "rejected: expected a string with text"),
        ({"prompt": "P", "responses": ["a", ""]}, "responses: number 2 is not a string"),
        ({"prompt": "P", "responses": ["a", "b"], "scores": [1, 2]}, "scores: expected numbers"),
        ({"prompt": "P", "responses": ["a", "b"], "scores": [10**400, 2]}, "scores: expected"),
        ({"prompt": "P", "chosen": "a", "rejected": "b", "label": 2}, "label: expected a prob"),
        ({"prompt": "P", "chosen": "a", "rejected": "b", "task": 3}, "task: expected a string"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt: is empty"),
        ({"chosen": "a", "rejected": "b"}, "prompt: is missing"),
        (["P"], "line: expected an object"),
    ],
)
@pytest.mark.parametrize("flag", ["--data", "--validation"])
def test_bad_lines(data, tmp_path, monkeypatch, capsys, flag, line, message):
    good = {"prompt": "P", "chosen": "a", "rejected": "b"}
    path = write_jsonl(tmp_path / "bad.jsonl", [good, line])
    assert run(monkeypatch, *flags(data, tmp_path / "run", flag, path)) == 2
    error = capsys.readouterr().err
    assert f"bad.jsonl:2: {message}" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("def score(prompt, response): return 1", "score: TypeError"),
        ("def score(prompt, response, **fields): return float('nan')", "score: nan for"),
        ("def score(prompt, response, **fields): return prompt[9999]", "score: IndexError"),
    ],
)
def test_bad_gold(data, tmp_path, monkeypatch, capsys, text, message):
    (tmp_path / "gold.py").write_text(text)
    args = flags(data, tmp_path / "run", "--gold", tmp_path / "gold.py")
    assert run(monkeypatch, *args) == 2
    error = capsys.readouterr().err
    assert f"gold.py: {message}" in error and error.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["score"]])
def test_help_shows_every_flag(monkeypatch, capsys, command):
    assert run(monkeypatch, *command, "--help") == 0
    text = capsys.readouterr().out
    for name in vars(reward.ScoreConfig() if command else reward.Config()):
        assert f"--{name}" in text


def test_hh_rlhf_with_gpt2s_tokenizer(shared, gpt2_tokenizer, tmp_path, monkeypatch):
    """Real pairs, real vocabulary, a small network: it learns eight pairs by heart."""
    target = tmp_path / "hh.jsonl"
    command = [sys.executable, "data/convert.py", "hh"]
    source = next((shared / "data").glob("hh*"))
    done = subprocess.run([*command, source, target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    target.write_text("".join(target.read_text().splitlines(keepends=True)[:8]))
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2}
    save_model(tmp_path / "trunk", GPT(GPTConfig(**sizes)), gpt2_tokenizer, {})
    args = ["--data", target, "--validation", "", "--init", tmp_path / "trunk", "--overlong", "cut"]
    args += ["--normalise_with", "none", "--steps", 40, "--batch_size", 8, "--lr", 1e-2]
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "run", "--log_every", 1) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[0] > 0.5 and losses[-1] < 0.2
