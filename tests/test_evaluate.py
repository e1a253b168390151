"""evaluate.py: estimators against brute force and known truths; the whole script; figures."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, read_lines, run_script, write_jsonl
from ranks import on_ranks

import evaluate
import reward
from model import generate, load_model, load_tokenizer, save_model


def run(monkeypatch, *args):
    return run_script(evaluate, monkeypatch, *args)


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
    samples, scores = [["a", "b", "c", "d"]], [[1.0, 3.0, 2.0, 2.0]]
    assert evaluate.choose_best(samples, scores, 2) == [["b", "c"]]
    assert evaluate.choose_best(samples, scores, 4) == [["b"]]
    unended = [[math.nan, -3.0, math.nan, math.nan]]
    assert evaluate.choose_best(samples, unended, 2) == [["a", "c"]]  # -3 is the floor of all
    assert evaluate.fill_missing([[[0.5, math.nan]], [[-2.0]], [[math.nan]]]) == [
        [[0.5, -2.0]],
        [[-2.0]],
        [[-2.0]],
    ]
    assert evaluate.fill_missing([[[math.nan, 3.0]]]) == [[[-1.0, 3.0]]]


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
    length one half, its interval covering that in 92 to 98% of 500 simulations of hard verdicts."""
    rng, inside, raw, controlled = np.random.default_rng(0), 0, [], []
    for seed in range(500):
        wins, *pairs = judged_by_length(rng, 200, 1, skewed=False)
        wins = (rng.random(200) < wins).astype(float)
        rate, low, high = evaluate.length_controlled_win_rate(wins, *pairs, 100, seed)
        inside += low <= 0.5 <= high
        raw.append(wins.mean())
        controlled.append(rate)
    print(f"raw {np.mean(raw):.3f}, controlled {np.mean(controlled):.3f}, coverage {inside / 500}")
    assert np.mean(raw) > 0.58 and np.mean(controlled) == pytest.approx(0.5, abs=0.01)
    assert 0.92 <= inside / 500 <= 0.98


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


def test_distinct():
    """methods.md I 23: two texts, seven words, three different; five pairs, three different."""
    texts = ["a b a b", "a b c"]
    assert evaluate.distinct(texts, 1) == pytest.approx(0.428571, abs=1e-6)
    assert evaluate.distinct(texts, 2) == pytest.approx(0.6)
    assert evaluate.distinct(["", "a"], 2) == 0.0


def test_entropy_of_words():
    """The same texts: a, b three times each of seven words, c once; pairs ab x3, ba, bc of five."""
    texts = ["a b a b", "a b c"]
    words = [3 / 7, 3 / 7, 1 / 7]
    expected = -sum(p * math.log(p) for p in words)
    assert evaluate.gram_entropy(texts, 1) == pytest.approx(expected)
    assert evaluate.gram_entropy(texts, 2) == pytest.approx(0.950271, abs=1e-6)
    assert evaluate.gram_entropy(["", "a"], 2) == evaluate.gram_entropy(["a"], 1) == 0.0


# --- KL -------------------------------------------------------------------------------------------


