"""rlaif.py: questions, preferences and their biases; judges in process and on a faulty server."""

import http.server
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import threading
import time

import numpy as np
import pytest
import torch
from conftest import (
    CANNED,
    ROOT,
    can_the_rollout,
    metrics,
    read_lines,
    run_script,
    write_jsonl,
)
from ranks import on_ranks

import rlaif
from model import load_model, save_model
from tokens import END_OF_TEXT, Conversation, Tokenizer, encode, lay_out, load_tokenizer

TEMPLATES = sorted((ROOT / "data/prompts").glob("*.txt"))
VARIANT = rlaif.Variant()


def run(monkeypatch, *args):
    return run_script(rlaif, monkeypatch, *args)


# --- preferences ----------------------------------------------------------------------------------


def test_preference_vector():
    """methods.md card G: two orders, debiased."""
    p, shares = rlaif.preference([-0.4, -1.6], [-0.9, -0.7])
    assert shares == pytest.approx([0.768525, 0.450166], abs=1e-6)
    assert p == pytest.approx(0.659179, abs=1e-6)
    # What some servers say in the place of minus infinity.
    assert rlaif.preference([-9999.0, 0.0], [-3.4e38, 0.0]) == (0.5, [0.0, 0.0])


def test_rating_vector():
    logprobs = [-6, -5.5, -5, -4, -3, -2, -1.2, -1.5, -3, -5]
    assert rlaif.expected_rating(logprobs) == pytest.approx((6.988470, 0.330771), abs=1e-6)


def test_position_bias():
    shares = [(0.9, 0.8), (0.6, 0.7), (0.2, 0.4), (0.9, 0.1)]
    assert rlaif.position_bias(shares) == {"same": 0.75, "first": pytest.approx(2 / 3)}
    assert rlaif.position_bias([(0.9, 0.1)]) == {"same": 0.0, "first": None}


class Biased(rlaif.Judge):
    """A judge that knows which response is better by 1 nat, and likes answer 1 by `bias` nats."""

    def __init__(self, bias):
        self.bias = bias

    def answers(self, requests):
        found = []
        for request in requests:
            text = request["prompt"]
            better = 1 if text.index("GOOD") < text.index("BAD") else -1
            found.append([(better + self.bias) / 2, -(better + self.bias) / 2])
        return found


@pytest.mark.parametrize("bias", [0.0, 0.5, 3.0, -3.0])
def test_a_planted_bias_is_measured_and_averaged_out(bias):
    template = rlaif.read_template(ROOT / "data/prompts/summaries.txt")
    pairs = [{"prompt": "x", "first": "GOOD", "second": "BAD"}] * 4
    pairs += [{"prompt": "x", "first": "BAD", "second": "GOOD"}] * 4
    found = rlaif.judge_pairs(Biased(bias), template, VARIANT, pairs, 8, 0)
    sides = [1 / (1 + math.exp(-(1 + bias))), 1 / (1 + math.exp(-(-1 + bias)))]
    for (p, shares), pair in zip(found, pairs, strict=True):
        assert sorted(shares) == pytest.approx(sorted(sides))
        assert (p > 0.5) == (pair["first"] == "GOOD")
    measured = rlaif.position_bias([shares for _, shares in found])
    assert measured["same"] == (abs(bias) > 1)
    assert measured["first"] == (None if abs(bias) < 1 else float(bias > 0))


# --- questions ------------------------------------------------------------------------------------


def test_a_question_has_its_four_parts():
    template = rlaif.read_template(ROOT / "data/prompts/summaries.txt")
    fields = {"prompt": " A {response_1} post. ", "response_1": " One.", "response_2": "Two."}
    text = rlaif.question(template, VARIANT, fields)
    assert text.startswith(template["preamble base"] + "\n\nText - A {response_1} post.\n")
    assert text.endswith("Summary 1 - One.\nSummary 2 - Two.\nPreferred Summary=")
    shown = rlaif.question(template, rlaif.Variant("detailed", 2), fields)
    assert shown.count("Preferred Summary=") == 3 and "Preferred Summary=2\n\nText - A" in shown
    assert shown.startswith(template["preamble detailed"])
    reasoned = rlaif.Variant("base", 1, True)
    first = rlaif.question(template, reasoned, fields)
    assert first.endswith("Rationale:") and first.count("Rationale:") == 2
    second = rlaif.question(template, reasoned, fields, " Because. ")
    assert second == first + " Because.\nPreferred Summary="


def test_templates_are_whole():
    assert {path.stem for path in TEMPLATES} >= {"toy", "summaries", "helpful", "harmless"}
    for path in TEMPLATES:
        template = rlaif.read_template(path)
        for name in ("preamble base", "preamble detailed", "sample", "ending", "ending rationale"):
            assert template[name].strip(), (path, name)
        assert len(template["answers"]) == 2 and len(template["ratings"]) == 10
        assert "{response}" in template["rate"]
    principles = rlaif.read_constitution(ROOT / "data/constitution.json")
    assert len(set(principles)) == 16


def test_variants():
    assert rlaif.read_variant("detailed+cot+2shot+8samples+t0.7") == rlaif.Variant(
        "detailed", 2, True, 8, 0.7
    )
    assert str(rlaif.read_variant("base+cot")) == "base 0-shot CoT"


@pytest.mark.parametrize(
    "text, message",
    [
        ("long", "expected base, detailed"),
        ("base+9shot", "at most 8 exemplars"),
        ("base+4samples", "several samples are of rationales"),
    ],
)
def test_bad_variants(capsys, text, message):
    with pytest.raises(SystemExit) as ended:
        rlaif.read_variant(text)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("words\n--- sample\n", ":1: line: stands before"),
        ("--- sample\nx\n--- sample\ny\n", ":3: sample: a second section"),
        ("--- answers\n[1, 2]\n", "answers: expected a list of strings"),
        ("--- answers\n[\n", "answers: not JSON"),
        ('--- exemplars\n{"prompt": "x"}\n', "exemplars: expected prompt"),
    ],
)
def test_bad_templates(tmp_path, capsys, text, message):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(SystemExit) as ended:
        rlaif.read_template(tmp_path / "t.txt")
    assert ended.value.code == 2 and message in capsys.readouterr().err


