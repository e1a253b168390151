"""annotate.py: the laws that annotators follow, the terminal, agreement, ratings."""

import itertools
import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import convert
import numpy as np
import pytest
from conftest import ROOT, read_lines, run_script, write_jsonl
from ranks import on_ranks

import annotate
import run as a_run
from feedback import load_python

GOLD = (
    "def score(prompt, response, **fields):\n"
    "    return float(response.split()[0])\n"  # the response says what it is worth
)


def run(monkeypatch, *args):
    return run_script(annotate, monkeypatch, *args)


@pytest.fixture
def gold(tmp_path):
    (tmp_path / "gold.py").write_text(GOLD)
    return tmp_path / "gold.py"


def samples(path, count, values=(3, 1, 0, -2)):
    """`count` prompts, whose responses say what they are worth."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        order = rng.permutation(values).tolist()
        texts = [f"{v} points, {k}" for k, v in enumerate(order)]
        record = {"prompt": f"Prompt {i}?", "responses": texts}
        records.append(record | {"task": "ab"[i % 2], "policy": [f"p{v}" for v in order]})
    return write_jsonl(path, records)


def judge_all(tmp_path, monkeypatch, gold, count, *more, values=(3, 1, 0, -2)):
    source = samples(tmp_path / "samples.jsonl", count, values)
    args = ["--samples", source, "--num_prompts", 0, "--gold", gold, "--device", "cpu"]
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "out", "--overwrite", *more) == 0
    return tmp_path / "out"


def worth(text):
    return float(text.split()[0])


# --- sampling -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampling(toy_data, policy_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    lines = (toy_data / "prompts_train.jsonl").read_text().splitlines(keepends=True)[:30]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "gold.py").write_text("def score(prompt, response, **fields): return len(response)\n")
    args = ["--prompts", folder / "prompts.jsonl", "--gold", folder / "gold.py", "--device", "cpu"]
    args += ["--policy", f"{policy_run},{policy_run}@temperature=0.5", "--num_responses", 5]
    args += ["--max_new_tokens", 12, "--micro_batch_size", 4]
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *args, "--out_dir", folder / "one") == 0
    return folder, list(map(str, args))


def test_samples_of_two_policies(sampling, policy_run, tokenizer, capsys):
    """K responses dealt out to both, none empty, none twice, each with who wrote it; the prompts'
    fields pass through."""
    folder, _ = sampling
    prompts = {line["prompt"]: line for line in read_lines(folder / "prompts.jsonl")}
    found = read_lines(folder / "one/samples.jsonl")
    assert 20 < len(found) <= 30
    names = {str(policy_run), f"{policy_run}@temperature=0.5"}
    shares = []
    for line in found:
        assert line["task"] == prompts[line["prompt"]]["task"] and "reference" in line
        assert 2 <= len(line["responses"]) <= 5 == 5
        assert len(set(line["responses"])) == len(line["responses"]) == len(line["policy"])
        assert all(response.strip() for response in line["responses"])
        assert set(line["policy"]) <= names
        shares.append(sum(name == str(policy_run) for name in line["policy"]))
    assert max(shares) == 3 and not (folder / "one/samples.partial.jsonl").exists()
    ranked = read_lines(folder / "one/rankings.jsonl")
    assert {line["prompt"] for line in ranked} == {line["prompt"] for line in found}
    args = json.loads((folder / "one/args.json").read_text())
    assert any("model.safetensors" in name for name in args["inputs"][str(policy_run)])


def test_sampling_is_the_same_on_two_ranks(sampling, tmp_path):
    folder, args = sampling
    argv = ["annotate.py", *args, "--out_dir", str(tmp_path / "two")]
    done = on_ranks("annotate", f"sys.argv = {argv!r}\nannotate.main()\n")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("samples.jsonl", "rankings.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (folder / "one" / name).read_bytes()


def test_sampling_resumes_to_the_same_files(sampling, tmp_path, monkeypatch, capsys):
    """Told to stop in its fourth chunk, then killed while it wrote a line of the sixth."""
    folder, args = sampling
    args = [*args, "--out_dir", tmp_path / "run", "--resume"]
    real, calls = annotate.generate, []

    def generate(*args, **kwargs):
        calls.append(1)
        a_run.stop_signals += [1] * (len(calls) == 7)  # two calls a chunk
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(annotate, "generate", generate)
        assert run(patch, *args) == 128 + signal.SIGTERM
    assert "--resume goes on" in capsys.readouterr().out
    partial = tmp_path / "run/samples.partial.jsonl"
    assert len(read_lines(partial)) == 16
    with open(partial, "a") as file:
        file.write('[3, []]\n[4, [["half')
    assert run(monkeypatch, *args) == 0
    for name in ("samples.jsonl", "rankings.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "one" / name).read_bytes()
    assert run(monkeypatch, *args) == 0 and "this run is finished" in capsys.readouterr().out
    assert run(monkeypatch, *args, "--seed", 1) == 2


def test_greedy_responses_are_equal_and_nothing_to_compare(sampling, policy_run, tmp_path, capsys):
    _, args = sampling
    with pytest.MonkeyPatch.context() as patch:
        more = ["--policy", f"{policy_run}@temperature=0", "--num_prompts", 3]
        assert run(patch, *args, *more, "--out_dir", tmp_path / "run") == 2
    told = capsys.readouterr()
    assert "of 15 responses dropped" in told.out and "3 prompts had fewer than two" in told.out
    assert "no prompt has two responses to compare" in told.err
    assert not (tmp_path / "run/samples.jsonl").exists()


# --- simulated annotators -------------------------------------------------------------------------


def test_noise_scale():
    """Against a simulation with Gumbel noise, of gaps of several sizes and annotators."""
    rng = np.random.default_rng(0)
    gaps, factors = rng.uniform(0.5, 4, 4000), rng.choice([0.5, 1.5], 4000)
    for target in (0.6, 0.75, 0.9):
        scale = annotate.noise_scale(gaps, factors, target)
        assert annotate.agreement_at(scale, gaps, factors) == pytest.approx(target, abs=1e-9)
        noise = scale * factors * rng.gumbel(size=(2, 200, 4000))
        assert np.mean(gaps + noise[0] > noise[1]) == pytest.approx(target, abs=0.003)
    assert annotate.noise_scale(gaps, factors, 1.0) < 0.05
    with pytest.raises(ValueError, match=r"agree in 0\.500"):
        annotate.noise_scale(np.array([1.0, -1.0]), np.ones(2), 0.75)


def test_rankings_follow_plackett_luce(tmp_path, monkeypatch, gold):
    """One annotator without bias, three responses: each of the six orders as often as the law
    says, by chi-squared (5 degrees of freedom, 0.1%: 20.5)."""
    more = ["--annotators", 1, "--noise_spread", 0, "--bias", 0, "--num_responses", 3]
    out = judge_all(tmp_path, monkeypatch, gold, 6000, *more, values=(2, 1, -1))
    gaps = np.array([1.0, 2.0, 3.0])
    scale = annotate.noise_scale(gaps, np.ones(3), 0.75)
    counts = dict.fromkeys(itertools.permutations((2, 1, -1)), 0)
    for line in read_lines(out / "rankings.jsonl"):
        counts[tuple(int(worth(r)) for r in line["responses"])] += 1
        assert line["policy"] == [f"p{int(worth(r))}" for r in line["responses"]]
        assert line["scores"] == sorted(line["scores"], reverse=True)
    total = 0.0
    for order, count in counts.items():
        weights = np.exp(np.array(order) / scale)
        p = weights[0] / weights.sum() * weights[1] / weights[1:].sum()
        total += (count - 6000 * p) ** 2 / (6000 * p)
    assert total < 20.5


@pytest.mark.parametrize("output", ["rankings", "comparisons"])
def test_agreement_is_what_was_asked_for(tmp_path, monkeypatch, gold, capsys, output):
    """Five annotators with noise and bias of their own: 0.75 all together, apart from ties; the
    clearer the grade, the oftener right; they differ from one another."""
    more = ["--output", output, "--overlap", 0.1, "--bias", 0.1]
    more += ["--pairs", 3] if output == "comparisons" else []
    out = judge_all(tmp_path, monkeypatch, gold, 3000, *more, values=(3, 1, 1, -2))
    report = json.loads((out / "report.json").read_text())
    rate, low, high = report["with_gold"]["all"]["rate"]
    assert low < 0.75 < high and high - low < 0.03 and abs(rate - 0.75) < 0.012
    assert report["gold_ties"] > 0.1 * report["with_gold"]["all"]["pairs"]
    grades = [report["with_gold"][grade]["rate"][0] for grade in annotate.GRADES]
    assert grades == sorted(grades) and grades[0] < 0.6 and grades[-1] > 0.85
    each = [report["with_gold"][f"annotator simulated-{a}"]["rate"][0] for a in range(5)]
    assert max(each) - min(each) > 0.03
    between = report["between_annotators"]["all"]
    assert 0.55 < between["rate"][0] < 0.75 and between["pairs"] > 3000
    convert.check(out / f"{output}.jsonl")
    assert f"{output}, {len(read_lines(out / f'{output}.jsonl'))} lines" in capsys.readouterr().out
    lines = read_lines(out / f"{output}.jsonl")
    assert {line["annotator"] for line in lines} == {f"simulated-{a}" for a in range(5)}
    if output == "comparisons":
        assert {line["margin"] for line in lines} == {0, 1, 2, 3}
        assert all(line["policy"][0] == f"p{int(worth(line['chosen']))}" for line in lines)
        assert all("responses" not in line and "task" in line for line in lines)


def test_choose_pairs():
    rng = np.random.default_rng(0)
    assert annotate.choose_pairs(rng, 4, 0) == list(itertools.combinations(range(4), 2))
    assert annotate.choose_pairs(rng, 3, 9) == [(0, 1), (0, 2), (1, 2)]
    drawn = [annotate.choose_pairs(rng, 4, 2) for _ in range(600)]
    assert all(len(set(pairs)) == 2 for pairs in drawn)
    counts = [sum(pair in pairs for pairs in drawn) for pair in itertools.combinations(range(4), 2)]
    assert min(counts) > 150 and max(counts) < 250


# --- the terminal ---------------------------------------------------------------------------------


class Keys:
    """Stands for the keyboard: keys that are looked up by what is on the screen."""

    def __init__(self, monkeypatch, keys):
        self.keys, self.screens = list(keys), []
        monkeypatch.setattr(annotate, "read_key", lambda: self.keys.pop(0) if self.keys else "")


@pytest.fixture
def person(tmp_path, monkeypatch, capsys):
    """person(keys, *flags): a sitting at the terminal; returns the lines judged, what was seen."""
    source = samples(tmp_path / "samples.jsonl", 4, (3, 1, 0))

    def sit(keys, *more, status=0):
        Keys(monkeypatch, keys)
        args = ["--samples", source, "--annotator", "terminal", "--name", "ada", "--seed", 1]
        args += ["--out_dir", tmp_path / "out", "--resume", *more]
        assert run(monkeypatch, *args) == status
        path = next(path for path in (tmp_path / "out").glob("*s.jsonl"))
        return read_lines(path), capsys.readouterr().out

    return sit


def shown(screen):
    """The first screen's prompt and its responses as they were numbered."""
    lines = [line.strip() for line in screen.splitlines() if line.strip()]
    prompt = next(line for line in lines if line.startswith("Prompt"))
    first = lines.index(prompt) + 1
    return prompt, [lines[first + i].split(maxsplit=1)[1] for i in range(3)]


