"""evaluate.py: estimators against brute force and known truths; the whole script; its report."""

import itertools
import json
import math
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, read_lines, run_script, terminate_at, write_jsonl
from ranks import on_ranks

import evaluate
from feedback import add_scalar_head
from model import generate, load_model, save_model
from run import Run
from tokens import load_tokenizer

STATISTICS = {"reward_mean": 0.1, "reward_std": 1.2, "score_transform": "identity"}


def run(monkeypatch, *args):
    return run_script(evaluate, monkeypatch, *args)


@pytest.fixture
def a_run():
    """A Run of a Config, without a directory."""
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda **settings: Run(evaluate.Config(device="cpu", **settings))
    signal.signal(signal.SIGTERM, handler)


# --- best of n ------------------------------------------------------------------------------------


def test_best_of_n_vectors():
    """methods.md C8: the estimator on six rewards, and the gold that the proxy selects."""
    proxy, gold = [[0.1, 0.4, 0.35, 0.8, 0.2, 0.6]], [[0, 0.5, 0.3, 0.4, 0.1, 0.9]]
    found = evaluate.best_of_n(proxy, proxy)
    assert found[:3] == pytest.approx([0.408333, 0.566667, 0.657500], abs=1e-6)
    found = evaluate.best_of_n(proxy, gold)
    assert found[:3] == pytest.approx([0.366667, 0.52, 0.56], abs=1e-6)
    for n, kl in [(2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508), (1000, 5.908755)]:
        assert evaluate.best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(ties):
    """Brute force: in every subset of n, the gold of its best by proxy; of equals their mean."""
    rng = np.random.default_rng(0)
    proxy = rng.integers(0, 3, (5, 6)).astype(float) if ties else rng.normal(size=(5, 6))
    gold = rng.normal(size=(5, 6))
    expected = []
    for n in range(1, 7):
        values = []
        for r, g in zip(proxy, gold, strict=True):
            for subset in itertools.combinations(range(6), n):
                best = max(r[list(subset)])
                values.append(np.mean([g[i] for i in subset if r[i] == best]))
        expected.append(np.mean(values))
    assert evaluate.best_of_n(proxy, gold) == pytest.approx(expected, abs=1e-12)


def test_best_of_n_on_known_laws():
    """methods.md E1: the largest of 4 uniform numbers is 0.8 on average, of 2 and 3 Gaussian ones
    0.564190 and 0.846284; the choice's law from three outcomes and its exact KL."""
    rng = np.random.default_rng(0)
    uniform = rng.random((4000, 8))
    assert evaluate.best_of_n(uniform, uniform)[3] == pytest.approx(0.8, abs=0.004)
    normal = rng.normal(size=(8000, 6))
    assert evaluate.best_of_n(normal, normal)[1:3] == pytest.approx([0.564190, 0.846284], abs=0.012)
    base = np.array([0.5, 0.3, 0.2])
    draws = rng.choice(3, (20000, 4), p=base)
    law = [evaluate.best_of_n(draws, draws == k)[3] for k in range(3)]
    assert law == pytest.approx([0.0625, 0.3471, 0.5904], abs=0.01)
    kl = float(np.sum(law * np.log(law / base)))
    assert kl == pytest.approx(0.559751, abs=0.02) and kl < evaluate.best_of_n_kl(4)


def test_choose_best():
    samples, scores = [["a", "b", "c", "d"]], np.array([[1.0, 3.0, 2.0, 2.0]])
    assert evaluate.choose_best(samples, scores, 2) == [["b", "c"]]
    assert evaluate.choose_best(samples, scores, 4) == [["b"]]


def test_what_did_not_end():
    """One floor for all tables, what did not end has it: the lowest score of all, -1 at most. Files
    judge the text that there is."""
    model, file = SimpleNamespace(file=None), SimpleNamespace(file=evaluate)
    tables = [np.array([[0.5, 9.0]]), np.array([[-2.0]]), np.array([[0.0]])]
    ended = [[[{"ended": x} for x in some]] for some in ([True, False], [True], [False])]
    found = [table.tolist() for table in evaluate.floored(model, tables, ended)]
    assert found == [[[0.5, -2.0]], [[-2.0]], [[-2.0]]]
    (found,) = evaluate.floored(model, [np.array([[2.0, 3.0]])], [[ended[0][0][::-1]]])
    assert found.tolist() == [[-1.0, 3.0]]
    assert evaluate.floored(file, tables, ended) == tables


# --- win rates ------------------------------------------------------------------------------------


def test_win_rate_by_hand():
    """Three prompts; two responses against one, ties half."""
    a, b = [[1.0, 3.0], [2.0, 2.0], [0.0, 1.0]], [[2.0], [2.0], [2.0]]
    assert evaluate.win_shares(a, b).tolist() == [0.5, 0.5, 0.0]
    rate, low, high = evaluate.win_rate(a, b)
    assert rate == pytest.approx(1 / 3) and low == 0.0 and high == 0.5
    back = evaluate.win_rate(b, a)
    assert back[0] == pytest.approx(2 / 3)
    assert evaluate.win_rate([1.0, 5.0], [1.0, 2.0])[0] == 0.75
    assert evaluate.win_rate([1.0], [2.0]) == [0.0, None, None]


def test_intervals_cover_the_truth():
    """500 simulated judgings of 120 prompts, four responses each, which prompts make dependent:
    win rate, mean score and paired difference are inside their 95% intervals in 92 to 98%."""
    rng, inside = np.random.default_rng(0), np.zeros(3)
    # A's responses score N(prompt + 0.3, 1), B's N(prompt', 1), each prompt N(0, 0.5^2) for each.
    truth = 0.5 * (1 + math.erf(0.3 / math.sqrt(2 * (2 + 2 * 0.25))))
    for seed in range(500):
        a = rng.normal(0.3 + rng.normal(0, 0.5, (120, 1)), 1, (120, 4))
        b = rng.normal(rng.normal(0, 0.5, (120, 1)), 1, (120, 4))
        _, low, high = evaluate.win_rate(a, b, 400, seed)
        inside[0] += low <= truth <= high
        _, low, high = evaluate.mean_with_interval(a.mean(1), 400, seed)
        inside[1] += low <= 0.3 <= high
        _, low, high = evaluate.mean_with_interval(a.mean(1) - b.mean(1), 400, seed)
        inside[2] += low <= 0.3 <= high
    print("coverage of win rate, mean, difference:", inside / 500)
    assert (inside >= 0.92 * 500).all() and (inside <= 0.98 * 500).all()


