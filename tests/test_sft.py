"""sft.py: its loss against oracles, and the whole script on small data: ranks, resume, faults."""

import base64
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
from conftest import ROOT, gradient, metrics, run_script, weights
from ranks import on_ranks

import sft
from model import GPT, GPTConfig, generate, load_config, load_model, load_tokenizer, pad

SMALL = (
    "--n_layer 1 --n_embd 16 --n_head 2 --n_positions 64 --max_new_tokens 8 --device cpu".split()
)


@pytest.fixture(scope="module")
def data(toy_data, tmp_path_factory):
    """A folder with 44 demonstrations of very different lengths, 8 held out and 6 prompts."""
    folder = tmp_path_factory.mktemp("data")
    for name, source, count in [
        ("train.jsonl", "demonstrations.jsonl", 44),
        ("held.jsonl", "demonstrations_validation.jsonl", 8),
        ("prompts.jsonl", "prompts_validation.jsonl", 6),
    ]:
        lines = (toy_data / source).read_text().splitlines(keepends=True)[:count]
        (folder / name).write_text("".join(lines))
    shutil.copy(toy_data / "bpe.tiktoken", folder)
    return folder


def flags(data, out, *more):
    files = ["--data", data / "train.jsonl", "--validation", data / "held.jsonl"]
    files += ["--prompts", data / "prompts.jsonl", "--tokenizer", data / "bpe.tiktoken"]
    return [*map(str, files), "--out_dir", str(out), *SMALL, *map(str, more)]


def run(monkeypatch, *args):
    return run_script(sft, monkeypatch, *args)


# --- the loss -------------------------------------------------------------------------------------


class FixedLogits(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens, at):
        return self.logits.expand(len(tokens), -1, -1)[at]


def test_response_only_loss_vector():
    """Four positions, three tokens, a prompt of two: 1.304774 on the response, .950287 on all."""
    logits = torch.tensor([[[0.5, -1, 2], [1, 0, -1], [0.2, 0.3, 0.1], [2, -2, 0]]])
    tokens, mask = pad([[0, 2]], [[1, 2]])
    for weight, expected in [(0.0, 1.304774), (1.0, 0.950287)]:
        w = sft.loss_weights(tokens, mask, weight)
        total, response = sft.weighted_nll(FixedLogits(logits), tokens, mask, w)
        assert total.item() / w.sum().item() == pytest.approx(expected, abs=1e-6)
        assert response.item() == pytest.approx(2 * 1.304774, abs=1e-5)
    w = sft.loss_weights(tokens, mask, 0.5)
    total, _ = sft.weighted_nll(FixedLogits(logits), tokens, mask, w)
    assert total.item() == pytest.approx(2.609549 + 0.5 * 0.241311, abs=1e-5)


def test_loss_weights():
    tokens, mask = pad([[5, 5, 5], [5]], [[6, 7], [6, 7, 8]])
    assert sft.loss_weights(tokens, mask, 0.25).tolist() == [
        [0, 0.25, 0.25, 1, 1],
        [0, 1, 1, 1, 0],
    ]