def test_a_person_ranks(person):
    lines, screen = person("31")
    prompt, responses = shown(screen)
    assert len(lines) == 1 and lines[0]["prompt"] == prompt and lines[0]["annotator"] == "ada"
    assert lines[0]["responses"] == [responses[2], responses[0], responses[1]]
    assert lines[0]["scores"] == [3, 2, 1]  # levels: a third is two below a first
    assert "0 of 4 judged" in screen and "1 of 4 judged" in screen
    assert [f"p{int(worth(r))}" for r in lines[0]["responses"]] == lines[0]["policy"]


def test_a_person_goes_on_where_they_stopped(person, tmp_path):
    first, screen = person("12q")
    assert len(first) == 1 and "1 of 4 judged" in screen
    with open(tmp_path / "out/rankings.jsonl", "a") as file:
        file.write('{"prompt": "cut off')
    lines, screen = person("1212")
    assert lines[0] == first[0] and len(lines) == 3 and "cut off" not in screen
    lines, screen = person("12")
    assert (
        len({line["prompt"] for line in lines}) == 4 and len({str(x["item"]) for x in lines}) == 4
    )
    assert (tmp_path / "out/report.json").exists()
    lines, screen = person("12")
    assert len(lines) == 4 and "this run is finished" in screen


def test_a_person_takes_back_and_puts_off(person):
    """u within a ranking takes back the last choice, at its start the last judgement; l asks again
    at the end; other keys do nothing."""
    lines, screen = person("x1u213uu")
    prompt, responses = shown(screen)
    assert lines == []  # judged 2, 1, 3; then 3 was chosen, taken back, and so was the judgement
    lines, screen = person("21uu13")
    again, responses = shown(screen)
    assert again == prompt and lines[0]["responses"] == [responses[0], responses[2], responses[1]]
    lines, screen = person("l1212q")
    later, _ = shown(screen)
    assert len(lines) == 3 and later not in [line["prompt"] for line in lines]
    lines, _ = person("12")
    assert lines[3]["prompt"] == later


