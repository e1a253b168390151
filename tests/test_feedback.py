"""feedback.py: what is read, rows of several responses, rewards, rollouts, samples, ratings."""

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_lines, write_jsonl
from ranks import on_ranks

import feedback
from feedback import (
    RAW, Reward, RewardFlags, Rewards, Rollout, add_ptx_gradient, add_scalar_head, batches_from,
    batches_of_groups, brief, check_ratio, check_rewards, check_start, collate, combine_scores,
    distinct, ended_rows, explained_variance, fit_ratings, group_by_prompt, grouped_batches,
    grouped_rate, held_out_nll, helpful_or_safe, kl_estimate, load_policy, load_python,
    load_reward_model, logprobs_of, normalised, numbers, one_a_task,
    par_scores, prompts_of_step, punish_missing_eos, rate_interval, read_demonstrations,
    read_examples, read_preferences, read_prompts, read_responses, record_of, respond, rollout_of,
    row_length, row_lengths, sample_rollout, sample_step, score_rows, score_statistics, set_dropout,
    show, token_rewards, totals_of, warnings_of, whiten,
)  # fmt: skip
from model import (
    PARTS, last_tokens, load_model, pack, pad, places, predicts, response_sums, save_model, seen,
    token_logprobs,
)  # fmt: skip
from run import Run
from tokens import END_OF_TEXT, Tokenizer, encode


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def refused(capsys, call, *args, **kwargs):
    """What a call says that ends with status 2, in one line."""
    with pytest.raises(SystemExit) as ended:
        found = call(*args, **kwargs)
        if not isinstance(found, list | Reward | Rewards | None):
            list(found)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1, said
    return said


def new_run(out="", **settings):
    settings = {"device": "cpu", "dtype": "float64", "max_new_tokens": 8} | settings
    return Run(RewardFlags(out_dir=str(out), **settings))


# --- prompts, demonstrations, preferences ---------------------------------------------------------


def test_read_prompts(tmp_path, tokenizer, capsys):
    lines = [{"prompt": "My car. My boat."}, {"prompt": "", "task": "a", "unsafe": True, "x": 3}]
    path = write_jsonl(tmp_path / "prompts.jsonl", lines)
    ids = tokenizer.encode_ordinary("My car. My boat.")
    assert read_prompts(path, tokenizer, 20) == [
        (lines[0], ids),
        (lines[1], [tokenizer.eot_token]),  # an empty one is a prompt too
    ]
    assert capsys.readouterr().out == ""
    found = read_prompts(path, tokenizer, 3)
    assert found[0] == (lines[0], ids[-3:])
    assert capsys.readouterr().out == f"{path}: 2 prompts, 1 of which lose their start\n"
    assert read_prompts("", tokenizer, 0) == []
    for room in (0, -5):
        said = refused(capsys, read_prompts, path, tokenizer, room)
        assert said == "--max_new_tokens: leaves a prompt no room in the model's positions\n"


@pytest.mark.parametrize(
    "line, kinds, message",
    [
        ({"prompt": "x", "task": ["a"]}, {}, 'task: expected a string, got ["a"]'),
        ({"prompt": "x", "task": None}, {}, "task: expected a string, got null"),
        ({"prompt": "x", "unsafe": "no"}, {}, 'unsafe: expected true or false, got "no"'),
        ({"prompt": "x", "unsafe": 1}, {}, "unsafe: expected true or false, got 1"),
        ({"prompt": "x"}, {"reference": str}, "reference: expected a string, got none"),
        (
            {"prompt": "x", "reference": 3},
            {"reference": str},
            "reference: expected a string, got 3",
        ),
        ({"task": "a"}, {}, "prompt: is missing"),
    ],
)
def test_bad_prompts(tmp_path, tokenizer, capsys, line, kinds, message):
    good = {"prompt": "x", "task": "a", "unsafe": False, "reference": "r"}
    path = write_jsonl(tmp_path / "prompts.jsonl", [good, line])
    said = refused(capsys, read_prompts, path, tokenizer, 9, **kinds)
    assert said == f"{path}:2: {message}\n"


def test_read_demonstrations(tmp_path, tokenizer, capsys):
    lines = [
        {"prompt": "My car.", "response": " I feel sad."},
        {"prompt": "My car. My boat. My tent.", "response": " I feel sad."},
        {"prompt": "", "response": " I feel sad. I feel sad."},
    ]
    path, eos = write_jsonl(tmp_path / "data.jsonl", lines), tokenizer.eot_token
    texts = [(line["prompt"], line["response"]) for line in lines]
    whole = [encode(tokenizer, *pair, 99) for pair in texts]
    assert read_demonstrations(path, tokenizer, 99) == whole
    tokens = sum(len(p) + len(r) for p, r in whole)
    assert f"{path}: 3 lines, {tokens} tokens; 0 cut, 0 dropped\n" in capsys.readouterr().out
    assert whole[2][0] == [eos]
    kept = read_demonstrations(path, tokenizer, 8, "drop")
    assert [len(p) + len(r) for p, r in kept] == [8, 8]
    assert kept[1] == (whole[1][0][-3:], whole[1][1])
    assert "2 lines, 16 tokens; 1 cut, 1 dropped" in capsys.readouterr().out
    cut = read_demonstrations(path, tokenizer, 8)
    assert len(cut) == 3 and len(cut[2][1]) == 7 and eos not in cut[2][1]
    assert "3 lines, 24 tokens; 2 cut, 0 dropped" in capsys.readouterr().out
    said = refused(capsys, read_demonstrations, path, tokenizer, 3, "drop")
    assert f"{path}:0: file: no response fits into 3 tokens; --overlong cut cuts" in said
    assert read_demonstrations("", tokenizer, 8) == []
    path = write_jsonl(tmp_path / "bad.jsonl", [lines[0], {"prompt": "x", "response": " "}])
    said = refused(capsys, read_demonstrations, path, tokenizer, 99)
    assert said == f"{path}:2: response: is empty\n"


def test_an_end_that_is_spelled_out_is_taken_off_and_counted(tmp_path, tokenizer, capsys):
    end, taken = "<|endoftext|>", "without the <|endoftext|> that they spell out\n"
    lines = [{"prompt": f"a{end}", "response": f" b{end}{end}\n"}]
    lines.append({"prompt": "a", "response": " b"})
    path = write_jsonl(tmp_path / "d.jsonl", lines)
    first, second = read_demonstrations(path, tokenizer, 99)
    assert first[1] == second[1] and len(first[0]) > 2  # a prompt is left as it is
    assert capsys.readouterr().out.endswith(f"0 dropped; 1 {taken}")
    lines = [
        {"prompt": "a", "responses": [f" b{end}", " c"]},
        {"prompt": "a", "chosen": f" b{end}", "rejected": f" c{end}"},
    ]
    path = write_jsonl(tmp_path / "c.jsonl", lines)
    examples = read_examples(path, tokenizer, 99)
    assert [e["texts"] for e in examples] == [[" b", " c"]] * 2
    assert capsys.readouterr().out.endswith(f", 3 {taken}")
    path = write_jsonl(tmp_path / "e.jsonl", [{"prompt": "a", "response": end}])
    said = refused(capsys, read_demonstrations, path, tokenizer, 99)
    assert said == f"{path}:1: response: is empty but for {end}\n"
    assert "number 1 is not a" in refused(
        capsys, read_responses, "f:2", {"responses": [f" {end}", "a"]}
    )


@pytest.mark.parametrize(
    "line, message",
    [
        ({}, "responses: expected a list of 2 or more"),
        ({"responses": "ab"}, "responses: expected a list of 2 or more"),
        ({"responses": ["a"]}, "responses: expected a list of 2 or more"),
        ({"responses": ["a", " "]}, "responses: number 2 is not a string with text in it"),
        ({"responses": ["a", 1]}, "responses: number 2 is not a string with text in it"),
        ({"responses": ["a", "b"], "policy": ["x"]}, "policy: expected 2 values, one a response"),
        ({"responses": ["a", "b"], "scores": [1]}, "scores: expected 2 values, one a response"),
    ],
)
def test_bad_responses(capsys, line, message):
    assert refused(capsys, read_responses, "f:2", line) == f"f:2: {message}\n"
    assert read_responses("f:1", {"responses": ["a"]}, least=1) == ["a"]
    good = {"responses": ["a", "b"], "scores": [1, 2], "policy": "p"}
    assert read_responses("f:1", good) == ["a", "b"]