def evaluation_config(**settings):
    return evaluate.Config(**settings)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_and_entropy_are_exact(small_gpt, temperature):
    """Every response of up to 3 tokens, with its probability: the means of `kl_and_entropy` are the
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
    cfg, cpu = evaluation_config(micro_batch_size=5), torch.device("cpu")
    arguments = (temperature, cfg, cpu, 0, 1)
    (kl,), (entropy,) = evaluate.kl_and_entropy(policy, reference, samples, *arguments)
    assert np.exp(p) @ kl == pytest.approx(np.exp(p) @ (p - q), abs=1e-9)
    assert np.exp(p) @ entropy == pytest.approx(-np.exp(p) @ p, abs=1e-9)
    greedy = (0.0, *arguments[1:])
    (kl,), (entropy,) = evaluate.kl_and_entropy(policy, reference, samples, *greedy)
    assert kl == pytest.approx(-q, abs=1e-9) and set(entropy) == {0.0}
    (zero,), _ = evaluate.kl_and_entropy(policy, policy, samples, 1.0, *arguments[1:])
    assert zero == pytest.approx(np.zeros(len(zero)), abs=1e-12)


def test_equal_texts_are_ties_whoever_wrote_them(small_gpt):
    """Two policies say much the same, in other company: a reward model scores a text once."""
    statistics = {"reward_mean": 0.0, "reward_std": 1.0, "score_transform": "identity"}
    model = small_gpt(scalar_head=True, initializer_range=1.0)
    judge = "model", model, None, statistics, {}
    rng = np.random.default_rng(0)

    def response(length):
        return {"ids": rng.integers(1, 50, length).tolist(), "ended": True}

    prompts = [rng.integers(1, 50, 4 + n).tolist() for n in range(8)]
    shared = [response(3 + n) for n in range(8)]
    ours = [[response(9), same, same] for same in shared]
    theirs = [[same, response(2 + n)] for n, same in enumerate(shared)]
    for table in (ours, theirs):
        for prompt, some in zip(prompts, table, strict=True):
            some[:] = [sample | {"prompt_ids": prompt} for sample in some]
    device, none = torch.device("cpu"), evaluate.nullcontext()
    cfg = evaluate.Config(micro_batch_size=1)
    a, b = (
        evaluate.judge_samples(judge, prompts, table, cfg, device, none, 0, 1)
        for table in (ours, theirs)
    )
    assert [row[1] for row in a] == [row[2] for row in a] == [row[0] for row in b]
    assert len(judge[-1]) == 24 and len({row[1] for row in a}) == 8


def test_samples_are_those_of_generate(small_gpt, tokenizer):
    """Ids, texts and endings in the order of the prompts, K to each."""
    model = small_gpt(vocab_size=tokenizer.n_vocab)
    prompts = [{"prompt": text} for text in ("My car. My lamp.", "What?", "I feel sad.")]
    cfg, cpu = evaluation_config(max_new_tokens=5, micro_batch_size=1), torch.device("cpu")
    found = evaluate.sample_policy(model, tokenizer, prompts, 2, 0.0, 7, 90, cfg, cpu, 0, 1)
    for line, some in zip(prompts, found, strict=True):
        ids = tokenizer.encode_ordinary(line["prompt"])
        tokens, mask = generate(model, [ids], 5, temperature=0, eos=tokenizer.eot_token)
        assert len(some) == 2 and some[0]["prompt_ids"] == ids
        assert some[0]["ids"] == some[1]["ids"] == tokens[0][mask[0]].tolist()


# --- the whole script -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(toy_data, policy_run, tokenizer, tmp_path_factory):
    """A folder with two policies, a reward model, gold that also compares, 24 prompts."""
    folder = tmp_path_factory.mktemp("setting")
    lines = (toy_data / "prompts_test.jsonl").read_text().splitlines(keepends=True)[:24]
    (folder / "prompts.jsonl").write_text("".join(lines))
    torch.manual_seed(0)
    policy = evaluate.load_policy(policy_run, "cpu")[0]
    model = reward.add_scalar_head(policy)
    statistics = {"reward_mean": 0.1, "reward_std": 1.2, "score_transform": "identity"}
    save_model(folder / "reward", model, tokenizer, {"stage": "reward"} | statistics)
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
    parts = sft["parts"]
    assert parts["harmful"]["harmless"] == 1 and "harmless" not in parts["summary"]
    rows = report["by_task"]["gold"]
    assert set(rows) == {"summary", "benign", "harmful"}
    assert rows["summary"][first]["over_first"][0] == 0
    scores = [found[other]["score"][0] for found in rows.values()]
    assert min(scores) <= means[0] <= max(scores)
    gap = rows["benign"][other]["score"][0] - rows["benign"][first]["score"][0]
    assert rows["benign"][other]["over_first"][0] == pytest.approx(gap)
    lines = read_lines(folder / "out/samples-0.jsonl")
    assert lines[0]["policy"] == str(policy_run) and len(lines[0]["responses"]) <= 4
    words = [len(response.split()) for line in lines for response in line["responses"]]
    assert sft["words"] == pytest.approx(sum(words) / 96)
    curve = report["best_of_n"]
    assert [row["n"] for row in curve] == [1, 2, 3, 4] and curve[0]["gold_gain"][0] == 0
    assert curve[3]["proxy"][0] > curve[0]["proxy"][0]
    text = (folder / "all.md").read_text()
    for words in ("## Win rates by gold", "## Best of n", "## Side by side", "at most 0.64", "Elo"):
        assert words in text
    assert "(no EOS)" in text and "The order of the two decided in 100.0%" in text
    heads = text.split("| policy |")[1].split("\n")[0]
    assert heads.count("|") == text.split("| policy |")[1].split("\n")[2].count("|") - 2
    for figure in ("out/score_by_kl.png", "out/best_of_n.png"):
        assert f"]({figure})" in text and (folder / figure).stat().st_size > 1000


def test_two_ranks_report_the_same(setting, tmp_path):
    folder, args = setting
    argv = ["evaluate.py", *args, "--out_dir", str(tmp_path / "two")]
    done = on_ranks("evaluate", f"sys.argv = {argv!r}\nevaluate.main()\n")
    assert done.returncode == 0, done.stderr[-3000:]
    one = json.loads((folder / "out/report.json").read_text())
    two = json.loads((tmp_path / "two/report.json").read_text())
    assert (folder / "out/samples-1.jsonl").read_bytes() == (
        tmp_path / "two/samples-1.jsonl"
    ).read_bytes()
    for name, found in one["policies"].items():
        assert two["policies"][name]["kl"] == pytest.approx(found["kl"], abs=1e-5)
        for by, value in found["scores"].items():
            assert two["policies"][name]["scores"][by] == pytest.approx(value, abs=1e-5)
    assert two["win_rate"]["gold"] == one["win_rate"]["gold"]


def test_a_file_of_comparisons_judges(setting, policy_run, tmp_path, monkeypatch):
    """Both orders of one prompt are one vote; comparisons of others don't count."""
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
        (["--max_new_tokens", "96"], "leaves no room in 96 positions"),
        (["--best_of_n", "4", "--policies", "x@temperature=0"], "expected a first policy that"),
        (["--policies", "x@temperature=0@best_of=4:y"], "needs a temperature above 0"),
        (["--num_samples", "0"], "--num_samples, --max_new_tokens: expected more than 0"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl:0: file: can't be read"),
    ],
)
def test_bad_settings(setting, tmp_path, monkeypatch, capsys, more, message):
    _, args = setting
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_flags_of_the_table(setting, tmp_path, monkeypatch, capsys):
    """KL to another reference than the first policy; the parts asked for; a finished run stands."""
    folder, args = setting
    more = ["--reference", folder / "other", "--show", "words,harmless,nothing", "--num_shown", 1]
    more += ["--best_of_n", 0, "--out_dir", tmp_path / "out", "--resume"]
    assert run(monkeypatch, *args, *more) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    first, other, *_ = report["policies"]
    assert report["policies"][first]["kl"][0] > 0.1
    assert report["policies"][other]["kl"][0] == pytest.approx(0, abs=1e-6)
    text = (tmp_path / "out/report.md").read_text()
    assert "| words | harmless |" in text and text.count("| policy | response |") == 1
    capsys.readouterr()
    assert run(monkeypatch, *args, *more) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_a_constant_judge(setting, tmp_path, monkeypatch):
    """0.7 for everything: sums of 0.7 round, and the interval must not turn inside out."""
    _, args = setting
    (tmp_path / "flat.py").write_text("def score(prompt, response, **fields): return 0.7\n")
    more = ["--gold", tmp_path / "flat.py", "--judges", "", "--best_of_n", 0]
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "out", *more) == 0
    assert (tmp_path / "out/report.md").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("def explain(p, r, **f): return {'note': 'text'}", "explain: ValueError"),
        ("def explain(p, r, **f): return {'x': float('inf')}", "explain: {'x': inf}"),
        ("def compare(p, a, b, **f): return a[9999]", "compare: IndexError"),
        ("def compare(p, a, b, **f): return 7", "compare: expected a probability, got 7"),
    ],
)
def test_judges_that_fail(setting, tmp_path, monkeypatch, capsys, text, message):
    _, args = setting
    (tmp_path / "bad.py").write_text(f"def score(p, r, **f): return 1\n{text}\n")
    more = ["--gold", tmp_path / "bad.py", "--judges", "", "--best_of_n", 0]
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "out", *more) == 2
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
    assert "another tokenizer or vocabulary" in capsys.readouterr().err
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