# --- judges in process ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(toy_data, policy_run, tmp_path_factory):
    """A folder with 9 prompts of 3 responses, 9 rankings, a judge (untrained, 96 positions are few:
    the template is short) and a template."""
    folder = tmp_path_factory.mktemp("data")
    rankings = read_lines(toy_data / "rankings_validation.jsonl")[:9]
    for line in rankings:
        line["responses"], line["scores"] = line["responses"][:3], line["scores"][:3]
    write_jsonl(folder / "rankings.jsonl", [r for r in rankings if r["scores"][0] > r["scores"][2]])
    for line in rankings:
        del line["scores"]
    write_jsonl(folder / "samples.jsonl", rankings)
    write_jsonl(folder / "people.jsonl", read_lines(toy_data / "comparisons.jsonl")[:3])
    write_jsonl(folder / "helpful.jsonl", read_lines(toy_data / "demonstrations.jsonl")[:4])
    (folder / "template.txt").write_text(
        "--- preamble base\nA:\n--- preamble detailed\nBetter:\n--- sample\n{prompt} {response_1} "
        "{response_2}\n--- principle\n{principle}\n--- ending rationale\nWhy:\n--- ending\nIs\n"
        '--- answers\n[" 1", " 2"]\n'
        "--- critique\n{prompt} {response} {principle} Wrong:\n--- revision\n {critique} Better:\n"
    )
    (folder / "principles.json").write_text('["Kind.", "True."]')
    os.symlink(policy_run, folder / "judge")
    return folder


def label_flags(data, out, *more):
    files = ["label", "--samples", data / "samples.jsonl", "--judge", data / "judge"]
    files += ["--template", data / "template.txt", "--variant", "base", "--device", "cpu"]
    return list(map(str, [*files, "--out_dir", out, *more]))


def test_labels_are_the_models_probabilities(data, tmp_path, monkeypatch, capsys):
    """Of every pair, by one forward each; written as comparisons, which other stages read."""
    assert run(monkeypatch, *label_flags(data, tmp_path / "run", "--pairs", 0)) == 0
    assert "position bias: the same position in both orders in" in capsys.readouterr().out
    lines = read_lines(tmp_path / "run/comparisons.jsonl")
    assert len(lines) == 27 and len(
        list(rlaif.read_preferences(tmp_path / "run/comparisons.jsonl"))
    )
    model, tokenizer = load_model(data / "judge"), load_tokenizer(data / "judge")
    one, two = (tokenizer.encode_ordinary(text)[0] for text in (" 1", " 2"))
    for line in lines[:5]:
        shares = []
        for order in (("chosen", "rejected"), ("rejected", "chosen")):
            texts = [line[name].strip() for name in order]
            prompt = f"A:\n\n{line['prompt'].strip()} {texts[0]} {texts[1]}\nIs"
            with torch.no_grad():
                logits = model(torch.tensor([tokenizer.encode_ordinary(prompt)]))[0, -1]
            shares.append(torch.sigmoid(logits[one] - logits[two]).item())
        assert line["label"] == pytest.approx((shares[0] + 1 - shares[1]) / 2, abs=1e-6)
        assert line["label"] >= 0.5 and line["annotator"] == str(data / "judge")
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["pairs"] == 27 and report["asked"] == 54


def test_reasons_principles_and_clamps(data, tmp_path, monkeypatch):
    """A rationale first, sampled twice, its answers averaged; a principle a pair; probabilities
    clamped; people's comparisons mixed in."""
    more = ["--variant", "detailed+cot+2samples+t0.7", "--constitution", data / "principles.json"]
    more += ["--clamp", "0.45,0.52", "--mix", data / "people.jsonl", "--max_rationale_tokens", 4]
    assert run(monkeypatch, *label_flags(data, tmp_path / "run", *more)) == 0
    lines = read_lines(tmp_path / "run/comparisons.jsonl")
    assert [line["prompt"] for line in lines[:3]] == [
        line["prompt"] for line in read_lines(data / "people.jsonl")
    ]
    labels = [line["label"] for line in lines[3:]]
    assert all(0.5 <= label <= 0.55 for label in labels)
    assert {line["principle"] for line in lines[3:]} == {"Kind.", "True."}
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert 60 < report["asked"] <= 9 * 2 * 2 * 2 and report["mixed"] == 3  # equal reasons are one


def test_a_rationale_ends_where_the_answer_would_begin():
    """A judge that goes on to the answer, or to another pair, does not give itself the answer."""

    class Hasty(rlaif.Judge):
        def __init__(self):
            self.prompts = []

        def answers(self, requests):
            self.prompts += [request["prompt"] for request in requests]
            if "answers" in requests[0]:
                return [[-1.0, -2.0]] * len(requests)
            return [" Short. \nPreferred Summary=2\n\nText - More"] * len(requests)

    template, judge = rlaif.read_template(ROOT / "data/prompts/summaries.txt"), Hasty()
    pairs = [{"prompt": "x", "first": "One.", "second": "Two."}]
    variant = rlaif.read_variant("base+cot")
    rlaif.judge_pairs(judge, template, variant, pairs, 8, 0)
    assert all(text.endswith("Rationale: Short.\nPreferred Summary=") for text in judge.prompts[2:])