def test_read_preferences(tmp_path):
    lines = [
        {"prompt": "P", "responses": ["a", "b", "c"]},
        {"prompt": "P", "responses": ["a", "b", "c"], "scores": [3, 1.5, 1.5], "x": 1},
        {"prompt": "P", "chosen": "a", "rejected": "b"},
        {"prompt": "P", "chosen": "a", "rejected": "b", "margin": 2, "label": 0.75, "task": "t"},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", lines)
    found = list(read_preferences(path))
    assert [(where, record) for where, record, *_ in found] == [
        (f"{path}:{n}", line) for n, line in enumerate(lines, 1)
    ]
    assert [responses for *_, responses, _ in found] == [["a", "b", "c"]] * 2 + [["a", "b"]] * 2
    assert [pairs for *_, pairs in found] == [
        [(0, 1, 0.0, 1.0), (0, 2, 0.0, 1.0), (1, 2, 0.0, 1.0)],
        [(0, 1, 1.5, 1.0), (0, 2, 1.5, 1.0)],
        [(0, 1, 0.0, 1.0)],
        [(0, 1, 2.0, 0.75)],
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        (["P"], "line: expected an object, got list"),
        ({"chosen": "a", "rejected": "b"}, "prompt: is missing"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt: is empty"),
        ({"prompt": "P", "chosen": "a"}, "rejected: expected a string with text in it"),
        ({"prompt": "P", "chosen": 3, "rejected": "b"}, "chosen: expected a string with text"),
        ({"prompt": "P", "chosen": "a", "rejected": ""}, "rejected: expected a string with text"),
        ({"prompt": "P", "chosen": "a", "rejected": "b", "margin": -1}, "margin: expected a numb"),
        ({"prompt": "P", "chosen": "a", "rejected": "b", "margin": 10**400}, "margin: expected a"),
        ({"prompt": "P", "chosen": "a", "rejected": "b", "margin": True}, "margin: expected a num"),
        ({"prompt": "P", "chosen": "a", "rejected": "b", "label": 2}, "label: expected a probab"),
        ({"prompt": "P", "chosen": "a", "rejected": "b", "label": 0.2}, "label: expected a proba"),
        (
            {"prompt": "P", "chosen": "a", "rejected": "b", "task": 3},
            "task: expected a string, got 3",
        ),
        ({"prompt": "P", "responses": ["a", ""]}, "responses: number 2 is not a string"),
        ({"prompt": "P", "responses": ["a", "b"], "scores": [1]}, "scores: expected 2 values"),
        ({"prompt": "P", "responses": ["a", "b"], "scores": [1, 2]}, "scores: expected numbers th"),
        ({"prompt": "P", "responses": ["a", "b"], "scores": "high"}, "scores: expected numbers th"),
        ({"prompt": "P", "responses": ["a", "b"], "scores": [10**400, 2]}, "scores: expected num"),
        ({"prompt": "P", "responses": ["a", "b"], "scores": [1, None]}, "scores: expected numbers"),
        (
            {"prompt": "P", "responses": ["a", "b"], "task": None},
            "task: expected a string, got null",
        ),
    ],
)
def test_bad_preferences(tmp_path, capsys, line, message):
    good = {"prompt": "P", "chosen": "a", "rejected": "b"}
    path = write_jsonl(tmp_path / "bad.jsonl", [good, line])
    assert refused(capsys, read_preferences, path).startswith(f"{path}:2: {message}")


def test_read_examples(tmp_path, tokenizer, capsys):
    lines = [
        {"prompt": "My car.", "responses": [" a b", " a", " a", " c"], "scores": [3, 2, 2, 2]},
        {"prompt": "My car.", "chosen": " yes", "rejected": " yes"},
        {"prompt": "My car.", "chosen": " yes", "rejected": " no", "margin": 2, "label": 0.75},
        {"prompt": "My car.", "responses": [" a", " b"], "scores": [1, 1]},
        {"prompt": "My car.", "responses": [" a" * 30, " b", " c"], "task": "t"},
    ]
    path, eos = write_jsonl(tmp_path / "data.jsonl", lines), tokenizer.eot_token
    examples = read_examples(path, tokenizer, 20, "drop")
    assert [len(e["responses"]) for e in examples] == [3, 2, 2]
    assert examples[0]["pairs"] == [(0, 1, 1.0, 1.0), (0, 2, 1.0, 1.0)]
    assert examples[0]["texts"] == [" a b", " a", " c"]
    assert examples[1]["pairs"] == [(0, 1, 2.0, 0.75)]
    assert examples[2]["pairs"] == [(0, 1, 0.0, 1.0)] and examples[2]["texts"] == [" b", " c"]
    assert examples[2]["line"] == {"prompt": "My car.", "task": "t"}
    assert capsys.readouterr().out == (
        f"{path}: 3 lines, 4 pairs; responses: 0 cut, 1 too long, 2 equal, 2 lines without a pair\n"
    )
    assert examples[1]["responses"][0].tolist() == [*tokenizer.encode_ordinary(" yes"), eos]
    assert examples[1]["prompt"].tolist() == tokenizer.encode_ordinary("My car.")
    long = read_examples(path, tokenizer, 8, "cut")[-1]
    assert len(long["responses"][0]) == 7 and eos not in long["responses"][0]
    assert len(long["prompt"]) == 1 and "responses: 4 cut, 0 too long" in capsys.readouterr().out
    said = refused(capsys, read_examples, path, tokenizer, 2, "drop")
    assert f"{path}:0: file: none of its 5 lines has a pair to learn from (0 cut, 13 too" in said
    assert read_examples("", tokenizer, 8) == []


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_every_line_once_an_epoch(count):
    lengths = np.random.default_rng(0).integers(3, 60, count).tolist()
    batches = grouped_batches(lengths, 8, [0, 1])
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert sum(len(batch) != 8 for batch in batches) <= 1
    assert batches == grouped_batches(lengths, 8, [0, 1])
    if count == 1000:
        assert batches != grouped_batches(lengths, 8, [0, 2])
    # A run that goes on finds the batches that it would have come to.
    an_epoch = len(batches)
    first = [*itertools.islice(batches_from(0, lengths, 8, 0), 3 * an_epoch)]
    assert first[an_epoch : 2 * an_epoch] == batches
    for step in (1, an_epoch, 2 * an_epoch - 1):
        found = [*itertools.islice(batches_from(step, lengths, 8, 0), 3 * an_epoch - step)]
        assert found == first[step:]


def test_few_cells_are_pads(toy_data, tokenizer):
    lines = read_lines(toy_data / "demonstrations.jsonl")[:6000]
    lengths = [len(tokenizer.encode_ordinary(x["prompt"] + x["response"])) + 1 for x in lines]
    batches = grouped_batches(lengths, 32, 0)
    cells = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert 1 - sum(lengths) / cells < 0.03


def test_prompts_of_step():
    """Whole epochs run on from iteration to iteration, each in another order."""
    steps = [prompts_of_step(5, 4, step, 3) for step in range(5)]
    flat = [number for step in steps for number in step]
    epochs = [flat[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and epochs[0] != epochs[1]
    assert sorted(prompts_of_step(2, 6, 1, 0)) == [0, 0, 0, 1, 1, 1]


# --- several responses to a prompt in one row -----------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
RESPONSES = [[[10, 11], [12], [13, 14, 15, 16]], [[17, 18, 19], []], [[20, 21]]]
ROWS = [(p, r) for p, some in zip(PROMPTS, RESPONSES, strict=True) for r in some]
RESPONSES_WITH_TOKENS = [response for some in RESPONSES for response in some if response]


def test_responses_beside_each_other_are_as_alone(small_gpt):
    """Rows that share a prompt give each response what a row of its own gives: logits, scores and
    gradients. Ragged, a prompt of one token, an empty response, one response alone; and whatever
    the pads hold."""
    assert group_by_prompt(ROWS, 32) == list(zip(PROMPTS, RESPONSES, strict=True))
    assert len(group_by_prompt([([1, 2], [3]), ([1, 4], [5]), ([1, 2], [6])], 32)) == 3
    # The third response has 4 tokens, beside 3 others: 12 > 3 * n_embd * 3 tokens of the prompt.
    assert group_by_prompt(ROWS, 1)[:2] == [
        (PROMPTS[0], RESPONSES[0][:2]),
        (PROMPTS[0], [RESPONSES[0][2]]),
    ]
    groups = group_by_prompt(ROWS, 32)
    assert [row_length(*group) for group in groups] == [12, 5, 7]
    assert batches_of_groups(groups, 3) == [[1, 2], [0]] and batches_of_groups([], 3) == []
    assert batches_of_groups(groups, 1) == [[1], [2], [0]]
    tokens, mask = pad(*zip(*ROWS, strict=True))
    beside, inside, segments = pack(PROMPTS, RESPONSES)
    assert beside[0].tolist() == [1, 2, 3, 10, 11, 3, 12, 3, 13, 14, 15, 16]
    assert segments[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    second = [PARTS + part for part in (0, 0, 0, 0, 1, 1, 1)]  # fits beside the one before it
    assert segments[1].tolist() == [1, 1, 1, 1, 2, *second] and len(segments) == 2
    assert inside[0].nonzero().squeeze(1).tolist() == [3, 4, 6, 8, 9, 10, 11]
    for scalar_head, width in itertools.product((False, True), (0, 20, 100)):
        beside, inside, segments = pack(PROMPTS, RESPONSES, width)
        assert torch.equal(beside[inside], tokens[mask])  # the same tokens in the same order
        assert len(beside) == {0: 2, 20: 2, 100: 1}[width]
        before = seen(segments)[:, 0].sum(-1) - 1
        assert torch.equal(places(segments), before * (segments >= 0))
        beside[segments < 0] = 33
        model = small_gpt(scalar_head, torch.float64)
        alone = model(tokens, predicts(mask))
        together = model(beside, predicts(inside), segments)
        assert together.shape == alone.shape and (together - alone).abs().max() < 1e-12
        weights = torch.randn_like(alone)
        expected = torch.autograd.grad((alone * weights).sum(), list(model.parameters()))
        found = torch.autograd.grad((together * weights).sum(), list(model.parameters()))
        assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-11
    together = model(beside, last_tokens(inside), segments)
    assert (together - model(tokens, last_tokens(mask))).abs().max() < 1e-12
    sums = torch.stack([response.sum() for response in map(torch.tensor, RESPONSES_WITH_TOKENS)])
    assert torch.equal(response_sums(beside[inside].double(), inside), sums.double())
    # Longer together than the model has positions: it is a response's own places that count.
    long = [1] * 60, [[2] * 30, [3] * 36]
    beside, inside, segments = pack(*([x] for x in long))
    together = model(beside, predicts(inside), segments)
    tokens, mask = pad([long[0]] * 2, long[1])
    assert (together - model(tokens, predicts(mask))).abs().max() < 1e-12


@pytest.mark.parametrize("width", [1, 1000])  # a prompt's responses in several rows, or in one
def test_collate(width):
    """Ragged K, ties, margins, soft labels: each response is found where `rows` says, and the pairs
    in the order of triu_indices."""
    examples = []
    for K, pairs in [
        (4, [(i, j, j - i + 0.3, 1.0) for i, j in itertools.combinations(range(4), 2)]),
        (2, [(0, 1, 2.0, 0.7)]),
        (3, [(0, 1, 3.9, 1.0), (0, 2, 0.0, 1.0)]),  # 1 and 2 are a tie
        (9, [(i, j, 0.5, 1.0) for i, j in itertools.combinations(range(9), 2)]),
    ]:
        responses = [[k + 1] * (1 + k % 3) for k in range(K)]
        examples.append({"prompt": [7, 8], "responses": responses, "pairs": pairs})
    tokens, mask, _, rows, keep, margin, label = collate(examples, width)
    assert rows.shape == (4, 9) and keep.shape == (4, 36) and (len(tokens) > 4) == (width == 1)
    lengths = response_sums(mask[mask].double(), mask).int().tolist()
    inside = tokens[mask].split(lengths)
    assert len(inside) == last_tokens(mask).sum()  # so many scores, in this order
    places = torch.triu_indices(9, 9, 1).T.tolist()
    for b, example in enumerate(examples):
        for k, response in enumerate(example["responses"]):
            assert inside[rows[b, k]].tolist() == response
        assert set(rows[b, len(example["responses"]) :].tolist()) <= {int(rows[b, 0])}
        pairs = [
            (*places[p], margin[b, p].item(), label[b, p].item()) for p in keep[b].nonzero()[:, 0]
        ]
        assert pairs == sorted(example["pairs"])
    assert max(row_lengths(examples, width)) == tokens.shape[1]


def test_score_rows(small_gpt):
    """In any order and number a forward, alone or of each of three ranks: the same scores in the
    rows' order; of a language model what a function makes of its logits."""
    model, rows = small_gpt(True, torch.float64), ROWS[:3] + ROWS[5:] + [([4], [17])] + ROWS[:1]
    expected = []
    for prompt, response in rows:
        expected.append(model(torch.tensor([prompt + response]))[0, -1].item())
    for size in (1, 3, 100):
        assert score_rows(model.train(), rows, size, new_run()) == pytest.approx(expected)
        assert not model.training
    ranks, gathered = [new_run() for _ in range(3)], []
    for rank, run in enumerate(ranks):
        run.rank, run.world = rank, 3
        run.sum, run.gather = list, lambda found: gathered.append(found) or found
        score_rows(model, rows, 1, run)
    assert [len(found) for found in gathered] == [2, 1, 1]  # the groups of rows to one prompt
    found = sorted(itertools.chain(*gathered))
    assert [score for _, some in found for score in some] == pytest.approx(expected)
    policy = small_gpt(dtype=torch.float64)

    def nats(logits, tokens, mask):
        return response_sums(token_logprobs(logits, tokens, mask)[mask], mask)

    found = score_rows(policy, rows, 3, new_run(), at=predicts, of=nats)
    for (prompt, response), nll in zip(rows, found, strict=True):
        logits = policy(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        alone = sum(law[token].item() for law, token in zip(logits, response, strict=True))
        assert nll == pytest.approx(alone)


# --- models and rewards ---------------------------------------------------------------------------


def test_add_scalar_head_and_dropout(small_gpt):
    """The trunk is the policy's; the head's std is 1/sqrt(n_embd + 1)."""
    policy = small_gpt(n_embd=256, n_layer=1, dropout=0.2)
    model = add_scalar_head(policy)
    for name, value in policy.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.score.weight.shape == (1, 256)
    assert model.score.weight.std().item() == pytest.approx(257**-0.5, rel=0.15)
    tokens = torch.arange(40)[None]
    for rate in (0.0, 0.5):
        set_dropout(model, rate)
        assert model.config.dropout == rate
        twice = [model.train()(tokens) for _ in range(2)]
        assert torch.equal(*twice) == (rate == 0)
        # All three places: after the embeddings, in attention, at each block's end.
        rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == {rate} == {block.attn.dropout for block in model.h}


def test_normalisation_vector():
    """methods.md B5."""
    raw = tensor(0.2, -1.1, 2.4, 0.5)
    statistics = score_statistics(raw)
    assert 1 / statistics["reward_std"] == pytest.approx(0.799361, abs=1e-6)
    assert normalised(raw, statistics).tolist() == pytest.approx(
        [-0.239808, -1.278977, 1.518785, 0], abs=1e-6
    )
    assert normalised(raw, RAW).tolist() == raw.tolist()
    bounded = score_statistics(raw, "sigmoid")
    assert bounded["score_transform"] == "sigmoid"
    found = normalised(raw, bounded)
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found[2].item() == pytest.approx(
        (1 / (1 + math.exp(-2.4)) - bounded["reward_mean"]) / bounded["reward_std"]
    )
    for bad in (tensor(1, 1), tensor(1, math.nan)):
        with pytest.raises(ValueError, match="can't be normalised"):
            score_statistics(bad)


def test_load_policy(rl_data, tmp_path, tokenizer, small_gpt, capsys):
    policy, theirs = load_policy(rl_data / "policy", new_run())
    assert not policy.training and policy.wte.weight.dtype == torch.float64
    assert theirs.n_vocab == tokenizer.n_vocab
    assert "nowhere: not a model directory" in refused(capsys, load_policy, "nowhere", new_run())
    said = refused(capsys, load_policy, rl_data / "reward", new_run())
    assert said == f"{rl_data / 'reward'}: has a scalar head, no language model's\n"
    other = Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)}, {END_OF_TEXT: 256})
    save_model(tmp_path / "bytes", small_gpt(vocab_size=257), other)
    said = refused(capsys, load_policy, rl_data / "policy", new_run(), tmp_path / "bytes")
    assert "was trained with the tokenizer" in said
    config = json.loads((rl_data / "policy/config.json").read_text())
    del config["tokenizer"]  # of another program's making: it goes by the vocabulary's size
    shutil.copytree(rl_data / "policy", tmp_path / "theirs")
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    _, theirs = load_policy(tmp_path / "theirs", new_run(), tmp_path / "bytes")
    assert theirs.n_vocab == 257


@pytest.mark.parametrize(
    "name, value",
    [
        ("reward_mean", None),
        ("reward_mean", "0"),
        ("reward_std", 0),
        ("reward_std", -1),
        ("reward_std", True),
        ("reward_std", math.inf),
        ("score_transform", "tanh"),
        ("score_transform", None),
        ("tokenizer", "000000000000"),
    ],
)
def test_damaged_statistics_are_refused(rl_data, tmp_path, name, value):
    shutil.copytree(rl_data / "reward", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text()) | {name: value}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"never normalised|was trained with the tokenizer"):
        load_reward_model(tmp_path / "run")


def canned_rollout(data, tokenizer, count=6):
    """Responses of different lengths, some of which did not end."""
    lines = read_lines(data / "prompts.jsonl")[:count]
    prompts = [(line, tokenizer.encode_ordinary(line["prompt"])) for line in lines]
    responses = [
        tokenizer.encode_ordinary(" I feel sad."[: 3 * (n + 1)])
        + [tokenizer.eot_token] * (n % 3 > 0)
        for n in range(count)
    ]
    return rollout_of(prompts, responses, tokenizer, "cpu")


def raw_scores(directory, rollout):
    """Of each response, one at a time, by the model alone."""
    model, found = load_model(directory).double(), []
    for row, n in zip(rollout.tokens, rollout.lengths, strict=True):
        with torch.no_grad():
            found.append(model(row[None, :n])[0, -1].item())
    return np.array(found)


def test_a_reward_model_scores(rl_data, tokenizer):
    rollout = canned_rollout(rl_data, tokenizer)
    raw = raw_scores(rl_data / "reward", rollout)
    for size in (0, 1, 4):
        reward = Reward(str(rl_data / "reward"), tokenizer, new_run())
        assert reward(rollout, size).tolist() == pytest.approx((raw - 0.1) / 1.2)
        assert not any(p.requires_grad for p in reward.model.parameters())
        reward = Reward(str(rl_data / "reward"), tokenizer, new_run(), raw=True)
        assert reward(rollout, size).tolist() == pytest.approx(raw) and reward.statistics == RAW


def test_a_score_that_is_no_number_is_refused(rl_data, tokenizer, capsys):
    """It would lose against everything, or tie with it, and nobody would see."""
    rollout = canned_rollout(rl_data, tokenizer)
    for bad in (math.nan, math.inf):
        reward = Reward(str(rl_data / "reward"), tokenizer, new_run())
        with torch.no_grad():
            reward.model.score.weight[0, 0] = bad
        message = "a response's score is (nan|inf|-inf): not finite\n"
        assert re.fullmatch(f"{rl_data / 'reward'}: {message}", refused(capsys, reward, rollout, 0))
        rows = [([1, 2], [3])]
        said = refused(capsys, score_rows, reward.model, rows, 4, new_run())
        assert re.fullmatch(f"the model: {message}", said)


def test_what_is_no_reward_model(rl_data, tokenizer, capsys):
    said = refused(capsys, Reward, str(rl_data / "policy"), tokenizer, new_run())
    assert f"{rl_data / 'policy'}: a language model, not a reward model" in said
    assert "not a model directory" in refused(capsys, Reward, "nowhere", tokenizer, new_run())
    other = Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)}, {END_OF_TEXT: 256})
    said = refused(capsys, Reward, str(rl_data / "reward"), other, new_run())
    assert "another tokenizer or template (" in said and "than the policy's (bytes)" in said