# --- learning curves ------------------------------------------------------------------------------


def test_plot(tmp_path, monkeypatch, capsys):
    for name, slope in [("a", 1.0), ("b", 2.0)]:
        (tmp_path / name).mkdir()
        lines = [{"step": i, "seconds": 1.0, "loss": slope / (i + 1)} for i in range(5)]
        write_jsonl(tmp_path / name / "metrics.jsonl", [*lines, {"step": 5, "eval_loss": slope}])
    out = tmp_path / "curves.png"
    assert run(monkeypatch, "plot", tmp_path / "a", tmp_path / "b", "--out", out) == 0
    drawn = out.exists() and out.stat().st_size > 1000
    assert drawn or "matplotlib is not installed" in capsys.readouterr().out
    assert run(monkeypatch, "plot", tmp_path / "a", "--metrics", "reward", "--out", out) == 2
    assert "reward: in no run; there are eval_loss, loss" in capsys.readouterr().err
    assert run(monkeypatch, "plot") == 2
    assert run(monkeypatch, "plot", tmp_path) == 2
    assert "metrics.jsonl:0: file: can't be read" in capsys.readouterr().err


# --- experiments with reward models ---------------------------------------------------------------


def reward_run(folder, name, pairs, parameters, gold, labels, margin="none", seed=0):
    (folder / name).mkdir()
    settings = {"seed": seed, "margin": margin, "out_dir": name}
    (folder / name / "args.json").write_text(json.dumps({"settings": settings}))
    rate = {"model": [gold, None, None]}
    report = {"epoch_pairs": pairs, "parameters": parameters, "gold": {"all": rate}}
    report |= {"labels": {"all": {"model": [labels, None, None]}}, "bimodality": 0.4}
    grades = {str(g): {"rate": [labels + g / 10, None, None], "pairs": 9} for g in range(4)}
    report |= {"by_grade": grades, "calibration": {"ece": 0.01}}
    (folder / name / "report.json").write_text(json.dumps(report))
    return str(folder / name)