def judged_by_length(rng, prompts, K, skewed):
    """Pairs of two policies' responses whose judge wants length alone, by a sigmoid of the gap: at
    equal length the truth is one half."""
    if skewed:
        a, b = rng.lognormal(2.4, 0.5, (prompts, K)), rng.lognormal(2.3, 0.15, (prompts, K))
    else:
        a, b = rng.normal(12, 3, (prompts, K)), rng.normal(10, 3, (prompts, K))
    _, longer, other, number = evaluate.every_pair(a, b, a, b)
    gap = longer - other
    wins = 1 / (1 + np.exp(-1.5 * np.tanh(gap / gap.std())))
    return wins, longer, other, number


def test_length_control_removes_a_planted_effect():
    """A is longer, and length is all that the judge sees: raw win rate far from one half, at equal
    length one half, its interval covering that in 92 to 98% of 250 simulations of hard verdicts."""
    rng, inside, raw, controlled = np.random.default_rng(0), 0, [], []
    for seed in range(250):
        wins, *pairs = judged_by_length(rng, 200, 1, skewed=False)
        wins = (rng.random(200) < wins).astype(float)
        rate, low, high = evaluate.length_controlled_win_rate(wins, *pairs, 80, seed)
        inside += low <= 0.5 <= high
        raw.append(wins.mean())
        controlled.append(rate)
    print(f"raw {np.mean(raw):.3f}, controlled {np.mean(controlled):.3f}, coverage {inside / 250}")
    assert np.mean(raw) > 0.58 and np.mean(controlled) == pytest.approx(0.5, abs=0.01)
    assert 0.92 <= inside / 250 <= 0.98


def test_length_control_of_several_samples_of_skewed_lengths():
    """K = 4 and lengths of different spread: pairs are what is controlled, not prompts' means."""
    pairs = judged_by_length(np.random.default_rng(0), 1000, 4, skewed=True)
    rate, low, high = evaluate.length_controlled_win_rate(*pairs, 50)
    assert (rate, low, high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-4)


def test_length_control_leaves_quality():
    """Where A is better and no longer it stays so; where it is always longer there is no answer."""
    rng = np.random.default_rng(0)
    lengths = rng.normal(10, 3, (2, 4000))
    wins = (rng.random(4000) < 0.7).astype(float)
    rate, _, _ = evaluate.length_controlled_win_rate(wins, *lengths, replicates=0)
    assert rate == pytest.approx(wins.mean(), abs=0.01)
    always = evaluate.length_controlled_win_rate(np.ones(50), *lengths[:, :50], replicates=20)
    assert all(0.99 < value <= 1 for value in always)
    none = evaluate.length_controlled_win_rate(wins, lengths[0] + 50, lengths[1])
    assert none == [None, None, None]
    same = evaluate.length_controlled_win_rate(wins, lengths[0], lengths[0], replicates=0)
    assert same[0] == pytest.approx(wins.mean(), abs=1e-3)
    # Each prompt weighs the same, however many its pairs are.
    pairs = [1, 1, 1, 0], [5, 5, 5, 5], [5, 5, 5, 5], [0, 0, 0, 1]
    assert evaluate.length_controlled_win_rate(*pairs)[0] == pytest.approx(0.5)