def test_a_file_scores(rl_data, tmp_path, tokenizer):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Part:\n    n: 'int' = 3\n"
        "def score(prompt, response, *, task, **fields):\n"
        "    assert 'response' not in fields and 'prompt' not in fields\n"
        "    return Part().n + len(response) + 0.5 * fields['bonus'] + (task == 'x')\n"
    )
    rollout = canned_rollout(rl_data, tokenizer)
    rollout.lines = [{"prompt": "P", "task": "x", "bonus": n, "response": "?"} for n in range(6)]
    found = Reward(str(tmp_path / "mine.py"), tokenizer, new_run())(rollout, 2)
    assert found.dtype == torch.float64
    assert found.tolist() == [4 + len(text) + 0.5 * n for n, text in enumerate(rollout.texts)]
    assert "<|endoftext|>" not in "".join(rollout.texts)  # the response without its EOS


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "mine.py: not a Python file"),
        ("x = 1\n", "mine.py: score: no such function; expected score(prompt, response, **fields)"),
        ("score = 3\n", "mine.py: score: expected score(prompt, response, **fields): lines have"),
        ("def score(a, b): return 1", "mine.py: score: expected score(prompt, response, **fields)"),
        (
            "def score(a, b, task=0): return 1",
            "mine.py: score: expected score(prompt, response, **",
        ),
        ("def compare(p, a, b): return 1", "mine.py: score: no such function; expected score(pr"),
        (
            "def score(p, r, **f): return 1\ndef explain(p, r): return {}",
            "mine.py: explain: expected explain(prompt, response, **fields): lines have fields of",
        ),
        ("import nothing_of_the_kind\n", "mine.py: can't be run: ModuleNotFoundError"),
        ("def score(:\n", "mine.py: can't be run: SyntaxError"),
        ("def score(prompt, response, **fields): return 'high'", "mine.py: score: ValueError"),
        ("def score(prompt, response, **fields): return None", "mine.py: score: TypeError"),
        ("def score(prompt, response, **fields): return float('nan')", "mine.py: score: nan for"),
        ("def score(prompt, response, **fields): return prompt[9999]", "mine.py: score: IndexErr"),
    ],
)
def test_bad_files(rl_data, tmp_path, tokenizer, capsys, text, message):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)

    def scored():
        return Reward(str(tmp_path / "mine.py"), tokenizer, new_run())(
            canned_rollout(rl_data, tokenizer), 0
        )

    assert message in refused(capsys, scored)