def test_the_last_judgement_can_be_taken_back(person, tmp_path):
    lines, screen = person("12121212u21")
    assert len(lines) == 4 and "all are judged" in screen
    assert (tmp_path / "out/report.json").exists()
    prompt, last = lines[3]["prompt"], lines[3]["responses"]
    numbered = screen[screen.rindex(prompt) :].splitlines()
    assert next(x for x in numbered if x.strip().startswith("2 ")).endswith(last[0])


def test_a_person_calls_responses_equal(person):
    lines, screen = person("2=")
    _, responses = shown(screen)
    assert lines[0]["responses"][0] == responses[1] and lines[0]["scores"] == [2, 1, 1]
    lines, _ = person("=")
    assert lines[1]["scores"] == [1, 1, 1]


def test_a_person_compares(person):
    lines, screen = person("18a4", "--output", "comparisons")
    assert [line["margin"] for line in lines] == [3, 3, 0]
    assert all(line["policy"][0] == f"p{int(worth(line['chosen']))}" for line in lines)
    assert "A is better: 1 significantly" in screen
    better = next(line for line in screen.splitlines() if line.startswith(" A "))
    assert better.endswith(lines[0]["chosen"])


def test_texts_cannot_command_the_terminal(tmp_path, monkeypatch, capsys):
    record = {"prompt": "x\x1b[2J", "responses": ["a\x1b]0;t\x07", "b\r\nc\td", "wide " * 60]}
    source = write_jsonl(tmp_path / "samples.jsonl", [record])
    Keys(monkeypatch, "")
    args = ["--samples", source, "--annotator", "terminal", "--out_dir", tmp_path / "out"]
    assert run(monkeypatch, *args) == 0
    screen = capsys.readouterr().out
    assert not any(c in screen for c in "\x1b\x07\r\t") and "c d" in screen
    assert max(map(len, screen.split("\n"))) < 101