def test_eos_is_trained_and_an_overfitted_model_stops(data, tmp_path, monkeypatch):
    """One line, learnt by heart, is said word for word and ends there."""
    line = {"prompt": "How do I fix a bike?", "response": " To fix a bike, you need oil."}
    (tmp_path / "one.jsonl").write_text(json.dumps(line) + "\n")
    args = flags(data, tmp_path / "run", "--data", tmp_path / "one.jsonl", "--steps", 150)
    assert run(monkeypatch, *args, "--lr", 1e-2, "--prompts", "", "--max_new_tokens", 16) == 0
    policy, tokenizer = load_model(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    prompt = tokenizer.encode_ordinary(line["prompt"])
    eos = tokenizer.eot_token
    tokens, mask = generate(policy, [prompt], 20, temperature=0, eos=eos)
    response = tokens[0][mask[0]].tolist()
    assert tokenizer.decode(response[:-1]) == line["response"] and response[-1] == eos


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_every_line_once_an_epoch_on_any_number_of_ranks(count):
    lengths = np.random.default_rng(0).integers(3, 60, count).tolist()
    for world in (1, 2, 3):
        batches = sft.grouped_batches(lengths, 8, [0, 1])
        assert batches == sft.grouped_batches(lengths, 8, [0, 1])
        shares = [[sft.rank_share(b, r, world, 2) for b in batches] for r in range(world)]
        seen = [i for rank in shares for batch in rank for micro in batch for i in micro]
        assert sorted(seen) == list(range(count))
        for of_one_batch in zip(*shares, strict=True):
            assert len({len(micros) for micros in of_one_batch}) == 1  # forwards alike on all ranks
            assert all(len(micro) <= 2 for micros in of_one_batch for micro in micros)
    if count == 1000:
        assert sft.grouped_batches(lengths, 8, [0, 1]) != sft.grouped_batches(lengths, 8, [0, 2])


def test_padding_is_under_a_tenth(toy_data, tokenizer):
    examples, _ = sft.read_demonstrations(toy_data / "demonstrations.jsonl", tokenizer, 128, False)
    lengths = [len(p) + len(r) for p, r in examples]
    batches = sft.grouped_batches(lengths, 32, 0)
    cells = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert 1 - sum(lengths) / cells < 0.03


def test_learning_rate():
    cfg = sft.Config(lr=1.0, warmup=4, final_lr=0.1)
    rates = [sft.learning_rate(step, 24, cfg) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.11
    assert rates[4:] == sorted(rates[4:], reverse=True)


# --- the same update whatever the ranks -----------------------------------------------------------

# The drivers keep the checkpoint that a finished run deletes, for `gradient`.
KEEP = "sft.shutil.rmtree = lambda *args, **kwargs: None\n"


def test_ranks_and_accumulation_take_the_same_gradient(data, tmp_path, monkeypatch):
    """1 rank, 2 ranks and accumulation; ragged lengths, 15 lines (one rank has one less), some
    weight on the prompt: equal to 1e-12 relative in float64."""
    args = ["--steps", 1, "--batch_size", 15, "--dtype", "float64", "--clip_norm", 1e9]
    args += ["--prompt_loss_weight", 0.3]
    with monkeypatch.context() as patch:
        patch.setattr(sft.shutil, "rmtree", lambda *args, **kwargs: None)
        assert run(patch, *flags(data, tmp_path / "one", *args)) == 0
        more = ["--micro_batch_size", 4]
        assert run(patch, *flags(data, tmp_path / "accumulated", *args, *more)) == 0
    for name, more in (("two", []), ("both", ["--micro_batch_size", 3])):
        argv = ["sft.py", *flags(data, tmp_path / name, *args, *more)]
        done = on_ranks("sft", f"{KEEP}sys.argv = {argv!r}\nsft.main()\n")
        assert done.returncode == 0, done.stderr[-3000:]
    expected, logged = gradient(tmp_path / "one"), metrics(tmp_path / "one")
    assert expected.norm() > 0.1
    for name in ("accumulated", "two", "both"):
        difference = gradient(tmp_path / name) - expected
        assert difference.norm() / expected.norm() < 1e-12, name
        for a, b in zip(metrics(tmp_path / name), logged, strict=True):
            for key in ("loss", "eval_loss"):
                assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-9)


@pytest.mark.parametrize("n, forwards", [(1, 1), (3, 2), (9, 5)])
def test_few_lines_on_two_ranks(data, tmp_path, n, forwards):
    """Fewer lines than ranks, and a last batch of one: it ends, and every line is trained on."""
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:n]))
    argv = ["sft.py", *flags(data, tmp_path / "run", "--data", tmp_path / "few.jsonl")]
    argv += ["--batch_size", "4", "--micro_batch_size", "1"]
    code = (
        "seen, real = [], sft.weighted_nll\n"
        "def spy(model, tokens, mask, weights):\n"
        "    if model.training:\n"
        "        seen.append(tokens)\n"
        "    return real(model, tokens, mask, weights)\n"
        f"sft.weighted_nll, sys.argv = spy, {argv!r}\nsft.main()\n"
        "os.write(1, b'forwards %d\\n' % len(seen))\n"
    )
    done = on_ranks("sft", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"forwards {forwards}\n") == 2
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["step"] == math.ceil(n / 4)
    assert report["sampled"]["all"]["count"] == 6  # samples of both ranks, each prompt once