def test_fit_logistic():
    """At the maximum the residuals are orthogonal to the columns; without a slope it is the mean's
    log-odds."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=300), rng.random(300), rng.integers(0, 3, 300)
    theta = evaluate.fit_logistic(x, y, w, ridge=0.0)
    residual = w * (y - 1 / (1 + np.exp(-theta[0] - theta[1] * x)))
    assert abs(residual.sum()) < 1e-8 and abs((residual * x).sum()) < 1e-8
    flat = evaluate.fit_logistic(np.zeros(4), np.array([1.0, 1, 1, 0]), np.ones(4), ridge=1e-9)
    assert flat[0] == pytest.approx(math.log(3), abs=1e-6)


def test_ratings():
    """Players whose wins follow from known strengths; an undefeated one has no interval."""
    rng, truth = np.random.default_rng(0), np.array([0.8, 0.0, -0.8])
    wins = np.zeros((400, 3, 3))
    for i, j in itertools.combinations(range(3), 2):
        won = rng.random(400) < 1 / (1 + np.exp(truth[j] - truth[i]))
        wins[:, i, j], wins[:, j, i] = won, ~won
    for (rating, low, high), strength in zip(evaluate.ratings_of(wins), truth, strict=True):
        assert low < 1000 + evaluate.ELO * strength < high and low < rating < high
    wins[:, 0, 1:], wins[:, 1:, 0] = 1, 0
    assert evaluate.ratings_of(wins)[0][1:] == [None, None]


def test_entropy_of_words():
    """Of seven words a and b three times each, c once; of five pairs ab thrice, ba, bc."""
    texts = ["a b a b", "a b c"]
    words = [3 / 7, 3 / 7, 1 / 7]
    expected = -sum(p * math.log(p) for p in words)
    assert evaluate.gram_entropy(texts, 1) == pytest.approx(expected)
    assert evaluate.gram_entropy(texts, 2) == pytest.approx(0.950271, abs=1e-6)
    assert evaluate.gram_entropy(["", "a"], 2) == evaluate.gram_entropy(["a"], 1) == 0.0


# --- KL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_and_entropy_are_exact(small_gpt, a_run, temperature):
    """Every response of up to 3 tokens, with its probability: the means of `divergences` are the
    sums of p log(p / q) and of -p log p over them, to 1e-9."""
    policy = small_gpt(vocab_size=4, dtype=torch.float64, initializer_range=0.6)
    reference = small_gpt(vocab_size=4, dtype=torch.float64, initializer_range=0.6, seed=1)
    prompt, eos, responses = [1, 2], 3, []
    for length in (1, 2, 3):
        for body in itertools.product(range(3), repeat=length - 1):
            last = range(4) if length == 3 else [eos]
            responses += [[*body, token] for token in last]

    def log_probability(model, response, T):
        tokens = torch.tensor([prompt + response])
        with torch.no_grad():
            logprobs = (model(tokens)[0] / T).log_softmax(-1)
        return sum(logprobs[1 + t, token].item() for t, token in enumerate(response))

    p = np.array([log_probability(policy, r, temperature) for r in responses])
    q = np.array([log_probability(reference, r, 1.0) for r in responses])
    assert np.exp(p).sum() == pytest.approx(1)
    samples = [[{"prompt_ids": prompt, "ids": response} for response in responses]]
    run = a_run(micro_batch_size=5)

    def both(model, T):
        found = evaluate.divergences(model, reference, samples, T, run)
        return found["kl"][0], found["entropy"][0]

    kl, entropy = both(policy, temperature)
    assert np.exp(p) @ kl == pytest.approx(np.exp(p) @ (p - q), abs=1e-9)
    assert np.exp(p) @ entropy == pytest.approx(-np.exp(p) @ p, abs=1e-9)
    kl, entropy = both(policy, 0.0)
    assert kl == pytest.approx(-q, abs=1e-9) and set(entropy) == {0.0}
    zero, _ = both(reference, 1.0)
    assert zero == pytest.approx(np.zeros(len(zero)), abs=1e-12)


def test_equal_texts_are_ties_whoever_wrote_them(small_gpt, tokenizer, tmp_path, a_run):
    """Two policies say much the same, in other company: a reward model scores a text once."""
    model = small_gpt(scalar_head=True, initializer_range=1.0, vocab_size=tokenizer.n_vocab)
    save_model(tmp_path / "reward", model, tokenizer, STATISTICS)
    judge = evaluate.Judge(str(tmp_path / "reward"), tokenizer, a_run(micro_batch_size=1))
    rng = np.random.default_rng(0)

    def response(prompt, length):
        ids = rng.integers(1, 50, length).tolist()
        return {"prompt_ids": prompt, "ids": ids, "ended": True}

    prompts = [rng.integers(1, 50, 4 + n).tolist() for n in range(8)]
    shared = [response(prompt, 3 + n) for n, prompt in enumerate(prompts)]
    both = list(zip(prompts, shared, strict=True))
    ours = [[response(prompt, 9), same, same] for prompt, same in both]
    theirs = [[same, response(prompt, 2 + n)] for n, (prompt, same) in enumerate(both)]
    a, b = judge(None, ours), judge(None, theirs)
    assert a[:, 1].tolist() == a[:, 2].tolist() == b[:, 0].tolist()
    assert len(judge.known) == 24 and len(set(a[:, 1])) == 8
    theirs[0][0] = shared[0] | {"ended": False}
    least = min([-1.0, a.min(), b.min()])
    assert evaluate.floored(judge, [a, b], [ours, theirs])[1][0].tolist() == [least, b[0, 1]]


def test_scores_that_are_no_numbers_are_refused(small_gpt, tokenizer, tmp_path, a_run, capsys):
    """A response without a score is not one that did not end."""
    model = small_gpt(scalar_head=True, vocab_size=tokenizer.n_vocab)
    save_model(tmp_path / "reward", model, tokenizer, STATISTICS)
    judge = evaluate.Judge(str(tmp_path / "reward"), tokenizer, a_run())
    judge.model.score.weight.data[:] = math.nan
    with pytest.raises(SystemExit) as ended:
        judge(None, [[{"prompt_ids": [1, 2], "ids": [3], "ended": True}]])
    assert ended.value.code == 2 and "not finite" in capsys.readouterr().err


def test_a_judge_of_two_texts(tmp_path, tokenizer, a_run):
    """It is asked in both orders, with the prompt's fields, of each policy's first response."""
    (tmp_path / "longer.py").write_text(
        "def compare(prompt, first, second, *, first_wins, **fields):\n"
        "    return 1 if first_wins or len(first) > len(second) else 0.25\n"
    )
    judge = evaluate.Judge(str(tmp_path / "longer.py"), tokenizer, a_run())
    lines = [{"prompt": "p", "first_wins": n == 2} for n in range(3)]
    a = [[{"text": text}, {"text": "longest"}] for text in ("aaa", "a", "aa")]
    b = [[{"text": text}] for text in ("bb", "bb", "bb")]
    shares, order_decided = judge.compare(lines, a, b)
    assert shares.tolist() == [0.875, 0.125, 0.5] and order_decided == pytest.approx(1 / 3)
    assert judge.compare(lines, b, a)[0].tolist() == [0.125, 0.875, 0.5]


def test_samples_are_those_of_generate(small_gpt, tokenizer, a_run, tmp_path, monkeypatch):
    """Ids, texts and endings in the order of the prompts, K to each; they are drawn once."""
    model = small_gpt(vocab_size=tokenizer.n_vocab)
    texts = ("My car. My lamp.", "What?", "I feel sad.")
    prompts = [({"prompt": text}, tokenizer.encode_ordinary(text)) for text in texts]
    run = a_run(max_new_tokens=5, micro_batch_size=1)
    how = model, tokenizer, prompts, 0.0, 2, 7, run, tmp_path / "tokens.jsonl"
    found = evaluate.sample_policy(*how)
    for (_, ids), some in zip(prompts, found, strict=True):
        (greedy,) = generate(model, [ids], 5, temperature=0, eos=tokenizer.eot_token)
        assert len(some) == 2 and some[0]["prompt_ids"] == ids
        assert some[0]["ids"] == some[1]["ids"] == greedy
    monkeypatch.delattr(evaluate, "generate")
    assert evaluate.sample_policy(*how) == found


# --- numbers by task, and as texts ----------------------------------------------------------------


def test_differences_are_paired_by_prompt():
    """Two tasks by hand, K = 2 and 1; a part that a policy lacks, that a task or a prompt lacks."""
    cfg = evaluate.Config(bootstrap=100)
    first = np.array([[1.0, 3.0], [5.0, 5.0], [0.0, 2.0]])
    grids = {"gold": {"a": first, "b": np.array([[4.0], [7.0], [1.0]])}}
    known = np.array([[1.0], [math.nan], [0.0]])
    grids |= {
        "harmless": {"a": known, "b": 1 - known},
        "kl": {"b": np.array([[1.0], [2.0], [6.0]])},
    }
    found = evaluate.by_task(grids, {"x": [0, 1], "y": [2]}, "mean", "a", cfg)
    assert found["gold"]["x"]["b"] == {"mean": [5.5, 4.0, 7.0], "over_first": [2.0, 2.0, 2.0]}
    assert found["gold"]["x"]["a"]["over_first"] == [0, 0, 0]
    assert found["gold"]["y"]["b"] == {"mean": [1, None, None], "over_first": [0, None, None]}
    assert found["harmless"]["x"]["b"] == {"mean": [0, None, None], "over_first": [-1, None, None]}
    assert found["harmless"]["y"]["b"]["over_first"] == [1, None, None]
    unknown = {"harmless": {"a": known * math.nan}}
    assert evaluate.by_task(unknown, {"x": [0, 1]}, "mean", "a", cfg) == {"harmless": {"x": {}}}
    assert found["kl"]["x"] == {"b": {"mean": [1.5, 1.0, 2.0], "over_first": None}}


def test_numbers_as_texts():
    """A column's numbers have the digits that its largest needs; empty columns are left out."""
    assert evaluate.texts_of([0.5, None, [-0.25, -1.5, 2.0]]) == [
        "0.500",
        "",
        "-0.250 [-1.500, 2.000]",
    ]
    assert evaluate.texts_of([[12.5, None, None], 0.126]) == ["12.50", "0.13"]
    assert evaluate.texts_of([[1000.2, 990.0, 1010.0], [None, None, None]]) == [
        "1000 [990, 1010]",
        "",
    ]
    rows = {"a": {"x": 1}, "b|": {"none": None, "x": 2}}
    found = evaluate.table("T", "policy", rows)
    assert found[:3] == ["", "## T", ""]
    assert found[3:5] == ["| policy | x    |", "|---|---|"]
    assert found[5:] == ["| a      | 1.00 |", "| b\\|    | 2.00 |"]
    assert evaluate.table("T", "policy", {"a": {"none": None}}) == []