def test_a_real_terminal(tmp_path):
    """Through a pseudo-terminal: a key is an answer without Enter, an arrow key is none, what is
    judged is on the disk before the next is asked, and SIGTERM leaves the terminal as it was."""
    import termios

    source = samples(tmp_path / "samples.jsonl", 5, (3, 1, 0))
    command = [sys.executable, ROOT / "annotate.py", "--samples", source, "--annotator", "terminal"]
    command += ["--out_dir", tmp_path / "out"]
    parent, child = pty.openpty()
    before = termios.tcgetattr(child)
    process = subprocess.Popen(list(map(str, command)), stdin=child, stdout=child, stderr=child)
    screen = bytearray()

    def wait_for(text):
        """Reads on until the text has come, and leaves what came after it for the next call."""
        while text not in screen:
            assert select.select([parent], [], [], 60)[0], screen  # else the test would hang
            screen.extend(os.read(parent, 4096))
        del screen[: screen.index(text) + len(text)]

    wait_for(b"0 of 5 judged")
    wait_for(b"best of 1, 2, 3?")
    assert termios.tcgetattr(child) != before
    os.write(parent, b"\x1b[D")
    os.write(parent, b"2")
    wait_for(b"so far: 2")
    os.write(parent, b"1")
    wait_for(b"1 of 5 judged")
    assert len(read_lines(tmp_path / "out/rankings.jsonl")) == 1
    wait_for(b"best of 1, 2, 3?")
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM and termios.tcgetattr(child) == before
    os.close(parent)
    os.close(child)