def test_least_squares():
    """Against numpy's polynomial fit and its covariance; in simulations the standard errors are
    the estimates' spread."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 5, 30)
    y = 2 - 0.5 * x + rng.normal(0, 0.3, 30)
    found, errors = evaluate.least_squares(np.stack([np.ones(30), x], 1), y)
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    assert found == pytest.approx([intercept, slope])
    assert errors == pytest.approx(np.sqrt(np.diag(covariance))[::-1])
    with pytest.raises(ValueError, match="2 runs do not determine 2"):
        evaluate.least_squares([[1, 2], [1, 3]], [1, 2])
    with pytest.raises(ValueError, match="do not determine"):
        evaluate.least_squares([[1, 2], [1, 2], [1, 2]], [1, 2, 3])


def test_over_seeds():
    """Three seeds have 2 degrees of freedom; the interval covers the mean in 95%."""
    values = [0.7, 0.72, 0.77]
    half = 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    mean = np.mean(values)
    assert evaluate.over_seeds(values) == pytest.approx([mean, mean - half, mean + half])
    assert evaluate.over_seeds([0.5]) == [0.5, None, None]
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    covered = [low <= 0 <= high for _, low, high in map(evaluate.over_seeds, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_scaling(tmp_path, monkeypatch, capsys):
    """Slopes that were put in come out, and the figure is drawn."""
    rng, runs = np.random.default_rng(0), []
    for parameters in (2**18, 2**20, 2**22):
        for pairs in (2**12, 2**14, 2**16):
            for seed in range(3):
                gold = 0.2 + 0.02 * math.log2(pairs) + 0.015 * math.log2(parameters)
                gold += rng.normal(0, 0.002)
                name = f"r{parameters}-{pairs}-{seed}"
                args = (pairs + 10 * seed, parameters, gold, gold - 0.1)
                runs.append(reward_run(tmp_path, name, *args, seed=seed))
    out = tmp_path / "figures/scaling"
    assert run(monkeypatch, "scaling", "--runs", ",".join(runs), "--out", out) == 0
    result = json.loads((tmp_path / "figures/scaling.json").read_text())
    fit = result["fits"]["gold"]
    assert abs(fit["per_doubling_of_data"] - 0.02) < 3 * fit["standard_errors"][1] < 0.002
    assert abs(fit["per_doubling_of_model"] - 0.015) < 3 * fit["standard_errors"][2] < 0.002
    assert len(result["cells"]) == 9 and all(cell["seeds"] == 3 for cell in result["cells"])
    table = (tmp_path / "figures/scaling.md").read_text()
    assert table.count("\n| ") == 9 and "data +2.0" in table and "model +1.5" in table
    printed = capsys.readouterr().out
    drawn = (tmp_path / "figures/scaling.png").exists()
    assert drawn or "matplotlib is not installed" in printed
    assert run(monkeypatch, "scaling", "--runs", ",".join(runs[:3]), "--out", out) == 0
    assert "no slopes: 3 runs do not determine 3" in capsys.readouterr().out


def test_margins(tmp_path, monkeypatch, capsys):
    runs = []
    for i, margin in enumerate(("none", "small", "large")):
        for seed in range(3):
            args = (100, 1000, 0.7 + 0.01 * i, 0.6 + 0.001 * seed)
            runs.append(reward_run(tmp_path, f"{margin}{seed}", *args, margin, seed))
    out = tmp_path / "margins"
    assert run(monkeypatch, "margins", "--runs", ",".join(runs), "--out", out) == 0
    lines = (tmp_path / "margins.md").read_text().splitlines()
    assert len(lines) == 5 and lines[2].startswith("| none | 3 | 0.901 [")
    result = json.loads((tmp_path / "margins.json").read_text())["margins"]
    assert result["large"]["gold, all"] == pytest.approx([0.72, 0.72, 0.72])
    assert result["small"]["labels, mean of grades"][0] == pytest.approx(0.751)


def test_bad_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "sft").mkdir()
    for name in ("args", "report"):
        (tmp_path / f"sft/{name}.json").write_text("{}")
    for args, message in [
        (["scaling", "--runs", tmp_path / "unfinished"], "unfinished: not a finished run"),
        (["margins", "--runs", tmp_path / "sft"], "report.json: not of reward.py"),
        (["scaling"], "--runs: expected run directories"),
        (["plots"], "unrecognized arguments: plots"),
    ]:
        assert run(monkeypatch, *args) == 2
        assert message in capsys.readouterr().err
    for command, config in [
        ([], evaluate.Config),
        (["plot"], evaluate.PlotConfig),
        (["scaling"], evaluate.ScalingConfig),
    ]:
        assert run(monkeypatch, *command, "--help") == 0
        text = capsys.readouterr().out
        assert all(f"--{name}" in text for name in vars(config()))


# --- several runs in several seeds ----------------------------------------------------------------


def test_the_laws_of_over_optimisation():
    """Card C8's numbers."""
    points = list(zip([0.5, 1, 1.5, 2], [0.28, 0.5, 0.66, 0.74], strict=True))
    law = evaluate.gao_law(points, best_of=True)
    assert law == pytest.approx((0.631871, 0.130323), abs=1e-6)
    law = evaluate.gao_law(points, best_of=False)
    assert law == pytest.approx((0.491466, 0.164026), abs=1e-6)
    exact = [(d, d * (0.9 - 0.3 * math.log(d))) for d in (0.3, 1, 2.2, 3)]
    assert evaluate.gao_law(exact, best_of=False) == pytest.approx((0.9, 0.3), abs=1e-9)
    with pytest.raises(ValueError, match=r"distances of 1.00 to 1.20 do not tell a from b"):
        evaluate.gao_law([(1.0, 0.5), (1.1, 0.6), (1.2, 0.55)], best_of=False)


