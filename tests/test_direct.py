"""rlaif.py direct: REINFORCE on a judge's ratings, against loops and by hand; ranks and faults."""

import copy
import dataclasses
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
    weights,
    write_jsonl,
)
from ranks import on_ranks
from safetensors.torch import load_file

import feedback
import rlaif
from model import load_model, save_model

TEMPLATE = '--- rate\n{prompt} {response} Mark:\n--- ratings\n[" 1", " 2", " 3", " 4", " 5", '
TEMPLATE += '" 6", " 7", " 8", " 9", " 10"]\n'


def run(monkeypatch, *args):
    return run_script(rlaif, monkeypatch, *args)


@pytest.fixture(scope="module")
def data(toy_data, policy_run, tokenizer, tmp_path_factory):
    """A folder with 20 prompts, 9 held out, a policy, a judge (another untrained model) and a
    template."""
    folder = tmp_path_factory.mktemp("data")
    for name, source, count in [
        ("prompts.jsonl", "prompts_train.jsonl", 20),
        ("held.jsonl", "prompts_validation.jsonl", 9),
    ]:
        write_jsonl(folder / name, read_lines(toy_data / source)[:count])
    policy = load_model(policy_run)
    # Of its training; the script must turn it off.
    policy.config = dataclasses.replace(policy.config, dropout=0.1)
    save_model(folder / "policy", policy, tokenizer, {"stage": "sft"})
    torch.manual_seed(5)
    with torch.no_grad():
        policy.h[0].attn.c_attn.weight.normal_(0, 0.5)
    save_model(folder / "judge", policy, tokenizer, {"stage": "sft"})
    (folder / "template.txt").write_text(TEMPLATE)
    return folder


def flags(data, out, *more):
    files = ["direct", "--prompts", data / "prompts.jsonl", "--validation", data / "held.jsonl"]
    files += ["--init", data / "policy", "--judge", data / "judge", "--max_new_tokens", 8]
    files += ["--template", data / "template.txt", "--num_prompts", 9, "--device", "cpu"]
    return list(map(str, [*files, "--out_dir", out, *more]))


# --- mathematics ----------------------------------------------------------------------------------


def test_what_a_response_is_worth():
    """methods.md card C6: score 0.4, KL 2, beta 0.05."""
    assert rlaif.penalised(0.4, 2.0, 0.05) == pytest.approx(0.28)


def test_reinforce_is_its_double_loop():
    generator = torch.Generator().manual_seed(0)
    logprobs, values = (torch.randn(4, 6, generator=generator).double() for _ in range(2))
    logprobs.requires_grad_()
    values.requires_grad_()
    worth, mask = torch.randn(4, generator=generator).double(), torch.zeros(4, 6).bool()
    for row, (begin, end) in enumerate([(0, 6), (2, 5), (3, 4), (1, 6)]):
        mask[row, begin:end] = True
    policy_losses, value_losses = rlaif.reinforce(logprobs, values, worth, mask)
    (policy_losses.sum() + value_losses.sum()).backward()
    for b in range(4):
        for t in range(6):
            inside = float(mask[b, t])
            gap = (worth[b] - values[b, t]).item()
            assert policy_losses[b, t].item() == pytest.approx(
                -gap * logprobs[b, t].item() * inside
            )
            assert value_losses[b, t].item() == pytest.approx(gap**2 / 2 * inside)
            assert logprobs.grad[b, t].item() == pytest.approx(-gap * inside)
            # The baseline learns from its own loss alone.
            assert values.grad[b, t].item() == pytest.approx(-gap * inside)