def test_answers_after_rationales_are_averaged():
    """Two rationales of each pair in each order, answered one by one: against loops."""

    class Talkative(rlaif.Judge):
        def __init__(self):
            self.said = []

        def answers(self, requests):
            if "answers" in requests[0]:
                return [self.verdict(request["prompt"]) for request in requests]
            self.said += [(request["prompt"], request["seed"]) for request in requests]
            return [f" Reason {seed}." for _, seed in self.said]

        def verdict(self, prompt):
            number = sum(map(ord, prompt)) % 97 / 40
            return [-number, -1.0]

    template, judge = rlaif.read_template(ROOT / "data/prompts/summaries.txt"), Talkative()
    pairs = [{"prompt": f"x{n}", "first": f"One{n}.", "second": "Two."} for n in range(3)]
    variant = rlaif.read_variant("base+cot+2samples+t0.5")
    found = rlaif.judge_pairs(judge, template, variant, pairs, 8, 0)
    assert [seed for _, seed in judge.said] == list(range(12))
    for n, pair in enumerate(pairs):
        one, two = (
            {"prompt": pair["prompt"], "response_1": pair[a], "response_2": pair[b]}
            for a, b in (("first", "second"), ("second", "first"))
        )
        expected = []
        for k in range(2):
            verdicts = [
                judge.verdict(rlaif.question(template, variant, fields, f"Reason {seed}."))
                for fields, seed in ((one, 4 * n + k), (two, 4 * n + 2 + k))
            ]
            expected.append(rlaif.preference(*verdicts))
        p, shares = found[n]
        assert p == pytest.approx(np.mean([p for p, _ in expected]))
        assert shares == pytest.approx(np.mean([s for _, s in expected], axis=0))


def test_hard_labels(data, tmp_path, monkeypatch):
    for name, more in (("soft", []), ("hard", ["--hard"])):
        assert run(monkeypatch, *label_flags(data, tmp_path / name, *more)) == 0
    soft, hard = (read_lines(tmp_path / name / "comparisons.jsonl") for name in ("soft", "hard"))
    assert all(line["label"] < 1 for line in soft) and all(line["label"] == 1 for line in hard)
    assert [x["chosen"] for x in soft] == [x["chosen"] for x in hard]


def test_labels_compare_policies(data, tmp_path, monkeypatch):
    """Of two policies' samples only pairs of one of each, equal ones too, of the prompts that both
    have; a prompt that comes twice stays two."""
    files, numbers = [], {"a": [0, 1, 1, 2], "b": [0, 1, 3]}
    for name, prompts in numbers.items():
        lines = [
            {"prompt": f"Prompt {n}?", "responses": [f" {name} {n}.", " Same."], "policy": name}
            for n in prompts
        ]
        files.append(write_jsonl(tmp_path / f"{name}.jsonl", lines))
    more = ["--samples", ",".join(map(str, files)), "--pairs", 0]
    assert run(monkeypatch, *label_flags(data, tmp_path / "l", *more)) == 0
    labelled = read_lines(tmp_path / "l/comparisons.jsonl")
    assert [line["prompt"] for line in labelled] == ["Prompt 0?"] * 4 + ["Prompt 1?"] * 4
    for line in labelled:
        assert sorted(line["policy"]) == ["a", "b"]
        for name, text in zip(line["policy"], (line["chosen"], line["rejected"]), strict=True):
            assert text in (f" {name} {line['prompt'][7]}.", " Same.")
    assert any(line["chosen"] == line["rejected"] for line in labelled)


def revise_flags(data, out, *more):
    files = ["revise", "--prompts", data / "people.jsonl", "--policy", data / "judge"]
    files += ["--judge", data / "judge", "--template", data / "template.txt", "--max_new_tokens", 6]
    files += ["--constitution", data / "principles.json", "--device", "cpu", "--out_dir", out]
    return list(map(str, [*files, *more]))


def test_revisions(data, tmp_path, monkeypatch, capsys):
    """Two revisions of each response, each by a principle, of what stood before; every revision is
    a demonstration, with half of the helpful ones; gold by revision."""
    more = ["--revisions", 2, "--mix", data / "helpful.jsonl", "--mix_weight", 2.5]
    more += ["--gold", ROOT / "data/toy.py"]
    assert run(monkeypatch, *revise_flags(data, tmp_path / "run", *more)) == 0
    assert "revision 2: " in capsys.readouterr().out
    records = read_lines(tmp_path / "run/revisions.jsonl")
    by_number = [[r for r in records if r["revision"] == k] for k in range(3)]
    report = json.loads((tmp_path / "run/report.json").read_text())
    prompts, count = report["prompts"], sum(map(len, by_number))
    assert count + report["empty"] == 3 * prompts + (3 - prompts) and len(by_number[2]) > 0
    assert len(by_number[0]) == prompts
    assert {r["principle"] for r in by_number[1] + by_number[2]} <= {"Kind.", "True."}
    assert set(report["by_revision"]) == {"0", "1", "2"} and "gold" in report["by_revision"]["0"]
    learnt = read_lines(tmp_path / "run/demonstrations.jsonl")
    helpful = [line for line in learnt if "revision" not in line]
    assert [line for line in learnt if "revision" in line] == by_number[1] + by_number[2]
    assert len(helpful) == 10 == report["helpful"]
    assert len(known(tmp_path / "run")) == prompts * 4