def test_policies_by_name(tmp_path):
    """An @ is part of a path, unless an option follows it; what there is by a name is meant by it;
    files are no runs."""
    parse, Policy = evaluate.parse_policy, evaluate.Policy
    assert parse("runs/a") == Policy("runs/a", "runs/a", 1.0, 1, "")
    name = "runs/a@best_of=4:runs/r@temperature=0.5"
    assert parse(name) == Policy(name, "runs/a", 0.5, 4, "runs/r")
    name = "me@home/a@best_of=4:r@w/r"
    assert parse(name) == Policy(name, "me@home/a", 1.0, 4, "r@w/r")
    assert parse("me@home/a").run == "me@home/a"
    (tmp_path / "a@temperature=0").mkdir()
    name = str(tmp_path / "a@temperature=0")
    assert parse(name) == Policy(name, name)
    (tmp_path / "a@b").write_text("")
    for name in ("a@b.jsonl", "b.jsonl.gz", str(tmp_path / "a@b")):
        assert parse(name) == Policy(name, name, is_file=True)


# --- the whole script -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(toy_data, policy_run, tokenizer, tmp_path_factory):
    """A folder with two policies, a reward model, gold that also compares, 24 prompts."""
    folder = tmp_path_factory.mktemp("setting")
    lines = (toy_data / "prompts_test.jsonl").read_text().splitlines(keepends=True)[:24]
    (folder / "prompts.jsonl").write_text("".join(lines))
    torch.manual_seed(0)
    policy = load_model(policy_run)
    reward = add_scalar_head(policy)
    save_model(folder / "reward", reward, tokenizer, {"stage": "reward"} | STATISTICS)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    save_model(folder / "other", policy, tokenizer, {"stage": "sft"})
    (folder / "other/report.json").write_text('{"seconds": 12.3}')
    (folder / "gold.py").write_text(
        "def score(prompt, response, *, task, **fields):\n"
        "    return len(response.split()) + (task == 'harmful')\n"
        "def explain(prompt, response, *, task, **fields):\n"
        "    parts = {'words': len(response.split()), 'score': 0}\n"
        "    return parts | ({'harmless': 1} if task == 'harmful' else {})\n"
    )
    (folder / "biased.py").write_text(
        "def score(prompt, response, **fields): return 0\n"
        "def compare(prompt, first, second, **fields): return 0.9\n"  # whoever comes first
    )
    args = ["--policies", f"{policy_run},{folder / 'other'},{policy_run}@temperature=0"]
    args[1] += f",{policy_run}@best_of=4:{folder / 'reward'}"
    args += [
        "--gold",
        folder / "gold.py",
        "--judges",
        f"{folder / 'reward'},{folder / 'biased.py'}",
    ]
    args += ["--prompts", folder / "prompts.jsonl", "--max_new_tokens", 8, "--device", "cpu"]
    args += ["--best_of_n", 4, "--proxy", folder / "reward", "--bootstrap", 100]
    args += ["--micro_batch_size", 8]  # three chunks of prompts
    args = list(map(str, args))
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *args, "--out_dir", folder / "out", "--report", folder / "all.md") == 0
    return folder, args


def test_a_whole_evaluation(setting, policy_run):
    folder, _ = setting
    report = json.loads((folder / "out/report.json").read_text())
    first, other, greedy, best = report["policies"]
    by_reward, biased = str(folder / "reward"), str(folder / "biased.py")
    sft = report["policies"][first]
    assert sft["samples"] == 96 and sft["kl"][0] == pytest.approx(0, abs=1e-6)
    assert report["policies"][other]["kl"][1] > 0 and report["policies"][greedy]["kl"][0] > 1
    assert report["policies"][best]["kl"][0] == pytest.approx(math.log(4) - 0.75)
    assert report["policies"][best]["samples"] == report["policies"][greedy]["samples"] == 24
    assert report["policies"][other]["training_seconds"] == 12.3
    # What best-of-4 is chosen by likes it best; both directions sum to one.
    wins = report["win_rate"][by_reward]
    assert wins[best][first][1] > 0.5
    for table in report["win_rate"].values():
        for a, b in itertools.combinations(report["policies"], 2):
            assert table[a][b][0] + table[b][a][0] == pytest.approx(1)
    # A judge who goes by the order alone says one half, and is found out.
    assert all(rate[0] == pytest.approx(0.5) for rate in report["win_rate"][biased][best].values())
    assert set(report["order_decides"].values()) == {1.0}
    assert report["win_rate"]["gold"] != report["win_rate"]["length"]
    coin = report["win_rate"]["a coin"][first][other]
    assert 0.3 < coin[1] < 0.5 < coin[2] < 0.7
    gap = report["difference"]["gold"][other][first]
    means = [report["policies"][name]["scores"]["gold"][0] for name in (other, first)]
    assert gap[0] == pytest.approx(means[0] - means[1]) and gap[1] <= gap[0] <= gap[2]
    rows = report["by_task"]["gold"]
    assert set(rows) == {"summary", "benign", "harmful"}
    assert rows["summary"][first]["over_first"][0] == 0
    scores = [found[other]["score"][0] for found in rows.values()]
    assert min(scores) <= means[0] <= max(scores)
    gap = rows["benign"][other]["score"][0] - rows["benign"][first]["score"][0]
    assert rows["benign"][other]["over_first"][0] == pytest.approx(gap)
    # The same of what explains gold, and of what all samples have.
    parts = report["parts_by_task"]
    for task in ("harmful", "all"):
        assert set(parts["harmless"][task]) == set(report["policies"])
    assert parts["harmless"]["harmful"][first]["mean"][0] == 1
    assert parts["harmless"]["summary"] == {}
    for name in (first, other):
        assert parts["kl"]["all"][name]["mean"] == report["policies"][name]["kl"]
    assert best not in parts["kl"]["all"]
    gap = parts["eos"]["all"][greedy]["over_first"][0]
    assert gap == pytest.approx(report["policies"][greedy]["eos"] - sft["eos"])
    lines = read_lines(folder / "out/samples-0.jsonl")
    assert lines[0]["policy"] == str(policy_run) and len(lines[0]["responses"]) <= 4
    words = [len(response.split()) for line in lines for response in line["responses"]]
    assert sft["words"] == pytest.approx(sum(words) / 96)
    curve = report["best_of_n"]
    assert [row["n"] for row in curve] == [1, 2, 3, 4] and curve[0]["gold_gain"][0] == 0
    assert curve[3]["proxy"][0] > curve[0]["proxy"][0]
    text = (folder / "all.md").read_text()
    for words in ("## Win rates by gold, at equal length", "## Best of n", "- KL at most: "):
        assert words in text
    for words in ("| KL at most |", "Elo by gold", "## What responses are like: harmful"):
        assert words in text
    # Samples and a figure, the summary, the rest; controls are a row each.
    places = [text.index(x) for x in ("**summary**", "score_by_kl.png", "## Scores", "## Win r")]
    assert places == sorted(places)
    assert text.count("\n| by length") == text.count("\n| by a coin") == 1
    assert "Win rates by length" not in text
    assert "(no EOS)" in text and "The order of the two decided in 100.0%" in text
    for figure in ("out/score_by_kl.png", "out/best_of_n.png"):
        assert f"]({figure})" in text and (folder / figure).stat().st_size > 1000