def test_what_explains_a_score(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def score(prompt, response, **fields): return 2\n"
        "def explain(prompt, response, **fields): return fields['parts']\n"
    )
    gold = load_python(tmp_path / "mine.py")
    line = {"prompt": "P", "parts": {"short": True, "score": 9, "n": 1}}
    assert feedback.judged(gold, line, "r") == {"gold": 2.0, "short": 1.0, "n": 1.0}
    assert feedback.judged(None, line, "r") == {}
    for parts, message in [
        ({"n": math.inf}, "explain: {'n': inf} for 'r' to 'P': not finite"),
        ({"n": "many"}, "explain: ValueError"),
        (3, "explain: AttributeError"),
    ]:
        said = refused(capsys, feedback.judged, gold, line | {"parts": parts}, "r")
        assert f"mine.py: {message}" in said


# --- rollouts -------------------------------------------------------------------------------------


def test_parts_of_a_rollout(small_gpt, tokenizer):
    """Rows at a time, without columns that are pads in all of them; and joined again."""
    prompts = [({"prompt": "a"}, [1, 2]), ({"prompt": "b"}, [3]), ({"prompt": "c"}, [4, 5])]
    eos = tokenizer.eot_token
    rollout = rollout_of(prompts, [[6, eos], [7], [8, 9, 10, 11]], tokenizer, "cpu")
    assert isinstance(rollout, Rollout) and rollout.ended.tolist() == [True, False, False]
    assert rollout.lengths == [4, 2, 6] and rollout.tokens.shape == (3, 6)
    expected = [tokenizer.decode(ids) for ids in ([6], [7], [8, 9, 10, 11])]
    assert rollout.texts == expected and [line["prompt"] for line in rollout.lines] == [
        "a",
        "b",
        "c",
    ]
    for real in range(4):  # the others go along
        assert torch.equal(rollout.counted(real)[:real], rollout.mask[:real])
        assert not rollout.counted(real)[real:].any()
    shapes = {0: [(3, 6)], 1: [(1, 4), (1, 2), (1, 6)], 2: [(2, 4), (1, 6)], 9: [(3, 6)]}
    model = small_gpt(dtype=torch.float64, vocab_size=tokenizer.n_vocab)
    for size, expected in shapes.items():
        assert [tuple(tokens.shape) for tokens, _ in rollout.parts(size)] == expected
        logprobs = rollout.each(size, new_run(), logprobs_of, model, 0.7)
        assert logprobs.shape == (3, 6) and not logprobs.requires_grad
        for row, inside, tokens in zip(logprobs, rollout.mask, rollout.tokens, strict=True):
            at = inside.nonzero().flatten().tolist()
            law = (model(tokens[None, : at[-1] + 1])[0] / 0.7).log_softmax(-1)
            assert row[inside].tolist() == pytest.approx([law[t - 1, tokens[t]].item() for t in at])
            assert not row[~inside].any()