# --- stop and resume ------------------------------------------------------------------------------

LONG = ["--epochs", 2, "--batch_size", 8, "--save_every", 4, "--eval_every", 5, "--log_every", 3]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """12 steps with dropout, in one go."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *flags(data, out, *LONG, "--dropout", 0.1)) == 0
    return out


@pytest.mark.parametrize("moment", [2, 4, 5, 7, 12])
def test_kill_and_resume(data, tmp_path, uninterrupted, moment):
    """kill -9 before the first save, on a save, on an evaluation, in between, in the last step."""
    args = flags(data, tmp_path / "run", *LONG, "--dropout", 0.1, "--resume")
    code = (
        "import signal\n"
        f"real = sft.learning_rate\n"
        f"def rate(step, total, cfg):\n"
        f"    if step + 1 == {moment} and not os.path.exists({str(tmp_path / 'killed')!r}):\n"
        f"        open({str(tmp_path / 'killed')!r}, 'w').close()\n"
        f"        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    return real(step, total, cfg)\n"
        f"sft.learning_rate = rate\nsys.argv = {['sft.py', *args]!r}\nsft.main()\n"
    )
    first = on_ranks("sft", code, 1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *args) == 0
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert metrics(tmp_path / "run") == metrics(uninterrupted)
    samples = [out / "samples.jsonl" for out in (tmp_path / "run", uninterrupted)]
    assert samples[0].read_bytes() == samples[1].read_bytes()


def test_a_resumed_run_lets_go_of_its_checkpoint(tmp_path):
    """Its tensors are copies: a mapped file keeps its room on the disk when it is deleted."""
    cpu, cfg = torch.device("cpu"), sft.Config(data="", out_dir=str(tmp_path))
    model = GPT(GPTConfig(8, 8, 8, n_layer=1, n_head=2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 8, dtype=torch.int64)).logsumexp(-1).sum().backward()
    optimizer.step()
    things = {"policy": model}, {"adam": optimizer}
    sft.save_checkpoint(cfg, 1, *things, {}, cpu, 0)
    sft.load_checkpoint(tmp_path / "checkpoint-1", *things, cpu, 0)
    before = [x.clone() for state in optimizer.state.values() for x in state.values()]
    before += [p.detach().clone() for p in model.parameters()]
    path = tmp_path / "checkpoint-1/tensors.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    after = [x for state in optimizer.state.values() for x in state.values()]
    assert all(map(torch.equal, [*after, *model.parameters()], before))


@pytest.mark.parametrize("where", ["learning_rate", "held_out_loss", "sample_responses"])
def test_sigterm_saves_and_resumes(data, tmp_path, monkeypatch, uninterrupted, where):
    """SIGTERM in a step, in the held-out loss, in sampling: saved there, and exact afterwards."""
    args = flags(data, tmp_path / "run", *LONG, "--dropout", 0.1, "--resume")
    with monkeypatch.context() as patch:
        real, calls = getattr(sft, where), []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        patch.setattr(sft, where, interrupted)
        assert run(patch, *args) == 128 + signal.SIGTERM
    assert not (tmp_path / "run/report.json").exists()
    assert run(monkeypatch, *args) == 0
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert metrics(tmp_path / "run")[-1] == metrics(uninterrupted)[-1]


def test_resume_refuses_another_run(data, tmp_path, monkeypatch, capsys, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    args = flags(data, out, *LONG, "--dropout", 0.1)
    before = weights(out)
    assert run(monkeypatch, *args) == 2
    assert f"{out}: in use; --resume goes on with its run" in capsys.readouterr().err
    settings = json.loads((out / "args.json").read_text())
    settings["settings"]["out_dir"] = str(out)
    (out / "args.json").write_text(json.dumps(settings))
    assert run(monkeypatch, *args, "--resume") == 0
    assert "this run is finished" in capsys.readouterr().out
    assert run(monkeypatch, *args, "--resume", "--lr", 0.5) == 2
    assert "other settings: lr: 0.002 -> 0.5" in capsys.readouterr().err
    settings["settings"]["world"] = 2
    settings["settings"][f"sha256 of {data / 'train.jsonl'}"] = "0"
    (out / "args.json").write_text(json.dumps(settings))
    assert run(monkeypatch, *args, "--resume") == 2
    message = capsys.readouterr().err
    assert "train.jsonl: '0' -> " in message and "world: 2 -> 1" in message
    assert weights(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert run(monkeypatch, *flags(data, tmp_path / "mine"), "--overwrite") == 2
    assert (tmp_path / "mine/thesis.txt").exists()
    assert run(monkeypatch, *flags(data, out, "--steps", 1), "--overwrite") == 0
    assert (
        weights(out) != before
        and (out / "script.py").read_bytes() == (ROOT / "sft.py").read_bytes()
    )


def test_a_damaged_checkpoint_is_refused_by_name(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    args = flags(data, out, *LONG, "--resume")

    def stop_at_five(step, total, cfg):
        if step == 5:
            raise KeyboardInterrupt
        return 1e-3

    with monkeypatch.context() as patch:
        patch.setattr(sft, "learning_rate", stop_at_five)
        with pytest.raises(KeyboardInterrupt):
            run(patch, *args)
    for name in ("tensors.safetensors", "state.json", "sha256.json"):
        path = out / "checkpoint-4" / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        for damaged in (bytes(flipped), whole[: len(whole) // 2]):
            path.write_bytes(damaged)
            assert run(monkeypatch, *args) == 2
            message = capsys.readouterr().err
            assert "checkpoint-4" in message and message.count("\n") == 1
            assert name in message or name == "sha256.json"
        path.write_bytes(whole)
    assert run(monkeypatch, *args) == 0


# --- numbers --------------------------------------------------------------------------------------


def test_a_bad_gradient_on_one_rank_stops_all_before_the_update(data, tmp_path):
    argv = ["sft.py", *flags(data, tmp_path / "run", *LONG)]
    code = (
        "real, calls, step_of = sft.weighted_nll, [], torch.optim.AdamW.step\n"
        "def poisoned(model, *args):\n"
        "    loss, response = real(model, *args)\n"
        "    if model.training:\n"
        "        calls.append(1)\n"
        "        if len(calls) == 3 and os.environ['RANK'] == '1':\n"
        "            loss = loss * float('nan')\n"
        "    return loss, response\n"
        "updates = []\n"
        "def counted(self, *args, **kwargs):\n"
        "    updates.append(1)\n"
        "    return step_of(self, *args, **kwargs)\n"
        "torch.optim.AdamW.step = counted\n"
        f"sft.weighted_nll = poisoned\nsys.argv = {argv!r}\n"
        "try:\n    sft.main()\nfinally:\n    os.write(1, b'updates %d\\n' % len(updates))\n"
    )
    done = on_ranks("sft", code)
    assert done.returncode != 0
    assert done.stdout.count("updates 2\n") == 2
    assert "step 2: the gradient is nan on the batch of lines" in done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_precisions(data, tmp_path, monkeypatch, dtype):
    """Every type trains to about the loss of float32."""
    assert run(monkeypatch, *flags(data, tmp_path / "run", *LONG, "--dtype", dtype)) == 0
    assert run(monkeypatch, *flags(data, tmp_path / "float32", *LONG)) == 0
    found, expected = metrics(tmp_path / "run")[-1], metrics(tmp_path / "float32")[-1]
    tolerance = 1e-5 if dtype == "float64" else 0.03
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=tolerance)


def test_float16_overflow_skips_the_step_and_survives_resume(data, tmp_path, monkeypatch):
    scales = []
    real = torch.amp.GradScaler.update

    def spy(self):
        real(self)
        scales.append(self.get_scale())

    monkeypatch.setattr(torch.amp.GradScaler, "update", spy)
    args = flags(data, tmp_path / "run", *LONG, "--dtype", "float16", "--initializer_range", 1.5)
    assert run(monkeypatch, *args) == 0
    assert len(scales) == 12 and scales[-1] < 65536


# --- settings and input ---------------------------------------------------------------------------


def test_a_run_holds_what_the_design_says(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {
        *("args.json", "config.json", "metrics.jsonl", "model.safetensors", "report.json"),
        *("samples.jsonl", "script.py", "tokenizer.json", "tokenizer_config.json"),
    }
    args = json.loads((uninterrupted / "args.json").read_text())
    assert args["settings"]["batch_size"] == 8 and args["versions"]["torch"] == torch.__version__
    assert load_config(uninterrupted)["stage"] == "sft"
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == [0, 3, 5, 6, 9, 10, 12, 12]
    assert [("eval_loss" in line) for line in lines] == [1, 0, 1, 0, 0, 1, 0, 1]
    for line in lines:
        assert math.isfinite(line.get("loss", 0)) and 0 <= line.get("padding", 0) < 0.4


def test_the_loss_falls_and_gold_is_printed(data, tmp_path, monkeypatch, capsys):
    gold = tmp_path / "gold.py"
    gold.write_text(
        "def score(prompt, response, *, reference, **fields):\n"
        "    return len(response) / 100\n"
        "def explain(prompt, response, **fields):\n"
        "    return {'length': len(response), 'task_' + fields['task']: True}\n"
    )
    args = flags(data, tmp_path / "run", "--epochs", 20, "--gold", gold, "--num_prompts", 5)
    args += ["--warmup", "5", "--lr", "1e-2"]
    assert run(monkeypatch, *args) == 0
    lines = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 1
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["greedy"]["all"]["count"] == 5 and len(report["sampled"]["all"]["gold"]) == 3
    assert report["sampled"]["summary"]["task_summary"][0] == 1
    assert "gold +0." in capsys.readouterr().out


def test_summarise():
    """Means with their intervals, over all and by task; prompts may have a task or none."""
    values = [("a", 1.0), ("a", 3.0), (None, 8.0)]
    samples = [{"parts": {"x": v}} | ({"task": t} if t else {}) for t, v in values]
    samples[0]["parts"]["y"] = samples[1]["parts"]["y"] = 0.5
    table = sft.summarise(samples)
    assert list(table) == ["all", "a"] and table["all"]["count"] == 3
    half = 1.96 * (13 / 3) ** 0.5
    assert table["all"]["x"] == pytest.approx([4, 4 - half, 4 + half])
    assert table["a"] == {"x": pytest.approx([2, 0.04, 3.96]), "y": [0.5, 0.5, 0.5], "count": 2}
    assert sft.summarise([samples[2]]) == {"all": {"x": [8.0, None, None], "count": 1}}


def test_prompts_without_a_task(data, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "My car."}\n{"prompt": "", "index": 7}\n')
    args = flags(data, tmp_path / "run", "--prompts", tmp_path / "prompts.jsonl", "--steps", 1)
    assert run(monkeypatch, *args) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert list(report["greedy"]) == ["all"] and report["greedy"]["all"]["count"] == 2


def test_no_prompts_are_sampled_when_none_are_asked_for(data, tmp_path, monkeypatch):
    args = flags(data, tmp_path / "run", "--num_prompts", 0, "--steps", 1)
    assert run(monkeypatch, *args) == 0
    assert "greedy" not in json.loads((tmp_path / "run/report.json").read_text())


def test_a_prompt_whose_task_is_no_string(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": "x", "task": ["a"]}\n')
    args = flags(data, tmp_path / "run", "--prompts", tmp_path / "prompts.jsonl")
    assert run(monkeypatch, *args) == 2
    assert 'prompts.jsonl:3: task: expected a string, got ["a"]' in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_saved_is_refused_at_once(data, tmp_path, monkeypatch, capsys):
    """The 256 bytes and a word that no merges lead to."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"hello"]
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens)]
    (tmp_path / "odd.tiktoken").write_text("\n".join(lines))
    args = flags(data, tmp_path / "run", "--tokenizer", tmp_path / "odd.tiktoken")
    assert run(monkeypatch, *args) == 2
    assert "can't be reached by merging two others" in capsys.readouterr().err