def test_two_ranks_report_the_same(setting, tmp_path):
    folder, args = setting
    argv = ["evaluate.py", *args, "--out_dir", str(tmp_path / "two")]
    done = on_ranks("evaluate", f"sys.argv = {argv!r}\nevaluate.main()\n")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        json.loads((out / "report.json").read_text()) for out in (folder / "out", tmp_path / "two")
    )
    for n in range(4):
        name = f"samples-{n}.jsonl"
        assert (folder / "out" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for name, found in one["policies"].items():
        assert two["policies"][name]["kl"] == pytest.approx(found["kl"], abs=1e-5)
        for by, value in found["scores"].items():
            assert two["policies"][name]["scores"][by] == pytest.approx(value, abs=1e-5)
        assert two["policies"][name]["words"] == found["words"]
    for section in ("win_rate", "difference", "by_task"):
        assert two[section]["gold"] == one[section]["gold"]
    assert two["order_decides"] == one["order_decides"]


def test_it_stops_and_resumes(setting, policy_run, tmp_path, monkeypatch, capsys):
    """SIGTERM while the second policy responds: no report; --resume writes the same as ever, and
    takes the first's samples as they are. The second is the first again, and draws others."""
    _, args = setting
    args = [*args, "--best_of_n", 0, "--proxy", "runs/reward", "--judges", ""]
    args += ["--policies", f"{policy_run},{policy_run}@temperature=1"]
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        terminate_at(patch, evaluate, "generate", 5)
        assert run(patch, *args, "--out_dir", tmp_path / "cut") == 128 + signal.SIGTERM
    assert not (tmp_path / "cut/report.json").exists()
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(evaluate, "generate", lambda *a, **k: calls.append(a) or generate(*a, **k))
        assert run(patch, *args, "--out_dir", tmp_path / "cut", "--resume") == 0
    assert len(calls) == 3  # chunks of the second's prompts
    whole, cut = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "cut")
    )
    first, second = (read_lines(tmp_path / f"whole/samples-{n}.jsonl") for n in (0, 1))
    assert first[0]["prompt"] == second[0]["prompt"]
    assert first[0]["responses"] != second[0]["responses"]
    assert whole["by_task"] == cut["by_task"] and whole["win_rate"] == cut["win_rate"]
    capsys.readouterr()
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "cut", "--resume") == 0
    assert "this run is finished" in capsys.readouterr().out