def test_sampling_is_at_the_temperature(small_gpt, tokenizer):
    """0 takes the most likely token, 1 gives each token its probability, 2 evens them."""
    model, marks = small_gpt(vocab_size=6), SimpleNamespace(ends=(5,), bytes_of=lambda token: b"")
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2]]))[0, -1]
    laws = {0.0: torch.eye(6)[logits.argmax()]}
    laws |= {temperature: (logits / temperature).softmax(-1) for temperature in (1.0, 2.0)}
    assert (laws[2.0] - laws[1.0]).abs().sum() > 0.3
    for temperature, law in laws.items():
        cfg = RewardFlags(max_new_tokens=1, micro_batch_size=125)
        generator = torch.Generator().manual_seed(0)
        prompts = [({"prompt": ""}, [1, 2])] * 4000
        rollout = sample_rollout(model, prompts, marks, cfg, temperature, generator)
        counts = rollout.tokens[:, 2].bincount(minlength=6) / 4000
        assert (counts - law).abs().sum() < 0.06
        assert (rollout.ended == (rollout.tokens[:, 2] == 5)).all()


def as_rank(rank, world, cfg):
    """A stand-in for one rank's run."""
    return SimpleNamespace(
        rank=rank, world=world, cfg=cfg, step=3, device=torch.device("cpu"), sampler=lambda m: m,
        stop_if_told=lambda: None,
    )  # fmt: skip