@pytest.fixture
def groups_of_runs(tmp_path):
    """Runs a-0, a-1, b-0, b-1 as ppo.py leaves them, and an evaluation with a best-of-n curve."""
    for name, lift in [("a-0", 1.0), ("a-1", 1.2), ("b-0", 2.0), ("b-1", 2.4)]:
        run = tmp_path / name
        run.mkdir()
        lines = [{"step": 0, "eval_kl": -0.01, "eval_gold": 1.0, "eval_proxy": 0.0}]
        for step in (1, 2, 3):
            lines.append({"step": step, "score": 0.5, "kl": 9.0})  # of a rollout: no evaluation
            d = lift * step
            found = {"eval_kl": d**2, "eval_gold": 1 + d * (1.5 - 0.5 * math.log(d))}
            lines.append({"step": step, "eval_proxy": d} | found)
            lines.append({"step": step, "eval_nll": 0.3})
        write_jsonl(run / "metrics.jsonl", lines)
        side = {"policy": {"all": {"gold": [lift, 0, 9], "kl": [4 * lift**2, 0, 9], "count": 5}}}
        side |= {"win_rate": {"gold": [0.5 + lift / 10, 0, 1]}, "distinct_2": [0.3, 0.4]}
        report = {"seconds": 60 * lift, "sampled": side, "greedy": side}
        (run / "report.json").write_text(json.dumps(report))
    (tmp_path / "evaluation").mkdir()
    policy = {"kl": [1.0, 0.9, 1.1], "scores": {"gold": [3.0, 2, 4]}, "distinct_1": 0.1}
    rows = [
        {"n": n, "kl": math.log(n), "gold": [n, 0, 9], "proxy": [n / 2, 0, 9]} for n in (1, 2, 3, 4)
    ]
    third = {"kl": [2.0, 1.9, 2.1], "scores": {"gold": [4.0, 3, 5]}, "distinct_1": 0.2}
    report = {"policies": {"sft": policy, "x@temperature=0": policy | {"kl": None}, "y": third}}
    report |= {"win_rate": {"gold": {"x@temperature=0": {"sft": [0.7, 0.6, 0.8]}}}}
    report |= {"best_of_n": rows}
    (tmp_path / "evaluation/report.json").write_text(json.dumps(report))
    return tmp_path