def test_a_file_of_comparisons_judges(setting, policy_run, tmp_path, monkeypatch):
    """Both orders of one prompt are one vote; comparisons of others don't count; rankings do."""
    folder, _ = setting
    a, b = str(policy_run), str(folder / "other")
    pair = {"chosen": "x", "rejected": "y"}
    lines = [
        pair | {"prompt": "P", "policy": [a, b]},
        pair | {"prompt": "P", "policy": [b, a]},
        pair | {"prompt": "Q", "policy": [a, b], "label": 0.8},
        pair | {"prompt": "R", "policy": [a, b]},
        pair | {"prompt": "R", "policy": [a, "somebody else"]},
    ]
    path = write_jsonl(tmp_path / "labelled.jsonl", lines)
    args = ["--policies", f"{a},{b}", "--comparisons", path, "--prompts", folder / "prompts.jsonl"]
    args += ["--max_new_tokens", 8, "--num_samples", 1, "--out_dir", tmp_path / "out"]
    assert run(monkeypatch, *args, "--device", "cpu") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    rates = report["win_rate"][str(path)]
    assert rates[a][b][0] == pytest.approx((0.5 + 0.8 + 1) / 3)
    assert rates[b][a][0] == pytest.approx((0.5 + 0.2 + 0) / 3)
    ranking = {"prompt": "P", "responses": ["x", "y", "z"], "policy": [a, b, a]}
    found = evaluate.read_labelled(write_jsonl(path, [ranking]), [a, b])
    assert found == {(a, b): {"P": [1.0, 0.0]}, (b, a): {"P": [0.0, 1.0]}}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--policies", ""], "--policies: expected one or more"),
        (["--policies", "x,x"], "--policies: expected one or more, all different"),
        (["--policies", "x@best_of=4"], "expected RUN, RUN@temperature=T or RUN@best_of=N:REWARD"),
        (["--policies", "x@temperature=-1"], "expected RUN, RUN@temperature=T or"),
        (["--policies", "nowhere"], "nowhere: not a model directory"),
        (["--gold", "", "--judges", ""], "expected a judge"),
        (["--judges", "nowhere"], "nowhere: not a model directory"),
        (["--judges", "nowhere.py"], "nowhere.py: not a Python file"),
        (["--max_new_tokens", "96"], "--max_new_tokens: leaves a prompt no room"),
        (["--best_of_n", "4", "--policies", "x@temperature=0"], "expected a first policy that"),
        (["--policies", "x@temperature=0@best_of=4:y"], "needs a temperature above 0"),
        (["--num_samples", "0"], "--num_samples: expected a number in [1, inf), got 0"),
        (["--best_of_n", "0"], "--proxy: only with --best_of_n"),
        (["--gold", "runs/reward"], "--gold runs/reward: not a Python file"),
        (["--prompts", ""], "--prompts: expected a file"),
        (["--best_of_n", "4", "--policies", "x.jsonl"], "expected a first policy that"),
        (["plots"], "unrecognized arguments: plots"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl:0: file: can't be read"),
    ],
)
def test_bad_settings(setting, tmp_path, monkeypatch, capsys, more, message):
    _, args = setting
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_flags_of_the_table(setting, tmp_path, monkeypatch):
    """KL to another reference than the first policy; the parts asked for."""
    folder, args = setting
    more = ["--reference", folder / "other", "--show", "words,harmless,nothing", "--num_shown", 1]
    assert run(monkeypatch, *args, *more, "--out_dir", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    first, other, *_ = report["policies"]
    assert report["policies"][first]["kl"][0] > 0.1
    assert report["policies"][other]["kl"][0] == pytest.approx(0, abs=1e-6)
    text = (tmp_path / "out/report.md").read_text()
    assert "| distinct 2 | words |" in text
    assert len(re.findall(r"\| policy +\| response", text)) == 1


def test_a_constant_judge(setting, tmp_path, monkeypatch):
    """0.7 for everything: sums of 0.7 round, and the interval must not turn inside out. Wins are by
    `compare`, where a judge has it: the greedy policy's responses are the shorter ones."""
    _, args = setting
    (tmp_path / "flat.py").write_text(
        "def score(prompt, response, **fields): return 0.7\n"
        "def compare(prompt, a, b, **fields): return len(a.split()) > len(b.split())\n"
    )
    more = ["--gold", tmp_path / "flat.py", "--judges", ""]
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "out", *more) == 0
    assert (tmp_path / "out/report.md").exists()
    report = json.loads((tmp_path / "out/report.json").read_text())
    first, _, greedy, _ = report["policies"]
    assert report["win_rate"]["gold"][greedy][first][2] < 0.5
    assert report["difference"]["gold"][greedy][first] == [0, 0, 0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("def score(p, r, **f): return float('nan')", "score: nan for 'x' to 'p': not finite"),
        ("def explain(p, r, **f): return {'note': 'text'}", "explain: ValueError"),
        ("def explain(p, r, **f): return {'x': float('inf')}", "explain: {'x': inf}"),
        ("def compare(p, a, b, **f): return a[9999]", "compare: IndexError"),
        ("def compare(p, a, b, **f): return 7", "compare: expected a probability, got 7"),
    ],
)
def test_judges_that_fail(tmp_path, monkeypatch, capsys, text, message):
    args = outputs(tmp_path, a={"p": "x"}, b={"p": "y"})
    (tmp_path / "bad.py").write_text(f"def score(p, r, **f): return 1\n{text}\n")
    args += ["--prompts", "", "--gold", tmp_path / "bad.py", "--out_dir", tmp_path / "out"]
    assert run(monkeypatch, *args, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert f"bad.py: {message}" in error and error.count("\n") == 1


def test_policies_of_other_vocabularies_are_refused(
    setting, tmp_path, monkeypatch, capsys, small_gpt, tokenizer
):
    """Before anything is sampled or deleted."""
    _, args = setting
    padded = small_gpt(vocab_size=tokenizer.n_vocab + 40)
    save_model(tmp_path / "padded", padded, tokenizer)
    policies = f"{args[args.index('--policies') + 1].split(',')[0]},{tmp_path / 'padded'}"
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "o", "--policies", policies) == 2
    assert "another tokenizer, template or vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_policy_in_the_folder_to_delete_is_refused(setting, tmp_path, monkeypatch, capsys):
    folder, args = setting
    shutil.copytree(folder / "other", tmp_path / "out")
    (tmp_path / "out/args.json").write_text('{"settings": {}}')
    more = ["--policies", tmp_path / "out", "--out_dir", tmp_path / "out", "--overwrite"]
    assert run(monkeypatch, *args, *more) == 2
    assert "is in --out_dir, which --overwrite would delete" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").exists()


def test_table_and_check(setting, monkeypatch, capsys, policy_run):
    folder, _ = setting
    report = ["--report", folder / "out/report.json"]
    assert run(monkeypatch, "table", *report) == 0
    assert "score by gold" in capsys.readouterr().out
    best, first = f"{policy_run}@best_of=4:{folder / 'reward'}", str(policy_run)
    more = [*report, "--judge", folder / "reward"]
    assert run(monkeypatch, "check", *more, "--better", f"{best} > {first}") == 0
    assert "ok  " in capsys.readouterr().out
    claims = f"{best} > {first},{first} > {best}"
    assert run(monkeypatch, "check", *more, "--better", claims) == 1
    assert "FAILED" in capsys.readouterr().out
    assert run(monkeypatch, "check", *more) == 2
    assert run(monkeypatch, "check", *more, "--better", "x > y") == 2
    assert run(monkeypatch, "table", "--report", folder / "gold.py") == 2


def test_a_judge_must_be_normalised(setting, policy_run, tmp_path, monkeypatch, capsys):
    _, args = setting
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "o", "--judges", policy_run) == 2
    assert "not a reward model" in capsys.readouterr().err