@pytest.mark.parametrize("world, groups, num_samples", [(1, 6, 1), (2, 5, 1), (2, 3, 4), (3, 2, 2)])
def test_ranks_share_the_episodes(monkeypatch, world, groups, num_samples):
    """Every prompt is sampled once, by one rank, as often as it should be; ranks draw differently;
    one with a prompt less goes along with rows that count for nothing."""
    prompts = [({"prompt": str(i)}, [1] * (9 - i)) for i in range(8)]
    cfg = RewardFlags(batch_size=groups * num_samples, seed=2, temperature=0.7)
    asked = []

    def sampled(sampler, some, tokenizer, cfg, temperature, generator):
        asked.append((some, temperature, generator.initial_seed()))
        return "a rollout"

    monkeypatch.setattr(feedback, "sample_rollout", sampled)
    real = []
    for rank in range(world):
        run = as_rank(rank, world, cfg)
        found, count = sample_step(run, None, prompts, None, num_samples)
        assert found == "a rollout"
        real.append(count)
    assert sum(real) == groups * num_samples
    order = prompts_of_step(8, groups, 3, 2)
    counted = [p for (some, *_), n in zip(asked, real, strict=True) for p in some[:n]]
    for i in range(8):
        assert counted.count(prompts[i]) == order.count(i) * num_samples
    for rank, (some, temperature, _) in enumerate(asked):
        lengths = [len(ids) for _, ids in some[: real[rank]]]
        assert lengths == sorted(lengths) and temperature == 0.7
        assert all(some[i] == some[i // num_samples * num_samples] for i in range(len(some)))
        assert len(some) == len(asked[0][0])
        assert some[real[rank] :] in ([], [prompts[order[0]]] * num_samples)
    assert len({seed for *_, seed in asked}) == world
    run = as_rank(0, world, cfg)
    run.step = 4
    sample_step(run, None, prompts, None, num_samples)
    assert asked[-1][2] != asked[0][2]


# --- the mathematics of rollouts ------------------------------------------------------------------

LOGPROBS, REF, MASK = tensor([-1, -0.5, -2]), tensor([-1.2, -0.9, -1.5]), torch.ones(1, 3).bool()


def test_kl_estimator_vectors():
    """Of the three tokens of card C1, and exactly: what each estimator is on average over q."""
    for kind, mean in [("k1", 0.033333), ("k2", 0.075), ("k3", 0.079257)]:
        found = kl_estimate(LOGPROBS, REF, kind).mean().item()
        assert found == pytest.approx(mean, abs=1e-6)
    q, p = tensor(0.5, 0.3, 0.2), tensor(0.4, 0.4, 0.2)
    for kind, mean in [("k1", 0.025267), ("k2", 0.024862), ("k3", 0.025267)]:
        estimates = kl_estimate(q.log(), p.log(), kind)
        assert (q * estimates).sum().item() == pytest.approx(mean, abs=1e-6)
    near = kl_estimate(torch.zeros(1), torch.tensor([1e-4]), "k3").item()  # float32
    assert near == pytest.approx(5e-9, rel=0.01)
    with pytest.raises(ValueError, match="expected k1, k2 or k3"):
        kl_estimate(q, p, "k4")


def test_kl_estimators_on_a_language_model(small_gpt):
    """Every response of up to 3 tokens of a small vocabulary: the sum of k1, and of k3, weighted by
    probability, is the exact KL of the two laws of responses. And the gradients, of a reward that
    pays k1, and of k2 and k3 in a loss, are those of the KLs that they stand for."""
    sizes = {"vocab_size": 4, "dtype": torch.float64, "initializer_range": 0.6}
    policy, reference = small_gpt(**sizes), small_gpt(**sizes, seed=1)
    prompt, eos = [1, 2], 3
    responses = [
        [*body, last]
        for length in (1, 2, 3)
        for body in itertools.product(range(3), repeat=length - 1)
        for last in (range(4) if length == 3 else [eos])
    ]
    tokens, mask = pad([prompt] * len(responses), responses)
    with torch.no_grad():
        logprobs, ref = (logprobs_of(tokens, mask, model, 1.0) for model in (policy, reference))
    p = logprobs.sum(1).exp()
    exact = (p * (logprobs - ref).sum(1)).sum().item()
    assert p.sum().item() == pytest.approx(1) and exact > 0.01
    for kind in ("k1", "k3"):  # unbiased given the context, token by token
        estimates = (kl_estimate(logprobs, ref, kind) * mask).sum(1)
        assert (p * estimates).sum().item() == pytest.approx(exact, abs=1e-9)

    weights = list(policy.parameters())

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    new = logprobs_of(tokens, mask, policy, 1.0)
    whole = gradient((new.sum(1).exp() * (new - ref).sum(1)).sum())
    returns = token_rewards(torch.zeros(len(p)), logprobs, ref, mask, 1.0).sum(1)
    new = logprobs_of(tokens, mask, policy, 1.0)
    assert torch.allclose(gradient(-(p * returns * new.sum(1)).sum()), whole, atol=1e-9)
    # In a loss: of the next token's two laws, given what came before, which it takes as it comes.
    each = p.repeat_interleave(mask.sum(1))  # the probability of each state's response
    for kind, models in (("k2", (policy, reference)), ("k3", (reference, policy))):
        one, other = (model(tokens, predicts(mask)).log_softmax(-1) for model in models)
        exact = (each * (one.exp() * (one - other)).sum(1)).sum()
        new = logprobs_of(tokens, mask, policy, 1.0)
        estimates = (kl_estimate(new, ref, kind) * mask).sum(1)
        found, wanted = gradient((p * estimates).sum()), gradient(exact)
        assert torch.allclose(found, wanted, atol=1e-9) and wanted.norm() > 0.01


def ragged(rows=6, T=11, seed=0):
    """Masks of different beginnings and lengths, and garbage everywhere else."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(rows, T, dtype=torch.bool)
    for row in mask:
        begin = rng.integers(1, 4)
        row[begin : begin + rng.integers(1, T - begin + 1)] = True
    return mask, *(torch.tensor(rng.normal(size=(rows, T))) for _ in range(3))


def test_a_score_lands_on_the_last_token():
    rewards = token_rewards(tensor(1.5), LOGPROBS, REF, MASK, 0.1)
    assert rewards[0].tolist() == pytest.approx([-0.02, -0.04, 1.55])
    mask, logprobs, ref, _ = ragged()
    scores = torch.arange(1.0, 7, dtype=torch.float64)
    rewards = token_rewards(scores, logprobs, ref, mask, 0.0)
    assert rewards.sum(1).tolist() == scores.tolist()
    for row, inside in zip(rewards, mask, strict=True):
        assert row.nonzero().flatten().tolist() == [inside.nonzero().max().item()]
    full = token_rewards(scores, logprobs, ref, mask, 0.1)
    assert not full[~mask].any()
    assert torch.allclose(full.sum(1), scores - 0.1 * ((logprobs - ref) * mask).sum(1))


def test_whitening_is_over_the_mask_and_over_ranks():
    rewards = tensor([-0.02, -0.04, 1.55])
    white = whiten(tensor([1.113625, 0.8775, 0.65]), MASK)
    assert white[0].tolist() == pytest.approx([1.232268, -0.015189, -1.217080], abs=1e-6)
    scaled = whiten(rewards, MASK, shift_mean=False)
    assert scaled[0].tolist() == pytest.approx([-0.196972, -0.223823, 1.910795], abs=1e-6)
    mask, x, *_ = ragged()
    white, inside = whiten(x, mask), x[mask].numpy()
    expected = (inside - inside.mean()) / np.sqrt(inside.var() + 1e-8)
    assert white[mask].numpy() == pytest.approx(expected) and not white[~mask].any()
    shifted = whiten(x, mask, shift_mean=False)
    assert shifted[mask].numpy() == pytest.approx(expected + inside.mean())
    assert not shifted[~mask].any()
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
        found = whiten(part, inside, all_reduce=lambda t, others=others: t + next(others))
        assert torch.allclose(found, white[:2] if n == 0 else white[2:])


def test_explained_variance():
    mask, returns, values, _ = ragged()
    values = 0.7 * returns + 0.3 * values + 1
    expected = 1 - np.var((returns - values)[mask].numpy()) / np.var(returns[mask].numpy())
    assert explained_variance(returns, values, mask) == pytest.approx(expected)
    assert explained_variance(0 * returns, values, mask) == 0.0
    doubled = explained_variance(returns, values, mask, all_reduce=lambda sums: 2 * sums)
    assert doubled == pytest.approx(expected)


# --- several rewards, and what is learnt from them ------------------------------------------------


def test_combined_and_shaped_vectors():
    """Cards B7 and 13: Llama 2's reward, PAR; a mean and the least of several."""
    safe, helpful = tensor(0.9, 0.1, 0.6, 0.3), tensor(0.2, 0.8, 0.7, 0.95)
    unsafe = torch.tensor([True, False, False, False])
    combined = helpful_or_safe(helpful.logit(), safe.logit(), unsafe)
    assert combined.tolist() == pytest.approx([2.197225, -2.197225, 0.847298, 2.944439], abs=1e-6)
    white = whiten(combined, torch.ones(4))
    assert white.tolist() == pytest.approx([0.635689, -1.600382, -0.051208, 1.015901], abs=1e-6)
    for refs, expected in [([0.9], 0.689974), ([0.9, 0.2, 1.5], 0.685794)]:
        found = par_scores(tensor(1.7), tensor(*[[r] for r in refs]))
        assert found.item() == pytest.approx(expected, abs=1e-6)
    scores = tensor([1.0, 2.0], [3.0, -1.0])
    assert combine_scores(scores, [1.0, 1.0], "mean").tolist() == [2.0, 0.5]
    assert combine_scores(scores, [3.0, 1.0], "mean").tolist() == [1.5, 1.25]
    assert combine_scores(scores, [1.0, 1.0], "min").tolist() == [1.0, -1.0]


def test_what_did_not_end():
    """It scores the smaller of --missing_eos_score and the lowest in the batch; rows that a rank
    without episodes goes along with count for nothing."""
    own, ended = tensor(0.5, 3.0, -2.0), torch.tensor([True, False, True])
    for given, real, expected in [
        (None, 3, 3.0),
        (-7.0, 3, -7.0),
        (50.0, 3, -2.0),
        (50.0, 2, 0.5),
        (50.0, 0, 50.0),
    ]:
        cfg = RewardFlags(missing_eos_score=given)
        found = punish_missing_eos(own, ended, real, cfg, new_run())
        assert found.tolist() == [0.5, expected, -2.0]
    low = SimpleNamespace(gather=lambda found: [*found, -9.0])  # another rank's lowest
    found = punish_missing_eos(own, ended, 3, RewardFlags(), low)
    assert found.tolist() == [0.5, -9.0, -2.0]


def test_rewards_together(rl_data, tmp_path, tokenizer):
    """Two models and a file: each combination and shaping against the scores one at a time."""
    rollout, run = canned_rollout(rl_data, tokenizer), new_run()
    (tmp_path / "words.py").write_text(
        "def score(prompt, response, **fields): return -len(response.split())\n"
    )
    first = (raw_scores(rl_data / "reward", rollout) - 0.1) / 1.2
    second = (raw_scores(rl_data / "other", rollout) + 0.2) / 0.7
    words = [-len(text.split()) for text in rollout.texts]
    names = tuple(map(str, (rl_data / "reward", rl_data / "other", tmp_path / "words.py")))

    def scores(real=6, **settings):
        cfg = RewardFlags(max_new_tokens=8, **settings)
        rewards = Rewards(cfg, tokenizer, run)
        return rewards(rollout, 4).numpy(), rewards.shaped(rollout, real, 4).numpy(), rewards

    every = np.array([first, second, words])
    together, shaped, rewards = scores(reward=names)
    assert together == pytest.approx(every.mean(0)) and (shaped == together).all()
    assert len(rewards.models) == 2  # whose positions bound a prompt's
    together, *_ = scores(reward=names, reward_weights=(3.0, 0.0, 1.0))
    assert together == pytest.approx((3 * first + words) / 4)
    together, *_ = scores(reward=names, combine="min")
    assert together == pytest.approx(every.min(0))
    # Llama 2's: raw scores, the safe one's where it must decide.
    for n, line in enumerate(rollout.lines):
        line["unsafe"] = n % 3 == 0
    raws = [raw_scores(rl_data / name, rollout) for name in ("reward", "other")]
    decides = np.array([n % 3 == 0 for n in range(6)]) | (1 / (1 + np.exp(-raws[1])) < 0.15)
    together, *_ = scores(reward=names[:2], combine="llama2")
    assert together == pytest.approx(np.where(decides, raws[1], raws[0]))
    del rollout.lines[1]["unsafe"]  # as if false
    assert scores(reward=names[:2], combine="llama2")[0] == pytest.approx(together)

    _, shaped, _ = scores(reward=names[:1], shaping="clip", score_clip=1.0)
    assert shaped == pytest.approx(first.clip(-1, 1))
    assert (abs(first) > 1).any() and (abs(first) < 1).any()
    _, shaped, _ = scores(reward=names[:1], shaping="whiten", real=4)
    few = first[:4]
    assert shaped[:4] == pytest.approx((few - few.mean()) / np.sqrt(few.var() + 1e-8))
    # Two more episodes on another rank: what they add to the sums.
    both = np.append(few, [5.0, 7.0])
    more = [tensor(2, 12), tensor(((both[4:] - both.mean()) ** 2).sum())]
    run.sum_tensor = lambda sums: sums + more.pop(0) if more else sums
    _, shaped, _ = scores(reward=names[:1], shaping="whiten", real=4)
    assert shaped[:4] == pytest.approx((few - both.mean()) / np.sqrt(both.var() + 1e-8))
    # PAR: beside the prompt's own reference, as long as a response may be.
    texts = [f" I have a boat and a tent{'.' * n}" for n in range(6)]
    for line, text in zip(rollout.lines, texts, strict=True):
        line["reference"] = text
    _, shaped, _ = scores(reward=names[:1], shaping="par")
    theirs = []
    for line, text in zip(rollout.lines, texts, strict=True):
        ids = [*tokenizer.encode_ordinary(text), tokenizer.eot_token][:8]
        prompts = [(line, tokenizer.encode_ordinary(line["prompt"]))]
        one = rollout_of(prompts, [ids], tokenizer, "cpu")
        theirs.append(raw_scores(rl_data / "reward", one)[0])  # log-odds, as the model has them
    assert shaped == pytest.approx(1 / (1 + np.exp(theirs - raws[0])))
    _, shaped, _ = scores(reward=(str(tmp_path / "words.py"),), shaping="par")  # reads the text
    gap = np.array([len(text.split()) for text in texts]) + words
    assert shaped == pytest.approx(1 / (1 + np.exp(-gap)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reward": ()}, "--reward: expected one at least"),
        ({"reward_weights": (1.0, 2.0)}, "--reward_weights: expected one a --reward"),
        ({"reward_weights": (0.0,)}, "--reward_weights: all are 0"),
        ({"combine": "llama2"}, "--combine llama2: two, helpful,safe"),
        ({"reward": ("a.py", "b.py"), "shaping": "par"}, "--shaping par: reads one reward model's"),
        ({"num_samples": 3}, "--num_samples: --batch_size is no whole groups of it"),
        ({"ptx_coef": 1.0}, "--ptx_coef, --ptx_data: only together"),
        ({"ptx_data": "x.jsonl"}, "--ptx_coef, --ptx_data: only together"),
    ],
)
def test_flags_that_contradict_each_other(capsys, settings, message):
    assert refused(capsys, check_rewards, RewardFlags(**settings)).startswith(message)
    check_rewards(RewardFlags())


def test_self_checks(capsys):
    run, cfg = new_run(dtype="float32"), RewardFlags()
    check_start(tensor([-1.0, -2.0]), tensor([-1.0, -2.000009]), cfg, run)
    said = refused(capsys, check_start, tensor([-1.0]), tensor([-1.00002]), cfg, run)
    assert "self-check: the untrained policy is 2.0e-05 nats a token from the reference" in said
    check_start(tensor([-1.0]), tensor([-1.0009]), dataclasses.replace(cfg, compile=True), run)
    refused(capsys, check_start, tensor([math.nan]), tensor([-1.0]), cfg, run)
    for dtype, limit in feedback.LIMITS.items():
        run.dtype = dtype
        check_ratio(tensor(1 + 0.9 * limit, 1 - 0.9 * limit), run)
        said = refused(capsys, check_ratio, tensor(1, 1 - 1.1 * limit), run)
        assert "self-check: the first minibatch's ratio is" in said and "dropout" in said
        refused(capsys, check_ratio, tensor(1, math.nan), run)
    for other in (9.0, math.nan):  # another rank's: all end
        run.gather = lambda found, other=other: [*found, other]
        refused(capsys, check_ratio, tensor(1.0), run)
        refused(capsys, check_start, tensor([-1.0]), tensor([-1.0]), cfg, run)


def test_numbers_of_an_iteration(rl_data, tokenizer):
    """Means over the episodes that count, and over the tokens that were trained."""
    rollout = canned_rollout(rl_data, tokenizer)
    rollout.texts[1] = " "
    gaps = 0.1 * rollout.mask
    totals = totals_of(rollout, tensor(1, 2, 3, 4, 5, 6), gaps, 3)
    lengths = [len(response) for response in rollout.responses]
    assert totals == pytest.approx(
        {
            "episodes": 3,
            "score": 6,
            "score_square": 14,
            "prompt_square": 14,
            "kl": 0.1 * sum(lengths[:3]),
            "eos": 2,
            "empty": 1,
            "tokens": sum(lengths[:3]),
        }
    )
    totals |= {
        "score": 9.0,
        "score_square": 39.0,
        "prompt_square": 30.0,
        "kl": 1.5,
        "tokens": 12,
        "loss": 4.0,
        "trained": 8.0,
    }
    record = record_of(totals, ("loss", "trained"), 0.2, (10.0, 11.0, 11.5, 14.0))
    assert record == pytest.approx(
        {
            "score": 3.0,
            "score_std": 2.0,  # 39 / 3 - 3^2 = 4, of which 30 / 3 - 3^2 is between prompts
            "score_std_between": 1.0,
            "score_std_within": 3**0.5,
            "kl": 0.5,
            "eos": 2 / 3,
            "empty": 1 / 3,
            "tokens": 4.0,
            "loss": 0.5,
            "objective": 2.9,
            "beta": 0.2,
            "rollout_share": 0.25,
            "scoring_share": 0.125,
            "update_share": 0.625,
        }
    )


def test_warnings():
    cfg, before = RewardFlags(max_new_tokens=10), {"eos": 1.0, "value_loss": 0.5}
    good = {"kl": 1.0, "eos": 0.95, "empty": 0.0, "tokens": 5.0, "value_loss": 0.4}
    assert warnings_of(good, before, cfg) == []
    for change, words in [
        ({"kl": -1.0}, "below 0"),
        ({"eos": 0.7}, "fewer responses end"),
        ({"empty": 0.03}, "3.0% of the responses are empty"),
        ({"tokens": 9.5}, "as long as --max_new_tokens"),
        ({"value_loss": 9.0}, "lower --value_lr"),
    ]:
        (found,) = warnings_of(good | change, before, cfg)
        assert words in found
    del good["value_loss"]  # where there is no value network
    assert warnings_of(good, {"eos": 1.0}, cfg) == []
    found = warnings_of(good | {"eos": 0.4}, {"eos": 0.45}, cfg)
    assert len(found) == 1 and "most responses do not end" in found[0]


# --- demonstrations beside the reward -------------------------------------------------------------


def test_the_gradient_of_demonstrations(small_gpt):
    """ptx_coef times the nats a token of the update's demonstrations, whatever the micro-batches,
    added to what is there; the next update's are the next ones; and the held-out ones' mean."""
    ptx = [(p, r) for p, r in ROWS if r]
    model = small_gpt(dtype=torch.float64)

    def nats(examples):
        total = 0.0
        for prompt, response in examples:
            logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
            laws = logits.log_softmax(-1)
            total = total - sum(law[token] for law, token in zip(laws, response, strict=True))
        return total, sum(len(response) for _, response in examples)

    for update, size in [(0, 1), (0, 2), (1, 4), (5, 3)]:
        run = new_run(ptx_coef=0.7, ptx_batch_size=4, seed=3)
        lines = [ptx[i] for i in prompts_of_step(len(ptx), 4, update, 3)]
        total, count = nats(lines)
        expected = torch.autograd.grad(0.7 * total / count, list(model.parameters()))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        sums = add_ptx_gradient(model, ptx, update, size, run.cfg, run)
        assert sums.tolist() == pytest.approx([total.item(), count])
        for p, gradient in zip(model.parameters(), expected, strict=True):
            assert torch.allclose(p.grad - 1, gradient, atol=1e-12)
    total, count = nats(ptx)
    for size in (0, 1, 3):
        assert held_out_nll(model, ptx, size, new_run()) == pytest.approx(
            {"nll": (total / count).item()}
        )
    assert held_out_nll(model, [], 3, new_run()) == {}


# --- samples for held-out prompts -----------------------------------------------------------------


def test_respond(rl_data, tokenizer, tmp_path):
    """One sample to each prompt, in order, each with what it is worth; the same again; others by
    another seed; the KL and the scores are those of the response alone."""
    (tmp_path / "gold.py").write_text(
        "def score(prompt, response, **fields): return len(response)\n"
        "def explain(prompt, response, **fields): return {'prompt': len(prompt)}\n"
    )
    run = new_run(reward=(str(rl_data / "reward"),))
    policy, _ = load_policy(rl_data / "policy", run)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.wte.weight.mul_(0.8)
    prompts = read_prompts(rl_data / "held.jsonl", tokenizer, 60)
    rewards = Rewards(run.cfg, tokenizer, run)
    how = {"score": rewards, "gold": load_python(tmp_path / "gold.py"), "kl_to": reference}

    def drawn(seed=5, rows=4, temperature=1.0, **how):
        return respond(run, policy, prompts, tokenizer, temperature, rows, seed, **how)

    samples = drawn(**how)
    assert [s["index"] for s in samples] == list(range(9))
    assert [s["prompt"] for s in samples] == [line["prompt"] for line, _ in prompts]
    assert [s["task"] for s in samples] == [line["task"] for line, _ in prompts]
    assert drawn(**how) == samples
    others = [s["response"] for s in drawn(6)]
    assert sum(s["response"] == other for s, other in zip(samples, others, strict=True)) < 6
    for (line, ids), sample in zip(prompts, samples, strict=True):
        text, parts = sample["response"], sample["parts"]
        assert parts.keys() == {"words", "eos", "gold", "prompt", "proxy", "kl"}
        assert parts["words"] == len(text.split()) and parts["gold"] == len(text)
        assert parts["prompt"] == len(line["prompt"])
        # What the tokens were is known by the text where the vocabulary's pieces are as in it.
        response = tokenizer.encode_ordinary(text) + [tokenizer.eot_token] * (parts["eos"] == 1)
        if "\ufffd" in text or len(response) > 8:
            continue
        ours, theirs = (
            logprobs_of(*pad([ids], [response]), model, 1.0).sum() for model in (policy, reference)
        )
        if len(response) == 8 or parts["eos"]:
            one = rollout_of([(line, ids)], [response], tokenizer, "cpu")
            assert parts["proxy"] == pytest.approx(rewards(one, 0).item(), abs=1e-9)
            assert parts["kl"] == pytest.approx((ours - theirs).item(), abs=1e-9)
    greedy = drawn(temperature=0.0, kl_to=reference)
    assert "kl" not in greedy[0]["parts"] and greedy == drawn(9, temperature=0.0)
    assert {frozenset(s["parts"]) for s in drawn()} == {frozenset({"words", "eos"})}
    assert respond(run, policy, [], tokenizer, 1.0, 4, 5, **how) == []


def test_ranks_share_the_samples(rl_data, tokenizer):
    """On two ranks: all samples on both, every prompt once, each rank drawing its own numbers."""
    code = (
        "import json, signal\n"
        "def main():\n"
        f"    r = run.Run(feedback.PolicyFlags(device='cpu', max_new_tokens=8))\n"
        f"    policy, tokenizer = feedback.load_policy({str(rl_data / 'policy')!r}, r)\n"
        f"    path = {str(rl_data / 'held.jsonl')!r}\n"
        "    prompts = feedback.read_prompts(path, tokenizer, 60)\n"
        "    prompts += prompts[:1] * 9\n"  # the same prompt many times: would both say the same?
        "    for n in (18, 1):\n"
        "        found = feedback.respond(r, policy, prompts[:n], tokenizer, 1.0, 2, 5)\n"
        "        found = [[s['index'], s['prompt'], s['response']] for s in found]\n"
        "        os.write(1, b'found ' + json.dumps(found).encode() + b'\\n')\n"
        "import run\nrun.guarded(main)\n"
    )
    done = on_ranks("feedback", code)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(x[6:]) for x in done.stdout.splitlines() if x.startswith("found ")]
    prompts = [line["prompt"] for line in read_lines(rl_data / "held.jsonl")]
    prompts += prompts[:1] * 9
    assert len(found) == 4 and found[0] == found[2] and found[1] == found[3]
    assert [(i, prompt) for i, prompt, _ in found[0]] == list(enumerate(prompts))
    assert len({text for *_, text in found[0][9:]}) > 5 and len(found[1]) == 1


def test_samples_to_normalise_on(rl_data, tokenizer, capsys):
    run = new_run(max_new_tokens=6)
    policy, _ = load_policy(rl_data / "policy", run)
    prompts = read_prompts(rl_data / "held.jsonl", tokenizer, 60)
    samples = respond(run, policy, prompts, tokenizer, 1.0, 4, run.cfg.seed)
    rows = ended_rows(run, policy, prompts, tokenizer, 4, 96)
    kept = [s for s in samples if s["parts"]["eos"] and s["response"].strip()]
    assert 2 <= len(kept) < 9
    assert rows == [encode(tokenizer, s["prompt"], s["response"], 96) for s in kept]
    said = capsys.readouterr().out
    assert (
        f"scores are normalised on {len(kept)} samples ({9 - len(kept)} more did not end): few, "
        in said
    )
    said = refused(capsys, ended_rows, run, policy, [], tokenizer, 4, 96)
    assert said.startswith("0 of 0 samples to normalise on ended, 2 are needed at least")


def test_distinct():
    """methods.md I 23: two texts, seven words, three different; five pairs, three different."""
    texts = ["a b a b", "a b c"]
    assert distinct(texts, 1) == pytest.approx(0.428571, abs=1e-6)
    assert distinct(texts, 2) == pytest.approx(0.6)
    assert distinct(["", "a"], 2) == 0.0


def sample(response="a b", task=None, **parts):
    return {"prompt": "P", "response": response, "parts": parts} | ({"task": task} if task else {})


def test_numbers():
    """Means over all and by task; prompts may have a task or none; parts that some lack are left
    out; wins by gold, else by proxy, ties half, and one score for all that did not end."""
    samples = [
        sample(task="a", x=1.0, y=0.5), sample("b c", "a", x=3.0, y=0.5), sample("", x=8.0),
    ]  # fmt: skip
    assert numbers(samples) == {
        "x": 4.0, "a_x": 2.0, "a_y": 0.5, "distinct_2": 1.0,
    }  # fmt: skip
    assert numbers([]) == {} and numbers([sample(task="all", x=1.0)]).keys() == {"x", "distinct_2"}

    ours = [sample(gold=x, proxy=0.0, eos=1.0) for x in (2.0, 1.0, 0.0)]
    theirs = [sample(gold=x, proxy=9.0, eos=1.0) for x in (1.0, 1.0, 5.0)]
    assert numbers(ours, theirs, -1.0)["win_rate"] == 0.5
    assert numbers(ours[:2], theirs[:2], -1.0)["win_rate"] == 0.75
    assert "win_rate" not in numbers(ours) and "win_rate" not in numbers(
        [sample(x=1)], [sample(x=1)]
    )
    # By proxy: what did not end has the lowest of all, or less, whatever it scores.
    ours, theirs = [sample(proxy=1.0, eos=1.0)], [sample(proxy=9.0, eos=0.0)]
    assert numbers(ours, theirs)["win_rate"] == 0.0  # each one's own
    assert numbers(ours, theirs, -1.0)["win_rate"] == 1.0
    assert numbers(theirs, ours, -1.0)["win_rate"] == 0.0
    assert numbers(theirs, theirs, 50.0)["win_rate"] == 0.5
    low = [sample(proxy=-7.0, eos=1.0)]
    assert numbers(low, theirs, -1.0)["win_rate"] == 0.5  # the floor is the lowest that ended
    # And so is it in means, as in training's.
    assert numbers(theirs, ours, 50.0)["proxy"] == 1.0 and numbers(theirs)["proxy"] == 9.0
    assert numbers(theirs, low, -1.0)["proxy"] == -7.0
    assert theirs == [sample(proxy=9.0, eos=0.0)]


def test_what_is_shown(tmp_path, capsys):
    found = {"a_gold": 1.0, "kl": 2.0, "gold": 3.0, "distinct_2": 0.5, "nll": 4.0}
    assert list(brief(found).items()) == [
        ("nll", 4.0), ("gold", 3.0), ("kl", 2.0), ("distinct_2", 0.5),
    ]  # fmt: skip
    samples = [sample(task=task, kl=1.2345) for task in ("b", "a", "b", None, "all", "a")]
    samples = [s | {"index": i} for i, s in enumerate(samples)]
    assert [s["index"] for s, _ in one_a_task([(s, None) for s in samples])] == [0, 3, 1]
    run = new_run(tmp_path)
    run.step = 7
    show(run, samples)
    lines = read_lines(tmp_path / "samples.jsonl")
    assert lines == [{"step": 7} | samples[i] for i in (0, 3, 1)]
    assert capsys.readouterr().out == 3 * "  'P'\n    -> 'a b'\n    kl 1.23\n"


# --- rates and ratings ----------------------------------------------------------------------------


def test_rate_interval():
    """Groups of one are Wilson's interval (by its definition: the p at 1.96 standard errors); pairs
    that always agree in a group count as one; simulated groups' truth is covered in 95%."""
    hits = [1] * 30 + [0] * 20
    rate, low, high = rate_interval(hits, [1] * 50)
    n = 49  # one degree of freedom goes to the mean
    for p in (low, high):
        assert abs(rate - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))
    assert rate_interval([6 * h for h in hits], [6] * 50) == pytest.approx([rate, low, high])
    assert rate_interval([2], [4]) == [0.5, None, None]
    assert rate_interval([], []) == [None, None, None]
    rate, low, high = rate_interval([1] * 5, [1] * 5)
    assert rate == 1.0 and low == pytest.approx(5 / (5 + 1.96**2)) and high == pytest.approx(1)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        counts = rng.integers(1, 7, 150)
        hits = rng.binomial(counts, rng.beta(7, 3, 150))  # of mean 0.7
        _, low, high = rate_interval(hits, counts)
        covered += low <= 0.7 <= high
    assert 935 <= covered <= 965