def test_curves_of_groups(groups_of_runs, monkeypatch, capsys):
    at, out = groups_of_runs, groups_of_runs / "figures/curves"
    groups = [f"one={at}/a-0,{at}/a-1", f"two={at}/b-0,{at}/b-1"]
    groups += [f"best of n={at}/evaluation#best_of"]
    args = ["--x", "sqrt_kl", "--y", "proxy,gold", "--fit", "gold", "--out", out]
    args += ["--y_labels", "BLEU", "--title", "Two groups"]
    assert run(monkeypatch, "curves", *groups, *args) == 0
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["one"]["steps"] == [0, 1, 2, 3]
    assert [v[0] for v in found["one"]["proxy"]] == pytest.approx([0, 1.1, 2.2, 3.3])
    half = 12.706 * 0.1  # Student's t for two seeds, 0.2 apart
    assert found["one"]["proxy"][1][1:] == pytest.approx([1.1 - half, 1.1 + half])
    assert found["one"]["sqrt_kl"][0] == [0, 0, 0]  # an estimate below 0
    law = found["two"]["laws"]["gold"]
    assert law["a"] == pytest.approx([1.5] * 3) and law["b"] == pytest.approx([0.5] * 3)
    assert found["best of n"]["gold"] == [[n, None, None] for n in (1, 2, 3, 4)]
    text = out.with_suffix(".md").read_text()
    assert "one: gold gained = d (a - b log d): a 1.500 [1.500, 1.500], b 0.500" in text
    assert "best of n: gold gained = d (a - b d)" in text
    assert run(monkeypatch, "curves", groups[0], "--y", "nll", "--out", out) == 2
    assert "a-0: no nll in what it has logged" in capsys.readouterr().err
    assert run(monkeypatch, "curves", groups[0], "--fit", "gold", "--out", out) == 2
    assert "--fit: the laws are of --x sqrt_kl" in capsys.readouterr().err