# --- agreement ------------------------------------------------------------------------------------


def test_agreement_report_by_hand(tmp_path, monkeypatch, gold, capsys):
    """Two annotators on two prompts, one in common; one pair is a tie in gold."""
    lines = [
        {"prompt": "P", "responses": ["3 a", "1 b", "1 c"], "annotator": "x", "task": "t"},
        {"prompt": "P", "chosen": "1 b", "rejected": "3 a", "annotator": "y", "margin": 2},
        {"prompt": "P", "chosen": "1 b", "rejected": "1 c", "annotator": "y", "margin": 0},
        {"prompt": "Q", "chosen": "1 b", "rejected": "0 a", "annotator": "x"},
    ]
    path = write_jsonl(tmp_path / "judged.jsonl", lines)
    report = annotate.agreement_report([path], load_python(gold))
    assert report["gold_ties"] == 2
    assert report["with_gold"]["all"]["pairs"] == 4
    assert report["with_gold"]["all"]["rate"][0] == 0.75  # x: 3 > 1 twice, 1 > 0; y: not 1 > 3
    assert report["with_gold"]["annotator x"]["rate"][0] == 1.0
    assert report["with_gold"]["annotator y"]["rate"][0] == 0.0
    assert report["with_gold"]["task t"]["pairs"] == 2
    assert report["with_gold"]["better"] == {"rate": [0.0, None, None], "pairs": 1}
    assert report["with_gold"]["all"]["rate"][1] < 0.75  # two prompts have an interval
    assert report["between_annotators"]["all"] == {"rate": [0.5, None, None], "pairs": 2}
    assert run(monkeypatch, "--report", path, "--gold", gold) == 0
    assert "0.750" in capsys.readouterr().out
    assert run(monkeypatch, "--report", path) == 0
    assert "between annotators" in capsys.readouterr().out


# --- ratings --------------------------------------------------------------------------------------


def test_elo_vectors():
    """methods.md B6: three players, four games, their expectations, rewards."""
    games = [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5), (2, 0, 1.0)]
    ratings, expected = np.full(3, 1000.0), []
    for a, b, _ in games:
        before = annotate.elo_ratings(games[: len(expected)], 3)
        expected.append(annotate.elo_expected(before[a], before[b]))
    assert expected == pytest.approx([0.5, 0.523010, 0.498940, 0.433391][: len(expected)], abs=1e-6)
    ratings = annotate.elo_ratings(games, 3)
    assert ratings == pytest.approx([1013.132211, 984.033908, 1002.833880], abs=1e-6)
    assert annotate.to_reward(ratings / annotate.ELO, "zscore") == pytest.approx(
        [1.090067, -1.325300, 0.235232], abs=1e-6
    )
    assert annotate.to_reward(ratings / annotate.ELO, "logit") == pytest.approx(
        [0.075595, -0.091908, 0.016313], abs=1e-6
    )


