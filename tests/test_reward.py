"""reward.py: its losses against vectors and slow oracles, what it says of a model, the script."""

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT, at_call, gradient, metrics, read_lines, run_script, same_run, terminate_at, weights,
    write_jsonl,
)  # fmt: skip
from ranks import on_ranks

import reward
import run as runs
from feedback import collate, grouped_batches, load_reward_model, read_examples, row_lengths
from model import (
    GPT, GPTConfig, generate, last_tokens, load_config, load_model, save_model,
)  # fmt: skip
from tokens import END_OF_TEXT, Tokenizer, encode, load_tokenizer, text_of

SMALL, LARGE = [0, 1 / 3, 2 / 3, 1], [0, 1, 2, 3]


def run(monkeypatch, *args):
    return run_script(reward, monkeypatch, *args)


def report_of(out):
    return json.loads((out / "report.json").read_text())


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


def test_a_margin_is_asked_of_whichever_is_better():
    """With P(chosen is better) = p and a margin, the least loss is at a lead of the sign of p less
    a half, and the pair told the other way round has the same."""
    lead = torch.linspace(-6, 6, 2401, dtype=torch.float64)  # steps of 0.005

    def least(label):
        return lead[reward.pairwise_loss(lead, 0.0, 1.0, label).argmin()].item()

    assert least(0.5) == pytest.approx(0, abs=1e-9)
    for label in (0.6, 0.8):
        ends = reward.pairwise_loss(lead, 0.0, 1.0, label)
        other = reward.pairwise_loss(-lead, 0.0, 1.0, 1 - label)
        assert ends.tolist() == pytest.approx(other.tolist())
        # p sigmoid(m - d) = (1 - p) sigmoid(m + d) there
        d = tensor(least(label))
        gap = label * torch.sigmoid(1 - d) - (1 - label) * torch.sigmoid(1 + d)
        assert d > 0.2 and abs(gap) < 2e-3


def test_ranking_vector():
    """methods.md B2: four responses, the mean over six pairs and its gradient."""
    scores = tensor(2, 1, 0.5, -1)[None].requires_grad_()
    loss = reward.ranking_loss(scores)
    assert loss.tolist() == pytest.approx([0.227613], abs=1e-6)
    loss.sum().backward()
    expected = [-0.083132, -0.037967, 0.062923, 0.058176]
    assert scores.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


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
            d = r[i] - r[j]
            losses.append(-(p * F.logsigmoid(d - m) + (1 - p) * F.logsigmoid(-d - m)))
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
    _, mask, _, rows, keep, margins, labels = collate(examples, width)
    flat = torch.randn(last_tokens(mask).sum(), dtype=torch.float64, requires_grad=True)
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


def test_margins_that_are_told():
    assert reward.read_margin("none") == "none" and reward.read_margin("data") == "data"
    assert reward.read_margin("small") == SMALL and reward.read_margin("0,1,1.5,4")[2] == 1.5
    assert [reward.grade_of(m) for m in (0, 0.99, 1, 2.9999999, 40)] == [0, 0, 1, 3, 3]


# --- data -----------------------------------------------------------------------------------------