def test_points_and_rows_of_groups(groups_of_runs, monkeypatch, capsys):
    at, out = groups_of_runs, groups_of_runs / "figures/found"
    groups = [f"PPO:1={at}/a-0,{at}/a-1", f"PPO:2={at}/b-0,{at}/b-1"]
    groups += [f"n:2={at}/evaluation#best_of=2", f"SFT={at}/evaluation#sft"]
    assert run(monkeypatch, "points", *groups, "--x", "sqrt_kl", "--y", "gold", "--out", out) == 0
    found = json.loads(out.with_suffix(".json").read_text())["columns"]
    assert found["PPO:1"]["gold"][0] == pytest.approx(1.1)
    assert found["PPO:2"]["sqrt_kl"][0] == pytest.approx(4.4)
    assert found["n:2"] == {"sqrt_kl": [math.log(2) ** 0.5, None, None], "gold": [2, None, None]}
    assert "| SFT | 1 | 1.000 | 3.000 |" in out.with_suffix(".md").read_text()

    named = [
        f"PPO:0.5={at}/a-0",
        f"x:0={at}/evaluation#x@temperature=0",
        f"x:1={at}/evaluation#sft",
    ]
    how = ["--x", "label", "--x_label", "temperature", "--y", "wins", "--out", out]
    assert run(monkeypatch, "points", *named, *how) == 0
    found = json.loads(out.with_suffix(".json").read_text())["columns"]
    assert [found[n]["wins"][0] for n in ("PPO:0.5", "x:0", "x:1")] == pytest.approx(
        [0.6, 0.7, 0.5]
    )
    assert found["PPO:0.5"]["label"][0] == 0.5

    named = [f"y={at}/evaluation#y", "--columns", "kl,gold,distinct_1", "--out", out]
    assert run(monkeypatch, "rows", *named) == 0
    found = json.loads(out.with_suffix(".json").read_text())["columns"]["y"]
    assert [found[name][0] for name in ("kl", "gold", "distinct_1")] == [2, 4, 0.2]

    columns = ["--columns", "gold,seconds,greedy_wins", "--out", out]
    assert run(monkeypatch, "rows", *groups[:2], *columns) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    more = result["over_first"]["PPO:2"]["seconds"]  # 60 and 72, run by run
    assert more == pytest.approx([66, 66 - 12.706 * 6, 66 + 12.706 * 6])
    assert "seconds: over PPO:1's" in out.with_suffix(".md").read_text()
    found = result["columns"]
    assert found["PPO:2"]["seconds"][0] == pytest.approx(132)
    assert found["PPO:1"]["greedy_wins"][0] == pytest.approx(0.61)
    for args, message in [
        (["rows", *groups, "--columns", "seconds"], "n:2"),
        (["rows", "PPO"], "PPO: expected LABEL=RUN,RUN"),
        (["rows", "a=x", "a=y"], "a=y: expected LABEL=RUN,RUN,... and no label twice"),
        (["rows"], "expected groups of runs"),
        (["rows", f"a={at}/nowhere"], "nowhere: report.json: nothing to compare"),
        (["points", f"a={at}/a-0", "--x", "label"], "a: with --x label expected METHOD:NUMBER"),
        (["rows", f"a={at}/evaluation#best_of=9"], "nothing to compare: KeyError"),
        (["curves", f"a={at}/a-0#best_of"], "a-0#best_of: report.json: no best-of-n curve"),
        (["curves", f"a={at}/nowhere"], "nowhere/metrics.jsonl:0: file: can't be read"),
    ]:
        assert run(monkeypatch, *args, "--out", out) == 2
        error = capsys.readouterr().err
        assert message in error.replace("evaluation#best_of=2: no seconds", "n:2"), error


def test_by_another_field_and_several_of_the_best(tmp_path, monkeypatch, policy_run, toy_data):
    """--by kind tells scores apart by the prompts' kind; --best_of_samples 2 chooses twice."""
    torch.manual_seed(3)
    model = reward.add_scalar_head(load_model(policy_run))
    statistics = {"reward_mean": 0.1, "reward_std": 1.2, "score_transform": "identity"}
    tokenizer = load_tokenizer(policy_run)
    save_model(tmp_path / "reward", model, tokenizer, {"stage": "reward"} | statistics)
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
    assert set(report["policies"][best]["parts"]) == {"all", "upper", "lower"}
    assert report["policies"][best]["samples"] == 16
    found = report["policies"]
    assert {"distinct_2_a_prompt", "entropy_2_a_prompt"} <= set(found[best])
    assert found[best]["entropy"] is None and found[str(policy_run)]["entropy"][0] > 0
    header = [x for x in (tmp_path / "out/report.md").read_text().splitlines() if "entropy" in x]
    assert header[0].startswith("| policy | entropy, nats | distinct 1 |")