def test_intervals_cover_the_truth():
    """500 simulated tournaments of 6 players, 40 games a pair: each of the 15 true gaps is inside
    its 95% interval in 92 to 98% of them, taken together; no single gap is far off."""
    truth = np.array([1.0, 0.6, 0.2, 0.0, -0.6, -1.2])
    rng, pairs = np.random.default_rng(0), list(itertools.combinations(range(6), 2))
    inside = np.zeros(len(pairs))
    for _ in range(500):
        games = []
        for i, j in pairs:
            p = 1 / (1 + math.exp(truth[j] - truth[i]))
            games += [(i, j, float(w), (i, j, n)) for n, w in enumerate(rng.random(40) < p)]
        found, _ = annotate.bootstrap_ratings(games, 6, 300, rng)
        gaps = np.stack([found[:, i] - found[:, j] for i, j in pairs], 1)
        low, high = np.percentile(gaps, [2.5, 97.5], axis=0)
        inside += [low[n] <= truth[i] - truth[j] <= high[n] for n, (i, j) in enumerate(pairs)]
    print(f"coverage {inside.mean() / 500:.3f}, from {min(inside) / 500} to {max(inside) / 500}")
    assert min(inside) / 500 >= 0.92 and max(inside) / 500 <= 0.98


def test_rank_correlation_rises_with_games():
    """Claim of card B6, for the sequential update."""
    truth, rng = np.linspace(1.5, -1.5, 8), np.random.default_rng(0)
    pairs = list(itertools.combinations(range(8), 2))
    found = []
    for count in (30, 300):
        correlations = []
        for _ in range(40):
            games = []
            for i, j in rng.choice(pairs, count):
                p = 1 / (1 + math.exp(truth[j] - truth[i]))
                games.append((i, j, float(rng.random() < p)))
            ranks = np.argsort(np.argsort(annotate.elo_ratings(games, 8)))
            correlations.append(np.corrcoef(ranks, np.arange(7, -1, -1))[0, 1])
        found.append(np.mean(correlations))
    assert found[0] < found[1] - 0.1 and found[1] > 0.9


def test_elo_of_policies(tmp_path, monkeypatch, capsys):
    """From rankings and comparisons of policies of known strength, with ties."""
    rng, records = np.random.default_rng(0), []
    truth = {"a": 1.0, "b": 0.0, "c": -1.0}
    for i in range(400):
        seen = {name: value + rng.gumbel() for name, value in truth.items()}
        order = sorted(truth, key=lambda name: -seen[name])
        record = {"prompt": f"{i}?", "responses": [f"{name} {i}" for name in order]}
        record["policy"] = order
        records.append(record | ({"scores": [2, 1, 1]} if i % 50 == 0 else {}))
    records += [{"prompt": "x", "chosen": "1", "rejected": "2", "policy": ["b", "a"]}] * 3
    records += [{"prompt": "x", "chosen": "1", "rejected": "2", "policy": ["b", "b"]}]
    path = write_jsonl(tmp_path / "judged.jsonl", records)
    args = ["elo", "--data", path, "--out", tmp_path / "elo.json", "--bootstrap", 200]
    assert run(monkeypatch, *args) == 0
    report = json.loads((tmp_path / "elo.json").read_text())
    assert report["games"] == 1203 and list(report["players"]) == ["a", "b", "c"]
    for name, value in truth.items():
        rating, low, high = report["players"][name]["rating"]
        assert low < rating < high and low < 1000 + annotate.ELO * value < high
        assert report["players"][name]["reward_logit"] == pytest.approx(value, abs=0.2)
        assert abs(report["players"][name]["sequential"] - rating) < 90
    assert "1203 games" in capsys.readouterr().out
    gaps = {(gap["better"], gap["worse"]): gap["gap"] for gap in report["gaps"]}
    assert list(gaps) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (a, b), (_, low, high) in gaps.items():
        assert low < annotate.ELO * (truth[a] - truth[b]) < high
    first = (tmp_path / "elo.json").read_bytes()
    assert run(monkeypatch, *args) == 0 and (tmp_path / "elo.json").read_bytes() == first