def test_by_another_field_and_several_of_the_best(
    tmp_path, monkeypatch, policy_run, toy_data, capsys
):
    """--by kind tells scores apart by the prompts' kind; --best_of_samples 2 chooses twice."""
    torch.manual_seed(3)
    model, tokenizer = add_scalar_head(load_model(policy_run)), load_tokenizer(policy_run)
    save_model(tmp_path / "reward", model, tokenizer, {"stage": "reward"} | STATISTICS)
    lines = read_lines(toy_data / "prompts_test.jsonl")[:8]
    lines = [line | {"half": "upper" if n < 4 else "lower"} for n, line in enumerate(lines)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", lines)
    best = f"{policy_run}@best_of=3:{tmp_path / 'reward'}"
    args = ["--policies", f"{policy_run},{best}", "--gold", ROOT / "data/toy.py", "--by", "half"]
    args += ["--prompts", prompts, "--num_samples", 2, "--best_of_samples", 2, "--bootstrap", 20]
    args += ["--max_new_tokens", 8, "--out_dir", tmp_path / "out", "--device", "cpu"]
    assert run(monkeypatch, *args) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report["by_task"]["gold"]) == {"upper", "lower"}
    assert set(report["parts_by_task"]["kl"]) == {"all", "upper", "lower"}
    assert report["policies"][best]["samples"] == 16
    found = report["policies"]
    assert {"distinct_2_a_prompt", "entropy_2_a_prompt"} <= set(found[best])
    assert found[best]["entropy"] is None and found[str(policy_run)]["entropy"][0] > 0
    assert "\n| different a prompt" in (tmp_path / "out/report.md").read_text()
    write_jsonl(prompts, [*lines, lines[0] | {"half": 3}])
    assert run(monkeypatch, *args, "--overwrite") == 2
    assert f"{prompts}:9: half: expected a string, got 3" in capsys.readouterr().err


# --- outputs of others ----------------------------------------------------------------------------


def outputs(tmp_path, **files):
    """Files of outputs {name: {prompt: response(s)}}, and a judge that compares alone."""
    for name, found in files.items():
        lines = [
            {"prompt": prompt, "task": "t"}
            | ({"response": text} if isinstance(text, str) else {"responses": text})
            for prompt, text in found.items()
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
    (tmp_path / "longer.py").write_text(
        "def compare(prompt, a, b, **fields): return len(a) > len(b) if len(a) != len(b) else 0.5\n"
    )
    return ["--policies", ",".join(str(tmp_path / f"{name}.jsonl") for name in files)]


def report_of(tmp_path):
    """The report, which is strict JSON."""

    def refuse(name):
        raise ValueError(name)

    return json.loads((tmp_path / "out/report.json").read_text(), parse_constant=refuse)


def test_files_of_outputs_are_policies(tmp_path, monkeypatch, capsys):
    """Without any model: the prompts that all have, as many responses as each has; judged by a file
    that scores, by one that compares alone, and by comparisons that name the lines' `policy`."""
    a = {"p": ["a", "a a a", "a"], "q": ["b b", "b"], "only a's": ["c", "c"]}
    args = outputs(tmp_path, a=a, b={"q": "b b b", "p": "a a"})
    a, b = args[1].split(",")
    with open(b, "a") as file:  # another line to a prompt is another response
        for prompt in ("p", "q"):
            file.write(json.dumps({"prompt": prompt, "response": "w"}) + "\n")
    lines = [line | {"policy": "us"} for line in read_lines(tmp_path / "a.jsonl")]
    write_jsonl(tmp_path / "a.jsonl", lines)
    (tmp_path / "words.py").write_text(
        "def score(prompt, response, *, task, **fields): return len(response.split())\n"
        "def explain(prompt, response, **fields): return {'of_b': prompt == 'q'}\n"
    )
    pair = {"prompt": "p", "chosen": "x", "rejected": "y", "policy": ["us", b]}
    labelled = write_jsonl(tmp_path / "labelled.jsonl", [pair])
    args += ["--prompts", "", "--gold", tmp_path / "words.py", "--judges", tmp_path / "longer.py"]
    args += ["--comparisons", labelled, "--out_dir", tmp_path / "out", "--bootstrap", 20]
    assert run(monkeypatch, *args) == 0
    said = capsys.readouterr().out
    assert "2 of 3 prompts: to the others" in said and "1 more are left out" in said
    report = report_of(tmp_path)
    assert report["prompts"] == 2 and list(report["policies"]) == [a, b]
    assert report["policies"][a]["scores"]["gold"][0] == pytest.approx((1 + 3 + 2 + 1) / 4)
    assert report["policies"][a]["samples"] == 4 and report["policies"][a]["kl"] is None
    rates = {by: table[a][b][0] for by, table in report["win_rate"].items()}
    # To p words 1 and 3 against 2 and 1, to q 2 and 1 against 3 and 1.
    assert rates["gold"] == pytest.approx(((0 + 0.5 + 1 + 1) / 4 + (0 + 1 + 0 + 0.5) / 4) / 2)
    assert rates[str(tmp_path / "longer.py")] == 0 and rates[str(labelled)] == 1
    assert list(report["difference"]) == list(report["by_task"]) == ["gold"]
    assert report["parts_by_task"]["of_b"]["all"][b]["mean"][0] == 0.5
    text = (tmp_path / "out/report.md").read_text()
    assert "KL" not in text.split("## Win rates")[0] and "nan" not in text and "| words |" in text
    assert not (tmp_path / "out/score_by_kl.png").exists()


def test_a_judge_that_compares_alone(tmp_path, monkeypatch, capsys):
    args = outputs(tmp_path, a={"p": "long", "q": "x"}, b={"p": "s", "q": "longer"})
    args += ["--prompts", write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q"}, {"prompt": "r"}])]
    args += ["--gold", tmp_path / "longer.py", "--out_dir", tmp_path / "out"]
    assert run(monkeypatch, *args) == 0
    report, (a, b) = report_of(tmp_path), args[1].split(",")
    assert report["prompts"] == 1 and report["win_rate"]["gold"][b][a] == [1.0, None, None]
    assert report["difference"] == report["by_task"] == {} and set(report["elo"]) == {"gold"}
    assert "Wins against" in capsys.readouterr().out
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "another"}])
    assert run(monkeypatch, *args, "--overwrite") == 2
    message = f"{a}: responds to none of 1 prompts, the first of which is 'another'"
    assert message in capsys.readouterr().err


def test_files_beside_runs(setting, policy_run, tokenizer, tmp_path, monkeypatch, capsys):
    """What a run said, as a file, scores the same by gold and by the reward model, and has no KL; a
    response that is too long to be read counts as one that did not end."""
    folder, args = setting
    said = [x for x in read_lines(folder / "out/samples-0.jsonl") if len(x["responses"]) == 4][:6]
    said[0]["responses"][0] = " car" * 200
    file = write_jsonl(tmp_path / "said.jsonl", said)
    more = ["--policies", f"{policy_run},{file}", "--judges", folder / "reward", "--best_of_n", 0]
    more += ["--proxy", "runs/reward", "--out_dir", tmp_path / "out"]
    assert run(monkeypatch, *args, *more) == 0
    assert "1 are, or their prompt is, too long to be read whole" in capsys.readouterr().out
    report = report_of(tmp_path)
    assert report["prompts"] == 6
    first, second = report["policies"].values()
    assert second["kl"] is second["eos"] is None and first["kl"][0] == pytest.approx(0, abs=1e-6)
    assert report["by_task"]["gold"] and second["tokens"][0] > first["tokens"][0]
    only = ["--policies", file, "--judges", folder / "reward", "--prompts", "", "--gold", ""]
    assert run(monkeypatch, *only, "--out_dir", tmp_path / "only") == 0  # its tokenizer reads them
    alone = json.loads((tmp_path / "only/report.json").read_text())["policies"][str(file)]
    by = str(folder / "reward")
    assert alone["scores"][by][0] == pytest.approx(second["scores"][by][0], abs=0.2)