def test_epoch_order():
    order = reward.epoch_order([4, 10], [2.0, 0.5], [0, 0])
    assert sorted(order[:8]) == [0, 0, 1, 1, 2, 2, 3, 3] and len(order) == 13
    assert len(set(order[8:])) == 5 and min(order[8:]) >= 4
    assert reward.epoch_order([4, 10], [2.0, 0.5], [0, 1]) != order
    assert reward.epoch_order([3, 3], [0.0, 1.0], [0, 0]) == [3, 4, 5]
    assert reward.epoch_order([5], [1.0], [0, 7]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("step", [0, 3, 4, 10])
def test_batches_go_on_where_they_stopped(step):
    """Batches of lines alike in length, by the weights of their files, of all epochs."""
    cfg = reward.Config(batch_size=3, seed=5)
    args = [4, 10], [2.0, 0.25], list(range(14)), cfg  # 8 + 2 lines an epoch, four batches
    whole = list(itertools.islice(reward.batches_of_files(0, *args), 16))
    again = list(itertools.islice(reward.batches_of_files(step, *args), 16 - step))
    assert again == whole[step:]
    for epoch in range(4):
        batches = whole[4 * epoch : 4 * epoch + 4]
        assert sorted(map(len, batches)) == [1, 3, 3, 3]
        lines = sorted(itertools.chain(*batches))
        assert lines == sorted(reward.epoch_order([4, 10], [2.0, 0.25], [5, epoch]))
        assert all(batch == sorted(batch) for batch in batches)  # by their lengths
    assert sorted(whole[:4]) != sorted(whole[4:8])


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
    found = reward.evaluate(examples, scores, golds)
    assert found["labels_pairs"] == 3 and found["labels_accuracy"] == 0.5  # 1, 0, tie
    assert found["labels_s_accuracy"] == found["labels_t_accuracy"] == 0.5
    assert found["labels_longer"] == pytest.approx(2 / 3) and found["labels_s_pairs"] == 2
    # By gold: c > b, c > a, b > a of P, x y > x of Q, which counts once.
    assert found["gold_pairs"] == 4 and found["gold_s_accuracy"] == pytest.approx(2 / 3)
    assert found["gold_t_longer"] == 1 and found["gold_s_longer"] == pytest.approx(2 / 3)
    assert found["gold_accuracy"] == pytest.approx((2 + 0.5) / 4)
    grades = {name: x for name, x in found.items() if name.startswith("grade")}
    assert grades == {
        **{"grade_1_accuracy": 0.0, "grade_2_accuracy": 0.5, "grade_3_accuracy": 1.0},
        **{"grade_1_pairs": 1, "grade_2_pairs": 1, "grade_3_pairs": 1},
    }
    assert found["gold_grade_2_accuracy"] == 1 and found["gold_grade_1_pairs"] == 3
    assert found["shorter_pairs"] == 1 and found["shorter_accuracy"] == 0
    probabilities = [1 / (1 + math.exp(-d)) for d in (1.0, -1.0, 0.0, 0.0)]
    losses = [-math.log(probabilities[0]), -math.log(probabilities[1]), math.log(2), math.log(2)]
    assert found["loss"] == pytest.approx(np.mean(losses))
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert found["label_entropy"] == pytest.approx((entropy + math.log(2)) / 4)
    raw, words = [1, 0, 2, 0.5, 0.5, 0.5, 0.5], [2, 1, 3, 2, 1, 2, 1]
    assert found["score_length_correlation"] == pytest.approx(np.corrcoef(raw, words)[0, 1])
    none = reward.evaluate(examples[2:], [[0.0, 0.0]])  # nothing is sure, and all is equal
    assert none["labels_pairs"] == 0 and none["loss"] == none["label_entropy"] == math.log(2)
    assert not {"labels_accuracy", "gold_pairs", "score_length_correlation"} & none.keys()


def test_controls():
    """The coin's agreement is about a half, and the same for the same pairs."""
    pairs = [{"task": "all", "difference": 1.0, "words": -1} for _ in range(4000)]
    found = reward.accuracies(pairs, "labels")
    assert found == reward.accuracies(pairs, "labels")
    assert found["labels_random"] == pytest.approx(0.5, abs=0.03)
    assert (found["labels_accuracy"], found["labels_longer"], found["labels_pairs"]) == (1, 0, 4000)


def test_bimodality():
    rng = np.random.default_rng(0)
    assert reward.bimodality(rng.normal(3, 2, 400_000)) == pytest.approx(1 / 3, abs=0.01)
    assert reward.bimodality(np.linspace(-1, 4, 100_001)) == pytest.approx(5 / 9, abs=1e-3)
    assert reward.bimodality(np.array([2.0, 5.0] * 9)) == pytest.approx(1)
    assert reward.bimodality(np.ones(3)) == 0


def test_calibration():
    """Outcomes drawn from sigmoid(difference) are calibrated; twice the differences are not, by as
    much as the definition says; a soft label is as good as many draws."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1.5, 40000)
    won = rng.random(40000) < 1 / (1 + np.exp(-x))
    pairs = [{"difference": d, "label": 1.0} for d in np.where(won, x, -x)]
    report = reward.calibration(pairs)
    assert report["ece"] < 0.01 and sum(row["pairs"] for row in report["calibration"]) == 40000
    double = reward.calibration([{"difference": 2 * p["difference"], "label": 1.0} for p in pairs])
    over = 1 / (1 + np.exp(-2 * abs(x))) - 1 / (1 + np.exp(-abs(x)))
    assert double["ece"] == pytest.approx(over.mean(), abs=0.01)
    soft = [{"difference": d, "label": 1 / (1 + math.exp(-d))} for d in abs(x)]
    assert reward.calibration(soft)["ece"] < 1e-9
    even = reward.calibration([{"difference": 0.0, "label": 1.0}] * 4)
    assert even == {"calibration": [{"confidence": 0.5, "accuracy": 0.5, "pairs": 4}], "ece": 0.0}


# --- the update -----------------------------------------------------------------------------------


def test_the_loss_is_the_formula(data, tmp_path, monkeypatch):
    """One batch of all lines, rankings and comparisons: the logged loss and accuracy, pair by pair
    from the head's outputs, with margins and smoothing."""
    seen, real = [], reward.ranking_loss

    def spy(scores, **how):
        seen.append(scores.detach().double())
        return real(scores, **how)

    monkeypatch.setattr(reward, "ranking_loss", spy)
    args = ["--data", data / "both.jsonl", "--steps", 1, "--batch_size", 40, "--eval_every", 0]
    args += ["--normalise_with", "none", "--margin", "large", "--label_smoothing", 0.1]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 0
    tokenizer, width = load_tokenizer(data / "policy"), load_config(data / "policy")["n_embd"]
    examples = read_examples(data / "both.jsonl", tokenizer, 96)
    (order,) = grouped_batches(row_lengths(examples, width), 40, [0, 0])
    examples = [examples[i] for i in order]
    expected = one_pair_at_a_time(examples, seen[0], LARGE, 0.1) / 40
    hits = [
        reward.hit(r[i] - r[j])
        for e, r in zip(examples, seen[0], strict=True)
        for i, j, *_ in e["pairs"]
    ]
    first = metrics(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert first["accuracy"] == pytest.approx(np.mean(hits)) and 0 < np.mean(hits) < 1


# The drivers keep the checkpoint that a finished run deletes, for `gradient`.
KEEP = "import run\nrun.shutil.rmtree = lambda *args, **kwargs: None\n"


def test_ranks_and_accumulation_take_the_same_gradient(data, tmp_path, monkeypatch):
    """Ragged K and lengths, comparisons among rankings, 13 lines on 2 ranks, one of which has a
    micro-batch without any, margins from the data and smoothing: equal to 1e-12 relative in
    float64."""
    args = ["--data", data / "both.jsonl", "--steps", 1, "--batch_size", 13, "--dtype", "float64"]
    args += ["--clip_norm", 1e9, "--margin", "data", "--label_smoothing", 0.1]
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "rmtree", lambda *args, **kwargs: None)
        assert run(patch, *flags(data, tmp_path / "one", *args)) == 0
        more = ["--micro_batch_size", 4]
        assert run(patch, *flags(data, tmp_path / "accumulated", *args, *more)) == 0
    argv = ["reward.py", *flags(data, tmp_path / "both", *args, "--micro_batch_size", 3)]
    done = on_ranks("reward", f"{KEEP}sys.argv = {argv!r}\nreward.main()\n")
    assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.1
    for name in ("accumulated", "both"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in ("loss", "accuracy", "eval_loss", "eval_labels_accuracy"):
                assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-9)


@pytest.mark.parametrize("n", [1, 9])
def test_few_lines_on_two_ranks(data, tmp_path, n):
    lines = read_lines(data / "rankings.jsonl")[:n]
    write_jsonl(tmp_path / "few.jsonl", lines)
    argv = ["reward.py", *flags(data, tmp_path / "run", "--data", tmp_path / "few.jsonl")]
    argv += ["--batch_size", "4", "--micro_batch_size", "1"]
    done = on_ranks("reward", f"sys.argv = {argv!r}\nreward.main()\n")
    assert done.returncode == 0, done.stderr[-3000:]
    report = report_of(tmp_path / "run")
    assert report["step"] == math.ceil(n / 4) and report["epoch_lines"] == n


# --- stop and resume ------------------------------------------------------------------------------

LONG = ["--epochs", 2, "--batch_size", 6, "--save_every", 4, "--eval_every", 5, "--log_every", 3]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """A few epochs of part of two files, in one go."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *flags(data, out, *two_files(data))) == 0
    assert report_of(out)["step"] == 12
    return out


def two_files(data):
    names = f"{data / 'rankings.jsonl'},{data / 'comparisons.jsonl'}"
    return ["--data", names, "--data_weights", "1,0.5", *LONG]


def test_kill_and_resume(data, tmp_path, monkeypatch, uninterrupted):
    """kill -9 at an epoch's end, between two printed lines, after a checkpoint: bit-identical."""
    args = flags(data, tmp_path / "run", *two_files(data), "--resume")
    kill = at_call("reward", "schedule", 13, "os.kill(os.getpid(), 9)")
    first = on_ranks("reward", f"{kill}sys.argv = {['reward.py', *args]!r}\nreward.main()\n", 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert (tmp_path / "run/checkpoint-4").exists()
    assert run(monkeypatch, *args) == 0
    same_run(tmp_path / "run", uninterrupted)
    assert load_config(tmp_path / "run") == load_config(uninterrupted)


def test_told_to_stop_at_the_end(data, tmp_path, monkeypatch, capsys, uninterrupted):
    """While scores are normalised, after the last evaluation, whose numbers the report needs. Other
    weights of the policy that they are normalised on, which would change them, are refused."""
    policy = shutil.copytree(data / "policy", tmp_path / "policy")
    other = shutil.copytree(data / "policy", tmp_path / "other")
    args = flags(data, tmp_path / "run", *two_files(data), "--normalise_with", policy, "--resume")
    with monkeypatch.context() as patch:
        terminate_at(patch, reward, "statistics_of", 1)
        assert run(patch, *args) == 128 + signal.SIGTERM
    assert not (tmp_path / "run/report.json").exists()
    model, tokenizer = load_model(policy), load_tokenizer(policy)
    with torch.no_grad():
        model.wte.weight += 0.01
    save_model(policy, model, tokenizer, {"stage": "sft"})
    assert run(monkeypatch, *args) == 2
    assert f"normalise_with: '{policy}' has other contents" in capsys.readouterr().err
    shutil.copy(other / "model.safetensors", policy)
    shutil.copy(other / "config.json", policy)
    assert run(monkeypatch, *args) == 0
    same_run(tmp_path / "run", uninterrupted)
    ours, theirs = report_of(tmp_path / "run"), report_of(uninterrupted)
    assert ours.keys() == theirs.keys() and ours["calibration"] == theirs["calibration"]


# --- numbers --------------------------------------------------------------------------------------


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
    report = report_of(tmp_path / "run")
    assert report["labels_accuracy"] > 0.95 and report["loss"] < 0.3
    assert report["gold_accuracy"] > 0.9  # whose order the labels are
    assert all(f"labels_{task}_accuracy" in report for task in ("benign", "harmful", "summary"))
    printed = capsys.readouterr().out
    assert "gold_accuracy 0." in printed and "raw scores:" in printed and "normalised: " in printed
    config = load_config(tmp_path / "run")
    assert config["stage"] == "reward" and config["score_transform"] == "identity"
    assert config["architectures"] == ["GPT2ForSequenceClassification"]

    # Fresh samples to other prompts, those that ended, scored by `reward.py score`.
    policy, tokenizer = load_model(data / "policy"), load_tokenizer(data / "policy")
    prompts = [line["prompt"] for line in read_lines(toy_data / "prompts_test.jsonl")[:600]]
    ids, eos = [tokenizer.encode_ordinary(prompt) for prompt in prompts], tokenizer.eot_token
    generator = torch.Generator().manual_seed(5)
    rows = generate(policy, ids, 8, num_samples=4, eos=eos, generator=generator)
    lines = []
    for n, prompt in enumerate(prompts):
        ended = [row[:-1] for row in rows[4 * n : 4 * n + 4] if row[-1] == eos]
        texts = [text for text in (text_of(tokenizer, row) for row in ended) if text.strip()]
        lines += [{"prompt": prompt, "responses": texts}] if texts else []
    fresh, scored = write_jsonl(tmp_path / "fresh.jsonl", lines), tmp_path / "scored.jsonl"
    more = ["score", "--init", tmp_path / "run", "--data", fresh]
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
    model, _, statistics = load_reward_model(tmp_path / "run")
    assert model.config.n_embd == 64 and statistics["reward_std"] > 0


def test_refreshing(data, tmp_path, monkeypatch, capsys, uninterrupted):
    """The old model's accuracy on each new file comes first; a reward model goes on from its own
    weights when it is --init; --epochs 0 only normalises anew."""
    args = ["--old", uninterrupted, "--steps", 1, "--num_prompts", 20]
    assert run(monkeypatch, *flags(data, tmp_path / "new", *two_files(data), *args)) == 0
    printed = capsys.readouterr().out
    for name in ("rankings", "comparisons"):
        assert f"agrees with the labels of {data / name}.jsonl in 0." in printed
    assert printed.index("agrees with") < printed.index("step 0/1  held out: loss")
    old = report_of(tmp_path / "new")["old"]
    assert list(old) == [str(data / f"{name}.jsonl") for name in ("rankings", "comparisons")]
    assert all(0 < rate < 1 for rate in old.values()) and "few, 256 are usual" in printed
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


def test_what_a_report_says(data, uninterrupted):
    """Of the last evaluation, as logged; what an epoch was."""
    report, last = report_of(uninterrupted), metrics(uninterrupted)[-1]
    evaluated = {name.removeprefix("eval_"): x for name, x in last.items() if "eval_" in name}
    assert evaluated.items() <= report.items() and "labels_accuracy" in evaluated
    rankings, comparisons = (
        read_examples(data / f"{name}.jsonl", load_tokenizer(data / "policy"), 96, "drop", str)
        for name in ("rankings", "comparisons")
    )
    assert report["epoch_lines"] == len(rankings) + len(comparisons) // 2
    pairs = sum(len(e["pairs"]) for e in rankings)
    assert report["epoch_pairs"] == pairs + len(comparisons) // 2
    sizes = [x.numel() for x in load_model(uninterrupted).parameters()]
    assert report["parameters"] == sum(sizes) and report["reward_std"] > 0
    samples = read_lines(uninterrupted / "samples.jsonl")
    assert len(samples) == 4 * 4 and samples[0]["step"] == 0 and samples[-1]["step"] == 12
    rows = [(samples[-1]["prompt"], text) for text in samples[-1]["responses"]]
    assert samples[-1]["raw_scores"] == pytest.approx(scores_of(uninterrupted, rows), abs=1e-5)


# --- settings and input ---------------------------------------------------------------------------


def test_a_reward_model_must_be_normalised(data, tmp_path, monkeypatch, capsys):
    args = ["--normalise_with", "none", "--steps", 1]
    assert run(monkeypatch, *flags(data, tmp_path / "raw", *args)) == 0
    with pytest.raises(ValueError, match="never normalised"):
        load_reward_model(tmp_path / "raw")
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "P", "response": "r"}])
    more = ["--data", path, "--out", tmp_path / "scored.jsonl", "--device", "cpu"]
    assert run(monkeypatch, "score", "--init", tmp_path / "raw", *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "never normalised" in error
    assert not (tmp_path / "scored.jsonl").exists()
    assert run(monkeypatch, "score", "--init", data / "policy", *more) == 2
    assert "not a reward model" in capsys.readouterr().err
    # One whose scores are all equal is saved too, but can't be used.
    model, tokenizer = load_model(tmp_path / "raw"), load_tokenizer(tmp_path / "raw")
    with torch.no_grad():
        model.score.weight.zero_()
    save_model(tmp_path / "flat", model, tokenizer, {"stage": "reward"})
    args = ["--init", tmp_path / "flat", "--normalise_with", data / "policy", "--epochs", 0]
    assert run(monkeypatch, *flags(data, tmp_path / "same", *args)) == 0
    assert "not normalised: all 20 scores are 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="never normalised"):
        load_reward_model(tmp_path / "same")


def test_another_tokenizer_is_refused(data, tmp_path, monkeypatch, capsys, small_gpt):
    """A policy that writes in other tokens can't be who the scores are normalised on."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    other = Tokenizer("other", ranks, {END_OF_TEXT: 257})
    save_model(tmp_path / "other", small_gpt(vocab_size=258), other, {"stage": "sft"})
    args = flags(data, tmp_path / "run", "--normalise_with", tmp_path / "other")
    assert run(monkeypatch, *args) == 2
    assert "another tokenizer" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert run(monkeypatch, *flags(data, tmp_path / "run", "--old", data / "policy")) == 2
    assert "not a reward model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--label_smoothing", "0.5"], "--label_smoothing: expected a number in [0, 0.5)"),
        (["--margin", "huge"], "--margin huge: expected none, data, small, large or four numbers"),
        (["--margin", "1,2"], "--margin 1,2: expected none, data, small, large or four numbers"),
        (["--margin", "0,1,2,-1"], "--margin 0,1,2,-1: expected none"),
        (["--margin", "0,1,2,inf"], "--margin 0,1,2,inf: expected none"),
        (["--data_weights", "1,2"], "--data_weights: expected a file, and 1 numbers"),
        (["--data_weights", "0"], "--data_weights: no line is left"),
        (["--data", ""], "--data, --data_weights: expected a file"),
        (["--init", "nowhere"], "nowhere: not a model directory"),
        (["--normalise_with", "nowhere"], "nowhere: not a model directory"),
        (["--old", "nowhere"], "nowhere: not a model directory"),
        (["--max_new_tokens", "96"], "leaves a prompt no room"),
        (["--max_length", "8"], "leaves a prompt no room"),
        (["--max_length", "3", "--normalise_with", "none"], "has a pair to learn from"),
        (["--max_length", "1"], "--max_length: expected 2 or more"),
        (["--num_prompts", "1"], "--num_prompts: expected a number in [2, inf)"),
        (["--gold", "nowhere.py"], "nowhere.py: not a Python file"),
    ],
)
def test_bad_settings(data, tmp_path, monkeypatch, capsys, more, message):
    assert run(monkeypatch, *flags(data, tmp_path / "run"), *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--data", "--validation"])
def test_bad_lines(data, tmp_path, monkeypatch, capsys, flag):
    lines = [{"prompt": "P", "chosen": "a", "rejected": "b"}, {"prompt": "P", "chosen": "a"}]
    path = write_jsonl(tmp_path / "bad.jsonl", lines)
    assert run(monkeypatch, *flags(data, tmp_path / "run", flag, path)) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: rejected: expected a string with text" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


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