def test_bad_gold_files(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind\n")
    for name, message in [
        ("empty.py", "score: no such function"),
        ("none.py", "not a Python"),
        ("broken.py", "can't be run"),
    ]:
        args = flags(data, tmp_path / "run", "--gold", tmp_path / name)
        assert run(monkeypatch, *args) == 2
        assert f"{name}: {message}" in capsys.readouterr().err


def test_overlong_lines(data, tmp_path, monkeypatch, capsys):
    args = flags(data, tmp_path / "drop", "--max_length", 20, "--steps", 1, "--validation", "")
    assert run(monkeypatch, *args) == 0
    printed = capsys.readouterr().out
    lines, cut, dropped = (
        int(printed.split(word)[0].split()[-1]) for word in (" lines", " cut", " dropped")
    )
    assert lines + dropped == 44 and cut > 0 and dropped > 0
    args = flags(data, tmp_path / "cut", "--max_length", 6, "--overlong", "cut", "--steps", 1)
    assert run(monkeypatch, *args) == 0
    assert "44 lines" in (text := capsys.readouterr().out) and "44 cut, 0 dropped" in text
    args = flags(data, tmp_path / "none", "--max_length", 3, "--steps", 1)
    assert run(monkeypatch, *args) == 2
    assert "no response fits into 3 tokens" in capsys.readouterr().err


def test_language_modelling_lines(data, tmp_path, monkeypatch):
    """An empty prompt is one EOS, and all of the text is trained."""
    (tmp_path / "text.jsonl").write_text('{"prompt": "", "response": "My cousin sold my lamp."}\n')
    args = flags(data, tmp_path / "run", "--data", tmp_path / "text.jsonl", "--steps", 2)
    assert run(monkeypatch, *args) == 0


def test_init_continues_a_run_and_checks_its_tokenizer(
    data, tmp_path, monkeypatch, capsys, uninterrupted, gpt2_tokenizer
):
    args = flags(data, tmp_path / "more", "--init", uninterrupted, "--lr", 0, "--steps", 1)
    assert run(monkeypatch, *args) == 0
    assert weights(tmp_path / "more") == weights(uninterrupted)
    args = flags(data, tmp_path / "other", "--init", uninterrupted, "--tokenizer", "gpt2")
    assert run(monkeypatch, *args) == 2
    assert "was trained with the tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--overlong", "keep"], "--overlong: expected drop or cut, got keep"),
        (["--batch_size", "0"], "expected more than 0"),
        (["--lr", "-1"], "--lr: expected a number of at least 0"),
        (["--lr", "nan"], "--lr: expected a number of at least 0"),
        (["--dtype", "int8"], "--dtype: expected float32"),
        (["--device", "cuda"], "there is no such CUDA device here"),
        (["--device", "gpu"], "--device gpu: expected cpu or cuda"),
        (["--dropout", "1"], "expected less than 1"),
        (["--max_length", "1"], "--max_length: expected 2 or more"),
        (["--n_head", "3"], "n_embd 16 is not a multiple of n_head 3"),
        (["--init", "nowhere"], "nowhere: not a model directory"),
        (["--tokenizer", "nowhere.tiktoken"], "nowhere.tiktoken"),
        (["--max_new_tokens", "64"], "--max_new_tokens: expected fewer than the 64 positions"),
        (["--learning_rate", "1"], "unrecognized arguments"),
    ],
)
def test_bad_settings(data, tmp_path, monkeypatch, capsys, more, message):
    if more[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run(monkeypatch, *flags(data, tmp_path / "run"), *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_shows_every_flag(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert "Objective" in text and text.count("sft.py") >= 2
    for name in vars(sft.Config()):
        assert f"--{name}" in text


def test_alpaca_on_gpt2s_tokenizer(shared, gpt2_tokenizer, tmp_path, monkeypatch):
    """Real text, real vocabulary, a small network: the loss falls."""
    target = tmp_path / "alpaca.jsonl"
    subprocess.run(
        [sys.executable, "data/convert.py", "alpaca", shared / "data/alpaca-805.json", target],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    args = ["--data", target, "--validation", "", "--prompts", ""]
    args += ["--tokenizer", "gpt2", "--out_dir", tmp_path / "run", *SMALL, "--max_length", 64]
    args += ["--overlong", "cut", "--steps", 30, "--lr", 1e-2, "--warmup", 5]
    args += ["--batch_size", 4]
    args += ["--log_every", 5]
    assert run(monkeypatch, *args) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 1