def test_the_bandit_reaches_the_exact_optimum(data, tmp_path, monkeypatch, tokenizer):
    """methods.md section 0, by ratings of 1, 5.5 and 10: at beta 1/3 the optimum of (1 - beta)
    score - beta KL is pi_ref exp(2 score) / Z, within 0.02 in total variation."""
    arms = policy_of_arms(tmp_path / "policy", tokenizer)
    worth = {" golf": -1.0, " chess": 0.0, " tennis": 1.0}

    def rated(judge, template, lines, texts):
        return [worth[text] for text in texts]

    monkeypatch.setattr(rlaif, "ratings", rated)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Which?"}])
    args = ["--init", tmp_path / "policy", "--validation", "", "--max_new_tokens", 1]
    args += ["--prompts", tmp_path / "prompts.jsonl", "--missing_eos_score", "none"]
    args += ["--beta", 1 / 3, "--steps", 80, "--batch_size", 256, "--lr", 0.003]
    args += ["--value_lr", 0.03, "--final_lr", 0.01]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 0
    with torch.no_grad():
        logits = load_model(tmp_path / "run")(torch.tensor([tokenizer.encode_ordinary("Which?")]))
    found = logits[0, -1].softmax(-1)[arms]
    distance = 0.5 * (found - torch.tensor([0.036667, 0.162559, 0.800774])).abs().sum().item()
    print(f"total variation {distance:.4f}: {found.tolist()}")
    assert found.sum() > 0.999 and distance < 0.02


# --- the loop -------------------------------------------------------------------------------------


def iterations_by_hand(data, tokenizer, c):
    """What direct does with the canned rollout, one sequence at a time, without pads, masks or
    batches, with Adam written out. -> parameters, and what it logs."""
    policy, judge = load_model(data / "policy").double(), load_model(data / "judge").double()
    reference, value = copy.deepcopy(policy), feedback.add_scalar_head(policy).double().eval()
    with torch.no_grad():
        value.score.weight.zero_()
    lines, moments, logged = read_lines(data / "prompts.jsonl"), {}, []
    answers = [tokenizer.encode_ordinary(f" {i}")[0] for i in range(1, 11)]

    def rating(prompt, response):
        text = f"{prompt.strip()} {response.strip()} Mark:"
        logits = judge(torch.tensor([tokenizer.encode_ordinary(text)]))[0, -1]
        shares = logits[answers].softmax(-1)
        expected = sum((i + 1) * share.item() for i, share in enumerate(shares))
        return 2 * (expected - 1) / 9 - 1

    for step in range(c.steps):
        episodes = []
        for i in feedback.prompts_of_step(len(lines), c.batch_size, step, c.seed):
            text = lines[i]["prompt"]
            ids = (list(text.encode()) * 2)[: 2 + len(text) % 6]
            ended = len(text) % 3 > 0
            with torch.no_grad():
                score = rating(text, tokenizer.decode(ids))
            response = ids + [tokenizer.eot_token] * ended
            episodes.append((tokenizer.encode_ordinary(text), response, ended, score))
        least, loss, count = min(-1.0, *(e[3] for e in episodes)), 0.0, 0
        kls, worths, returns, missed = [], [], [], []
        for prompt, response, ended, score in episodes:
            sequence = torch.tensor([prompt + response])
            each = []
            for model in (policy, reference):
                logits = model(sequence)[0, len(prompt) - 1 : -1] / c.temperature
                rows = zip(logits.log_softmax(-1), response, strict=True)
                each.append([row[token] for row, token in rows])
            kl = sum(a.item() - b.item() for a, b in zip(*each, strict=True))
            worth = (1 - c.beta) * (score if ended else least) - c.beta * kl
            kls.append(kl)
            worths.append(worth)
            for t, logprob in enumerate(each[0]):
                before = value(sequence[:, : len(prompt) + t])[0, -1]
                returns.append(worth)
                missed.append(worth - before.item())
                loss = loss - logprob * (worth - before.item()) + (worth - before) ** 2 / 2
                count += 1
        explained = 1 - np.var(missed) / np.var(returns)
        logged.append((np.mean(kls), np.mean(worths), explained))
        for model, peak in ((policy, c.lr), (value, c.value_lr)):
            rate = peak * (step + 1) / c.warmup  # all steps are of the warm-up
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(loss / count, parameters, retain_graph=True)
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
            scale = min(1.0, c.clip_norm / (norm + 1e-6))
            for p, g in zip(parameters, gradients, strict=True):
                m, v = moments.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
                m = 0.9 * m + 0.1 * scale * g
                v = c.adam_beta2 * v + (1 - c.adam_beta2) * (scale * g) ** 2
                moments[p] = m, v
                m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - c.adam_beta2 ** (step + 1))
                with torch.no_grad():
                    if p.dim() == 2:
                        p *= 1 - rate * c.weight_decay
                    p -= rate * m / (v.sqrt() + c.adam_eps)
    parameters = {f"policy.{k}": v for k, v in policy.state_dict().items()}
    return parameters | {f"value.{k}": v for k, v in value.state_dict().items()}, logged