def test_an_undefeated_policy_has_no_interval(tmp_path, monkeypatch, capsys):
    """A bootstrap can't see how much better it may be, and says so."""
    records = [{"prompt": f"{i}", "chosen": "x", "rejected": "y"} for i in range(30)]
    records = [record | {"policy": ["best", "rest"]} for record in records]
    records += [{"prompt": "z", "chosen": "x", "rejected": "y", "policy": "both"}]
    path = write_jsonl(tmp_path / "judged.jsonl", records)
    args = ["elo", "--data", path, "--out", tmp_path / "elo.json"]
    assert run(monkeypatch, *args) == 0
    printed = capsys.readouterr().out
    assert "half a win each way was added" in printed and "no intervals: in 100%" in printed
    report = json.loads((tmp_path / "elo.json").read_text())
    assert report["players"]["best"]["rating"][1:] == [None, None] and report["games"] == 30


def test_elo_of_responses(tmp_path, monkeypatch, capsys):
    """Comparisons of a prompt's responses become a reward for each."""
    pairs = [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b"), ("b", "a")]
    records = [{"prompt": "P", "chosen": x, "rejected": y, "task": "t"} for x, y in pairs]
    records += [{"prompt": "Q", "chosen": x, "rejected": y} for x, y in [("a", "b"), ("c", "d")]]
    path, out = write_jsonl(tmp_path / "judged.jsonl", records), tmp_path / "rewards.jsonl"
    args = ["elo", "--data", path, "--players", "responses", "--out", out]
    assert run(monkeypatch, *args) == 0
    assert "1 prompts left out" in capsys.readouterr().out
    (line,) = read_lines(out)
    assert line["responses"] == ["a", "b", "c"] and line["task"] == "t" and line["games"] == 5
    wins = np.array([[0, 2, 1], [1, 0, 1], [0, 0, 0]]) + 0.5 * (1 - np.eye(3))
    assert line["scores"] == pytest.approx(annotate.fit_ratings(wins), abs=1e-6)
    more = ["--method", "sequential", "--scale", "zscore"]
    assert run(monkeypatch, *args, *more) == 0
    line = read_lines(out)[0]
    assert np.std(line["scores"]) == pytest.approx(1, abs=1e-5)


# --- settings and input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (["--num_responses", "10"], "--num_responses: expected a number in [2, 9]"),
        (["--pairs", "2"], "--pairs: only with --output comparisons"),
        (["--annotator", "terminal", "--bias", "1"], "--bias: only with --annotator simulated"),
        (["--agreement", "0.99", "--bias", "9", "--annotators", "1"], "annotators without noise"),
        (["--gold", ""], "expected --gold"),
        (["--samples", "", "--policy", "nowhere"], "nowhere: not a model directory"),
        (["--samples", "", "--policy", "x@temperature=hot"], "expected RUN or RUN@temperature=T"),
        (["--samples", "", "--policy", "x@best=3"], "x@best=3: not a model directory"),
        (["--samples", "", "--policy", ""], "--policy: expected"),
        (["--samples", "", "--max_new_tokens", "96"], "run has only 96 positions"),
    ],
)
def test_bad_settings(tmp_path, monkeypatch, capsys, gold, toy_data, policy_run, more, message):
    source = write_jsonl(
        tmp_path / "samples.jsonl",
        [{"prompt": "P", "responses": ["1 a b c d", "2 a", "3 a b"]}] * 9,
    )
    args = ["--samples", source, "--gold", gold, "--out_dir", tmp_path / "out"]
    args += ["--prompts", toy_data / "prompts_test.jsonl", "--policy", policy_run]
    assert run(monkeypatch, *args, *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt": "P"}, "responses: expected a list of 2 or more"),
        ({"prompt": "P", "responses": ["a"]}, "responses: expected a list of 2 or more"),
        ({"prompt": "P", "responses": ["a", " "]}, "responses: number 2 is not a string with text"),
        ({"prompt": "P", "responses": ["a", 1]}, "responses: number 2 is not a string with text"),
        ({"prompt": "", "responses": ["a", "b"]}, "prompt: is empty"),
        ({"prompt": "P", "responses": ["a", "b"], "policy": ["x"]}, "policy: expected 2 values"),
    ],
)
def test_bad_samples(tmp_path, monkeypatch, capsys, gold, line, message):
    good = {"prompt": "P", "responses": ["1 a", "2 b"]}
    source = write_jsonl(tmp_path / "samples.jsonl", [good, line])
    args = ["--samples", source, "--gold", gold, "--out_dir", tmp_path / "out"]
    assert run(monkeypatch, *args) == 2
    assert f"samples.jsonl:2: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ({"chosen": "a"}, "rejected: expected a string with text"),
        ({"chosen": "a", "rejected": ""}, "rejected: expected a string with text"),
        ({"chosen": "a", "rejected": "b", "margin": -1}, "margin: expected a number"),
        ({"chosen": "a", "rejected": "b", "label": 0.2}, "label: expected a probability"),
        ({"responses": ["a", "b"], "scores": [1, 2]}, "scores: expected numbers that fall"),
        ({"responses": ["a", "b"], "scores": [1]}, "scores: expected 2 values"),
        ({"responses": ["a", "b"], "scores": "high"}, "scores: expected numbers that fall"),
        ({"responses": ["a", "b"]}, "policy: expected a list"),
        ({"responses": ["a", "b"], "policy": ["x", "y", "z"]}, "policy: expected 2 values"),
        ({"chosen": "a", "rejected": "b", "margin": 10**400}, "margin: expected a number"),
        ({"chosen": "a", "rejected": "b", "task": None}, "task: expected a string"),
        ({"chosen": "a", "rejected": "b", "policy": [1, 2]}, "policy: expected strings"),
    ],
)
def test_bad_preferences(tmp_path, monkeypatch, capsys, line, message):
    good = {"prompt": "P", "chosen": "a", "rejected": "b", "policy": ["x", "y"]}
    path = write_jsonl(tmp_path / "judged.jsonl", [good, {"prompt": "P"} | line])
    assert run(monkeypatch, "elo", "--data", path) == 2
    assert f"judged.jsonl:2: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--players", "responses"], "--out: expected a file to write"),
        (["--out", "x.gz"], "--out: expected a file to write, not compressed"),
        (["--method", "sequential"], "--method: only with --players responses"),
    ],
)
def test_bad_settings_of_elo(tmp_path, monkeypatch, capsys, more, message):
    line = {"prompt": "P", "chosen": "a", "rejected": "b", "policy": ["x", "y"]}
    path = write_jsonl(tmp_path / "judged.jsonl", [line])
    assert run(monkeypatch, "elo", "--data", path, *more) == 2
    assert message in capsys.readouterr().err


def test_a_person_has_one_terminal_and_nine_keys(tmp_path, monkeypatch, capsys):
    many = {"prompt": "P", "responses": [f"{k}" for k in range(10)]}
    source = write_jsonl(tmp_path / "samples.jsonl", [many])
    args = ["--samples", source, "--annotator", "terminal", "--out_dir", tmp_path / "out"]
    assert run(monkeypatch, *args) == 2
    assert "samples.jsonl:1: responses: 10; nine keys" in capsys.readouterr().err
    monkeypatch.setattr(annotate, "Run", lambda cfg: SimpleNamespace(world=2))
    assert run(monkeypatch, *args) == 2
    assert "there is one terminal" in capsys.readouterr().err