@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt": "p"}, "1: response: expected a string, got none"),
        ({"prompt": "p", "response": 3}, "1: response: expected a string, got 3"),
        ({"prompt": "p", "response": " "}, "1: responses: number 1 is not a string with text"),
        ({"prompt": "p", "responses": []}, "1: responses: expected a list of 1 or more"),
        ({"prompt": "p", "response": "x", "task": 1}, "1: task: expected a string, got 1"),
        ({"response": "x"}, "1: prompt: is missing"),
    ],
)
def test_bad_files_of_outputs(tmp_path, capsys, line, message):
    path = write_jsonl(tmp_path / "bad.jsonl", [line])
    with pytest.raises(SystemExit) as ended:
        evaluate.read_outputs(path, "task")
    assert ended.value.code == 2 and f"{path}:{message}" in capsys.readouterr().err


def test_prompts_that_are_cut_are_counted(setting, tmp_path, monkeypatch, capsys):
    folder, args = setting
    lines = read_lines(folder / "prompts.jsonl")[:3]
    lines[0]["prompt"] *= 20
    prompts = write_jsonl(tmp_path / "long.jsonl", lines)
    more = ["--policies", folder / "other", "--judges", "", "--best_of_n", 0, "--prompts", prompts]
    more += ["--proxy", "runs/reward", "--out_dir", tmp_path / "out"]
    assert run(monkeypatch, *args, *more) == 0
    assert "3 prompts, 1 of which lose their start" in capsys.readouterr().out
    assert report_of(tmp_path)["cut_prompts"] == 1
    assert "1 prompts lost their start" in (tmp_path / "out/report.md").read_text()


# --- learning curves ------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path):
    """Runs a-0, a-1 and b with ten metrics, one of them constant."""
    for name, slope in [("a-0", 1.0), ("a-1", 1.2), ("b", 2.0)]:
        (tmp_path / name).mkdir()
        lines = [{"step": i, "seconds": 1.0, "loss": slope / (i + 1), "lr": 1} for i in range(5)]
        lines += [{"step": i, "eval_gold": i, "eval_kl": 2 * i, "note": "x"} for i in (0, 4)]
        lines += [{"step": i} | {f"more_{n}": n * i for n in range(9)} for i in range(2)]
        write_jsonl(tmp_path / name / "metrics.jsonl", [*lines, {"step": 5, "eval_loss": slope}])
    return [tmp_path / name for name in ("a-0", "a-1", "b")]


def test_metrics_to_draw(logs, capsys):
    curves = evaluate.read_curves(map(str, logs))
    first = evaluate.choose_metrics(curves, ())
    assert first == ["eval_gold", "eval_kl", "loss", *(f"more_{n}" for n in range(1, 6))]
    assert evaluate.choose_metrics(curves, ("kl", "loss", "eval_loss", "lr")) == [
        "eval_kl",
        "loss",
        "eval_loss",
        "lr",
    ]
    with pytest.raises(SystemExit):
        evaluate.choose_metrics(curves, ("reward",))
    assert "--y reward: in no run; there are eval_gold, eval_kl" in capsys.readouterr().err


def test_plot(logs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures/curves.png"
    assert run(monkeypatch, "plot", *logs, "--out", out) == 0
    said = capsys.readouterr().out
    drawn = out.exists() and out.stat().st_size > 1000 and "8 of 14 metrics" in said
    assert drawn or "matplotlib is not installed" in said
    assert run(monkeypatch, "plot", logs[0], "--y", "gold,kl", "--out", out) == 0
    assert run(monkeypatch, "plot", logs[0], "--y", "reward", "--out", out) == 2
    assert run(monkeypatch, "plot") == 2
    assert run(monkeypatch, "plot", tmp_path) == 2
    assert "metrics.jsonl:0: file: can't be read" in capsys.readouterr().err


def test_a_figure_hides_nothing(tmp_path, monkeypatch):
    """Groups of runs are one colour and one name; the legend is outside of all panels."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    made = []
    monkeypatch.setattr(Figure, "savefig", lambda f, path, **_: made.append(f) or path.touch())
    run_of = [(0, 1.0), (1, 2.0)]
    curves = {"a": [run_of, [(0, 3.0), (1, 4.0), (2, 5.0)]], "b": [[(0, [1.0, None, None])]]}
    assert evaluate.draw(tmp_path / "x.png", "step", {"gold": curves, "kl": curves, "c": curves})
    figure = made[0]
    assert [panel.axison for panel in figure.axes] == [True, True, True, False]
    means = figure.axes[0].containers[0].lines[0].get_ydata()
    assert means.tolist() == [2.0, 3.0]
    assert evaluate.draw(tmp_path / "x.png", "step", {"gold": {"a": [[(0, 1.0)], [(1, 2.0)]]}})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert not any(box.overlaps(panel.get_window_extent()) for panel in figure.axes[:3])


def test_tensorboard(logs, monkeypatch, capsys):
    """Every number at its step; twice the same is there once; one line where it isn't installed."""
    written = {}

    class Writer:
        def __init__(self, folder):
            self.folder = folder
            written[folder] = []
            (ROOT / folder).mkdir()

        def add_scalar(self, *what):
            written[self.folder].append(what)

        def close(self):
            (ROOT / self.folder / "events").write_text("x")

    before = (logs[0] / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
        for _ in range(2):
            assert run(patch, "plot", "--tensorboard", *logs[:2]) == 0
    assert sorted(path.name for path in logs[0].iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert (logs[0] / "tensorboard/events").exists() and len(written) == 2
    found = written[str(logs[1] / ".tensorboard.tmp")]
    assert ("loss", 0.6, 1) in found and ("eval_loss", 1.2, 5) in found and len(found) == 33
    assert (logs[0] / "metrics.jsonl").read_bytes() == before
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(monkeypatch, "plot", logs[0], "--tensorboard") == 2
    error = capsys.readouterr().err
    assert "tensorboard is not installed" in error and error.count("\n") == 1