def test_what_a_critic_is_asked(data, tmp_path, monkeypatch):
    """Each revision is of the one before it, by a principle drawn anew, after its critique."""
    asked = []

    def ask(self, wanted):
        for key, request in wanted.items():
            asked.append(request["prompt"])
            yield {key: f" text {len(asked)}."}

    monkeypatch.setattr(rlaif.LocalJudge, "ask", ask)
    prompts = [{"prompt": f"Question {i}?"} for i in range(12)]
    args = revise_flags(data, tmp_path / "run", "--revisions", 3, "--prompts")
    args += [str(write_jsonl(tmp_path / "prompts.jsonl", prompts))]
    assert run(monkeypatch, *args) == 0
    template = rlaif.read_template(args[args.index("--template") + 1])
    records = read_lines(tmp_path / "run/revisions.jsonl")
    assert len(records) == 4 * 12 and len(asked) == 12 * 7
    before = {r["prompt"]: r["response"] for r in records if r["revision"] == 0}
    principles = {line["prompt"]: [] for line in prompts}
    for record in records[12:]:
        fields = record | {"response": before[record["prompt"]]}
        question = rlaif.filled(template["critique"], fields)
        critique = asked.index(question) + 1
        assert record["critique"] == f"text {critique}."
        question += rlaif.filled(template["revision"], {"critique": f" text {critique}."})
        assert record["response"] == f" text {asked.index(question) + 1}."
        before[record["prompt"]] = record["response"]
        principles[record["prompt"]].append(record["principle"])
    assert len({tuple(drawn) for drawn in principles.values()}) > 3
    assert any(len(set(drawn)) > 1 for drawn in principles.values())


def test_who_responds_reads_prompts_as_it_learnt_to(tokenizer, small_gpt, tmp_path):
    """A policy that revise asks for responses: by its template. Questions to a judge, which go on
    in their answer, are texts, after what every text begins with."""
    ranks = {tokenizer.decode_single_token_bytes(rank): rank for rank in range(1023)}
    special = {"<|im_start|>": 1024, "<|im_end|>": 1025, END_OF_TEXT: 1023}
    talking = lay_out(Tokenizer("talking", ranks, special))
    judge = rlaif.LocalJudge.__new__(rlaif.LocalJudge)
    judge.name, judge.tokenizer = "judge", talking
    turns = [{"role": "user", "content": "Hi."}]
    asked = judge.encoded({"prompt": Conversation(turns), "cut": True}, 99)
    assert asked == encode(talking, "Hi.", None, 99)[0] and asked[0] == 1024
    assert judge.encoded({"prompt": "Hi.", "cut": True}, 4) == asked[-4:]
    assert judge.encoded({"prompt": "Hi."}, 99) == tokenizer.encode_ordinary("Hi.")
    talking.bos = 1023
    assert judge.encoded({"prompt": "Hi."}, 99) == [1023, *tokenizer.encode_ordinary("Hi.")]
    with pytest.raises(SystemExit):
        judge.encoded({"prompt": "Hi."}, 1)


def killed(out, into, files, keep):
    """A finished run as kill -9 would have left it: of the answers in `files`, taken together, the
    first `keep` bytes, and nothing that came after."""
    into.mkdir()
    shutil.copyfile(out / "args.json", into / "args.json")
    for name in files:
        kept = (out / name).read_bytes()[:keep]
        (into / name).write_bytes(kept)
        keep -= len(kept)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_a_revision_that_was_killed_goes_on(data, tmp_path, monkeypatch, share):
    """Sampled texts come by the block: what is half there is asked again as a whole, and the
    revisions are the same."""
    monkeypatch.setattr(rlaif, "BLOCK", 2)
    assert run(monkeypatch, *revise_flags(data, tmp_path / "run", "--revisions", 2)) == 0
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)
    files = ("responses.jsonl", "answers.jsonl")
    size = sum((whole / name).stat().st_size for name in files)
    killed(whole, tmp_path / "run", files, int(share * size))
    assert (
        run(monkeypatch, *revise_flags(data, tmp_path / "run", "--revisions", 2, "--resume")) == 0
    )
    for name in ("revisions.jsonl", "demonstrations.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_agreement_with_people_and_gold(data, tmp_path, monkeypatch, capsys):
    args = ["agree", "--data", data / "rankings.jsonl", "--judges", data / "judge", "--template"]
    args += [data / "template.txt", "--variants", "base,detailed", "--device", "cpu"]
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "people") == 0
    said = capsys.readouterr().out
    assert "base 0-shot: all " in said and "one_order" in said
    report = json.loads((tmp_path / "people/report.json").read_text())
    (table,) = report["judges"].values()
    assert set(table) == {"base 0-shot", "detailed 0-shot"} and len(report["between"]) == 1
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "gold", "--gold", "data/toy.py") == 0
    other = json.loads((tmp_path / "gold/report.json").read_text())
    (with_gold,) = other["judges"].values()
    # The rankings are gold's own: the same pairs, the same agreement.
    assert with_gold == table