def test_three_iterations_against_ones_by_hand(data, tmp_path, tokenizer):
    """From the judge's ratings to the new weights, equal to 1e-9, and to what is logged."""
    c = rlaif.DirectConfig(
        steps=3,
        batch_size=7,
        micro_batch_size=3,
        temperature=0.8,
        beta=0.3,
        weight_decay=0.1,
        clip_norm=0.2,
        lr=0.01,
        value_lr=0.02,
        warmup=3,
        dtype="float64",
    )
    changed = [(k, v) for k, v in vars(c).items() if v != getattr(rlaif.DirectConfig(), k)]
    args = [part for k, v in changed for part in (f"--{k}", v)]
    with can_the_rollout(rlaif) as patch:
        assert run(patch, *flags(data, tmp_path / "run", "--validation", "", *args)) == 0
    found = load_file(tmp_path / "run/checkpoint-3/tensors.safetensors")
    parameters, logged = iterations_by_hand(data, tokenizer, c)
    for line, expected in zip(metrics(tmp_path / "run"), logged, strict=True):
        got = [line[name] for name in ("kl", "objective", "explained_variance")]
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for name, expected in parameters.items():
        difference = (found[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert difference < 1e-9, (name, difference)


def test_ranks_and_accumulation_take_the_same_update(data, tmp_path):
    """15 episodes of different lengths, some not ended, on 1 rank, 2 ranks and in micro-batches:
    the gradients of policy and value network equal to 1e-12 relative in float64."""
    args = ["--steps", 1, "--batch_size", 15, "--dtype", "float64", "--clip_norm", 1e9]
    args += ["--validation", ""]
    for name, ranks, more in [
        ("one", 1, []),
        ("accumulated", 1, ["--micro_batch_size", 4]),
        ("both", 2, ["--micro_batch_size", 7]),  # rank 1 has nothing for its second one
    ]:
        argv = flags(data, tmp_path / name, *args, *more)
        if ranks == 1:
            with can_the_rollout(rlaif) as patch:
                assert run(patch, *argv) == 0
            continue
        code = f"{CANNED.format(script='rlaif')}sys.argv = {['rlaif.py', *argv]!r}\nrlaif.main()\n"
        done = on_ranks("rlaif", code, ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.01
    for name in ("accumulated", "both"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in set(a) - {"rollout_share", "scoring_share", "update_share"}:
                assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12), (name, key)


LONG = ["--steps", 5, "--batch_size", 8, "--save_every", 2, "--eval_every", 3]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *flags(data, out, *LONG)) == 0
    return out


def keys_of(answers):
    return [key for line in read_lines(answers) for key in line]


def test_kill_and_resume(data, tmp_path, uninterrupted):
    """kill -9 in the first update: what the judge said before it is kept, nothing is asked twice,
    and the end is bit-identical."""
    args = flags(data, tmp_path / "run", *LONG, "--resume")
    code = (
        "import signal\n"
        f"real, calls = rlaif.reinforce, []\n"
        f"def reinforce(*args):\n"
        f"    calls.append(1)\n"
        f"    if len(calls) == 1:\n"
        f"        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    return real(*args)\n"
        f"rlaif.reinforce = reinforce\nsys.argv = {['rlaif.py', *args]!r}\nrlaif.main()\n"
    )
    first = on_ranks("rlaif", code, 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    before = (tmp_path / "run/answers/0.jsonl").read_bytes()
    kept = len(keys_of(tmp_path / "run/answers/0.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *args) == 0
    same_run(tmp_path / "run", uninterrupted)
    assert (tmp_path / "run/answers/0.jsonl").read_bytes().startswith(before)
    asked, expected = (
        json.loads((out / "report.json").read_text())["asked"]
        for out in (tmp_path / "run", uninterrupted)
    )
    assert asked == expected - kept < expected
    keys = keys_of(tmp_path / "run/answers/0.jsonl")
    assert len(keys) == len(set(keys))
    assert set(keys) == set(keys_of(uninterrupted / "answers/0.jsonl"))


@pytest.mark.parametrize(
    "where, call, fault", [("ratings", 3, "TERM"), ("reinforce", 3, "TERM"), ("ratings", 2, "gone")]
)
def test_what_was_stopped_goes_on(data, tmp_path, monkeypatch, uninterrupted, where, call, fault):
    """SIGTERM while the judge is asked, and in an update; a judge that is gone in an evaluation."""
    args = flags(data, tmp_path / "run", *LONG, "--resume")
    with monkeypatch.context() as patch:
        real, calls = getattr(rlaif, where), []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == call and fault == "TERM":
                os.kill(os.getpid(), signal.SIGTERM)
            elif len(calls) == call:
                raise rlaif.JudgeError("gone")
            return real(*args, **kwargs)

        patch.setattr(rlaif, where, interrupted)
        ended = run(patch, *args)
    assert ended == 128 + signal.SIGTERM if fault == "TERM" else "gone; stopped at step 0" in ended
    assert not (tmp_path / "run/report.json").exists()
    assert run(monkeypatch, *args) == 0
    same_run(tmp_path / "run", uninterrupted)


def test_a_judge_that_goes_away_loses_nothing(data, tmp_path):
    """Two ranks and one episode an iteration. The rank that goes along without any gets no answer:
    both end, saved, with a line that says why, and the same command goes on; to the end of one
    rank, since a rank without episodes adds nothing."""
    args = flags(data, tmp_path / "run", *LONG, "--batch_size", 1, "--resume")
    code = (
        "real, calls = rlaif.ratings, []\n"
        "def ratings(*args):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 4:\n"
        "        raise rlaif.JudgeError('http://x: 503 Busy, 6 times')\n"
        "    return real(*args)\n"
        "rlaif.ratings = ratings\n"
    )
    main = f"sys.argv = {['rlaif.py', *args]!r}\nrlaif.main()\n"
    first = on_ranks("rlaif", code + main)
    assert first.returncode == 1 and "http://x: 503 Busy, 6 times; stopped at" in first.stderr
    before = [(tmp_path / f"run/answers/{rank}.jsonl").read_bytes() for rank in range(2)]
    second = on_ranks("rlaif", main)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "resumed at step" in second.stdout
    for rank in range(2):
        after = (tmp_path / f"run/answers/{rank}.jsonl").read_bytes()
        assert before[rank] and after.startswith(before[rank])
    one = [*flags(data, tmp_path / "one", *LONG), "--batch_size", 1, "--validation", ""]
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *one) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "one")
    both = [
        [line for line in metrics(out) if "score" in line]
        for out in (tmp_path / "run", tmp_path / "one")
    ]
    for a, b in zip(*both, strict=True):
        for key in set(a) - {"rollout_share", "scoring_share", "update_share"}:
            assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-9), key


def test_it_learns_what_the_judge_likes(data, tmp_path, monkeypatch):
    """A judge that rates by length: responses get shorter; the report says by how much."""

    def rated(judge, template, lines, texts):
        return [1 - 2 * min(len(text) / 40, 1) for text in texts]

    monkeypatch.setattr(rlaif, "ratings", rated)
    args = ["--steps", 30, "--batch_size", 32, "--lr", 0.01, "--value_lr", 0.01]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 0
    lines = [line for line in metrics(tmp_path / "run") if "score" in line]
    assert np.mean([x["score"] for x in lines[-5:]]) > lines[0]["score"] + 0.2
    assert lines[-1]["rating"] == pytest.approx(5.5 + 4.5 * lines[-1]["score"])
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["proxy"] > lines[0]["score"] + 0.1 and report["win_rate"] > 0.6


def test_the_self_check_finds_another_forward(data, tmp_path, monkeypatch, capsys):
    """Where the update's log-probabilities are not those of the same tokens without gradients."""
    real = rlaif.token_logprobs

    def another(*args):
        return real(*args) * (1.01 if args[0].requires_grad else 1)

    monkeypatch.setattr(rlaif, "token_logprobs", another)
    assert run(monkeypatch, *flags(data, tmp_path / "run", "--validation", "")) == 2
    assert "self-check: the first minibatch's ratio is" in capsys.readouterr().err


def test_nan_stops_before_the_update(data, tmp_path, monkeypatch, capsys):
    real, calls = rlaif.reinforce, []

    def poisoned(*args):
        policy_losses, value_losses = real(*args)
        calls.append(1)
        return policy_losses * (math.nan if len(calls) == 4 else 1), value_losses

    monkeypatch.setattr(rlaif, "reinforce", poisoned)
    args = ["--steps", 6, "--batch_size", 8, "--save_every", 2, "--validation", ""]
    assert run(monkeypatch, *flags(data, tmp_path / "run", *args)) == 1
    assert "step 3: the gradient's norm is nan" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoint-2").is_dir()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_precisions(data, tmp_path, monkeypatch, dtype):
    args = flags(data, tmp_path / "run", "--steps", 3, "--batch_size", 8, "--dtype", dtype)
    assert run(monkeypatch, *args) == 0
    assert all(x.dtype == torch.float32 for x in load_model(tmp_path / "run").state_dict().values())
    for line in metrics(tmp_path / "run"):
        norms = [name for name, value in line.items() if value is None]  # of skipped steps
        assert norms == [] or (dtype == "float16" and norms == ["policy_norm", "value_norm"])


def test_a_prompt_that_the_judge_has_no_room_for(data, tmp_path, monkeypatch, capsys):
    """Refused at the start, not when it is drawn."""
    long = [{"prompt": "How do I fix a bike? " * 12}, {"prompt": "Hi."}]
    prompts = write_jsonl(tmp_path / "long.jsonl", long)
    args = flags(data, tmp_path / "run", "--prompts", prompts, "--batch_size", 1)
    assert run(monkeypatch, *args) == 2
    assert "tokens; room is for 88" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_judge_that_gives_no_rating(data, tmp_path, monkeypatch):
    """One response without is worth 0, the scale's middle; a judge that gives none ends the run."""

    class Unsure(rlaif.Judge):
        def answers(self, requests):
            return [[] if "no" in x["prompt"] else [-9.0] * 9 + [0.0] for x in requests]

    template, lines = {"rate": "{prompt} {response}", "ratings": [" 1"] * 10}, [{"prompt": "x"}] * 3
    found = rlaif.ratings(Unsure("", ""), template, lines, ["yes", "no", "yes"])
    assert found == [found[0], 0.0, found[0]] and found[0] > 0.9

    reply = {"choices": [{"text": "x", "logprobs": {"top_logprobs": [{" The": -0.1}]}}]}
    monkeypatch.setattr(rlaif.ServerJudge, "post", lambda self, body, read: read(reply))
    ended = run(monkeypatch, *flags(data, tmp_path / "run", "--judge", "http://x/v1"))
    assert "16 questions in a row unanswered: no answer of --template is among" in ended
    assert not (tmp_path / "run/report.json").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--beta", "1.5"], "--beta: expected a number in [0, 1]"),
        (["--judge", "nowhere"], "nowhere"),
        (["--judge", "ftp://x"], "expected a run directory, http://..."),
        (["--init", "nowhere"], "nowhere: not a model directory"),
        (["--template", "nowhere.txt"], "nowhere.txt:0: file"),
        (["--max_new_tokens", "96"], "leaves a prompt no room"),
        (["--gold", "data/toy.py", "--validation", ""], "--gold: only with --validation"),
    ],
)
def test_bad_settings(data, tmp_path, monkeypatch, capsys, more, message):
    assert run(monkeypatch, *flags(data, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_template_without_ten_ratings(data, tmp_path, monkeypatch, capsys):
    for text, message in [
        (TEMPLATE.replace(', " 10"', ""), "ratings: expected ten answers"),
        ("--- ratings\n[]\n", "rate: no such section"),
    ]:
        (tmp_path / "t.txt").write_text(text)
        args = flags(data, tmp_path / "run", "--template", tmp_path / "t.txt")
        assert run(monkeypatch, *args) == 2
        assert message in capsys.readouterr().err