def test_rates_of_groups():
    rows = [("p", 1.0), ("p", 0.0), ("q", 1.0), ("r", 0.5), ("r", 1.0), ("r", 0.0)]
    assert grouped_rate(rows) == {"rate": rate_interval([1, 1, 1.5], [2, 1, 3]), "pairs": 6}


def test_bradley_terry_vector():
    scores = fit_ratings([[0, 3, 2], [1, 0, 3], [1, 1, 0]])
    assert scores == pytest.approx([0.657584, 0, -0.657584], abs=1e-6)


def test_fit_against_minorise_maximise():
    """Hunter's slow algorithm, which is another way to the same maximum (2004, eq. 3)."""
    rng = np.random.default_rng(1)
    wins = rng.integers(1, 9, (7, 7)).astype(float) * (1 - np.eye(7))
    strengths = np.ones(7)
    for _ in range(3000):
        both = (wins + wins.T) / (strengths[:, None] + strengths[None])
        strengths = wins.sum(1) / both.sum(1)
        strengths /= np.exp(np.log(strengths).mean())
    assert fit_ratings(wins) == pytest.approx(np.log(strengths), abs=1e-8)
    many = np.stack([wins, wins.T, 3 * wins])
    found = fit_ratings(many)
    assert found[1] == pytest.approx(fit_ratings(wins.T), abs=1e-9)
    assert found[2] == pytest.approx(found[0], abs=1e-9)


def test_undefeated_players_and_strangers():
    """Half a win each way keeps an undefeated player's score finite; players who never met have no
    ratings; who met by way of others has."""
    lone = fit_ratings([[0, 5], [0, 0]])
    assert lone[0] - lone[1] == pytest.approx(math.log(5.5 / 0.5), abs=1e-8)
    assert fit_ratings([[0, 5], [5, 0]]) == pytest.approx([0, 0], abs=1e-12)
    chain = fit_ratings([[0, 2, 0], [1, 0, 2], [0, 1, 0]])
    assert chain == pytest.approx([math.log(2), 0, -math.log(2)], abs=1e-8)
    with pytest.raises(ValueError, match="never met"):
        fit_ratings([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