@pytest.mark.parametrize("lines", [0, 1, 5])
def test_kill_asks_nothing_twice(data, tmp_path, monkeypatch, lines):
    """kill -9 while answers are written, 8 a line, then --resume: the same labels, no question
    twice, and the torn line takes none with it."""
    monkeypatch.setattr(rlaif, "BLOCK", 8)
    assert run(monkeypatch, *label_flags(data, tmp_path / "run", "--pairs", 0)) == 0
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)
    answers = (whole / "answers.jsonl").read_bytes()
    assert len(answers.splitlines()) == 7 and len(known(whole)) == 54
    torn = len(b"".join(answers.splitlines(True)[:lines])) + 20
    killed(whole, tmp_path / "run", ("answers.jsonl",), torn)
    assert run(monkeypatch, *label_flags(data, tmp_path / "run", "--pairs", 0, "--resume")) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["asked"] == 54 - 8 * lines
    assert len(known(tmp_path / "run")) == 54  # what followed the torn line is there too
    both = [(path / "comparisons.jsonl").read_bytes() for path in (tmp_path / "run", whole)]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--judge", "nowhere"], "nowhere"),
        (["--clamp", "0.6,0.4"], "--clamp: expected two numbers"),
        (["--clamp", "0.4"], "--clamp: expected two numbers"),
        (["--samples", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--samples", ","], "--samples: expected a file"),
        (["--template", "nowhere.txt"], "nowhere.txt:0: file"),
        (["--constitution", "nowhere.json"], "nowhere.json:0: file"),
        (["--variant", "base+2shot"], "has 0 exemplars"),
    ],
)
def test_bad_settings(data, tmp_path, monkeypatch, capsys, more, message):
    assert run(monkeypatch, *label_flags(data, tmp_path / "run"), *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_one_process_and_whole_templates(data, tmp_path, monkeypatch, capsys):
    """Several ranks, and a template without what a sub-command asks, are refused before work."""
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert run(patch, *label_flags(data, tmp_path / "run")) == 2
    assert "runs in one process" in capsys.readouterr().err
    template = ROOT / "data/prompts/helpful.txt"
    assert run(monkeypatch, *revise_flags(data, tmp_path / "run", "--template", template)) == 2
    assert "critique: no such section" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


CONFIGS = {
    "label": rlaif.LabelConfig,
    "agree": rlaif.AgreeConfig,
    "revise": rlaif.ReviseConfig,
    "direct": rlaif.DirectConfig,
}


def test_commands_in_docstrings_are_flags():
    """Every --flag that the docstring shows with a sub-command is one of its."""
    shown = re.findall(r"rlaif\.py (\w+)((?:[^\n\\]|\\\n)*)", rlaif.__doc__)
    assert {name for name, _ in shown} == set(CONFIGS)
    for name, flags in shown:
        assert set(re.findall(r"--(\w+)", flags)) <= set(vars(CONFIGS[name]())), name


def test_sub_commands(monkeypatch, capsys):
    assert run(monkeypatch) == 2 and "expected a sub-command" in capsys.readouterr().err
    for command, config in CONFIGS.items():
        assert run(monkeypatch, command, "--help") == 0
        text = capsys.readouterr().out
        assert all(f"--{name}" in text for name in vars(config()))


# --- judges on a server ---------------------------------------------------------------------------


class Completions(http.server.BaseHTTPRequestHandler):
    """The completions API over a model of ours; `faults` are spent one a request."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.path, body, self.headers.get("Authorization")))
        fault = server.faults.pop() if server.faults else ""
        if fault.isdigit():
            self.send_response(int(fault))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "not now"}}')
            return
        if fault == "slow":
            time.sleep(3)
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault[3:])
            self.end_headers()
            return
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        ids = server.tokenizer.encode_ordinary(body["prompt"])
        with torch.no_grad():
            logprobs = server.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            text, new = "", list(ids)
            while body["max_tokens"] > 1 and len(new) < len(ids) + body["max_tokens"]:
                new.append(int(server.model(torch.tensor([new]))[0, -1].argmax()))
                if new[-1] == server.tokenizer.eot_token:
                    break
                text += server.tokenizer.decode([new[-1]])
        top = logprobs.topk(body.get("logprobs") or 1)
        pairs = [
            (server.tokenizer.decode([i]), p)
            for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        # Without "1", which adds to " 1": to the same judge in process it is another token.
        pairs = [(token, p) for token, p in pairs if not token.isdigit()]
        choice = {"index": 0, "text": text or pairs[0][0], "finish_reason": "length"}
        if server.form == "content":
            choice["logprobs"] = {
                "content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in pairs]}]
            }
        else:
            choice["logprobs"] = {"top_logprobs": [dict(pairs)]}
        if fault == "missing":
            choice["logprobs"] = None
        reply = json.dumps({"object": "text_completion", "choices": [choice]}).encode()
        if fault == "malformed":
            reply = reply[: len(reply) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(data):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    made.model, made.tokenizer = load_model(data / "judge"), load_tokenizer(data / "judge")
    made.seen, made.faults, made.form = [], [], "top"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def served(server, *more):
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    flags = ["--judge", address, "--judge_model", "ours", "--backoff_s", 0.01, "--reply_s", 1]
    return [*flags, "--top_logprobs", 1024, *more]


def labels(out):
    return [line["label"] for line in read_lines(out / "comparisons.jsonl")]


def known(out):
    """The answers that a run has kept."""
    return rlaif.Judge("", "").remember(None, out / "answers.jsonl").known


@pytest.mark.parametrize("form", ["top", "content"])
def test_a_server_gives_the_labels_of_the_same_judge_in_process(
    data, tmp_path, monkeypatch, server, form
):
    server.form = form
    monkeypatch.setenv("PLAINRLHF_API_KEY", "secret")
    assert run(monkeypatch, *label_flags(data, tmp_path / "served"), *map(str, served(server))) == 0
    assert run(monkeypatch, *label_flags(data, tmp_path / "here")) == 0
    assert labels(tmp_path / "served") == pytest.approx(labels(tmp_path / "here"), abs=1e-5)
    path, body, key = server.seen[0]
    assert path == "/v1/completions" and key == "Bearer secret"
    assert body["model"] == "ours" and body["max_tokens"] == 1
    for file in (tmp_path / "served").rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes()


def test_faults_of_a_server_pass(data, tmp_path, monkeypatch, server):
    """500, 429, a slow reply, a cut connection, half a reply, no log-probabilities: each is asked
    again, and the labels are the same."""
    faults = ["500", "429", "503", "slow", "cut", "malformed", "missing"]
    server.faults = list(faults)
    args = label_flags(data, tmp_path / "served"), map(str, served(server, "--in_flight", 3))
    assert run(monkeypatch, *args[0], *args[1]) == 0
    assert run(monkeypatch, *label_flags(data, tmp_path / "here")) == 0
    assert labels(tmp_path / "served") == pytest.approx(labels(tmp_path / "here"), abs=1e-5)
    assert len(server.seen) == 18 + len(faults)


def test_a_server_that_goes_away_loses_nothing(data, tmp_path, monkeypatch, server, capsys):
    """After some answers it only fails: the labelling ends and says so; when the server is back the
    same command goes on, and asks what is missing."""
    server.faults = ["500"] * 200
    args = [*label_flags(data, tmp_path / "run", "--resume"), *map(str, served(server))]
    args += ["--retries", "1", "--in_flight", "1"]
    real, calls = rlaif.ServerJudge.one, []

    def later(self, request):
        calls.append(1)
        if len(calls) == 6:
            server.faults = ["500"] * 200
        return real(self, request)

    server.faults = []
    with monkeypatch.context() as patch:
        patch.setattr(rlaif.ServerJudge, "one", later)
        assert run(patch, *args) == 1
    error = capsys.readouterr().err
    assert "500" in error and "2 times; what was answered is kept, --resume goes on" in error
    server.faults, before = [], len(server.seen)
    assert run(monkeypatch, *args) == 0
    assert len(server.seen) - before == 18 - 5
    assert run(monkeypatch, *label_flags(data, tmp_path / "here")) == 0
    assert labels(tmp_path / "run") == pytest.approx(labels(tmp_path / "here"), abs=1e-5)


def test_a_refusal_of_the_server_is_said_once(data, tmp_path, monkeypatch, server, capsys):
    server.faults = ["401"] * 50
    args = [*label_flags(data, tmp_path / "run"), *map(str, served(server, "--in_flight", 1))]
    assert run(monkeypatch, *args) == 1
    assert "401" in capsys.readouterr().err and len(server.seen) <= 3


def likely(top, form="top"):
    """A server's reply whose likely tokens are `top`."""
    listed = [{"token": token, "logprob": logprob} for token, logprob in top.items()]
    forms = {"top": {"top_logprobs": [top]}, "content": {"content": [{"top_logprobs": listed}]}}
    return {"choices": [{"text": "x", "logprobs": forms[form]}]}


def server_judge():
    return rlaif.ServerJudge("http://x/v1", rlaif.LabelConfig(retries=0))


@pytest.mark.parametrize("form", ["top", "content"])
def test_an_answer_is_read_however_its_token_is_spelt(form):
    """Vocabularies' marks of spaces, line breaks and bytes; letters beyond ASCII by bytes."""
    judge, answers = server_judge(), [" 1", " 2"]
    for spelt in ("1 2", "Ġ1 Ġ2", "▁1 ▁2", "Ċ1 ĠĠ2", "<0x31> <0x32>"):
        one, two = spelt.split()
        top = {one: -0.5, " The": -4.0, two: -1.5}
        assert judge.of_answers(likely(top, form), answers) == [-0.5, -1.5], spelt
    for one, two in ((" né", " да"), ("ĠnÃ©", "ĠÐ´Ð°"), ("▁né", "да")):
        top = {two: -1.5, one: -0.5, "ĠnÃ": -3.0}
        assert judge.of_answers(likely(top, form), [" né", " да"]) == [-0.5, -1.5]
    assert judge.absent == 0


def test_spellings_add_up_and_absent_answers_get_the_least():
    judge = server_judge()
    top = {"1": math.log(0.25), " 1": math.log(0.5), " the": -4.0}
    assert judge.of_answers(likely(top), [" 1", " 2"]) == [pytest.approx(math.log(0.75)), -4.0]
    assert judge.absent == 1
    assert judge.of_answers(likely(top), ["1 ", "the"])[1] == -4.0 and judge.absent == 1
    assert judge.of_answers(likely(top), ["yes", "no"]) == [] and judge.absent == 3


def serve(monkeypatch, reply):
    """Servers' replies are reply(body)."""
    monkeypatch.setattr(rlaif.ServerJudge, "post", lambda self, body, read: read(reply(body)))


@pytest.mark.parametrize("more", [[], ["--hard"], ["--num_prompts", 4]])
def test_a_judge_that_never_answers_labels_nothing(data, tmp_path, monkeypatch, capsys, more):
    """It is told early, and what was offered in the place of answers; once the server answers,
    --resume asks again."""
    args = label_flags(data, tmp_path / "run", "--judge", "http://x/v1", "--resume", *more)
    asked = []
    with monkeypatch.context() as patch:
        serve(patch, lambda body: asked.append(1) or likely({" The": -0.1, " I": -2.4}))
        assert run(patch, *args) == 1
    what = "4 of 4 pairs" if "--num_prompts" in more else "16 questions in a row"
    error = capsys.readouterr().err
    assert f"{what} unanswered: no answer of --template is among" in error
    assert "' The', ' I'" in error and len(asked) <= 16 + 8
    assert not list((tmp_path / "run").glob("comparisons.jsonl"))
    serve(
        monkeypatch,
        lambda body: likely({"Ġ1": -0.1, "Ġ2": -1 - sum(body["prompt"].encode()[::2]) % 7}),
    )
    assert run(monkeypatch, *args) == 0
    assert json.loads((tmp_path / "run/report.json").read_text())["unanswered"] == 0


def some_answers(body):
    """None on questions 0 to 2, always answer 1 on question 3, the good response on 4 to 7, which
    is the only answer on 7."""
    text = body["prompt"]
    number = int(text[text.index("Q") + 1])
    if number < 3:
        return likely({" The": -0.1, " I": -2.4})
    first = number == 3 or text.index("good") < text.index("bad")
    good, bad = (" 1", " 2") if first else (" 2", " 1")
    return likely({good: -0.1, "x" if number == 7 else bad: -2.4})


@pytest.mark.parametrize("hard", [False, True])
def test_what_is_unanswered_has_no_label(data, tmp_path, monkeypatch, capsys, hard):
    """And with --hard what is undecided: which response is better would be drawn by lot."""
    serve(monkeypatch, some_answers)
    lines = [{"prompt": f"Q{n}?", "responses": [f" good {n}", f" bad {n}"]} for n in range(8)]
    more = ["--samples", write_jsonl(tmp_path / "s.jsonl", lines), "--judge", "http://x/v1"]
    args = label_flags(data, tmp_path / "run", *more, *["--hard"] * hard)
    assert run(monkeypatch, *args) == 0
    found = read_lines(tmp_path / "run/comparisons.jsonl")
    assert [line["prompt"] for line in found] == [f"Q{n}?" for n in range(3 + hard, 8)]
    assert all(line["chosen"] == f" good {n}" for n, line in enumerate(found[-4:], 4))
    assert all((line["label"] == 1) == hard for line in found)
    assert hard or found[0]["label"] == 0.5
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert (report["unanswered"], report["undecided"]) == (3, int(hard))
    said = capsys.readouterr().out
    assert f"without a label: 3 pairs unanswered, {int(hard)} undecided" in said
    assert "14 answers not among the likely tokens: beside one, the least of these" in said
    assert hard or found[-1]["label"] == found[-2]["label"]
    if hard:  # nothing but what is undecided
        write_jsonl(tmp_path / "s.jsonl", lines[3:4])
        ended = run(monkeypatch, *args, "--overwrite")
        assert "all 1 are without a label: 0 pairs unanswered, 1 undecided" in ended
        assert not list((tmp_path / "run").glob("comparisons.jsonl"))


def test_agreement_is_of_what_is_answered(data, tmp_path, monkeypatch):
    serve(monkeypatch, some_answers)
    lines = [{"prompt": f"Q{n}?", "chosen": " good", "rejected": " bad"} for n in range(8)]
    args = ["agree", "--data", write_jsonl(tmp_path / "d.jsonl", lines), "--judges", "http://x/v1"]
    args += ["--template", data / "template.txt", "--variants", "base,detailed", "--device", "cpu"]
    assert run(monkeypatch, *args, "--out_dir", tmp_path / "run") == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    for cell in report["judges"]["http://x/v1"].values():
        assert cell["unanswered"] == 3 and cell["all"]["pairs"] == 5
        assert cell["all"]["rate"][0] == pytest.approx(4.5 / 5)
    assert [rate for rate, *_ in report["between"].values()] == [1.0]


class Reply(io.BytesIO):
    """What a server replies."""

    def __init__(self, body, status=200, location=""):
        super().__init__(body if isinstance(body, bytes) else json.dumps(body).encode())
        self.status, self.reason, self.headers = status, "Reason", {"Location": location}


def choice(**fields):
    return {"choices": [{"index": 0, "text": " 1"} | fields]}


NONE = "gives no log-probabilities: "


@pytest.mark.parametrize(
    "reply, words",
    [
        *[
            (choice(logprobs=found), NONE + '{"choices"')
            for found in (
                *(None, {}, [], {"top_logprobs": None}, {"top_logprobs": []}, {"content": None}),
                *({"top_logprobs": [top]} for top in (None, {}, [], {" 1": None, " 2": -0.1})),
                *({"top_logprobs": [{" 1": p, " 2": -0.1}]} for p in ("-0.3", 0.9, -1e30, [])),
                *({"top_logprobs": [{" 1": p, " 2": -0.1}]} for p in (math.nan, -math.inf)),
                *({"content": x} for x in ([], [None], [{}], [{"top_logprobs": None}])),
                {"content": [{"top_logprobs": [{"token": " 1", "logprob": None}]}]},
                {"content": [{"top_logprobs": [{"token": None, "logprob": -0.1}]}]},
            )
        ],
        (choice(), NONE),
        ({"choices": []}, NONE),
        ({"choices": [{"message": {"role": "assistant", "content": "1"}}]}, NONE),
        ([], NONE + "[]"),
        (b"null", NONE),
        (b"", NONE + "nothing"),
        (b'{"choices": [{"text": " 1", "logpr', NONE),
        (b"[" * 100_000, NONE),
        (b"\xff\xfe", NONE),
        (
            b"<html><title>Sign in</title><style>p {}</style><p>Who\x1b[2J?\n</html>",
            NONE + "Sign in",
        ),
        ({"error": {"message": "model not loaded", "code": 500}}, NONE + "model not loaded"),
        ({"error": 'no model "m"'}, NONE + 'no model "m"'),
    ],
)
def test_a_reply_without_log_probabilities_is_told_in_words(reply, words):
    judge = server_judge()
    judge.opener.open = lambda *_, **__: Reply(reply)
    with pytest.raises(rlaif.JudgeError) as failed:
        judge.one({"prompt": "x", "answers": [" 1", " 2"]})
    message = f"{failed.value}"
    assert message.startswith(f"http://x/v1/completions: {words}") and message.isprintable()
    assert not re.search(r"\w(Error|Exception)\b|NoneType|subscript|attribute", message)


def test_what_a_server_says_is_said():
    """The message of its error, whoever wrote it; where it leads to; texts that it does not give.
    What can't pass is asked once."""
    judge = rlaif.ServerJudge("http://x/v1", rlaif.LabelConfig(retries=1, backoff_s=0.0))
    for reply, words, times in [
        (({"error": {"message": "This is a chat model"}}, 404), "404 Reason: This is a chat", 1),
        (({"object": "error", "message": "logprobs: at most 5"}, 400), "logprobs: at most 5", 1),
        (({"detail": [{"loc": ["body"], "msg": "Field required"}]}, 422), "Field required", 1),
        ((b"<h1>Bad Gateway</h1>", 502), "502 Reason: Bad Gateway, 2 times", 2),
        ((b"", 408), "408 Reason: nothing, 2 times", 2),
        ((b"<p>Moved", 308, "https://x"), "308 Reason: leads to https://x", 1),
        ((choice(text=None),), 'gives no text: {"choices"', 2),
        (({"choices": [{"message": {"content": "1"}}]},), "gives no text", 2),
    ]:
        asked = []
        judge.opener.open = lambda *_, r=reply, a=asked, **__: a.append(1) or Reply(*r)
        with pytest.raises(rlaif.JudgeError, match=re.escape(words)):
            judge.one({"prompt": "x", "max_tokens": 3, "temperature": 0.0, "seed": 1})
        assert len(asked) == times, words
    assert judge.of_text(choice(text=" So \ud83d")) == " So "  # a character cut in half


@pytest.mark.parametrize("variant, where", [("base", "wpe"), ("base+cot", "ln_f")])
def test_a_local_judge_of_no_numbers_is_refused_by_name(
    data, tmp_path, monkeypatch, capsys, variant, where
):
    """Where it overflows at some places only, and before it reasons."""
    model = load_model(data / "judge")
    with torch.no_grad():  # float16 has room for 65504
        model.get_submodule(where).weight[5:].fill_(1e6)
    save_model(tmp_path / "a judge", model, load_tokenizer(data / "judge"), {"stage": "sft"})
    more = ["--judge", tmp_path / "a judge", "--dtype", "float16", "--variant", variant]
    assert run(monkeypatch, *label_flags(data, tmp_path / "run", *more)) == 2
    assert f"{tmp_path / 'a judge'}: log-probabilities that are not" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_reasons_from_a_server(data, tmp_path, monkeypatch, server):
    """Rationales are texts of the server's; the labels after them are those of the judge here."""
    more = ["--variant", "base+cot", "--max_rationale_tokens", "4", "--num_prompts", "4"]
    args = [*label_flags(data, tmp_path / "served", *more), *map(str, served(server))]
    assert run(monkeypatch, *args) == 0
    assert run(monkeypatch, *label_flags(data, tmp_path / "here", *more)) == 0
    assert labels(tmp_path / "served") == pytest.approx(labels(tmp_path / "here"), abs=1e-5)


def test_the_key_stays_with_the_server(data, tmp_path, monkeypatch, server, capsys):
    """Where another server is led to, it isn't asked; and in no message."""
    monkeypatch.setenv("PLAINRLHF_API_KEY", "secret\n")  # as from a file
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    seen = []
    other.RequestHandlerClass.do_GET = lambda self: seen.append(self.path)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    server.faults = [f"to http://127.0.0.1:{other.server_address[1]}/v1"] * 99
    args = [*label_flags(data, tmp_path / "run"), *map(str, served(server, "--retries", 0))]
    assert run(monkeypatch, *args) == 1
    other.shutdown()
    other.server_close()
    assert server.seen[0][2] == "Bearer secret" and len(server.seen) < 9 and not seen
    assert re.search(r"302 Found: leads to http://127.0.0.1:\d+/v1;", capsys.readouterr().err)
    monkeypatch.setenv("PLAINRLHF_API_KEY", "sec ret")
    assert run(monkeypatch, *args[:-2], "--overwrite") == 2
    said = capsys.readouterr()
    assert "PLAINRLHF_API_KEY: expected one word" in said.err
    assert not re.search("sec.?ret", said.err + said.out)


@pytest.mark.parametrize("how", ["failure", "SIGTERM"])
def test_what_is_in_flight_is_kept(data, tmp_path, monkeypatch, server, how):
    """One request fails for good, or the labelling is told to stop, while others are under way:
    their answers are waited for and kept."""
    args = [*label_flags(data, tmp_path / "run", "--resume"), *map(str, served(server))]
    args += ["--retries", "0", "--in_flight", "4"]
    real, calls, done = rlaif.ServerJudge.one, [], []

    def one(self, request):
        calls.append(1)
        if len(calls) == 4:
            if how == "failure":
                raise rlaif.JudgeError("gone")
            os.kill(os.getpid(), signal.SIGTERM)
        answer = real(self, request)
        done.append(1)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(rlaif.ServerJudge, "one", one)
        assert run(patch, *args) == (1 if how == "failure" else 128 + signal.SIGTERM)
    kept = len(known(tmp_path / "run"))
    assert kept == len(done) >= 3 and len(calls) < 18  # nothing more is asked
    before = len(server.seen)
    assert run(monkeypatch, *args, "--in_flight", "2") == 0  # how it is asked may change
    assert len(server.seen) - before == 18 - kept


def test_direct_by_a_server(data, tmp_path, server):
    """Two ranks and a faulty server: the ratings are those of the same judge in this process."""
    (tmp_path / "t.txt").write_text(
        "--- rate\n{prompt} {response} Mark:\n--- ratings\n"
        + json.dumps([f" {i}" for i in range(1, 11)])
    )
    flags = ["direct", "--prompts", data / "samples.jsonl", "--init", data / "judge", "--steps", 2]
    flags += ["--validation", "", "--batch_size", 4, "--max_new_tokens", 6, "--device", "cpu"]
    flags += ["--template", tmp_path / "t.txt"]
    server.faults = ["500", "malformed", "429", "cut"]
    asked = served(server, "--in_flight", 3, "--out_dir", tmp_path / "served")
    argv = ["rlaif.py", *map(str, [*flags, *asked])]
    code = f"{CANNED.format(script='rlaif')}sys.argv = {argv!r}\nrlaif.main()\n"
    done = on_ranks("rlaif", code)
    assert done.returncode == 0, done.stderr[-3000:]
    here = ["--judge", data / "judge", "--out_dir", tmp_path / "here"]
    with can_the_rollout(rlaif) as patch:
        assert run(patch, *flags, *here) == 0
    for a, b in zip(metrics(tmp_path / "served"), metrics(tmp_path / "here"), strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4) and a["absent"] == 0
    assert len(server.seen) == 8 + 4


@pytest.mark.parametrize("url", ["http://[x", "http://", "http://localhost:port/v1", "ftp://x"])
def test_bad_urls(data, tmp_path, monkeypatch, capsys, url):
    assert run(monkeypatch, *label_flags(data, tmp_path / "run", "--judge", url)) == 2
    assert "expected a run directory, http://..." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
